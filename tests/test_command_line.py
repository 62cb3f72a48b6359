"""The command line: flags, help, exit codes, and the one line that a mistake gets."""

import ast
import dataclasses
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, only, run_script

import ai_breakout_game as script

FIELDS = dataclasses.fields(script.Config)
FLAGS = [f"--{field.name.replace('_', '-')}" for field in FIELDS]
NAMES = [flag for flag, field in zip(FLAGS, FIELDS) if field.type is str]
pytestmark = pytest.mark.usefixtures("here")
QUICK = ("--num-envs=1", "--num-steps=8", "--num-minibatches=1", "--total-timesteps=8")


@pytest.fixture
def started(monkeypatch):
    """The settings that a mode was started with, instead of running it."""
    configs = []
    for name in ("train", "evaluate", "record", "play"):
        monkeypatch.setattr(script, name, lambda config, *_: configs.append(config))
    return configs


def mistake(capsys, *args):
    """The line that `args` get, which are a mistake. Nothing may be written."""
    before = sorted(Path().rglob("*"))
    code = script.main(list(args))
    output, errors = capsys.readouterr()
    assert code == 2 and output == "", (args, output, errors)
    assert errors.startswith("ai_breakout_game.py: ") and errors.endswith("\n"), (args, errors)
    assert errors.count("\n") == 1 and 30 < len(errors) < 400, (args, errors)
    assert sorted(Path().rglob("*")) == before, args
    return errors


# -------------------------------------------------------------------------------------------- help


@pytest.fixture
def help_in(capsys, monkeypatch):
    """The help on a screen of so many columns."""

    def print_help(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit, match=r"^0$"):
            script.main(["--help"])
        return capsys.readouterr().out

    return print_help


def test_every_setting_is_a_flag_with_a_group_and_a_text(help_in):
    assert len(FLAGS) <= 32
    for field, flag in zip(FIELDS, FLAGS):
        group = help_in(200).split(f"\n{field.metadata['group']}:\n")[1].split("\n\n")[0]
        text = re.search(rf"^  {flag} \S+\s+(\w.{{14,}})$", group, re.MULTILINE)
        assert text, flag
        if type(field.default) in (int, float) and field.default:
            value = re.search(r"\(default: ([\d.,e-]+)\)", text[1])[1]
            assert float(value.replace(",", "")) == field.default, flag


def test_help_fits_eighty_columns_but_for_the_commands_to_copy(help_in):
    commands = ("    python3", "    tensorboard")
    lines = [line for line in help_in(80).splitlines() if not line.startswith(commands)]
    assert len(lines) > 50 and max(map(len, lines)) <= 80
    assert os.listdir() == []


# ------------------------------------------------------------------------------------------ values


def test_without_flags_the_default_agent_is_trained(started):
    assert script.main([]) == 0
    assert started == [script.Config()]


@pytest.mark.parametrize("text", ["", "=1", "=True", "=yes", "=ON", "=0", "=FALSE", "=no", "=off"])
def test_yes_and_no_are_understood_in_many_spellings(started, text):
    assert script.main([f"--anneal-lr{text}"]) == 0
    assert started[0].anneal_lr is (text in ("", "=1", "=True", "=yes", "=ON"))


def test_numbers_can_be_written_with_an_exponent(started):
    assert script.main(["--total-timesteps=1e6", "--learning-rate=25e-5", "--seed=2e3"]) == 0
    config = started[0]
    assert (config.total_timesteps, config.learning_rate, config.seed) == (1_000_000, 0.00025, 2000)
    assert type(config.total_timesteps) is int and type(config.seed) is int


