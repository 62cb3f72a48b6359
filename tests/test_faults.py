"""What a run survives. Each fault is made for real, to a process of its own."""

import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import SCRIPT, curves, only, run_script, start, wait_for

import ai_breakout_game as script

SMALL = ("--num-envs=2", "--num-steps=32", "--num-minibatches=2", "--update-epochs=1")
OFTEN = "--checkpoint-minutes=0.02"  # 1.2 seconds


def run_of(folder):
    return only((folder / "runs").iterdir())


def assert_whole(run):
    """Every file of a run is what it should be, and there are no others."""
    for path in run.iterdir():
        if path.suffix in (".pt", ".mdl"):
            script.read_file(path, "file")
        else:
            assert path.name == ".lock" or path.name.startswith("events.out.tfevents.")


def finish(process):
    """Stop it with Ctrl-C; the rest of its output."""
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    return output


def test_a_second_ctrl_c_while_it_is_saving_changes_nothing(tmp_path):
    slow = "import os, time; fsync = os.fsync; os.fsync = lambda fd: (time.sleep(1), fsync(fd))"
    process = start(*SMALL, cwd=tmp_path, before=slow)
    wait_for(" left; ", process)
    for pause in (0.3, 0.7, 0.7):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Stopped after" in output
    assert output.count("Stopping; saving") == 1
    assert_whole(run_of(tmp_path))
    assert only((tmp_path / "models").iterdir()).suffix == ".mdl"


def test_a_terminal_that_is_closed_costs_nothing(tmp_path):
    """SIGHUP, and from then on nothing can be printed."""
    here, there = os.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))

    def become_its_session():
        os.setsid()
        fcntl.ioctl(there, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *SMALL, "--checkpoint-minutes=0"],
        cwd=tmp_path, stdin=there, stdout=there, stderr=there, preexec_fn=become_its_session,
    )  # fmt: skip
    os.close(there)
    shown = b""
    while b"no game is over yet" not in shown:  # the first update is done
        shown += os.read(here, 4096)
    os.close(here)
    assert process.wait(timeout=60) == 0
    run = run_of(tmp_path)
    assert (run / "last.mdl").exists()
    assert script.read_file(run / "checkpoint.pt", "checkpoint")["update"] >= 1
    assert_whole(run)


def test_ctrl_break_on_windows_saves_as_ctrl_c_does(tmp_path):
    """Python has SIGBREAK there alone; here another signal stands in for it."""
    process = start(*SMALL, cwd=tmp_path, before="import signal; signal.SIGBREAK = signal.SIGUSR1")
    wait_for(" left; ", process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Stopped after" in output
    assert_whole(run_of(tmp_path))


def test_nohup_is_respected(tmp_path):
    process = subprocess.Popen(
        ["nohup", sys.executable, str(SCRIPT), *SMALL],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(" left; ", process)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    finish(process)


def test_a_pipe_that_breaks_ends_no_training(tmp_path):
    process = start(*SMALL, "--total-timesteps=640", cwd=tmp_path)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "models" / "ai_breakout_game640.mdl").is_file()


@pytest.mark.parametrize("closed", [1, 2])
def test_output_that_the_shell_closed_ends_no_training(tmp_path, closed):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL, "--total-timesteps=128"],
        cwd=tmp_path, preexec_fn=lambda: os.close(closed), capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert (tmp_path / "models" / "ai_breakout_game128.mdl").is_file()


def test_ctrl_c_before_anything_began_is_silent(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *SMALL],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert b"Traceback" not in output and process.returncode != 0
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------- disk and files


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 70 MB, where runs/ lies: a checkpoint has 20, and three must have room."""
    (tmp_path / "runs").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", str(tmp_path / "runs")]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a disk here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path / "runs")], check=True)


def fill(disk):
    """Take all the room that is left."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def assert_every_update_is_in_the_curves(run, batch=64):
    last = script.read_file(run / "checkpoint.pt", "checkpoint")["global_step"]
    steps = [event.step for event in curves(run).Scalars("losses/entropy")]
    assert steps == list(range(batch, last + 1, batch))


def run_of_disk(small_disk):
    return only(path for path in (small_disk / "runs").iterdir() if path.is_dir())


def test_a_full_disk_ends_no_training_and_loses_nothing(small_disk):
    process = start(*SMALL, OFTEN, cwd=small_disk)
    wait_for(" left; ", process)
    fill(small_disk / "runs")
    output = wait_for("could not save", process)
    assert "checkpoint.pt (No space left on device)" in output
    run = run_of_disk(small_disk)
    stale = script.read_file(run / "checkpoint.pt", "checkpoint")["update"]
    if "could not write curves" not in output:
        wait_for("could not write curves", process)
    (small_disk / "runs" / "filler").unlink()
    deadline = time.monotonic() + 60
    while script.Checkpoints.read(run)[0]["update"] <= stale and time.monotonic() < deadline:
        time.sleep(0.3)
    assert script.Checkpoints.read(run)[0]["update"] > stale, "it saves again"
    finish(process)
    assert_whole(run)
    assert_every_update_is_in_the_curves(run)


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_with_code_1_and_the_old_checkpoint(small_disk):
    process = start(*SMALL, OFTEN, "--total-timesteps=2560", cwd=small_disk)
    wait_for(" left; ", process)
    fill(small_disk / "runs")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in output
    assert "not all was saved: make room, then --resume=runs/" in output.splitlines()[-1]
    assert (small_disk / "models" / "ai_breakout_game2560.mdl").is_file(), "there was room there"
    (small_disk / "runs" / "filler").unlink()
    done = run_script("--resume=latest", cwd=small_disk)
    assert done.returncode == 0 and "Trained 2,560 steps" in done.stdout


