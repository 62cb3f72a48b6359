"""Evaluations, the variant of a game that a model plays, the agent's choices, and recordings."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPT, only, start, wait_for

import ai_breakout_game as script

RANDOM = "--model-filename=random"
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def mount():
    """A function that makes a folder with a file system of its own."""
    folders = []

    def mount_at(folder, options):
        Path(folder).mkdir()
        folders.append(os.path.abspath(folder))
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a file system")

    yield mount_at
    for folder in folders:
        subprocess.run(["umount", "-l", folder], capture_output=True)


def spy(monkeypatch, owner, name, look):
    """Call `look` with the arguments of owner.name before each call."""
    original = getattr(owner, name)
    monkeypatch.setattr(
        owner, name, lambda *args, **named: (look(*args, **named), original(*args, **named))[1]
    )


def save_model(name="mine.mdl", bias=None, **settings):
    """Write a model that decides by what it sees, or always by `bias`; returns its flag."""
    torch.manual_seed(3)
    agent = script.Agent(4)
    with torch.no_grad():
        agent.actor.weight *= 200 if bias is None else 0
        agent.actor.bias.copy_(torch.tensor(bias or [0.0] * 4))
    torch.save({"weights": agent.state_dict(), **settings}, name)
    return f"--model-filename={name}"


def reports(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def evaluate(*args):
    """Evaluate one short game, or as `args` say; the newest report of the only file of them."""
    assert script.main(["--evaluate=1", "--max-frames=400", *args]) == 0
    return reports(only(Path().rglob("*.jsonl")))[-1]


# ------------------------------------------------------------------------------------------ scores


def plain_game(agent, emulator_seed, seed, max_frames):
    """Score and length of a game, without any of the script's loops."""
    generator = torch.Generator().manual_seed(seed)
    env = script.make_env("BreakoutNoFrameskip-v4", max_frames=max_frames)
    frames, info = env.reset(seed=emulator_seed)
    score, length, serve, over = 0.0, 0, False, False
    while not over:
        with torch.no_grad():
            probabilities = agent(torch.from_numpy(frames)[None])[0].softmax(-1)
        action = int(torch.multinomial(probabilities, 1, generator=generator))
        lives = info["lives"]
        frames, reward, terminated, truncated, info = env.step(1 if serve else action)
        score, length, over = score + reward, length + 1, terminated or truncated
        serve = info["lives"] < lives  # the next action is FIRE
    return score, length


@pytest.mark.parametrize("max_frames", [300, 4000])
def test_a_score_is_that_of_a_plain_loop_over_the_game(monkeypatch, max_frames):
    seeds = []
    spy(monkeypatch, gym.vector.SyncVectorEnv, "reset", lambda _, seed: seeds.extend(seed))
    args = (f"--max-frames={max_frames}", "--seed=3", "--multithreading=no")
    report = evaluate(save_model(), *args)
    agent = script.load_agent("mine.mdl")
    score, length = plain_game(agent, only(seeds), 3, max_frames)
    assert (report["scores"], report["lengths"]) == ([score], [length])
    assert length == 75 if max_frames == 300 else score > 0 and length < 1000


def test_every_slot_plays_its_share_so_that_short_games_do_not_count_too_often(monkeypatch):
    class UnfairGames:
        """Slot 0 ends a game of score 0 at every step, the others one of score 9 at each tenth."""

        def __init__(self, config, slots):
            self.frames, self.steps = np.zeros((slots, 4, 84, 84), np.uint8), 0
            self.idle = np.zeros(slots, int)

        def reset(self, *seed):
            pass

        def step(self, actions):
            self.steps += 1
            slots = range(1 if self.steps % 10 else len(actions))
            over = [script.FinishedGame(i, 9.0 if i else 0.0, 5) for i in slots]
            return script.StepResult(*[None] * 4, finished=over)

    monkeypatch.setattr(script, "Games", UnfairGames)
    scores = evaluate("--evaluate=65", RANDOM)["scores"]
    assert len(scores) == 65
    assert scores.count(0.0) == 3, "of 32 slots, the first plays three games, the others two"


