#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "ale-py==0.12.1", "av==18.1.0", "gymnasium==1.4.0",
#   "numpy>=2.0,<3", "opencv-python==5.0.0.93", "pillow==13.0.0", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1",
# ]
# ///
"""Learn Atari Breakout from pixels with PPO, then watch the agent play.

    python3 ai_breakout_game.py --num-envs=8 --total-timesteps=3000 --multithreading=True
    python3 ai_breakout_game.py --run=1 --model-filename="ai_breakout_game3000.mdl"
    python3 ai_breakout_game.py --evaluate=100 --model-filename="ai_breakout_game3000.mdl"
    tensorboard --logdir runs

Definitions use only what stands above them. The learning code is in Environment, Network and PPO.
Shapes: T steps of a rollout, N games played at once, B = T * N, M steps of a minibatch, A actions.
A step is one action, held for four emulator frames. A game is all its lives. For the learner, an
episode is one life: it expects no reward after a lost life.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

# Waiting OpenMP threads must sleep: the emulator needs the same cores. torch reads the variable.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Let glibc keep freed memory: allocating it again takes a tenth of each update.
with contextlib.suppress(OSError, AttributeError):
    for option, value in ((-3, 32 * 2**20), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        ctypes.CDLL("libc.so.6").mallopt(option, value)

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
try:
    import ale_py  # noqa: I001
    import cv2
    import av  # after cv2: if it comes first, cv2 cannot open a window
    import gymnasium as gym
    import numpy as np
    import torch
    import torch.distributed as dist
    from PIL import GifImagePlugin, Image
    from tqdm import tqdm

    oldest = {ale_py: (0, 12), cv2: (5, 0), gym: (1, 1), np: (2, 0), torch: (2, 9)}
    for module, version in oldest.items():
        if tuple(map(int, re.findall(r"\d+", module.__version__)[:2])) < version:
            raise ImportError(f"{module.__name__} {module.__version__} is older than {version}")
    from ale_py import AtariEnv, AtariVectorEnv
    from torch import Tensor, nn
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    install = f"{sys.executable} -m pip install -r requirements.txt"
    sys.exit(f"{error}: try `{install}`; on Debian OpenCV also needs `apt-get install libgl1`")

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
tqdm.monitor_interval = 0  # no monitor thread: it can crash the interpreter when it exits

# ---- Configuration -------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can correct: `main` prints one line and exits with code 2."""