def test_where_not_all_has_room_the_checkpoint_comes_first(small_disk):
    with open(small_disk / "runs" / "filler", "wb") as file:
        file.write(bytes(40 * 2**20))  # room for the first checkpoint, 7 MB, and one of 20
    done = run_script(*SMALL, "--total-timesteps=640", cwd=small_disk)
    assert done.returncode == 1 and "could not save runs/" in done.stdout
    assert script.Checkpoints.read(run_of_disk(small_disk))[0]["global_step"] == 640
    (small_disk / "runs" / "filler").unlink()
    assert run_script("--resume=latest", cwd=small_disk).returncode == 0
    assert (run_of_disk(small_disk) / "last.mdl").is_file()


@pytest.mark.parametrize(("name", "room"), [("film.mp4", 0), ("film.mp4", 40_000), ("film.gif", 0)])
def test_a_recording_without_room_gets_one_line_and_leaves_no_half_file(small_disk, name, room):
    filler = small_disk / "runs" / "filler"
    fill(small_disk / "runs")
    os.truncate(filler, filler.stat().st_size - room)
    words = (f"--record=runs/{name}", "--seconds=10", "--model-filename=random")
    done = run_script(*words, cwd=small_disk)
    assert done.returncode == 1 and "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(small_disk / "runs") == ["filler"]


def test_a_disk_that_becomes_read_only_ends_no_training(small_disk):
    process = start(*SMALL, OFTEN, cwd=small_disk)
    wait_for(" left; ", process)
    run = run_of(small_disk)
    for options in (["--bind", run], ["-o", "remount,bind,ro"]):
        assert subprocess.run(["mount", *options, run]).returncode == 0
    try:
        wait_for("could not save", process)
        refused = run_script("--resume=latest", cwd=small_disk)
        assert refused.returncode == 2 and "cannot write to runs/" in refused.stderr
    finally:
        subprocess.run(["umount", run], check=True)
    finish(process)
    assert_every_update_is_in_the_curves(run)


@pytest.mark.slow
def test_a_tensorboard_writer_that_fails_ends_no_training_and_loses_no_point(tmp_path):
    process = start(
        *SMALL, "--total-timesteps=3200", cwd=tmp_path, before="script.Logger.FLUSH = 0.3"
    )
    wait_for(" left; ", process)
    while not (found := list(run_of(tmp_path).glob("events*"))):
        time.sleep(0.1)
    events = only(found)
    events.rename(tmp_path / "taken away")
    events.mkdir()  # its name is no file's any more
    wait_for("could not write curves", process)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in output
    events.rmdir()
    (tmp_path / "taken away").rename(events)
    assert_every_update_is_in_the_curves(run_of(tmp_path))


# ------------------------------------------------------------------------------- numbers and games

NAN_REWARD = """
reward, count = script.ClipRewardEnv.reward, iter(range(10**9))
script.ClipRewardEnv.reward = lambda *x: float("nan") if next(count) > 700 else reward(*x)
"""
INFINITE_GRADIENT = """
loss, count = script.ppo_loss, iter(range(10**9))
class Explode(script.torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x)
    backward = staticmethod(lambda ctx, grad: grad * float("inf"))
def ppo_loss(logits, *rest):
    return loss(Explode.apply(logits) if next(count) > 20 else logits, *rest)
script.ppo_loss = ppo_loss
"""


@pytest.mark.parametrize("fault", [NAN_REWARD, INFINITE_GRADIENT])
def test_a_number_that_is_none_stops_the_run_with_the_last_good_state(tmp_path, fault):
    process = start(*SMALL, "--multithreading=no", cwd=tmp_path, before=fault)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in output
    error = output.splitlines()[-1]
    update = int(re.search(r"update (\d+) came to numbers that are not finite", error)[1])
    assert "--learning-rate" in error, "what to try"
    saved = torch.load(run_of(tmp_path) / "checkpoint.pt", weights_only=True)
    assert saved["update"] == update - 1 > 3
    for name in ("weights", "optimizer"):
        tensors = saved["weights"].values() if name == "weights" else [
            x for one in saved["optimizer"]["state"].values() for x in one.values()
        ]  # fmt: skip
        assert all(x.isfinite().all() for x in tensors), name
    weights = re.search(r"weights +(models/\S+)", output)[1]
    script.load_agent(tmp_path / weights, script.Game("breakout"))


