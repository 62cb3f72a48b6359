"""Draw models/three_agents.gif: three agents play the same start, side by side.

python tests/three_agents.py random FIRST.mdl SECOND.mdl
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ai_breakout_game as script  # noqa: E402

LABELS = ("random play", "after 200,000 steps", "the champion")
SEED, SECONDS = 4, 20


def labeled(picture, label):
    """A picture of the game with a line above."""
    canvas = np.full((684, 492, 3), script.BACKGROUND, np.uint8)
    canvas[48:678, 6:486] = picture
    script.draw_text(canvas, label, 8, 32, 24, script.WHITE)
    return canvas


players = [script.load_player({"model_filename": name}) for name in sys.argv[1:]]
games = [script.watch(agent, config, SEED, []) for config, agent in players]
recorder = script.Recorder(ROOT / "models" / "three_agents.gif")
for _, shown in zip(range(SECONDS * script.EMULATOR_FPS), zip(*games)):
    recorder.add(np.hstack([labeled(game, label) for (game, _), label in zip(shown, LABELS)]))
print(recorder.close())
