"""The window, driven as a user drives it: a real display, real keys, pictures of the screen."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import SCRIPT

TOOLS = ("Xvfb", "xdotool", "import")
missing = [tool for tool in TOOLS if shutil.which(tool) is None]
pytestmark = [
    # In CI a missing tool is a failure: .ci/run installs them.
    pytest.mark.skipif(bool(missing) and "CI" not in os.environ, reason=f"without {missing}"),
    pytest.mark.timeout(120),
]


def until(true, seconds=30):
    """Wait until `true()` is; fail after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := true():
            return result
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} seconds: {true}")


@contextlib.contextmanager
def screen():
    """A screen of its own, with nothing on it; its name."""
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

    def __init__(self, display, folder):
        self.env, self.folder = {**os.environ, "DISPLAY": display}, folder
        self.films = folder / "films"
        self.films.mkdir()
        command = [sys.executable, str(SCRIPT), "--run=1", "--model-filename=random"]
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

    def look(self):
        """The window's picture now, BGR; an empty one while it has none."""
        done = subprocess.run(
            ["import", "-window", self.name, "png:-"], env=self.env, capture_output=True
        )
        if done.returncode or not done.stdout:
            return np.empty((0, 0, 3))
        return cv2.imdecode(np.frombuffer(done.stdout, np.uint8), cv2.IMREAD_COLOR)

    def playing(self):
        """The picture changes."""
        before = self.look()
        time.sleep(0.3)
        after = self.look()
        return before.shape == after.shape and before.size and (before != after).any()

    def still(self):
        """The picture stands still, as it does while paused."""
        before = self.look()
        time.sleep(0.5)
        return (before[:570] == self.look()[:570]).all()  # the line below is for messages

    def said(self, pattern):
        return re.search(pattern, (self.folder / "output").read_text())

    def ended(self):
        return self.process.wait(30) == 0 and (self.folder / "errors").read_text() == ""


@contextlib.contextmanager
def opened(folder):
    """A window, alone on its screen, closed at the end whatever happened."""
    with screen() as display:
        window = Window(display, folder)
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


def test_it_opens_and_shows_the_game_in_its_true_colours_beside_the_panel(window):
    picture = window.look()
    wall = picture[180, 240, ::-1].astype(int), picture[270, 240, ::-1].astype(int)
    np.testing.assert_array_equal(wall, [(200, 72, 72), (66, 72, 200)])
    assert (picture[:, 480:] == (60, 150, 255)).all(-1).any(), "the panel's accent"
    assert (picture[10:40, 490:] > 100).any(), "text"


@pytest.mark.parametrize("key", ["q", "Escape"])
def test_q_and_escape_quit(own_window, key):
    own_window.press(key)
    assert own_window.ended()


def test_closing_the_window_with_the_mouse_ends_the_program(own_window):
    # What a window manager's close button does; there is none on this screen. XSync waits until the
    # screen has taken the message: from one who has left, it may be lost.
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


def test_space_pauses_and_a_full_stop_goes_one_step_on(window):
    window.press("space")
    until(window.still)
    paused = window.look()
    window.press("period")
    until(lambda: (window.look()[:570] != paused[:570]).any())
    until(window.still)
    window.press("space")
    until(window.playing)


def test_n_takes_the_panel_away_and_brings_it_back(window):
    window.press("n")
    until(lambda: window.look().shape[1] == 480)
    window.press("n")
    until(lambda: window.look().shape[1] == 900)


def test_keys_that_mean_nothing_do_nothing(window):
    before = (window.folder / "output").read_text()
    for key in ("Left", "Up", "Menu", "F1"):
        window.press(key)
    time.sleep(0.5)
    assert window.playing() and window.process.poll() is None
    assert (window.folder / "output").read_text() == before


def test_h_lists_the_keys(window):
    orange = lambda: (window.look()[60:330, 40:160] == (60, 150, 255)).all(-1).sum()  # noqa: E731
    assert orange() == 0
    window.press("h")
    until(lambda: orange() > 200)
    window.press("h")
    until(lambda: orange() == 0)