def flag(default: Any, group: str, text: str, low: float = 0, high: float = math.inf) -> Any:
    """A field of Config: default value, group and text in --help, allowed range."""
    metadata = {"group": group, "help": text, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings. Each field is a command-line flag: num_envs becomes --num-envs."""

    run: bool = flag(False, "mode", "watch an agent play in a window")
    play: bool = flag(False, "mode", "play yourself, and see what the agent would do")
    evaluate: int = flag(0, "mode", "play this many whole games and report the scores", 1, 10**6)
    record: str = flag("", "mode", "record a game to a .gif or .mp4, or a moment to a .png")
    resume: str = flag("", "mode", "continue a training run: runs/<name>, or latest")
    model_filename: str = flag("", "mode", "model to play or train further; or latest, or random")

    env_id: str = flag("BreakoutNoFrameskip-v4", "game", "any ALE game that Gymnasium registers")
    sticky_actions: float = flag(0.0, "game", "repeat probability (default: by --env-id)", high=1)
    max_frames: int = flag(108_000, "game", "emulator frames until a game is truncated", 4, 10**9)
    patience: float = flag(250.0, "game", "steps without a point until play is more random; 0: off")
    multithreading: bool = flag(True, "game", "step the games in C++ instead of Python")
    seed: int = flag(1, "game", "random seed", high=2**30)
    device: str = flag("auto", "game", "auto, cpu, cuda or mps")

    greedy: bool = flag(False, "playing", "take the most probable action instead of sampling")
    seconds: float = flag(0.0, "recording", "length of the recording (default: one game)", 0.1, 1e6)

    total_timesteps: int = flag(5_000_000, "training", "steps to train, all games together", 1)
    num_envs: int = flag(8, "training", "games played at once", 1, 4096)
    precision: str = flag("auto", "training", "auto, float32 or bfloat16, for large layers")

    learning_rate: float = flag(1e-3, "PPO", "initial learning rate of Adam", high=1)
    anneal_lr: bool = flag(True, "PPO", "decrease the learning rate linearly to zero")
    num_steps: int = flag(128, "PPO", "steps per game in a rollout", 1, 65536)
    gamma: float = flag(0.99, "PPO", "discount factor", high=1)
    gae_lambda: float = flag(0.95, "PPO", "lambda of generalized advantage estimation", high=1)
    num_minibatches: int = flag(4, "PPO", "minibatches per epoch", 1)
    update_epochs: int = flag(2, "PPO", "epochs per rollout", 1, 1000)
    learn_fraction: float = flag(1.0, "PPO", "share of the steps, sampled by importance", 0.01, 1)
    life_cost: float = flag(1.0, "PPO", "penalty for the end of a life or game", high=1000)
    clip_coef: float = flag(0.1, "PPO", "clipping range of the probability ratio")
    ent_coef: float = flag(0.003, "PPO", "weight of the entropy bonus")
    vf_coef: float = flag(0.5, "PPO", "weight of the value loss")
    max_grad_norm: float = flag(0.5, "PPO", "largest norm of the gradient")

    @property
    def num_updates(self) -> int:
        """Number of rollouts of N * T steps, rounded up."""
        return math.ceil(self.total_timesteps / (self.num_envs * self.num_steps))


# ---- Environment: from the emulator's screen to the network's input ------------------------------

# As in Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015.
FRAME_SKIP = 4  # emulator frames per action
FRAME_STACK = 4  # frames in an observation: a single one does not show where the ball is going
FRAME_SIZE = 84  # height and width of an observation, a multiple of 4
NOOP_MAX = 30  # a game starts with 0 to 29 no-ops
FULL_ACTION_SPACE = False  # True: all 18 actions, in every game


def game_settings(env_id: str) -> dict[str, Any]:
    """The arguments of AtariEnv for a game, as registered. Raises UserError with similar ids."""
    known = {name: spec.kwargs for name, spec in gym.registry.items() if "game" in spec.kwargs}
    if env_id not in known:
        short = {name.removeprefix("ALE/").split("-")[0].lower(): name for name in known}
        asked = env_id.removeprefix("ALE/").split("-")[0].lower().replace("deterministic", "")
        near = [short[x] for x in difflib.get_close_matches(asked, short)] or [Config.env_id]
        raise UserError(f"--env-id={env_id} is not an ALE game; did you mean {' or '.join(near)}?")
    return known[env_id] | {"full_action_space": FULL_ACTION_SPACE}


@functools.cache
def action_names(env_id: str) -> list[str]:
    """The names of the A actions of a game. An action is an index of this list."""
    return AtariEnv(**game_settings(env_id)).get_action_meanings()


class FireResetEnv(gym.Wrapper):
    """Presses FIRE after a reset: before that, Breakout has no ball."""

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        names = self.unwrapped.get_action_meanings()
        if "FIRE" in names:
            obs, _, _, _, info = self.env.step(names.index("FIRE"))
        return obs, info


class NoopResetEnv(gym.Wrapper):
    """Starts a game with a random number of no-ops, so that games differ. They come after FIRE, as
    in the native environment.
    """

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(NOOP_MAX)):
            obs, _, _, _, info = self.env.step(0)
        return obs, info


class MaxAndSkipEnv(gym.Wrapper):
    """Repeats an action for four frames. Returns the maximum of the last two: objects flicker.

    With `keep_rgb`, `render` returns the frames of the last step, each (210, 160, 3) uint8.
    """

    def __init__(self, env: gym.Env, keep_rgb: bool = False) -> None:
        super().__init__(env)
        self.keep_rgb, self.rgb_frames = keep_rgb, []

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        self.rgb_frames = [self.env.render()] if self.keep_rgb else []
        return obs, info

    def render(self) -> list[np.ndarray]:
        return self.rgb_frames

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        last_two: deque[np.ndarray] = deque(maxlen=2)
        total_reward, self.rgb_frames = 0.0, []
        for _ in range(FRAME_SKIP):
            obs, reward, terminated, truncated, info = self.env.step(action)
            last_two.append(obs)
            self.rgb_frames += [self.env.render()] if self.keep_rgb else []
            total_reward += float(reward)
            if terminated or truncated:
                break
        return np.max(last_two, axis=0), total_reward, terminated, truncated, info


def make_env(env_id: str, seed=None, keep_rgb=False, sticky_actions=None, max_frames=108_000):
    """One game, with all its lives: observations (4, 84, 84) uint8, and true rewards."""
    options = game_settings(env_id) | {"frameskip": 1, "max_num_frames_per_episode": None}
    options |= {} if sticky_actions is None else {"repeat_action_probability": sticky_actions}
    # The grayscale screen is the emulator's luminance, as in the native environment.
    env = AtariEnv(**options, obs_type="grayscale", render_mode="rgb_array")
    env = MaxAndSkipEnv(NoopResetEnv(FireResetEnv(env)), keep_rgb)
    env = gym.wrappers.TimeLimit(env, math.ceil(max_frames / FRAME_SKIP))
    env = gym.wrappers.ResizeObservation(env, (FRAME_SIZE, FRAME_SIZE))  # (84, 84) uint8
    env = gym.wrappers.FrameStackObservation(env, FRAME_STACK, padding_type="zero")  # newest last
    env.reset(seed=seed)
    return env


def make_vector_env(config: Config, num_envs: int, keep_rgb: bool = False) -> gym.vector.VectorEnv:
    """N times `make_env`, or the same game in C++ on native threads (with other random no-ops). In
    both, the step after the end of a game ignores the action and resets the game (NEXT_STEP).
    """
    settings, sticky = game_settings(config.env_id), config.sticky_actions
    if keep_rgb or not config.multithreading:
        make = functools.partial(make_env, config.env_id, None, keep_rgb, sticky, config.max_frames)
        return gym.vector.SyncVectorEnv([make] * num_envs)
    return AtariVectorEnv(
        settings["game"], num_envs, full_action_space=settings["full_action_space"],
        repeat_action_probability=sticky, max_num_frames_per_episode=config.max_frames,
        frameskip=FRAME_SKIP, stack_num=FRAME_STACK, img_height=FRAME_SIZE, img_width=FRAME_SIZE,
        noop_max=NOOP_MAX, reward_clipping=False,
    )  # fmt: skip


TRAINING, PLAYING = 0, 1  # streams of random seeds: evaluation reuses no training seed


class FinishedGame(NamedTuple):
    """A whole game that is over."""

    slot: int  # which of the N games
    score: float  # true score, not clipped
    length: int  # steps


class StepResult(NamedTuple):
    """The result of one step in N games. The reset of a game, and the serve (FIRE) after a lost
    life, ignore the agent's action. They are not decisions of the agent, and not trained on.
    """

    rewards: np.ndarray  # (N,) float32, clipped to their sign
    terminated: np.ndarray  # (N,) bool: a life was lost or the game is over
    truncated: np.ndarray  # (N,) bool: the game reached `max_frames`
    decided: np.ndarray  # (N,) bool: the agent's action was used
    finished: list[FinishedGame]


class Games:
    """N games and their current state: frames (N, 4, 84, 84) uint8, lives, scores, and so on."""

    def __init__(self, config: Config, num_envs: int, keep_rgb: bool = False) -> None:
        self.env, self.num_envs = make_vector_env(config, num_envs, keep_rgb), num_envs
        self.action_names = action_names(config.env_id)
        self.fire = self.action_names.index("FIRE") if "FIRE" in self.action_names else None

    def reset(self, *stream: int) -> None:
        """Start new games, with seeds that SeedSequence derives from the numbers of `stream`."""
        seeds = np.random.SeedSequence(stream).generate_state(self.num_envs).astype(int)
        seeds >>= 1  # the emulator takes 31 bits
        native = isinstance(self.env, AtariVectorEnv)
        self.frames, info = self.env.reset(seed=seeds if native else seeds.tolist())
        self.lives = info["lives"]
        self.scores, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        self.idle = np.zeros(self.num_envs, int)  # decisions since the last point or lost life
        self.game_over, self.serve = np.zeros((2, self.num_envs), bool)

    def step(self, actions: np.ndarray) -> StepResult:
        """Take `actions`, (N,) int64. Raises ValueError for a number that is not an action."""
        if actions.min() < 0 or actions.max() >= len(self.action_names):  # ale-py would hang
            raise ValueError(f"actions {actions} are not from 0 to {len(self.action_names) - 1}")
        restarted = self.game_over  # this step resets the game
        decided = ~(restarted | self.serve)
        if self.fire is not None:
            actions = np.where(self.serve, self.fire, actions)
        self.frames, rewards, over, truncated, info = self.env.step(actions)

        life_lost = ~restarted & (info["lives"] > 0) & (info["lives"] < self.lives)
        terminated = over | life_lost
        self.lives = info["lives"]
        self.game_over = over | truncated
        self.serve = life_lost & (self.fire is not None)

        self.scores = np.where(restarted, 0, self.scores) + rewards
        self.lengths = np.where(restarted, 0, self.lengths + 1)
        no_event = ~restarted & ~terminated & ~truncated & (rewards == 0)
        self.idle = np.where(no_event, self.idle + decided, 0)
        slots = np.flatnonzero(self.game_over).tolist()
        finished = [FinishedGame(i, float(self.scores[i]), int(self.lengths[i])) for i in slots]
        return StepResult(np.float32(np.sign(rewards)), terminated, truncated, decided, finished)


# ---- Network -------------------------------------------------------------------------------------

Batch = dict[str, Tensor]  # tensors by name, for N games, (T, N) steps, or M steps in any order
HIDDEN_SIZE = 512  # features that the actor and the critic share


def init_layer(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights (Saxe et al. 2014), zero biases; a gain of sqrt(2) suits a ReLU."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def space_to_depth(frames: Tensor) -> Tensor:
    """Move 4 x 4 pixels into channels: (M, 4, 84, 84) -> (M, 64, 21, 21), channels last in memory.

    Like pixel_unshuffle(frames, 4), but the four pixels of a row are copied as one int32: ten times
    as fast.
    """
    m, side = len(frames), FRAME_SIZE // 4
    rows = frames.contiguous().view(torch.int32).view(m, FRAME_STACK, side, 4, side)
    blocks = rows.permute(0, 2, 4, 1, 3).contiguous().view(torch.uint8)
    return blocks.view(m, side, side, -1).permute(0, 3, 1, 2)


class FrameConv(nn.Conv2d):
    """The first layer: uint8 frames / 255, then a convolution of 8 x 8 pixels with stride 4. After
    `space_to_depth` its stride is 1, which is 1.5 times as fast in bfloat16.
    """

    def __init__(self, out_channels: int) -> None:
        super().__init__(FRAME_STACK, out_channels, kernel_size=8, stride=4)

    def forward(self, frames: Tensor) -> Tensor:
        reduced = torch.is_autocast_enabled(frames.device.type)
        dtype = torch.get_autocast_dtype(frames.device.type) if reduced else torch.float32
        weight = nn.functional.pixel_unshuffle(self.weight / 255, 4)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return nn.functional.conv2d(space_to_depth(frames).to(dtype), weight, self.bias)


class Dense(nn.Linear):
    """nn.Linear, on a CPU as a 1x1 convolution: oneDNN instead of MKL, 8 % off an update on AMD."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or len(x) < 64:
            return super().forward(x)
        image = x.t()[None, :, None]  # (1, in_features, 1, M): each sample is a pixel
        return nn.functional.conv2d(image, self.weight[:, :, None, None], self.bias)[0, :, 0].t()


class Agent(nn.Module):
    """The network of Mnih et al. (2015), with a policy (actor) and a value (critic) on top."""

    precision = torch.float32  # dtype of the large layers; weights, actor and critic are float32
    patience = Config.patience
    # Set when it is loaded from a file:
    path = Path("new agent")
    settings: dict[str, Any]  # the MODEL_SETTINGS that it was trained with
    steps, mean_score = 0, math.nan  # at the end of its training

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        convolutions = nn.Sequential(
            init_layer(FrameConv(32)),  # (M, 32, 20, 20)
            nn.ReLU(inplace=True),
            init_layer(nn.Conv2d(32, 64, kernel_size=4, stride=2)),  # (M, 64, 9, 9)
            nn.ReLU(inplace=True),
            init_layer(nn.Conv2d(64, 64, kernel_size=3)),  # (M, 64, 7, 7)
            nn.ReLU(inplace=True),
            nn.Flatten(),  # (M, 3136)
        )
        frames = torch.zeros(1, FRAME_STACK, FRAME_SIZE, FRAME_SIZE, dtype=torch.uint8)
        hidden = init_layer(Dense(convolutions(frames).shape[1], HIDDEN_SIZE))
        self.network = nn.Sequential(*convolutions, hidden, nn.ReLU(inplace=True))
        # A small gain makes the first policy nearly uniform (Andrychowicz et al. 2021).
        self.actor = init_layer(nn.Linear(HIDDEN_SIZE, num_actions), gain=0.01)
        self.critic = init_layer(nn.Linear(HIDDEN_SIZE, 1), gain=1.0)
        self.to(memory_format=torch.channels_last)  # 1.7 times the speed on a CPU

    @property
    def device(self) -> torch.device:
        return self.actor.weight.device

    def autocast(self) -> torch.autocast:
        """Compute large layers in `precision`. Around several calls, weights are cast only once."""
        reduced = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=reduced)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """frames (M, 4, 84, 84) uint8 -> logits (M, A) float32, values (M,) float32."""
        with self.autocast():
            hidden = self.network(frames).float()
        with torch.autocast(self.device.type, enabled=False):
            return self.actor(hidden), self.critic(hidden).squeeze(-1)

    @torch.no_grad()
    def act(self, frames: Tensor, idle: np.ndarray, generator=None, greedy: bool = False) -> Batch:
        """Sample an action from the policy in each of N games, or take the most probable one.

        frames are (N, 4, 84, 84) uint8. After idle > patience steps without a point the logits are
        divided by idle / patience. More random actions break loops in which no brick is hit.
        Returns probs (N, A), and actions, their log_probs, values and temperatures, each (N,).
        """
        patience = self.patience or math.inf  # 0: off
        temperatures = torch.from_numpy(idle / patience).float().clamp(min=1).to(self.device)
        logits, values = self(frames.to(self.device))
        log_probs = (logits / temperatures[:, None]).log_softmax(-1)
        sampled = torch.multinomial(log_probs.exp(), 1, generator=generator)
        actions = log_probs.argmax(-1, keepdim=True) if greedy else sampled
        taken = {"actions": actions[:, 0], "log_probs": log_probs.gather(-1, actions)[:, 0]}
        return taken | {"probs": log_probs.exp(), "values": values, "temperatures": temperatures}

    def predict(self, obs: np.ndarray, idle: int = 0) -> int:
        """Sample an action for one observation, (4, 84, 84) uint8, `idle` steps after a point."""
        return self.act(torch.from_numpy(obs)[None], np.array([idle]))["actions"].item()


