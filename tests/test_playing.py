"""Models, measuring and recording; the window has a file of its own."""

import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import run_script

import ai_breakout_game as script

BREAKOUT = script.Game("breakout")


@pytest.fixture
def model(trained):
    """Weights that the lesson's first command wrote."""
    return trained[0] / "models" / "ai_breakout_game3000.mdl"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------ models


def test_a_model_is_found_as_given_then_in_models_then_beside_the_script(tmp_path, monkeypatch):
    shipped = tmp_path / "elsewhere" / "models"
    monkeypatch.setattr(script, "__file__", str(shipped.parent / "script.py"))
    for folder in (shipped, Path("models"), Path()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.mdl").write_text("")
        assert script.find_model("a.mdl", script.Config()).resolve() == (folder / "a.mdl").resolve()


def test_a_saved_model_comes_back_bit_for_bit(model):
    agent = script.load_agent(model, BREAKOUT)
    saved = torch.load(model, weights_only=True)
    assert all(torch.equal(saved["weights"][name], x) for name, x in agent.state_dict().items())
    assert saved["steps"] == 3072


def test_a_bare_state_dict_with_the_usual_names_is_a_model():
    torch.manual_seed(3)
    agent = script.Agent(4)
    torch.save(agent.state_dict(), "bare.pt")
    loaded = script.load_agent(Path("bare.pt"), BREAKOUT)
    frames = torch.randint(0, 255, (2, 4, 84, 84), dtype=torch.uint8)
    assert torch.equal(agent(frames)[0], loaded(frames)[0])


class Attack:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


def write_pickle(path):
    path.write_bytes(pickle.dumps(Attack()))


def write_torch(content):
    return lambda path: torch.save(content, path)


def write_truncated(path):
    torch.save(script.Agent(4).state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "b")


def write_other_shape(path):
    weights = script.Agent(4).state_dict()
    weights["network.0.weight"] = torch.zeros(32, 3, 8, 8)
    torch.save(weights, path)


def write_impatient(path):
    torch.save({"weights": script.Agent(4).state_dict(), "patience": math.nan}, path)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_text("hello"), "is not a model"),
        (lambda path: path.write_bytes(b""), "is not a model"),
        (write_pickle, "is not a model"),
        (write_torch(Attack()), "is not a model"),
        (write_truncated, "is not a model"),
        (write_zip, "is not a model"),
        (write_torch([1, 2]), "is not a model"),
        (write_torch({"weights": 5}), "is not a model"),
        (write_torch({"weights": {"a": 5}}), "is not a model"),
        (write_impatient, "is not a model: patience is nan"),
        (write_torch({}), "network.0.weight is missing"),
        (write_torch({"x": torch.zeros(3)}), "network.0.weight is missing"),
        (write_other_shape, "network.0.weight is (32, 3, 8, 8), not (32, 4, 8, 8)"),
        (write_torch(script.Agent(6).state_dict()), "actor.weight is (6, 512), not (4, 512)"),
        (
            write_torch({"weights": {}, "game": "pong", "env_id": "ALE/Pong-v5"}),
            "plays pong, not breakout: add --env-id=ALE/Pong-v5",
        ),
    ],
)
def test_a_file_that_is_no_model_gets_one_line_and_runs_nothing(capsys, write, said):
    write(Path("bad.mdl"))
    assert script.main(["--evaluate=1", "--model-filename=bad.mdl"]) == 2
    output, errors = capsys.readouterr()
    assert said in errors and errors.count("\n") == 1 and output == ""
    assert os.listdir() == ["bad.mdl"]


@pytest.mark.parametrize("mode", ["--record=a.gif", "--run", "--total-timesteps=1"])
def test_no_mode_takes_a_file_that_is_no_model(capsys, mode):
    write_pickle(Path("bad.mdl"))
    assert script.main([mode, "--model-filename=bad.mdl"]) == 2
    output, errors = capsys.readouterr()
    assert "bad.mdl is not a model" in errors and errors.count("\n") == 1 and output == ""
    assert os.listdir() == ["bad.mdl"]


