"""The window, on a real screen with real keys; then with a screen replaced, or without one."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from ctypes.util import find_library
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import SCRIPT, only, start, wait_for

import ai_breakout_game as script

RANDOM = "--model-filename=random"
missing = [tool for tool in ("Xvfb", "xdotool", "import") if shutil.which(tool) is None]
pytestmark = [
    # In CI a missing tool is a failure: .ci/run installs them.
    pytest.mark.skipif(bool(missing) and "CI" not in os.environ, reason=f"without {missing}"),
    pytest.mark.timeout(120),
]


def until(true, seconds=30):
    """Wait until `true()` is; returns its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := true():
            return result
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} seconds: {true}")


@contextlib.contextmanager
def screen():
    """The name of an empty screen of its own."""
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x900x24"]
    command += ["-noreset"]  # else it starts anew whenever its last window closes
    with subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL) as server:
        os.close(write)
        try:
            yield ":" + os.read(read, 20).decode().strip()
        finally:
            os.close(read)
            server.terminate()


class Window:
    """The program playing, and what can be seen and done from outside."""

    def __init__(self, display, folder, mode):
        self.env, self.folder = {**os.environ, "DISPLAY": display}, folder
        self.films = folder / "films"
        self.films.mkdir()
        command = [sys.executable, str(SCRIPT), mode, RANDOM]
        with open(folder / "output", "w") as output, open(folder / "errors", "w") as errors:
            self.process = subprocess.Popen(
                command, cwd=self.films, env=self.env, stdout=output, stderr=errors
            )
        self.name = ""

    def wait_until_it_plays(self):
        self.name = until(lambda: self.tool("search", "--name", "^ai_breakout_game$"))
        until(lambda: self.look().shape == (630, 900, 3) and self.playing())

    def tool(self, *args):
        done = subprocess.run(["xdotool", *args], env=self.env, capture_output=True, text=True)
        return done.stdout.split()[-1] if done.returncode == 0 and done.stdout.split() else None

    def press(self, key):
        self.tool("key", "--window", self.name, key)

    def change_speed(self, key, speeds):
        for speed in speeds:
            self.press(key)
            until(lambda speed=speed: self.said(rf"speed x {speed}\n\Z"))

    def look(self):
        """The window's picture now, BGR; an empty one while it has none."""
        command = ["import", "-window", self.name, "png:-"]
        done = subprocess.run(command, env=self.env, capture_output=True)
        if done.returncode or not done.stdout:
            return np.empty((0, 0, 3))
        return cv2.imdecode(np.frombuffer(done.stdout, np.uint8), cv2.IMREAD_COLOR)

    def playing(self):
        """The picture changes, above the line of messages."""
        before = self.look()
        time.sleep(0.4)
        after = self.look()
        return before.shape == after.shape and before.size and (before != after)[:570].any()

    def said(self, pattern):
        return re.search(pattern, (self.folder / "output").read_text())

    def ended(self):
        return self.process.wait(30) == 0 and (self.folder / "errors").read_text() == ""


@contextlib.contextmanager
def opened(folder, mode="--run=1"):
    """A window, alone on its screen, closed at the end whatever happened."""
    with screen() as display:
        window = Window(display, folder, mode)
        try:
            window.wait_until_it_plays()
            yield window
        finally:
            window.process.kill()
            window.process.wait()


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """One window for all tests that leave it as they found it."""
    with opened(tmp_path_factory.mktemp("window")) as window:
        yield window


@pytest.fixture
def own_window(tmp_path):
    """A window that the test may close."""
    with opened(tmp_path) as window:
        yield window


# ------------------------------------------------------------------------------------ real windows


def test_it_shows_the_game_in_its_true_colors_beside_the_panel(window):
    picture = window.look()
    wall = [picture[y, 240, ::-1].tolist() for y in range(180, 280, 18)]
    assert wall == [[200, 72, 72], [198, 108, 58], [180, 122, 48],
                    [162, 162, 42], [72, 160, 72], [66, 72, 200]]  # fmt: skip
    assert (picture[:, 480:] == script.ORANGE).all(-1).any()