def test_a_tilde_in_a_name_is_the_home_folder(started, monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    torch.save(script.Agent(4).state_dict(), "mine.mdl")
    assert script.main(["--record=~/a.gif", "--model-filename=~/mine.mdl"]) == 0
    assert started[0].record == os.path.abspath("a.gif")
    assert started[0].model_filename == os.path.abspath("mine.mdl")


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--num-envs=0", "--num-envs: must be .* from 1 to 4,?096, not '0'"),
        ("--num-envs=many", "--num-envs: must be"),
        ("--num-envs=2.5", "--num-envs: must be"),
        ("--num-envs", "--num-envs: expected one argument"),
        ("--total-timesteps=-5", "--total-timesteps: must be"),
        ("--num-steps=1e400", "--num-steps: must be"),
        ("--gamma=1.5", "--gamma: must be .* from 0 to 1, not '1.5'"),
        ("--learning-rate=nan", "--learning-rate: must be .* not 'nan'"),
        ("--clip-coef=inf", "--clip-coef: must be .* not 'inf'"),
        ("--max-frames=3", "--max-frames: must be"),
        ("--learn-fraction=0", "--learn-fraction: must be"),
        ("--sticky-actions=1.1", "--sticky-actions: must be"),
        ("--seed=-1", "--seed: must be"),
        ("--seed=9e99", "--seed: must be"),
        ("--evaluate=0", "--evaluate: must be"),
        ("--num-minibatches=3", "8 games x 128 steps cannot be divided .*--num-minibatches"),
        ("--run=maybe", "--run: must be yes or no, not 'maybe'"),
        ("--nonsense=1", "--nonsense=1"),
        ("--num-env=8", "--num-env=8"),
        ("train", "unrecognized .*train"),
        ("--env-id=BreakoutNoFrameSkip-v4", "did you mean BreakoutNoFrameskip-v4"),
        ("--env-id=BreakoutDeterministic-v4", "did you mean (ALE/)?Breakout(NoFrameskip)?-v"),
        ("--env-id=PongDeterministic-v4", "did you mean (ALE/)?Pong(NoFrameskip)?-v"),
        ("--env-id=ALE/SpaceInvader-v5", "did you mean .*SpaceInvaders"),
        ("--env-id=CartPole-v1", "CartPole-v1 is not an ALE game"),
        ("--device=tpu", "--device=tpu is not available; this machine has .*cpu"),
        ("--precision=fp8", "--precision=fp8 is neither auto, float32 nor bfloat16"),
        ("--model-filename=nowhere.mdl", "there is no nowhere.mdl"),
        ("--run --model-filename=nowhere.mdl", "there is no nowhere.mdl"),
        ("--record=a.gif --model-filename=nowhere.mdl", "there is no nowhere.mdl"),
        ("--resume=latest", "there is no run here"),
        ("--resume=nowhere", "there is no nowhere"),
        ("--run --model-filename=latest", "there is no run here"),
        ("--play --model-filename=latest", "there is no run here"),
        ("--record=film.avi", "--record=film.avi must end in .gif, .mp4 or .png"),
        ("--record=a.gif --evaluate=2", "--evaluate and --record are mutually exclusive"),
        ("--run=1 --evaluate=2", "--run and --evaluate are mutually exclusive"),
        ("--resume=latest --run", "are mutually exclusive"),
        ("--run --play", "--run and --play are mutually exclusive"),
        ("--record=a.gif --seconds=0", "--seconds: must be"),
        ("--seconds=5", "--seconds is for recording"),
        ("--run --seconds=5", "--seconds is for recording, not for (--)?run"),
        ("--greedy", "--greedy is for playing"),
        ("--evaluate=2 --gamma=0.9", "--gamma is for PPO, not for (--)?evaluate"),
        ("--evaluate=2 --num-envs=3", "--num-envs is for training"),
        ("--record=a.gif --total-timesteps=9", "--total-timesteps is for training"),
        *((f"{flag}=", f"{flag}: must be a name, not ''") for flag in NAMES),
    ],
)
def test_a_mistake_gets_one_clear_line_and_code_2(started, capsys, args, said):
    assert re.search(said, mistake(capsys, *args.split(" ")))


def test_the_program_itself_ends_with_code_2():
    done = run_script("--num-envs=0", cwd=".")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"ai_breakout_game.py: --num-envs: must .*\n", done.stderr)


RIGHT = ("--run", "--evaluate=3", "--num-envs=4", "--seed=7", "--greedy=no", "--gamma=0.9",
         "--env-id=ALE/Pong-v5", "--learning-rate=1e-3", "--device=cpu", "--seconds=2")  # fmt: skip


def any_text(rng, length):
    letters = "abc-=/.\\ \t\n0189%{}~é漢\x1b\U0001f600"
    return "".join(rng.choice(letters) for _ in range(rng.randrange(1, length)))