def test_a_recording_does_not_begin_where_its_name_is_a_folder(capsys):
    Path("a.gif").mkdir()
    assert script.main(["--record=a.gif", "--model-filename=random", "--seconds=0.2"]) == 2
    assert "--record=a.gif is a folder" in capsys.readouterr().err
    assert os.listdir() == ["a.gif"] and os.listdir("a.gif") == []


# --------------------------------------------------------------------------------------- measuring


def evaluation(*args):
    assert script.main(["--evaluate=6", "--max-frames=1000", *args]) == 0
    (path,) = Path().rglob("*.evaluation.json")
    return json.loads(path.read_text())


def test_the_same_seed_gives_the_same_scores_and_another_seed_others():
    first, again = (evaluation("--model-filename=random", "--max-frames=500") for _ in range(2))
    other = evaluation("--model-filename=random", "--max-frames=500", "--seed=5")
    assert first == again
    assert first["scores"] != other["scores"]


def test_scores_of_millions_are_printed_digit_by_digit(capsys):
    script.print_scores(np.array([1234567.0, 1234571.0]), None, "atlantis")
    assert "mean 1,234,569.00, median 1,234,569, from 1,234,567 to 1,234,571" in (
        capsys.readouterr().out
    )


def slow_scores(agent, episodes, seed, slots, max_frames):
    """Evaluation without any of its parts: one wrapper stack a slot, stepped and reset by hand."""
    generator = torch.Generator().manual_seed(seed)
    game = script.Game("breakout", max_frames=max_frames)
    envs = [script.make_env(game) for _ in range(slots)]
    frames = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
    share = [episodes // slots + (i < episodes % slots) for i in range(slots)]
    scores, ended = [[] for _ in envs], [False] * slots
    while any(len(done) < wanted for done, wanted in zip(scores, share)):
        with torch.no_grad():
            probs = agent(torch.from_numpy(np.stack(frames)))[0].softmax(-1)
        actions = torch.multinomial(probs, 1, generator=generator)[:, 0].tolist()
        for i, env in enumerate(envs):
            if ended[i]:
                frames[i], _ = env.reset()
                ended[i] = False
            else:
                frames[i], _, terminated, truncated, info = env.step(actions[i])
                ended[i] = terminated or truncated
                if "episode" in info and len(scores[i]) < share[i]:
                    scores[i].append(float(info["episode"]["r"]))
    return sorted(score for done in scores for score in done)


def test_evaluation_is_a_plain_loop_over_whole_games(model):
    Path("mine.mdl").write_bytes(model.read_bytes())
    result = evaluation("--model-filename=mine.mdl", "--multithreading=no", "--seed=3")
    agent = script.load_agent(model, BREAKOUT)
    assert sorted(result["scores"]) == slow_scores(agent, 6, 3, slots=6, max_frames=1000)


def test_every_slot_plays_its_share_so_that_short_games_are_not_counted_too_often(monkeypatch):
    counted = []

    class UnfairGames:
        """Slot 0 ends a game of score 0 each step, every other slot one of score 9 each tenth."""

        action_names = ("NOOP", "FIRE")
        pulse = 0

        def __init__(self, game, num_envs, multithreading):
            self.num_envs, self.steps = num_envs, 0
            self.idle = np.zeros(num_envs, int)

        def reset(self, seed):
            return np.zeros((self.num_envs, 4, 84, 84), np.uint8)

        def step(self, actions):
            self.steps += 1
            over = [script.FinishedGame(0, 0.0, 1)]
            if self.steps % 10 == 0:
                over += [script.FinishedGame(i, 9.0, 10) for i in range(1, self.num_envs)]
            counted.extend(over)
            none = np.zeros(self.num_envs)
            return script.StepResult(self.reset(0), none, none, none, none, none, none, over)

    monkeypatch.setattr(script, "make_vector_env", UnfairGames)
    report = script.evaluate(script.Config(evaluate=64, model_filename="random"))
    scores = json.loads(report.read_text())["scores"]
    assert len(scores) == 64 and scores.count(0.0) == 2, "32 slots, two games each"


def test_scores_are_true_and_told_beside_the_literatures(capsys):
    result = evaluation("--model-filename=random")
    output = capsys.readouterr().out
    assert "random play 1.7, a human 31.8" in output
    assert "reached 432" in output and "reached 864" in output
    assert f"mean {np.mean(result['scores']):.2f} +- " in output
    assert "median" in output and "█" in output
    assert len(result["scores"]) == len(result["lengths"]) == result["episodes"] == 6
    half = 1.96 * np.std(result["scores"], ddof=1) / 6**0.5
    assert result["interval_95"] == pytest.approx(half)
    assert result["max_frames"] == 1000 and max(result["lengths"]) <= 250


def test_the_report_lies_beside_the_model(model, tmp_path):
    copy = tmp_path / "mine.mdl"
    copy.write_bytes(model.read_bytes())
    assert script.main(["--evaluate=2", "--max-frames=400", f"--model-filename={copy}"]) == 0
    assert (tmp_path / "mine.evaluation.json").is_file()


def test_a_greedy_agent_takes_the_likeliest_action_and_another_draws(model):
    agent = script.load_agent(model, BREAKOUT)
    agent.actor.weight.data.zero_()
    agent.actor.bias.data = torch.tensor([0.0, 0.0, 0.1, 0.0])
    for greedy in (True, False):
        games = script.NativeGames(BREAKOUT, 2)
        moments = script.run_episodes(agent, games, script.Config(greedy=greedy), seed=1)
        actions = np.concatenate([next(moments).actions for _ in range(40)])
        assert (set(actions) == {2}) is greedy


def test_an_agent_plays_with_the_patience_it_was_trained_with_unless_another_is_given(model):
    saved = torch.load(model, weights_only=True)
    torch.save(saved | {"patience": 50.0}, "impatient.mdl")
    for given, patience in (({}, 50), ({"patience": 7.0}, 7), ({"patience": 0.0}, 0)):
        config = script.Config(model_filename="impatient.mdl", **given)
        agent, _ = script.load_player(config, BREAKOUT)
        assert agent.patience == patience
    torch.save({name: x for name, x in saved.items() if name != "patience"}, "old.mdl")
    agent, _ = script.load_player(script.Config(model_filename="old.mdl"), BREAKOUT)
    assert agent.patience == 0, "models from before there was patience had none"


def test_an_agent_that_waited_too_long_plays_more_by_chance(model):
    agent = script.load_agent(model, BREAKOUT)
    agent.actor.weight.data.zero_()
    agent.actor.bias.data = torch.tensor([6.0, 0.0, 0.0, 0.0])  # the button that does nothing
    agent.patience, games = 10.0, script.NativeGames(BREAKOUT, 2)
    moments = script.run_episodes(agent, games, script.Config(), seed=1)
    idle, longest = np.zeros(2, int), 0
    for moment in itertools.islice(moments, 100):
        odds = np.log(moment.probs[:, 0] / moment.probs[:, 1])
        np.testing.assert_allclose(odds, 6 / np.maximum(1, idle / 10), rtol=1e-4)
        idle = games.idle.copy()
        longest = max(longest, *idle)
    assert longest > 20


# --------------------------------------------------------------------------------------- recording


def colours(picture):
    """The six rows of bricks from the top, RGB."""
    scale = picture.shape[0] // 210
    return [picture[(60 + 6 * row) * scale, 80 * scale, ::-1].astype(int) for row in range(6)]


def assert_wall(picture, tolerance):
    """Red at the top, blue at the bottom, as the emulator has it."""
    wall = [(200, 72, 72), (198, 108, 58), (180, 122, 48)]
    wall += [(162, 162, 42), (72, 160, 72), (66, 72, 200)]
    np.testing.assert_allclose(colours(picture), wall, atol=tolerance)


def test_a_gif_has_the_right_frames_times_colours_and_size(model, capsys):
    assert script.main(["--record=a.gif", "--seconds=20", f"--model-filename={model}"]) == 0
    assert "a.gif: 20.0 seconds" in capsys.readouterr().out
    ok, animation = cv2.imreadanimation("a.gif")
    assert ok and len(animation.frames) == 300 and sum(animation.durations) == 20_000
    assert set(animation.durations) <= {60, 70}
    first = animation.frames[0][..., :3]
    assert first.shape == (420, 600, 3)
    assert_wall(first, tolerance=4)
    assert os.path.getsize("a.gif") < 3_000_000
    assert os.listdir() == ["a.gif"], "nothing else is left"


def pictures_of(video):
    """Its frames, (n, height, width, 3) uint8, BGR."""
    reader, pictures = cv2.VideoCapture(video), []
    while (read := reader.read())[0]:
        pictures.append(read[1])
    return np.array(pictures)


def test_an_mp4_has_sixty_frames_a_second_and_the_right_colours(model):
    args = ["--record=a.mp4", "--seconds=2", f"--model-filename={model}", "--panel=no"]
    assert script.main(args) == 0
    assert cv2.VideoCapture("a.mp4").get(cv2.CAP_PROP_FPS) == pytest.approx(60)
    pictures = pictures_of("a.mp4")
    assert len(pictures) == 120
    assert pictures[0].shape == (630, 480, 3), "without the panel"
    assert_wall(pictures[0], tolerance=12)
    moved = sum((a != b).any() for a, b in itertools.pairwise(pictures))
    assert moved > 60, "every emulator frame, not each fourth"


def test_whole_games_are_recorded_until_there_are_enough(capsys):
    args = ["--record=a.gif", "--episodes=2", "--model-filename=random", "--max-frames=200"]
    assert script.main(args) == 0
    _, animation = cv2.imreadanimation("a.gif")
    assert 100 <= len(animation.frames) <= 120, "two games of 200 frames and their starts"


def test_a_recording_may_begin_later_in_the_game(capsys):
    play = ["--model-filename=random", "--panel=no"]
    assert script.main(["--record=whole.mp4", "--seconds=3", *play]) == 0
    assert script.main(["--record=late.mp4", "--seconds=1", "--skip=1.5", *play]) == 0
    # One pixel of the nine that each of the Atari's becomes.
    names = ("whole.mp4", "late.mp4")
    whole, late = (pictures_of(name)[:, 1::3, 1::3].astype(int) for name in names)
    assert len(late) == 60
    apart = [np.abs(late - whole[i : i + 60]).mean() for i in range(121)]
    assert np.argmin(apart) == 90, "the same game, from its ninetieth frame on"


def test_a_game_that_ends_before_the_recording_begins_is_one_line(capsys):
    args = ["--record=a.gif", "--skip=60", "--model-filename=random", "--max-frames=120"]
    assert script.main(args) == 2
    assert "--skip=60: it was over after 2 seconds" in capsys.readouterr().err
    assert not os.listdir()


def test_a_gif_that_would_grow_too_large_ends_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(script.Recorder, "GIF_SECONDS", 2)
    assert script.main(["--record=a.gif", "--seconds=9", "--model-filename=random"]) == 0
    assert "A GIF ends after 2 seconds" in capsys.readouterr().out
    assert sum(cv2.imreadanimation("a.gif")[1].durations) == 2000


def test_a_recording_that_is_broken_off_is_kept(monkeypatch):
    add = script.Recorder.add

    def interrupt(self, picture):
        add(self, picture)
        if self.count == 60:
            raise KeyboardInterrupt

    monkeypatch.setattr(script.Recorder, "add", interrupt)
    assert script.main(["--record=a.gif", "--seconds=9", "--model-filename=random"]) == 130
    assert sum(cv2.imreadanimation("a.gif")[1].durations) == 1000


def test_the_panel_shows_what_the_agent_sees_and_thinks():
    agent, _ = script.load_player(script.Config(model_filename="random"), BREAKOUT)
    games = script.WrappedGames(BREAKOUT, 1, keep_rgb=True)
    view = script.View(games.action_names, 3, True)
    for moment, _ in zip(script.run_episodes(agent, games, script.Config(), 1), range(20)):
        shots = games.env.render()[0]
        view.observe(moment, 7.0, 210)
    picture = view.picture(shots[-1])
    assert picture.shape == (630, 900, 3)
    np.testing.assert_array_equal(picture[::3, :480:3, ::-1], shots[-1])
    newest = picture[135:219, 480 + 312 : 480 + 396, 0]
    np.testing.assert_array_equal(newest, moment.frames[0, 3])
    bars = (picture[:, 480:] == script.ACCENT).all(-1).sum(1)
    taken = 270 + 27 * int(moment.actions[0]) + 13
    assert bars[taken] == round(58 * 0.25 * 3), "a quarter of the bar is lit, at the action taken"
    view.panel = False
    assert view.picture(shots[-1]).shape == (630, 480, 3)


def test_a_game_with_eighteen_actions_fits_the_panel():
    config = script.Config(env_id="ALE/Seaquest-v5", model_filename="random")
    game = script.find_game(config)
    agent, _ = script.load_player(config, game)
    games = script.WrappedGames(game, 1, keep_rgb=True)
    view = script.View(games.action_names, 2, True)
    moment = next(script.run_episodes(agent, games, config, 1))
    view.observe(moment, 0.0, 210)
    assert len(games.action_names) == 18 and view.canvas.shape == (420, 280, 3)


@pytest.mark.parametrize("env", [{}, {"DISPLAY": ":4711"}])
def test_without_a_display_one_game_is_recorded_instead(env):
    clean = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, script.__file__, "--run", "--model-filename=random"]
    done = subprocess.run(
        [*command, "--max-frames=60"], env=clean | env, capture_output=True, text=True, timeout=120
    )
    (name,) = os.listdir()
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"There is no display to open a window on: recording one game to {name}" in done.stdout
    assert cv2.VideoCapture(name).get(cv2.CAP_PROP_FRAME_COUNT) >= 60


