"""Every game that ale-py ships, on both ways of stepping them."""

import os
import subprocess
import sys

import ale_py
import gymnasium as gym
import pytest
from conftest import ROOT

gym.register_envs(ale_py)

# Trains for two updates, goes on for two more, and plays what came of it.
DRIVER = """
import os, sys
from pathlib import Path
import ai_breakout_game as script

small = ("--num-envs=2", "--num-steps=8", "--num-minibatches=1", "--update-epochs=1")
script.torch.set_num_threads(1)
for name in sys.argv[2:]:
    rom = script.find_game(script.Config(env_id=name)).rom
    Path(rom).mkdir()
    os.chdir(rom)
    train = [*small, "--total-timesteps=32", f"--env-id={name}", f"--multithreading={sys.argv[1]}"]
    play = ["--record=game.gif", "--seconds=0.3", f"--env-id={name}"]
    play += [f"--model-filename=ai_{rom}_game64.mdl"]
    for args in (train, ["--resume=latest", "--total-timesteps=64"], play):
        code = script.main(args)
        assert code == 0, (name, args)
    size = Path("game.gif").stat().st_size
    print(f"{name}: {size} bytes", file=sys.stderr)
    os.chdir("..")
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_game_trains_resumes_and_plays_on_both_ways(tmp_path):
    names = sorted(
        name
        for name, spec in gym.registry.items()
        if name.startswith("ALE/") and "game" in (spec.kwargs or {}) and name.endswith("-v5")
    )
    assert len(names) == 104
    started = []
    for way in ("True", "False"):
        (tmp_path / way).mkdir()
        errors = open(tmp_path / f"{way}.log", "w")  # noqa: SIM115
        command = [sys.executable, "-c", DRIVER, way, *names]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(
            (way, subprocess.Popen(
                command, cwd=tmp_path / way, env=environment, stdout=subprocess.DEVNULL,
                stderr=errors,
            ))
        )  # fmt: skip
    for way, process in started:
        code = process.wait()
        log = (tmp_path / f"{way}.log").read_text()
        assert code == 0, (way, log[-1000:])
        assert log.count(" bytes") == len(names), (way, log[-1000:])