def test_space_pauses_and_goes_on(window):
    window.press("space")
    until(lambda: not window.playing())
    window.press("space")
    until(window.playing)


def test_n_takes_the_panel_away_and_brings_it_back(window):
    for width in (480, 900):
        window.press("n")
        until(lambda width=width: window.look().shape[1] == width)


def test_keys_without_a_meaning_do_nothing(window):
    before = (window.folder / "output").read_text()
    for key in ("Left", "Up", "Menu", "F1", "x"):
        window.press(key)
        assert window.playing()
    assert (window.folder / "output").read_text() == before


def test_h_shows_the_keys_in_the_picture_and_prints_them(window):
    white = lambda: (window.look()[600:626, 10:600] > 200).all(-1).sum()  # noqa: E731
    until(lambda: white() == 0)
    window.press("h")
    until(lambda: white() > 300)
    assert window.said(r"q quit.*p pause.*n panel.*g GIF.*v MP4.*r new game")
    until(lambda: white() == 0)


def test_plus_and_minus_change_the_speed(window):
    window.change_speed("plus", (2, 4, 8, 8))
    window.change_speed("minus", (4, 2, 1, 0.5))
    window.change_speed("plus", (1,))


def test_g_starts_a_gif_which_any_of_the_two_keys_ends(window):
    for end in ("g", "v"):
        window.press("g")
        name = until(lambda: window.said(r"recording (\S+\.gif)\n\Z"))[1]
        window.press("n")  # a recording has one size
        until(window.playing)
        window.press(end)
        until(lambda name=name: window.said(rf"{name}: [\d.]+ MB\n\Z"))
        _, animation = cv2.imreadanimation(str(window.films / name))
        assert 100 < sum(animation.durations) < 20_000
        assert {frame.shape[:2] for frame in animation.frames} == {(420, 600)}
        (window.films / name).unlink()
    assert window.look().shape[1] == 900


@pytest.mark.skipif(find_library("X11-xcb") is None, reason="the system has no libX11-xcb")
def test_the_systems_libx11_xcb_is_loaded_beside_the_one_of_opencv(window):
    """With OpenCV's alone, one window in ten stayed black beside busy processes."""
    lines = (Path("/proc") / str(window.process.pid) / "maps").read_text().splitlines()
    assert any("/libX11-xcb.so.1" in line for line in lines)


def test_closing_the_window_quits(own_window):
    # What a window manager's close button does; there is none on this screen. XSync waits until the
    # message has arrived.
    code = (
        "import ctypes, sys; x = ctypes.CDLL('libX11.so.6');"
        "x.XOpenDisplay.restype = ctypes.c_void_p; d = ctypes.c_void_p(x.XOpenDisplay(None));"
        "n = lambda s: x.XInternAtom(d, s, 0); w = int(sys.argv[1]);"
        "e = (ctypes.c_long * 24)(); i = ctypes.cast(e, ctypes.POINTER(ctypes.c_int)); i[0] = 33;"
        "e[4] = w; e[5] = n(b'WM_PROTOCOLS'); i[12] = 32; e[7] = n(b'WM_DELETE_WINDOW');"
        "x.XSendEvent(d, ctypes.c_ulong(w), 0, ctypes.c_long(0), e);"
        "x.XSync(d, 0)"
    )
    subprocess.run([sys.executable, "-c", code, own_window.name], env=own_window.env, check=True)
    assert own_window.ended()


@pytest.mark.parametrize("end", ["SIGTERM", pytest.param("Escape", marks=pytest.mark.slow)])
def test_the_end_finishes_a_recording(own_window, end):
    own_window.press("v")
    name = until(lambda: own_window.said(r"recording (\S+\.mp4)"))[1]
    until(own_window.playing)
    if end == "Escape":
        own_window.press(end)
    else:
        own_window.process.send_signal(signal.SIGTERM)
    assert own_window.ended()
    video = cv2.VideoCapture(str(own_window.films / name))
    # A signal may lose the picture that is just written: 58 a second, if there are thirty.
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(60, rel=0.15)
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) > 5
    assert os.listdir(own_window.films) == [name]


