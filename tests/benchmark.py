"""How fast the script is here, beside stable-baselines3's PPO at the same settings.

    python tests/benchmark.py                  every part, three alternated rounds: ten minutes
    python tests/benchmark.py --busy           the same beside a second busy process
    python tests/benchmark.py --parts ours,emulator --rounds 1

Each part runs in a process of its own, with the settings its user would have, in turns, so that a
machine that is slow for a while is slow for all of them. Printed are medians over the rounds, and
ratios within a round, which a noisy machine changes least. 8 games, 128 steps, 4 epochs,
minibatches of 256.
"""

import argparse
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
ENVS, STEPS, EPOCHS, MINIBATCH = 8, 128, 4, 256
BATCH = ENVS * STEPS


class NeverStop:
    requested = False


def our_parts(device_name):
    """The script's own pieces, as `train` puts them together."""
    sys.path.insert(0, str(SCRIPT_FOLDER))
    import ai_breakout_game as script  # before torch: it sets how OpenMP waits

    torch = script.torch

    config = script.Config(num_envs=ENVS, num_steps=STEPS, device=device_name)
    game, device = script.find_game(config), script.pick_device(device_name)
    games = script.make_vector_env(game, ENVS, True)
    games = script.ReplayableGames(games, config.replay_steps)
    state = script.make_state(config, game, device)
    rollout = script.make_rollout(STEPS, ENVS, device)
    rollout.frames[-1] = torch.from_numpy(games.reset(1))
    return script, config, games, state, rollout


def ours(updates, device):
    """Training steps a second of this script, TensorBoard included."""
    script, config, games, state, rollout = our_parts(device)
    with tempfile.TemporaryDirectory() as folder:
        logger = script.Logger(Path(folder), config, state)
        checkpoints = script.Checkpoints(Path(folder), config)
        for update in range(updates + 1):
            if update == 1:  # the first one warms up
                start = time.perf_counter()
            rate = script.anneal(config, state)
            over = script.collect_rollout(state, games, rollout, NeverStop())
            losses = script.update(state, rollout, config, NeverStop())
            logger.log_games(state, over)
            state.global_step += BATCH
            logger.log_update(state, rate, losses)
            checkpoints.keep(state, games, logger)
        seconds = time.perf_counter() - start
        logger.close()
    return updates * BATCH / seconds


def collect(updates, device):
    """Steps a second of playing alone: emulator and network, nothing learnt."""
    script, _, games, state, rollout = our_parts(device)
    script.collect_rollout(state, games, rollout, NeverStop())
    start = time.perf_counter()
    for _ in range(updates):
        script.collect_rollout(state, games, rollout, NeverStop())
    return updates * BATCH / (time.perf_counter() - start)


def emulator(updates, device):
    """Steps a second of the games alone, with random actions."""
    import numpy as np

    _, _, games, _, _ = our_parts(device)
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 4, (updates * STEPS, ENVS))
    start = time.perf_counter()
    for action in actions:
        games.step(action)
    return updates * BATCH / (time.perf_counter() - start)


def learner(updates, device):
    """Samples a second, forward and backward, of the update alone."""
    script, config, games, state, rollout = our_parts(device)
    script.collect_rollout(state, games, rollout, NeverStop())
    script.update(state, rollout, config, NeverStop())
    start = time.perf_counter()
    for _ in range(updates):
        script.update(state, rollout, config, NeverStop())
    return updates * BATCH * EPOCHS / (time.perf_counter() - start)


def matmul(updates, device):
    """GFLOP/s of a large matrix product: what the learner could at best come to."""
    import torch

    device = "cuda" if device == "cuda" else "cpu"
    a, b = (torch.randn(2048, 2048, device=device) for _ in "ab")
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    return best


def sb3(updates, device):
    """Training steps a second of stable-baselines3's PPO with the same settings."""
    import ale_py
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    env = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=ENVS, seed=1), 4)
    model = PPO(
        "CnnPolicy", env, n_steps=STEPS, n_epochs=EPOCHS, batch_size=MINIBATCH,
        learning_rate=2.5e-4, clip_range=0.1, clip_range_vf=0.1, ent_coef=0.01, vf_coef=0.5,
        device=device,
    )  # fmt: skip
    model.learn(BATCH)
    start = time.perf_counter()
    model.learn(updates * BATCH, reset_num_timesteps=False)
    return updates * BATCH / (time.perf_counter() - start)


PARTS = {f.__name__: f for f in (emulator, collect, learner, matmul, ours, sb3)}
UNITS = {"learner": "samples/s", "matmul": "GFLOP/s"}


def burn():
    """A second busy process."""
    while True:
        sum(range(10_000))


def measure(part, updates, device):
    """One part in a process of its own."""
    command = [sys.executable, __file__, "--worker", part, "--updates", str(updates)]
    command += ["--device", device]
    output = subprocess.run(command, capture_output=True, text=True)
    if output.returncode:
        sys.exit(f"{part} failed:\n{output.stderr}")
    return json.loads(output.stdout.splitlines()[-1])


def peak_memory():
    """Highest resident memory of this process so far, in MB (Linux)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(rates, memory):
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
    if {"learner", "matmul"} <= rates.keys():
        flops = statistics.median(rates["learner"]) * 49.5e-3
        share = flops / statistics.median(rates["matmul"])
        print(f"learner: {flops:.0f} GFLOP/s, {share:.0%} of the matrix product's")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=8, help="of 1,024 steps, a part and round")
    parser.add_argument("--parts", default=",".join(PARTS), help=", ".join(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--busy", action="store_true", help="beside a second busy process")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        rate = PARTS[args.worker](args.updates, args.device)
        print(json.dumps([rate, peak_memory()]))
        return
    parts = args.parts.split(",")
    rates, memory = {part: [] for part in parts}, dict.fromkeys(parts, 0.0)
    print(f"{os.cpu_count()} cores, device {args.device}, busy neighbour: {args.busy}")
    if args.busy:
        multiprocessing.Process(target=burn, daemon=True).start()
    for number in range(args.rounds):
        for part in parts:
            rate, peak = measure(part, args.updates, args.device)
            rates[part].append(rate)
            memory[part] = max(memory[part], peak)
            print(f"round {number + 1}  {part:10} {rate:9,.0f}", flush=True)
    report(rates, memory)


if __name__ == "__main__":
    main()