def test_the_same_seed_gives_the_same_games_and_another_seed_others():
    args = (RANDOM, "--max-frames=1200")
    first, again, other = (evaluate(*args, f"--seed={seed}") for seed in (5, 5, 6))
    assert first == again
    assert first["lengths"] != other["lengths"]


@pytest.mark.parametrize("way", ["yes", "no"])
def test_neighboring_seeds_share_no_games_nor_do_training_and_evaluation(monkeypatch, way):
    """Games that start with the same seed are the same under --greedy."""
    seeds = []

    def note(env, seed):
        seeds.extend(np.asarray(seed).tolist())
        raise KeyboardInterrupt

    owner = script.AtariVectorEnv if way == "yes" else gym.vector.SyncVectorEnv
    monkeypatch.setattr(owner, "reset", note)
    for seed in (1, 2, 3):
        for mode in (["--evaluate=4", RANDOM], ["--num-envs=4"]):
            assert script.main([*mode, f"--seed={seed}", f"--multithreading={way}"])
    assert len(set(seeds)) == 24


@pytest.mark.parametrize(("games", "t"), [(2, 12.706), (3, 4.303), (10, 2.262), (100, 1.984)])
def test_the_interval_is_students_t(games, t):
    scores = [float(7 * i * i % 101) for i in range(games)]
    expected = t * np.std(scores, ddof=1) / math.sqrt(games)
    assert script.confidence_interval(scores) == pytest.approx(expected, rel=5e-3)


def pretend(monkeypatch, *scores):
    """Let an evaluation finish games of these scores; a score is also the length."""
    games = [script.FinishedGame(0, float(score), score) for score in scores]
    monkeypatch.setattr(script, "play_games", lambda agent, config: games)


def test_one_game_has_no_interval(monkeypatch, capsys):
    pretend(monkeypatch, 5)
    assert evaluate(RANDOM)["interval_95"] is None
    output = capsys.readouterr().out
    assert "mean 5.00, median 5, from 5 to 5" in output and "+-" not in output


@pytest.mark.parametrize(
    ("flags", "different", "interval"),
    [
        (["--greedy"], 2, 12.706 * 2),
        ([], 4, 3.182 * 1),
        (["--greedy", "--sticky-actions=0.5"], 4, 3.182 * 1),
    ],
)
def test_equal_games_count_once_in_the_interval_of_a_greedy_agent_only(
    monkeypatch, capsys, flags, different, interval
):
    pretend(monkeypatch, 5, 9, 5, 5)
    report = evaluate(RANDOM, *flags)
    output = capsys.readouterr().out
    assert report["mean"] == 6 and report["scores"] == [5, 9, 5, 5]
    assert report["different_games"] == different
    assert report["interval_95"] == pytest.approx(interval, rel=5e-3), "t times the error"
    assert f"mean 6.00 +- {report['interval_95']:.2f} (95 %)" in output
    assert ("only 2 games are different" in output) is (different == 2)


@pytest.mark.parametrize("scores", [[0, 0, 1, 9, 432], [7], [-21, -20, -9], [0, 11], [0, 863, 864]])
def test_each_game_is_in_its_row_of_the_histogram(monkeypatch, capsys, scores):
    pretend(monkeypatch, *scores)
    evaluate(RANDOM)
    pattern = r"^ +(-?\d+)(?: to (-?\d+))?  +(\d+)  (#*)$"
    rows = re.findall(pattern, capsys.readouterr().out, re.MULTILINE)
    following = min(scores)
    for low, high, count, bar in rows:
        assert int(low) == following, "without gaps"
        following = int(high or low) + 1
        assert int(count) == sum(int(low) <= score < following for score in scores)
        assert bool(bar) == (count != "0")
    assert min(6, np.ptp(scores) + 1) <= len(rows) <= 13
    assert sum(int(count) for _, _, count, _ in rows) == len(scores)


def test_walls_are_counted_beside_human_and_random_play(monkeypatch, capsys):
    pretend(monkeypatch, 0, 431, 432, 863, 864)
    evaluate(RANDOM)
    output = capsys.readouterr().out
    assert "60% of the games reached 432" in output and "20% of the games reached 864" in output
    assert "random play 1.7, a human 31.8" in output


