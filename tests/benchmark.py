"""How fast the script is here, beside stable-baselines3's PPO at the same settings.

    python tests/benchmark.py                  every part, three alternated rounds: ten minutes
    python tests/benchmark.py --busy           the same beside a second busy process
    python tests/benchmark.py --parts ours,emulator --rounds 1
    python tests/benchmark.py --device cuda --parts emulator,acting,learner,ours --updates 200
    python tests/benchmark.py --num-envs 64 --num-steps 64     more games
    python tests/benchmark.py --epochs 4       as most programs have it

Each part runs in a process of its own, with the settings its user would have, in turns, so that a
machine that is slow for a while is slow for all of them. Printed are medians over the rounds, and
ratios within a round, which a noisy machine changes least. 8 games, 128 steps, 2 epochs and 4
minibatches, unless told otherwise.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT_FOLDER = Path(__file__).resolve().parent.parent
MINIBATCHES = 4
WARM_UP = 2  # updates that are not measured: the first pages of memory


def our_parts(args):
    """The script's own pieces, as `train` puts them together."""
    sys.path.insert(0, str(SCRIPT_FOLDER))
    import ai_breakout_game as script  # before torch: it sets how OpenMP waits

    config = script.Config(
        num_envs=args.num_envs, num_steps=args.num_steps, update_epochs=args.epochs,
        num_minibatches=MINIBATCHES, device=args.device, precision=args.precision,
    )  # fmt: skip
    state, games = script.make_state(config), script.Games(config, args.num_envs)
    games.reset(1)
    rollout = script.make_rollout(args.num_steps, args.num_envs, state.agent.device)
    return script, config, games, state, rollout


def clock(script, args):
    """Seconds, once the device has done all that it was given."""
    if args.device == "cuda":
        script.torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def gpu_busy(args):
    """Prints the mean of what nvidia-smi says five times a second: percent of the time in which a
    kernel ran.
    """
    if args.device != "cuda":
        yield
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    smi = subprocess.Popen([*query, "--loop-ms=200"], stdout=subprocess.PIPE, text=True)
    yield
    smi.terminate()
    shares = [int(line) for line in smi.communicate()[0].split() if line.isdecimal()]
    print(f"GPU busy {statistics.mean(shares):.0f} % of the time", file=sys.stderr)


def ours(args):
    """Training steps a second of this script, TensorBoard included."""
    script, config, games, state, rollout = our_parts(args)
    with tempfile.TemporaryDirectory() as folder:
        logger = script.Logger(Path(folder), config, state)
        logger.open(0)

        def one_update():
            annealed = script.anneal(config, state.update)
            finished = script.collect_rollout(state, games, rollout)
            logger.log(state, finished, script.learn(state, rollout, annealed))

        for _ in range(WARM_UP):
            one_update()
        with gpu_busy(args):
            start = clock(script, args)
            for _ in range(args.updates):
                one_update()
            seconds = clock(script, args) - start
    return args.updates * args.num_envs * args.num_steps / seconds


def repeated(script, args, function):
    """Steps a second of `function`, which takes a rollout's steps."""
    for update in range(WARM_UP + args.updates):
        if update == WARM_UP:
            start = clock(script, args)
        function()
    return args.updates * args.num_envs * args.num_steps / (clock(script, args) - start)


def collect(args):
    """Steps a second of playing alone: emulator and network, nothing learned."""
    script, _, games, state, rollout = our_parts(args)
    return repeated(script, args, lambda: script.collect_rollout(state, games, rollout))


class StandingStill:
    """Games that never move: what playing costs without them."""

    def __init__(self, games, result):
        self.frames, self.idle, self.result = games.frames, games.idle, result

    def step(self, actions):
        return self.result


def acting(args):
    """Steps a second of the network alone: frames to the device, actions back."""
    script, _, games, state, rollout = our_parts(args)
    still = StandingStill(games, games.step(script.np.zeros(args.num_envs, int)))
    return repeated(script, args, lambda: script.collect_rollout(state, still, rollout))


def emulator(args):
    """Steps a second of the games alone, with random actions."""
    script, _, games, _, _ = our_parts(args)
    actions = script.np.random.default_rng(0).integers(0, 4, (args.num_steps, args.num_envs))
    return repeated(script, args, lambda: [games.step(action) for action in actions])


def learner(args):
    """Samples a second, forward and backward, of the update alone."""
    script, config, games, state, rollout = our_parts(args)
    script.collect_rollout(state, games, rollout)
    rate = repeated(script, args, lambda: script.learn(state, rollout, config))
    return rate * args.epochs


