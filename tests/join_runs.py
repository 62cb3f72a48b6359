"""Several runs, each begun from the weights of the one before, as one curve that is small.

python tests/join_runs.py runs/FIRST runs/SECOND ... models/champion

Steps go on counting from run to run. All games are kept; of the losses, at most one update's in
8,192 steps, and the last's. What was joined before may be the first of the runs.
"""

import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

SPACING = 8192


def thin(points):
    """The scalar events that are SPACING steps apart or more, and the last."""
    kept = []
    for point in points:
        if not kept or point.step - kept[-1].step >= SPACING:
            kept.append(point)
    return kept + [point for point in points[-1:] if point is not kept[-1]]


def join(*runs_and_target):
    *runs, target = map(Path, runs_and_target)
    if target.exists():
        raise SystemExit(f"{target} is there already")
    writer, start, part = SummaryWriter(str(target)), 0, 0
    for run in runs:
        events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        for tag in sorted(events.Tags()["tensors"]):  # one a run, or one for each that was joined
            part, knobs = part + 1, events.Tensors(tag)[-1]
            text = knobs.tensor_proto.string_val[0].decode()
            writer.add_text(f"config of part {part}", text, start + knobs.step * ("part" in tag))
        points = [
            (x.wall_time, start + x.step, tag, x.value)
            for tag in events.Tags()["scalars"]
            for x in (events.Scalars(tag) if "return" in tag else thin(events.Scalars(tag)))
        ]
        for when, step, tag, value in sorted(points):
            writer.add_scalar(tag, value, step, when)
        start += events.Scalars("losses/value_loss")[-1].step
    writer.close()
    print(f"{start:,} steps in {target}/")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: python tests/join_runs.py runs/FIRST ... runs/TARGET")
    join(*sys.argv[1:])
