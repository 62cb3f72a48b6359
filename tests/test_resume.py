"""--resume: a run that was stopped ends like one that never was; what must differ is refused."""

import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import curves, only, run_script, start, wait_for

import ai_breakout_game as script

# 20 updates of 64 steps, with games that are seeded anew all the time.
RUN = (
    "--num-envs=2", "--num-steps=32", "--num-minibatches=2", "--update-epochs=1", "--seed=3",
    "--total-timesteps=1280", "--replay-steps=100", "--checkpoint-minutes=0.01",
)  # fmt: skip


def outcome(folder):
    """What a run came to: its weights, counters and scores, and its curves but for the speed."""
    run = only((folder / "runs").iterdir())
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    events = curves(run)
    points = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "charts/SPS"
    }
    return checkpoint, points


def assert_same_outcome(folder, reference):
    (one, points), (other, wanted) = outcome(folder), outcome(reference)
    for name in other["weights"]:
        assert torch.equal(one["weights"][name], other["weights"][name]), name
    for name in ("update", "global_step", "games", "scores", "best_return"):
        assert one[name] == other[name], name
    for name in ("seeds", "ages", "actions"):
        assert torch.equal(one["replay"][name], other["replay"][name]), name
    assert points == wanted
    assert len(points["losses/value_loss"]) == 20 and len(points["charts/episodic_return"]) > 5


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """A run that nobody stopped, for each way of stepping the games."""
    folders = {}
    for way in (True, False):
        folders[way] = tmp_path_factory.mktemp("unstopped")
        done = run_script(*RUN, f"--multithreading={way}", cwd=folders[way])
        assert done.returncode == 0, done.stderr
        checkpoint, _ = outcome(folders[way])
        assert (checkpoint["replay"]["seeds"] > 4).all(), "each game was seeded anew"
    return folders


