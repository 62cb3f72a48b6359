"""What all tests share: the script as a module and as a program."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ai_breakout_game.py"
sys.path.insert(0, str(ROOT))
STARTED: list[subprocess.Popen] = []  # by `start`

# Under nohup, what the tests start would inherit its deafness to SIGHUP.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


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


def start(*args, cwd, before=""):
    """The program in the background; `before` is Python that runs in it first, `script` imported.

    Standard error goes where standard output goes.
    """
    code = f"import sys; import ai_breakout_game as script\n{before}\nsys.exit(script.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()


def wait_for(text, process):
    """Read the output of `process` up to a line with `text`; returns what was read."""
    output = ""
    for line in process.stdout:
        output += line
        if text in line:
            return output
    raise AssertionError(f"it ended without {text!r}: {output}")


def only(paths):
    """The one path that there is."""
    (path,) = paths
    return path


def curves(run):
    """Everything in a run's TensorBoard files, by tag."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The lesson's first command, run once in an empty folder: that folder, and what it printed."""
    folder = tmp_path_factory.mktemp("newcomer")
    command = ("--num-envs=8", "--total-timesteps=3000", "--multithreading=True")
    return folder, run_script(*command, cwd=folder)