def test_plus_and_minus_change_the_speed(window):
    for key, speed in (("plus", 2), ("plus", 4), ("minus", 2), ("minus", 1)):
        window.press(key)
        until(lambda speed=speed: window.said(rf"speed x {speed}\n\Z"))


def test_g_starts_and_stops_a_gif(window):
    window.press("g")
    until(lambda: window.said(r"recording (\S+\.gif)"))
    window.press("n"), window.press("v")
    until(lambda: window.said("end it first"))
    time.sleep(2)
    assert window.look().shape[1] == 900, "the panel stays while it is filmed"
    window.press("g")
    line = until(lambda: window.said(r"(\S+\.gif): ([\d.]+) seconds"))
    ok, animation = cv2.imreadanimation(str(window.films / line[1]))
    assert ok and sum(animation.durations) / 1000 == pytest.approx(float(line[2]), abs=0.15)
    assert animation.frames[0].shape[:2] == (630, 900)


def test_v_starts_an_mp4_which_quitting_finishes(own_window):
    own_window.press("v")
    name = until(lambda: own_window.said(r"recording (\S+\.mp4)"))[1]
    time.sleep(2)
    own_window.press("q")
    assert own_window.ended()
    video = cv2.VideoCapture(str(own_window.films / name))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(60)
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) > 30


def test_a_film_that_cannot_be_written_does_not_end_the_game(own_window):
    own_window.films.rmdir()
    for key in "vg":
        own_window.press(key)
        until(lambda key=key: own_window.said("recording .*" + {"v": "mp4", "g": "gif"}[key]))
        time.sleep(1)
    own_window.press("g")
    until(lambda: own_window.said(r"could not write \S+\.mp4: .*No such file"))
    until(lambda: own_window.said(r"could not write \S+\.gif: .*No such file"))
    assert own_window.playing()
    own_window.press("q")
    assert own_window.ended()


@pytest.mark.skipif(find_library("X11-xcb") is None, reason="the system has no libX11-xcb")
def test_the_systems_libx11_xcb_comes_before_the_one_that_opencv_brings(window):
    """With OpenCV's alone one window in ten stayed black beside busy processes."""
    lines = (Path("/proc") / str(window.process.pid) / "maps").read_text().splitlines()
    assert [line for line in lines if "/libX11-xcb.so.1" in line]


def test_r_starts_a_new_game(window):
    """The wall, which had holes, is whole again."""
    window.press("plus"), window.press("plus"), window.press("plus")
    holes = lambda: (window.look()[171:279, 30:450].max(-1) < 60).sum()  # noqa: E731
    until(lambda: holes() > 100, seconds=60)
    window.press("r")
    until(lambda: holes() == 0)
    window.press("minus"), window.press("minus"), window.press("minus")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_memory_stays_flat(own_window):
    psutil, window = pytest.importorskip("psutil"), own_window
    for _ in range(3):
        window.press("plus")
    sizes = []
    for _ in range(30):
        time.sleep(10)
        sizes.append(psutil.Process(window.process.pid).memory_info().rss / 1e6)
    window.press("q")
    assert window.ended()
    assert max(sizes[-5:]) < max(sizes[5:10]) + 10, sizes


def test_the_true_speed_is_sixty_frames_a_second():
    """The clock of `show`, without a window: a second of frames is due a second later."""
    import ai_breakout_game as script

    player = script.Player.__new__(script.Player)
    view = script.View(["NOOP"], 1, False)
    waits = []
    player.view, player.speed, player.paused = view, 1.0, False
    player.quit = player.restart = False
    player.recorder, player.count, player.frames_left = None, 0, 0
    player.draw = lambda picture: None
    player.wait = lambda seconds: (waits.append(seconds), time.sleep(max(0, seconds)))
    player.due = start = time.monotonic()
    for _ in range(60):
        player.show(np.zeros((210, 160, 3), np.uint8))
    assert len(waits) == 60
    assert time.monotonic() - start == pytest.approx(1.0, abs=0.25)
