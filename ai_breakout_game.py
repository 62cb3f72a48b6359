#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "ale-py==0.12.1", "gymnasium==1.4.0", "numpy>=2.0,<3", "opencv-python==5.0.0.93",
#   "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1",
# ]
# ///
"""Learn Atari Breakout from its pixels with PPO, then play it in front of you.

    python3 ai_breakout_game.py --num-envs=8 --total-timesteps=3000 --multithreading=True
    python3 ai_breakout_game.py --run=1 --model-filename="ai_breakout_game3000.mdl"
    tensorboard --logdir runs
    python3 ai_breakout_game.py --help

The file reads once, from top to bottom: configuration, the game and its wrappers, the network,
PPO, training, the command line. Each function calls only what stands above it.

Shapes, named the same everywhere: T steps of a rollout, N environments, B = T * N, M samples of a
minibatch, A actions. Frames are uint8 until the network, actions int64, flags bool.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable, NamedTuple, get_args, get_type_hints

# Waiting OpenMP threads must sleep, not spin: the emulator's threads need the same cores, and beside
# a second busy process spinning costs two thirds of the speed. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import ale_py  # noqa: E402
import cv2  # noqa: E402
import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from ale_py.env import AtariEnv  # noqa: E402
from ale_py.vector_env import AtariVectorEnv  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

gym.register_envs(ale_py)

# --------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend. `main` prints it as one line and exits with code 2."""


