"""The picture of the model card: how a run learned, and what its agent scored.

python tests/draw_curve.py models/champion models/champion/evaluation.json picture.png
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

mpl.use("Agg")
from matplotlib import pyplot as plt

HUMAN = 31.8  # Mnih et al. 2015


def draw(run, evaluation, picture):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2), dpi=100)

    games = events.Scalars("charts/episodic_return")
    left.plot([x.step / 1e6 for x in games], [x.value for x in games], ".", ms=1.5, color="#c8b8a8")
    means = np.convolve([x.value for x in games], np.full(100, 0.01), "valid")
    left.plot([x.step / 1e6 for x in games[99:]], means, lw=2, color="#d9601a")
    left.axhline(HUMAN, ls="--", lw=1, color="#555555")
    end = games[-1].step / 1e6
    left.text(end, HUMAN, "a human, 31.8", ha="right", va="bottom", color="#555555")
    left.set(xlabel="million steps", ylabel="true score", title="while learning")
    left.legend(["a game", "mean of 100 games"], loc="lower right", bbox_to_anchor=(1, 0.12))

    about = json.loads(Path(evaluation).read_text())
    right.hist(about["scores"], bins=25, color="#d9601a")
    title = (
        f"{about['episodes']} games afterwards: {about['mean']:.1f} ± {about['interval_95']:.1f}"
    )
    right.set(xlabel="true score", ylabel="games", title=title)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture)


if __name__ == "__main__":
    draw(*sys.argv[1:])
