#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "ale-py==0.12.1", "av==18.1.0", "filelock==4.2.12", "gymnasium==1.4.0",
#   "numpy>=2.0,<3", "opencv-python==5.0.0.93", "pillow==13.0.0", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1",
# ]
# ///
"""Learn Atari Breakout from its pixels with PPO, then play it in front of you.

    python3 ai_breakout_game.py --num-envs=8 --total-timesteps=3000 --multithreading=True
    python3 ai_breakout_game.py --run=1 --model-filename="ai_breakout_game3000.mdl"
    python3 ai_breakout_game.py --evaluate=100 --model-filename="ai_breakout_game3000.mdl"
    tensorboard --logdir runs

The default flags bring 449 points (430 with another seed) in five million steps: 73 minutes on one
fast core, 4 h 40 min on two slow ones. The agent that ships took 113 million, in six commands
(models/README.md), and scores 807.3 +- 25.3, in other games 804.5 +- 25.9 (means of 100 games; a
human 31.8, random buttons 1.7).

The file reads once, from top to bottom: configuration, several processes, the game and its
wrappers, the network, PPO, logs, training, playing, the command line. Functions and classes use
only what stands above them. For PPO alone read `Agent`, `act`, `Rollout`, `collect_rollout`,
`compute_gae`, `Batch`, `ppo_loss`, `learn_minibatch`, `update` and `updates`: 240 lines.

Shapes, named the same everywhere: T steps of a rollout, N environments, B = T * N, M samples of a
minibatch, A actions. Frames are uint8 until the network, actions int64, flags bool.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

if __name__ == "__main__":  # Ctrl-C while torch is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Waiting OpenMP threads must sleep, not spin: the emulator's threads need the same cores, and
# beside another busy process spinning costs two thirds of the speed. torch reads this when it is
# imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# glibc gives large blocks back to the kernel when they are freed, and every minibatch then maps its
# activations anew: 140,000 page faults an update, a tenth of its time. Elsewhere this does nothing.
with contextlib.suppress(OSError, AttributeError):
    for option, value in ((-3, 32 * 2**20), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        ctypes.CDLL("libc.so.6").mallopt(option, value)

try:
    import ale_py
    import cv2
    import gymnasium as gym
    import numpy as np
    import torch
    import torch.distributed as dist
    from ale_py.env import AtariEnv
    from ale_py.vector_env import AtariVectorEnv
    from filelock import FileLock, Timeout
    from torch import Tensor, nn
    from tqdm import tqdm
except ModuleNotFoundError as error:
    hint = "activate the virtual environment, or `pip install -r requirements.txt`"
    sys.exit(f"{error}: {hint}")
except ImportError as error:  # a server or a container without the system libraries of OpenCV
    hint = "on Debian or Ubuntu, `apt-get install libgl1 libglib2.0-0 libsm6 libxext6` may mend it"
    sys.exit(f"a library does not start ({error}): {hint}")

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner for every game
tqdm.monitor_interval = 0  # its thread, which wakes slow bars, may abort the program's end

# --------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend: `main` prints it as one line and exits with code 2."""


class RunError(Exception):
    """A run that cannot go on: `main` prints it as one line and exits with code 1."""


def knob(default: Any, group: str, text: str, low: float = -math.inf, high: float = math.inf):
    """A field of Config: default, the group of its flag in --help, help text, range."""
    metadata = {"group": group, "help": text, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob once. The command line is made of these fields: num_envs becomes --num-envs."""

    # fmt: off
    run: bool = knob(False, "mode", "watch an agent play instead of training one")
    evaluate: int = knob(0, "mode", "play so many whole games, fast; report the scores", 0, 10**6)
    record: str = knob("", "mode", "play into this file, .gif or .mp4, without a window")
    model_filename: str = knob("", "mode", "weights to play, or to start training from: a path, "
        "or a name in models/ (default: ai_<game>_game.mdl to play, none to train); 'random' "
        "plays without any")

    env_id: str = knob("BreakoutNoFrameskip-v4", "game", "any ALE game that gymnasium registers, "
        "at four emulator frames a step")
    sticky_actions: float | None = knob(None, "game", "chance that the emulator repeats the last "
        "action instead (default: as --env-id has it, 0 for ...NoFrameskip-v4)", 0, 1)
    max_frames: int = knob(108_000, "game", "emulator frames at which a game is cut off", 4, 10**9)
    seed: int = knob(1, "game", "same seed and machine, same run; on a CPU to the bit", 0, 2**30)
    device: str = knob("auto", "game", "auto, cpu, cuda or mps; auto takes the fastest there is")
    patience: float | None = knob(None, "game", "steps of a life without a point after which the "
        "buttons are drawn ever more by chance; 0: never (default: as the model has it, 250 in a "
        "new one)", 0)

    greedy: bool = knob(False, "playing", "take the likeliest action instead of drawing one")
    panel: bool = knob(True, "playing", "show what the agent sees and thinks beside the game")

    episodes: int = knob(1, "recording", "whole games to record", 1)
    seconds: float | None = knob(None, "recording", "record so long, instead of whole games",
        0.1, 10**6)
    skip: float = knob(0.0, "recording", "seconds that pass before a recording begins", 0, 10**6)

    total_timesteps: int = knob(5_000_000, "training", "steps to train, all games together, in "
        "whole updates; on Breakout 5 M brought 449 points, a human's 30 after 0.8 M", 1, 10**12)
    num_envs: int = knob(8, "training", "games played at once", 1, 4096)
    precision: str = knob("auto", "training", "what large layers compute in: float32, bfloat16 or "
        "auto, which takes bfloat16 where the device multiplies it fast")
    compile: bool | None = knob(None, "training", "compile the network and the loss into fewer, "
        "larger pieces, which takes a minute at first (default: on an NVIDIA GPU)")
    multithreading: bool = knob(True, "training", "yes: ale-py's own threads step the games; no: "
        "the Python wrappers do, one game after the other; holds for --evaluate as well")
    resume: str = knob("", "training", "go on with a run, exactly where its last checkpoint left "
        "it: runs/<name>, or latest; what shapes a run stays, but --total-timesteps may be raised")
    checkpoint_minutes: float = knob(5.0, "training", "minutes between two checkpoints; 0: one "
        "after every update", 0)
    replay_steps: int = knob(8192, "training", "steps after which a game's next start is seeded "
        "anew, which takes 0.1 s: a resume plays what came since once more", 1, 10**9)

    learning_rate: float = knob(1e-3, "PPO", "step size of Adam at the start", 0, 1)
    anneal_lr: bool = knob(True, "PPO", "lower the learning rate linearly to zero over the run")
    num_steps: int = knob(128, "PPO", "steps of each game between two updates", 1, 65536)
    gamma: float = knob(0.99, "PPO", "discount: what a reward one step later is worth now", 0, 1)
    gae_lambda: float = knob(0.95, "PPO", "lambda of generalised advantage estimation", 0, 1)
    num_minibatches: int = knob(4, "PPO", "parts that a batch is learnt in; must divide it", 1)
    update_epochs: int = knob(2, "PPO", "times that each batch is learnt from", 1, 1000)
    learn_fraction: float = knob(1.0, "PPO", "part of the batch that a pass over it learns "
        "from; below 1 steps are drawn, those with a large advantage more often", 0.01, 1)
    norm_adv: bool = knob(True, "PPO", "normalise the advantages of each minibatch")
    sharpen: float = knob(1.0, "PPO", "what the actor's weights are multiplied by when training "
        "starts from --model-filename: above 1, likely buttons become likelier; below 1, it is "
        "less sure, and can unlearn what it was too sure of", 0, 100)
    life_cost: float = knob(1.0, "PPO", "reward taken away where a life or the game ends: "
        "an agent that has little left to win would else not care", 0, 1000)
    clip_coef: float = knob(0.1, "PPO", "how far the policy may move in an update", 0)
    clip_vloss: bool = knob(False, "PPO", "clip how far the value moves as well")
    ent_coef: float = knob(0.003, "PPO", "weight of the entropy bonus, which keeps it curious", 0)
    vf_coef: float = knob(0.5, "PPO", "weight of the value loss", 0)
    max_grad_norm: float = knob(0.5, "PPO", "longest gradient, all parameters together", 0)
    target_kl: float | None = knob(None, "PPO", "end an update early once the policy has moved so "
        "far (default: never)", 0)
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low, high = field.metadata["low"], field.metadata["high"]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not (low <= value <= high and value < math.inf):
                low, high = (f"{x:,}".removesuffix(".0") for x in (low, high))
                bounds = f"{low} or more" if high == "inf" else f"from {low} to {high}"
                raise UserError(f"--{field.name.replace('_', '-')} must be {bounds}, not {value}")
        if self.batch_size % self.num_minibatches:
            raise UserError(
                f"--num-minibatches={self.num_minibatches} does not divide the batch of "
                f"{self.num_envs} games x {self.num_steps} steps = {self.batch_size}"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise UserError(f"--precision={self.precision} is neither auto, float32 nor bfloat16")
        if self.record and Path(self.record).suffix.lower() not in (".gif", ".mp4"):
            raise UserError(f"--record={self.record} must end in .gif or .mp4")
        if self.run + bool(self.evaluate) + bool(self.record) > 1:
            raise UserError("of --run, --evaluate and --record ask for one")

    @property
    def batch_size(self) -> int:
        """B = T * N: the steps played between two updates."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Whole updates that reach `total_timesteps`."""
        return math.ceil(self.total_timesteps / self.batch_size)


# --------------------------------------------------------------------------------------------------
# Processes: torchrun starts several, which train one agent together
# --------------------------------------------------------------------------------------------------


# Usually there is one process; then `sum_processes` and `broadcast` give back what they get, and
# `gather_processes` a list of it: this section can be skipped at first. Of several, each plays a
# part of the games and learns from a part of each minibatch. Wherever PPO sums over a minibatch
# (the gradient, the steps that count, the mean and the spread of the advantages) `sum_processes`
# sums over all of them, so all have the same weights at any time. The first alone logs and saves.


class Place(NamedTuple):
    """Which of the processes this is."""

    rank: int  # 0 speaks, logs and saves
    size: int


def place() -> Place:
    """This process's number, and how many torchrun started: 0 and 1 without it."""
    if dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size())
    return Place(0, 1)