def knob(default: Any, group: str, text: str, low: float = -math.inf, high: float = math.inf) -> Any:
    """A field of Config: its default, the group of its flag in --help, its help text, its range."""
    return dataclasses.field(
        default=default, metadata={"group": group, "help": text, "low": low, "high": high}
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob once. The command line is made from these fields: num_envs becomes --num-envs."""

    run: bool = knob(False, "mode", "watch a trained model play instead of training")
    model_filename: str = knob(
        "", "mode", "weights to watch, or to start training from; looked for as given, then in models/"
    )

    env_id: str = knob(
        "BreakoutNoFrameskip-v4", "game", "any ALE game that gymnasium registers, such as ALE/Pong-v5"
    )
    sticky_actions: float | None = knob(
        None,
        "game",
        "chance that the emulator repeats the last action instead (default: as --env-id says, "
        "0 for ...NoFrameskip-v4, 0.25 for ALE/...-v5)",
        0,
        1,
    )
    seed: int = knob(
        1, "game", "same seed, same machine, same run, to the last bit (on the CPU)", 0, 2**31 - 2**16
    )

    total_timesteps: int = knob(
        10_000_000,
        "training",
        "steps to train, all games together, rounded up to whole updates; on Breakout 1 M steps buy "
        "about 20 points, 10 M about 400",
        1,
    )
    num_envs: int = knob(8, "training", "games played at once", 1, 4096)
    multithreading: bool = knob(
        True, "training", "step the games on native threads; no: one by one through the Python wrappers"
    )
    device: str = knob("auto", "training", "auto, cpu, cuda or mps; auto takes cuda, then mps, then cpu")

    learning_rate: float = knob(2.5e-4, "PPO", "step size of Adam at the start", 0, 1)
    anneal_lr: bool = knob(True, "PPO", "lower the learning rate linearly to zero over the run")
    num_steps: int = knob(128, "PPO", "steps of each game between two updates (T)", 1, 65536)
    gamma: float = knob(0.99, "PPO", "discount: what a reward one step later is worth now", 0, 1)
    gae_lambda: float = knob(0.95, "PPO", "lambda of the generalised advantage estimate", 0, 1)
    num_minibatches: int = knob(4, "PPO", "parts that a batch is learnt in; must divide it", 1)
    update_epochs: int = knob(4, "PPO", "times that each batch is learnt from", 1, 1000)
    norm_adv: bool = knob(True, "PPO", "normalise the advantages of each minibatch")
    clip_coef: float = knob(0.1, "PPO", "epsilon: how far the policy may move in one update", 0)
    clip_vloss: bool = knob(True, "PPO", "clip the value's move as well")
    ent_coef: float = knob(0.01, "PPO", "weight of the entropy bonus, which keeps the agent curious", 0)
    vf_coef: float = knob(0.5, "PPO", "weight of the value loss", 0)
    max_grad_norm: float = knob(0.5, "PPO", "longest gradient, over all parameters together", 0)
    target_kl: float | None = knob(
        None, "PPO", "end an update early once the policy has moved this far (default: never)", 0
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and not (low <= value <= high and math.isfinite(value)):
                bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                raise UserError(f"--{field.name.replace('_', '-')} must be {bounds}, not {value}")
        if self.batch_size % self.num_minibatches:
            raise UserError(
                f"--num-minibatches={self.num_minibatches} does not divide the batch of "
                f"{self.num_envs} games x {self.num_steps} steps = {self.batch_size}"
            )

    @property
    def batch_size(self) -> int:
        """B = T * N: the steps that one update learns from."""
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        """M: the samples behind one step of the optimizer."""
        return self.batch_size // self.num_minibatches

    @property
    def num_updates(self) -> int:
        """Whole updates that reach `total_timesteps`."""
        return math.ceil(self.total_timesteps / self.batch_size)


# --------------------------------------------------------------------------------------------------
# Environment: from the emulator's screen to what the network sees
# --------------------------------------------------------------------------------------------------

FRAME_SKIP = 4  # emulator frames an action is held for; Mnih et al. 2015, as all that follows here
FRAME_STACK = 4  # frames the network sees at once: one still picture does not show where a ball flies
FRAME_SIZE = 84  # pixels, both ways
NOOP_MAX = 30  # the first frames of a game pass by themselves, a random number below this
MAX_FRAMES = 108_000  # emulator frames, 30 minutes, after which a game is cut off


class Game(NamedTuple):
    """Which cartridge, with which chance of a sticky action."""

    rom: str
    sticky: float


def find_game(env_id: str, sticky_actions: float | None) -> Game:
    """Look a gymnasium id up. Raises UserError, with the nearest names, for one that is no ALE game."""
    known = {name: s.kwargs for name, s in gym.registry.items() if "game" in (s.kwargs or {})}
    if env_id not in known:
        short = {name.removeprefix("ALE/").lower(): name for name in known}
        near = difflib.get_close_matches(env_id.removeprefix("ALE/").lower(), short, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(short[n] for n in near)}?" if near else ""
        raise UserError(f"--env-id={env_id} is not a game of the Arcade Learning Environment{hint}")
    kwargs = known[env_id]
    sticky = kwargs["repeat_action_probability"] if sticky_actions is None else sticky_actions
    return Game(kwargs["game"], sticky)


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

    def __init__(self, env: gym.Env, noop_max: int = NOOP_MAX) -> None:
        super().__init__(env)
        self.noop_max = noop_max

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(self.noop_max) if self.noop_max else 0):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info


class RGBSaveEnv(gym.Wrapper):
    """Keeps every frame in colour for the eye, while the network sees the grey ones."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.rgb_frames: list[np.ndarray] = []  # (210, 160, 3) uint8 each; whoever shows them empties it

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        self.rgb_frames = [self.unwrapped.ale.getScreenRGB()]
        return obs, info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        result = self.env.step(action)
        self.rgb_frames.append(self.unwrapped.ale.getScreenRGB())
        return result


class MaxAndSkipEnv(gym.Wrapper):
    """Holds each action for four frames and shows the brighter of the last two, pixel by pixel.

    The Atari draws some objects only on every other frame; the maximum shows them always.
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
    """Shrinks the grey screen, (210, 160) uint8, to 84x84: ball and bricks can still be told apart."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (FRAME_SIZE, FRAME_SIZE), np.uint8)

    def observation(self, frame: np.ndarray) -> np.ndarray:
        return cv2.resize(frame, (FRAME_SIZE, FRAME_SIZE), interpolation=cv2.INTER_AREA)


class FrameStack(gym.Wrapper):
    """Shows the last four frames at once, (4, 84, 84) uint8, oldest first; a new game starts black."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.stack = np.zeros((FRAME_STACK, *env.observation_space.shape), np.uint8)
        self.observation_space = gym.spaces.Box(0, 255, self.stack.shape, np.uint8)

    def push(self, frame: np.ndarray) -> np.ndarray:
        self.stack = np.concatenate([self.stack[1:], frame[None]])
        return self.stack

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        frame, info = self.env.reset(**kwargs)
        self.stack = np.zeros_like(self.stack)
        return self.push(frame), info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        frame, reward, terminated, truncated, info = self.env.step(action)
        return self.push(frame), reward, terminated, truncated, info


class EpisodicLifeEnv(gym.Wrapper):
    """A lost life ends the episode for the learner, but not the game.

    The learner sees that losing the ball costs all that would have followed; the next `reset` goes on
    with the same game, and FIRE serves the next ball.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.lives, self.game_over = 0, True
        self.last: tuple[np.ndarray, dict] | None = None

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        life_lost = 0 < info["lives"] < self.lives
        self.lives, self.game_over, self.last = info["lives"], terminated or truncated, (obs, info)
        return obs, reward, terminated or life_lost, truncated, info

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        before: dict = {}
        actions = self.unwrapped.get_action_meanings()
        if not self.game_over and kwargs.get("seed") is None and "FIRE" in actions:
            _, _, _, _, before = self.step(actions.index("FIRE"))  # may, rarely, end the game itself
        if self.game_over or kwargs.get("seed") is not None:
            obs, info = self.env.reset(**kwargs)
            self.lives, self.game_over, self.last = info["lives"], False, (obs, before | info)
        return self.last


class ClipRewardEnv(gym.RewardWrapper):
    """The learner gets the sign of each reward, so that one step size fits every game."""

    def reward(self, reward: float) -> float:
        return float(np.sign(reward))


def make_env(
    game: Game, noop_max: int = NOOP_MAX, max_frames: int = MAX_FRAMES, keep_rgb: bool = False
) -> gym.Env:
    """One game behind the whole wrapper stack: what the native environment does, made readable.

    The grey picture is the emulator's own (its palette's luminance), so that both ways of stepping
    the games show the same bytes. The true score is counted below the lives and the clipping, and
    arrives as info["episode"] when a whole game is over.
    """
    env = AtariEnv(
        game.rom, obs_type="grayscale", frameskip=1, repeat_action_probability=game.sticky
    )
    env = RGBSaveEnv(env) if keep_rgb else env
    env = NoopResetEnv(FireResetEnv(env), noop_max)
    env = MaxAndSkipEnv(env)
    env = gym.wrappers.TimeLimit(env, math.ceil(max_frames / FRAME_SKIP))
    env = gym.wrappers.RecordEpisodeStatistics(env)
    env = FrameStack(WarpFrame(env))
    env = EpisodicLifeEnv(env)
    return ClipRewardEnv(env)


class FinishedGame(NamedTuple):
    """A whole game, over: which of the N, its true score, its length in steps of four frames."""

    slot: int
    score: float
    length: int


class StepResult(NamedTuple):
    """What one step of N games brought.

    After an episode's end the next step is no decision: it resets the game, or serves the ball with
    FIRE, whatever the agent says. Such steps have `decided` False and are not learnt from.
    """

    frames: np.ndarray  # (N, 4, 84, 84) uint8: after the step; after an end, the last of the episode
    rewards: np.ndarray  # (N,) float32: clipped to their sign
    terminated: np.ndarray  # (N,) bool: a life was lost or the game is over
    truncated: np.ndarray  # (N,) bool: the game was cut off
    decided: np.ndarray  # (N,) bool: the action was carried out
    lives: np.ndarray  # (N,) int
    finished: list[FinishedGame]


class NativeGames:
    """N games on ale-py's own threads: the wrapper stack, in C++."""

    def __init__(
        self, game: Game, num_envs: int, noop_max: int = NOOP_MAX, max_frames: int = MAX_FRAMES
    ) -> None:
        self.env = AtariVectorEnv(
            game.rom,
            num_envs,
            repeat_action_probability=game.sticky,
            noop_max=noop_max,
            max_num_frames_per_episode=max_frames,
            life_loss_info=True,  # and not episodic_life, which builds a whole new wall at every life
            reward_clipping=False,  # the true score is counted here
        )
        self.action_names = [action.name for action in self.env.ale.get_action_set()]
        self.fire = self.action_names.index("FIRE") if "FIRE" in self.action_names else None

    def reset(self, seed: int) -> np.ndarray:
        """Start all games anew, game i from seed + i. Returns frames, (N, 4, 84, 84) uint8."""
        frames, info = self.env.reset(seed=seed)
        self.lives = info["lives"]
        self.scores, self.lengths = np.zeros(len(frames)), np.zeros(len(frames), int)
        self.serving = np.zeros(len(frames), bool)  # the next step serves a ball or resets the game
        return frames

    def step(self, actions: np.ndarray) -> StepResult:
        """Take `actions`, (N,) int64. Raises IndexError for one that the game does not have."""
        if actions.min() < 0 or actions.max() >= len(self.action_names):
            raise IndexError(f"actions {actions} are not all below {len(self.action_names)}")
        if self.fire is not None:
            actions = np.where(self.serving, self.fire, actions)
        frames, rewards, terminated, truncated, info = self.env.step(actions)
        decided, self.lives = ~self.serving, info["lives"]
        self.scores += rewards
        self.lengths += 1
        over = truncated | (terminated & (self.lives == 0))
        slots = np.flatnonzero(over)
        finished = [FinishedGame(int(i), float(self.scores[i]), int(self.lengths[i])) for i in slots]
        self.scores[over], self.lengths[over] = 0, -1  # -1: the step that resets a game is none of it
        self.serving = over | (terminated & (self.fire is not None))
        rewards = np.sign(rewards).astype(np.float32)
        return StepResult(frames, rewards, terminated, truncated, decided, self.lives, finished)


class WrappedGames:
    """N games one after the other through the Python wrappers: slower, and open to be changed."""

    def __init__(
        self,
        game: Game,
        num_envs: int,
        noop_max: int = NOOP_MAX,
        max_frames: int = MAX_FRAMES,
        keep_rgb: bool = False,
    ) -> None:
        make = functools.partial(make_env, game, noop_max, max_frames, keep_rgb)
        self.env = gym.vector.SyncVectorEnv(
            [make] * num_envs, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP
        )
        self.action_names = self.env.envs[0].unwrapped.get_action_meanings()

    def reset(self, seed: int) -> np.ndarray:
        """Start all games anew, game i from seed + i. Returns frames, (N, 4, 84, 84) uint8."""
        frames, info = self.env.reset(seed=seed)
        self.lives, self.serving = info["lives"], np.zeros(len(frames), bool)
        return frames

    @property
    def scores(self) -> np.ndarray:
        """True scores so far, (N,) float."""
        return np.array(self.env.get_attr("episode_returns"), float)

    def step(self, actions: np.ndarray) -> StepResult:
        """Take `actions`, (N,) int64."""
        frames, rewards, terminated, truncated, info = self.env.step(actions)
        decided, self.serving, self.lives = ~self.serving, terminated | truncated, info["lives"]
        finished = [
            FinishedGame(int(i), float(info["episode"]["r"][i]), int(info["episode"]["l"][i]))
            for i in np.flatnonzero(info.get("_episode", []))
        ]
        rewards = rewards.astype(np.float32)
        return StepResult(frames, rewards, terminated, truncated, decided, self.lives, finished)


def make_vector_env(
    game: Game, num_envs: int, multithreading: bool, max_frames: int = MAX_FRAMES
) -> NativeGames | WrappedGames:
    """N games behind one interface: `reset`, `step`, `action_names`, `lives`, `scores`."""
    games = NativeGames if multithreading else WrappedGames
    return games(game, num_envs, max_frames=max_frames)


# --------------------------------------------------------------------------------------------------
# Network
# --------------------------------------------------------------------------------------------------


def init_layer(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights, zero biases (Saxe et al. 2014); `gain` sqrt(2) suits a ReLU that follows."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The network of Mnih et al. (2015), with a policy (actor) and a value (critic) on top."""

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            init_layer(nn.Conv2d(FRAME_STACK, 32, kernel_size=8, stride=4)),  # (M, 32, 20, 20)
            nn.ReLU(inplace=True),  # in place: a sixth of the learner's time is memory traffic
            init_layer(nn.Conv2d(32, 64, kernel_size=4, stride=2)),  # (M, 64, 9, 9)
            nn.ReLU(inplace=True),
            init_layer(nn.Conv2d(64, 64, kernel_size=3)),  # (M, 64, 7, 7)
            nn.ReLU(inplace=True),
            nn.Flatten(),  # (M, 3136)
            init_layer(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(inplace=True),
        )
        # A small gain makes all actions about equally likely at first; Andrychowicz et al. 2021.
        self.actor = init_layer(nn.Linear(512, num_actions), gain=0.01)
        self.critic = init_layer(nn.Linear(512, 1), gain=1.0)
        # Channels last is the order in which the CPU's and GPU's convolutions read.
        self.to(memory_format=torch.channels_last)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """frames (M, 4, 84, 84) uint8 -> logits (M, A) float32, values (M,) float32."""
        hidden = self.network(frames.float().mul_(1 / 255))
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def sample_actions(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """logits (N, A) -> actions (N,) int64, drawn, and their log probabilities (N,)."""
    log_probs = logits.log_softmax(-1)
    actions = torch.multinomial(log_probs.exp(), 1, generator=generator)
    return actions.squeeze(-1), log_probs.gather(-1, actions).squeeze(-1)


# --------------------------------------------------------------------------------------------------
# PPO: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv:1707.06347
# --------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """What N games went through in T steps; the storage is made once and filled again and again."""

    frames: Tensor  # (T + 1, N, 4, 84, 84) uint8; the last is where the next rollout starts
    values: Tensor  # (T + 1, N) float32
    actions: Tensor  # (T, N) int64
    log_probs: Tensor  # (T, N) float32
    rewards: Tensor  # (T, N) float32
    terminated: Tensor  # (T, N) bool: step t ended the episode for good, nothing follows
    dones: Tensor  # (T, N) bool: step t ended the episode, for good or cut off
    decided: Tensor  # (T, N) bool: the agent's action was carried out


def make_rollout(num_steps: int, num_envs: int, device: torch.device) -> Rollout:
    """Storage for T steps of N games: 28 kB a step and game, most of it frames."""
    size = (num_steps, num_envs)
    # In memory the four frames lie innermost, as the convolution reads them: a minibatch is picked
    # out of a million steps without a transposition, which would cost 7 % of the learner's time.
    frames = torch.zeros(num_steps + 1, num_envs, FRAME_SIZE, FRAME_SIZE, FRAME_STACK, dtype=torch.uint8)
    return Rollout(
        frames=frames.to(device).permute(0, 1, 4, 2, 3),
        values=torch.zeros(num_steps + 1, num_envs, device=device),
        actions=torch.zeros(size, dtype=torch.int64, device=device),
        log_probs=torch.zeros(size, device=device),
        rewards=torch.zeros(size, device=device),
        terminated=torch.zeros(size, dtype=torch.bool, device=device),
        dones=torch.zeros(size, dtype=torch.bool, device=device),
        decided=torch.zeros(size, dtype=torch.bool, device=device),
    )


@torch.no_grad()
def collect_rollout(
    agent: Agent,
    games: NativeGames | WrappedGames,
    rollout: Rollout,
    generator: torch.Generator,
    should_stop: Callable[[], bool],
) -> tuple[int, list[tuple[int, FinishedGame]]]:
    """Play T steps, from where the last rollout ended, into `rollout`.

    Returns the steps taken in each game, T unless `should_stop` said so, and the games that ended,
    each with the step it ended at, counted from 1.
    """
    finished: list[tuple[int, FinishedGame]] = []
    num_steps = len(rollout.actions)
    rollout.frames[0] = rollout.frames[-1]
    for t in range(num_steps):
        if should_stop():
            return t, finished
        logits, rollout.values[t] = agent(rollout.frames[t])
        rollout.actions[t], rollout.log_probs[t] = sample_actions(logits, generator)
        result = games.step(rollout.actions[t].cpu().numpy())
        rollout.frames[t + 1] = torch.from_numpy(result.frames)
        rollout.rewards[t] = torch.from_numpy(result.rewards)
        rollout.terminated[t] = torch.from_numpy(result.terminated)
        rollout.dones[t] = torch.from_numpy(result.terminated | result.truncated)
        rollout.decided[t] = torch.from_numpy(result.decided)
        finished += [(t + 1, game) for game in result.finished]
    rollout.values[-1] = agent(rollout.frames[-1])[1]
    return num_steps, finished


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    dones: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimation; Schulman et al. 2016, arXiv:1506.02438, equation 16.

    rewards, terminated, dones are (T, N), values (T + 1, N); returns advantages (T, N).

        delta_t = r_t + gamma * V(s_t+1) - V(s_t),   A_t = delta_t + gamma * lambda * A_t+1

    After a termination V(s_t+1) is zero. A game that was only cut off keeps it: values[t + 1] is then
    the value of its last frame, since the environments show that frame before they reset. The sum
    over later steps ends in both cases.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * values[t + 1] * ~terminated[t] - values[t]
        following = delta + gamma * gae_lambda * following * ~dones[t]
        advantages[t] = following
    return advantages


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` holds; zero where it holds nowhere."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def normalise(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages (M,) to mean 0 and standard deviation 1 over the steps in `mask`."""
    centred = advantages - masked_mean(advantages, mask)
    variance = (centred.square() * mask).sum() / (mask.sum() - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-8)


LOSS_NAMES = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")


def ppo_loss(
    logits: Tensor,
    values: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_coef: float,
    ent_coef: float,
    vf_coef: float,
    clip_vloss: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of one minibatch; logits are (M, A), everything else (M,), steps outside `mask` ignored.

    Returns the loss, a scalar, and its parts without gradient, (6,), in the order of LOSS_NAMES.
    """
    all_log_probs = logits.log_softmax(-1)
    log_probs = all_log_probs.gather(-1, actions[:, None]).squeeze(-1)
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()

    # Clipped surrogate objective, equation 7: no gain from moving beyond 1 +- epsilon.
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -masked_mean(torch.min(ratio * advantages, clipped_ratio * advantages), mask)

    # The value's move is clipped alike: not in the paper, but in its authors' own program.
    errors = (values - returns).square()
    if clip_vloss:
        clipped_values = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        errors = torch.max(errors, (clipped_values - returns).square())
    value_loss = 0.5 * masked_mean(errors, mask)

    entropy = masked_mean(-(all_log_probs.exp() * all_log_probs).sum(-1), mask)
    loss = policy_loss - ent_coef * entropy + vf_coef * value_loss  # equation 9

    with torch.no_grad():  # two estimates of KL(old, new): http://joschu.net/blog/kl-approx.html
        old_approx_kl = masked_mean(-log_ratio, mask)
        approx_kl = masked_mean(ratio - 1 - log_ratio, mask)
        clipfrac = masked_mean(((ratio - 1).abs() > clip_coef).float(), mask)
    parts = (value_loss, policy_loss, entropy, old_approx_kl, approx_kl, clipfrac)
    return loss, torch.stack([part.detach() for part in parts])


def update(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: Config,
    generator: torch.Generator,
    should_stop: Callable[[], bool],
) -> dict[str, float]:
    """Learn from one rollout: `update_epochs` passes over its B steps, in minibatches of M.

    Returns the parts of the loss, each the mean over all minibatches, and the explained variance.
    """
    advantages = compute_gae(
        rollout.rewards, rollout.values, rollout.terminated, rollout.dones, config.gamma, config.gae_lambda
    ).flatten()
    frames, values = rollout.frames[:-1].flatten(0, 1), rollout.values[:-1].flatten()
    actions, log_probs = rollout.actions.flatten(), rollout.log_probs.flatten()
    returns, mask = advantages + values, rollout.decided.flatten()
    history: list[Tensor] = []

    for _ in range(config.update_epochs):
        order = torch.randperm(config.batch_size, generator=generator, device=frames.device)
        for pick in order.split(config.minibatch_size):
            if should_stop():
                break
            logits, new_values = agent(frames[pick])
            advantage = advantages[pick]
            if config.norm_adv:
                advantage = normalise(advantage, mask[pick])
            loss, parts = ppo_loss(
                logits, new_values, actions[pick], log_probs[pick], values[pick], advantage, returns[pick],
                mask[pick], config.clip_coef, config.ent_coef, config.vf_coef, config.clip_vloss,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            optimizer.step()
            history.append(parts)
        if should_stop() or (config.target_kl and history[-1][LOSS_NAMES.index("approx_kl")] > config.target_kl):
            break

    unexplained = (returns - values)[mask].var() / returns[mask].var().clamp(min=1e-8)
    # Numbers leave the device once an update, here: on a GPU every such moment waits for it.
    means = torch.stack(history).mean(0).tolist() if history else [math.nan] * len(LOSS_NAMES)
    return dict(zip(LOSS_NAMES, means)) | {"explained_variance": 1 - unexplained.item()}


# --------------------------------------------------------------------------------------------------
# State and logs
# --------------------------------------------------------------------------------------------------

MODEL_KIND = "ai_breakout_game model 1"


@dataclasses.dataclass
class TrainState:
    """Where a run stands."""

    update: int = 0
    global_step: int = 0  # steps taken, all games together
    best_return: float = -math.inf  # highest mean score over 100 games so far


def model_path(game: Game, steps: int) -> Path:
    """models/ai_breakout_game3000.mdl for 3000 steps of Breakout."""
    return Path("models") / f"ai_{game.rom}_game{steps}.mdl"


def save_file(content: dict[str, Any], path: Path) -> None:
    """Write `content` so that `path` is always whole: the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def save_agent(agent: Agent, path: Path, about: dict[str, Any]) -> None:
    """Write the weights and `about`, plain numbers and strings, to `path`."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in agent.state_dict().items()}
    save_file({"kind": MODEL_KIND, "weights": weights, **about}, path)


def find_model(name: str) -> Path:
    """A model file by name: as given, else in models/, here or beside this script."""
    places = [Path(name), Path("models") / name, Path(__file__).resolve().parent / "models" / name]
    for path in places:
        if path.is_file():
            return path
    raise UserError(f"no model {name}, neither here nor in models/; train one, or name one with --model-filename")


def load_agent(path: Path, game: Game, action_names: list[str], device: torch.device) -> tuple[Agent, dict]:
    """Read weights that this script saved, or a bare state_dict with the usual names.

    Nothing in the file is run. Returns the agent and what the file says about it, {} for a bare
    state_dict. Raises UserError for a file that is no model, or one of another game.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds, all of which mean this
        raise UserError(f"{path} is not a model: {type(error).__name__} while reading it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a model: it holds a {type(content).__name__}, not weights by name")
    about = {key: value for key, value in content.items() if key != "weights"} if "weights" in content else {}
    weights = content.get("weights", content)
    if about.get("game", game.rom) != game.rom:
        raise UserError(f"{path} plays {about['game']}, not {game.rom}; add --env-id={about.get('env_id')}")
    agent = Agent(len(action_names))
    expected = {name: tuple(tensor.shape) for name, tensor in agent.state_dict().items()}
    found = {n: tuple(t.shape) for n, t in weights.items() if isinstance(t, Tensor)} if isinstance(weights, dict) else {}
    wrong = [name for name in expected if expected[name] != found.get(name)]
    if wrong:
        name = wrong[-1] if "actor.weight" not in wrong else "actor.weight"
        raise UserError(
            f"{path} does not fit {game.rom}: {name} is {found.get(name, 'missing')}, not {expected[name]}"
        )
    agent.load_state_dict({name: weights[name] for name in expected})
    return agent.to(device), about


class Logger:
    """Takes in finished games and metrics; feeds TensorBoard, the bar or the plain lines, the summary."""

    LINE_EVERY = 30.0  # seconds between two plain lines, where there is no terminal to draw a bar on

    def __init__(self, folder: Path, config: Config, updates_done: int = 0) -> None:
        # Imported here since it costs a second, which playing does not need.
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.scores: deque[float] = deque(maxlen=100)
        self.games = 0
        self.started = self.last_line = time.monotonic()
        self.writer = SummaryWriter(str(folder), flush_secs=10)
        values = dataclasses.asdict(config)
        rows = "\n".join(f"|{name}|{value}|" for name, value in values.items())
        self.writer.add_text("config", "|knob|value|\n|-|-|\n" + rows)
        # As SummaryWriter.add_hparams, which would open a second run for them.
        plain = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in values.items()}
        for summary in hparams(plain, {"charts/mean_return_100": 0.0}):
            self.writer.file_writer.add_summary(summary)
        total = config.num_updates * config.batch_size
        self.bar = tqdm(
            total=total, unit=" steps", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty(), smoothing=0.1
        )
        self.total, self.steps = total, 0

    @property
    def mean_return(self) -> float:
        """Mean true score of the last 100 games; nan before the first."""
        return sum(self.scores) / len(self.scores) if self.scores else math.nan

    def log_game(self, global_step: int, game: FinishedGame) -> None:
        """Every finished game, with its true score, at the step at which it ended."""
        self.games += 1
        self.scores.append(game.score)
        self.writer.add_scalar("charts/episodic_return", game.score, global_step)
        self.writer.add_scalar("charts/episodic_length", game.length, global_step)
        self.writer.add_scalar("charts/mean_return_100", self.mean_return, global_step)

    def log_update(self, global_step: int, steps: int, learning_rate: float, losses: dict[str, float]) -> None:
        """One update's metrics; `steps` are those taken since the last call."""
        self.steps += steps
        speed = self.steps / (time.monotonic() - self.started)
        metrics = {f"losses/{name}": value for name, value in losses.items()}
        metrics |= {"charts/learning_rate": learning_rate, "charts/SPS": speed}
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, global_step)
        self.bar.update(steps)
        self.bar.set_postfix_str(f"mean score {self.mean_return:.2f}" if self.scores else "first games")
        now = time.monotonic()
        if self.bar.disable and (self.steps == steps or now - self.last_line > self.LINE_EVERY):
            self.last_line = now
            left = duration((self.total - global_step) / speed)
            print(
                f"step {global_step:,} of {self.total:,}  {speed:,.0f} steps/s  {left} left  "
                f"games {self.games:,}  mean score {self.mean_return:.2f}",
                flush=True,
            )

    def close(self) -> None:
        """Write what is still in memory."""
        self.bar.close()
        self.writer.close()


def duration(seconds: float) -> str:
    """75 -> 0:01:15."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag: training stops between two steps, never inside one."""

    def __enter__(self) -> StopRequest:
        self.requested = False
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, signum: int, frame: Any) -> None:
        self.requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nStopping after this step and saving ...\n")

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto takes the fastest that is there. Raises UserError for one that is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device in there if there[device]))
    if not there.get(name):
        have = ", ".join(device for device in there if there[device])
        raise UserError(f"--device={name} is not there; this machine has {have}")
    return torch.device(name)


def check_writable(folder: Path) -> None:
    """Raise UserError unless `folder` exists, or can be made, and can be written to."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}/: {place} is not a folder that may be written to")


def make_run_folder(env_id: str, seed: int) -> Path:
    """runs/<env>__<seed>__<time>; a second run of the same second gets a number behind it."""
    name = f"{env_id.replace('/', '-')}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise UserError(f"runs/{name} is there already, a thousand times")


def train(config: Config) -> Path:
    """Train an agent, or train one further; returns where its weights lie."""
    game = find_game(config.env_id, config.sticky_actions)
    device = pick_device(config.device)
    start_from = find_model(config.model_filename) if config.model_filename else None
    for folder in (Path("runs"), Path("models")):
        check_writable(folder)

    torch.manual_seed(config.seed)  # the weights at the start
    generator = torch.Generator(device).manual_seed(config.seed)  # actions and minibatches
    games = make_vector_env(game, config.num_envs, config.multithreading)
    if start_from:
        agent, _ = load_agent(start_from, game, games.action_names, device)
    else:
        agent = Agent(len(games.action_names)).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), config.learning_rate, eps=1e-5, fused=device.type != "mps")
    rollout = make_rollout(config.num_steps, config.num_envs, device)
    rollout.frames[-1] = torch.from_numpy(games.reset(config.seed))

    state = TrainState()
    folder = make_run_folder(config.env_id, config.seed)
    logger = Logger(folder, config)
    print(
        f"Training on {config.env_id}: {config.num_envs} games, {device}, curves in {folder}/\n"
        "Ctrl-C stops it and saves what was learnt.",
        flush=True,
    )

    def save(path: Path) -> None:
        about = {"game": game.rom, "env_id": config.env_id, "actions": games.action_names}
        about |= {"frame_stack": FRAME_STACK, "seed": config.seed, "steps": state.global_step}
        save_agent(agent, path, about | {"mean_return": logger.mean_return})

    with StopRequest() as stop:
        try:
            while state.update < config.num_updates and not stop.requested:
                left = 1 - state.update / config.num_updates
                learning_rate = config.learning_rate * (left if config.anneal_lr else 1)
                optimizer.param_groups[0]["lr"] = learning_rate

                steps, finished = collect_rollout(agent, games, rollout, generator, lambda: stop.requested)
                for t, finished_game in finished:
                    logger.log_game(state.global_step + t * config.num_envs, finished_game)
                state.global_step += steps * config.num_envs
                if steps < config.num_steps:
                    break

                losses = update(agent, optimizer, rollout, config, generator, lambda: stop.requested)
                state.update += 1
                logger.log_update(state.global_step, config.batch_size, learning_rate, losses)

                if len(logger.scores) == logger.scores.maxlen and logger.mean_return > state.best_return:
                    state.best_return = logger.mean_return
                    save(folder / "best.mdl")
        finally:  # whatever ended it, nothing that was learnt is lost
            done = state.update >= config.num_updates
            path = model_path(game, config.total_timesteps if done else state.global_step)
            save(folder / "last.mdl")
            save(path)
            logger.close()

    seconds = time.monotonic() - logger.started
    print(
        f"\n{'Trained' if done else 'Stopped after'} {state.global_step:,} steps and {logger.games:,} games"
        f" in {duration(seconds)}, {state.global_step / seconds:,.0f} steps/s."
    )
    if logger.scores:
        best = f", best {state.best_return:.2f}" if math.isfinite(state.best_return) else ""
        print(f"Mean score of the last {len(logger.scores)} games: {logger.mean_return:.2f}{best}")
    print(
        f"  weights  {path}\n"
        f"  curves   tensorboard --logdir runs\n"
        f'  watch    python3 {Path(sys.argv[0]).name} --run=1 --model-filename="{path.name}"'
        + ("" if game.rom == "breakout" else f" --env-id={config.env_id}")
    )
    return path


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse_bool(text: str) -> bool:
    """1, true, yes, on or 0, false, no, off, in any case."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"yes or no, not {text!r}")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage, which would bury it."""

    def error(self, message: str) -> None:
        raise UserError(message)


def build_parser() -> argparse.ArgumentParser:
    """A flag for every field of Config, in its groups."""
    parser = OneLineParser(
        description="Learn an Atari game from its pixels with PPO, then watch the agent play it.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30),
        allow_abbrev=False,
    )
    titles = {"mode": "what to do", "game": "the game", "training": "training", "PPO": "PPO"}
    groups = {name: parser.add_argument_group(title) for name, title in titles.items()}
    hints = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind = (get_args(hints[field.name]) or (hints[field.name],))[0]  # float of float | None
        text = field.metadata["help"].replace("%", "%%")
        shown = {True: "yes", False: "no"}.get(field.default, field.default) if kind is bool else field.default
        if shown is not None and shown != "":
            text += f" (default: {shown})"
        options: dict[str, Any] = {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}.get(kind)}
        if kind is bool:
            options = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "yes|no"}
        groups[field.metadata["group"]].add_argument(
            f"--{field.name.replace('_', '-')}", default=field.default, help=text, **options
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 after a mistake of the user's."""
    try:
        config = Config(**vars(build_parser().parse_args(argv)))
        train(config)
        return 0
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
