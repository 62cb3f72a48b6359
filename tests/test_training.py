"""A training run as a user starts it: files, curves, signals, and what it survives."""

import contextlib
import fcntl
import io
import itertools
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import SCRIPT, before_rollouts, curves, only, points, run_script, start, wait_until
from test_saving import SKIING, TINY, assert_same_weights, load

import ai_breakout_game as script


def run_of(folder="."):
    """The folder of the only run in `folder`."""
    return only(path for path in Path(folder, "runs").iterdir() if path.is_dir())


def saved_step():
    return load(run_of() / "checkpoint.pt")["global_step"]


def train(*flags, updates=2, code=0):
    """Train here, a few updates of eight steps."""
    assert script.main([*TINY, f"--total-timesteps={8 * updates}", *flags]) == code


# ---- The lesson's first command ------------------------------------------------------------------


@pytest.mark.slow
def test_the_two_commands_of_the_lesson_work_word_for_word(tmp_path, monkeypatch):
    """Without a display, the second one records to a file instead of opening a window."""
    script_here = tmp_path / SCRIPT.name
    script_here.symlink_to(SCRIPT)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    train = "python3 ai_breakout_game.py --num-envs=8 --total-timesteps=3000 --multithreading=True"
    done = subprocess.run(train, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "Trained 3,072 steps" in done.stdout
    watch = 'python3 ai_breakout_game.py --run=1 --model-filename="ai_breakout_game3000.mdl"'
    done = subprocess.run(watch, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and only(tmp_path.glob("*.mp4")).stat().st_size > 10_000


def test_the_first_command_trains_without_a_warning(trained):
    done = trained[1]
    assert done.returncode == 0 and done.stderr == ""
    assert "0 of 384 steps" in done.stdout and "Trained 384 steps" in done.stdout


def test_the_first_command_says_where_its_curves_are_and_how_well_it_plays(trained):
    folder, done = trained
    assert f"runs/{run_of(folder).name}" in done.stdout
    assert re.search("tensorboard --logdir runs$", done.stdout, re.MULTILINE)
    mean = load(run_of(folder) / "last.mdl")["mean_return"]
    assert f"{mean:.2f} (random play 1.7, a human 31.8)" in done.stdout


def test_the_first_command_leaves_its_weights_in_models_and_in_its_run(trained):
    model, run = trained[0] / "models" / "ai_breakout_game375.mdl", run_of(trained[0])
    assert list((trained[0] / "models").iterdir()) == [model]
    names = sorted(path.name.split(".")[0] for path in run.iterdir())
    assert names == ["checkpoint", "events", "last"]
    assert_same_weights(load(run / "last.mdl")["weights"], load(model)["weights"])


def test_a_model_file_holds_what_is_needed_to_use_the_weights(trained):
    path = trained[0] / "models" / "ai_breakout_game375.mdl"
    content, mean = load(path), points(run_of(trained[0]), "charts/mean_return_100")[1][-1]
    assert len(content.pop("weights")) == 12 and path.stat().st_size < 7_000_000
    assert content.pop("mean_return") == pytest.approx(mean)
    settings = {"sticky_actions": 0.0, "max_frames": 60, "patience": 250.0}
    settings |= {"frame_skip": 4, "frame_size": 84}
    assert content == {"env_id": "BreakoutNoFrameskip-v4", "steps": 384, "seed": 1, **settings}


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """A folder with a short run, and the commands that it printed, by name."""
    folder, output = tmp_path_factory.mktemp("printed"), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output):
        train()
    return folder, dict(re.findall(r"^ +(resume|watch) +(.*)$", output.getvalue(), re.MULTILINE))


def test_the_printed_command_to_resume_trains_as_many_steps_again(printed, monkeypatch, capsys):
    folder, commands = printed
    monkeypatch.chdir(folder)
    python, path, *flags = shlex.split(commands["resume"])
    assert shutil.which(python) and SCRIPT.samefile(path)
    assert script.main(flags) == 0 and "Trained 32 steps" in capsys.readouterr().out


def test_the_printed_command_to_watch_plays(printed, monkeypatch):
    """Without a display, it records to a file instead."""
    monkeypatch.delenv("DISPLAY", raising=False)
    folder, commands = printed
    with subprocess.Popen(f"exec {commands['watch']}", shell=True, cwd=folder) as process:
        try:
            wait_until(lambda: any(x.stat().st_size for x in folder.glob("*.mp4")), process)
        finally:
            process.kill()


# ---- Curves --------------------------------------------------------------------------------------


def test_the_curves_have_the_usual_names(trained):
    tags = ["learning_rate", "SPS", "episodic_return", "episodic_length", "mean_return_100"]
    losses = ["loss", "policy_loss", "value_loss", "entropy", "approx_kl"]
    losses += ["clipfrac", "grad_norm", "explained_variance"]
    expected = [f"charts/{tag}" for tag in tags] + [f"losses/{tag}" for tag in losses]
    assert sorted(curves(run_of(trained[0])).Tags()["scalars"]) == sorted(expected)


def test_the_curves_have_a_point_for_each_update(trained):
    run = run_of(trained[0])
    for tag in ("losses/loss", "losses/entropy", "charts/learning_rate", "charts/SPS"):
        assert points(run, tag)[0] == [128, 256, 384]
    assert points(run, "charts/learning_rate")[1] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert 1.3 < points(run, "losses/entropy")[1][0] < 1.39, "four actions, nearly equally probable"


def test_the_settings_are_in_the_curves(trained):
    tensors = curves(run_of(trained[0])).Tensors("config/text_summary")
    text = tensors[0].tensor_proto.string_val[0].decode()
    assert "total_timesteps=375" in text and "BreakoutNoFrameskip-v4" in text


def test_the_curves_of_a_hundred_million_steps_stay_below_200_megabytes(trained):
    updates = 1e8 / (8 * 128)
    assert only(run_of(trained[0]).glob("events*")).stat().st_size / 3 * updates < 200e6


@pytest.fixture(scope="module")
def many_games(tmp_path_factory):
    """The folder of a run of 120 games with scores that differ, and those games."""
    games, collect = [], script.collect_rollout

    def keep(*args):
        finished = collect(*args)
        games.extend(finished)
        return finished

    with contextlib.chdir(tmp_path_factory.mktemp("games")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "collect_rollout", keep)
        train(*SKIING, "--num-envs=2", "--num-steps=18", "--total-timesteps=360")
        return run_of().absolute(), games


def test_every_finished_game_is_in_the_curves_once(many_games):
    run, games = many_games
    assert points(run, "charts/episodic_return")[1] == [game.score for game in games]
    assert points(run, "charts/episodic_length")[1] == [game.length for game in games]
    assert load(run / "checkpoint.pt")["num_games"] == len(games) == 120


def test_the_mean_score_is_that_of_the_last_hundred_games(many_games):
    run, scores = many_games[0], [game.score for game in many_games[1]]
    assert points(run, "charts/mean_return_100")[1][-1] == pytest.approx(sum(scores[-100:]) / 100)
    assert sum(scores[-100:]) / 100 != pytest.approx(sum(scores) / 120), "they differ"


@pytest.mark.parametrize(
    ("scores", "expected"), [((9, 1, 1, 1), [None, 5, 5, 5]), ((2, 2, 1, 5), [None, 2, 2, 3])]
)
def test_best_weights_are_kept_from_100_games_on_and_replaced_when_the_mean_rises(
    here, monkeypatch, scores, expected
):
    """Update i finishes 50 games of scores[i]; expected is the mean score of best.mdl then."""
    collect, means = script.collect_rollout, []

    def look():
        path = run_of() / "best.mdl"
        means.append(load(path)["mean_return"] if path.exists() else None)

    def finish_games(state, games, rollout):
        look()
        collect(state, games, rollout)
        score = scores[state.update]
        state.num_games += 50
        state.scores.extend([score] * 50)
        return [script.FinishedGame(0, score, 1)] * 50

    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(script, "collect_rollout", finish_games)
    train(updates=4)
    look()
    assert means[1:] == expected


# ---- Starting from a model -----------------------------------------------------------------------

SETTINGS = {"patience": 77.0, "sticky_actions": 0.5, "max_frames": 999}


@pytest.fixture
def model(here):
    """A model with settings that are not the default ones, in a folder that the test works in."""
    agent = script.make_state(script.Config(seed=8)).agent
    content = {"weights": agent.state_dict(), "env_id": "BreakoutNoFrameskip-v4", **SETTINGS}
    script.save_file(content, Path("model.mdl"))
    return content


def test_training_continues_from_the_weights_of_a_model(model):
    train("--model-filename=model.mdl", "--learning-rate=0", updates=1)
    assert_same_weights(load("models/ai_breakout_game8.mdl")["weights"], model["weights"])


def test_the_settings_of_a_model_reach_the_one_that_is_trained_from_it(model):
    train("--model-filename=model.mdl", updates=1)
    content = load("models/ai_breakout_game8.mdl")
    assert {name: content[name] for name in SETTINGS} == SETTINGS
    config = load(run_of() / "checkpoint.pt")["config"]
    assert {name: config[name] for name in SETTINGS} == SETTINGS, "so a resumed run has them too"


def test_a_flag_wins_over_the_settings_of_a_model(model):
    train("--model-filename=model.mdl", "--patience=3", updates=1)
    content = load("models/ai_breakout_game8.mdl")
    assert content["patience"] == 3 and content["sticky_actions"] == 0.5


@pytest.mark.parametrize("native", ["yes", "no"])
def test_one_seed_gives_the_same_weights_bit_for_bit(here, native):
    for folder in ("one", "two"):
        Path(folder).mkdir()
        with contextlib.chdir(folder):
            train("--num-envs=2", "--seed=6", f"--multithreading={native}", updates=4)
    one, two = (load(run_of(folder) / "last.mdl")["weights"] for folder in ("one", "two"))
    assert_same_weights(one, two)


# ---- Signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["SIGINT", "SIGTERM", "SIGHUP", "SIGTERM SIGTERM"])
def test_signals_stop_the_training_and_all_is_saved(here, monkeypatch, capfd, names):
    def send():
        for name in names.split():
            signal.raise_signal(signal.Signals[name])

    before_rollouts(monkeypatch, {2: send})
    train(updates=9)
    output, errors = capfd.readouterr()
    assert "Stopping" in errors and "Stopped after 16 steps" in output
    assert re.search(rf"resume .* --resume=runs/{run_of().name}$", output, re.MULTILINE)
    assert saved_step() == 16 and points(run_of(), "losses/loss")[0] == [8, 16]
    last = load(run_of() / "last.mdl")["weights"]
    assert_same_weights(last, load("models/ai_breakout_game16.mdl")["weights"])


def test_a_second_ctrl_c_ends_it_at_once_with_the_last_checkpoint(here, monkeypatch):
    """Also while the next checkpoint is being written."""
    save, numbers = torch.save, itertools.count(1)

    def interrupt(*args):
        save(*args)
        if next(numbers) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(torch, "save", interrupt)
    train(updates=9, code=130)
    assert saved_step() == 8
    assert not list(run_of().glob(".*.tmp")) and not list(Path("models").iterdir())


def test_nohup_is_respected(here, monkeypatch, capsys):
    before_rollouts(monkeypatch, {1: lambda: signal.raise_signal(signal.SIGHUP)})
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train()
    finally:
        signal.signal(signal.SIGHUP, old)
    assert "Trained 16 steps" in capsys.readouterr().out


def test_a_terminal_that_is_closed_stops_it_with_all_saved(tmp_path):
    """It gets SIGHUP, and from then on can print nothing."""
    ours, theirs = os.openpty()

    def take_terminal():
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *TINY], cwd=tmp_path, preexec_fn=take_terminal,
        stdin=theirs, stdout=theirs, stderr=theirs,
    ) as process:  # fmt: skip
        try:
            os.close(theirs)
            wait_until(lambda: list(tmp_path.glob("runs/*/events*")), process)
            os.close(ours)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    assert load(run_of(tmp_path) / "last.mdl")["steps"] > 0