def test_scores_of_millions_are_printed_in_full(monkeypatch, capsys):
    pretend(monkeypatch, 1234567, 1234571)
    report = evaluate(RANDOM, "--env-id=AtlantisNoFrameskip-v4")
    output = capsys.readouterr().out
    assert "mean 1,234,569.00 +- " in output and report["mean"] == 1234569
    assert "median 1,234,569, from 1,234,567 to 1,234,571" in output
    assert "reached" not in output and "human" not in output, "these are of Breakout"


def test_an_evaluation_shows_at_once_that_it_runs_and_counts_steps_and_games(monkeypatch, capsys):
    outputs = []
    spy(monkeypatch, script.Games, "step", lambda *_: outputs.append(capsys.readouterr().out))
    report = evaluate(RANDOM, "--evaluate=2")
    assert outputs[0].strip() == "0 steps" and not any(outputs[1:]), "then twice a minute"
    lines = capsys.readouterr().out.replace("\r", "").splitlines()
    assert lines[0] == f"{2 * max(report['lengths'])} steps, games finished: 2 of 2"
    assert not any("left" in line or "?" in line for line in lines), "no forecast"


# ----------------------------------------------------------------------------------------- reports


def test_each_model_has_its_own_reports_beside_it_and_earlier_ones_are_kept():
    Path("sub").mkdir()
    flags = [save_model(f"sub/lr0.{i}.mdl", patience=10.0) for i in (1, 2)]
    for args in ((flags[0], "--seed=7"), (flags[1],), (flags[0], "--greedy", "--evaluate=2")):
        assert script.main(["--evaluate=1", "--max-frames=80", *args]) == 0
    first, second = reports("sub/lr0.1.mdl.evaluations.jsonl")
    assert len(reports("sub/lr0.2.mdl.evaluations.jsonl")) == 1
    settings = {"env_id": "BreakoutNoFrameskip-v4", "sticky_actions": 0, "max_frames": 80}
    settings |= {"patience": 10, "model": "lr0.1.mdl", "partial": False}
    assert settings.items() <= first.items() and settings.items() <= second.items()
    assert (first["seed"], first["greedy"], first["games"]) == (7, False, 1)
    assert (second["seed"], second["greedy"], second["games"]) == (1, True, 2)
    assert len(second["scores"]) == 2 and second["lengths"] == [20, 20]


def test_a_reader_that_leaves_early_loses_no_report():
    command = f'"{sys.executable}" "{SCRIPT}" --evaluate=1 --max-frames=80 {RANDOM} | head -1'
    shell = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=100)
    assert "0 steps" in done.stdout and done.stderr == "" and done.returncode == 0
    assert len(reports(only(Path().rglob("*.jsonl")))) == 1


def test_reports_on_a_model_in_a_read_only_folder_are_written_here(monkeypatch, mount, capsys):
    mount("shipped", "size=9m")
    model = save_model("shipped/mine.mdl")
    subprocess.run(["mount", "-o", "remount,ro", "shipped"], check=True)
    pretend(monkeypatch, 5)
    evaluate(model)
    assert len(reports("mine.mdl.evaluations.jsonl")) == 1
    assert "appended to mine.mdl.evaluations.jsonl" in capsys.readouterr().out


# The third step ends a game; the fourth lasts until a signal comes.
THIRD_STEP = """if True:
    import time
    steps, step = [], script.Games.step
    def step_or_wait(self, actions):
        steps.append(1)
        if len(steps) == 4:
            print("\\nwaiting", flush=True)
            time.sleep(60)
        over = [script.FinishedGame(0, 5.0, 3)] * (len(steps) == 3)
        return step(self, actions)._replace(finished=over)
    script.Games.step = step_or_wait"""


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_an_interrupted_evaluation_keeps_its_finished_games(name):
    process = start("--evaluate=2", RANDOM, cwd=".", before=THIRD_STEP)
    wait_for("waiting", process)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in output
    report = only(reports(only(Path().rglob("*.jsonl"))))
    assert report["partial"] is True and report["scores"] == [5]
    assert "1 games: mean 5.00" in output and "interrupted" in output