def test_a_recording_that_cannot_be_written_does_not_end_the_game(own_window):
    own_window.films.rmdir()
    for count, key in enumerate("vg", 1):
        own_window.press(key)
        until(lambda count=count: own_window.said(rf"(?s)(cannot \w+: No such file.*){{{count}}}"))
    assert own_window.playing()
    own_window.press("q")
    assert own_window.ended()


def test_a_player_who_holds_an_arrow_key_has_the_paddle_at_the_wall(tmp_path):
    def paddle():
        """The columns of the emulator's screen in which it is."""
        row = window.look()[573, 24:456:3, ::-1]  # between the walls
        return [8 + x for x in np.flatnonzero((row == [200, 72, 72]).all(-1)).tolist()]

    with opened(tmp_path, "--play") as window:
        window.tool("windowfocus", window.name)
        for key, wall in (("Left", [*range(8, 24)]), ("d", [*range(144, 152)])):
            assert paddle() != wall
            window.tool("keydown", key)  # which the X server repeats
            until(lambda wall=wall: paddle() == wall)
            window.tool("keyup", key)
        window.press("q")
        assert window.ended()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_memory_stays_flat(own_window):
    psutil, window = pytest.importorskip("psutil"), own_window
    window.change_speed("plus", (2, 4, 8))
    sizes = []
    for _ in range(30):
        time.sleep(4)
        sizes.append(psutil.Process(window.process.pid).memory_info().rss / 1e6)
    window.press("q")
    assert window.ended()
    assert max(sizes[-5:]) < max(sizes[5:10]) + 10, sizes


# ------------------------------------------------------------------------------- a replaced screen


@pytest.fixture
def play(monkeypatch, tmp_path):
    """A function that plays with keys that are pressed at given pictures, counted from 1.

    It returns the pictures that were shown, the numbers of their frames, and how long they were
    shown by the clock that the script reads. They take no real time.
    """
    monkeypatch.chdir(tmp_path)
    pictures, numbers, frames, now, watch = [], [], [], [1000.0], script.watch

    def show(title, picture):
        pictures.append(picture.copy())
        numbers.append(len(frames))

    def wait(milliseconds):
        now[0] += milliseconds / 1000
        key = keys.get(len(pictures), 0)
        return key if isinstance(key, int) else ord(key)

    def count_frames(*args):
        for frame in watch(*args):
            frames.append(1)
            yield frame

    def run(at, *args, mode="--run"):
        keys.update(at)
        assert script.main([mode, RANDOM, *args]) == 0
        return pictures, numbers, now[0] - 1000

    keys = {}
    clock = types.SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime)
    for owner, name, new in (
        (cv2, "imshow", show), (cv2, "waitKeyEx", wait), (cv2, "namedWindow", lambda *_: None),
        (cv2, "getWindowProperty", lambda *_: 1.0), (script, "display_error", lambda: ""),
        (script, "watch", count_frames), (script, "time", clock),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, new)
    return run


@pytest.mark.parametrize(("keys", "speed"), [("", 1), ("+", 2), ("++", 4), ("--", 0.25)])
def test_sixty_frames_take_a_second_divided_by_the_speed(play, keys, speed):
    pictures, numbers, seconds = play({**dict(enumerate(keys, 1)), 70: "q"})
    assert seconds == pytest.approx(numbers[-1] / 60 / speed, rel=0.15)
    assert len(pictures) == 70, "and never more pictures than a screen can show"


def test_a_full_stop_shows_the_four_frames_of_a_step(play):
    _, numbers, _ = play({10: " ", 12: ".", 20: " ", 25: "q"})
    assert numbers == [*range(1, 11), 10, 10, *range(11, 15), *[14] * 4, *range(15, 20)]


