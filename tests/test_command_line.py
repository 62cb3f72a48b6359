"""Flags, help, and the one line that a mistake gets."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import run_script

import ai_breakout_game as script


def complain(capsys, *args):
    """The one line that `args` get, which are a mistake; nothing may have been written."""
    assert script.main(list(args)) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and "Traceback" not in errors
    assert os.listdir() == []
    return errors


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)


def test_every_knob_is_a_flag_with_help_group_and_default():
    text = script.build_parser().format_help()
    for field in dataclasses.fields(script.Config):
        assert f"--{field.name.replace('_', '-')} " in text
        assert len(field.metadata["help"]) > 15
    assert "(default: 5,000,000)" in text and "(default: 0.001)" in text
    for title in ("what to do", "game and machine", "playing", "recording", "training", "PPO"):
        assert f"\n{title}" in text


def test_help_fits_eighty_columns_and_starts_nothing(tmp_path):
    done = run_script("--help", cwd=tmp_path, COLUMNS="80")
    assert done.returncode == 0 and done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--run", True), ("--run=1", True), ("--run=True", True), ("--run=yes", True),
     ("--run=no", False), ("--run=0", False), ("--run=FALSE", False), ("--run=off", False)],
)  # fmt: skip
def test_yes_and_no_are_understood_in_many_ways(flag, value):
    assert script.build_parser().parse_args([flag]).run is value


def test_the_defaults_are_the_configs():
    assert script.Config(**vars(script.build_parser().parse_args([]))) == script.Config()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--num-envs=0"], "--num-envs must be from 1 to 4,096, not 0"),
        (["--total-timesteps=-5"], "--total-timesteps must be"),
        (["--num-steps=0"], "--num-steps must be"),
        (["--gamma=1.5"], "--gamma must be from 0 to 1, not 1.5"),
        (["--learning-rate=nan"], "--learning-rate must be"),
        (["--clip-coef=inf"], "--clip-coef must be 0 or more, not inf"),
        (["--num-minibatches=3"], "does not divide the batch of 8 games x 128 steps = 1024"),
        (["--num-envs=many"], "--num-envs"),
        (["--run=maybe"], "'maybe' is neither yes nor no"),
        (["--nonsense=1"], "--nonsense=1"),
        (["--num-env=8"], "--num-env=8"),
        (["train"], "train"),
        (["--env-id=BreakoutNoFrameSkip-v4"], "did you mean"),
        (["--env-id=Brakeout"], "Breakout"),
        (["--env-id=CartPole-v1"], "is not an ALE game"),
        (["--env-id="], "is not an ALE game"),
        (["--device=tpu"], "--device=tpu is not there; this machine has"),
        (["--model-filename=nowhere.mdl"], "no model nowhere.mdl"),
        (["--run", "--model-filename=nowhere.mdl"], "no model nowhere.mdl"),
        (["--run"], "--total-timesteps=3000` trains one"),
        (["--run", "--env-id=ALE/Pong-v5"], "--total-timesteps=3000 --env-id=ALE/Pong-v5` trains"),
        (["--evaluate=-1"], "--evaluate must be"),
        (["--evaluate=0"], "--evaluate=0 plays no game: leave it out to train"),
        (["--num-envs=1024", "--max-frames=1000000"], "a checkpoint grows too large to be read"),
        (["--replay-steps=1000000000"], "a checkpoint grows too large to be read"),
        (["--evaluate=2", "--model-filename=nowhere.mdl"], "no model nowhere.mdl"),
        (["--model-filename=random"], "cannot be trained"),
        (["--run", "--model-filename=random", "--device=tpu"], "--device=tpu is not there"),
        (["--record=film.avi"], "must end in .gif or .mp4"),
        (["--record=a.gif", "--evaluate=2"], "ask for one"),
        (["--run=1", "--evaluate=2"], "of --run, --evaluate and --record ask for one"),
        (["--run=1", "--record=a.gif"], "ask for one"),
        (["--record=a.gif", "--model-filename=nowhere.mdl"], "no model nowhere.mdl"),
        (["--record=a.gif", "--seconds=0"], "--seconds must be"),
        (["--record=a.gif", "--seconds=1e15"], "--seconds must be"),
        (["--record=a.gif", "--skip=1e308"], "--skip must be"),
        (["--record="], "needs the name of a file"),
        (["--record=a.gif", "--skip=-1"], "--skip must be"),
        (["--record=a.gif", "--seconds=5", "--episodes=2"], "of --episodes and --seconds ask for"),
        (["--seconds=5"], "--seconds is for recording: add --record=NAME"),
        (["--run=1", "--skip=5"], "--skip is for recording: add --record=NAME"),
        (["--greedy"], "--greedy is for playing: add --run or --evaluate=N or --record=NAME"),
        (["--sharpen=2"], "--sharpen is for training that starts from --model-filename"),
        (["--evaluate=2", "--sharpen=2", "--model-filename=random"], "that starts from --model-"),
        (["--greedy", "--total-timesteps=1000"], "--greedy is for playing"),
        (["--seed=-1"], "--seed must be from 0 to 1,073,741,824, not -1"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_clear_line(capsys, monkeypatch, args, said):
    monkeypatch.setattr(script, "__file__", os.path.join(os.getcwd(), "alone.py"))
    assert said in complain(capsys, *args)


def test_a_mistake_ends_the_program_with_code_2(tmp_path):
    done = run_script("--num-envs=0", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "ai_breakout_game.py: --num-envs must be from 1 to 4,096, not 0\n"


def test_a_system_without_the_libraries_of_opencv_gets_one_line(tmp_path):
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: no such file')")
    done = run_script("--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "libGL.so.1" in done.stderr and "apt-get install libgl1" in done.stderr


def test_a_package_that_is_not_installed_gets_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", script.__file__],  # without what pip installed
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "No module named" in done.stderr and "pip install -r requirements.txt" in done.stderr


@pytest.mark.parametrize("name", ["runs", "models"])
def test_a_folder_that_cannot_be_written_to_is_named_before_anything_starts(capsys, name):
    with open(name, "w") as file:
        file.write("a file, not a folder")
    assert script.main(["--total-timesteps=1"]) == 2
    errors = capsys.readouterr().err
    assert f"cannot write to {name}/" in errors and errors.count("\n") == 1
    assert os.listdir() == [name]


def test_the_file_works_alone_in_an_empty_folder(tmp_path):
    alone = tmp_path / "alone.py"
    with open(script.__file__) as source:
        alone.write_text(source.read())
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "alone.py", "--num-envs=1", "--num-steps=8", "--total-timesteps=8"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models" / "ai_breakout_game8.mdl").is_file()


def out_of_gpu_memory(config):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (out_of_gpu_memory, "CUDA out of memory"),
        (lambda config: torch.empty(2**50), "memory"),
        (lambda config: np.empty(2**50), "Unable to allocate"),
    ],
)
def test_memory_without_room_gets_one_line(capsys, monkeypatch, train, said):
    monkeypatch.setattr(script, "train", train)
    assert script.main([]) == 1
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1


def test_a_mistake_in_the_file_itself_is_not_hidden(monkeypatch):
    monkeypatch.setattr(script, "train", lambda config: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        script.main([])


def test_requirements_and_inline_metadata_name_the_same_versions():
    root = os.path.dirname(script.__file__)
    with open(os.path.join(root, "requirements.txt")) as file:
        wanted = {line.split("#")[0].strip() for line in file} - {""}
    with open(script.__file__) as file:
        header = file.read().split("# ///")[1]
    assert all(f'"{requirement}"' in header for requirement in wanted)
    assert header.count('"') == 2 * len(wanted) + 2, "and none beyond them"