OFTEN = """
init = script.tqdm.__init__
script.tqdm.__init__ = lambda *args, **options: init(*args, **options | {"mininterval": 0})
"""


@pytest.mark.parametrize("printing", ["", pytest.param(OFTEN, marks=pytest.mark.slow)])
def test_a_pipe_that_breaks_does_not_end_the_training(tmp_path, printing):
    """Whether it prints at the end only or after each update."""
    process = start(*TINY, "--total-timesteps=80", cwd=tmp_path, before=printing)
    wait_until(lambda: list(tmp_path.glob("runs/*/events*")), process)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "models" / "ai_breakout_game80.mdl").is_file()


# ---- Disk, memory and numbers --------------------------------------------------------------------


@contextlib.contextmanager
def mounted(option):
    """A file system of its own at runs/."""
    Path("runs").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", "runs"]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", "runs"], check=True)


def test_a_full_disk_ends_no_training_and_it_saves_when_there_is_room(here, monkeypatch, capsys):
    seen, filler = [], Path("runs/filler")

    def fill():
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def make_room():
        seen.append(saved_step())
        filler.unlink()

    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", 0)
    before_rollouts(monkeypatch, {2: fill, 12: make_room, 13: lambda: seen.append(saved_step())})
    with mounted("size=70m"):
        train(updates=14)
        output, errors = capsys.readouterr()
        for action in ("save", "write curves"):
            assert re.search(f"cannot {action}.* No space left on device\n", output) and not errors
        assert seen == [8, 96] and saved_step() == 112
        assert points(run_of(), "losses/loss")[0][-2:] == [104, 112]
        assert not list(run_of().glob(".*.tmp"))


