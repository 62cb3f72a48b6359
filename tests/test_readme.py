"""The README: its commands and its Python are run or read as they are written."""

import functools
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import ai_breakout_game as script

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.strip().split(" ", 2)[2]
    for language, block in BLOCKS
    for line in block.splitlines()
    if language == "bash" and line.strip().startswith("python3 ai_breakout_game.py -")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_have_flags_that_go_together(command):
    values = {"$seed": "1", "${run}": "runs/a/"}
    for name, value in values.items():
        command = command.replace(name, value)
    script.find_mode(script.parse_flags(shlex.split(command)))


def test_it_has_the_two_commands_of_the_lesson():
    train = "--num-envs=8 --total-timesteps=3000 --multithreading=True"
    assert COMMANDS[:3] == ["--run=1", train, '--run=1 --model-filename="ai_breakout_game3000.mdl"']


def test_its_python_plays_a_game(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = next(block for language, block in BLOCKS if language == "python")
    short = functools.partial(script.make_env, max_frames=2000)
    monkeypatch.setattr(script, "make_env", short)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["truncated"] and names["score"] > 5
    assert [frame.shape for frame in names["env"].render()] == [(210, 160, 3)] * 4


# One small update instead of a training, short games, and half a second of play, not in a window.
SHORT = """
import dataclasses, sys, ai_breakout_game as script
play_games, short = script.play_games, {"evaluate": 2, "max_frames": 400}
make_config, film = script.make_config, {"record": "film.gif", "seconds": 0.5}
script.make_config = lambda *args: dataclasses.replace(make_config(*args), num_steps=8)
script.Config.num_updates = property(lambda config: 1)
script.play_games = lambda agent, config: play_games(agent, dataclasses.replace(config, **short))
script.play = lambda config, agent: script.record(dataclasses.replace(config, **film), agent)
sys.exit(script.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_commands_work_one_after_the_other(tmp_path):
    """All bash blocks after the installation, in a shell, with a `python3` that shortens them."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{SHORT}' \"$@\"\n")
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    code = "set -e\n" + "".join(block for language, block in BLOCKS[1:] if language == "bash")
    command = ["bash", "-c", code]
    shell = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert shell.returncode == 0, shell.stdout + shell.stderr

    models = sorted(path.name for path in tmp_path.glob("models/*"))
    assert models == [f"ai_breakout_game{steps}.mdl" for steps in (200000, 3000, 5000000)]
    runs = list(tmp_path.glob("runs/*"))
    assert len(runs) == 7 and all(len(list(run.glob("*.evaluations.jsonl"))) == 1 for run in runs)