def sum_processes(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, in each of them."""
    if place().size > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def gather_processes(item: Any) -> list[Any]:
    """In the first process, the `item` of every one, by rank; [] in the others."""
    if place().size == 1:
        return [item]
    items = [None] * place().size if place().rank == 0 else None
    dist.gather_object(item, items)
    return items or []


def broadcast(item: Any) -> Any:
    """What the first process passes as `item`, in all of them."""
    items = [item]
    if place().size > 1:
        dist.broadcast_object_list(items)
    return items[0]


class StopRequest:
    """Turns Ctrl-C, SIGTERM and the like into a flag: training stops between two steps."""

    requested = False  # of this process; `agreed` asks the others too

    def __enter__(self) -> Self:
        signals = [signal.SIGINT, signal.SIGTERM]
        for name in ("SIGHUP", "SIGBREAK"):  # a terminal that is closed; Ctrl-Break on Windows
            signum = getattr(signal, name, None)
            if signum and signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
                signals.append(signum)
        self.before = {signum: signal.signal(signum, self.handle) for signum in signals}
        return self

    def handle(self, signum: int, frame: Any) -> None:
        """Once is enough: later signals change nothing while the state is being saved."""
        if not self.requested and place().rank == 0:
            with contextlib.suppress(OSError):  # the terminal may be what was closed
                os.write(2, b"\nStopping; saving ...\n")  # print may be what it interrupted
        self.requested = True

    def agreed(self) -> bool:
        """Whether to stop now: all processes do if one of them was told to. Each has to ask."""
        return bool(sum_processes(torch.tensor(int(self.requested))))

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


# --------------------------------------------------------------------------------------------------
# Environment: from the emulator's screen to what the network sees
# --------------------------------------------------------------------------------------------------

# As in Mnih et al., "Human-level control through deep reinforcement learning", 2015.
FRAME_SKIP = 4  # emulator frames that an action is held for
FRAME_STACK = 4  # frames the network sees at once: one alone does not show where the ball flies
FRAME_SIZE = 84  # pixels, both ways; `Agent` and the panel are made for these two
NOOP_MAX = 30  # fewer frames than this pass by themselves when a game starts


@functools.cache
def action_names(rom: str) -> list[str]:
    """The buttons that do something in a game, in the order of their numbers."""
    return AtariEnv(rom).get_action_meanings()


class Game(NamedTuple):
    """Which cartridge, and how it is played."""

    rom: str
    sticky: float = 0.0  # chance that the emulator repeats the last action
    max_frames: int = 108_000  # 30 minutes
    noop_max: int = NOOP_MAX  # 0: all games start alike


def find_game(config: Config) -> Game:
    """The game of `config`. Raises UserError, with the nearest names, where there is none."""
    known = {name: s.kwargs for name, s in gym.registry.items() if "game" in (s.kwargs or {})}
    if config.env_id not in known:
        # Without the affixes, which all names share, the nearest name is the nearest game.
        short = {name.removeprefix("ALE/").split("-")[0].lower(): name for name in known}
        asked = config.env_id.removeprefix("ALE/").split("-")[0].lower()
        near = [short[name] for name in difflib.get_close_matches(asked, short)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"--env-id={config.env_id} is not an ALE game{hint}")
    settings = known[config.env_id]
    sticky = config.sticky_actions
    sticky = settings["repeat_action_probability"] if sticky is None else sticky
    return Game(settings["game"], sticky, config.max_frames)


class FireResetEnv(gym.Wrapper):
    """FIRE starts every game: in Breakout there is no ball before it."""

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        actions = self.unwrapped.get_action_meanings()
        if "FIRE" in actions:
            obs, _, _, _, info = self.env.step(actions.index("FIRE"))
        return obs, info


class NoopResetEnv(gym.Wrapper):
    """A random number of frames passes before the agent may act, so that no two games are alike."""

    def __init__(self, env: gym.Env, noop_max: int) -> None:
        super().__init__(env)
        self.noop_max = noop_max

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(self.noop_max) if self.noop_max else 0):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info


class RGBSaveEnv(gym.wrappers.RenderCollection):
    """Keeps every frame in colour, (210, 160, 3) uint8, for the eye, until `render` takes them."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env, reset_clean=False)  # a game's last frames are still to be shown


class MaxAndSkipEnv(gym.Wrapper):
    """Holds each action for four frames and shows the brighter of the last two, pixel by pixel.

    The Atari draws some objects only on every other frame: the maximum always shows them.
    """

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        last_two: deque[np.ndarray] = deque(maxlen=2)
        total_reward = 0.0
        for _ in range(FRAME_SKIP):
            obs, reward, terminated, truncated, info = self.env.step(action)
            last_two.append(obs)
            total_reward += float(reward)
            if terminated or truncated:
                break
        return np.max(last_two, axis=0), total_reward, terminated, truncated, info


class WarpFrame(gym.ObservationWrapper):
    """Shrinks the grey screen, (210, 160) uint8, to (84, 84): ball and bricks are still there."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (FRAME_SIZE, FRAME_SIZE), np.uint8)

    def observation(self, frame: np.ndarray) -> np.ndarray:
        return cv2.resize(frame, (FRAME_SIZE, FRAME_SIZE), interpolation=cv2.INTER_AREA)


class FrameStack(gym.wrappers.FrameStackObservation):
    """Shows the last four frames, (4, 84, 84) uint8, the newest last; a new game starts black."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env, FRAME_STACK, padding_type="zero")


class EpisodicLifeEnv(gym.Wrapper):
    """A lost life ends the episode for the learner, but not the game.

    So the learner sees that a lost ball costs all that would have followed. The next `reset` goes
    on with the same game, and FIRE serves the next ball.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.lives, self.game_over = 0, True

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        life_lost = 0 < info["lives"] < self.lives
        self.lives, self.game_over, self.last = info["lives"], terminated or truncated, (obs, info)
        return obs, reward, terminated or life_lost, truncated, info

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        new_game = self.game_over or kwargs.get("seed") is not None
        served: dict = {}
        actions = self.unwrapped.get_action_meanings()
        if not new_game and "FIRE" in actions:
            *_, served = self.step(actions.index("FIRE"))
            new_game = self.game_over  # rare: the last ball was lost at once, `served` tells
        if new_game:
            obs, info = self.env.reset(**kwargs)
            self.lives, self.game_over, self.last = info["lives"], False, (obs, served | info)
        return self.last


class ClipRewardEnv(gym.RewardWrapper):
    """The learner gets the sign of each reward, so that one step size fits every game."""

    def reward(self, reward: float) -> float:
        return float(np.sign(reward))


def make_env(game: Game, keep_rgb: bool = False) -> gym.Env:
    """One game behind the whole wrapper stack: what the native environment does, made readable.

    The grey picture is the emulator's own, its palette's luminance, so that both ways of stepping
    the games show the agent the same bytes, at every step that it decides. The true score of a
    whole game is counted below the lives and the clipping: info["episode"], once it is over.
    """
    env = AtariEnv(
        game.rom, obs_type="grayscale", render_mode="rgb_array", frameskip=1,
        repeat_action_probability=game.sticky,
    )  # fmt: skip
    if keep_rgb:
        env = RGBSaveEnv(env)
    env = NoopResetEnv(FireResetEnv(env), game.noop_max)
    env = MaxAndSkipEnv(env)
    env = gym.wrappers.TimeLimit(env, math.ceil(game.max_frames / FRAME_SKIP))
    env = gym.wrappers.RecordEpisodeStatistics(env)
    env = FrameStack(WarpFrame(env))
    env = EpisodicLifeEnv(env)
    return ClipRewardEnv(env)


class FinishedGame(NamedTuple):
    """A whole game that is over."""

    slot: int  # which of the N it was
    score: float  # the true one, nothing clipped
    length: int  # steps of four frames


class StepResult(NamedTuple):
    """What one step of N games brought.

    An episode is what the learner sees as one: a life. A game is all its lives. A reset takes a
    step of its own, which ignores the agent's action:

        step t       the last of an episode: terminated[i], and frames[i] are its last
        step t + 1   serves the next ball, or starts the next game: decided[i] is False
        step t + 2   the agent decides again

    Steps that it did not decide are not learnt from. (Where there is no FIRE, the native games go
    on after a lost life without such a step.)
    """

    frames: np.ndarray  # (N, 4, 84, 84) uint8 after the step; at an end, the episode's last
    rewards: np.ndarray  # (N,) float32, clipped to their sign
    terminated: np.ndarray  # (N,) bool: a life was lost, or the game is over
    truncated: np.ndarray  # (N,) bool: the game was cut off
    decided: np.ndarray  # (N,) bool: the agent's action was carried out
    restarted: np.ndarray  # (N,) bool: a new game began
    lives: np.ndarray  # (N,) int
    finished: list[FinishedGame]


class VectorGames:
    """What both ways of stepping N games share; they add `start`, `step` and the true `scores`."""

    def __init__(self, game: Game, num_envs: int) -> None:
        self.num_envs, self.action_names = num_envs, action_names(game.rom)
        self.lives, self.frame_numbers = np.zeros((2, num_envs), int)
        self.ended = np.zeros(num_envs, bool)  # the last step ended an episode
        self.idle = np.zeros(num_envs, int)  # decisions since the last point or lost life
        self.pulse = 0  # odd while the emulator's threads are waited for: see `watchdog`

    def reset(self, seed: int) -> np.ndarray:
        """Start all games anew, game i from seed + i. Returns frames, (N, 4, 84, 84) uint8."""
        return self.start(np.ones(self.num_envs, bool), seed + np.arange(self.num_envs))


class NativeGames(VectorGames):
    """N games on ale-py's own threads: the wrapper stack in C++."""

    def __init__(self, game: Game, num_envs: int) -> None:
        self.env = AtariVectorEnv(
            game.rom, num_envs, repeat_action_probability=game.sticky, noop_max=game.noop_max,
            max_num_frames_per_episode=game.max_frames, frameskip=FRAME_SKIP,
            stack_num=FRAME_STACK, img_height=FRAME_SIZE, img_width=FRAME_SIZE,
            life_loss_info=True,  # not episodic_life, which builds a whole new wall at every life
            reward_clipping=False,  # clipped here, after the true score is counted
        )  # fmt: skip
        super().__init__(game, num_envs)
        self.fire = self.action_names.index("FIRE") if "FIRE" in self.action_names else None

        self.scores, self.lengths = np.zeros(num_envs), np.zeros(num_envs, int)
        self.over = np.zeros(num_envs, bool)  # the last step ended the game

    def start(self, slots: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Start the games of `slots`, (N,) bool, anew from their `seeds`, (N,) int.

        Returns the frames of all, (N, 4, 84, 84) uint8. It takes 0.1 s a game: the cartridge is
        read again, and what follows depends on nothing but the seed and the actions.
        """
        frames, info = self.env.reset(seed=seeds[slots], options={"reset_mask": slots})
        self.lives, self.frame_numbers = info["lives"], info["episode_frame_number"]
        for counts in (self.scores, self.lengths, self.idle, self.ended, self.over):
            counts[slots] = 0
        return frames

    def finish(self, slots: np.ndarray) -> list[FinishedGame]:
        """The games of `slots`, (N,) bool, as they stand."""
        return [
            FinishedGame(int(i), float(self.scores[i]), int(self.lengths[i]))
            for i in np.flatnonzero(slots)
        ]

    def step(self, actions: np.ndarray) -> StepResult:
        """Take `actions`, (N,) int64. Raises IndexError for one that the game does not have."""
        if actions.min() < 0 or actions.max() >= len(self.action_names):
            raise IndexError(f"actions {actions}: the game has {len(self.action_names)}")
        if self.fire is not None:
            actions = np.where(self.ended, self.fire, actions)
        self.pulse += 1
        frames, rewards, terminated, truncated, info = self.env.step(actions)
        self.pulse += 1
        # Within a game this number only grows: a smaller one is a new game's.
        restarted = self.over | (info["episode_frame_number"] < self.frame_numbers)
        decided = ~(self.ended if self.fire is not None else restarted)
        self.lives, self.frame_numbers = info["lives"], info["episode_frame_number"]
        self.ended = terminated | truncated
        self.idle = np.where((rewards != 0) | self.ended | restarted, 0, self.idle + decided)

        # Adventure ends with lives left, which looks like a lost life until, a step later, it
        # starts anew.
        finished = self.finish(restarted & ~self.over)
        self.scores[restarted] = self.lengths[restarted] = 0
        self.scores += rewards
        self.lengths += ~restarted
        self.over = truncated | (terminated & (self.lives == 0))
        finished += self.finish(self.over)
        return StepResult(
            frames, np.sign(rewards).astype(np.float32), terminated, truncated, decided, restarted,
            self.lives, finished,
        )  # fmt: skip


class WrappedGames(VectorGames):
    """N games one after the other through the Python wrappers: slower, and open to be changed."""

    def __init__(self, game: Game, num_envs: int, keep_rgb: bool = False) -> None:
        make = functools.partial(make_env, game, keep_rgb)
        mode = gym.vector.AutoresetMode.NEXT_STEP
        self.env = gym.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=mode)
        super().__init__(game, num_envs)

    def start(self, slots: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """As `NativeGames.start`."""
        frames, info = self.env.reset(seed=seeds.tolist(), options={"reset_mask": slots})
        self.lives = np.where(slots, info["lives"], self.lives)
        self.frame_numbers = np.where(slots, info["episode_frame_number"], self.frame_numbers)
        self.ended[slots] = self.idle[slots] = 0
        return frames

    @property
    def scores(self) -> np.ndarray:
        """True scores so far, (N,) float64."""
        return np.array(self.env.get_attr("episode_returns"), float)

    def step(self, actions: np.ndarray) -> StepResult:
        """Take `actions`, (N,) int64."""
        frames, rewards, terminated, truncated, info = self.env.step(actions)
        decided, self.ended, self.lives = ~self.ended, terminated | truncated, info["lives"]
        restarted = info["episode_frame_number"] < self.frame_numbers
        self.frame_numbers = info["episode_frame_number"]
        self.idle = np.where((rewards != 0) | self.ended | restarted, 0, self.idle + decided)
        finished = [
            FinishedGame(int(i), float(info["episode"]["r"][i]), int(info["episode"]["l"][i]))
            for i in np.flatnonzero(info.get("_episode", []))
        ]
        return StepResult(
            frames, rewards.astype(np.float32), terminated, truncated, decided, restarted,
            self.lives, finished,
        )  # fmt: skip


def make_vector_env(game: Game, num_envs: int, multithreading: bool) -> NativeGames | WrappedGames:
    """N games behind one interface: VectorGames, and the true `scores` so far, (N,) float64."""
    return (NativeGames if multithreading else WrappedGames)(game, num_envs)


class ReplayableGames:
    """N games that can be brought back, in another process, to the very pixels they had here.

    The emulator's state cannot be read out, but it follows from a game's seed and the actions
    since. So these are kept; and lest they become too many, a slot's first new game after
    `replay_steps` begins from a new seed, and what came before is forgotten. No game is cut off for
    that, and no score lost.
    """

    SAVED = ("seeds", "ages", "actions")

    def __init__(self, games: NativeGames | WrappedGames, replay_steps: int) -> None:
        self.games, self.replay_steps = games, replay_steps
        self.first = place().rank * games.num_envs  # our first game's number among all

    def reset(self, seed: int) -> np.ndarray:
        """Start all games anew, game i from seed + i. Returns frames, (N, 4, 84, 84) uint8."""
        self.seeds = seed + self.first + np.arange(self.games.num_envs)
        self.ages = np.zeros_like(self.seeds)  # steps since the seed
        self.actions: deque[np.ndarray] = deque()  # (N,) uint8 each, since the oldest seed
        return self.games.reset(seed + self.first)

    def step(self, actions: np.ndarray) -> StepResult:
        """Take `actions`, (N,) int64."""
        result = self.games.step(actions)
        self.actions.append(actions.astype(np.uint8))
        self.ages += 1
        old = result.restarted & (self.ages >= self.replay_steps)
        if old.any():
            self.seeds[old] += self.games.num_envs * place().size
            self.ages[old] = 0
            frames = self.games.start(old, self.seeds)
            result = result._replace(frames=frames, lives=self.games.lives)
            while len(self.actions) > self.ages.max():
                self.actions.popleft()
        return result

    @property
    def idle(self) -> np.ndarray:
        """Steps that the agent decided in each game since its last point or lost life, (N,) int."""
        return self.games.idle

    def state_dict(self) -> dict[str, Tensor]:
        """All that brings the games back: seeds and ages (N,) int64, actions (S, N) uint8, those
        of the S steps since the oldest seed.

        Every process has to call it; the first gets the games of all of them.
        """
        actions = np.array(self.actions, np.uint8).reshape(-1, self.games.num_envs)
        parts = gather_processes((self.seeds, self.ages, actions))
        if not parts:  # not the first process
            return {}
        seeds, ages, actions = zip(*parts)
        oldest = max(map(len, actions))
        actions = [np.pad(steps, ((oldest - len(steps), 0), (0, 0))) for steps in actions]
        saved = map(np.hstack, (seeds, ages, actions))
        return {name: torch.from_numpy(one) for name, one in zip(self.SAVED, saved)}

    def load_state_dict(self, saved: dict[str, Tensor]) -> np.ndarray:
        """Play again what `saved` has of our games. Returns frames, (N, 4, 84, 84) uint8.

        All games take all the recorded actions; one with a later seed starts anew from it where
        its own actions begin.
        """
        ours = slice(self.first, self.first + self.games.num_envs)
        self.seeds, self.ages, actions = (saved[x].numpy()[..., ours].copy() for x in self.SAVED)
        self.actions = deque(actions[len(actions) - self.ages.max() :])
        frames = self.games.start(np.ones_like(self.ages, bool), self.seeds)
        for played, step in enumerate(self.actions, 1):
            frames = self.games.step(step.astype(np.int64)).frames
            young = self.ages == len(self.actions) - played  # seeded after this step
            if young.any():
                frames = self.games.start(young, self.seeds)
        return frames


# --------------------------------------------------------------------------------------------------
# Network
# --------------------------------------------------------------------------------------------------


def init_layer(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights (Saxe et al. 2014), zero biases; a gain of sqrt(2) suits a ReLU."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Dense(nn.Linear):
    """nn.Linear, but large batches on a CPU are multiplied by oneDNN, as a 1x1 convolution.

    torch leaves matrix products to MKL, which reaches 190 GFLOP/s on an AMD processor where the
    convolutions reach 350: this takes 9.5 ms instead of 15.5, forward and backward of 256 samples,
    and 8 % off the whole update.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (M, in_features) float32 -> (M, out_features) float32."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or len(x) < 64:
            return super().forward(x)
        image = x.t()[None, :, None]  # (1, in_features, 1, M): each sample a pixel
        return nn.functional.conv2d(image, self.weight[:, :, None, None], self.bias)[0, :, 0].t()


BLOCK = 4  # pixels: the stride of the first convolution


def to_blocks(x: Tensor, size: int = BLOCK) -> Tensor:
    """(M, C, H, W) -> (M, size * size * C, H / size, W / size): squares of pixels become channels,
    which lie innermost in memory.
    """
    x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # (M, H, W, C)
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (M, H / size, size, W / size, ...)
    return x.transpose(2, 3).flatten(3).permute(0, 3, 1, 2)


class BlockConv(nn.Conv2d):
    """nn.Conv2d that also takes its input in blocks of its stride, as `to_blocks` cuts it.

    It is the same sum: a convolution with stride 1 over an image in which each square of stride x
    stride pixels has become one pixel, with the channels of all of them. Large batches of 16-bit
    numbers on a CPU are cut in any case: with so few channels as the pixels have, oneDNN's threads
    spin to wait for each other, and beside a busy process a minibatch takes seconds.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (M, C, H, W), or cut, (M, stride * stride * C, H / stride, W / stride)."""
        size = self.stride[0]
        if x.shape[1] == self.in_channels:
            if x.device.type != "cpu" or x.dtype != torch.bfloat16 or len(x) < 64:
                return super().forward(x)
            x = to_blocks(x, size)
        return nn.functional.conv2d(x, to_blocks(self.weight, size), self.bias)


class Agent(nn.Module):
    """The network of Mnih et al. (2015), with a policy (actor) and a value (critic) on top.

    `precision` is what the large layers compute in; weights, actor and critic are float32 always.
    `patience` is how many steps without a point it bears before it tries what it likes less.
    """

    precision = torch.float32
    patience = 250.0

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            init_layer(BlockConv(FRAME_STACK, 32, kernel_size=8, stride=4)),  # (M, 32, 20, 20)
            nn.ReLU(inplace=True),  # in place: saves a pass over memory, 3 % of the learner's time
            init_layer(BlockConv(32, 64, kernel_size=4, stride=2)),  # (M, 64, 9, 9)
            nn.ReLU(inplace=True),
            init_layer(nn.Conv2d(64, 64, kernel_size=3)),  # (M, 64, 7, 7)
            nn.ReLU(inplace=True),
            nn.Flatten(),  # (M, 3136)
            init_layer(Dense(64 * 7 * 7, 512)),
            nn.ReLU(inplace=True),
        )
        # A small gain makes all actions about equally likely at first (Andrychowicz et al. 2021).
        self.actor = init_layer(nn.Linear(512, num_actions), gain=0.01)
        self.critic = init_layer(nn.Linear(512, 1), gain=1.0)
        # The order in which convolutions read fastest: 1.7 times the speed on a CPU.
        self.to(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        """A context in which the large layers compute in `precision`; around several calls it
        converts the weights once for all.
        """
        device, reduced = self.actor.weight.device.type, self.precision != torch.float32
        return torch.autocast(device, self.precision, enabled=reduced)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """frames (M, 4, 84, 84) uint8 -> logits (M, A) float32, values (M,) float32.

        Frames may come cut into blocks, (M, 64, 21, 21), which is faster.
        """
        with self.autocast():
            hidden = self.network(frames.to(self.precision).mul_(1 / 255)).float()
        with torch.autocast(frames.device.type, enabled=False):
            return self.actor(hidden), self.critic(hidden).squeeze(-1)


def policy_temperatures(idle: np.ndarray, patience: float) -> Tensor:
    """What logits are divided by after `idle` steps of a life without a point, (N,) float32.

    1 until `patience` steps, then idle / patience: a ball that comes back for ever and hits
    nothing is met ever more by chance, until it takes another way. 0 is endless patience.
    """
    return torch.from_numpy(idle / (patience or math.inf)).float().clamp_(min=1)


def gumbel_noise(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws from the Gumbel distribution, float32, of the shape `size`."""
    draws = torch.empty(size, device=generator.device)
    return -draws.exponential_(generator=generator).log_()


def act(
    agent: nn.Module, frames: Tensor, temperatures: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """frames (N, 64, 21, 21) uint8, temperatures (N,) and Gumbel noise (N, A) -> actions (N,)
    int64, drawn from the policy, their log probabilities (N,) and the values (N,).

    argmax(log p + Gumbel noise) is a sample from p (Gumbel 1954). So all draws of a rollout are
    made at once, before it, and nothing in here is random.
    """
    logits, values = agent(frames)
    log_probs = (logits / temperatures[:, None]).log_softmax(-1)
    actions = (log_probs + noise).argmax(-1)
    return actions, log_probs.gather(-1, actions[:, None]).squeeze(-1), values


# --------------------------------------------------------------------------------------------------
# PPO: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv:1707.06347
# --------------------------------------------------------------------------------------------------


# The policy says how likely each action is, the value how much reward is still to come. Play T
# steps with the policy as it is; where an action brought more than the value foresaw (that is its
# advantage) make it likelier. The same steps can be learnt from several times, since the loss sees
# no gain in moving an action's probability further than `clip_coef` from where it was in the game.


class Rollout(NamedTuple):
    """What N games went through in T steps; made once, filled again and again."""

    # Frames are kept in blocks of 4 x 4 pixels, each with its greys in the last four frames: the
    # network reads them fastest so.
    frames: Tensor  # (T + 1, N, 64, 21, 21) uint8; the last is where the next rollout starts
    values: Tensor  # (T + 1, N) float32
    temperatures: Tensor  # (T, N) float32: the policy's temperature
    actions: Tensor  # (T, N) int64
    log_probs: Tensor  # (T, N) float32
    rewards: Tensor  # (T, N) float32
    terminated: Tensor  # (T, N) bool: step t ended the episode, and nothing follows
    dones: Tensor  # (T, N) bool: step t ended the episode, or the game was cut off
    decided: Tensor  # (T, N) bool: the agent's action was carried out


def make_rollout(num_steps: int, num_envs: int, device: torch.device) -> Rollout:
    """Storage for T steps of N games: 28 kB a step, nearly all of it frames."""
    zeros = functools.partial(torch.zeros, device=device)
    size, side = (num_steps, num_envs), FRAME_SIZE // BLOCK
    shape = (num_steps + 1, num_envs, side, side, FRAME_STACK * BLOCK**2)
    flags = {name: zeros(size, dtype=torch.bool) for name in ("terminated", "dones", "decided")}
    return Rollout(
        frames=zeros(shape, dtype=torch.uint8).permute(0, 1, 4, 2, 3),
        values=zeros(num_steps + 1, num_envs),
        temperatures=torch.ones(size, device=device),
        actions=zeros(size, dtype=torch.int64),
        log_probs=zeros(size), rewards=zeros(size), **flags,
    )  # fmt: skip


@dataclasses.dataclass
class TrainState:
    """What a run has come to: with the games, all that a resume needs."""

    agent: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # draws actions and minibatches
    about: dict[str, Any]  # which game the agent plays, for those who load its weights
    act: Callable[..., Any]  # `act` and `minibatch_loss`, compiled or as they stand
    loss: Callable[..., Any]
    update: int = 0
    global_step: int = 0  # steps taken, all games together
    games: int = 0  # that are over
    best_return: float = -math.inf  # highest mean score of 100 games
    scores: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=100))

    COUNTERS = ("update", "global_step", "games", "best_return")

    @property
    def mean_return(self) -> float:
        """Mean true score of the last 100 games, nan before the first."""
        return sum(self.scores) / len(self.scores) if self.scores else math.nan

    def state_dict(self) -> dict[str, Any]:
        """A deep copy of it all, tensors, numbers and strings by name: training leaves it alone."""
        state = self.about | {name: getattr(self, name) for name in self.COUNTERS}
        state |= {"scores": list(self.scores), "mean_return": self.mean_return}
        state |= {"weights": dict(self.agent.state_dict()), "patience": self.agent.patience}
        state |= {"optimizer": self.optimizer.state_dict()}
        return copy.deepcopy(state) | {"generator": self.generator.get_state()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.agent.load_state_dict(saved["weights"])
        self.agent.patience = float(saved.get("patience", 0))  # older runs had none
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["generator"].numel() == self.generator.get_state().numel():
            self.generator.set_state(saved["generator"])
        else:  # another kind of device, which draws other numbers
            self.generator.manual_seed(self.about["seed"] + saved["update"])
        self.scores.extend(saved["scores"])
        for name in self.COUNTERS:
            if type(saved[name]) is not type(getattr(self, name)):
                raise TypeError(f"{name} is {saved[name]}")
            setattr(self, name, saved[name])


def anneal(config: Config, state: TrainState) -> float:
    """Set the learning rate of the next update, falling linearly to zero, and return it."""
    left = 1 - state.update / config.num_updates if config.anneal_lr else 1.0
    state.optimizer.param_groups[0]["lr"] = config.learning_rate * left
    return config.learning_rate * left


@torch.no_grad()
def collect_rollout(
    state: TrainState, games: ReplayableGames, rollout: Rollout, stop: StopRequest
) -> list[tuple[int, FinishedGame]]:
    """Play T steps into `rollout`, from where the last one ended, or until `stop` is requested.

    Returns the games that ended, each with the step it ended at, counted from 1.
    """
    r, finished = rollout, []
    num_steps, num_envs = r.actions.shape
    # Each process draws for all games and takes its part: so their number changes no game.
    size = (num_steps, place().size * num_envs, state.agent.actor.out_features)
    noise = gumbel_noise(size, state.generator)[:, place().rank * num_envs :][:, :num_envs]
    results: list[StepResult] = []
    r.frames[0] = r.frames[-1]
    with state.agent.autocast():  # weights are converted once, not at every step
        for t in range(num_steps):
            # Several ask each other, which takes 0.2 ms: so at every eighth step only. (torchrun
            # kills what has not ended after 30 seconds.)
            if (place().size == 1 or t % 8 == 0) and stop.agreed():
                return []
            r.temperatures[t] = policy_temperatures(games.idle, state.agent.patience)
            seen = (state.agent, r.frames[t], r.temperatures[t], noise[t])
            r.actions[t], r.log_probs[t], r.values[t] = state.act(*seen)
            result = games.step(r.actions[t].cpu().numpy())  # waits for what the network computes
            new = torch.from_numpy(result.frames).to(r.frames.device)  # a GPU cuts them faster
            r.frames[t + 1] = to_blocks(new)
            results.append(result._replace(frames=None))
            finished += [(t + 1, game) for game in result.finished]
        r.values[-1] = state.act(state.agent, r.frames[-1], r.temperatures[-1], noise[-1])[2]
    for name in ("rewards", "terminated", "decided"):
        getattr(r, name).copy_(torch.from_numpy(np.stack([getattr(x, name) for x in results])))
    r.dones.copy_(torch.from_numpy(np.stack([x.terminated | x.truncated for x in results])))
    return finished


def compute_gae(
    rewards: Tensor, values: Tensor, terminated: Tensor, dones: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation: Schulman et al. 2016, arXiv:1506.02438, equation 16.

    rewards, terminated and dones are (T, N), values (T + 1, N); returns advantages (T, N).

        delta_t = r_t + gamma * V(s_t+1) - V(s_t)        A_t = delta_t + gamma * lambda * A_t+1

    After a termination V(s_t+1) is zero. A game that was only cut off keeps it: the environments
    show its last frame before they reset, so values[t + 1] is that frame's. Both end the sum.
    """
    delta = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decay = gamma * lam * (~dones).float()
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantages[t] = following = delta[t] + decay[t] * following
    return advantages


class Batch(NamedTuple):
    """Steps to learn from, in any order: (B,) all of a rollout's, (M,) those of a minibatch."""

    frames: Tensor  # (B, 64, 21, 21) uint8
    temperatures: Tensor  # (B,) float32, the policy's temperature
    actions: Tensor  # (B,) int64
    log_probs: Tensor  # (B,) float32, of the actions when they were taken
    values: Tensor  # (B,) float32, estimated when they were taken
    advantages: Tensor  # (B,) float32
    returns: Tensor  # (B,) float32
    # How much a step counts, (B,): bool, whether the agent decided it; or, where steps were drawn
    # by importance, float32, for how many it stands.
    mask: Tensor


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and unbiased variance of `x` where `mask` holds, or weighted by it, and the mask's sum,
    each in all processes. Where nothing counts, mean and variance are zero.
    """
    weights = mask.float()
    sums = torch.stack([weights.sum(), weights.square().sum(), (x * weights).sum()])
    count, squares, summed = sum_processes(sums)
    count = count.clamp(min=1e-8)
    mean = summed / count
    spread = sum_processes(((x - mean).square() * weights).sum())
    # Unbiased: the mean uses up one degree of freedom, with weights sum(w^2) / sum(w) (Kish 1965).
    return mean, spread / (count - squares / count).clamp(min=1e-8), count


def weigh(minibatch: Batch, norm_adv: bool) -> tuple[Batch, Tensor]:
    """Normalise the advantages over the minibatch, and give each step its weight in a mean, (M,)
    float32: mask / mask.sum(). Both go over all processes.
    """
    mask, advantages = minibatch.mask, minibatch.advantages
    mean, variance, count = masked_moments(advantages, mask)
    if norm_adv:
        advantages = (advantages - mean) / (variance.sqrt() + 1e-8)
    return minibatch._replace(advantages=advantages), mask / count


def draw_steps(batch: Batch, count: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Which `count` of B steps to learn from, in which order: their indices and their mask, both
    (count,). If `count` is B they are all steps, in the order of the random numbers `keys`, (B,).

    Fewer are drawn by importance (Kahn and Marshall 1953), some of them several times. What a step
    changes grows with its advantage, in the policy as in the value, so its chance to be drawn is in
    proportion to 0.8 |A| / mean |A| + 0.2. It then counts mean chance / own chance times: on
    average the gradient is, nearly, that of all steps.
    """
    order = keys.argsort()
    if count == len(keys):
        return order, batch.mask[order]
    sizes = batch.advantages.abs() * batch.mask
    mean = sizes.sum() / batch.mask.sum().clamp(min=1)
    chances = batch.mask * (0.8 * sizes / mean.clamp(min=1e-8) + 0.2)
    # Systematic resampling: `count` points, evenly spaced on a line on which each step is as long
    # as its chance.
    line = chances[order].cumsum(0)
    points = (torch.arange(count, device=keys.device) + 0.5) * (line[-1] / count)
    found = torch.searchsorted(line, points)
    drawn = order[found.clamp_(max=len(keys) - 1)]
    return drawn, batch.mask[drawn] * chances.mean() / chances[drawn].clamp(min=1e-8)


LOSS_NAMES = (
    "value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm",
)  # fmt: skip


def ppo_loss(
    logits: Tensor, values: Tensor, batch: Batch, shares: Tensor,
    clip_coef: float, ent_coef: float, vf_coef: float, clip_vloss: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of a minibatch, given what the network says now: logits (M, A), values (M,).

    `batch` and `shares` are what `weigh` returns. Returns the loss, a scalar, and its parts
    without gradient, (6,): all of LOSS_NAMES but the last.
    """
    all_log_probs = logits.log_softmax(-1)
    log_ratio = all_log_probs.gather(-1, batch.actions[:, None]).squeeze(-1) - batch.log_probs
    ratio = log_ratio.exp()

    # Clipped surrogate objective, equation 7: nothing is gained by moving beyond 1 +- clip_coef.
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    gain = torch.min(ratio * batch.advantages, clipped_ratio * batch.advantages)
    policy_loss = -(gain * shares).sum()

    # The value's move may be clipped alike: not in the paper, but in its authors' own program.
    errors = (values - batch.returns).square()
    if clip_vloss:
        clipped_values = batch.values + (values - batch.values).clamp(-clip_coef, clip_coef)
        errors = torch.max(errors, (clipped_values - batch.returns).square())
    value_loss = 0.5 * (errors * shares).sum()

    entropy = -((all_log_probs.exp() * all_log_probs).sum(-1) * shares).sum()
    loss = policy_loss - ent_coef * entropy + vf_coef * value_loss  # equation 9, c1 = vf_coef / 2

    # How far the policy has moved: two estimates of KL(old, new), joschu.net/blog/kl-approx.html,
    # and the share of steps whose ratio is clipped.
    moves = (-log_ratio, ratio - 1 - log_ratio, ((ratio - 1).abs() > clip_coef).float())
    parts = (value_loss, policy_loss, entropy, *((move * shares).sum() for move in moves))
    return loss, torch.stack([part.detach() for part in parts])


def minibatch_loss(agent: nn.Module, batch: Batch, *others: Any) -> tuple[Tensor, Tensor]:
    """`ppo_loss` of what the network says of the minibatch's frames; `others` are its other
    arguments. It is what is compiled, as a whole, with the gradient that follows from it.
    """
    logits, values = agent(batch.frames)
    return ppo_loss(logits / batch.temperatures[:, None], values, batch, *others)


def learn_minibatch(state: TrainState, minibatch: Batch, config: Config) -> Tensor:
    """One step of the optimizer. Returns the parts of the loss and the gradient's length, (7,)."""
    c = config
    coefficients = (c.clip_coef, c.ent_coef, c.vf_coef, c.clip_vloss)
    state.optimizer.zero_grad()
    loss, parts = state.loss(state.agent, *weigh(minibatch, c.norm_adv), *coefficients)
    loss.backward()
    parts = parts.clone()  # compiled, the next call writes over it
    if place().size > 1:
        numbers = [p.grad for p in state.agent.parameters()] + [parts]
        flat = sum_processes(torch.cat([x.flatten() for x in numbers]))  # one message, not thirteen
        for x, summed in zip(numbers, flat.split([x.numel() for x in numbers])):
            x.copy_(summed.view_as(x))
    norm = nn.utils.clip_grad_norm_(state.agent.parameters(), c.max_grad_norm)
    state.optimizer.step()
    return torch.cat([parts, norm[None]])


def mean_metrics(state: TrainState, batch: Batch, history: list[Tensor]) -> dict[str, float]:
    """Means over an update, and the variance explained. RunError once one is not finite."""
    _, unexplained, _ = masked_moments(batch.returns - batch.values, batch.mask)
    explained = 1 - unexplained / masked_moments(batch.returns, batch.mask)[1].clamp(min=1e-8)
    # Only looked at for being finite: one weight that is NaN or infinite makes their sum so.
    weights = sum(parameter.detach().sum() for parameter in state.agent.parameters())
    # Numbers leave the device once an update: a GPU has to be waited for each time.
    numbers = torch.cat([torch.stack(history).mean(0), explained[None], weights[None]]).tolist()
    if not all(map(math.isfinite, numbers)):
        raise RunError(
            f"update {state.update + 1} came to numbers that are not finite: it was thrown "
            "away; start from the weights above (--model-filename) with a lower --learning-rate"
        )
    return dict(zip((*LOSS_NAMES, "explained_variance"), numbers))


def update(
    state: TrainState, rollout: Rollout, config: Config, stop: StopRequest
) -> dict[str, float]:
    """Learn from a rollout: `update_epochs` passes over its B steps, or what `draw_steps` takes of
    them, in minibatches of M. (With P processes, each has B / P of them here, draws from its
    own, and has M / P in each minibatch.)

    Returns what `mean_metrics` does; {} if `stop` was requested before.
    """
    r, c = rollout, config
    rewards = r.rewards - c.life_cost * r.terminated
    advantages = compute_gae(rewards, r.values, r.terminated, r.dones, c.gamma, c.gae_lambda)
    returns = advantages + r.values[:-1]
    given = (r.frames[:-1], r.temperatures, r.actions, r.log_probs, r.values[:-1])
    batch = Batch(*(x.flatten(0, 1) for x in (*given, advantages, returns, r.decided)))
    pixels = batch.frames.permute(0, 2, 3, 1)  # (B, 21, 21, 64), as they lie in memory
    size = max(1, int(c.learn_fraction * len(pixels)) // c.num_minibatches)
    history: list[Tensor] = []
    for _ in range(c.update_epochs):
        # As many draws as there are steps in all processes, so that all generators stay alike.
        keys = torch.rand(c.batch_size, generator=state.generator, device=r.actions.device)
        keys = keys.view(place().size, -1)[place().rank]
        steps = draw_steps(batch, size * c.num_minibatches, keys)
        for pick, mask in zip(*(x.split(size) for x in steps)):
            if stop.agreed():
                return {}
            # index_select copies whole frames, ten times as fast as [pick], in their memory order.
            frames = pixels.index_select(0, pick).permute(0, 3, 1, 2)
            minibatch = Batch(frames, *(x[pick] for x in batch[1:-1]), mask)
            history.append(learn_minibatch(state, minibatch, c))
        if c.target_kl is not None and history[-1][LOSS_NAMES.index("approx_kl")] > c.target_kl:
            break

    return mean_metrics(state, batch, history)


# --------------------------------------------------------------------------------------------------
# State and logs
# --------------------------------------------------------------------------------------------------


SEAL = b"ai_breakout_game 1 sha256 "  # 1: the version of what is saved
LARGEST_FILE = 2**28  # bytes; a checkpoint takes 21 MB


def seal(body: bytes) -> bytes:
    """The end of the file. A zip archive may close with a comment, after two bytes that give its
    length; ours is the checksum of `body`, all that stands before these.
    """
    comment = SEAL + hashlib.sha256(body).hexdigest().encode()
    return len(comment).to_bytes(2, "little") + comment


def save_file(content: dict[str, Any], path: Path, keep: Path | None = None) -> None:
    """Write `content` so that `path` is always whole: the old file or the new, never a half.

    It is torch.save's zip archive, with a checksum of all before it as the archive's comment.
    The old file becomes `keep`. Raises OSError.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()[:-2]  # the last two bytes say how long the comment is: 0
    for killed in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
            if time.time() - killed.stat().st_mtime > 60:  # saving takes less than a second
                killed.unlink()
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(body + seal(body))
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_file(path: Path, kind: str, bare: bool = False) -> Any:
    """What `save_file` wrote; or torch.save by itself, where `bare` allows it.

    No code in the file is run, and reading takes no more memory than the file is long: a packed
    archive, or one that says it is larger than its file, is refused like one that does not match
    its checksum. Raises UserError.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE >> 20} MB")
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries, comment = archive.infolist(), archive.comment
            size = sum(entry.file_size for entry in entries)
            if size > len(data) or any(entry.compress_type for entry in entries):
                raise ValueError("packed")
            if comment.startswith(SEAL.split()[0]) and not comment.startswith(SEAL):
                raise ValueError("another version of this program saved it")
            length = len(seal(b""))
            sealed = data[-length:] == seal(data[:-length])
            bare &= data[-22:-18] == b"PK\5\6" and data[-2:] == b"\0\0"  # ends uncommented
            if not sealed and (not bare or archive.testzip()):
                raise ValueError("its checksum does not match")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen kinds; those of this program and the system have a reason
        known = isinstance(error, OSError | ValueError) and len(str(error)) < 80
        reason = str(error) if known else type(error).__name__
        raise UserError(f"{path} is not a {kind}: {reason}") from None


def env_flag(config: Config) -> str:
    """The --env-id that a command for this game needs, with a space before: none for Breakout."""
    return "" if config.env_id == Config().env_id else f" --env-id={config.env_id}"


def find_model(name: str, config: Config) -> Path:
    """A model's file: `name` as it stands, or in models/ here, or in models/ beside this script."""
    shipped = Path(__file__).resolve().parent / "models"
    for path in (Path(name), Path("models") / name, shipped / name):
        if os.path.isfile(path):  # False, not an error, for a name that no file can have
            return path
    raise UserError(
        f"no model {name} here or in models/; `python3 {Path(sys.argv[0]).name} "
        f"--total-timesteps=3000{env_flag(config)}` trains one and says how to watch it"
    )


@torch.no_grad()
def load_agent(path: Path, game: Game) -> Agent:
    """Read weights that this script saved, or a bare state_dict with the usual names.

    Names that the network does not know are let be. Nothing in the file is run. Raises UserError
    for a file that is no model, or of another game.
    """
    content = read_file(path, "model", bare=True)
    about = content if isinstance(content, dict) and "weights" in content else {}
    weights = about.get("weights", content)
    tensors = weights.values() if isinstance(weights, dict) else [None]
    if not all(isinstance(x, Tensor) and not x.is_nested for x in tensors):
        raise UserError(f"{path} is not a model: it holds no weights by name")
    if about.get("game", game.rom) != game.rom:
        hint = f"--env-id={about.get('env_id')}"
        raise UserError(f"{path} plays {about['game']}, not {game.rom}: add {hint}")
    agent = Agent(len(action_names(game.rom)))
    for name, tensor in agent.state_dict().items():
        found, wanted = weights.get(name), tuple(tensor.shape)
        shape = "missing" if found is None else tuple(found.shape)
        if shape != wanted:
            raise UserError(f"{path} does not fit {game.rom}: {name} is {shape}, not {wanted}")
        plain = found.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        plain &= found.layout == torch.strided and not found.is_meta
        if not plain or not tensor.copy_(found).isfinite().all():
            raise UserError(f"{path} is not a model: not all in {name} are numbers")
    white = torch.full((1, FRAME_STACK, FRAME_SIZE, FRAME_SIZE), 255, dtype=torch.uint8)
    if not all(output.isfinite().all() for output in agent(white)):
        raise UserError(f"{path} is not a model: it computes with numbers that are too large")
    agent.patience = about.get("patience", 0.0)
    if not isinstance(agent.patience, float) or not 0 <= agent.patience < math.inf:
        raise UserError(f"{path} is not a model: patience is {agent.patience!r:.99}")
    return agent


def say(text: str) -> None:
    """Print a line. A terminal that was closed, or a broken pipe, ends no training."""
    if place().rank > 0:
        return
    try:
        tqdm.write(text)  # above the bar
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def counted(number: int, noun: str) -> str:
    """1 game, 2 games."""
    return f"{number:,} {noun}" + "s" * (number != 1)


class Progress:
    """A bar on a terminal; in a file or a pipe a plain line at first, then twice a minute."""

    def __init__(self, total: int | None, unit: str, initial: int = 0) -> None:
        self.bar = tqdm(
            total=total, initial=initial, unit=f" {unit}s", unit_scale=True, dynamic_ncols=True,
            disable=None,  # None: where standard error is no terminal
        )  # fmt: skip
        self.total, self.unit, self.initial, self.done = total, unit, initial, initial
        self.started, self.next_line = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Since the start, by a clock that nobody can set back."""
        return max(time.monotonic() - self.started, 1e-9)

    @property
    def speed(self) -> float:
        """Units a second since the start."""
        return (self.done - self.initial) / self.seconds

    def advance(self, units: int, text: str) -> None:
        """So many more are done; `text` says what came of it."""
        self.done += units
        with contextlib.suppress(OSError):  # the terminal was closed
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(units)
        if self.bar.disable and self.seconds >= self.next_line:
            self.next_line = self.seconds + 30
            line = f"{counted(self.done, self.unit)}, {self.speed:,.4g} a second"
            if self.total:
                line += f", {timedelta(seconds=round((self.total - self.done) / self.speed))} left"
            say(f"{line}; {text}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        with contextlib.suppress(OSError):
            self.bar.close()


class Logger:
    """Takes every finished game and every update's metrics; feeds TensorBoard and the progress.

    What cannot be written, since the disk is full, is kept until it can; and a checkpoint has what
    was not yet written when it was made.
    """

    FLUSH, RETRY = 10, 60  # seconds between two attempts, and after one that failed

    def __init__(
        self, folder: Path, config: Config, state: TrainState, pending: Iterable[tuple] = ()
    ) -> None:
        self.folder, self.config, self.writer = folder, config, None
        # tag, value, step, wall time
        self.pending: list[tuple[str, float, int, float]] = list(pending)
        first = min((step for _, _, step, _ in self.pending), default=state.global_step + 1)
        self.due, self.next_step = 0.0, first
        self.progress = Progress(config.num_updates * config.batch_size, "step", state.global_step)

    def open_writer(self) -> Any:
        """A new file of curves. From its first step on TensorBoard ignores the older ones."""
        # Imported here, since it takes a second, which playing can do without.
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # If the thread that writes dies it prints a traceback: not here, `flush` says it in a line.
        hook = threading.__excepthook__
        threading.excepthook = lambda x: "AsyncWriter" in repr(x.thread) or hook(x)
        # Files are read in the order of the seconds in their names. The clock may have been set
        # back: so older files with later names get earlier ones.
        now, old = int(time.time()), sorted(self.folder.glob("events.out.tfevents.*"), reverse=True)
        for seconds, path in enumerate(old, 1):
            then = path.name.split(".")[3]
            if then.isdecimal() and int(then) > now - seconds:
                path.rename(path.with_name(path.name.replace(then, f"{now - seconds:010}", 1)))
        writer = SummaryWriter(str(self.folder), purge_step=self.next_step)
        knobs = {k: str(v) if v is None else v for k, v in dataclasses.asdict(self.config).items()}
        rows = "".join(f"|{name}|{value}|\n" for name, value in knobs.items())
        writer.add_text("config", "|knob|value|\n|-|-|\n" + rows, self.next_step)
        for summary in hparams(knobs, {"charts/mean_return_100": 0.0}):
            writer.file_writer.add_summary(summary)  # add_hparams would open a second run
        return writer

    def flush(self) -> bool:
        """Write what is pending. Returns whether that went well; if not, it says so, and the next
        attempt is a new file's: one that broke off cannot be read beyond that point.
        """
        try:
            if not self.folder.is_dir():
                raise FileNotFoundError("it is gone")
            self.writer = self.writer or self.open_writer()
            for tag, value, step, when in self.pending:
                self.writer.add_scalar(tag, value, step, when)
            self.writer.flush()
            self.next_step = max([self.next_step, *(step + 1 for _, _, step, _ in self.pending)])
            self.pending.clear()
            self.due = time.monotonic() + self.FLUSH
            return True
        except Exception as error:  # whatever its thread died of
            say(f"could not write curves to {self.folder}/ ({error})")
            with contextlib.suppress(Exception):
                self.writer.close()
            self.writer, self.due = None, time.monotonic() + self.RETRY
            return False

    def log_games(self, state: TrainState, finished: list[tuple[int, FinishedGame]]) -> None:
        """Count the games that ended in the last rollout, each at the step it ended at."""
        start, now = state.global_step - self.config.batch_size, time.time()
        for t, game in finished:
            state.games += 1
            state.scores.append(game.score)  # `mean_return` follows
            step = start + t * self.config.num_envs
            self.pending += [
                ("charts/episodic_return", game.score, step, now),
                ("charts/episodic_length", game.length, step, now),
                ("charts/mean_return_100", state.mean_return, step, now),
            ]

    def log_update(self, state: TrainState, learning_rate: float, losses: dict[str, float]) -> None:
        """What an update brought that has just ended."""
        text = "no game is over yet"
        if state.scores:
            over = counted(len(state.scores), "game")
            # The score comes first: a bar of 80 columns is cut off soon after it.
            text = f"mean score {state.mean_return:.2f}, last {over}"
        steps = state.global_step - self.progress.done
        self.progress.advance(steps, text)
        metrics = {f"losses/{name}": value for name, value in losses.items()}
        metrics |= {"charts/learning_rate": learning_rate, "charts/SPS": self.progress.speed}
        now = time.time()
        self.pending += [(tag, value, state.global_step, now) for tag, value in metrics.items()]
        if time.monotonic() >= self.due:
            self.flush()

    def close(self) -> bool:
        """Write what is not yet written. Returns whether that went well."""
        written = self.flush()
        self.progress.close()
        if self.writer:
            self.writer.close()
        return written


class Checkpoints:
    """Keeps a copy of what the last whole update came to, and writes it every few minutes.

    So whatever happens in the middle of an update, there is a state to go on from. The file before
    the newest stays until the newest is whole.
    """

    NEWEST, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt"
    RETRY = 60  # seconds, after a full disk

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.knobs = folder, dataclasses.asdict(config)
        self.seconds = 60 * config.checkpoint_minutes
        self.due = time.monotonic() + self.seconds
        self.content: dict[str, Any] = {}
        self.models: dict[Path, dict[str, Any]] = {}  # to be written along with it

    def keep(self, state: TrainState, replay: dict[str, Tensor], logger: Logger) -> None:
        """Copy all that a resume needs: 20 MB and N bytes a step to replay, some milliseconds."""
        others = {"config": self.knobs, "replay": replay, "pending": list(logger.pending)}
        self.content = state.state_dict() | others

    def keep_model(self, path: Path) -> None:
        """Have the next `write` also write the model that is kept now to `path`."""
        weights = {name: x.cpu().contiguous() for name, x in self.content["weights"].items()}
        names = ("game", "env_id", "actions", "frame_stack", "seed", "patience", "mean_return")
        about = {name: self.content[name] for name in names}
        self.models[path] = {"weights": weights, "steps": self.content["global_step"], **about}

    def write(self) -> bool:
        """Write what is kept; say so if that fails. Returns whether all went well."""
        files = [(self.folder / self.NEWEST, self.content, self.folder / self.PREVIOUS)]
        files += [(path, model, None) for path, model in self.models.items()]
        self.due = time.monotonic() + self.seconds
        saved = True
        for path, content, keep in files:
            try:
                save_file(content, path, keep)
                self.models.pop(path, None)
            except OSError as error:
                say(f"could not save {path} ({error.strerror})")
                self.due = time.monotonic() + min(self.seconds, self.RETRY)
                saved = False
        return saved

    @classmethod
    def read(cls, folder: Path) -> tuple[dict[str, Any], str]:
        """The newest checkpoint in `folder` that is whole, and what is wrong with a newer one.

        Raises UserError where there is none.
        """
        problem = ""
        for path in filter(Path.exists, (folder / cls.NEWEST, folder / cls.PREVIOUS)):
            try:
                content = read_file(path, "checkpoint")
                if isinstance(content, dict) and "replay" in content:
                    return content, problem
                raise UserError(f"{path} is not a checkpoint")
            except UserError as error:
                problem = problem or str(error)
        raise UserError(problem or f"{folder}/ holds no checkpoint to go on from")

    @classmethod
    def clear(cls, folder: Path, problem: str) -> None:
        """Set a damaged newest checkpoint aside, and remove drafts of saves that were killed."""
        if problem:
            say(f"{problem}; going on from {cls.PREVIOUS}")
            os.replace(folder / cls.NEWEST, folder / cls.DAMAGED)
        for draft in folder.glob(".*.tmp"):
            draft.unlink()


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The device called `name`. Raises UserError for one that is not there."""
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available() and place().size == 1  # gloo cannot send from it
    there = [device for device, found in (("cuda", cuda), ("mps", mps), ("cpu", True)) if found]
    if name != "auto" and name not in there:
        raise UserError(f"--device={name} is not there; this machine has {' and '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """What the large layers compute in: the dtype `name`, or what suits the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        # An Intel processor without AMX trains 1.1 times as long in bfloat16 as in float32.
        avx512 = has.get("avx512_bf16", False) and "Intel" not in has.get("cpu_name", "")
        fast = avx512 or has.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def pick_compiler(wanted: bool | None, device: torch.device) -> Callable[[Any], Any]:
    """What compiles `act` and `minibatch_loss`, or leaves them as they are. Raises UserError.

    On a GPU each becomes a graph of kernels that is launched at once. On a CPU compiling gained a
    tenth in bfloat16, lost a third in float32, takes a minute, and stalls beside a busy process: it
    has to be asked for.
    """
    if not (device.type == "cuda" if wanted is None else wanted):
        return lambda function: function
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # a dozen kinds; most often there is no C++ compiler, or no Triton
        if wanted:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"--compile=yes does not work on this machine: {reason}") from None
        return lambda function: function
    warnings.filterwarnings("ignore", "TensorFloat32")  # it is advised; the heads stay exact

    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True, dynamic=False)

        def call(*args: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # what it returned last may be overwritten
            return compiled(*args)

        return call

    say("compiling; it takes a minute at first")
    return compiler


def check_writable(folder: Path) -> None:
    """Raise UserError unless `folder` can be written to, or made."""
    nearest = folder.absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}/: {nearest} is no folder that may be written to")


class Run(NamedTuple):
    """Where a run lies, and what it had come to when its last checkpoint was written."""

    folder: Path
    saved: dict[str, Any]  # empty for a new run


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else may train this run until we end, however we end. Raises UserError."""
    path = folder / ".lock"
    was_there = path.exists()
    try:
        with FileLock(path, timeout=0, is_singleton=True):  # `resume` and `train` both take it
            try:
                yield
            except UserError:
                if not was_there:  # a mistake writes nothing
                    with contextlib.suppress(OSError):  # Windows removes it by itself
                        path.unlink()
                raise
    except Timeout:
        raise UserError(f"{folder}/ is being trained by another process") from None


def new_run(env_id: str, seed: int) -> Run:
    """runs/<env>__<seed>__<time>; a second run in the same second gets a number behind it."""
    name = f"{env_id.replace('/', '-')}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return Run(folder, {})


def find_run(name: str) -> Path:
    """The folder of the run `name`: a path, a name in runs/, or latest. Raises UserError."""
    folders = [Path(name), Path("runs") / name] if name else []
    if name == "latest":
        saved = []
        for path in Path("runs").glob("*/checkpoint*.pt"):
            with contextlib.suppress(OSError):  # it is being renamed
                saved.append((path.stat().st_mtime, path.parent))
        folders = [folder for _, folder in sorted(saved, reverse=True)]
    for folder in folders:
        if os.path.isdir(folder):  # False, not an error, for a name that no folder can have
            return folder
    raise UserError(f"--resume={name}: there is no such run; they lie in runs/")


def saved_best(folder: Path) -> float:
    """The mean score of best.mdl. A checkpoint's may be higher: a kill may come between the two."""
    try:
        return float(read_file(folder / "best.mdl", "model")["mean_return"])
    except (UserError, KeyError, TypeError, ValueError):
        return -math.inf


# What may differ when a run is resumed. Any other knob would make it another run.
RESUME_KNOBS = ("total_timesteps", "checkpoint_minutes", "device", "compile")


def resumed_config(given: dict[str, Any], knobs: dict[str, Any]) -> Config:
    """A run's `knobs`, with those typed, `given`, in their place. Raises UserError for one that may
    not differ.
    """
    knobs = {"life_cost": 0.0} | knobs  # what runs had before there was that flag
    for name, value in given.items():
        had = knobs.get(name, getattr(Config, name))  # runs of an older version lack new knobs
        if name not in RESUME_KNOBS and value != had:
            flag = f"--{name.replace('_', '-')}"
            had = {"": "none", None: "its default"}.get(had, had)
            raise UserError(f"{flag}={value} would make it another run: it has {had}")
    total = knobs["total_timesteps"]
    if given.get("total_timesteps", total) < total:
        raise UserError(f"--total-timesteps can only be raised: it is {total}")
    return Config(**knobs | given)


def make_state(
    config: Config, game: Game, device: torch.device, resumed: bool = False
) -> TrainState:
    """A run at its start; --model-filename gives the weights, else the seed draws them."""
    torch.manual_seed(config.seed)
    if config.model_filename == "random":
        raise UserError("--model-filename=random plays, but cannot be trained: leave it out")
    if config.model_filename and not resumed:
        agent = load_agent(find_model(config.model_filename, config), game)
        for parameter in agent.actor.parameters():
            parameter.data *= config.sharpen
    else:
        agent = Agent(len(action_names(game.rom)))
    agent.patience = agent.patience if config.patience is None else float(config.patience)
    agent.to(device)
    agent.precision = pick_precision(config.precision, device)
    # fused: one pass over the 1.7 M parameters instead of a dozen, 0.8 ms a step for 3.9 on a CPU.
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(agent.parameters(), config.learning_rate, eps=1e-5, fused=fused)
    about = {"game": game.rom, "env_id": config.env_id, "actions": action_names(game.rom)}
    about |= {"frame_stack": FRAME_STACK, "seed": config.seed}
    generator = torch.Generator(device).manual_seed(config.seed)
    compiler = pick_compiler(config.compile, device)
    return TrainState(agent, optimizer, generator, about, compiler(act), compiler(minibatch_loss))


WATCHDOG_SECONDS = 30  # a step takes milliseconds


@contextlib.contextmanager
def watchdog(games: VectorGames, last_deed: Callable[[], Any] = lambda: None) -> Iterator[None]:
    """Ends the program when a thread of the emulator died, which the others wait for in silence."""
    done = threading.Event()

    def watch() -> None:
        seen, looks = 0, 0  # looks are counted, not time: a machine may sleep in between
        while not done.wait(1):
            pulse = games.pulse
            looks = looks + 1 if pulse % 2 and pulse == seen else 0
            seen = pulse
            if looks >= WATCHDOG_SECONDS:
                try:
                    last_deed()
                    os.write(2, f"the emulator has not answered for {looks} seconds\n".encode())
                finally:  # the main thread waits inside the emulator, where nothing reaches it
                    os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def bring_back(state: TrainState, games: ReplayableGames, run: Run) -> np.ndarray:
    """Go on where `run` was saved. Returns its games' frames. Raises UserError."""
    try:
        state.load_state_dict(run.saved)
        say(f"{run.folder}/ at step {state.global_step:,}; bringing the games back ...")
        with watchdog(games.games):
            return games.load_state_dict(run.saved["replay"])
    except Exception as error:
        raise UserError(f"{run.folder}/ holds no checkpoint of this run: {error}") from None


def set_up(config: Config, run: Run | None) -> tuple[TrainState, ReplayableGames, Rollout, Run]:
    """All that training needs, new or as the checkpoint of `run` has it. Raises UserError."""
    game, device = find_game(config), pick_device(config.device)
    num_envs, left = divmod(config.num_envs, place().size)
    if left or num_envs * config.num_steps % config.num_minibatches:
        raise UserError(
            f"{config.num_envs} games x {config.num_steps} steps cannot be split evenly over "
            f"{place().size} processes and then over --num-minibatches={config.num_minibatches}"
        )
    longest = config.replay_steps + config.max_frames // FRAME_SKIP  # between two seeds of a game
    room = LARGEST_FILE * 4 // 5  # a checkpoint has a byte for each step of each game
    if config.num_envs * longest > room:
        raise UserError(
            f"--num-envs x (--replay-steps + --max-frames / {FRAME_SKIP}) must be {room:,} or "
            "less, else a checkpoint grows too large to be read"
        )
    for name in ("runs", "models"):
        check_writable(Path(name))
    state = make_state(config, game, device, resumed=bool(run))
    try:
        rollout = make_rollout(config.num_steps, num_envs, device)
    except RuntimeError:
        gigabytes = config.batch_size * FRAME_STACK * FRAME_SIZE**2 / 1e9
        raise UserError(f"a batch of {gigabytes:,.0f} GB has no room in memory") from None
    games = make_vector_env(game, num_envs, config.multithreading)
    games = ReplayableGames(games, config.replay_steps)
    if run:
        frames = bring_back(state, games, run)
    else:
        frames = games.reset(config.seed)
        run = broadcast(new_run(config.env_id, config.seed) if place().rank == 0 else None)
    if place().size > 1:  # another processor may have drawn other weights from the seed
        for tensor in state.agent.state_dict().values():
            dist.broadcast(tensor, 0)
    rollout.frames[-1] = to_blocks(torch.from_numpy(frames))
    Path("models").mkdir(exist_ok=True)
    where = f"{device} x {place().size}" if place().size > 1 else f"{device}"
    say(f"{config.env_id}, {config.num_envs} games, on {where}; curves in {run.folder}/")
    return state, games, rollout, run


def close_run(config: Config, run: Run, checkpoints: Checkpoints, logger: Logger) -> bool:
    """Save what is kept; say what was learnt, how fast, where it lies, and which commands show it
    and go on. Returns whether all was saved.
    """
    kept, progress = checkpoints.content, logger.progress
    trained = kept["update"] == config.num_updates
    steps = config.total_timesteps if trained else kept["global_step"]
    path = Path("models") / f"ai_{kept['game']}_game{steps}.mdl"
    for target in (run.folder / "last.mdl", path):
        checkpoints.keep_model(target)
    saved = checkpoints.write()
    saved &= logger.close()

    verb = "Trained" if trained else "Stopped after"
    text = f"\n{verb} {kept['global_step']:,} steps, {counted(kept['games'], 'game')}, in "
    text += f"{timedelta(seconds=round(progress.seconds))}: {progress.speed:,.0f} steps/s"
    if run.saved:
        text += f", resumed at {run.saved['global_step']:,}"
        nothing_left = trained and progress.done == progress.initial
        text += ": nothing was left to train" if nothing_left else ""
    say(text)
    if kept["scores"]:
        best = kept["best_return"]
        best = f", at best {best:.2f}" if math.isfinite(best) else ""
        over = counted(len(kept["scores"]), "game")
        say(f"mean score of the last {over} {kept['mean_return']:.2f}{best}")
    # With slashes: Windows takes them too, while its cmd knows no quotes like those of `quote`.
    script, folder, runs = (
        shlex.quote(x.as_posix()) for x in (Path(sys.argv[0]), run.folder, run.folder.parent)
    )
    say(f"  curves   tensorboard --logdir {runs}")
    if path not in checkpoints.models:  # else it could not be saved
        say(f"  weights  {path}")
        say(f'  watch    python3 {script} --run=1 --model-filename="{path.name}"{env_flag(config)}')
    more = f" --total-timesteps={2 * kept['global_step']}" if trained else ""
    say(f"  go on    python3 {script} --resume={folder}{more}")
    return saved


def updates(
    config: Config, state: TrainState, games: ReplayableGames, rollout: Rollout, stop: StopRequest
) -> Iterator[tuple[float, list[tuple[int, FinishedGame]], dict[str, float]]]:
    """Play and learn, again and again, until the last update or `stop`: the whole of PPO.

    Yields after each update, in every process: learning rate, games that ended (those of all
    processes, in the first alone), losses.
    """
    while state.update < config.num_updates and not stop.agreed():
        learning_rate = anneal(config, state)
        finished = gather_processes(collect_rollout(state, games, rollout, stop))
        losses = update(state, rollout, config, stop)
        if not losses:  # stopped in its midst: a resume begins it anew
            return
        state.update += 1
        state.global_step += config.batch_size
        finished = sorted(itertools.chain(*finished), key=lambda x: x[0])
        yield learning_rate, finished, losses


def train(config: Config, run: Run | None = None) -> None:
    """Train an agent, or go on with a `run`."""
    state, games, rollout, run = set_up(config, run)
    replay = games.state_dict()
    if place().rank > 0:
        with StopRequest() as stop, watchdog(games.games):
            for _ in updates(config, state, games, rollout, stop):
                games.state_dict()
        return
    logger = Logger(run.folder, config, state, run.saved.get("pending", ()))
    checkpoints = Checkpoints(run.folder, config)
    checkpoints.keep(state, replay, logger)
    with locked(run.folder), StopRequest() as stop, watchdog(games.games, checkpoints.write):
        checkpoints.write()
        try:
            for learning_rate, finished, losses in updates(config, state, games, rollout, stop):
                logger.log_games(state, finished)
                logger.log_update(state, learning_rate, losses)
                if is_best := state.games >= 100 and state.mean_return > state.best_return:
                    state.best_return = state.mean_return
                checkpoints.keep(state, games.state_dict(), logger)
                if is_best:
                    checkpoints.keep_model(run.folder / "best.mdl")
                if time.monotonic() >= checkpoints.due:
                    checkpoints.write()
        finally:  # whatever ended it, what was learnt is kept
            saved = close_run(config, run, checkpoints, logger)
    if not saved:
        raise RunError(f"not all was saved: make room, then --resume={run.folder} goes on")


def resume(given: dict[str, Any]) -> None:
    """Go on with the run of --resume; `given` are the knobs that were typed. Raises UserError."""
    name = given.pop("resume")
    if place().rank > 0:
        train(*broadcast(None))
        return
    folder = find_run(name)
    check_writable(folder)
    with locked(folder):
        saved, problem = Checkpoints.read(folder)
        try:
            config = resumed_config(given, saved["config"])
            pick_device(config.device)  # refused before a file is touched
            Checkpoints.clear(folder, problem)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{folder}/ holds no checkpoint of this program: {error!r}") from None
        saved["best_return"] = saved_best(folder)
        train(*broadcast((config, Run(folder, saved))))


# --------------------------------------------------------------------------------------------------
# Playing
# --------------------------------------------------------------------------------------------------

EMULATOR_FPS = 60
RANDOM_SCORE, HUMAN_SCORE = 1.7, 31.8  # on Breakout: Mnih et al. 2015, extended data table 2


def load_player(config: Config, game: Game) -> tuple[Agent, Path]:
    """The agent to play with, on its device, and its file; random has models/random_<game>."""
    device = pick_device(config.device)
    if config.model_filename == "random":  # zeros think all actions equally good
        agent = Agent(len(action_names(game.rom))).to(device)
        for parameter in agent.parameters():
            nn.init.zeros_(parameter)
        return agent, Path("models") / f"random_{game.rom}"
    path = find_model(config.model_filename or f"ai_{game.rom}_game.mdl", config)
    agent = load_agent(path, game).to(device)
    agent.patience = agent.patience if config.patience is None else config.patience
    return agent, path


class Moment(NamedTuple):
    """One step of N games: what the agent saw, thought and did, and what came of it."""

    frames: np.ndarray  # (N, 4, 84, 84) uint8, before the step
    probs: np.ndarray  # (N, A) float32
    values: np.ndarray  # (N,) float32
    actions: np.ndarray  # (N,) int64
    result: StepResult


@torch.no_grad()
def run_episodes(
    agent: nn.Module, games: NativeGames | WrappedGames, config: Config, seed: int
) -> Iterator[Moment]:
    """Play for ever, all N games at once: the one game loop, for watching, recording, measuring."""
    device = agent.actor.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    frames = games.reset(seed)
    while True:
        seen = torch.from_numpy(frames).to(device).contiguous(memory_format=torch.channels_last)
        temperatures = policy_temperatures(games.idle, agent.patience).to(device)
        logits, values = agent(seen)
        logits = logits / temperatures[:, None]
        noise = 0 if config.greedy else gumbel_noise(logits.shape, generator)
        drawn = (logits + noise).argmax(-1)
        actions, probs = drawn.cpu().numpy(), logits.softmax(-1).cpu().numpy()
        result = games.step(actions)
        yield Moment(frames, probs, values.cpu().numpy(), actions, result)
        frames = result.frames


def print_scores(scores: np.ndarray, interval: float | None, rom: str) -> None:
    """Mean, spread and histogram of `scores`, (games,) float; an average alone hides two humps."""
    mean = f"mean {scores.mean():,.2f}"
    mean += "" if interval is None else f" +- {interval:,.2f} (95 %)"
    span = f"from {scores.min():,.10g} to {scores.max():,.10g}"
    print(f"\n{counted(len(scores), 'game')}: {mean}, median {np.median(scores):,.10g}, {span}")
    width = max(1, math.ceil((np.ptp(scores) + 1) / 12))
    edges = np.arange(scores.min(), scores.max() + width + 1, width)
    counts, _ = np.histogram(scores, edges)
    for count, low in zip(counts, edges):
        bar = "█" * math.ceil(40 * count / counts.max())
        span = f"{low:,.10g}" + ("" if width == 1 else f" to {low + width - 1:,.10g}")
        print(f"  {span:>14}  {count:5}  {bar}")
    if rom == "breakout":
        for score, name in ((432, "one wall"), (864, "both walls, the most there is")):
            share = 100 * (scores >= score).mean()
            print(f"  {share:.0f} % of the games reached {score}, {name}")
        print(f"  random play {RANDOM_SCORE}, a human {HUMAN_SCORE} (Mnih et al. 2015)")


def evaluate(config: Config) -> Path:
    """Play whole games, many at once, print the true scores and write them as JSON.

    Which games count is settled before the first: each slot plays its share of them. The first N
    that end would be too many short ones, whose scores are low.
    """
    game = find_game(config)
    slots = min(config.evaluate, 32)
    agent, model = load_player(config, game)
    report = model.with_suffix(".evaluation.json")
    check_writable(report.parent)
    games = make_vector_env(game, slots, config.multithreading)

    shares = [config.evaluate // slots + (i < config.evaluate % slots) for i in range(slots)]
    played: list[FinishedGame] = []
    progress = Progress(config.evaluate, "game")
    with watchdog(games):
        for moment in run_episodes(agent, games, config, config.seed):
            for one in moment.result.finished:
                if shares[one.slot]:
                    shares[one.slot] -= 1
                    played.append(one)
                    progress.advance(1, f"mean {np.mean([one.score for one in played]):.2f}")
            if not any(shares):
                break
    progress.close()

    scores = np.array([one.score for one in played])
    # Half the width of the mean's 95 % interval; by the normal approximation, so none for one game.
    interval = 1.96 * scores.std(ddof=1) / math.sqrt(len(scores)) if len(scores) > 1 else None
    print_scores(scores, interval, game.rom)
    about = {name: getattr(config, name) for name in ("env_id", "seed", "greedy", "max_frames")}
    about |= {"model": model.name, "patience": agent.patience}
    about |= {"sticky_actions": game.sticky, "episodes": len(scores)}
    about |= {"mean": scores.mean(), "interval_95": interval, "median": np.median(scores)}
    about |= {"scores": scores.tolist(), "lengths": [one.length for one in played]}
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(about, indent=1) + "\n")
    print(f"  written to {report}")
    return report


# Blue, green, red, as OpenCV has them.
PAPER, PLATE = (26, 22, 20), (48, 42, 38)
INK, DIM, ACCENT = (240, 240, 240), (150, 145, 140), (60, 150, 255)
FONT = cv2.FontFace("sans")  # built into OpenCV


def draw_text(
    image: np.ndarray, text: str, x: float, y: float, size: float, color: tuple = INK,
    weight: int = 400, right: bool = False,
) -> None:  # fmt: skip
    """Draw `text` into `image`; (x, y) is the left end of its base line, or the `right` one."""
    size = round(size)
    if right:
        x -= cv2.getTextSize((0, 0), text, (0, 0), FONT, size, weight)[2]
    cv2.putText(image, text, (round(x), round(y)), color, FONT, size, weight)


class View:
    """The game, its pixels sharp, and beside it a panel of what the agent sees and thinks.

    Lengths are in units of one Atari pixel, `scale` pixels of the screen: 3 fits a laptop.
    """

    WIDTH = 140  # of the panel
    HISTORY = 150  # steps in the curve of values: ten seconds

    def __init__(self, action_names: list[str], scale: int, panel: bool) -> None:
        self.action_names, self.scale, self.panel = action_names, scale, panel
        self.values: deque[float] = deque(maxlen=self.HISTORY)
        self.games, self.total = 0, 0.0

    def observe(self, moment: Moment, score: float, height: int) -> None:
        """Take in a step of game 0 and draw the panel, `height` Atari pixels high.

        Frames, probabilities and value are those that led to the step, score and lives its result.
        """
        self.values.append(float(moment.values[0]))
        self.canvas = np.full((height * self.scale, self.WIDTH * self.scale, 3), PAPER, np.uint8)
        self.draw_numbers(score, int(moment.result.lives[0]))
        self.draw_frames(moment.frames[0])
        self.draw_actions(moment.probs[0], int(moment.actions[0]))
        self.draw_values()
        for finished in moment.result.finished:
            self.games, self.total = self.games + 1, self.total + finished.score

    def text(self, text: str, x: float, y: float, size: float, **look: Any) -> None:
        """Write into the panel; lengths in Atari pixels."""
        draw_text(self.canvas, text, x * self.scale, y * self.scale, size * self.scale, **look)

    def box(self, x: float, y: float, width: float, height: float, color: tuple) -> None:
        """Fill a box of the panel; lengths in Atari pixels."""
        left, top, right, bottom = (round(v * self.scale) for v in (x, y, x + width, y + height))
        self.canvas[top:bottom, left:right] = color

    def draw_numbers(self, score: float, lives: int) -> None:
        """True score, lives, number of the game, mean of those before it."""
        mean = f"{self.total / self.games:.1f}" if self.games else "-"
        cells = {"score": f"{score:.10g}", "lives": lives, "game": self.games + 1, "mean": mean}
        for x, (label, value) in zip((8, 50, 78, 106), cells.items()):
            self.text(label, x, 13, 5.5, color=DIM)
            color = ACCENT if label == "score" else INK
            self.text(str(value), x, 27, 12, weight=600, color=color)

    def draw_frames(self, frames: np.ndarray) -> None:
        """The four grey frames that the network sees, (4, 84, 84) uint8, newest on the right."""
        self.text("what the network sees", 8, 41, 5.5, color=DIM)
        size = 28 * self.scale
        for i, frame in enumerate(frames):
            small = cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)
            left, top = round((8 + 32 * i) * self.scale), 45 * self.scale
            self.canvas[top : top + size, left : left + size] = small[..., None]

    def draw_actions(self, probs: np.ndarray, action: int) -> None:
        """A bar an action, as long as it is likely; the one taken is lit."""
        self.text("what it wants to do", 8, 86, 5.5, color=DIM)
        row = min(9.0, 54 / len(probs))
        for i, (name, prob) in enumerate(zip(self.action_names, probs)):
            y, color = 90 + i * row, ACCENT if i == action else DIM
            self.text(name, 8, y + 0.72 * row, 0.6 * row, color=INK if i == action else DIM)
            self.box(54, y + 0.15 * row, 58, 0.7 * row, PLATE)
            self.box(54, y + 0.15 * row, 58 * prob, 0.7 * row, color)
            self.text(f"{prob:.0%}", 132, y + 0.72 * row, 0.6 * row, color=INK, right=True)

    def draw_values(self) -> None:
        """The value estimate over the last ten seconds: how much reward the agent expects."""
        bottom = self.canvas.shape[0] / self.scale - 8
        self.text("how much it expects to win", 8, 157, 5.5, color=DIM)
        self.text(f"{self.values[-1]:.2f}", 132, 157, 5.5, color=ACCENT, right=True, weight=600)
        self.box(8, 161, 124, bottom - 161, PLATE)
        low, high = min(0.0, *self.values), max(1.0, *self.values) * 1.1
        x = 8 + 124 * (np.arange(len(self.values)) + self.HISTORY - len(self.values)) / self.HISTORY
        y = bottom - (bottom - 161) * (np.array(self.values) - low) / (high - low)
        points = np.rint(np.stack([x, y], -1) * self.scale * 16).astype(np.int32)
        cv2.polylines(self.canvas, [points], False, ACCENT, round(self.scale / 2), cv2.LINE_AA, 4)

    def picture(self, rgb: np.ndarray) -> np.ndarray:
        """An emulator frame, RGB, becomes the whole picture, (height, width, 3) uint8, BGR."""
        game = rgb[..., ::-1].repeat(self.scale, 0).repeat(self.scale, 1)
        return np.hstack([game, self.canvas]) if self.panel else game


class Recorder:
    """Writes 60 pictures a second to an .mp4, or every fourth of them to a .gif.

    Until it is whole the file has another name. H.264 with 4:2:0 colour plays in every browser.
    """

    GIF_SECONDS = 40  # it is put together in memory: 600 pictures, up to half a megabyte each

    def __init__(self, path: Path) -> None:
        self.path, self.draft = path, path.with_name(f".{path.stem}.part{path.suffix}")
        self.is_gif = path.suffix.lower() == ".gif"
        self.count = 0
        self.pngs: list[np.ndarray] = []  # pictures of the GIF, packed: 8 kB instead of 750
        self.video: Any = None

    @property
    def full(self) -> bool:
        """A GIF holds no more."""
        return self.is_gif and self.count >= self.GIF_SECONDS * EMULATOR_FPS

    def add(self, picture: np.ndarray) -> None:
        """The next emulator frame's picture, (height, width, 3) uint8, BGR."""
        if not self.is_gif:
            self.add_video(picture)
        elif not self.full and self.count % FRAME_SKIP == 0:
            self.pngs.append(cv2.imencode(".png", picture)[1])
        self.count += 1

    def add_video(self, picture: np.ndarray) -> None:
        """One frame more of the .mp4; the first says how large all are."""
        import av  # takes a tenth of a second, which only an .mp4 needs

        if self.video is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            video = av.open(str(self.draft), "w")
            options = {"preset": "veryfast", "crf": "20"}
            self.stream = video.add_stream("libx264", rate=EMULATOR_FPS, options=options)
            self.stream.height, self.stream.width = picture.shape[:2]
            self.stream.pix_fmt = "yuv420p"
            video.start_encoding()  # fails cleanly on a full disk, where the next call would crash
            self.video = video
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="bgr24")
        self.video.mux(self.stream.encode(frame))

    def write_gif(self) -> None:
        """All pictures in one palette, so that what stands still costs nothing."""
        from PIL import Image

        def unpack(png: np.ndarray) -> np.ndarray:
            return cv2.imdecode(png, cv2.IMREAD_COLOR)[..., ::-1]

        some = np.vstack([unpack(png) for png in self.pngs[:: len(self.pngs) // 16 + 1]])
        palette = Image.fromarray(some).quantize(128, dither=Image.Dither.NONE)
        first, *others = (
            Image.fromarray(unpack(png)).quantize(palette=palette, dither=Image.Dither.NONE)
            for png in self.pngs
        )
        # A step is 6.67 hundredths of a second, in which a GIF counts: 7, 6 and 7 by turns.
        ends = np.rint(np.arange(len(self.pngs) + 1) * FRAME_SKIP / EMULATOR_FPS * 100) * 10
        durations = np.diff(ends).astype(int).tolist()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first.save(self.draft, save_all=True, append_images=others, duration=durations, loop=0)

    def close(self) -> str:
        """Finish the file. Returns a line that says what it is."""
        try:
            if not self.count:
                return f"nothing to write to {self.path}"
            if self.is_gif:
                self.write_gif()
            else:
                self.video.mux(self.stream.encode(None))
                self.video.close()
            os.replace(self.draft, self.path)
        finally:  # still there if writing failed: half a film cannot be played
            self.draft.unlink(missing_ok=True)
        seconds = min(self.count / EMULATOR_FPS, self.GIF_SECONDS if self.is_gif else math.inf)
        return f"{self.path}: {seconds:.1f} seconds, {self.path.stat().st_size / 1e6:.2f} MB"


def watch(
    agent: nn.Module, games: WrappedGames, config: Config, seed: int, view: View
) -> Iterator[list[np.ndarray]]:
    """Play on and on for `view`; yields each step's emulator frames, (210, 160, 3) uint8, RGB."""
    for moment in run_episodes(agent, games, config, seed):
        shots = games.env.render()[0]
        if shots:  # without FIRE, the reset after a lost life plays no frames
            view.observe(moment, games.scores[0], len(shots[0]))
            yield shots


def record(config: Config) -> None:
    """Play into --record, without a window: --episodes whole games, or --seconds."""
    game, path = find_game(config), Path(config.record)
    check_writable(path.parent)
    if path.is_dir():
        raise UserError(f"--record={path} is a folder")
    agent, _ = load_player(config, game)
    games = WrappedGames(game, 1, keep_rgb=True)
    recorder = Recorder(path)
    view = View(games.action_names, 2 if recorder.is_gif else 3, config.panel)
    frames = round(config.seconds * EMULATOR_FPS) if config.seconds else None
    skip = round(config.skip * EMULATOR_FPS)
    progress = Progress(skip + frames if frames else None, "frame")
    try:
        for shots in watch(agent, games, config, config.seed, view):
            shots = shots[: skip + frames - progress.done] if frames else shots
            for rgb in shots[max(0, skip - progress.done) :]:
                recorder.add(view.picture(rgb))
            over = counted(view.games, "game")
            progress.advance(len(shots), f"{over} over, score {games.scores[0]:,.10g}")
            enough = recorder.count == frames if frames else view.games == config.episodes
            if enough or recorder.full:
                break
    finally:  # Ctrl-C keeps what was recorded so far
        progress.close()
        print(recorder.close())
    if not recorder.count:
        seconds = progress.done / EMULATOR_FPS
        raise UserError(f"--skip={config.skip:g}: it was over after {seconds:.0f} seconds")
    if recorder.full and not enough:
        print(f"A GIF ends after {recorder.GIF_SECONDS} seconds; an .mp4 has no end.")


def can_open_window() -> bool:
    """Whether there is a display. Without one OpenCV's Qt ends the whole process: a child tries."""
    if sys.platform == "linux" and not (os.getenv("DISPLAY") or os.getenv("WAYLAND_DISPLAY")):
        return False
    probe = "import cv2, os; cv2.namedWindow('probe', cv2.WINDOW_NORMAL); os._exit(0)"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


class Player:
    """The window, and what its keys have set."""

    TITLE = "ai_breakout_game"
    KEYS = (
        ("q  Esc", "quit"), ("space", "pause, go on"), (".", "one step, while paused"),
        ("+  -", "faster, slower"), ("n", "panel on, off"), ("g", "GIF on, off"),
        ("v", "MP4 on, off"), ("r", "new game"), ("h", "these keys"),
    )  # fmt: skip

    def __init__(self, view: View) -> None:
        # Qt looks for fonts of its own and complains; all text here is drawn by OpenCV.
        os.environ["QT_QPA_FONTDIR"] = str(Path(cv2.__file__).parent)
        # OpenCV brings an old libX11-xcb, which loses events beside a newer libX11: beside busy
        # processes one window in ten stayed black. The system's own, found first, loses none.
        with contextlib.suppress(OSError):  # there is no X11, or it is older
            ctypes.CDLL("libX11-xcb.so.1", mode=ctypes.RTLD_GLOBAL)
        self.view, self.speed = view, 1.0
        self.paused = self.help = self.quit = self.restart = False
        self.frames_left = 0  # to show although paused
        self.recorder: Recorder | None = None
        self.recordings = 0
        self.message, self.message_until = "h: keys", time.monotonic() + 4
        self.count, self.due = 0, time.monotonic()
        # Without Qt's bar of tools; a Mac, which has no Qt, keeps to the picture's size only so.
        plain = 0 if sys.platform == "darwin" else cv2.WINDOW_GUI_NORMAL
        cv2.namedWindow(self.TITLE, cv2.WINDOW_AUTOSIZE | plain)

    def say(self, message: str) -> None:
        """Show a line for a few seconds, and print it."""
        print(message, flush=True)
        self.message, self.message_until = message, time.monotonic() + 4

    def toggle_recorder(self, suffix: str) -> None:
        """Start a recording in this folder, or end the one that runs, while the game goes on."""
        if self.recorder is None:
            self.recordings += 1
            name = f"ai_breakout_game-{time.strftime('%Y%m%d-%H%M%S')}-{self.recordings}{suffix}"
            self.recorder = Recorder(Path(name))
            self.say(f"recording {name}")
        elif self.recorder.path.suffix != suffix:
            self.say(f"{self.recorder.path} is being recorded: end it first")
        else:
            # A long GIF takes seconds to put together. The program waits for it when it ends.
            threading.Thread(target=self.finish, args=(self.recorder,)).start()
            self.recorder = None

    def finish(self, recorder: Recorder) -> None:
        """Close `recorder` and say what came of it."""
        try:
            self.say(recorder.close())
        except OSError as error:
            self.say(f"could not write {recorder.path}: {error}")

    def press(self, key: str) -> None:
        """Do what a key asks for."""
        if key in ("q", "\x1b"):
            self.quit = True
        elif key == "r":
            self.restart, self.paused = True, False
        elif key == " ":
            self.paused = not self.paused
        elif key == ".":
            self.frames_left = FRAME_SKIP
        elif key == "h":
            self.help = not self.help
        elif key == "n" and self.recorder is None:  # a film has one size
            self.view.panel = not self.view.panel
        elif key in "gv":
            self.toggle_recorder(".gif" if key == "g" else ".mp4")
        elif key in "+=-":
            self.speed = min(max(self.speed * (0.5 if key == "-" else 2), 0.125), 8.0)
            self.say(f"speed x {self.speed:g}")

    def film(self, picture: np.ndarray) -> None:
        """Add a picture to the recording, which ends where it is full or finds no room."""
        try:
            self.recorder.add(picture)
            if self.recorder.full:
                self.toggle_recorder(".gif")
        except OSError as error:
            self.say(f"could not write {self.recorder.path}: {error}")
            with contextlib.suppress(OSError):
                self.recorder.close()
            self.recorder = None

    def draw(self, picture: np.ndarray) -> None:
        """Show `picture`, and over it the keys, the message, the state."""
        shown = picture.copy()
        if self.help:
            height = 26 * len(self.KEYS) + 20
            shown[60 : 60 + height, 40:440] = shown[60 : 60 + height, 40:440] // 6
            for row, (keys, meaning) in enumerate(self.KEYS):
                draw_text(shown, keys, 60, 90 + 26 * row, 18, color=ACCENT, weight=600)
                draw_text(shown, meaning, 160, 90 + 26 * row, 18)
        state = "paused" if self.paused else ""
        state = self.message if time.monotonic() < self.message_until else state
        draw_text(shown, state, 14, shown.shape[0] - 12, 15, color=INK)
        if self.recorder is not None:
            cv2.circle(shown, (22, 22), 8, (60, 60, 230), cv2.FILLED, cv2.LINE_AA)
        cv2.imshow(self.TITLE, shown)

    def wait(self, seconds: float) -> None:
        """Let the window live for so long, at least a millisecond, and do what its keys ask for."""
        key = cv2.waitKeyEx(max(1, round(seconds * 1000))) & 0xFFFF  # above are Shift and so on
        if 0 < key < 256:  # arrows and the like lie higher; -1, no key, as well
            self.press(chr(key).lower())
        if sys.platform == "darwin":  # no window can be closed there, and one put away is not seen
            return
        try:
            self.quit |= cv2.getWindowProperty(self.TITLE, cv2.WND_PROP_VISIBLE) < 1
        except cv2.error:  # Qt no longer knows a window that was closed
            self.quit = True

    def show(self, rgb: np.ndarray) -> None:
        """One emulator frame, for as long as it lasts; returns at once on quit or a new game."""
        picture = self.view.picture(rgb)
        if self.recorder is not None:
            self.film(picture)
        self.count += 1
        if self.count % max(1, round(self.speed)) == 0:  # faster than the screen: show every nth
            self.draw(picture)
            period = 1 / (EMULATOR_FPS * min(1, self.speed))
            self.due = max(self.due + period, time.monotonic() - 0.1)  # never race after a pause
            self.wait(self.due - time.monotonic())
        self.frames_left = max(0, self.frames_left - 1)
        while self.paused and not (self.frames_left or self.quit or self.restart):
            self.draw(self.view.picture(rgb))
            self.wait(0.03)
            self.due = time.monotonic()


def play(config: Config) -> None:
    """Open a window and let the agent play in it, until it is closed."""
    game = find_game(config)
    agent, _ = load_player(config, game)
    if not can_open_window():
        name = f"ai_breakout_game-{time.strftime('%Y%m%d-%H%M%S')}.mp4"
        print(f"There is no display to open a window on: recording one game to {name} instead.")
        record(dataclasses.replace(config, run=False, record=name))
        return
    games = WrappedGames(game, 1, keep_rgb=True)
    view = View(games.action_names, 3, config.panel)
    player, seed = Player(view), config.seed
    try:
        while not player.quit:
            player.restart = False
            for rgb in itertools.chain.from_iterable(watch(agent, games, config, seed, view)):
                player.show(rgb)
                if player.quit or player.restart:
                    break
            seed += 1
    finally:
        if player.recorder is not None:
            print(player.recorder.close())
        cv2.destroyAllWindows()
    if view.games:
        print(f"{counted(view.games, 'game')}, mean score {view.total / view.games:.2f}")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse_bool(text: str) -> bool:
    """1, true, yes, on, or 0, false, no, off, in any case."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")


class Parser(argparse.ArgumentParser):
    """Leaves a mistake to `main` to print, without the usage, under which it would be buried."""

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """What was typed. In --flag=-- argparse sees no value at all: a mistake."""
        argv = sys.argv[1:] if argv is None else argv
        for word in argv:
            if word.endswith("=--"):
                self.error(f"{word}: expected one argument")
        return super().parse_args(argv)

    def error(self, message: str) -> None:
        """Raise UserError."""
        raise UserError(f"{message}; --help lists all flags")


def build_parser() -> argparse.ArgumentParser:
    """A flag for every field of Config, in groups."""
    parser = Parser(
        description="Learn an Atari game from its pixels with PPO, then watch the agent play it.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=28),
        allow_abbrev=False,
    )
    titles = {"mode": "what to do (none of the first three: train)", "game": "game and machine"}
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        name, flag = field.metadata["group"], f"--{field.name.replace('_', '-')}"
        if name not in groups:
            groups[name] = parser.add_argument_group(titles.get(name, name))
        kind = (get_args(field.type) or (field.type,))[0]  # float of float | None
        metavar = {int: "N", float: "X", str: "NAME"}.get(kind)
        options: dict[str, Any] = {"type": kind, "metavar": metavar}
        default: Any = field.default
        if kind is bool:
            default = {True: "yes", False: "no", None: None}[default]
            options = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "yes|no"}
        elif default is not None and kind is not str:
            default = f"{default:,}" if kind is int else f"{default:g}"
        text = field.metadata["help"].replace("%", "%%")
        text += "" if default in (None, "") else f" (default: {default})"
        groups[name].add_argument(flag, default=argparse.SUPPRESS, help=text, **options)
    return parser


def check_mode(given: dict[str, Any]) -> None:
    """Raise UserError for flags that do nothing in the mode asked for, and for a mistyped mode
    (--record=, --evaluate=0), which would begin a long training.
    """
    if given.get("record") == "":
        raise UserError("--record= needs the name of a file, .gif or .mp4")
    if given.get("evaluate") == 0:
        raise UserError("--evaluate=0 plays no game: leave it out to train")
    if {"episodes", "seconds"} <= given.keys():
        raise UserError("of --episodes and --seconds ask for one")
    modes = {"run": "--run", "evaluate": "--evaluate=N", "record": "--record=NAME"}
    needs = {"playing": list(modes), "recording": ["record"]}
    for field in dataclasses.fields(Config):
        group = field.metadata["group"]
        if field.name in given and group in needs and not any(map(given.get, needs[group])):
            missing = " or ".join(modes[name] for name in needs[group])
            raise UserError(f"--{field.name} is for {group}: add {missing}")
    asked = [mode for mode in modes if given.get(mode)]
    if asked and "resume" in given:
        raise UserError(f"--resume trains: it does not go with --{asked[0]}")
    starts = given.get("model_filename") and not asked
    if given.get("sharpen", 1) != 1 and not (starts or "resume" in given):
        raise UserError("--sharpen is for training that starts from --model-filename=NAME")


@contextlib.contextmanager
def all_processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did. Raises RunError once one of them died:
    the others notice it at the next sum.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    # Its functions keep, as a default, the group that there is when they are imported. The
    # optimizer would import them after the group is made: that and its threads would then outlive
    # destroy_process_group, and now and then abort the exit.
    import torch.distributed.nn

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # NCCL refuses two processes on one GPU, and Windows has none; gloo is slower, but can.
    nccl = dist.is_nccl_available()
    nccl &= torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    try:
        yield
    except RuntimeError as error:
        text = f"one of the processes cannot go on, so all end ({str(error)[:120]} ...)"
        raise RunError(text) from None
    finally:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns its exit code: 0; 1 if a run could not go on; 2 after a user's
    mistake; 130 on Ctrl-C, but 0 in training, which Ctrl-C ends as it should.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  closed by the shell
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # where a terminal has no such letter
        setattr(sys, name, stream)
    try:
        given = vars(build_parser().parse_args(argv))  # the flags that were typed, no others
        check_mode(given)
        if "resume" in given:
            with all_processes():
                resume(given)
        elif (config := Config(**given)).evaluate:
            evaluate(config)
        elif config.record:
            record(config)
        elif config.run:
            play(config)
        else:
            with all_processes():
                train(config)
        return 0
    # OSError: a disk without room for a folder.
    except (UserError, RunError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # a mistake in this file; else torch found no room for what it computes
        text = "".join(x if x.isprintable() else repr(x)[1:-1] for x in str(error))
        text = text if len(text) <= 300 else f"{text[:200]} ... {text[-90:]}"
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
