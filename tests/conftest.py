"""What all tests share: the script as a module and as a program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ai_breakout_game.py"
sys.path.insert(0, str(ROOT))


def run_script(*args, cwd, timeout=240, **env):
    """The program, as a user starts it, with output into pipes."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The lesson's first command, run once in an empty folder: that folder, and what it printed."""
    folder = tmp_path_factory.mktemp("newcomer")
    command = ("--num-envs=8", "--total-timesteps=3000", "--multithreading=True")
    return folder, run_script(*command, cwd=folder)