# ---------------------------------------------------------------------------------------- variants


@pytest.fixture
def emulators(monkeypatch):
    """Game and stickiness of each emulator that is started to play."""
    started = []

    def note(env, *args, **named):
        if args or "obs_type" in named:  # not to look up the names of actions
            started.append((named.get("game") or args[0], named["repeat_action_probability"]))

    for kind in (script.AtariVectorEnv, script.AtariEnv):
        spy(monkeypatch, kind, "__init__", note)
    return started


@pytest.mark.parametrize(
    ("flags", "game", "settings"),
    [
        (["--env-id=ALE/Breakout-v5"], "breakout", ("ALE/Breakout-v5", 0.25, 108_000, 250)),
        (["--env-id=ALE/Pong-v5"], "pong", ("ALE/Pong-v5", 0.25, 108_000, 250)),
        (
            ["--sticky-actions=0.5", "--max-frames=240", "--patience=7"],
            "breakout", ("BreakoutNoFrameskip-v4", 0.5, 240, 7),
        ),
    ],
)  # fmt: skip
def test_a_model_alone_is_played_and_trained_further_as_it_was_trained(
    monkeypatch, emulators, capsys, flags, game, settings
):
    settings = dict(zip(("env_id", "sticky_actions", "max_frames", "patience"), settings))
    train = ["--num-envs=1", "--num-steps=8", "--num-minibatches=1", "--total-timesteps=8"]
    assert script.main([*train, *flags]) == 0
    path, model = f"models/ai_{game}_game8.mdl", f"--model-filename=ai_{game}_game8.mdl"
    capsys.readouterr(), emulators.clear()
    assert script.main([*train, model]) == 0
    assert script.main(["--record=a.gif", "--seconds=0.1", model]) == 0
    if settings["max_frames"] > 240:  # else it plays for minutes
        step, over = script.Games.step, [script.FinishedGame(0, 1.0, 1)]
        monkeypatch.setattr(script.Games, "step", lambda *args: step(*args)._replace(finished=over))
    assert script.main(["--evaluate=1", model]) == 0
    assert emulators == [(game, settings["sticky_actions"])] * 3
    output = capsys.readouterr().out
    assert f"{settings['env_id']}, sticky actions {settings['sticky_actions']:g}, seed" in output
    report = only(reports(f"{path}.evaluations.jsonl"))
    assert settings.items() <= report.items() and report["lengths"][0] <= 60
    assert settings.items() <= script.load_agent(path).settings.items()
    assert "note:" not in output


def test_a_typed_flag_overrides_a_models_setting_and_one_line_says_so(emulators, capsys):
    model = save_model(env_id="ALE/Breakout-v5", sticky_actions=0.25, max_frames=400)
    report = evaluate(model, "--sticky-actions=0.125")
    output = capsys.readouterr().out
    note = only(line for line in output.splitlines() if "note:" in line)
    assert "sticky_actions=0.25" in note and "env_id" not in note and "max_frames" not in note
    assert emulators == [("breakout", 0.125)] and report["sticky_actions"] == 0.125
    assert "ALE/Breakout-v5, sticky actions 0.125, seed 1" in output


@pytest.mark.parametrize(("trained", "typed"), [(0.25, 0.0), (0.0, 0.25)])
def test_another_env_id_brings_its_own_stickiness(emulators, capsys, trained, typed):
    ids = {0.0: "BreakoutNoFrameskip-v4", 0.25: "ALE/Breakout-v5"}
    model = save_model(env_id=ids[trained], sticky_actions=trained, max_frames=400)
    report = evaluate(model, f"--env-id={ids[typed]}")
    assert emulators == [("breakout", typed)]
    assert (report["env_id"], report["sticky_actions"]) == (ids[typed], typed)
    assert f"note: the model was trained with env_id={ids[trained]}" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- the agent