def test_folders_that_were_deleted_are_made_again(here, monkeypatch, capsys):
    def delete():
        shutil.rmtree("runs")
        shutil.rmtree("models")

    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", 0)
    before_rollouts(monkeypatch, {2: delete})
    train(updates=4)
    assert points(run_of(), "losses/loss")[0][-2:] == [24, 32]
    assert Path("models/ai_breakout_game32.mdl").is_file()
    command = re.search(r"resume +(.*)", capsys.readouterr().out)[1]
    assert script.main(shlex.split(command)[2:]) == 0
    assert "Trained 64 steps" in capsys.readouterr().out


def fail_to_save(monkeypatch, error, calls):
    """Let torch.save raise `error` when it is called for the nth time, n in `calls`, from 1."""
    save, numbers = torch.save, itertools.count(1)

    def fail(*args):
        if next(numbers) in calls:
            raise error
        save(*args)

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", 0)


@pytest.mark.parametrize("error", [MemoryError("full"), RuntimeError("full"), KeyError(1)])
def test_a_checkpoint_that_cannot_be_saved_gets_a_line(here, monkeypatch, capsys, error):
    fail_to_save(monkeypatch, error, calls=[2])
    train()
    output = capsys.readouterr()
    line = only(line for line in output.out.splitlines() if "checkpoint.pt" in line)
    assert type(error).__name__ in line and output.err == ""
    assert "Trained 16 steps" in output.out and saved_step() == 16