def wrong_word(rng):
    """A word that cannot be right, wherever it stands."""
    numbers = [flag for flag, field in zip(FLAGS, FIELDS) if field.type in (int, float)]
    answers = [flag for flag, field in zip(FLAGS, FIELDS) if field.type is bool]
    return rng.choice([
        "--" + any_text(rng, 12).lstrip("-") + "?",  # no such flag
        rng.choice(FLAGS)[:-1] + "=1",  # misspelt
        f"{rng.choice(numbers)}={rng.choice(['x', '-1', 'nan', '-inf', '1e400', '½', '', '8 8'])}",
        f"{rng.choice(answers)}={rng.choice(['', '2', '-1', 'nan', 'maybe', '0x1', '{}', '🎈'])}",
        f"--env-id={any_text(rng, 30)}?",
        f"--resume={any_text(rng, 300)}?",
        f"--model-filename={any_text(rng, 30)}?",
        any_text(rng, 20).lstrip("-") + "?",  # an argument without a flag
    ])  # fmt: skip


def check_wrong_command_lines(capsys, count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        wrong = wrong_word(rng)
        right = rng.sample(RIGHT, rng.randrange(4))
        words = [wrong, *(word for word in right if word.split("=")[0] != wrong.split("=")[0])]
        rng.shuffle(words)
        mistake(capsys, *words)


def test_hundreds_of_wrong_command_lines_get_one_line_each(started, capsys):
    check_wrong_command_lines(capsys, 300, seed=0)


@pytest.mark.slow
def test_thousands_of_wrong_command_lines_get_one_line_each(started, capsys):
    check_wrong_command_lines(capsys, 2000, seed=1)


# ---------------------------------------------------------------------------------- the file itself


def run_python(*args, **options):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=120, **options
    )


def test_the_file_works_alone_in_a_folder_with_blanks_and_umlauts():
    folder = Path("größe ü").absolute()
    folder.mkdir()
    shutil.copy(SCRIPT, folder / "mein spiel.py")
    done = run_python("mein spiel.py", *QUICK, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "models" / "ai_breakout_game8.mdl").is_file()
    assert sorted(os.listdir(folder)) == ["mein spiel.py", "models", "runs"]


def test_a_symbolic_link_to_the_script_finds_the_agent_that_ships():
    os.symlink(SCRIPT, "link.py")
    done = run_python("link.py", "--record=a.gif", "--seconds=0.1")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert sorted(os.listdir()) == ["a.gif", "link.py"]


@pytest.mark.slow
def test_no_warning_is_raised_in_training_or_playing():
    code = f"""if True:
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import ai_breakout_game as script
        play = ["--model-filename=ai_breakout_game8.mdl", "--max-frames=40"]
        for mode in {[*QUICK]}, ["--evaluate=2"], ["--record=a.gif"], ["--record=a.mp4"]:
            code = script.main([*mode, *play] if len(mode) == 1 else mode)
            if code:
                sys.exit(code)"""
    done = run_python("-W", "error", "-c", code)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert os.path.getsize("a.gif") > 1000 and os.path.getsize("a.mp4") > 1000


def test_nothing_depends_on_asserts_which_python_can_leave_out():
    tree = ast.parse(SCRIPT.read_text())
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def test_training_works_in_a_thread():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(script.main([*QUICK])))
    thread.start()
    thread.join(100)
    assert codes == [0]
    assert only(Path("models").iterdir()).name == "ai_breakout_game8.mdl"


@pytest.mark.parametrize("package", ["cv2", "torch", "tensorboard"])
def test_a_package_that_is_missing_gets_one_line(package):
    Path(f"{package}.py").write_text("raise ImportError('libGL.so.1: no such file')")
    done = run_script("--help", cwd=".", PYTHONPATH=os.getcwd())
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "libGL.so.1" in done.stderr and "-m pip install -r requirements.txt" in done.stderr
    assert "apt-get install libgl1" in done.stderr


def raise_out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")


@pytest.mark.parametrize("train", [raise_out_of_memory, lambda *_: torch.empty(2**50)])
def test_too_little_memory_gets_one_line(capsys, monkeypatch, train):
    monkeypatch.setattr(script, "train", train)
    assert script.main([]) == 1
    errors = capsys.readouterr().err
    assert "memory" in errors and errors.count("\n") == 1


def test_a_bug_in_the_script_is_not_hidden(monkeypatch):
    monkeypatch.setattr(script, "train", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        script.main([])


def test_requirements_and_the_scripts_header_name_the_same_versions():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {line.split("#")[0].strip() for line in lines} - {""}
    header = SCRIPT.read_text().split("# ///")[1]
    listed = re.findall(r'"([^"]+)"', header.split("dependencies")[1])
    assert sorted(listed) == sorted(wanted) and len(wanted) > 5
