"""Several runs, each begun from the weights of the one before, as one curve that is small.

python tests/join_runs.py runs/FIRST runs/SECOND ... runs/champion

Steps go on counting from run to run. All games are kept; of the losses, every eighth update's.
"""

import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

KEPT = 8


def join(*runs_and_target):
    *runs, target = map(Path, runs_and_target)
    if target.exists():
        raise SystemExit(f"{target} is there already")
    writer, start = SummaryWriter(str(target)), 0
    for number, run in enumerate(runs, 1):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        knobs = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
        writer.add_text(f"config of part {number}", knobs, start)
        points = [
            (x.wall_time, tag, x.value, start + x.step)
            for tag in events.Tags()["scalars"]
            for x in events.Scalars(tag)[:: 1 if "return" in tag else KEPT]
        ]
        for when, tag, value, step in sorted(points):
            writer.add_scalar(tag, value, step, when)
        start += events.Scalars("losses/value_loss")[-1].step
    writer.close()
    print(f"{start:,} steps in {target}/")


if __name__ == "__main__":
    join(*sys.argv[1:])