def test_r_starts_another_game(play):
    pictures, _, _ = play({30: "r", 60: "q"})
    config, agent = script.load_player({"model_filename": "random"})
    for seed, part in ((1, pictures[:30]), (2, pictures[30:])):
        for picture, (game, _) in zip(part, script.watch(agent, config, seed, [])):
            assert (picture[:600, :480] == game[:600]).all(), "from its beginning"
    assert (pictures[0][:600] != pictures[30][:600]).any(), "not the same one"


def test_only_games_that_are_over_are_counted(play, monkeypatch, capsys):
    drawn, over, draw, step = [], [], script.draw_text, script.Games.step

    def note_text(image, text, *args, **named):
        drawn.append(text)
        draw(image, text, *args, **named)

    def note_games(*args):
        result = step(*args)
        over.extend(result.finished)
        return result

    monkeypatch.setattr(script, "draw_text", note_text)
    monkeypatch.setattr(script.Games, "step", note_games)
    play({100: "r", 240: "q"}, "--max-frames=40")
    games = [int(drawn[i + 1]) for i, text in enumerate(drawn) if text == "game"]
    assert len(over) - 1 <= games[-1] - 1 <= len(over) and games[-1] >= 3  # or still shown
    assert f"games finished: {games[-1] - 1}, mean score" in capsys.readouterr().out


def test_a_recording_that_fails_later_does_not_end_the_game(play, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.Recorder, "add", fail)
    pictures, _, _ = play({5: "v", 20: "q"})
    assert len(pictures) == 20
    assert capsys.readouterr().out.count("No space left on device") == 1


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_a_signal_while_a_picture_is_recorded_finishes_the_recording(play, monkeypatch, kind):
    add = script.Recorder.add

    def interrupt(recorder, picture):
        add(recorder, picture)
        if recorder.count == 40:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(script.Recorder, "add", interrupt)
    play({1: kind[0] if kind == "gif" else "v"})
    name = str(only(Path().iterdir()))
    if kind == "gif":
        assert len(cv2.imreadanimation(name)[1].frames) > 1
    else:
        assert cv2.VideoCapture(name).get(cv2.CAP_PROP_FRAME_COUNT) == 40


def test_each_key_press_of_the_player_is_one_step_of_its_action(play, monkeypatch):
    actions, step = [], script.Games.step

    def note(games, taken):
        actions.append(taken.tolist())
        return step(games, taken)

    monkeypatch.setattr(script.Games, "step", note)
    left, right, up = 65361, 65363, 65362
    keys = {5: "a", 13: right, 21: " ", 29: up, 37: "d", 41: left, 60: "q"}
    play(keys, mode="--play")
    noop, fire, to_right, to_left = ([i] for i in range(4))
    assert actions[:3] == [noop, noop, to_left], "the step after the picture, the first of step 2"
    assert [x for x in actions if x != noop] == [to_left, to_right, fire, to_right, to_left]


def test_space_is_fire_for_a_player_and_p_pauses(play):
    _, numbers, _ = play({5: " ", 20: "p", 30: "p", 40: "q"}, mode="--play")
    assert numbers == [*range(1, 21), *[20] * 10, *range(21, 31)]


def test_the_panel_shows_what_the_agent_would_do_in_the_players_place(play, monkeypatch):
    decided, shown, act, draw = [], [], script.Agent.act, script.draw_policy

    def note_decision(*args):
        decided.append(act(*args))
        return decided[-1]

    def note_panel(panel, names, probs, action):
        shown.append((probs, action))
        draw(panel, names, probs, action)

    monkeypatch.setattr(script.Agent, "act", note_decision)
    monkeypatch.setattr(script, "draw_policy", note_panel)
    play({80: "q"}, mode="--play")
    assert shown == [(x["probs"][0].tolist(), x["actions"].item()) for x in decided[: len(shown)]]
    assert {action for _, action in shown} == {0, 1, 2, 3}, "while the player does nothing"


