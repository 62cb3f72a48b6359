"""torchrun: several processes train one agent, and it is the one that a single process trains."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, STARTED, curves, only, run_script, wait_for

# Whole batches are minibatches: then the same steps are in each, whoever plays the games. 32-bit
# numbers and small steps, so that rounding is small and draws no other action; games are seeded
# anew all the time.
KNOBS = (
    "--num-envs=4", "--num-steps=32", "--num-minibatches=1", "--update-epochs=2",
    "--precision=float32", "--learning-rate=2.5e-4", "--replay-steps=40", "--checkpoint-minutes=0",
)  # fmt: skip
UPDATES = 8
RUN = (*KNOBS, f"--total-timesteps={UPDATES * 128}")


def torchrun(processes, *args, cwd, script=SCRIPT):
    """The program in several processes, started as the README says; output as `start` has it."""
    command = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", str(script), *args]
    process = subprocess.Popen(
        [sys.executable, *command], cwd=cwd, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


def checkpoint_of(folder):
    return torch.load(only((folder / "runs").iterdir()) / "checkpoint.pt", weights_only=True)


def assert_same_run(folder, reference):
    """The same games, the same curves and, to rounding, the same weights."""
    one, other = checkpoint_of(folder), checkpoint_of(reference)
    assert one["update"] == other["update"] == UPDATES
    assert one["scores"] == other["scores"] and one["games"] == other["games"] > 3
    got, wanted = one["replay"], other["replay"]
    assert torch.equal(got["seeds"], wanted["seeds"]) and torch.equal(got["ages"], wanted["ages"])
    for game, age in enumerate(wanted["ages"]):  # what was before a game's seed is no part of it
        a, b = (x["actions"][len(x["actions"]) - age :, game] for x in (got, wanted))
        assert torch.equal(a, b) and len(a) == age
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, other["weights"][name], rtol=1e-4, atol=1e-5)
    got, wanted = (curves(only((x / "runs").iterdir())) for x in (folder, reference))
    for tag in set(wanted.Tags()["scalars"]) - {"charts/SPS"}:
        a, b = ([(e.step, e.value) for e in x.Scalars(tag)] for x in (got, wanted))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=tag)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in one process, without torchrun."""
    folder = tmp_path_factory.mktemp("alone")
    done = run_script(*RUN, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_come_to_what_one_comes_to(tmp_path, alone):
    process = torchrun(2, *RUN, cwd=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("steps/s") == output.count("4 games, on cpu x 2") == 1, "one of them speaks"
    assert_same_run(tmp_path, alone)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that is there while Python ends may abort the process: exit code -6, now and then."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import pathlib, runpy, sys\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "finally:\n"
        "    threads = pathlib.Path('/proc/self/task').glob('*/comm')\n"
        "    sys.stderr.write('at the end: ' + ' '.join(x.read_text().strip() for x in threads))\n"
    )
    process = torchrun(2, *KNOBS, "--total-timesteps=128", cwd=tmp_path, script=wrapper)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("at the end: ") == 2, output
    assert "gloo" not in output


def children(process):
    """Process ids of what torchrun started, the first rank first."""
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(path) as file:
        return [int(pid) for pid in file.read().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_all_end_and_one_alone_goes_on_exactly(tmp_path, alone, victim):
    process = torchrun(2, *RUN, cwd=tmp_path)
    wait_for("steps,", process)  # the first update is over, and its checkpoint written
    pids = children(process)
    assert len(pids) == 2
    time.sleep(0.2)
    os.kill(pids[victim], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "one of the processes cannot go on, so all end" in output
    assert checkpoint_of(tmp_path)["update"] < UPDATES, "the test was too slow to kill it"
    done = run_script("--resume=latest", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_ctrl_c_stops_all_and_more_processes_may_go_on(tmp_path):
    process = torchrun(1, *KNOBS, "--total-timesteps=1000000", cwd=tmp_path)
    wait_for("steps,", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Stopped after" in output and "is gone" not in output
    stopped = checkpoint_of(tmp_path)["update"]
    process = torchrun(2, "--resume=latest", cwd=tmp_path)
    wait_for("steps,", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output.count("Stopped after") == 1 and "is gone" not in output
    assert checkpoint_of(tmp_path)["update"] > stopped


@pytest.mark.slow
def test_several_processes_stop_in_the_midst_of_an_update(tmp_path):
    """torchrun kills what has not ended after 30 seconds, and an update may take longer."""
    process = torchrun(2, *KNOBS, "--num-steps=16384", cwd=tmp_path)
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):  # written when the first update begins
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Stopped after 0 steps" in output


def test_games_that_cannot_be_split_are_refused_in_a_line(tmp_path):
    process = torchrun(2, *KNOBS, "--num-envs=3", cwd=tmp_path)
    output, _ = process.communicate(timeout=60)
    error = next(line for line in output.splitlines() if line.startswith(SCRIPT.name))
    assert "3 games x 32 steps cannot be split evenly over 2 processes" in error
    assert not any(tmp_path.iterdir()) and ROOT not in tmp_path.parents


def test_other_environment_variables_of_clusters_change_nothing(tmp_path):
    """Slurm and MPI set some of torchrun's variables too, and nobody is there to join."""
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    done = run_script(*KNOBS, "--total-timesteps=128", cwd=tmp_path, **variables)
    assert done.returncode == 0 and (tmp_path / "models" / "ai_breakout_game128.mdl").is_file()
