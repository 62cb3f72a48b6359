"""What all tests share: the script as a module and as a program."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Several threads per process lose far more time beside a busy core than they win. torch reads this.
os.environ["OMP_NUM_THREADS"] = "1"

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ai_breakout_game.py"
sys.path.insert(0, str(ROOT))
STARTED: list[subprocess.Popen] = []  # by `start`

# The smallest run: an update is eight steps of one game.
TINY = ("--num-envs=1", "--num-steps=8", "--num-minibatches=1", "--update-epochs=1")
# Each step in Skiing costs points, so games of two steps have scores that differ.
SKIING = ("--env-id=ALE/Skiing-v5", "--max-frames=8")

# Under nohup SIGHUP is ignored, in the background SIGINT, and processes inherit this.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def run_script(*args, cwd, timeout=240, **env):
    """The program, as a user starts it, with output into pipes."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *args], cwd=cwd, env={**os.environ, **env},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def start(*args, cwd, before=""):
    """The program in the background; `before` is Python that runs in it first, `script` imported.

    Standard error goes where standard output goes.
    """
    code = f"import sys; import ai_breakout_game as script\n{before}\nsys.exit(script.main())"
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        cwd=cwd, env={**os.environ, "PYTHONPATH": path},
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


def wait_until(condition, process, seconds=100):
    """Wait, while `process` runs, until `condition()` is true; returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)
    return value


def before_rollouts(monkeypatch, actions):
    """Call actions[n] before the nth rollout of this process, counted from 1."""
    import ai_breakout_game as script  # not above: pytest-xdist's own process does without it

    collect, numbers = script.collect_rollout, itertools.count(1)

    def wrapper(*args):
        actions.get(next(numbers), lambda: None)()
        return collect(*args)

    monkeypatch.setattr(script, "collect_rollout", wrapper)


def only(paths):
    """The one path that there is."""
    (path,) = paths
    return path


def curves(run):
    """Everything in a run's TensorBoard files, by tag."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def points(run, tag):
    """The steps and the values of one curve of a run."""
    events = curves(run).Scalars(tag)
    return [event.step for event in events], [event.value for event in events]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which the test works in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The lesson's first command with an eighth of its steps and short games, run once in an empty
    folder: that folder, and what it printed.
    """
    folder = tmp_path_factory.mktemp("newcomer")
    command = ("--num-envs=8", "--total-timesteps=375", "--multithreading=True")
    return folder, run_script(*command, "--num-steps=16", "--max-frames=60", cwd=folder)
