"""The rules of the game: each wrapper on a fake one, both ways of stepping on the real one."""

import multiprocessing

import gymnasium as gym
import numpy as np
import pytest

import ai_breakout_game as script

BREAKOUT = script.Game("breakout")


class FakeAtari(gym.Env):
    """Shows the number of the frame as its brightness; loses lives and ends as told, by frame."""

    def __init__(self, lose=(), over=None, rewards=None, actions=("NOOP", "FIRE", "RIGHT", "LEFT")):
        self.observation_space = gym.spaces.Box(0, 255, (210, 160), np.uint8)
        self.action_space = gym.spaces.Discrete(len(actions))
        self.lose, self.over, self.rewards, self.actions = lose, over, rewards or {}, actions
        self.taken, self.games = [], 0
        self.render_mode = "rgb_array"

    def get_action_meanings(self):
        return list(self.actions)

    def look(self):
        return np.full((210, 160), self.frame, np.uint8)

    def render(self):
        return np.full((210, 160, 3), self.frame, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.frame, self.lives, self.games = 0, 3, self.games + 1
        return self.look(), {"lives": self.lives}

    def step(self, action):
        self.taken.append(self.actions[action])
        self.frame += 1
        self.lives -= self.frame in self.lose
        over = self.frame == self.over
        reward = self.rewards.get(self.frame, 0)
        return self.look(), reward, over, False, {"lives": self.lives}


def test_fire_starts_a_game():
    fake = FakeAtari()
    script.FireResetEnv(fake).reset()
    assert fake.taken == ["FIRE"]


def test_a_game_without_a_fire_button_starts_without_it():
    fake = FakeAtari(actions=("NOOP", "UP"))
    script.FireResetEnv(fake).reset()
    assert fake.taken == []


def test_a_random_number_of_frames_below_the_maximum_passes_first():
    counts = set()
    for seed in range(60):
        fake = FakeAtari()
        script.NoopResetEnv(fake, noop_max=5).reset(seed=seed)
        assert set(fake.taken) <= {"NOOP"}
        counts.add(len(fake.taken))
    assert counts == {0, 1, 2, 3, 4}


def test_a_game_that_ends_in_its_first_frames_is_started_again():
    fake = FakeAtari(over=1)
    env = script.NoopResetEnv(fake, noop_max=30)
    for seed in range(5):
        frame, _ = env.reset(seed=seed)
        assert frame.max() == 0


def test_an_action_is_held_for_four_frames_and_its_rewards_add_up():
    fake = FakeAtari(rewards={1: 1, 4: 4, 5: 100})
    env = script.MaxAndSkipEnv(fake)
    env.reset()
    _, reward, *_ = env.step(2)
    assert fake.taken == ["RIGHT"] * 4
    assert reward == 5


def test_the_brighter_of_the_last_two_frames_is_shown():
    fake = FakeAtari()
    fake.look = lambda: np.full((210, 160), [0, 200, 90, 40, 30][fake.frame], np.uint8)
    env = script.MaxAndSkipEnv(fake)
    env.reset()
    frame, *_ = env.step(0)
    assert frame.max() == frame.min() == 40


def test_holding_an_action_ends_with_the_game():
    fake = FakeAtari(over=2)
    env = script.MaxAndSkipEnv(fake)
    env.reset()
    frame, _, terminated, _, _ = env.step(0)
    assert terminated and fake.frame == 2 and frame.max() == 2


def test_frames_shrink_to_84_by_84_by_averaging():
    env = script.WarpFrame(FakeAtari())
    checker = np.indices((210, 160)).sum(0) % 2 * 200
    small = env.observation(checker.astype(np.uint8))
    assert small.shape == env.observation_space.shape == (84, 84)
    assert abs(small.mean() - 100) < 2 and small.std() < 30


def test_the_newest_frame_is_the_last_of_the_stack_and_a_new_game_starts_black():
    env = script.FrameStack(script.WarpFrame(FakeAtari()))
    env.reset()
    for _ in range(6):
        frames, *_ = env.step(0)
    assert frames[:, 0, 0].tolist() == [3, 4, 5, 6]
    frames, _ = env.reset()
    assert frames[:3].max() == 0 and frames.shape == (4, 84, 84)


def test_a_lost_life_ends_the_episode_and_the_game_goes_on_with_fire():
    fake = FakeAtari(lose=(2,))
    env = script.EpisodicLifeEnv(fake)
    env.reset()
    assert env.step(0)[2] is False
    assert env.step(0)[2] is True
    frame, info = env.reset()
    assert fake.games == 1 and fake.taken[-1] == "FIRE"
    assert frame.max() == 3 and info["lives"] == 2
    assert env.step(0)[2] is False


def test_a_lost_life_without_a_fire_button_goes_on_where_it_was():
    fake = FakeAtari(lose=(2,), actions=("NOOP", "UP"))
    env = script.EpisodicLifeEnv(fake)
    env.reset()
    env.step(0), env.step(0)
    frame, _ = env.reset()
    assert frame.max() == 2 and fake.games == 1


def test_a_game_that_is_over_starts_anew_and_so_does_a_seeded_reset():
    fake = FakeAtari(over=2)
    env = script.EpisodicLifeEnv(fake)
    env.reset()
    env.step(0), env.step(0)
    env.reset()
    assert fake.games == 2
    env.reset(seed=3)
    assert fake.games == 3


def test_a_game_that_ends_while_the_ball_is_served_starts_anew_and_is_still_counted():
    fake = FakeAtari(lose=(2,), over=3, rewards={3: 7})
    env = script.EpisodicLifeEnv(gym.wrappers.RecordEpisodeStatistics(fake))
    env.reset()
    env.step(0), env.step(0)
    frame, info = env.reset()
    assert frame.max() == 0 and fake.games == 2
    assert info["episode"]["r"] == 7 and info["lives"] == 3


@pytest.mark.parametrize(("reward", "clipped"), [(7, 1), (-200, -1), (0, 0), (0.5, 1)])
def test_rewards_are_clipped_to_their_sign(reward, clipped):
    assert script.ClipRewardEnv(FakeAtari()).reward(reward) == clipped


def test_every_frame_is_kept_in_colour_until_it_is_taken():
    env = script.MaxAndSkipEnv(script.RGBSaveEnv(FakeAtari()))
    env.reset()
    env.step(0)
    frames = env.render()
    assert [frame.max() for frame in frames] == [0, 1, 2, 3, 4]
    assert frames[0].shape == (210, 160, 3)
    assert env.render() == []


def test_the_true_score_of_a_whole_game_is_reported_over_all_its_lives():
    env = script.make_env(BREAKOUT)
    env.reset(seed=1)
    rng, rewards, ends = np.random.default_rng(0), 0.0, 0
    while True:
        _, reward, terminated, _, info = env.step(rng.integers(4))
        rewards += reward
        ends += terminated
        if "episode" in info:
            break
        if terminated:
            env.reset()
    assert ends == 5, "five lives"
    assert info["episode"]["r"] >= rewards > 0


def decisions(games, steps, seed):
    """All that the agent saw, did and got, a list for each game, with the games that ended."""
    rng = [np.random.default_rng(i) for i in range(2)]
    actions = np.array([r.integers(len(games.action_names)) for r in rng])
    frames, history, finished = games.reset(seed), ([], []), ([], [])
    for _ in range(steps):
        result = games.step(actions)
        for over in result.finished:
            finished[over.slot].append((over.score, over.length))
        for i in np.flatnonzero(result.decided):
            got = (result.rewards[i], result.terminated[i], result.truncated[i], result.lives[i])
            got += (games.idle[i],)
            history[i].append((actions[i], frames[i].tobytes(), *(float(x) for x in got)))
            actions[i] = rng[i].integers(len(games.action_names))
        frames = result.frames
    return history, finished


@pytest.mark.parametrize("rom", ["breakout", "freeway", "ms_pacman", "space_invaders"])
def test_both_ways_of_stepping_are_the_same_game_bit_for_bit(rom):
    game = script.Game(rom, max_frames=4 * 400, noop_max=0)
    native, native_over = decisions(script.NativeGames(game, 2), 900, seed=5)
    wrapped, wrapped_over = decisions(script.WrappedGames(game, 2), 900, seed=5)
    for i in range(2):
        both = min(len(native[i]), len(wrapped[i]))  # without FIRE a lost life costs one no step
        assert both > 850
        assert native[i][:both] == wrapped[i][:both]
        games = min(len(native_over[i]), len(wrapped_over[i]))
        assert games >= 2
        assert native_over[i][:games] == wrapped_over[i][:games]
        ended = sum(step[3] for step in native[i])
        assert ended > len(native_over[i]) or rom == "freeway", "lives were lost"


@pytest.mark.parametrize("kind", [script.NativeGames, script.WrappedGames])
def test_both_ways_have_the_frames_that_the_file_asks_for(monkeypatch, kind):
    for name, value in (("FRAME_SKIP", 2), ("FRAME_STACK", 3), ("FRAME_SIZE", 42)):
        monkeypatch.setattr(script, name, value)
    games = kind(script.Game("breakout", noop_max=0), 1)
    assert games.reset(1).shape == (1, 3, 42, 42)
    before = games.frame_numbers.copy()
    games.step(np.zeros(1, int))
    assert games.frame_numbers - before == 2


@pytest.mark.parametrize("kind", [script.NativeGames, script.WrappedGames])
def test_steps_without_a_point_are_counted_from_a_point_a_lost_life_and_a_start(kind):
    games, rng = kind(script.Game("breakout"), 2), np.random.default_rng(0)
    games.reset(3)
    expected, points, lost = np.zeros(2, int), 0, 0
    for _ in range(300):
        result = games.step(rng.integers(4, size=2))
        over = result.terminated | result.restarted
        points, lost = points + (result.rewards > 0).sum(), lost + over.sum()
        expected = np.where((result.rewards > 0) | over, 0, expected + result.decided)
        assert (games.idle == expected).all()
    assert points and lost
    while not games.idle.all():
        games.step(np.zeros(2, int))
    other = games.idle[1]
    games.start(np.array([True, False]), np.array([3, 4]))
    assert tuple(games.idle) == (0, other)


def test_a_sticky_action_is_repeated():
    calm, sticky = (script.Game("breakout", sticky, noop_max=0) for sticky in (0, 0.9))
    frames = []
    for game in (calm, sticky):
        games = script.NativeGames(game, 1)
        games.reset(1)
        for step in range(40):
            result = games.step(np.array([2 + step // 10 % 2]))
        frames.append(result.frames)
    assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize("kind", [script.NativeGames, script.WrappedGames])
def test_after_a_lost_life_fire_is_pressed_whatever_the_agent_says(kind):
    games = kind(BREAKOUT, 1)
    games.reset(3)
    noop, undecided = np.array([0]), 0
    for _ in range(400):
        result = games.step(noop)
        undecided += not result.decided[0]
        if result.finished:
            break
    assert undecided == 4, "an agent that never fires loses five balls, four of them served for it"
    assert result.finished[0].slot == 0


@pytest.mark.parametrize("kind", [script.NativeGames, script.WrappedGames])
def test_a_game_that_is_cut_off_is_truncated_and_shows_its_last_frame(kind):
    games = kind(script.Game("pong", max_frames=40, noop_max=0), 1)
    games.reset(1)
    for _ in range(10):
        result = games.step(np.array([0]))
    assert result.truncated[0] and not result.terminated[0]
    assert result.finished == [script.FinishedGame(0, 0.0, 10)]
    assert result.frames[0, 0].max() > 0, "the stack is full, not that of a new game"
    result = games.step(np.array([0]))
    assert not result.decided[0] and result.frames[0, 0].max() == 0


def test_games_cut_off_after_a_moment_are_counted_one_by_one():
    games = script.NativeGames(script.Game("freeway", max_frames=24), 4)
    games.reset(1)
    lengths = [over.length for _ in range(60) for over in games.step(np.zeros(4, int)).finished]
    assert lengths == [6] * len(lengths) and len(lengths) > 30


@pytest.mark.parametrize("action", [-1, 4])
def test_an_action_that_the_game_does_not_have_is_refused_before_it_can_hang(action):
    games = script.NativeGames(BREAKOUT, 2)
    games.reset(1)
    with pytest.raises(IndexError):
        games.step(np.array([0, action]))


def test_scores_are_counted_while_the_game_runs():
    for kind in (script.NativeGames, script.WrappedGames):
        games, rng = kind(BREAKOUT, 2), np.random.default_rng(0)
        games.reset(1)
        best = 0
        for _ in range(300):
            result = games.step(rng.integers(0, 4, 2))
            for over in result.finished:
                assert games.scores[over.slot] == over.score
            best = max(best, *games.scores)
        assert best >= 1


def test_a_game_that_ends_with_lives_left_is_counted():
    games, rng = script.NativeGames(script.Game("adventure", max_frames=10**6), 4), np.random
    rng = rng.default_rng(0)
    games.reset(1)
    games.frame_numbers = np.full(4, 10**6)  # as if the step to come were a new game's first
    games.lives, games.scores, games.lengths = np.ones(4), np.full(4, 9.0), np.full(4, 50)
    result = games.step(rng.integers(0, 18, 4))
    assert [tuple(over) for over in result.finished] == [(i, 9.0, 50) for i in range(4)]


def step_a_few(queue):
    games = script.NativeGames(BREAKOUT, 2)
    games.reset(1)
    queue.put(games.step(np.array([0, 1])).frames.shape)


def test_the_games_run_in_a_spawned_process_as_on_windows_and_macos():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=step_a_few, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == (2, 4, 84, 84)
    process.join(30)
    assert process.exitcode == 0