def matmul(args):
    """GFLOP/s of a large matrix product: what the learner could at best come to."""
    script, _, _, state, _ = our_parts(args)
    torch = script.torch
    device, dtype = state.generator.device, state.agent.precision
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in "ab")
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    return best


def sb3(args):
    """Training steps a second of stable-baselines3's PPO with the same settings."""
    import ale_py
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    env = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=args.num_envs, seed=1), 4)
    batch = args.num_envs * args.num_steps
    model = PPO(
        "CnnPolicy", env, n_steps=args.num_steps, batch_size=batch // MINIBATCHES,
        n_epochs=args.epochs, learning_rate=1e-3, clip_range=0.1, ent_coef=0.003,
        vf_coef=0.5, device=args.device,
    )  # fmt: skip
    model.learn(batch)
    start = time.perf_counter()
    model.learn(args.updates * batch, reset_num_timesteps=False)
    return args.updates * batch / (time.perf_counter() - start)


PARTS = {f.__name__: f for f in (emulator, acting, collect, learner, matmul, ours, sb3)}
UNITS = {"learner": "samples/s", "matmul": "GFLOP/s"}


def burn():
    """A second busy process."""
    while True:
        sum(range(10_000))


def measure(part):
    """One part in a process of its own."""
    command = [sys.executable, __file__, "--worker", part, *sys.argv[1:]]
    output = subprocess.run(command, capture_output=True, text=True)
    if output.returncode:
        sys.exit(f"{part} failed:\n{output.stderr}")
    busy = [line for line in output.stderr.splitlines() if line.startswith("GPU busy")]
    return *json.loads(output.stdout.splitlines()[-1]), "".join(busy)


def peak_memory():
    """Highest resident memory of this process so far, in MB (Linux)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(rates, memory, epochs):
    """Medians, and the ratios that the issue of speed is about."""
    print()
    for part, values in rates.items():
        spread = f"from {min(values):,.0f} to {max(values):,.0f}"
        unit = UNITS.get(part, "steps/s")
        print(f"{part:10} {statistics.median(values):9,.0f} {unit:10} {spread:24} "
              f"{memory[part]:6,.0f} MB   {PARTS[part].__doc__.splitlines()[0]}")  # fmt: skip
    if "ours" in rates and "sb3" in rates:
        ratios = [a / b for a, b in zip(rates["ours"], rates["sb3"])]
        shown = ", ".join(f"{r:.2f}" for r in ratios)
        print(f"\nours / sb3: {statistics.median(ratios):.2f} (rounds: {shown})")
    if {"ours", "emulator"} <= rates.keys():
        ratios = [a / b for a, b in zip(rates["ours"], rates["emulator"])]
        print(f"ours / emulator alone: {statistics.median(ratios):.0%}")
    if {"ours", "emulator", "acting", "learner"} <= rates.keys():
        medians = {part: statistics.median(values) for part, values in rates.items()}
        seconds = 1 / medians["emulator"] + 1 / medians["acting"] + epochs / medians["learner"]
        share = medians["ours"] * seconds
        print(f"ours / the three parts one after the other: {share:.0%}")
    if {"learner", "matmul"} <= rates.keys():
        flops = statistics.median(rates["learner"]) * 49.5e-3
        share = flops / statistics.median(rates["matmul"])
        print(f"learner: {flops:.0f} GFLOP/s, {share:.0%} of the matrix product's")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=8, help="of a part and round")
    parser.add_argument("--parts", default=",".join(PARTS), help=", ".join(PARTS))
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--busy", action="store_true", help="beside a second busy process")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.worker:
        rate = PARTS[args.worker](args)
        print(json.dumps([rate, peak_memory()]))
        return
    parts = args.parts.split(",")
    rates, memory = {part: [] for part in parts}, dict.fromkeys(parts, 0.0)
    print(f"{os.cpu_count()} cores, device {args.device}, busy neighbor: {args.busy}")
    if args.busy:
        multiprocessing.Process(target=burn, daemon=True).start()
    for number in range(args.rounds):
        for part in parts:
            rate, peak, busy = measure(part)
            rates[part].append(rate)
            memory[part] = max(memory[part], peak)
            print(f"round {number + 1}  {part:10} {rate:9,.0f}   {busy}", flush=True)
    report(rates, memory, args.epochs)


if __name__ == "__main__":
    main()