def actions_of(monkeypatch, *args):
    """All actions in an evaluation."""
    taken = []
    spy(monkeypatch, script.Games, "step", lambda games, actions: taken.extend(actions.tolist()))
    evaluate(*args)
    return np.bincount(taken, minlength=4) / len(taken)


def test_a_greedy_agent_takes_the_most_probable_action(monkeypatch):
    model = save_model(bias=[0.0, 0.0, 0.1, 0.0])
    assert actions_of(monkeypatch, model, "--greedy")[2] == 1


def test_sampled_actions_follow_the_policy(monkeypatch):
    policy = [0.1, 0.2, 0.3, 0.4]
    model = save_model(bias=np.log(policy).tolist())
    shares = actions_of(monkeypatch, model, "--evaluate=3", "--max-frames=800")
    np.testing.assert_allclose(shares, policy, atol=0.06)


@pytest.mark.parametrize(
    ("saved", "typed", "impatient"),
    [
        ({}, [], False),  # a bare state_dict
        ({"patience": 1.0}, [], True),
        ({"patience": 500.0}, [], False),
        ({"patience": 1.0}, ["--patience=0"], False),
        ({}, ["--patience=1"], True),
    ],
)
def test_an_agent_that_waits_too_long_plays_more_at_random(monkeypatch, saved, typed, impatient):
    """It prefers NOOP, 400 to 1, and so never scores."""
    model = save_model(bias=[6.0, 0.0, 0.0, 0.0], **saved)
    others = 1 - actions_of(monkeypatch, model, *typed)[0]
    assert others > 0.2 if impatient else others < 0.1


# -------------------------------------------------------------------------------------- recordings


def read_pictures(path):
    """All pictures of a recording, BGR, and for how many seconds they play."""
    if str(path).endswith(".gif"):
        _, animation = cv2.imreadanimation(path)
        return [x[..., :3] for x in animation.frames], sum(animation.durations) / 1000
    video, pictures = cv2.VideoCapture(path), []
    while (read := video.read())[0]:
        pictures.append(read[1])
    return pictures, len(pictures) / video.get(cv2.CAP_PROP_FPS)


def watched(seconds=math.inf, **settings):
    """What `watch` shows of mine.mdl for so many seconds, or until the first game is over."""
    agent, pictures, scores = script.load_agent("mine.mdl"), [], []
    for parts in script.watch(agent, script.Config(**settings), 1, scores):
        if scores or len(pictures) >= 60 * seconds:
            return pictures
        pictures.append(np.hstack(parts))


def assert_shows(recorded, expected, tolerance):
    """Each picture is the expected one, and not that of a moment before or after."""
    assert len(recorded) == len(expected)
    for i, picture in enumerate(recorded):
        near = expected[max(0, i - 2) : i + 3]
        errors = [cv2.absdiff(picture, other).mean() for other in near]
        nearest = near[int(np.argmin(errors))]
        assert min(errors) < tolerance and np.array_equal(nearest, expected[i]), f"picture {i}"


def assert_wall(picture, tolerance):
    """Six rows of bricks, from red to blue."""
    wall = [(200, 72, 72), (198, 108, 58), (180, 122, 48)]
    wall += [(162, 162, 42), (72, 160, 72), (66, 72, 200)]
    scale = len(picture) // 210
    seen = [picture[(60 + 6 * row) * scale, 80 * scale, ::-1].astype(int) for row in range(6)]
    np.testing.assert_allclose(seen, wall, atol=tolerance)


def test_a_gif_shows_fifteen_pictures_a_second_of_what_was_played(capsys):
    assert script.main(["--record=a.gif", "--seconds=2", save_model()]) == 0
    pictures, seconds = read_pictures("a.gif")
    assert seconds == 2 and pictures[0].shape == (420, 600, 3)
    small = {"dsize": None, "fx": 2 / 3, "fy": 2 / 3, "interpolation": cv2.INTER_AREA}
    expected = [cv2.resize(picture, **small) for picture in watched(2)[::4]]
    assert_shows(pictures, expected, tolerance=2)
    assert_wall(pictures[0], tolerance=4)
    megabytes = os.path.getsize("a.gif") / 1e6
    assert megabytes < 0.35 and f"a.gif: {megabytes:.2f} MB" in capsys.readouterr().out


