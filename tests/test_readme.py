"""The README: its commands and its Python are run or read as they are written."""

import functools
import re
import shlex

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
