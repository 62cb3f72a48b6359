"""torchrun: several processes train one agent."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, STARTED, TINY, only, points, wait_until
from test_saving import given_rollout, load

import ai_breakout_game as script

FLAGS = (*TINY, "--num-envs=2")  # 16 steps in an update

# Each process prints, when it is done: the sum of its weights, and its threads.
WRAPPER = f"""
import hashlib, os, pathlib, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import ai_breakout_game as script

learn = script.learn
def learn_and_keep(state, *args):
    global agent
    agent = state.agent
    return learn(state, *args)
script.learn = learn_and_keep
{{before}}
code = script.main()
data = b"".join(x.detach().numpy().tobytes() for x in agent.parameters())
threads = [x.read_text().strip() for x in pathlib.Path("/proc/self/task").glob("*/comm")]
os.write(1, f"weights {{{{hashlib.sha256(data).hexdigest()}}}} threads {{{{threads}}}}\\n".encode())
sys.exit(code)
"""


def torchrun(*args, cwd, before=None, processes=2):
    """The program in several processes, with all output in one pipe; `before` is Python that runs
    in each first, `script` imported, and then each prints a line at its end.
    """
    path = SCRIPT
    if before is not None:
        path = Path(cwd, "wrapper.py")
        path.write_text(WRAPPER.format(before=before))
    command = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", str(path), *args]
    process = subprocess.Popen(
        [sys.executable, *command], cwd=cwd, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


def run_of(folder):
    return only((Path(folder) / "runs").iterdir())


def checkpoint_of(folder):
    return load(run_of(folder) / "checkpoint.pt")


def given_share(state, games, rollout):
    """`given_rollout` for two games, of which each process gets its own."""
    size = rollout["actions"].shape[1]
    rank = 0 if size == 2 else script.rank()
    both = {name: x.repeat(1, 2 // size, *[1] * (x.ndim - 2)) for name, x in rollout.items()}
    finished = given_rollout(state, games, both)
    for name, x in rollout.items():
        x.copy_(both[name][:, rank : rank + size])
    return finished


GIVEN = (*FLAGS, "--update-epochs=2", "--total-timesteps=32", "--precision=float32")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes from given rollouts: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    patch = "import test_processes; script.collect_rollout = test_processes.given_share"
    process = torchrun(*GIVEN, cwd=folder, before=patch)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return folder, output


def test_two_processes_have_the_same_weights_at_the_end(two):
    one, other = re.findall(r"weights (\w+)", two[1])
    assert one == other


def test_two_processes_learn_from_their_games_what_one_learns_from_all(two, tmp_path, monkeypatch):
    """Up to rounding, where the whole batch is one minibatch: so the gradient is that of all."""
    monkeypatch.setattr(script, "collect_rollout", given_share)
    monkeypatch.chdir(tmp_path)
    assert script.main([*GIVEN]) == 0
    one, both = checkpoint_of("."), checkpoint_of(two[0])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(both["weights"][name], weight, rtol=1e-3, atol=1e-5)
    for tag in ("loss", "value_loss", "entropy", "grad_norm", "explained_variance"):
        values = [points(run_of(folder), f"losses/{tag}")[1] for folder in (".", two[0])]
        assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-5), tag


def test_one_of_two_processes_speaks_and_saves(two):
    folder, output = two
    assert output.count("Trained 32 steps") == output.count("curves in") == 1
    assert output.count("32 of 32 steps") == 1
    assert points(run_of(folder), "losses/loss")[0] == [16, 32]
    assert os.listdir(folder / "models") == ["ai_breakout_game32.mdl"]


def test_no_thread_of_the_group_outlives_it(two):
    """One that is there while Python ends may abort the process: exit code -6, now and then."""
    assert two[1].count("threads [") == 2 and "gloo" not in two[1]


def test_one_process_resumes_what_two_have_trained(two, tmp_path, monkeypatch):
    shutil.copytree(two[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert script.main(["--resume=latest", "--total-timesteps=48"]) == 0
    assert points(run_of("."), "losses/loss")[0] == [16, 32, 48]


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_and_saves(tmp_path):
    process = torchrun(*FLAGS, cwd=tmp_path, before="")
    wait_until(lambda: list(tmp_path.glob("runs/*/events*")), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output.count("Stopped after") == output.count("Stopping") == 1
    one, other = re.findall(r"weights (\w+)", output)
    assert one == other
    assert checkpoint_of(tmp_path)["global_step"] == 16 * checkpoint_of(tmp_path)["update"] > 0
    assert (run_of(tmp_path) / "last.mdl").exists()


def test_ranks_sample_different_actions_at_the_start_and_after_a_resume(monkeypatch):
    numbers = set()
    for rank, step in ((0, 0), (1, 0), (1, 1024)):
        monkeypatch.setattr(script, "rank", lambda rank=rank: rank)
        state = script.make_state(script.Config(), global_step=step)
        numbers.add(torch.rand(1, generator=state.generator).item())
    assert len(numbers) == 3


def test_games_that_cannot_be_divided_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.chdir(tmp_path)
    assert script.main([*TINY, "--num-envs=3"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "3 games x 8 steps cannot be divided" in errors
    assert not any(tmp_path.iterdir())


def test_variables_of_other_launchers_change_nothing(tmp_path, monkeypatch):
    """Slurm and MPI set some of torchrun's variables too, with nobody there to join."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.chdir(tmp_path)
    assert script.main([*TINY, "--total-timesteps=8"]) == 0
    assert Path("models/ai_breakout_game8.mdl").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_when_a_process_dies_all_end_within_a_minute(tmp_path, victim):
    process = torchrun(*FLAGS, cwd=tmp_path)
    wait_until(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[victim]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert checkpoint_of(tmp_path)["update"] == 0, "the last one that was saved"


@pytest.mark.slow
def test_two_processes_resume_what_one_has_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert script.main([*FLAGS, "--total-timesteps=32"]) == 0
    process = torchrun("--resume=latest", "--total-timesteps=64", cwd=tmp_path, before="")
    output, _ = process.communicate(timeout=120)
    one, other = re.findall(r"weights (\w+)", output)
    assert one == other and "Trained 64 steps" in output
    assert points(run_of("."), "losses/loss")[0] == [16, 32, 48, 64]


STOP_ONE = """
collect = script.collect_rollout
def collect_and_stop(state, *args):
    if script.rank() == 1 and state.update == 2:
        import signal
        signal.raise_signal(signal.SIGTERM)
    return collect(state, *args)
script.collect_rollout = collect_and_stop
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(tmp_path):
    process = torchrun(*FLAGS, cwd=tmp_path, before=STOP_ONE)
    output, _ = process.communicate(timeout=100)
    one, other = re.findall(r"weights (\w+)", output)
    assert one == other and "Stopped after 48 steps" in output