def test_an_mp4_shows_sixty_pictures_a_second_of_what_was_played():
    assert script.main(["--record=a.mp4", "--seconds=1", save_model()]) == 0
    pictures, seconds = read_pictures("a.mp4")
    assert seconds == pytest.approx(1) and pictures[0].shape == (630, 900, 3)
    assert_shows(pictures, watched(1), tolerance=4)
    assert_wall(pictures[0], tolerance=12)


def test_every_frame_of_the_emulator_is_shown_three_times_as_large():
    save_model()
    pictures = [picture[:, :480] for picture in watched(1)]
    assert_wall(pictures[0], tolerance=0)
    for picture in pictures:
        assert np.array_equal(picture, picture[::3, ::3].repeat(3, 0).repeat(3, 1))
    assert sum((a != b).any() for a, b in itertools.pairwise(pictures)) > 40, "not each fourth only"


def test_a_recording_ends_with_the_game():
    assert script.main(["--record=a.mp4", "--max-frames=80", save_model()]) == 0
    pictures, _ = read_pictures("a.mp4")
    assert_shows(pictures, watched(max_frames=80), tolerance=4)
    assert len(pictures) >= 80


def test_a_recording_of_some_seconds_goes_on_into_the_next_game():
    args = ["--record=a.gif", "--seconds=1.6", "--max-frames=40"]
    assert script.main([*args, RANDOM]) == 0
    assert read_pictures("a.gif")[1] == 1.6


def test_a_gif_of_a_long_game_ends_after_forty_seconds(monkeypatch, capsys):
    assert script.Recorder.GIF_SECONDS == 40
    monkeypatch.setattr(script.Recorder, "GIF_SECONDS", 1)
    assert script.main(["--record=a.gif", "--seconds=3", RANDOM]) == 0
    assert read_pictures("a.gif")[1] == 1 and "60 frames," in capsys.readouterr().out


def test_a_gif_is_complete_after_each_picture_since_a_lost_display_ends_the_process():
    recorder = script.Recorder(Path("a.gif"))
    for i in range(60):
        recorder.add(np.full((6, 6, 3), 2 * i, np.uint8))
    pictures, seconds = read_pictures("a.gif")
    assert seconds == pytest.approx(1) and pictures[-1].max() == 2 * 56


@pytest.mark.parametrize("seconds", [None, 1])
def test_a_png_shows_how_a_screen_becomes_an_observation(monkeypatch, capsys, seconds):
    observed, screens, step = [], [], script.Games.step

    def note(games, actions):
        result = step(games, actions)
        observed.append(games.frames[0].copy())
        screens.append(games.env.render()[0][-1])
        return result

    monkeypatch.setattr(script.Games, "step", note)
    args = [] if seconds is None else [f"--seconds={seconds}"]
    assert script.main(["--record=frames.PNG", save_model(), *args]) == 0
    assert capsys.readouterr().out == "frames.PNG\n"
    assert len(observed) == 15 * (seconds or 10) + 1
    picture, frames, screen = cv2.imread("frames.PNG"), observed[-1], screens[-1]
    assert (picture[48:468:2, 24:344:2, ::-1] == screen).all()
    gray = screen @ [0.299, 0.587, 0.114]
    assert np.abs(picture[48:468:2, 368:688:2].mean(-1) - gray).max() < 1
    assert (picture[50:468:5, 714:1132:5] == frames[-1][..., None]).all()
    for i, frame in enumerate(frames):
        left = 24 + 285 * i
        shown = picture[516:768:3, left : left + 252 : 3]
        assert (shown == frame[..., None]).all(), "the oldest is on the left"


TELL_PICTURES = """add = script.Recorder.add
script.Recorder.add = lambda *args: (add(*args), print("picture", args[0].count, flush=True))"""


