"""Draw models/breakout.gif (the champion digs a tunnel) and models/three_agents.gif (one start).

python tests/draw_gifs.py models/ai_breakout_game200000.mdl
"""

import itertools
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ai_breakout_game as script  # noqa: E402

LABELS = ("random play", "after 200,000 steps", "the champion")
SECONDS = 20


def draw(name, pictures, start=0):
    """Record `SECONDS` of pictures, from second `start`."""
    recorder = script.Recorder(ROOT / "models" / name)
    first = start * script.EMULATOR_FPS
    for picture in itertools.islice(pictures, first, first + SECONDS * script.EMULATOR_FPS):
        recorder.add(picture)
    print(recorder.close())


def labeled(picture, label):
    """A picture of the game with a line above."""
    canvas = np.full((684, 492, 3), script.BACKGROUND, np.uint8)
    canvas[48:678, 6:486] = picture
    script.draw_text(canvas, label, 8, 32, 24, script.WHITE)
    return canvas


config, champion = script.load_player({})
draw("breakout.gif", map(np.hstack, script.watch(champion, config, 6, [])), start=62)

players = [script.load_player({"model_filename": name}) for name in ("random", sys.argv[1])]
games = [script.watch(agent, config, 4, []) for config, agent in (*players, (config, champion))]
shown = ([game for game, _ in pictures] for pictures in zip(*games))
draw("three_agents.gif", (np.hstack(list(map(labeled, row, LABELS))) for row in shown))