def save_agent(path, env_id="BreakoutNoFrameskip-v4", age=0, **about):
    """An agent's file of so many seconds ago; returns its path."""
    agent, path = script.Agent(len(script.action_names(env_id))), Path(path)
    script.save_file({"weights": agent.state_dict(), "env_id": env_id, **about}, path)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_players_score_is_compared_with_the_agent_a_human_and_random_play(play, capsys):
    model = save_agent("mine.mdl", steps=3000, mean_return=12.345)
    play({30: "q"}, f"--model-filename={model}", "--max-frames=24", mode="--play")
    line = "mine.mdl in training: 12.35 (random play 1.7, a human 31.8)"
    output = capsys.readouterr().out
    assert re.search(rf"games finished: \d, mean score 0.00\n{re.escape(line)}\n\Z", output)


def test_the_players_score_is_the_true_one(play, monkeypatch, capsys):
    rewards, step = [], script.gym.vector.SyncVectorEnv.step

    def note(*args):
        result = step(*args)
        rewards.append(result[1][0])
        return result

    monkeypatch.setattr(script.gym.vector.SyncVectorEnv, "step", note)
    args = ("--env-id=ALE/Skiing-v5", "--max-frames=8")  # each step costs points
    play({12: "q"}, *args, mode="--play")
    score = sum(rewards[:2])  # of the first game; a reset and half of the second follow
    assert score < -2 and len(rewards) == 4
    assert f"games finished: 1, mean score {score:.2f}\n" in capsys.readouterr().out


def test_latest_plays_the_newest_run_and_takes_newer_weights_when_a_game_is_over(
    play, monkeypatch, capsys
):
    save_agent("runs/z/checkpoint.pt", age=60)
    newest = save_agent("runs/b/checkpoint.pt", "ALE/Pong-v5", steps=8)  # which has six actions
    save_agent("runs/c/best.mdl", age=-60)
    drawn, draw, take, biases = [], script.draw_text, script.take_newer_weights, []

    def note(image, text, *args, **named):
        drawn.append(text)
        draw(image, text, *args, **named)

    def save_newer(agent):
        content = script.read_file(newest)
        content["steps"] += 1000
        content["weights"]["actor.bias"] += 1
        script.save_file(content, newest)
        take(agent)
        biases.append(agent.actor.bias.mean().item())

    monkeypatch.setattr(script, "draw_text", note)
    monkeypatch.setattr(script, "take_newer_weights", save_newer)
    play({60: "q"}, "--model-filename=latest", "--max-frames=16")
    about = list(dict.fromkeys(text for text in drawn if text.startswith("checkpoint.pt")))
    numbers = [
        int(re.search(r": run of ([\d,]+) steps", text)[1].replace(",", "")) for text in about
    ]
    assert numbers == [8 + 1000 * i for i in range(len(numbers))] and len(numbers) > 1
    assert biases == pytest.approx([1 + i for i in range(len(biases))], abs=1e-4)


def test_weights_that_cannot_be_read_do_not_end_the_game(play, monkeypatch, capsys):
    checkpoint = save_agent("runs/a/checkpoint.pt")
    take = script.take_newer_weights

    def damage(agent):
        checkpoint.write_bytes(b"\0" * 99)
        take(agent)
        checkpoint.unlink()

    monkeypatch.setattr(script, "take_newer_weights", damage)
    pictures, _, _ = play({60: "q"}, "--model-filename=latest", "--max-frames=16")
    assert len(pictures) == 60
    assert f"cannot load {checkpoint}" in capsys.readouterr().out


def test_the_status_line_stays_within_the_picture_of_the_game(play, monkeypatch):
    monkeypatch.setattr(script.Window, "KEYS", "a line that is too long, " * 9)
    pictures, _, _ = play({2: "h", 40: "q"})
    white = (pictures[5][608:] > 200).all(-1)
    assert white[:, :480].any() and not white[:, 480:].any()