@pytest.mark.parametrize(
    ("path", "name", "pictures"),
    [
        ("a.mp4", "SIGTERM", 60),
        pytest.param("a.gif", "SIGHUP", 60, marks=pytest.mark.slow),
        pytest.param("a.gif", "SIGINT", 60, marks=pytest.mark.slow),
        pytest.param("a.mp4", "SIGKILL", 330, marks=pytest.mark.slow),
    ],
)
def test_the_recording_of_a_process_that_is_ended_can_be_played(path, name, pictures):
    process = start(f"--record={path}", "--seconds=99", RANDOM, cwd=".", before=TELL_PICTURES)
    wait_for(f"picture {pictures}", process)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode in ((-9,) if name == "SIGKILL" else (0, 130)), output
    assert "Traceback" not in output
    kept, seconds = read_pictures(path)
    assert pictures / 60 - 2 <= seconds < 90, "all, or but for the last two seconds"
    assert_wall(kept[0], tolerance=12)
    assert os.listdir() == [path], "and no draft"


@pytest.mark.parametrize("path", ["folder.gif", "folder.mp4", "missing/a.gif", "readonly/a.mp4"])
def test_a_recording_that_cannot_be_written_is_refused_before_it_is_played(
    monkeypatch, mount, capsys, path
):
    if path.startswith("folder"):
        Path(path).mkdir()
    if path.startswith("readonly"):
        mount("readonly", "ro")
    monkeypatch.setattr(script, "watch", lambda *_: pytest.fail("it plays"))
    assert script.main([f"--record={path}", RANDOM]) in (1, 2)
    errors = capsys.readouterr().err
    assert path in errors and errors.count("\n") == 1


def test_a_png_that_cannot_be_written_gets_one_line(capsys):
    assert script.main(["--record=missing/a.png", "--seconds=0.1", RANDOM]) == 1
    output, errors = capsys.readouterr()
    assert output == "" and "missing/a.png" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("path", ["a.gif", "a.mp4"])
@pytest.mark.parametrize("room", [4096, 20480])
def test_a_full_disk_gets_one_line(mount, capsys, path, room):
    mount("small", f"size={room}")
    Path("small/other").write_bytes(bytes(4096))
    assert script.main([f"--record=small/{path}", "--seconds=1.5", RANDOM]) == 1
    errors = capsys.readouterr().err
    assert "No space left on device" in errors and errors.count("\n") == 1


# --------------------------------------------------------------------------------------- the panel


def texts_of(monkeypatch):
    """Every text that is drawn, with the position of its left end."""
    drawn = []
    spy(monkeypatch, script, "draw_text", lambda _, *args, **named: drawn.append(args[:3]))
    return drawn


@pytest.fixture(scope="module")
def asterix():
    """Two games of Asterix, which has no FIRE: what the emulator says, and the panel's numbers."""
    steps, numbers = [], {label: [] for label in ("score", "lives", "game", "mean")}
    step = gym.vector.SyncVectorEnv.step

    def step_and_note(env, actions):
        result = step(env, actions)
        over = result[2][0] or result[3][0]
        steps.append((result[1][0], result[4]["lives"][0], over))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym.vector.SyncVectorEnv, "step", step_and_note)
        drawn, scores = texts_of(patch), []
        torch.manual_seed(1)
        config = script.Config(env_id="AsterixNoFrameskip-v4", max_frames=640)
        for _ in script.watch(script.Agent(9), config, 3, scores):
            if len(scores) == 2:
                break
    for (label, *_), (value, *_) in itertools.pairwise(drawn):
        if label in numbers:
            numbers[label].append(value)
    return steps, numbers


def test_the_panel_shows_the_true_score_lives_game_and_mean(asterix):
    steps, numbers = asterix
    score, finished, ended = 0.0, [], False
    for i, (reward, lives, over) in enumerate(steps):
        score = reward if ended else score + reward
        mean = f"{np.mean(finished):.1f}" if finished else "-"
        expected = [f"{score:.0f}", str(lives), str(len(finished) + 1), mean]
        assert [values[i] for values in numbers.values()] == expected
        finished, ended = finished + [score] * bool(over), over
    assert len(set(finished)) == 2 and min(finished) >= 50


