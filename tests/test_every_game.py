"""Every game of ale-py, on both ways of stepping."""

import os
import subprocess
import sys

import gymnasium as gym
import pytest
from conftest import ROOT

import ai_breakout_game as script  # registers the games

# Trains for two updates and for two more, plays a short game and records a moment.
DRIVER = """
import os, sys
from pathlib import Path
import gymnasium as gym
import ai_breakout_game as script

small = ["--num-envs=2", "--num-steps=8", "--num-minibatches=1", "--update-epochs=1"]
for name in sys.argv[2:]:
    rom = gym.spec(name).kwargs["game"]
    Path(rom).mkdir()
    os.chdir(rom)
    way, model = f"--multithreading={sys.argv[1]}", f"--model-filename=ai_{rom}_game64.mdl"
    for args in (
        [*small, "--total-timesteps=32", f"--env-id={name}", way],
        ["--resume=latest", "--total-timesteps=64"],
        ["--evaluate=1", "--max-frames=100", model, way],
        ["--record=game.gif", "--seconds=0.3", model],
    ):
        code = script.main(args)
        assert code == 0, (name, args)
    report = Path(f"models/ai_{rom}_game64.mdl.evaluations.jsonl").read_text()
    assert f'"env_id": "{name}"' in report, report
    assert Path("game.gif").stat().st_size > 300, name
    print(name, "is done", file=sys.stderr)
    os.chdir("..")
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_game_trains_resumes_and_plays_on_both_ways(tmp_path):
    specs = gym.registry.items()
    names = sorted(name for name, spec in specs if name.startswith("ALE/") and name[-3:] == "-v5")
    assert len(names) == 104 and script.game_settings(names[0])
    processes = []
    for way in ("yes", "no"):
        (tmp_path / way).mkdir()
        command = [sys.executable, "-c", DRIVER, way, *names]
        with open(tmp_path / f"{way}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    command, cwd=tmp_path / way, env={**os.environ, "PYTHONPATH": str(ROOT)},
                    stdout=subprocess.DEVNULL, stderr=log,
                )
            )  # fmt: skip
    codes = [process.wait() for process in processes]
    logs = [(tmp_path / f"{way}.log").read_text() for way in ("yes", "no")]
    assert codes == [0, 0] and all(log.count(" is done\n") == 104 for log in logs), logs[0][-2000:]
