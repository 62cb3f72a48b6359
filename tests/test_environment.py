"""The wrappers on a fake emulator, `Games` on a script, and both ways of stepping real games."""

import functools
import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import ai_breakout_game as script

BREAKOUT, FREEWAY = "BreakoutNoFrameskip-v4", "FreewayNoFrameskip-v4"
BOTH_WAYS = pytest.mark.parametrize("native", [True, False], ids=["native", "python"])

# ---- The wrappers, on a fake emulator ----


class FakeAtari(gym.Env):
    """The brightness of the screen is the number of the frame, from 1. The game is over in frame
    `over`; `rewards` are those of its frames.
    """

    observation_space = gym.spaces.Box(0, 255, (210, 160), np.uint8)
    action_space = gym.spaces.Discrete(3)
    render_mode = "rgb_array"

    def __init__(self, over=None, rewards=(), buttons=("NOOP", "FIRE", "RIGHT")):
        self.over, self.rewards, self.buttons = over, dict(rewards), buttons
        self.pressed = ""  # their initials

    def get_action_meanings(self):
        return list(self.buttons)

    def look(self):
        return np.full((210, 160), self.frame, np.uint8)

    def render(self):
        return np.full((210, 160, 3), self.frame, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.frame = 1
        return self.look(), {}

    def step(self, action):
        self.pressed += self.buttons[action][0]
        self.frame += 1
        return self.look(), self.rewards.get(self.frame, 0), self.frame == self.over, False, {}


@pytest.mark.parametrize(("buttons", "pressed"), [(("NOOP", "FIRE"), "F"), (("NOOP", "UP"), "")])
def test_fire_is_pressed_once_after_a_reset_where_there_is_fire(buttons, pressed):
    fake = FakeAtari(buttons=buttons)
    obs, _ = script.FireResetEnv(fake).reset()
    assert fake.pressed == pressed and obs.max() == 1 + len(pressed)


def test_a_game_starts_after_a_random_number_of_no_ops_below_the_limit(monkeypatch):
    monkeypatch.setattr(script, "NOOP_MAX", 5)
    starts = set()
    for seed in range(60):
        fake = FakeAtari()
        obs, _ = script.NoopResetEnv(fake).reset(seed=seed)
        starts.add((fake.pressed, obs.max()))
    assert starts == {("N" * count, 1 + count) for count in range(5)}


def test_an_action_is_repeated_for_four_frames_and_their_rewards_are_added():
    env = script.MaxAndSkipEnv(FakeAtari(rewards={2: 1, 5: 4, 6: 100}))
    env.reset()
    assert env.step(2)[1] == 5 and env.unwrapped.pressed == "RRRR"


@pytest.mark.parametrize("brightness", [[0, 200, 90, 40, 30], [0, 200, 90, 30, 40]])
def test_each_pixel_is_the_maximum_of_the_last_two_frames(brightness):
    fake = FakeAtari()
    fake.look = lambda: np.full((210, 160), brightness[fake.frame - 1], np.uint8)
    env = script.MaxAndSkipEnv(fake)
    env.reset()
    assert np.unique(env.step(0)[0]) == 40


def test_the_repetition_of_an_action_ends_with_the_game():
    env = script.MaxAndSkipEnv(FakeAtari(over=3))
    env.reset()
    obs, _, terminated, _, _ = env.step(0)
    assert terminated and env.unwrapped.frame == obs.max() == 3


@pytest.fixture
def wrapped(monkeypatch):
    """Builds what `make_env` makes of a fake game, without no-ops at the start."""

    def build(fake, **options):
        monkeypatch.setattr(script, "AtariEnv", lambda *args, **settings: fake)
        monkeypatch.setattr(script, "NOOP_MAX", 1)
        return script.make_env(BREAKOUT, **options)

    return build


def test_the_screen_is_reduced_by_averaging_areas(wrapped):
    fake, screen = FakeAtari(), np.zeros((210, 160), np.uint8)
    screen[::5] = 200  # 2.5 rows become one: every other one has a bright row in it
    fake.look = lambda: screen
    newest = wrapped(fake).reset()[0][-1]
    assert newest.shape == (84, 84)
    assert np.unique(newest[::2]) == 80 and np.unique(newest[1::2]) == 0


def test_observations_are_stacked_newest_last_after_black_ones(wrapped):
    env = wrapped(FakeAtari())
    stacks = [env.reset()[0]] + [env.step(0)[0] for _ in range(5)] + [env.reset()[0]]
    assert stacks[0].shape == (4, 84, 84) and stacks[0].dtype == np.uint8
    brightness = [stack[:, 40, 40].tolist() for stack in stacks]
    assert brightness[:2] == [[0, 0, 0, 2], [0, 0, 2, 6]]
    assert brightness[5:] == [[10, 14, 18, 22], [0, 0, 0, 2]]


def test_a_game_is_truncated_after_max_frames_rounded_up_to_whole_steps(wrapped):
    env = wrapped(FakeAtari(), max_frames=9)
    env.reset()
    assert [env.step(0)[3] for _ in range(3)] == [False, False, True]


def test_render_returns_the_frames_of_a_step_in_color(wrapped):
    env = wrapped(FakeAtari(), keep_rgb=True)
    env.reset()
    assert [frame.max() for frame in env.render()] == [2], "after a reset"
    for newest in (6, 10, 14):
        env.step(0)
        frames = env.render()
        assert [frame.max() for frame in frames] == [newest - 3, newest - 2, newest - 1, newest]
        assert frames[0].shape == (210, 160, 3)
    for _ in range(40):
        env.step(0)
    assert len(env.render()) == 4, "of the last step only, though nobody looked at the others"


def test_render_returns_fewer_frames_where_the_game_ends_within_a_step(wrapped):
    env = wrapped(FakeAtari(over=4), keep_rgb=True)
    env.reset()
    assert env.step(0)[2] and [frame.max() for frame in env.render()] == [3, 4]


# ---- `Games`, on a script ----


class ScriptedVectorEnv:
    """Games in which things happen in given steps, from 1: a value for all games, or one for each.
    Lives stay what they were last.
    """

    def __init__(self, num_envs, **events):
        self.num_envs, self.events, self.lives, self.count, self.taken = num_envs, events, 5, 0, []

    def event(self, name, default):
        return np.resize(self.events.get(name, {}).get(self.count, default), self.num_envs)

    def reset(self, seed):
        self.seeds = list(seed)
        return np.zeros((self.num_envs, 4, 84, 84), np.uint8), {"lives": self.event("lives", 5)}

    def step(self, actions):
        self.count += 1
        self.taken.append(actions.tolist())
        self.lives = self.event("lives", self.lives)
        frames = np.full((self.num_envs, 4, 84, 84), self.count, np.uint8)
        ends = self.event("over", False), self.event("truncated", False)
        return frames, self.event("rewards", 0.0), *ends, {"lives": self.lives}


@pytest.fixture
def scripted(monkeypatch):
    """Builds `Games` that follow a script."""

    def build(num_envs=1, env_id=BREAKOUT, **events):
        env = ScriptedVectorEnv(num_envs, **events)
        monkeypatch.setattr(script, "make_vector_env", lambda *args: env)
        games = script.Games(script.Config(env_id=env_id), num_envs)
        games.reset(1)
        return games

    return build


def play(games, steps):
    """Take action 2 in each step. Returns what each step brought game 0, by name."""
    rows = []
    for _ in range(steps):
        result = games.step(np.full(games.num_envs, 2))
        rows.append({name: getattr(games, name)[0] for name in ("scores", "lengths", "idle")})
        rows[-1] |= {name: x[0] for name, x in result._asdict().items() if name != "finished"}
        rows[-1]["finished"] = [tuple(game) for game in result.finished]
        rows[-1]["taken"] = games.env.taken[-1][0]
    return {name: [row[name] for row in rows] for name in rows[0]}


Y, N = True, False
ACCOUNTS = {
    "rewards-are-clipped-to-their-sign-and-scores-are-not": (
        {"rewards": {1: 7, 3: -200, 4: 0.5}},
        {"rewards": [1, 0, -1, 1], "scores": [7, 7, -193, -192.5]}),
    "a-finished-game-has-its-score-and-length-and-the-reset-is-no-step-of-the-next": (
        {"rewards": {2: 7, 3: 7, 5: 2}, "over": {3: Y, 6: Y}},
        {"finished": [[], [], [(0, 14, 3)], [], [], [(0, 2, 2)]], "scores": [0, 7, 14, 0, 2, 2]}),
    "a-truncated-game-is-finished-but-not-terminated": (
        {"rewards": {2: 7}, "truncated": {3: Y}},
        {"truncated": [N, N, Y, N], "terminated": [N, N, N, N], "decided": [Y, Y, Y, N],
         "finished": [[], [], [(0, 7, 3)], []], "scores": [0, 7, 7, 0], "idle": [1, 0, 0, 0]}),
    "a-lost-life-terminates-the-episode-but-finishes-no-game": (
        {"lives": {3: 4}},
        {"terminated": [N, N, Y, N, N], "finished": [[]] * 5, "lengths": [1, 2, 3, 4, 5]}),
    "the-serve-after-a-lost-life-is-fire-and-not-decided": (
        {"lives": {3: 4}}, {"taken": [2, 2, 2, 1, 2], "decided": [Y, Y, Y, N, Y]}),
    "a-ball-that-is-lost-while-it-is-served-is-served-again": (
        {"lives": {3: 4, 4: 3}}, {"taken": [2, 2, 2, 1, 1, 2], "terminated": [N, N, Y, Y, N, N]}),
    "without-fire-the-agent-decides-after-a-lost-life": (
        {"lives": {3: 4}, "env_id": FREEWAY},
        {"taken": [2] * 5, "decided": [Y] * 5, "terminated": [N, N, Y, N, N]}),
    "after-the-last-life-the-game-is-reset-and-nothing-is-served": (
        {"lives": {3: 0, 4: 5}, "over": {3: Y}}, {"taken": [2] * 5, "decided": [Y, Y, Y, N, Y]}),
    "a-game-that-ends-while-the-ball-is-served-is-reset": (
        {"lives": {3: 4, 4: 0, 5: 5}, "over": {4: Y}},
        {"taken": [2, 2, 2, 1, 2, 2], "decided": [Y, Y, Y, N, N, Y]}),
    "a-new-game-with-fewer-lives-has-lost-none": (
        {"lives": {4: 3}, "over": {3: Y}},
        {"terminated": [N, N, Y, N, N], "decided": [Y, Y, Y, N, Y]}),
    "a-game-that-goes-on-with-no-lives-has-lost-none": (
        {"lives": {2: 0}, "over": {4: Y}}, {"terminated": [N, N, N, Y], "decided": [Y] * 4}),
    "idle-counts-decisions-since-the-last-point-or-lost-life": (
        {"rewards": {3: -1}, "lives": {6: 4, 9: 0}, "over": {9: Y}},
        {"idle": [1, 2, 0, 1, 2, 0, 0, 1, 0, 0, 1]}),
}  # fmt: skip


@pytest.mark.parametrize(("events", "wanted"), ACCOUNTS.values(), ids=ACCOUNTS)
def test_games_keep_account(scripted, events, wanted):
    got = play(scripted(**events), len(next(iter(wanted.values()))))
    assert {name: got[name] for name in wanted} == wanted


def test_each_game_has_an_account_of_its_own(scripted):
    games = scripted(2, rewards={2: [0, 7]}, over={4: [False, True]}, lives={3: [4, 5]})
    got = play(games, 5)
    assert got["finished"] == [[], [], [], [(1, 7, 4)], []]
    assert (games.lengths.tolist(), games.lives.tolist()) == ([5, 0], [4, 5])
    assert got["decided"] == [Y, Y, Y, N, Y] and games.idle.tolist() == [1, 0]
    assert games.env.taken == [[2, 2], [2, 2], [2, 2], [1, 2], [2, 2]]


@pytest.mark.parametrize("action", [-1, 4])
def test_a_number_that_is_no_action_is_refused(scripted, action):
    games = scripted(2)
    with pytest.raises(ValueError, match="from 0 to 3"):
        games.step(np.array([0, action]))
    assert games.env.taken == []


def test_no_two_games_share_a_seed_even_in_neighboring_runs(scripted):
    games, seeds = scripted(8), []
    for entropy in [(1,), (2,), (3,), (1, 2048, 0), (1, 2048, 1), (1, 2049, 0), (1, 2049, 0)]:
        games.reset(*entropy)
        seeds.append(games.env.seeds)
    assert seeds[-1] == seeds[-2], "the same entropy gives the same games"
    seeds = list(itertools.chain(*seeds[:-1]))
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0 and max(seeds) < 2**31, "the emulator's range"


def test_a_reset_forgets_scores_lengths_and_pending_serves(scripted):
    games = scripted(rewards={1: 7}, lives={2: 4})
    play(games, 2)
    games.reset(1)
    assert (games.scores[0], games.lengths[0], games.idle[0]) == (0, 0, 0)
    assert play(games, 1)["decided"] == [True] and games.env.taken[-1] == [2]


# ---- Real games ----


def new_games(native, num_envs=2, env_id=BREAKOUT, **settings):
    config = script.Config(env_id=env_id, multithreading=native, **settings)
    return script.Games(config, num_envs)


@functools.cache
def two_games(native):
    """Two games of Breakout that tests share; each resets them."""
    return new_games(native)


@pytest.fixture
def no_wait(monkeypatch):
    """All games start alike."""
    monkeypatch.setattr(script, "NOOP_MAX", 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_finds_no_fault_in_the_environment():
    check_env(script.make_env(BREAKOUT))


@pytest.mark.filterwarnings("error::UserWarning")
def test_stable_baselines3_finds_no_fault_in_the_environment():
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(script.make_env(BREAKOUT))


def test_a_seeded_environment_plays_the_same_game_again():
    def frames(seed):
        env = script.make_env(BREAKOUT, seed=seed, sticky_actions=0.5)
        return [env.reset()[0].tobytes()] + [env.step(i // 8 % 4)[0].tobytes() for i in range(80)]

    first = frames(3)
    assert first == frames(3) and first != frames(4)


def record(calls, function, *args, **kwargs):
    """Call `function`, and keep its arguments and result."""
    result = function(*args, **kwargs)
    calls.append((*args, *kwargs.values(), result))
    return result


@pytest.mark.parametrize("env_id", [BREAKOUT, "SpaceInvadersNoFrameskip-v4"])
def test_a_plain_loop_over_the_environment_gives_the_scores_of_games(env_id):
    games, resets = new_games(False, 1, env_id, max_frames=4 * 150), []
    games.env.reset = functools.partial(record, resets, games.env.reset)
    games.reset(5)
    actions = np.random.default_rng(0).integers(len(games.action_names), size=320)
    finished = [game for action in actions for game in games.step(action[None]).finished]

    env, scores, total, over = script.make_env(env_id, max_frames=4 * 150), [], 0.0, False
    env.reset(seed=resets[0][0][0])
    lives = served = 0
    for action in actions:
        if over:
            total, over, served, lives, _ = 0.0, False, 0, 0, env.reset()
            continue
        _, reward, terminated, truncated, info = env.step(1 if served else action)  # 1 is FIRE
        total, over = total + reward, terminated or truncated
        served, lives = info["lives"] < lives, info["lives"]
        scores += [total] if over else []
    assert [game.score for game in finished] == scores and len(scores) >= 2
    assert max(scores) >= (1 if env_id == BREAKOUT else 25), "a hit is worth five or more there"


@pytest.mark.parametrize(
    ("game", "length"),
    [("Breakout", 165), ("Freeway", 100), ("MsPacman", 100), ("SpaceInvaders", 100)],
)
def test_native_and_python_games_are_the_same_bit_for_bit(game, length, no_wait):
    settings = {"env_id": f"{game}NoFrameskip-v4", "max_frames": 4 * length}
    native, python = (new_games(native, **settings) for native in (True, False))
    native.reset(5)
    python.reset(5)
    assert np.array_equal(native.frames, python.frames)
    rng, events = np.random.default_rng(0), np.zeros(3, int)
    for _ in range(2 * length + 10):
        actions = rng.integers(len(native.action_names), size=2)
        result, other = native.step(actions), python.step(actions)
        for name in result._fields:
            assert np.array_equal(getattr(result, name), getattr(other, name)), name
        for name in ("idle", "lives", "scores", "lengths"):
            assert np.array_equal(getattr(native, name), getattr(python, name)), name
        # The native emulator does not read the screen again when a game ends.
        running = ~native.game_over
        assert np.array_equal(native.frames[:, :3], python.frames[:, :3])
        assert np.array_equal(native.frames[running], python.frames[running])
        assert all(stack[0].any() for stack in native.frames[result.truncated]), "not yet reset"
        events += len(result.finished), result.truncated.sum(), result.terminated.sum()
    assert events[0] >= 4 and events[1] >= 1
    assert game != "Breakout" or events[2] > 5


def frame_number(call):
    """The emulator's frame numbers after a recorded step, (N,)."""
    return call[-1][-1]["episode_frame_number"].tolist()


@BOTH_WAYS
def test_games_start_after_a_varying_number_of_frames_below_30(native):
    games, steps = new_games(native, max_frames=4), []
    games.reset(1)
    games.env.step = functools.partial(record, steps, games.env.step)
    decided = np.stack([games.step(np.zeros(2, int)).decided for _ in range(60)])
    waits = np.stack([frame_number(step) for step in steps])[~decided] - 1  # FIRE takes one
    assert len(waits) == 60 and len(set(waits)) > 15
    assert 0 <= waits.min() < 5 and 25 < waits.max() < 30


def games_by_wait(native):
    """Frames and rewards of games of 24 steps, by the emulator's frame number at their start."""
    games, started, steps = new_games(native, max_frames=4 * 25), [], []
    games.reset(1)
    games.env.step, current = functools.partial(record, steps, games.env.step), [[], []]
    for _ in range(26 * 8):
        result = games.step(games.lengths // 5 % 4)
        for i in range(2):
            if games.lengths[i] == 0:
                current[i] = []
                started.append((frame_number(steps[-1])[i], current[i]))
            if not games.game_over[i]:
                current[i].append((games.frames[i].tobytes(), float(result.rewards[i])))
    return {number: tuple(steps) for number, steps in started if len(steps) == 25}


def test_native_and_python_games_that_waited_equally_long_are_the_same(monkeypatch):
    monkeypatch.setattr(script, "NOOP_MAX", 9)  # few waits, so that both ways have the same ones
    native, python = games_by_wait(True), games_by_wait(False)
    common = native.keys() & python.keys()
    assert len(common) >= 4 and all(native[number] == python[number] for number in common)
    assert len({native[number] for number in common}) > 1, "the wait makes a difference"


@BOTH_WAYS
@pytest.mark.parametrize("sticky", [0.0, 0.25])
def test_sticky_actions_make_games_differ_that_are_otherwise_alike(native, sticky, no_wait):
    games, same = new_games(native, 2, sticky_actions=sticky), True
    games.reset(1)
    for i in range(100):
        games.step(np.full(2, i // 5 % 4))
        same &= np.array_equal(*games.frames)
    assert same == (sticky == 0)


@BOTH_WAYS
def test_frames_are_not_overwritten_by_later_steps(native):
    games = two_games(native)
    games.reset(1)
    first, kept = games.frames, games.frames.copy()
    for _ in range(5):
        games.step(np.full(2, 2))
    assert np.array_equal(first, kept)


class ChecksumAgent(script.Agent):
    """A checksum of all pixels decides its action and is its value: all differences show."""

    def forward(self, frames):
        pixels = frames.flatten(1).long()
        sums = (pixels * torch.arange(pixels.shape[1])).sum(1) % 10_007
        return 1e4 * torch.nn.functional.one_hot(sums % 4, 4).float(), sums.float()


@BOTH_WAYS
def test_playing_and_training_from_one_seed_show_the_agent_the_same_frames(native, monkeypatch):
    config, agent = script.Config(device="cpu", multithreading=native), ChecksumAgent(4)
    games, resets = two_games(True) if native else script.Games(config, 2, keep_rgb=True), []
    monkeypatch.setattr(games, "reset", functools.partial(record, resets, games.reset))
    played = list(itertools.islice(script.play_steps(agent, games, config, 7), 40))

    state = script.TrainState(agent, None, torch.Generator().manual_seed(9))
    games, rollout = two_games(native), script.make_rollout(40, 2, torch.device("cpu"))
    games.reset(*resets[0][:-1])
    script.collect_rollout(state, games, rollout)
    for t, (frames, decision, result) in enumerate(played):
        assert np.array_equal(frames, rollout["frames"][t]), t
        for name in ("actions", "values", "log_probs"):
            assert torch.equal(decision[name], rollout[name][t]), name
        assert np.array_equal(result.decided, rollout["decided"][t])
    one, other = rollout["actions"].T
    assert not torch.equal(one, other) and not rollout["decided"].all(), "not all is alike"