def test_a_game_without_fire_goes_on_after_a_lost_life(asterix):
    lives = [lives for _, lives, _ in asterix[0]]
    lost = next(i for i in range(len(lives)) if lives[i] < lives[0])
    assert len(lives) > lost + 20 and not any(over for _, _, over in asterix[0][: lost + 20])


def test_the_panel_shows_the_frames_and_the_decision_of_the_agent(monkeypatch):
    save_model()
    agent, seen, shown, taken, values = script.load_agent("mine.mdl"), [], [], [], []
    spy(monkeypatch, script.Agent, "act", lambda _, frames, *rest: seen.append(frames.clone()))
    spy(monkeypatch, script, "draw_policy", lambda _, *args: shown.append(args))
    spy(monkeypatch, script, "draw_values", lambda _, history: values.append(history[-1]))
    spy(monkeypatch, script.Games, "step", lambda _, actions: taken.append(int(actions[0])))
    pictures = script.watch(agent, script.Config(), 1, [])
    while len(seen) < 20:
        _, panel = next(pictures)
    for i, frame in enumerate(seen[-1][0].numpy()):
        np.testing.assert_array_equal(panel[135:219, 24 + 96 * i : 108 + 96 * i, 0], frame)
    shown = [(*policy, value) for policy, value in zip(shown, values)]
    for frames, (names, probabilities, action, value), true_action in zip(seen, shown, taken):
        assert value == pytest.approx(agent(frames)[1].item(), abs=1e-5)
        assert names == ["NOOP", "FIRE", "RIGHT", "LEFT"] and action == true_action
        expected = agent(frames)[0].softmax(-1)[0].tolist()
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert len(set(taken)) > 1 and (seen[-1][0, 0] != seen[-1][0, 3]).any()


def test_the_bar_of_the_action_taken_is_orange_and_as_long_as_its_probability():
    def orange(probabilities, action):
        panel = np.zeros((630, 420, 3), np.uint8)
        script.draw_policy(panel, ["NOOP", "FIRE", "RIGHT", "LEFT"], probabilities, action)
        rows = (panel == script.ORANGE).all(-1).sum(1)
        top = np.flatnonzero(rows)[0]  # above the text
        return int(top), int(rows[top])

    top, whole = orange([0.0, 0.0, 1.0, 0.0], 2)
    assert whole > 100
    assert orange([0.5, 0.1, 0.25, 0.15], 2) == (top, pytest.approx(whole / 4, abs=1))
    assert orange([0.0, 1.0, 0.0, 0.0], 1)[0] < top < orange([0.0, 0.0, 0.0, 1.0], 3)[0]


def test_the_curve_of_the_value_rises_with_it(monkeypatch):
    drawn, heights = texts_of(monkeypatch), []
    for newest in (0.5, 0.75):
        panel = np.zeros((630, 420, 3), np.uint8)
        script.draw_values(panel, script.deque([0.1] * 100 + [newest] * 50, maxlen=150))
        orange = (panel == script.ORANGE).all(-1)
        heights.append([np.flatnonzero(orange[:, x]).mean() for x in (100, 380)])
    assert heights[0][0] == heights[1][0] > heights[0][1] > heights[1][1]
    assert "0.50" in drawn[0][0] and "0.75" in drawn[-1][0]


@pytest.mark.parametrize(("env_id", "rows"), [("Adventure", 250), ("Carnival", 214)])
def test_a_game_of_another_height_or_of_eighteen_actions_fits(monkeypatch, env_id, rows):
    drawn, env_id = texts_of(monkeypatch), f"{env_id}NoFrameskip-v4"
    for path, shape in (("a.gif", (2 * rows, 600, 3)), ("a.mp4", (3 * rows, 900, 3))):
        args = [f"--record={path}", "--seconds=0.1", f"--env-id={env_id}"]
        assert script.main([*args, RANDOM]) == 0
        assert read_pictures(path)[0][0].shape == shape
    height = {text.split(":")[0]: y for text, _, y in drawn}
    rows = [height[text] for text in script.action_names(env_id)]
    assert height["policy"] < min(rows) and max(rows) < height["value"]