@pytest.fixture
def texts(monkeypatch):
    """The pixels of each text that is drawn, alone on an image that is larger than the panel."""
    masks, draw = [], script.draw_text

    def note(image, *args):
        alone = np.zeros((700, 600, 3), np.uint8)
        draw(alone, *args)
        masks.append(alone.any(-1))

    monkeypatch.setattr(script, "draw_text", note)
    return masks


@pytest.mark.parametrize("game", ["Freeway", "Breakout", "Pong", "Asterix", "Seaquest"])
def test_the_texts_of_the_panel_are_within_it_and_apart(texts, game):
    """In games of 3, 4, 6, 9 and 18 actions."""
    config = script.Config(env_id=f"{game}NoFrameskip-v4")
    agent = script.Agent(len(script.action_names(config.env_id)))
    agent.path, agent.steps = Path("ai_breakout_game10000000.mdl"), 10_000_000
    _, panel = next(script.watch(agent, config, 1, [864.0]))
    assert panel.shape == (630, 420, 3)
    rows, columns = np.nonzero(np.any(texts, axis=0))
    assert rows.max() < 630 and columns.min() >= 20 and columns.max() < 420
    assert np.sum(texts, axis=0).max() == 1


@pytest.mark.parametrize("count", [3, 4, 6, 9, 18])
def test_no_text_or_bar_of_the_policy_covers_another(texts, count):
    names = script.action_names("ALE/Seaquest-v5")
    names = sorted(names, key=len, reverse=True)[:count]
    panel = np.zeros((630, 420, 3), np.uint8)
    script.draw_policy(panel, names, [1.0] * count, 0)
    bars = np.pad(panel.any(-1), ((0, 70), (0, 180)))
    assert len(texts) == 1 + 2 * count and all(text.any() for text in texts)
    assert (np.sum(texts, axis=0) + bars).max() == 1
    rows, columns = np.nonzero(np.any(texts, axis=0) | bars)
    assert columns.max() < 400 and columns.min() >= 20 and rows.max() < 450, "above the value"


# --------------------------------------------------------------------------------------- no screen


@pytest.fixture
def no_display(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)


def run_and_record(monkeypatch, capsys):
    """What --run says, once it has to record; it must record a minute."""
    configs = []
    monkeypatch.setattr(script, "record", lambda config, *_: configs.append(config))
    assert script.main(["--run", RANDOM]) == 0
    output, errors = capsys.readouterr()
    config = only(configs)
    assert config.record.endswith(".mp4") and config.record in output and config.seconds == 60
    assert errors == "" and output.count("\n") == 1
    return output


@pytest.mark.parametrize("display", ["", ":4711"])
def test_without_a_display_it_says_why_and_records(no_display, monkeypatch, capsys, display):
    if display:
        monkeypatch.setenv("DISPLAY", display)
    output = run_and_record(monkeypatch, capsys)
    assert "annot open a window" in output and f"could not connect to display {display}" in output


def test_without_a_display_nobody_can_play(no_display, capsys):
    assert script.main(["--play", RANDOM]) == 1
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and "cannot open a window" in errors
    assert os.listdir() == []


@pytest.mark.slow
def test_a_display_that_does_not_answer_is_given_ten_seconds(no_display, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("DISPLAY", f"127.0.0.1:{server.getsockname()[1] - 6000}")
        before = time.monotonic()
        assert "the display does not answer" in run_and_record(monkeypatch, capsys)
        assert 9 < time.monotonic() - before < 30


@pytest.mark.slow
def test_the_recording_without_a_display_can_be_interrupted(no_display, tmp_path):
    tell = """add = script.Recorder.add
script.Recorder.add = lambda *args: (add(*args), print("picture", args[0].count, flush=True))"""
    process = start("--run", RANDOM, cwd=tmp_path, before=tell)
    wait_for("picture 60", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in output
    video = cv2.VideoCapture(str(only(tmp_path.iterdir())))
    assert 60 <= video.get(cv2.CAP_PROP_FRAME_COUNT) < 3000