def test_a_run_whose_end_cannot_be_saved_ends_with_code_1(here, monkeypatch, capsys):
    fail_to_save(monkeypatch, MemoryError("full"), calls=range(3, 99))
    train(code=1)
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "not everything was saved" in output.err
    assert "watch" not in output.out and saved_step() == 8


@pytest.mark.parametrize("name", ["runs", "models"])
def test_a_file_in_the_place_of_a_folder_gets_one_line(here, capsys, name):
    Path(name).write_text("mine")
    train(code=1)
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and name in errors
    assert {str(path) for path in Path().rglob("*")} <= {"runs", "models"}, "no run was begun"


def test_a_folder_that_cannot_be_written_gets_one_line(here, capsys):
    with mounted("ro"):
        train(code=1)
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and "Read-only file system: 'runs/" in errors
        assert os.listdir("runs") == []


def infinite_reward(state, rollout):
    rollout["rewards"][:] = torch.inf


def infinite_gradient(state, rollout):
    state.agent.critic.bias.register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize("fault", [infinite_reward, infinite_gradient])
def test_a_diverged_update_ends_it_with_the_last_good_state(here, monkeypatch, capsys, fault):
    collect = script.collect_rollout

    def faulty(state, games, rollout):
        finished = collect(state, games, rollout)
        if state.global_step == 24:
            fault(state, rollout)
        return finished

    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(script, "collect_rollout", faulty)
    train(updates=9, code=1)
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "--learning-rate" in errors
    assert saved_step() == 16
    weights = load(run_of() / "checkpoint.pt")["weights"]
    assert all(x.isfinite().all() for x in weights.values())


# ---- Slow ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_9_at_thirty_moments_loses_nothing(tmp_path, monkeypatch):
    """It saves after each update, and each save waits before the rename: many kills hit a save."""
    monkeypatch.chdir(tmp_path)
    slow = "lambda *paths, replace=script.os.replace: (script.time.sleep(0.05), replace(*paths))"
    before = f"script.CHECKPOINT_SECONDS, script.os.replace = 0, {slow}"
    flags, rng, saved, drafts = (*TINY, "--total-timesteps=8000"), random.Random(0), 0, set()
    for number in range(30):
        process = start(*flags, cwd=tmp_path, before=before)
        wait_until(lambda n=number: len(list(Path().glob("runs/*/events*"))) > n, process)
        wait_until(lambda: list(Path().glob("runs/*/checkpoint.pt")), process)
        time.sleep(rng.random())
        process.kill()
        process.wait()
        drafts |= set(run_of().glob(".*.tmp"))
        script.read_file(run_of() / "checkpoint.pt")  # with its checksums
        earlier, saved, flags = saved, saved_step(), ("--resume=latest",)
        assert saved >= earlier
    assert len(drafts) >= 3 and saved > 0, "some of them were inside a save"
    done = run_script("--resume=latest", cwd=tmp_path, timeout=900)
    assert done.returncode == 0 and "Trained 8,000 steps" in done.stdout, done.stderr
    assert points(run_of(), "losses/loss")[0] == list(range(8, 8001, 8))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_it_learns(tmp_path, monkeypatch):
    """The mean of 100 games of random play is 1.3, with a standard error of 0.13."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # nothing runs beside it
    process, line = start("--total-timesteps=400000", cwd=tmp_path), ""
    for line in process.stdout:  # twice a minute
        found = re.match(r"([\d,]+) of .* mean score ([\d.]+)", line)
        if found and int(found[1].replace(",", "")) > 30_000 and float(found[2]) > 2.5:
            return
    raise AssertionError(f"it ended with: {line}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_needs_less_than_one_and_a_half_gigabytes(tmp_path):
    process, peak = start("--total-timesteps=5000", cwd=tmp_path), 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # it has just ended
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        time.sleep(0.2)
    assert process.returncode == 0 and 100e6 < peak < 1.5e9