DEAD_THREAD = """
step, count = script.AtariVectorEnv.step, iter(range(10**9))
def deadly(env, actions):  # an action that is none kills the thread that carries it out
    return step(env, actions * 0 + 99 if next(count) == 400 else actions)
script.AtariVectorEnv.step = deadly
"""


@pytest.mark.slow
def test_a_dead_thread_of_the_emulator_ends_the_program_within_a_minute(tmp_path):
    process = start(*SMALL, cwd=tmp_path, before=DEAD_THREAD)
    wait_for(" left; ", process)
    begun = time.monotonic()
    output, _ = process.communicate(timeout=90)
    assert time.monotonic() - begun < 60 and process.returncode == 1
    assert "the emulator has not answered for 30 seconds" in output.splitlines()[-1]
    run = run_of(tmp_path)
    assert_whole(run)
    assert script.read_file(run / "checkpoint.pt", "checkpoint")["update"] == 400 // 32
    resumed = start("--resume=latest", cwd=tmp_path)
    wait_for(" left; ", resumed)
    assert "Stopped after" in finish(resumed)
    assert_every_update_is_in_the_curves(run)


def test_a_thread_that_dies_while_games_are_brought_back_ends_the_program_too(tmp_path):
    quick = ("--total-timesteps=64", "--num-envs=2", "--num-steps=32", "--num-minibatches=2")
    assert run_script(*quick, cwd=tmp_path).returncode == 0
    early = DEAD_THREAD.replace("400", "20") + "script.WATCHDOG_SECONDS = 3"
    process = start("--resume=latest", cwd=tmp_path, before=early)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "has not answered" in output.splitlines()[-1]


@pytest.mark.slow
def test_a_dead_thread_ends_a_measurement_too(tmp_path):
    dead = DEAD_THREAD + "script.WATCHDOG_SECONDS = 3"
    process = start("--evaluate=40", "--model-filename=random", cwd=tmp_path, before=dead)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1 and "has not answered" in output.splitlines()[-1]


# ------------------------------------------------------------------------------------------- clock

CLOCK = """
import time
true, count = time.time, iter(range(10**9))
time.time = lambda: true() - (3600 if next(count) > {looks} else 0)
"""


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(tmp_path):
    process = start(*SMALL, OFTEN, cwd=tmp_path, before=CLOCK.format(looks=100))
    wait_for(" left; ", process)
    run = run_of(tmp_path)
    deadline = time.monotonic() + 60
    while script.Checkpoints.read(run)[0]["update"] == 0 and time.monotonic() < deadline:
        time.sleep(0.3)
    assert script.Checkpoints.read(run)[0]["update"] > 0, "it still saves when it is time"
    output = finish(process)
    assert re.search(r"in 0:0[01]:\d\d: \d+ steps/s", output), "and knows how long it took"
    resumed = start("--resume=latest", cwd=tmp_path, before=CLOCK.format(looks=-1))
    wait_for(" left; ", resumed)
    finish(resumed)
    assert_every_update_is_in_the_curves(run)


def test_two_runs_started_at_once_have_two_folders(tmp_path):
    both = [start(*SMALL, "--total-timesteps=64", cwd=tmp_path) for _ in range(2)]
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert_whole(run)
        assert_every_update_is_in_the_curves(run)


# ----------------------------------------------------------------------------------------- kill -9


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_9_at_thirty_moments_of_a_run_loses_nothing(tmp_path):
    """Saving after each update, so that half of the time is inside a save; then the run as it
    would have been.
    """
    flags = (*SMALL, "--checkpoint-minutes=0", "--replay-steps=100", "--total-timesteps=20000")
    for place in ("killed", "whole"):
        (tmp_path / place).mkdir()
    process = start(*flags, cwd=tmp_path / "killed")
    pauses = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()
    drafts = updates = 0
    for pause in pauses:
        wait_for("curves in", process)
        time.sleep(0.1 + 2 * pause)
        run = run_of(tmp_path / "killed")
        until = time.monotonic() + 3 * (pause > 0.5)  # every other one inside a save
        while time.monotonic() < until and not list(run.glob(".*.tmp")):
            pass
        process.kill()
        process.communicate()
        drafts += len(list(run.glob(".*.tmp")))
        done = (
            script.read_file(run / "checkpoint.pt", "checkpoint")["update"]
            if (run / "checkpoint.pt").exists()
            else updates
        )
        assert done >= updates, "never less than before"
        updates = done
        process = start("--resume=latest", cwd=tmp_path / "killed")
    process.communicate(timeout=600)
    assert process.returncode == 0
    assert drafts >= 3, "some of them were inside a save"
    run_script(*flags, cwd=tmp_path / "whole", timeout=600)
    killed, whole = (
        torch.load(run_of(tmp_path / place) / "checkpoint.pt", weights_only=True)
        for place in ("killed", "whole")
    )
    assert killed["scores"] == whole["scores"] and killed["games"] == whole["games"]
    assert all(torch.equal(x, killed["weights"][name]) for name, x in whole["weights"].items())
    assert_whole(run_of(tmp_path / "killed"))
    assert_every_update_is_in_the_curves(run_of(tmp_path / "killed"))