@pytest.mark.parametrize(
    ("way", "number"),
    [
        (True, signal.SIGKILL), (False, signal.SIGINT),
        pytest.param(True, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(False, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_run_that_was_stopped_ends_like_one_that_never_was(unstopped, tmp_path, way, number):
    process = start(*RUN, f"--multithreading={way}", "--checkpoint-minutes=0", cwd=tmp_path)
    wait_for(" left; ", process)
    while not list(tmp_path.glob("runs/*/checkpoint.previous.pt")):
        time.sleep(0.01)  # until a second one is written, however slow the machine
    process.send_signal(number)
    process.communicate(timeout=60)
    before = outcome(tmp_path)[0]["update"]
    assert 0 < before < 20, "stopped in its midst"
    done = run_script("--resume=latest", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"resumed at {64 * before:,}" in done.stdout
    assert_same_outcome(tmp_path, unstopped[way])


@pytest.fixture
def stopped(unstopped, tmp_path, monkeypatch):
    """A run that is over, ours alone; the test is in its folder."""
    shutil.copytree(unstopped[True], tmp_path / "stopped")
    monkeypatch.chdir(tmp_path / "stopped")
    return only((tmp_path / "stopped" / "runs").iterdir())


def files(folder):
    """Every file below `folder`, with what is in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def complaint(capsys, *args):
    """The one line that `args` get, which are a mistake; nothing may have been written."""
    before = files(script.Path())
    assert script.main(list(args)) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert files(script.Path()) == before
    return errors


def test_a_run_that_is_over_goes_on_with_more_steps(stopped):
    done = run_script(f"--resume={stopped}", "--total-timesteps=1920", cwd=".")
    assert done.returncode == 0 and done.stderr == ""
    assert "Trained 1,920 steps" in done.stdout and "resumed at 1,280" in done.stdout
    assert script.Path("models/ai_breakout_game1920.mdl").is_file()
    events = curves(stopped)
    assert [e.step for e in events.Scalars("losses/entropy")] == list(range(64, 1921, 64))
    rates = [e.value for e in events.Scalars("charts/learning_rate")]
    start = script.Config().learning_rate
    assert rates[20:] == pytest.approx([start * (30 - i) / 30 for i in range(20, 30)])


def test_a_run_that_is_over_and_is_given_no_more_steps_says_so(stopped, capsys):
    assert script.main([f"--resume={stopped}"]) == 0
    output = capsys.readouterr().out
    assert "resumed at 1,280: nothing was left to train" in output
    assert "--total-timesteps=2560" in output, "the command that goes on"


def test_more_steps_are_not_forgotten_by_a_kill(stopped):
    process = start("--resume=latest", "--total-timesteps=1000000", cwd=".")
    wait_for(" left; ", process)
    process.kill()
    process.communicate()
    again = start("--resume=latest", cwd=".")
    wait_for(" left; ", again)  # and not: trained, since it has its 1,280 steps
    again.send_signal(signal.SIGINT)
    assert "Stopped after" in again.communicate(timeout=60)[0]


def test_a_run_moves_to_another_kind_of_device(stopped, capsys):
    """Whose generator has a state of another size: 16 bytes on a GPU, thousands on a CPU."""
    content, _ = script.Checkpoints.read(stopped)
    content["generator"] = content["generator"][:16].clone()
    script.save_file(content, stopped / "checkpoint.pt")
    assert script.main(["--resume=latest", "--total-timesteps=1344"]) == 0
    assert "Trained 1,344 steps" in capsys.readouterr().out


def test_points_that_were_not_written_yet_are_in_the_checkpoint(stopped):
    for events in stopped.glob("events*"):
        events.unlink()
    content, _ = script.Checkpoints.read(stopped)
    content["pending"] = [("losses/entropy", 1.5, 1216, 1e9), ("losses/entropy", 1.25, 1280, 1e9)]
    script.save_file(content, stopped / "checkpoint.pt")
    (stopped / "events.out.tfevents.copy").touch()
    assert script.main(["--resume=latest"]) == 0
    points = curves(stopped).Scalars("losses/entropy")
    assert [(e.step, e.value) for e in points] == [(1216, 1.5), (1280, 1.25)]


def test_a_resume_with_nothing_left_to_do_writes_the_weights_once_more(stopped):
    shutil.rmtree("models")
    done = run_script("--resume=latest", cwd=".")
    assert done.returncode == 0 and "Trained 1,280 steps" in done.stdout
    assert "--total-timesteps=2560" in done.stdout, "how it would go on"
    assert script.Path("models/ai_breakout_game1280.mdl").is_file()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--num-envs=4", "--num-envs=4 would make it another run: it has 2"),
        ("--model-filename=x.mdl", "--model-filename=x.mdl would make it another run: it has none"),
        ("--patience=3", "--patience=3.0 would make it another run: it has its default"),
        ("--gamma=0.98", "--gamma=0.98"), ("--seed=4", "--seed=4"),
        ("--multithreading=no", "--multithreading=False"),
        ("--env-id=ALE/Pong-v5", "--env-id=ALE/Pong-v5"),
        ("--model-filename=x.mdl", "--model-filename=x.mdl"),
        ("--replay-steps=99", "--replay-steps=99"),
        ("--total-timesteps=1279", "--total-timesteps can only be raised: it is 1280"),
        ("--run", "--run"), ("--evaluate=3", "--evaluate"), ("--record=a.gif", "--record"),
        ("--checkpoint-minutes=-1", "--checkpoint-minutes must be"),
    ],
)  # fmt: skip
def test_a_knob_that_would_make_it_another_run_is_refused_by_name(stopped, capsys, flag, said):
    assert said in complaint(capsys, f"--resume={stopped}", flag)


def test_a_run_from_before_a_lost_life_could_cost_something_goes_on_without(stopped):
    content = script.read_file(stopped / "checkpoint.pt", "checkpoint")
    del content["config"]["life_cost"]
    script.save_file(content, stopped / "checkpoint.pt")
    assert script.main([f"--resume={stopped}"]) == 0
    assert script.read_file(stopped / "checkpoint.pt", "checkpoint")["config"]["life_cost"] == 0


def test_weights_that_could_not_be_saved_are_not_offered(stopped, capsys):
    """An older run's may lie under that name."""
    in_the_way = f".ai_breakout_game1280.mdl.{os.getpid()}.tmp"
    (script.Path("models") / in_the_way).mkdir()
    script.Path("models/ai_breakout_game1280.mdl").write_bytes(b"an older run's")
    assert script.main([f"--resume={stopped}"]) == 1
    assert "--run=1" not in capsys.readouterr().out


def test_the_same_knobs_may_be_typed_again(stopped, capsys):
    assert script.main([*RUN, "--resume=latest"]) == 0


@pytest.mark.parametrize("name", ["latest", "nothing", "runs", "x" * 5000, "a\0b", ""])
def test_a_run_that_is_not_there_gets_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    if name:
        assert "runs" in complaint(capsys, f"--resume={name}")
    else:
        assert "--resume" in complaint(capsys, "--resume=")


def test_latest_is_the_run_that_was_saved_last(stopped):
    older = shutil.copytree(stopped, stopped.with_name("A-copy"))
    os.utime(older / "checkpoint.pt", (1e9, 1e9))
    os.utime(older / "checkpoint.previous.pt", (1e9, 1e9))
    stopped.with_name("no-checkpoint-yet").mkdir()
    assert script.find_run("latest") == script.Path("runs") / stopped.name
    assert script.find_run("A-copy") == script.Path("runs/A-copy")


# ------------------------------------------------------------------------------------- checkpoints


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, halve, empty])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(stopped, capsys, damage):
    steps = torch.load(stopped / "checkpoint.previous.pt", weights_only=True)["global_step"]
    damage(stopped / "checkpoint.pt")
    assert script.main([f"--resume={stopped}"]) == 0
    output = capsys.readouterr().out
    assert f"{stopped}/checkpoint.pt is not a checkpoint: " in output
    assert "going on from checkpoint.previous.pt" in output and f"at step {steps:,}" in output
    assert (stopped / "checkpoint.damaged.pt").exists(), "set aside, not thrown away"
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["global_step"] == 1280


@pytest.mark.parametrize(
    ("flag", "said"), [("--seed=9", "another run"), ("--device=none", "--device=none")]
)
def test_a_mistake_leaves_a_damaged_checkpoint_where_it_is(stopped, capsys, flag, said):
    flip_a_bit(stopped / "checkpoint.pt")
    assert said in complaint(capsys, "--resume=latest", flag)
    assert (stopped / "checkpoint.pt").exists() and not (stopped / "checkpoint.damaged.pt").exists()


def test_two_damaged_checkpoints_get_one_line(stopped, capsys):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        flip_a_bit(stopped / name)
    (stopped / ".lock").unlink()
    assert "its checksum does not match" in complaint(capsys, f"--resume={stopped}")


def test_a_checkpoint_of_another_version_is_refused(stopped, capsys, monkeypatch):
    monkeypatch.setattr(script, "SEAL", b"ai_breakout_game 2 sha256 ")
    assert "another version" in complaint(capsys, f"--resume={stopped}")


def test_a_checkpoint_is_plain_and_its_weights_can_be_watched(stopped, capsys):
    game = script.Game("breakout")
    agent = script.load_agent(stopped / "checkpoint.pt", game)
    about = torch.load(stopped / "checkpoint.pt", weights_only=True)
    weights = torch.load(stopped / "last.mdl", weights_only=True)["weights"]
    assert all(torch.equal(weights[name], x) for name, x in agent.state_dict().items())
    assert about["global_step"] == 1280 and about["config"]["num_envs"] == 2


def test_a_mistake_is_named_where_a_lock_that_is_held_cannot_be_removed(
    stopped, capsys, monkeypatch
):
    """As on Windows, which removes it once it is free."""

    def refuse(*_, **__):
        raise PermissionError("it is in use")

    (stopped / ".lock").unlink()
    with monkeypatch.context() as windows:
        windows.setattr(script.Path, "unlink", refuse)
        assert script.main(["--resume=latest", "--seed=9"]) == 2
    assert "another run" in capsys.readouterr().err


def test_a_draft_that_was_cut_off_is_no_checkpoint(stopped, capsys):
    draft = stopped / ".checkpoint.pt.123.tmp"
    draft.write_bytes(b"half")
    assert script.main([f"--resume={stopped}"]) == 0
    assert not draft.exists(), "cleared away"


def test_two_processes_cannot_train_one_run(tmp_path):
    first = start(*RUN, "--total-timesteps=1000000", cwd=tmp_path)
    wait_for(" left; ", first)
    second = run_script("--resume=latest", cwd=tmp_path)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert "is being trained by another process" in second.stderr
    first.kill()
    first.communicate()
    third = start("--resume=latest", cwd=tmp_path)
    wait_for(" left; ", third)  # the lock went with its holder
    third.kill()
    third.communicate()


# ------------------------------------------------------------------------------------------- games


@pytest.mark.parametrize("kind", [script.NativeGames, script.WrappedGames])
@pytest.mark.parametrize(
    "rom", ["breakout", *(pytest.param(x, marks=pytest.mark.slow) for x in ("freeway", "seaquest"))]
)
def test_games_are_brought_back_to_the_pixel_at_any_step(kind, rom):
    """Sticky actions, lives, cut-off games; and from the games brought back it goes on alike."""
    game, rng = script.Game(rom, sticky=0.25, max_frames=1000), np.random.default_rng(1)
    games = script.ReplayableGames(kind(game, 3), replay_steps=120)
    games.reset(5)
    for step in range(320):
        result = games.step(rng.integers(0, len(games.games.action_names), 3))
        if step in (40, 200, 319) or (games.ages == 0).any():
            again = script.ReplayableGames(kind(game, 3), replay_steps=120)
            frames = again.load_state_dict(games.state_dict())
            assert np.array_equal(frames, result.frames)
            for name in ("lives", "ended", "frame_numbers", "scores"):
                assert np.array_equal(getattr(again.games, name), getattr(games.games, name))
            games = again if step == 200 else games
    assert (games.seeds > 7).all()


@pytest.mark.parametrize("kind", [script.NativeGames, script.WrappedGames])
def test_seeding_anew_cuts_no_game_off_and_loses_no_score(kind):
    games = script.ReplayableGames(kind(script.Game("breakout"), 2), replay_steps=50)
    games.reset(1)
    rng, lengths, starts, score = np.random.default_rng(0), np.zeros(2, int), np.zeros(2, int), 0.0
    for _ in range(900):
        result = games.step(rng.integers(0, 4, 2))
        score += result.rewards.sum()  # Breakout's lowest bricks: one point each
        starts += result.restarted
        for over in result.finished:
            lengths[over.slot] += over.length
            score -= over.score
    assert (starts >= 3).all() and (games.seeds > 2).all()
    assert (games.ages + lengths + starts <= 900).all(), "each step is one game's, or its start"
    assert lengths.sum() + starts.sum() + sum(games.ages) >= 2 * 900 - 2 * 50
    assert 0 <= score == games.games.scores.sum()


# ------------------------------------------------------------------------------------------- curves


@pytest.mark.slow
def test_the_curves_of_ten_million_steps_stay_below_50_megabytes(tmp_path):
    """With a game over every 200 steps, as at the start: later they are longer, so fewer."""
    config = script.Config(total_timesteps=10_000_000)
    game = script.find_game(config)
    state = script.make_state(config, game, torch.device("cpu"))
    logger = script.Logger(tmp_path, config, state)
    losses = dict.fromkeys((*script.LOSS_NAMES, "explained_variance"), 0.123)
    over = [(t, script.FinishedGame(0, 1.0, 200)) for t in range(1, 126, 25)]
    for _ in range(config.num_updates):
        state.update += 1
        state.global_step += config.batch_size
        logger.log_games(state, over)
        logger.log_update(state, 1e-4, losses)
    logger.close()
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert state.games > 45_000 and 10e6 < size < 50e6
    print(size)