def test_evaluation_into_a_pipe_shows_progress_in_plain_lines(tmp_path):
    args = ("--evaluate=3", "--model-filename=random", "--max-frames=400")
    done = run_script(*args, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "1 game, " in done.stdout and " left; mean " in done.stdout


def test_one_game_alone_has_no_interval_and_the_report_is_json_for_everybody(capsys):
    assert script.main(["--evaluate=1", "--model-filename=random", "--max-frames=400"]) == 0
    assert "+-" not in capsys.readouterr().out
    report = json.loads(Path("models/random_breakout.evaluation.json").read_text())
    assert report["interval_95"] is None


def test_a_game_without_fire_is_recorded_through_its_lost_lives(monkeypatch):
    lives = []
    observe = script.View.observe
    monkeypatch.setattr(
        script.View, "observe",
        lambda view, moment, *rest: (
            lives.append(moment.result.lives[0]), observe(view, moment, *rest)
        ),
    )  # fmt: skip
    args = ["--record=a.gif", "--seconds=14", "--model-filename=random", "--panel=no"]
    assert script.main([*args, "--env-id=MsPacmanNoFrameskip-v4"]) == 0
    assert min(lives) < max(lives)
    assert sum(cv2.imreadanimation("a.gif")[1].durations) == pytest.approx(14_000, abs=100)