# ---- Processes and devices. Skip this section at first. ------------------------------------------
# torchrun starts several processes (ranks), which train one agent. Each plays its share of the
# games. Gradients are summed over all ranks, so all have the same weights. Rank 0 logs and saves.
# Without torchrun, there is only rank 0.


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x: Tensor) -> Tensor:
    """Sum `x` over all ranks, in place. A collective call: every rank must make it."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_gather(item: Any) -> list[Any]:
    """Return the `item` of every rank, on every rank. A collective call."""
    items = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item)
    return items


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started."""
    import torch.distributed.nn  # before the group exists, else its threads outlive the group

    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local_rank % gpus)
    nccl = dist.is_nccl_available() and gpus >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """The device `name`. Raises UserError if it is not available."""
    mps = torch.backends.mps.is_available() and world_size() == 1  # gloo does not support it
    available = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    names = [name for name, is_available in available.items() if is_available]
    if name not in ("auto", *names):
        raise UserError(f"--device={name} is not available; this machine has {' and '.join(names)}")
    return torch.device(names[0] if name == "auto" else name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype `name`, or for auto bfloat16 where the device multiplies it fast."""
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--precision={name} is neither auto, float32 nor bfloat16")
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:  # Intel processors without AMX train slower in bfloat16 than in float32
        has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = has.get("amx_bf16") or (has.get("avx512_bf16") and "Intel" not in str(has))
    automatic = "bfloat16" if fast else "float32"
    return getattr(torch, automatic if name == "auto" else name)


# ---- PPO: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv:1707.06347 -----
# Play T steps with the current policy. Where an action led to more reward than the value predicted
# (its advantage is positive), increase its probability. Once the probability has changed by a
# factor of 1 +- clip_coef, the loss rewards no further change: so each step can be used repeatedly.


@dataclasses.dataclass
class TrainState:
    """Everything that training changes, except the games: what a checkpoint must hold. A second
    network would be a field here, in `state_dict`, `load_state_dict` and `make_state`.
    """

    agent: Agent
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # samples actions and minibatches
    update: int = 0
    global_step: int = 0  # steps taken, all games together
    num_games: int = 0  # games finished
    best_mean: float = -math.inf  # highest mean score at a checkpoint
    scores: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=100))

    COUNTERS = ("update", "global_step", "num_games", "best_mean")

    @property
    def mean_score(self) -> float:
        """Mean true score of the last 100 games; nan before the first."""
        return sum(self.scores) / len(self.scores) if self.scores else math.nan

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, except its Config. Tensors are not copied."""
        state = {name: getattr(self, name) for name in self.COUNTERS}
        state |= {"scores": list(self.scores), "generator": self.generator.get_state()}
        return state | {"agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        vars(self).update({name: saved[name] for name in self.COUNTERS})
        self.scores.extend(saved["scores"])
        self.agent.load_state_dict(saved["agent"])
        self.optimizer.load_state_dict(saved["optimizer"])
        # The checkpoint has the generator of rank 0. A CPU cannot use that of a GPU.
        if rank() == 0 and saved["generator"].shape == self.generator.get_state().shape:
            self.generator.set_state(saved["generator"])


def make_state(config: Config, agent: Agent | None = None, global_step: int = 0) -> TrainState:
    """The state at the start of a run, with the weights of `agent` or new ones; or the state that a
    checkpoint of `global_step` is loaded into.
    """
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    agent = (agent or Agent(len(action_names(config.env_id)))).to(device)
    agent.precision, agent.patience = pick_precision(config.precision, device), config.patience
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    seed = config.seed + global_step + 1_000_003 * rank()  # a CPU's generator uses 32 bits
    return TrainState(agent, optimizer, torch.Generator(device).manual_seed(seed))


def make_rollout(num_steps: int, num_envs: int, device: torch.device) -> Batch:
    """Storage for T steps of N games, 28 kB per step. Each rollout overwrites it."""
    size, frame = (num_steps, num_envs), (FRAME_STACK, FRAME_SIZE, FRAME_SIZE)
    zeros = functools.partial(torch.zeros, device=device)
    rollout = {
        "frames": zeros((num_steps + 1, num_envs, *frame), dtype=torch.uint8),  # (T + 1, N, ...)
        "values": zeros(num_steps + 1, num_envs),  # (T + 1, N)
        "actions": zeros(size, dtype=torch.int64),  # (T, N), like all that follow
    }
    rollout |= {name: zeros(size) for name in ("log_probs", "temperatures", "rewards")}
    return rollout | {name: zeros(size).bool() for name in ("terminated", "truncated", "decided")}


def anneal(config: Config, update: int) -> Config:
    """The settings for one update. With --anneal-lr, the learning rate falls linearly to zero."""
    remaining = 1 - update / config.num_updates
    rate = config.learning_rate * (remaining if config.anneal_lr else 1)
    return dataclasses.replace(config, learning_rate=rate)


@torch.no_grad()
def collect_rollout(state: TrainState, games: Games, rollout: Batch) -> list[FinishedGame]:
    """Play T steps. Returns the games that finished."""
    frames, finished = rollout["frames"], []
    with state.agent.autocast():
        for t in range(len(frames) - 1):
            frames[t] = torch.from_numpy(games.frames)
            decision = state.agent.act(frames[t], games.idle, state.generator)
            for name in ("actions", "log_probs", "values", "temperatures"):
                rollout[name][t] = decision[name]
            result = games.step(decision["actions"].cpu().numpy())
            for name in ("rewards", "terminated", "truncated", "decided"):
                rollout[name][t] = torch.from_numpy(getattr(result, name))
            finished += result.finished
        frames[-1] = torch.from_numpy(games.frames)
        rollout["values"][-1] = state.agent(frames[-1])[1]

    finished = list(itertools.chain(*all_gather(finished)))
    state.global_step += rollout["actions"].numel() * world_size()
    state.num_games += len(finished)
    state.scores.extend(game.score for game in finished)
    return finished


def compute_gae(rewards, values, terminated, truncated, gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimation: Schulman et al. 2016, arXiv:1506.02438, equation 16.

        delta_t = r_t + gamma * V(s_t+1) - V(s_t)        A_t = delta_t + gamma * lambda * A_t+1

    values are (T + 1, N), other tensors (T, N). Returns advantages, (T, N). After a termination
    V(s_t+1) is zero; after a truncation, the value of the game's last frame. Both end the sum.
    """
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decay = gamma * gae_lambda * ~(terminated | truncated)
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantages[t] = following = deltas[t] + decay[t] * following
    return advantages


def make_batch(rollout: Batch, config: Config) -> Batch:
    """The steps of a rollout, flattened to (B, ...), with advantages, returns and weights."""
    steps = {name: x[: config.num_steps] for name, x in rollout.items()}  # some have T + 1 rows
    terminated, truncated = steps["terminated"], steps["truncated"]
    rewards = steps["rewards"] - config.life_cost * terminated
    discounts = (config.gamma, config.gae_lambda)
    steps["advantages"] = compute_gae(rewards, rollout["values"], terminated, truncated, *discounts)
    steps["returns"] = steps["advantages"] + steps["values"]  # the target of the value
    steps["sample_weights"] = steps["decided"].float()  # of each step in the loss
    return {name: x.flatten(0, 1) for name, x in steps.items()}


def minibatches(batch: Batch, config: Config, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch: all B steps in random order, or a fraction of them, sampled by importance.

    A step is drawn with a probability proportional to its priority, 0.8 |A| / mean |A| + 0.2. Its
    weight is divided by the priority, which keeps the expected gradient (Kahn and Marshall 1953).
    """
    weights, size = batch["sample_weights"], len(batch["sample_weights"])
    if config.learn_fraction < 1:
        magnitude = batch["advantages"].abs() * weights
        mean = magnitude.sum() / weights.sum().clamp(min=1)
        priority = weights * (0.8 * magnitude / mean.clamp(min=1e-8) + 0.2) + 1e-8
        batch = batch | {"sample_weights": weights * priority.mean() / priority}
        size = max(int(config.learn_fraction * size), config.num_minibatches)
        order = torch.multinomial(priority, size, replacement=True, generator=generator)
    else:
        order = torch.randperm(size, generator=generator, device=weights.device)

    for picked in order.split(size // config.num_minibatches)[: config.num_minibatches]:
        yield {name: x.index_select(0, picked) for name, x in batch.items()}


def masked_moments(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean and variance of `x`, and the sum of the weights, over all ranks."""
    total, summed = all_reduce(torch.stack([weights.sum(), (x * weights).sum()]))
    total = total.clamp(min=1e-8)
    mean = summed / total
    variance = all_reduce(((x - mean).square() * weights).sum()) / total
    return mean, variance, total


def ppo_loss(logits: Tensor, values: Tensor, batch: Batch, config: Config) -> dict[str, Tensor]:
    """The "loss" of a minibatch and its parts: means weighted by batch["sample_weights"], which
    add up to 1. logits (M, A) and values (M,) are the network's current output.
    """
    log_probs, advantages = logits.log_softmax(-1), batch["advantages"]
    log_ratio = log_probs.gather(-1, batch["actions"][:, None])[:, 0] - batch["log_probs"]
    ratio = log_ratio.exp()

    # The clipped surrogate objective, equation 7.
    clipped_ratio = ratio.clamp(1 - config.clip_coef, 1 + config.clip_coef)
    losses = {
        "policy_loss": -torch.min(ratio * advantages, clipped_ratio * advantages),
        "value_loss": 0.5 * (values - batch["returns"]).square(),
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "approx_kl": ratio - 1 - log_ratio,  # of old and new: joschu.net/blog/kl-approx.html
        "clipfrac": ((ratio - 1).abs() > config.clip_coef).float(),
    }
    losses = {name: (x * batch["sample_weights"]).sum() for name, x in losses.items()}

    # Equation 9.
    loss = losses["policy_loss"] + config.vf_coef * losses["value_loss"]
    return {"loss": loss - config.ent_coef * losses["entropy"], **losses}


def learn_minibatch(state: TrainState, batch: Batch, config: Config) -> dict[str, Tensor]:
    """One step of the optimizer. Returns the losses and the norm of the gradient."""
    mean, variance, total = masked_moments(batch["advantages"], batch["sample_weights"])
    advantages = (batch["advantages"] - mean) / (variance.sqrt() + 1e-8)
    batch = batch | {"advantages": advantages, "sample_weights": batch["sample_weights"] / total}

    logits, values = state.agent(batch["frames"])
    losses = ppo_loss(logits / batch["temperatures"][:, None], values, batch, config)
    state.optimizer.zero_grad()
    losses["loss"].backward()
    for parameter in state.agent.parameters():
        all_reduce(parameter.grad)
    norm = nn.utils.clip_grad_norm_(state.agent.parameters(), config.max_grad_norm)
    state.optimizer.step()
    summed = all_reduce(torch.stack([x.detach() for x in losses.values()]))
    return dict(zip(losses, summed)) | {"grad_norm": norm}


def learn(state: TrainState, rollout: Batch, config: Config) -> dict[str, float]:
    """Several epochs of minibatches. Returns means by tag. FloatingPointError if it diverges."""
    state.optimizer.param_groups[0]["lr"] = config.learning_rate
    batch = make_batch(rollout, config)
    history = [
        learn_minibatch(state, minibatch, config)
        for _ in range(config.update_epochs)
        for minibatch in minibatches(batch, config, state.generator)
    ]
    state.update += 1

    # All numbers leave the device at once, since each transfer waits for a GPU.
    means = [torch.stack([losses[name] for losses in history]).mean() for name in history[0]]
    unexplained = masked_moments(batch["returns"] - batch["values"], batch["sample_weights"])[1]
    variance = masked_moments(batch["returns"], batch["sample_weights"])[1]
    explained = 1 - unexplained / variance.clamp(min=1e-8)
    numbers = torch.stack([*means, explained]).tolist()
    if not all(map(math.isfinite, numbers)):
        raise FloatingPointError(f"update {state.update} diverged: try a lower --learning-rate")
    names = [f"losses/{name}" for name in (*history[0], "explained_variance")]
    return dict(zip(names, numbers)) | {"charts/learning_rate": config.learning_rate}


# ---- Saving and loading --------------------------------------------------------------------------

MODEL_SETTINGS = ("env_id", "sticky_actions", "max_frames", "patience")  # that a player needs
OBSERVATION = {"frame_skip": FRAME_SKIP, "frame_size": FRAME_SIZE}  # a file must have the same


def save_file(content: dict[str, Any], path: Path) -> None:
    """Write a temporary file and rename it: `path` is complete even if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            torch.save(content, file)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_file(path: Path) -> Any:
    """A model or checkpoint: tensors, numbers and strings. No code in the file is run. Raises
    UserError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sb3 = "policy.pth" in archive.namelist()
            if archive.testzip() or sb3:  # torch.load does not compare the checksums
                raise ValueError("a stable-baselines3 archive" if sb3 else "a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in OBSERVATION.items():
            if content.get(name, value) != value:
                raise ValueError(f"it was trained with {name} = {content[name]}")
        return content
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
    except Exception:  # a damaged file raises one of many types
        with open(path, "rb") as file:
            problem = "a text file" if file.read(512).isascii() else "a pickled object, or damaged"
    raise UserError(f"cannot load {path}: {problem}")


def find_file(name: str, paths: list[Path]) -> Path:
    """The first of `paths` that is a file; for "latest", the newest checkpoint in runs/. Raises
    UserError with similar names.
    """
    if name == "latest":
        paths = sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, reverse=True)
    if files := [path for path in paths if os.path.isfile(path)]:
        return files[0]
    there = [x.name for x in (*Path("models").glob("*.mdl"), *Path("runs").glob("*__*"))]
    near = " or ".join(difflib.get_close_matches(name, there, cutoff=0.5))
    name = "run" if name == "latest" else name
    raise UserError(f"there is no {name} here" + (f"; did you mean {near}?" if near else ""))


def model_content(state: TrainState, config: Config) -> dict[str, Any]:
    """What a model file holds: weights, and the settings that they were trained with."""
    weights = {name: x.cpu().contiguous() for name, x in state.agent.state_dict().items()}
    about = {"steps": state.global_step, "seed": config.seed, "mean_return": state.mean_score}
    settings = {name: getattr(config, name) for name in MODEL_SETTINGS}
    return {"weights": weights, **OBSERVATION, **about, **settings}


def load_agent(name: str) -> Agent:
    """An agent, from a model, a checkpoint or a bare state_dict, with its MODEL_SETTINGS and path.

    `name` is a path, or a name in models/ here or beside this script. Unknown keys and the prefixes
    of DataParallel and torch.compile are ignored. Raises UserError.
    """
    folders = (Path(), Path("models"), Path(__file__).resolve().parent / "models")
    path = find_file(name, [folder / file for folder in folders for file in (name, f"{name}.mdl")])
    content = read_file(path)
    try:
        weights = content.get("weights", content)
        weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(k)): x for k, x in weights.items()}
        agent = Agent(len(weights["actor.weight"]))
        agent.load_state_dict({name: weights[name] for name in agent.state_dict()})
        if not all(x.isfinite().all() for x in agent.parameters()):
            raise ValueError("a weight is not finite")
        defaults = {name: getattr(Config, name) for name in MODEL_SETTINGS if name in content}
        agent.settings = {name: type(x)(content[name]) for name, x in defaults.items()}
        agent.steps = int(content.get("steps", 0))
        agent.mean_score = float(content.get("mean_return", math.nan))
    except Exception as error:  # a foreign file raises one of many types
        raise UserError(f"{path} is not a model: {type(error).__name__}: {error}") from None
    agent.patience = agent.settings.setdefault("patience", 0.0)  # older files lack it
    agent.path = path
    return agent


# ---- Training ------------------------------------------------------------------------------------

CHECKPOINT_SECONDS = 300


def reference_scores(env_id: str) -> str:
    """What others score in Breakout, by Mnih et al. 2015, extended data table 2."""
    breakout = game_settings(env_id)["game"] == "breakout"
    return " (random play 1.7, a human 31.8)" if breakout else ""


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Once the terminal or the pipe is closed, discard all output."""
    try:
        yield
    except OSError:
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def say(text: str) -> None:
    """Print a line above the progress bar, on rank 0."""
    if rank() == 0:
        with output():
            tqdm.write(text)
            sys.stdout.flush()


@contextlib.contextmanager
def reported(action: str) -> Iterator[list[Exception]]:
    """Report any error in `action` in one line, with the system's reason, and go on. The list that
    it yields holds the error, if there was one.
    """
    errors: list[Exception] = []
    try:
        yield errors
    except Exception as error:
        errors.append(error)
        say(f"cannot {action}: {getattr(error, 'strerror', None) or repr(error)}")


def progress_bar(total: int | None, unit: str, initial: int = 0) -> tqdm:
    """A bar on a terminal; in a file or a pipe, a line at the start and then twice a minute."""
    look = {"ncols": shutil.get_terminal_size().columns}
    if not sys.stderr.isatty():
        counts = "{n:,} of {total:,}{unit}, {remaining} left" if total else "{n:,}{unit}"
        look = {"bar_format": f"{counts}{{postfix}}\n", "mininterval": 30, "file": sys.stdout}
    return tqdm(total=total, initial=initial, unit=f" {unit}s", unit_scale=True, miniters=1, **look)


def advance(bar: tqdm, units: int, text: str) -> float:
    """Count `units` more and show `text`. Returns the mean speed, in units per second."""
    with output():
        bar.set_postfix_str(text, refresh=False)
        bar.update(units)
    return (bar.n - bar.initial) / max(bar.format_dict["elapsed"], 1e-9)


class Logger:
    """Shows the progress and writes curves. Its errors do not end the training. To use another
    tracker, replace SummaryWriter in `open`, `log` and `close`.
    """

    def __init__(self, folder: Path, config: Config, state: TrainState) -> None:
        self.folder, self.config, self.writer = folder, config, None
        total = config.num_updates * config.num_envs * config.num_steps
        self.bar = progress_bar(total, "step", state.global_step)
        threading.excepthook = lambda _: None  # of SummaryWriter's thread: `log` reports the error

    def open(self, step: int) -> None:
        """Start a file of curves, at the start, after an error, and if the folder was deleted."""
        if not self.writer or not self.folder.exists():
            with reported(f"write curves to {self.folder}/"):
                # TensorBoard ignores what an earlier file has after `step`.
                self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
                self.writer.add_text("config", repr(self.config), step)

    def log(self, state: TrainState, finished: list, losses: dict[str, float]) -> None:
        """Log the numbers of an update, and the games that finished in it."""
        text = f"mean score {state.mean_score:.2f}" if state.scores else "no game finished yet"
        speed = advance(self.bar, state.global_step - self.bar.n, text)
        scalars = [*losses.items(), ("charts/SPS", speed)]  # steps per second
        if state.scores:
            scalars += [("charts/mean_return_100", state.mean_score)]
        for _, score, length in finished:
            scalars += [("charts/episodic_return", score), ("charts/episodic_length", length)]
        if self.writer:
            with reported(f"write curves to {self.folder}/") as errors:
                for tag, value in scalars:
                    self.writer.add_scalar(tag, value, state.global_step)
                self.writer.flush()
            if errors:
                self.writer = None  # until the next `open`

    def close(self) -> float:
        """End the progress bar and the curves. Returns the seconds that training took."""
        with output():
            self.bar.close()
        if self.writer:
            with reported(f"write curves to {self.folder}/"):
                self.writer.close()
        return self.bar.format_dict["elapsed"]


def save_checkpoint(state: TrainState, config: Config, folder: Path) -> bool:
    """Save the state of a run, and best.mdl if the mean score has risen. Returns success."""
    with reported(f"save {folder}/checkpoint.pt") as errors:
        model = model_content(state, config)
        if state.num_games >= 100 and state.mean_score > state.best_mean:
            save_file(model, folder / "best.mdl")
            state.best_mean = state.mean_score
        settings = {"config": dataclasses.asdict(config)}
        save_file(model | state.state_dict() | settings, folder / "checkpoint.pt")
    return not errors


def finish(state: TrainState, config: Config, folder: Path, seconds: float) -> bool:
    """Save the final weights, and say how to watch them and to continue. Returns success."""
    trained = state.update == config.num_updates
    steps = config.total_timesteps if trained else state.global_step
    path = Path("models") / f"ai_{game_settings(config.env_id)['game']}_game{steps}.mdl"
    with reported(f"save {path}") as errors:
        for target in (folder / "last.mdl", path):
            save_file(model_content(state, config), target)

    done = "Trained" if trained else "Stopped after"
    say(f"{done} {state.global_step:,} steps in {tqdm.format_interval(seconds)}")
    if state.scores:
        mean = f"{state.mean_score:.2f}{reference_scores(config.env_id)}"
        say(f"mean score of the last {len(state.scores)} of {state.num_games:,} games: {mean}")
    activated = sys.prefix == sys.base_prefix or "VIRTUAL_ENV" in os.environ
    script = shlex.join(["python3" if activated else sys.executable, os.path.relpath(__file__)])
    more = f" --total-timesteps={2 * state.global_step}" if trained else ""
    say(f"  curves   tensorboard --logdir {shlex.quote(str(folder.parent))}")
    say(f"  resume   {script} --resume={shlex.quote(str(folder))}{more}")
    if not errors:
        say(f'  watch    {script} --run=1 --model-filename="{path.name}"')
    return not errors


@contextlib.contextmanager
def handle_signals(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Call `handler` on Ctrl-C, SIGTERM and a closed terminal. Does nothing in a thread."""
    names, before = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"), {}  # Windows has no SIGHUP
    with contextlib.suppress(ValueError):  # in a thread
        for number in signal.Signals:
            if number.name in names and signal.getsignal(number) != signal.SIG_IGN:  # nohup
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopRequest:
    """A signal handler: training stops after the update. A second Ctrl-C ends it at once."""

    made = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.made and number == signal.SIGINT and world_size() == 1:  # torchrun repeats it
            raise KeyboardInterrupt
        if not self.made and rank() == 0:
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after this update ...\n")  # print is not reentrant
        self.made = True


def train(config: Config, state: TrainState, folder: Path) -> None:
    """Train until `total_timesteps` or until a signal asks to stop. Raises UserError."""
    games = Games(config, config.num_envs // world_size())
    games.reset(TRAINING, config.seed, state.global_step, rank())
    rollout = make_rollout(config.num_steps, games.num_envs, state.agent.device)
    say(f"{state.agent.device}, {state.agent.precision}; curves in {folder}/")

    stop, next_checkpoint = StopRequest(), 0.0
    logger = Logger(folder, config, state) if rank() == 0 else None  # rank 0 logs and saves
    with handle_signals(stop):
        while state.update < config.num_updates and not any(all_gather(stop.made)):
            if logger and time.monotonic() >= next_checkpoint:
                logger.open(state.global_step)
                save_checkpoint(state, config, folder)
                next_checkpoint = time.monotonic() + CHECKPOINT_SECONDS
            finished = collect_rollout(state, games, rollout)
            losses = learn(state, rollout, anneal(config, state.update))
            if logger:
                logger.log(state, finished, losses)

        if logger:
            saved = save_checkpoint(state, config, folder)
            if not (finish(state, config, folder, logger.close()) and saved):
                raise OSError("not everything was saved")


# ---- Playing -------------------------------------------------------------------------------------

EMULATOR_FPS = 60


def play_steps(agent: Agent, games: Games, config: Config, seed: int, human=None) -> Iterator:
    """Play N games without end. Yields the frames, the decision of `Agent.act` and the result of
    each step. If there is a function `human`, it chooses the action instead of the agent.
    """
    generator = torch.Generator(agent.device).manual_seed(seed)
    games.reset(PLAYING, seed)
    while True:
        frames = games.frames
        decision = agent.act(torch.from_numpy(frames), games.idle, generator, config.greedy)
        actions = np.array([human()]) if human else decision["actions"].cpu().numpy()
        yield frames, decision, games.step(actions)


def confidence_interval(scores: list[float]) -> float | None:
    """Half the width of the mean's 95 % interval, by Student's t; None for one score."""
    n = len(scores) - 1
    if n < 1:
        return None
    # NumPy has no quantiles of Student's t, but samples: good to 0.5 %.
    quantile = np.quantile(np.abs(np.random.default_rng(0).standard_t(n, 2_000_000)), 0.95)
    return float(quantile * np.std(scores, ddof=1) / math.sqrt(n + 1))


def play_games(agent: Agent, config: Config) -> list[FinishedGame]:
    """Play --evaluate whole games, or fewer until Ctrl-C. Each slot plays a fixed share of them:
    the first to finish would be the short ones, whose scores are low.
    """
    slots, finished = min(config.evaluate, 32), []
    shares = np.bincount(np.arange(config.evaluate) % slots)  # games to play in each slot
    bar = progress_bar(None, "step")
    with contextlib.suppress(KeyboardInterrupt):
        for _, _, result in play_steps(agent, Games(config, slots), config, config.seed):
            counted = [game for game in result.finished if shares[game.slot]]
            shares[[game.slot for game in counted]] -= 1
            finished += counted
            advance(bar, slots, f"games finished: {len(finished)} of {config.evaluate}")
            if not shares.any():
                break
    with output():
        bar.close()
    return finished


def print_scores(scores: np.ndarray, interval: float | None, env_id: str) -> None:
    """Print mean, interval and histogram: a mean alone hides that scores have two modes."""
    mean = f"mean {scores.mean():,.2f}" + (f" +- {interval:,.2f} (95 %)" if interval else "")
    lowest, median, highest = (f"{x:,.10g}" for x in np.quantile(scores, (0, 0.5, 1)))
    say(f"{len(scores)} games: {mean}, median {median}, from {lowest} to {highest}")

    width = max(1, math.ceil((np.ptp(scores) + 1) / 12))
    edges = np.arange(scores.min(), scores.max() + width + 1, width)
    counts, _ = np.histogram(scores, edges)
    for count, low in zip(counts, edges):
        span = f"{low:,.10g}" + (f" to {low + width - 1:,.10g}" if width > 1 else "")
        say(f"  {span:>14}  {count:5}  {'#' * math.ceil(40 * count / counts.max())}")
    if others := reference_scores(env_id):
        for score, name in ((432, "one wall"), (864, "both walls, the maximum")):
            say(f"  {(scores >= score).mean():.0%} of the games reached {score}, {name}")
        say(f"  Mnih et al. 2015{others}")


def evaluate(config: Config, agent: Agent) -> None:
    """Play whole games, append their true scores to <model>.evaluations.jsonl and print them."""
    finished = play_games(agent, config)
    if not finished:
        raise KeyboardInterrupt
    scores = [game.score for game in finished]
    # Without randomness, the same start gives the same game: it must not count twice.
    unique = {(game.score, game.length): game.score for game in finished}
    different = list(unique.values()) if config.greedy and not config.sticky_actions else scores
    interval, partial = confidence_interval(different), len(scores) < config.evaluate
    report = {name: getattr(config, name) for name in (*MODEL_SETTINGS, "seed", "greedy")}
    report |= {"model": agent.path.name, "steps": agent.steps, "games": len(scores)}
    report |= {"mean": np.mean(scores), "interval_95": interval, "different_games": len(different)}
    report |= {"partial": partial, "scores": scores, "lengths": [game.length for game in finished]}

    folder = agent.path.parent if os.access(agent.path.parent, os.W_OK) else Path()
    path = folder / f"{agent.path.name}.evaluations.jsonl"
    with reported(f"write {path}"), open(path, "a") as file:
        file.write(json.dumps(report) + "\n")
    print_scores(np.array(scores), interval, config.env_id)
    if len(different) < len(scores):
        say(f"  only {len(different)} games are different: the interval covers only those")
    variant = f"{config.env_id}, sticky actions {config.sticky_actions:g}, seed {config.seed}"
    say(f"  {variant}; {'interrupted; ' if partial else ''}appended to {path}")


BACKGROUND, PLATE, WHITE = (26, 22, 20), (48, 42, 38), (240, 240, 240)  # BGR, as in OpenCV
GRAY, ORANGE = (150, 145, 140), (60, 150, 255)
FONT, VISIBLE = cv2.FontFace("sans"), cv2.WND_PROP_VISIBLE


def draw_text(image: np.ndarray, text: str, x: int, y: int, size=16, color=GRAY) -> None:
    """Draw `text`; (x, y) is the left end of its baseline."""
    cv2.putText(image, text, (x, y), color, FONT, size, 500)


def draw_policy(panel: np.ndarray, names: list[str], probs: list[float], action: int) -> None:
    """A bar for the probability of each action, in two columns if there are many; the agent's
    choice is orange.
    """
    draw_text(panel, "policy: the agent's probability of each action", 24, 258)
    # Columns, height of a row, left end of the bar, its length, left end of the percentage.
    wide, narrow = (1, 27, 138, 174, 328), (2, 18, 106, 40, 153)
    columns, row, left, bar, right = wide if len(names) <= 6 else narrow
    for i, (name, prob) in enumerate(zip(names, probs)):
        column, line = divmod(i, math.ceil(len(names) / columns))
        x, y, color = 24 + 186 * column, 270 + row * line, ORANGE if i == action else GRAY
        draw_text(panel, name, x, y + 3 * row // 4, 3 * row // 5, color)
        draw_text(panel, f"{prob:.0%}", x + right, y + 3 * row // 4, 3 * row // 5, WHITE)
        strip = panel[y + 2 : y + row - 2, x + left : x + left + bar]
        strip[:] = PLATE
        strip[:, : round(bar * prob)] = color


def draw_values(panel: np.ndarray, values: deque[float]) -> None:
    """The value in the last ten seconds: the discounted reward that the agent expects."""
    draw_text(panel, f"value: expected reward {values[-1]:.2f}", 24, 471)
    bottom, low, high = len(panel) - 24, min(0.0, *values), max(1.0, *values) * 1.1
    panel[483:bottom, 24:396] = PLATE
    x = 396 - 372 / values.maxlen * np.arange(len(values))[::-1]
    y = bottom - (bottom - 483) * (np.array(values) - low) / (high - low)
    cv2.polylines(panel, [np.stack([x, y], -1).astype(np.int32)], False, ORANGE, 2, cv2.LINE_AA)


def take_newer_weights(agent: Agent) -> None:
    """Read the agent's file again: a run that trains it may have saved newer weights."""
    if agent.path.is_file():
        with reported(f"load {agent.path}"):
            newer = load_agent(str(agent.path))
            agent.load_state_dict(newer.state_dict())
            agent.steps, agent.mean_score = newer.steps, newer.mean_score


def watch(agent: Agent, config: Config, seed: int, scores: list, human=None) -> Iterator[tuple]:
    """Play without end, and append the true score of each game to `scores`.

    Yields for each emulator frame a picture of the game, (630, 480, 3) uint8 BGR, and the panel of
    what the agent saw and decided, (630, 420, 3).
    """
    games = Games(config, 1, keep_rgb=True)
    values: deque[float] = deque(maxlen=10 * EMULATOR_FPS // FRAME_SKIP)
    for frames, decision, result in play_steps(agent, games, config, seed, human):
        shown = [rgb[..., ::-1].repeat(3, 0).repeat(3, 1) for rgb in games.env.render()[0]]
        panel = np.full((len(shown[0]), 420, 3), BACKGROUND, np.uint8)
        mean = f"{np.mean(scores):.1f}" if scores else "-"
        numbers = (f"{games.scores[0]:.10g}", games.lives[0], len(scores) + 1, mean)
        for x, name, value in zip((24, 154, 212, 296), ("score", "lives", "game", "mean"), numbers):
            draw_text(panel, name, x, 39)
            draw_text(panel, str(value), x, 81, 36, ORANGE if name == "score" else WHITE)
        draw_text(panel, "observation: the last four frames", 24, 123)
        for i, frame in enumerate(frames[0]):
            panel[135:219, 24 + 96 * i : 108 + 96 * i] = cv2.resize(frame, (84, 84))[..., None]
        probs, action, value = (decision[x][0].tolist() for x in ("probs", "actions", "values"))
        draw_policy(panel, games.action_names, probs, action)
        values.append(value)
        draw_values(panel, values)
        draw_text(panel, f"{agent.path.name}: run of {agent.steps:,} steps", 24, len(panel) - 8, 12)
        yield from ((game, panel) for game in shown)
        if result.finished:
            scores.append(result.finished[0].score)
            take_newer_weights(agent)


class Recorder:
    """Writes 60 pictures a second to an .mp4, or 15 smaller ones to a .gif. Raises OSError. What is
    recorded can be played even if the process dies.
    """

    GIF_SECONDS = 40  # a longer one is too large to share

    def __init__(self, path: Path) -> None:
        self.path, self.is_gif, self.count = path, path.suffix.lower() == ".gif", 0
        self.video, self.last = None, None  # the MP4, or the last picture of the GIF
        open(path, "ab").close()  # an error is raised now, not at the end

    def add(self, picture: np.ndarray) -> None:
        """Add the picture of the next emulator frame, (height, width, 3) uint8 BGR."""
        if not self.is_gif:
            self.add_to_video(picture)
        elif self.count % 4 == 0 and self.count < self.GIF_SECONDS * EMULATOR_FPS:
            self.add_to_gif(picture)
        self.count += 1

    def add_to_video(self, picture: np.ndarray) -> None:
        """Encode a picture. H.264 with 4:2:0 color plays in every browser."""
        if self.video is None:
            options = {"movflags": "hybrid_fragmented", "flush_packets": "1"}
            self.video = av.open(self.path, "w", options=options)
            options = {"preset": "veryfast", "crf": "20", "g": "60"}
            stream = self.video.add_stream("libx264", rate=EMULATOR_FPS, options=options)
            stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            self.video.start_encoding()  # raises on a full disk, where `encode` would crash
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="bgr24")
        self.video.mux(self.video.streams.video[0].encode(frame))

    def add_to_gif(self, picture: np.ndarray) -> None:
        """Append a picture with its own palette; the pixels that have not changed are transparent,
        since these compress well.
        """
        small = cv2.resize(picture, None, fx=2 / 3, fy=2 / 3, interpolation=cv2.INTER_AREA)
        first = self.last is None
        unchanged = np.zeros(small.shape[:2], bool) if first else (small == self.last).all(-1)
        image = Image.fromarray(cv2.cvtColor(small, cv2.COLOR_BGR2RGB))
        image = image.quantize(127, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        transparent = len(image.getpalette()) // 3  # one more color
        image.putpalette([*image.getpalette(), 0, 0, 0])
        image.paste(transparent, mask=Image.fromarray(unchanged))

        header = GifImagePlugin.getheader(image, info={"loop": 0})[0] if first else []
        duration = (70, 60, 70)[self.count // 4 % 3]  # milliseconds, in steps of ten
        info = {"duration": duration, "transparency": transparent, "include_color_table": True}
        with open(self.path, "wb" if first else "r+b") as file:
            file.seek(0 if first else -1, os.SEEK_END)  # overwrite the trailer
            file.write(b"".join([*header, *GifImagePlugin.getdata(image, **info), b";"]))
        self.last = small

    def close(self) -> str:
        """Finish the file. Returns a line about it."""
        if self.video:
            if self.count:  # flushing an empty encoder crashes
                self.video.mux(self.video.streams.video[0].encode(None))
            self.video.close()
        return f"{self.path}: {self.path.stat().st_size / 1e6:.2f} MB"


def draw_frames(config: Config, agent: Agent) -> np.ndarray:
    """A labeled picture, BGR, of how a screen becomes the network's input."""
    games = Games(config, 1, keep_rgb=True)
    steps = round((config.seconds or 10) * EMULATOR_FPS / FRAME_SKIP)
    next(itertools.islice(play_steps(agent, games, config, config.seed), steps, None))
    screen, frames = games.env.render()[0][-1], games.frames[0]
    canvas = np.full((792, 1156, 3), BACKGROUND, np.uint8)

    def put(image: np.ndarray, label: str, x: int, y: int, width: int, height: int) -> None:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST)
        canvas[y : y + height, x : x + width] = image if image.ndim == 3 else image[..., None]
        draw_text(canvas, label, x, y - 12)

    put(screen[..., ::-1], "1. the screen: 210 x 160, RGB", 24, 48, 320, 420)
    put(cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY), "2. grayscale", 368, 48, 320, 420)
    put(frames[-1], f"3. resized to {FRAME_SIZE} x {FRAME_SIZE}", 712, 48, 420, 420)
    for i, frame in enumerate(frames):
        put(frame, f"4. observation: frame {i + 1} of {len(frames)}", 24 + 285 * i, 516, 252, 252)
    return canvas


def record(config: Config, agent: Agent) -> None:
    """Record one game, or --seconds of play, to --record; to a .png, what the agent sees."""
    if Path(config.record).suffix.lower() == ".png":
        Image.fromarray(draw_frames(config, agent)[..., ::-1]).save(config.record)
        return say(config.record)
    scores, recorder = [], Recorder(Path(config.record))
    seconds = min(config.seconds or math.inf, recorder.GIF_SECONDS if recorder.is_gif else math.inf)
    # What was recorded before Ctrl-C is kept.
    with progress_bar(None, "frame") as bar, contextlib.suppress(KeyboardInterrupt):
        for pictures in watch(agent, config, config.seed, scores):
            if recorder.count >= seconds * EMULATOR_FPS or (scores and not config.seconds):
                break
            recorder.add(np.hstack(pictures))
            advance(bar, 1, f"games finished: {len(scores)}")
    say(recorder.close())


def display_error() -> str:
    """Why no window can be opened, or "". OpenCV would abort the process, so a child tries."""
    probe = "import sys; sys.tracebacklimit = 0; import cv2, os; cv2.namedWindow('x'); os._exit(0)"
    try:
        subprocess.run([sys.executable, "-c", probe], capture_output=True, timeout=10, check=True)
    except subprocess.SubprocessError as error:
        reason = error.stderr or b"the display does not answer"
        return reason.decode(errors="replace").strip().partition("\n")[0]
    return ""


# The player's keys: letters, space, and the arrows as X11 numbers them.
MOVES = {"a": "LEFT", "d": "RIGHT", "w": "UP", "s": "DOWN", " ": "FIRE"}
MOVES |= {chr(65361): "LEFT", chr(65363): "RIGHT", chr(65362): "UP", chr(65364): "DOWN"}


class Window:
    """The window in which an agent plays, with the state that its keys change."""

    TITLE = "ai_breakout_game"
    KEYS = "q quit, p pause, . step, + - speed, n panel, g GIF, v MP4, r new game"  # see `press`

    def __init__(self, config: Config) -> None:
        self.human = self.choose if config.play else None
        self.names, self.move = action_names(config.env_id), "NOOP"
        os.environ["QT_QPA_FONTDIR"] = str(Path(cv2.__file__).parent)  # else Qt warns
        # The libX11-xcb in the OpenCV wheel loses events beside a newer libX11: load the system's.
        with contextlib.suppress(OSError):
            ctypes.CDLL("libX11-xcb.so.1", mode=ctypes.RTLD_GLOBAL)
        self.panel, self.paused, self.restart, self.recorder = True, False, False, None
        self.speed, self.count, self.frames_left = 1.0, 0, 0  # frames to show while paused
        self.keys = ("a d space: play, " if self.human else "") + self.KEYS
        self.message = self.keys if self.human else "h: keys"
        self.message_until, self.due = time.monotonic() + 4, 0.0
        # Without Qt's toolbar. On macOS, only 0 keeps the size of the picture.
        plain = 0 if sys.platform == "darwin" else cv2.WINDOW_GUI_NORMAL
        cv2.namedWindow(self.TITLE, cv2.WINDOW_AUTOSIZE | plain)

    def say(self, message: str) -> None:
        """Show a line for four seconds, and print it."""
        say(message)
        self.message, self.message_until = message, time.monotonic() + 4

    def toggle_recorder(self, suffix: str = "") -> None:
        """Start a recording in the current folder, or finish it."""
        recorder, self.recorder = self.recorder, None
        with reported("record"):
            if recorder:
                self.say(recorder.close())
            elif suffix:
                name = f"ai_breakout_game-{time.strftime('%Y%m%d-%H%M%S')}{suffix}"
                self.recorder = Recorder(Path(name))
                self.say(f"recording {name}")

    def choose(self) -> int:
        """The player's action. A key press is one step, since OpenCV reports no key release."""
        name, self.move = self.move, "NOOP"
        return self.names.index(name) if name in self.names else 0

    def press(self, key: str) -> None:
        """Handle a key of the window."""
        if key in ("q", "\x1b"):
            raise KeyboardInterrupt  # ends the program as Ctrl-C does
        elif key == "r":
            self.restart, self.paused = True, False
        elif key in " p":
            self.paused = not self.paused
        elif key == ".":
            self.frames_left = FRAME_SKIP
        elif key == "h":
            self.say(self.keys)
        elif key == "n" and not self.recorder:  # a recording has one size
            self.panel = not self.panel
        elif key in "gv":
            self.toggle_recorder(".gif" if key == "g" else ".mp4")
        elif key in "+=-":
            self.speed = min(max(self.speed * (0.5 if key == "-" else 2), 0.125), 8.0)
            self.say(f"speed x {self.speed:g}")

    def draw(self, picture: np.ndarray, seconds: float) -> None:
        """Show `picture` for at least a millisecond and `seconds`, and handle the keys."""
        status = "paused" if self.paused else "recording" if self.recorder else ""
        text = self.message if time.monotonic() < self.message_until else status
        draw_text(picture[:, :480], text, 14, len(picture) - 12, 12, WHITE)  # not on the panel
        cv2.imshow(self.TITLE, picture)
        # Without the bits of Shift and the like; no key is -1, which becomes chr(0xFFFF).
        key = chr(cv2.waitKeyEx(max(1, round(seconds * 1000))) & 0xFFFF).lower()
        if self.human and key in MOVES:
            self.move = MOVES[key]
        else:
            self.press(key)
        with contextlib.suppress(cv2.error):  # Qt does not know a closed window
            if sys.platform == "darwin" or cv2.getWindowProperty(self.TITLE, VISIBLE) > 0:
                return
        raise KeyboardInterrupt

    def show(self, pictures: tuple[np.ndarray, np.ndarray]) -> None:
        """Show an emulator frame for as long as it lasts, and while the game is paused."""
        if self.recorder:
            with reported(f"write {self.recorder.path}") as errors:
                self.recorder.add(np.hstack(pictures[: 1 + self.panel]))
            if errors:  # they end the recording, but not the game
                self.recorder = None
        self.count += 1
        if self.count % max(1, round(self.speed)) == 0:  # at high speed, every nth
            period = 1 / (EMULATOR_FPS * min(1, self.speed))
            self.due = max(self.due + period, time.monotonic() - 0.1)  # do not hurry after a pause
            self.draw(np.hstack(pictures[: 1 + self.panel]), self.due - time.monotonic())
        self.frames_left = max(0, self.frames_left - 1)
        while self.paused and not (self.frames_left or self.restart):
            self.draw(np.hstack(pictures[: 1 + self.panel]), 0.03)


def play(config: Config, agent: Agent) -> None:
    """Let the agent or the user play in a window until it is closed."""
    if problem := display_error():
        if config.play:
            raise OSError(f"cannot open a window: {problem}")
        name = f"ai_breakout_game-{time.strftime('%Y%m%d-%H%M%S')}.mp4"
        say(f"Cannot open a window: {problem}. Recording a minute to {name} instead.")
        return record(dataclasses.replace(config, record=name, seconds=60.0), agent)
    window, scores = Window(config), []
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, q, or the window was closed
        for seed in itertools.count(config.seed):
            window.restart = False
            for pictures in watch(agent, config, seed, scores, window.human):
                window.show(pictures)
                if window.restart:
                    break
    window.toggle_recorder()
    mean = f", mean score {np.mean(scores):.2f}" if scores else ""
    say(f"games finished: {len(scores)}{mean}")
    if config.play:
        mean = "unknown" if math.isnan(agent.mean_score) else f"{agent.mean_score:.2f}"
        say(f"{agent.path.name} in training: {mean}{reference_scores(config.env_id)}")


# ---- Command line --------------------------------------------------------------------------------

# The groups of flags that each mode uses, besides "mode" and "game".
MODES = {"train": ("training", "PPO"), "resume": ("training", "PPO"), "run": ("playing",)}
MODES |= {"play": ("playing",), "evaluate": ("playing",), "record": ("playing", "recording")}
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def parse_value(field: dataclasses.Field, text: str) -> Any:
    """The value of a flag. Raises ArgumentTypeError."""
    kind, low, high = field.type, field.metadata["low"], field.metadata["high"]
    if kind is bool and text.lower() in YES + NO:
        return text.lower() in YES
    if kind is str and text:
        return os.path.expanduser(text)
    with contextlib.suppress(ValueError, OverflowError):
        value = float(text)  # for int, too: 1e6 is a million
        if kind in (int, float) and low <= value <= high and kind(value) == value < math.inf:
            return kind(value)
    wanted = {str: "a name", bool: "yes or no"}.get(kind, f"{kind.__name__} from {low} to {high}")
    raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")


def parse_flags(argv: list[str] | None) -> dict[str, Any]:
    """The flags that were given, each a field of Config. Raises UserError."""

    def fail(message: str) -> None:  # without the usage, which would bury the message
        raise UserError(f"{message.removeprefix('argument ')}; --help lists all flags")

    parser = argparse.ArgumentParser(
        usage="python3 %(prog)s [--flag=value ...]",
        description="\n\n".join(__doc__.split("\n\n")[:2]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.error, groups = fail, {}
    for field in dataclasses.fields(Config):
        name, text, default = field.metadata["group"], field.metadata["help"], field.default
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        if default and "(default" not in text:
            text += f" (default: {'yes' if default is True else default})"
        metavar = {int: "N", float: "X", str: "NAME", bool: "yes|no"}[field.type]
        optional = {"nargs": "?", "const": True} if field.type is bool else {}
        kind, typed = functools.partial(parse_value, field), f"--{field.name.replace('_', '-')}"
        groups[name].add_argument(typed, type=kind, metavar=metavar, help=text, **optional)
    return vars(parser.parse_args(argv))


def find_mode(given: dict[str, Any]) -> str:
    """The mode that the flags ask for. Raises UserError for flags that it would ignore."""
    mode, *others = [name for name in MODES if given.get(name)] or ["train"]
    if others:
        raise UserError(f"--{mode} and --{others[0]} are mutually exclusive")
    groups = {field.name: field.metadata["group"] for field in dataclasses.fields(Config)}
    for name in given:
        if groups[name] not in ("mode", "game", *MODES[mode]):
            raise UserError(f"--{name.replace('_', '-')} is for {groups[name]}, not for {mode}")
    if mode == "record" and Path(given["record"]).suffix.lower() not in (".gif", ".mp4", ".png"):
        raise UserError(f"--record={given['record']} must end in .gif, .mp4 or .png")
    return mode


def make_config(given: dict[str, Any], defaults: dict[str, Any]) -> Config:
    """Settings from the flags that were given, else from a model's `defaults`. Raises UserError."""
    settings = defaults | given
    if settings.get("env_id") != defaults.get("env_id") and "sticky_actions" not in given:
        settings.pop("sticky_actions", None)  # it belongs to the other environment
    registered = game_settings(settings.get("env_id", Config.env_id))
    settings.setdefault("sticky_actions", registered["repeat_action_probability"])
    config = Config(**settings)
    if changed := [f"{k}={x}" for k, x in defaults.items() if getattr(config, k) != x]:
        say(f"note: the model was trained with {', '.join(changed)}")
    parts = world_size() * config.num_minibatches
    if config.num_envs % world_size() or config.num_envs * config.num_steps % parts:
        batch = f"{config.num_envs} games x {config.num_steps} steps"
        raise UserError(f"{batch} cannot be divided into {parts} parts (--num-minibatches)")
    return config


def load_player(given: dict[str, Any]) -> tuple[Config, Agent]:
    """Settings and agent, for playing or to train further. Raises UserError."""
    rom = game_settings(given.get("env_id", Config.env_id))["game"]
    name = given.get("model_filename", f"ai_{rom}_game.mdl")
    if name == "random":
        config = make_config(given, {})
        torch.manual_seed(config.seed)
        agent = Agent(len(action_names(config.env_id)))
        agent.path = Path("models") / f"random_{rom}"
        nn.init.zeros_(agent.actor.weight)  # all actions are equally probable
    else:
        agent = load_agent(name)
        config = make_config(given, agent.settings)
    if agent.actor.out_features != len(action_names(config.env_id)):
        raise UserError(f"{agent.path} and {config.env_id} have different actions")
    agent.patience = config.patience
    return config, agent.to(pick_device(config.device))


def start_training(given: dict[str, Any]) -> None:
    """Train a new agent, or that of --model-filename. Raises UserError."""
    pretrained = "model_filename" in given
    config, agent = load_player(given) if pretrained else (make_config(given, {}), None)
    state = make_state(config, agent)
    name = f"{config.env_id.replace('/', '-')}__{config.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = Path("runs") / all_gather(name)[0]
    for path in (Path("models"), folder):
        path.mkdir(parents=True, exist_ok=True)
    train(config, state, folder)


def resume_training(given: dict[str, Any]) -> None:
    """Continue a run from its checkpoint. Raises UserError."""
    name = given.pop("resume")  # a path, a name in runs/, a checkpoint, or latest
    folders = (Path(name), Path("runs") / name)
    path = find_file(name, [Path(name), *(folder / "checkpoint.pt" for folder in folders)])
    saved = read_file(path)
    try:
        settings = dataclasses.asdict(Config()) | saved["config"]  # older runs have fewer
        for key, value in given.items():
            larger = key == "total_timesteps" and value > settings[key]
            if value != settings[key] and not larger and key != "device":
                raise UserError(f"a resumed run has {key}={settings[key]}, not {value}")
        config = make_config(settings | given, {})
        state = make_state(config, global_step=saved["global_step"])
        state.load_state_dict(saved)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        hint = f"is not a checkpoint ({error!r:.99}); --model-filename trains a model further"
        raise UserError(f"{path} {hint}") from None
    train(config, state, path.parent)


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns 0; 1 if it failed, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        given = parse_flags(argv)
        mode, torchrun = find_mode(given), dist.is_torchelastic_launched()
        with handle_signals(signal.default_int_handler):
            if mode in ("train", "resume"):
                with process_group() if torchrun else contextlib.nullcontext():
                    {"train": start_training, "resume": resume_training}[mode](given)
            elif torchrun:
                raise UserError(f"--{mode} does not work with torchrun")
            else:
                action = {"evaluate": evaluate, "record": record}.get(mode, play)
                action(*load_player(given))
        return 0
    except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, UserError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # a bug; else there is no memory left to allocate
        print(f"{Path(__file__).name}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
