"""What is learned from a rollout: the formulas, written out slowly, and what updates do."""

import copy
import dataclasses
import functools
import io
import math

import numpy as np
import pytest
import torch

import ai_breakout_game as script

CPU, T, N = torch.device("cpu"), 16, 2
CONFIG = script.Config(
    num_envs=N, num_steps=T, num_minibatches=2, total_timesteps=320, device="cpu",
    precision="float32",
)  # fmt: skip
new_config = functools.partial(dataclasses.replace, CONFIG)
one_batch = functools.partial(new_config, num_minibatches=1, update_epochs=1)
FRACTIONS = pytest.mark.parametrize("fraction", [1.0, 0.5])


@functools.cache
def first_state(seed):
    return script.make_state(new_config(seed=seed))


def new_state(seed=1):
    """The state at the start of a run."""
    return copy.deepcopy(first_state(seed))


def random_rollout(seed=0):
    """A rollout in which game 0 loses a life, and game 1 is truncated."""
    rng, rollout = torch.Generator().manual_seed(seed), script.make_rollout(T, N, CPU)
    rollout["frames"].random_(256, generator=rng)
    rollout["actions"].random_(4, generator=rng)
    for name in ("rewards", "values", "log_probs"):
        rollout[name].normal_(generator=rng)
    rollout["log_probs"].mul_(0.1).sub_(math.log(4))
    rollout["temperatures"].fill_(1)
    rollout["decided"].fill_(True)
    rollout["terminated"][5, 0] = rollout["truncated"][9, 1] = True
    rollout["decided"][6, 0] = rollout["decided"][10, 1] = False
    return rollout


def weights_of(state):
    return torch.cat([x.detach().flatten() for x in state.agent.parameters()])


def update(state, rollout, config=CONFIG):
    """One update, as `train` makes it. Returns its losses."""
    numbers = script.learn(state, rollout, script.anneal(config, state.update))
    return {name.removeprefix("losses/"): value for name, value in numbers.items()}


@pytest.fixture
def seen(monkeypatch):
    """The batches that the loss sees, in order."""
    batches, loss = [], script.ppo_loss

    def record(logits, values, batch, config):
        batches.append(batch)
        return loss(logits, values, batch, config)

    monkeypatch.setattr(script, "ppo_loss", record)
    return batches


# ---- Rollouts ----


class ScriptedGames:
    """Two games. In game i the brightness before step t, and its reward, are 100 * i + t."""

    num_envs, lives = 2, np.array([5, 5])

    def __init__(self):
        self.count, self.taken, self.idle, rng = 0, [], np.zeros(2, int), np.random.default_rng(0)
        self.flags = {x: rng.random((33, 2)) < 0.3 for x in ("terminated", "truncated", "decided")}

    @property
    def frames(self):
        numbers = np.array([self.count, 100 + self.count], np.uint8)
        return np.tile(numbers[:, None, None, None], (1, 4, 84, 84))

    def step(self, actions):
        self.taken.append(actions.tolist())
        rewards = np.array([self.count, 100 + self.count], np.float32)
        flags = {name: x[self.count] for name, x in self.flags.items()}
        self.count += 1
        self.idle = self.count * np.array([1, 2])
        finished = [script.FinishedGame(1, 7.5, 3)] if self.count == 3 else []
        return script.StepResult(rewards=rewards, finished=finished, **flags)


class BrightnessAgent(script.Agent):
    """The value of frames is their brightness b, and b % 4 the only action."""

    patience = 10.0

    def forward(self, frames):
        values = frames.float().mean((1, 2, 3))
        return 1e4 * torch.nn.functional.one_hot(values.long() % 4, 4).float(), values


@pytest.fixture(scope="module")
def collected():
    """Scripted games, a state, and two rollouts of them, one after the other."""
    games, rollout, rollouts = ScriptedGames(), script.make_rollout(T, N, CPU), []
    state = script.TrainState(BrightnessAgent(4), None, torch.Generator())
    for _ in range(2):
        script.collect_rollout(state, games, rollout)
        rollouts.append({name: x.clone() for name, x in rollout.items()})
    return games, state, rollouts


STEPS = torch.arange(2 * T + 1)[:, None]
NUMBERS = STEPS + torch.tensor([0, 100])  # (2 * T + 1, N)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("frames", NUMBERS[:-1, :, None, None, None].expand(2 * T, N, 4, 84, 84)),
        ("actions", NUMBERS[:-1] % 4),
        ("log_probs", torch.zeros(2 * T, N)),
        ("values", NUMBERS[:-1]),
        ("rewards", NUMBERS[:-1]),
        ("temperatures", (STEPS[:-1] * torch.tensor([1, 2]) / 10).clamp(min=1)),
        *((name, None) for name in ("terminated", "truncated", "decided")),
    ],
)
def test_each_step_of_a_rollout_has_what_belongs_to_its_action(collected, name, wanted):
    games, _, rollouts = collected
    got = torch.cat([rollout[name][:T] for rollout in rollouts])
    wanted = torch.from_numpy(games.flags[name][: 2 * T]) if wanted is None else wanted
    torch.testing.assert_close(got, wanted.to(got.dtype))


def test_the_actions_of_a_rollout_are_those_that_were_played(collected):
    games, _, rollouts = collected
    assert torch.cat([rollout["actions"] for rollout in rollouts]).tolist() == games.taken


def test_a_rollout_ends_with_the_frames_at_which_the_next_one_starts_and_their_value(collected):
    first, second = collected[2]
    assert torch.equal(first["frames"][-1], second["frames"][0])
    assert torch.equal(first["values"][-1], second["values"][0])
    assert second["values"][-1].tolist() == NUMBERS[-1].tolist()


def test_a_rollout_counts_steps_and_finished_games(collected):
    _, state, _ = collected
    assert (state.global_step, state.num_games, list(state.scores)) == (4 * T, 1, [7.5])


# ---- Advantages and returns ----


def slow_gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """Equation 16 of arXiv:1506.02438 as it stands: for each step, the sum over later ones."""
    advantages = torch.zeros_like(rewards)
    for t, n in np.ndindex(*rewards.shape):
        for k in range(t, len(rewards)):
            following = 0 if terminated[k, n] else values[k + 1, n]
            delta = rewards[k, n] + gamma * following - values[k, n]
            advantages[t, n] += (gamma * gae_lambda) ** (k - t) * delta
            if terminated[k, n] or truncated[k, n]:
                break
    return advantages


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_the_sum_of_discounted_errors(gamma, gae_lambda):
    rollout = random_rollout()
    steps = [rollout[x] for x in ("rewards", "values", "terminated", "truncated")]
    got = script.compute_gae(*steps, gamma=gamma, gae_lambda=gae_lambda)
    torch.testing.assert_close(got, slow_gae(*steps, gamma, gae_lambda), rtol=1e-5, atol=1e-5)


def test_gae_agrees_with_stable_baselines3():
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    from gymnasium import spaces

    rollout = random_rollout()
    rewards, values, ends = (rollout[x] for x in ("rewards", "values", "terminated"))
    box, actions = spaces.Box(0, 1, (1,)), spaces.Discrete(2)
    buffer = buffers.RolloutBuffer(T, box, actions, "cpu", 0.95, 0.99, N)
    start, nothing = np.zeros(N), np.zeros((N, 1))  # theirs flags first steps, ours last ones
    for t in range(T):
        buffer.add(nothing, nothing, rewards[t].numpy(), start, values[t], torch.zeros(N))
        start = ends[t].numpy()
    buffer.compute_returns_and_advantage(values[-1], start)
    ours = script.compute_gae(rewards, values, ends, torch.zeros_like(ends), 0.99, 0.95)
    np.testing.assert_allclose(ours, buffer.advantages, rtol=1e-5, atol=1e-5)


def test_an_update_learns_returns_with_gamma_lambda_and_life_cost(seen):
    rollout = random_rollout()
    update(new_state(), rollout, one_batch(gamma=0.9, gae_lambda=0.5, life_cost=0.25))
    rewards, values = rollout["rewards"] - 0.25 * rollout["terminated"], rollout["values"]
    ends = (rollout["terminated"], rollout["truncated"])
    wanted = slow_gae(rewards, values, *ends, 0.9, 0.5) + values[:-1]
    # The batch is in random order, but no two steps have the same log probability.
    wanted = wanted.flatten()[rollout["log_probs"].flatten().argsort()]
    (batch,) = seen
    torch.testing.assert_close(batch["returns"][batch["log_probs"].argsort()], wanted)


@pytest.mark.parametrize("cost", [0.0, 3.0])
def test_a_lost_life_costs_life_cost_and_a_truncation_nothing(seen, cost):
    rollout = random_rollout()
    rollout["rewards"].fill_(1)
    rollout["terminated"][:, 0] = rollout["truncated"][:, 1] = True
    rollout["actions"][:] = torch.tensor([0, 1])  # which tells the two games apart
    update(new_state(), rollout, one_batch(life_cost=cost, gamma=0.0))
    wanted = torch.where(seen[0]["actions"] == 0, 1 - cost, 1.0)
    torch.testing.assert_close(seen[0]["returns"], wanted)


# ---- Minibatches ----


def steps_batch(size):
    """Steps with heavy-tailed advantages, some of them not decided."""
    rng = torch.Generator().manual_seed(0)
    advantages = torch.randn(size, generator=rng) ** 3 + 0.5
    weights = (torch.rand(size, generator=rng) < 0.7).float()
    return {"steps": torch.arange(size), "advantages": advantages, "sample_weights": weights}


def epoch(batch, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return list(script.minibatches(batch, new_config(**settings), generator))


def test_an_epoch_uses_each_step_once_in_random_order():
    first, second = (epoch(steps_batch(64), seed, num_minibatches=4) for seed in (0, 1))
    assert [len(minibatch["steps"]) for minibatch in first] == [16] * 4
    order, other = (torch.cat([x["steps"] for x in epoch]).tolist() for epoch in (first, second))
    assert sorted(order) == sorted(other) == list(range(64))
    assert order != sorted(order) and order != other


def test_a_fraction_of_the_steps_is_sampled_in_equal_minibatches():
    batch = steps_batch(4000)
    sampled = epoch(batch, learn_fraction=0.1, num_minibatches=4)
    assert [len(minibatch["steps"]) for minibatch in sampled] == [100] * 4
    for minibatch in sampled:
        steps = minibatch["steps"]
        assert torch.equal(minibatch["advantages"], batch["advantages"][steps])
        assert batch["sample_weights"][steps].all(), "steps that were not decided are never sampled"


def sampled_means(x, batch):
    """300 estimates of the weighted mean of `x`, each from a tenth of the steps, by importance
    sampling and by uniform sampling.
    """
    by_importance, uniformly = [], []
    for seed in range(300):
        (sample,) = epoch(batch, seed, learn_fraction=0.1, num_minibatches=1)
        by_importance.append((x[sample["steps"]] * sample["sample_weights"]).mean())
        some = torch.randint(len(x), (len(x) // 10,), generator=torch.Generator().manual_seed(seed))
        uniformly.append((x[some] * batch["sample_weights"][some]).mean())
    return torch.stack(by_importance), torch.stack(uniformly)


@pytest.mark.parametrize("power", [1, 2])
def test_importance_sampling_does_not_bias_means(power):
    batch = steps_batch(2000)
    x = batch["advantages"] ** power
    estimates, _ = sampled_means(x, batch)
    error = estimates.mean() - (x * batch["sample_weights"]).mean()
    assert abs(error) < 4 * estimates.std() / 300**0.5


def test_importance_sampling_estimates_the_mean_advantage_with_half_the_deviation():
    batch = steps_batch(2000)
    by_importance, uniformly = sampled_means(batch["advantages"], batch)
    assert by_importance.std() < uniformly.std() / 2


@FRACTIONS
@pytest.mark.parametrize("decided", [0, 1, 32])
@pytest.mark.parametrize("reward", [0.0, 5.0])
def test_steps_that_are_all_alike_or_hardly_decided_give_finite_numbers(fraction, decided, reward):
    rollout, state = random_rollout(), new_state()
    rollout["rewards"].fill_(reward)
    rollout["values"].zero_()
    rollout["terminated"].fill_(True)
    rollout["decided"].copy_((torch.arange(32) < decided).view(T, N))
    losses = update(state, rollout, new_config(learn_fraction=fraction))
    assert all(map(math.isfinite, losses.values())) and weights_of(state).isfinite().all()


# ---- The loss ----


def test_moments_are_the_weighted_mean_and_variance_and_the_sum_of_the_weights():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(3, 2, 200), rng.random(200) * (rng.random(200) < 0.7)
    mean = np.average(x, weights=weights)
    wanted = mean, np.average((x - mean) ** 2, weights=weights), weights.sum()
    got = script.masked_moments(torch.tensor(x), torch.tensor(weights))
    assert [float(number) for number in got] == pytest.approx(wanted)


@pytest.fixture
def minibatch():
    """What the network says now of 16 steps, and the steps."""
    rng = torch.Generator().manual_seed(0)
    logits, values = torch.randn(16, 4, generator=rng), torch.randn(16, generator=rng)
    batch = {x: torch.randn(16, generator=rng) for x in ("advantages", "returns", "log_probs")}
    batch["log_probs"] = logits.log_softmax(-1)[:, 2] + 0.2 * batch["log_probs"]
    weights = torch.rand(16, generator=rng)
    return (
        logits,
        values,
        batch | {"actions": torch.full((16,), 2), "sample_weights": weights / weights.sum()},
    )


@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_the_loss_is_that_of_the_formulas(minibatch, clip):
    losses = script.ppo_loss(*minibatch, new_config(clip_coef=clip, ent_coef=0.02, vf_coef=0.7))
    logits, values = (x.double().numpy() for x in minibatch[:2])
    batch = {name: x.double().numpy() for name, x in minibatch[2].items()}
    probs, weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), batch["sample_weights"]
    ratio, advantages = probs[:, 2] / np.exp(batch["log_probs"]), batch["advantages"]
    gains = ratio * advantages, np.clip(ratio, 1 - clip, 1 + clip) * advantages
    policy = -(weights * np.minimum(*gains)).sum()
    value = (weights * (values - batch["returns"]) ** 2).sum() / 2
    entropy = -(weights * (probs * np.log(probs)).sum(-1)).sum()
    wanted = {"policy_loss": policy, "value_loss": value, "entropy": entropy}
    wanted["approx_kl"] = (weights * (ratio - 1 - np.log(ratio))).sum()
    wanted["clipfrac"] = (weights * (abs(ratio - 1) > clip)).sum()
    wanted["loss"] = policy + 0.7 * value - 0.02 * entropy
    assert 0 < wanted["clipfrac"] < 1
    assert {name: float(losses[name]) for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_an_unchanged_policy_has_no_divergence_and_clips_nothing(minibatch):
    logits, values, batch = minibatch
    batch = batch | {"log_probs": logits.log_softmax(-1)[:, 2]}
    losses = script.ppo_loss(logits, values, batch, CONFIG)
    assert losses["approx_kl"] == losses["clipfrac"] == 0


@FRACTIONS
def test_advantages_are_normalized_in_each_minibatch(seen, fraction):
    update(new_state(), random_rollout(), new_config(learn_fraction=fraction, update_epochs=1))
    assert len(seen) == 2
    for batch in seen:
        moments = [(batch["sample_weights"] * batch["advantages"] ** n).sum() for n in range(3)]
        assert [float(moment) for moment in moments] == pytest.approx([1, 0, 1], abs=1e-4)


# ---- Updates ----


@FRACTIONS
def test_steps_that_the_agent_did_not_decide_change_no_weight(fraction):
    rollout, junk = random_rollout(), random_rollout()
    undecided = ~junk["decided"]
    junk["rewards"][undecided], junk["log_probs"][undecided] = 50.0, -9.0
    junk["actions"][undecided], junk["temperatures"][undecided] = 3, 7.0
    junk["values"][6, 0] = 60.0  # but the value at [10, 1] is what follows the truncation
    states = new_state(), new_state()
    losses = [
        update(state, steps, new_config(learn_fraction=fraction))
        for state, steps in zip(states, (rollout, junk))
    ]
    assert torch.equal(*map(weights_of, states)) and losses[0] == losses[1]


FIELDS = dataclasses.fields(script.Config)
PPO_FLAGS = [field for field in FIELDS if field.metadata["group"] == "PPO"]


@pytest.mark.parametrize("field", PPO_FLAGS, ids=lambda field: field.name)
def test_every_ppo_flag_changes_what_is_learned(field):
    value = getattr(CONFIG, field.name)
    other = not value if field.type is bool else field.type(value / 2 if value else 0.5)
    learned = []
    for config in (CONFIG, new_config(**{field.name: other})):
        state, rollout = new_state(), random_rollout()
        state.update = 2  # of 10: annealing has begun
        rollout = {name: x[: config.num_steps + len(x) - T] for name, x in rollout.items()}
        update(state, rollout, config)
        learned.append(weights_of(state))
    assert not torch.equal(*learned)


def test_training_plays_rollouts_and_anneals_as_its_flags_say(monkeypatch, tmp_path):
    seen = []

    def learn(state, rollout, config):
        seen.append((tuple(rollout["actions"].shape), config.learning_rate))
        state.update += 1
        return {}

    monkeypatch.setattr(script, "learn", learn)
    monkeypatch.chdir(tmp_path)
    config = new_config(num_steps=8, total_timesteps=32, learning_rate=0.1)
    script.train(config, new_state(), tmp_path / "runs")
    assert seen == [((8, 2), 0.1), ((8, 2), 0.05)]


@pytest.mark.parametrize(("anneal", "wanted"), [(True, [1, 0.75, 0.5, 0.25]), (False, [1] * 4)])
def test_the_learning_rate_falls_linearly_or_stays(anneal, wanted):
    config = new_config(total_timesteps=128, learning_rate=1.0, anneal_lr=anneal)
    assert [script.anneal(config, update).learning_rate for update in range(4)] == wanted


def test_the_gradient_is_clipped_as_a_whole():
    gradients, norms = [], []
    for limit in (1e9, 1e-3):
        state = new_state()

        def measure(state=state, step=state.optimizer.step):
            gradients.append(torch.cat([x.grad.flatten() for x in state.agent.parameters()]))
            step()

        state.optimizer.step = measure
        norms.append(update(state, random_rollout(), one_batch(max_grad_norm=limit))["grad_norm"])
    whole, clipped = gradients
    torch.testing.assert_close(clipped, whole * (1e-3 / whole.norm()), rtol=1e-3, atol=1e-9)
    assert norms == pytest.approx([float(whole.norm())] * 2, rel=1e-3), "logged before clipping"


@FRACTIONS
def test_learning_makes_rewarded_actions_likelier_and_returns_expected(fraction):
    config = new_config(learn_fraction=fraction, life_cost=0.0, anneal_lr=False)
    state, rollout, explained = new_state(), random_rollout(), []
    rollout["rewards"].copy_(rollout["actions"] == 2)
    rollout["terminated"].fill_(True)
    rollout["decided"].fill_(True)
    for _ in range(10):
        with torch.no_grad():
            logits, values = state.agent(rollout["frames"][:-1].flatten(0, 1))
        log_probs = logits.log_softmax(-1)
        rollout["values"][:-1] = values.view(T, N)
        taken = log_probs.gather(1, rollout["actions"].view(-1, 1))
        rollout["log_probs"].copy_(taken.view(T, N))
        explained.append(update(state, rollout, config)["explained_variance"])
    assert log_probs[:, 2].exp().mean() > 0.4
    assert explained[-1] > max(0.5, explained[0] + 0.3)


@functools.cache
def two_games(native):
    """Two games that tests share; each resets them."""
    return script.Games(new_config(multithreading=native), N)


def test_steps_are_learned_at_the_temperature_at_which_they_were_played():
    games, rollout, state = two_games(True), script.make_rollout(T, N, CPU), new_state()
    config, state.agent.patience = new_config(learning_rate=0.0), 4.0
    state.agent.actor.weight.data *= 100  # so that the temperature makes a difference
    games.reset(1)
    script.collect_rollout(state, games, rollout)
    assert rollout["temperatures"].max() > 3
    assert abs(update(state, rollout, config)["approx_kl"]) < 1e-6
    rollout["temperatures"].fill_(1)
    assert update(state, rollout, config)["approx_kl"] > 1e-3


@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
def test_a_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others(native):
    games, rollout, learned = two_games(native), script.make_rollout(8, N, CPU), []
    for seed in (1, 1, 2):
        state = script.make_state(new_config(seed=seed))
        games.reset(seed)
        for _ in range(3):
            script.collect_rollout(state, games, rollout)
            update(state, rollout, new_config(num_steps=8, update_epochs=1))
        learned.append(weights_of(state))
    assert torch.equal(learned[0], learned[1]) and not torch.equal(learned[0], learned[2])


@pytest.mark.parametrize("name", ["rewards", "values", "log_probs"])
def test_a_rollout_that_is_not_finite_ends_the_run(name):
    rollout = random_rollout()
    rollout[name][3, 1] = math.nan
    with pytest.raises(FloatingPointError, match="update 1 diverged"):
        update(new_state(), rollout)


def test_a_gradient_that_is_not_finite_ends_the_run():
    state = new_state()
    state.agent.critic.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="--learning-rate"):
        update(state, random_rollout(), one_batch())


# ---- The state of a run ----


@pytest.fixture
def learning():
    """A state in the middle of a run."""
    state = new_state()
    update(state, random_rollout())
    state.global_step, state.num_games, state.best_mean = 3200, 5, 2.5
    state.scores.extend([1.0, 4.0])
    state.generator.manual_seed(77)
    return state


def restored(state, **changes):
    """A new state of another seed into which `state` was loaded from a file, with `changes`."""
    file, other = io.BytesIO(), new_state(seed=9)
    torch.save(state.state_dict() | changes, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def test_a_restored_state_learns_the_same_bit_for_bit(learning):
    states = learning, restored(learning)
    assert torch.equal(*map(weights_of, states))
    for state in states:
        update(state, random_rollout(1))
    assert torch.equal(*map(weights_of, states)), "also moments of Adam and random numbers agree"


def test_a_restored_state_has_its_counters_and_scores(learning):
    other = restored(learning)
    assert (other.update, other.global_step, other.num_games, other.best_mean) == (1, 3200, 5, 2.5)
    assert list(other.scores) == [1.0, 4.0] and other.mean_score == 2.5
    other.scores.extend(range(200))
    assert len(other.scores) == 100


def test_the_generator_of_another_kind_of_device_is_left_out(learning):
    other = restored(learning, generator=torch.zeros(16, dtype=torch.uint8))
    assert other.update == 1 and torch.equal(weights_of(learning), weights_of(other))
    assert torch.rand(9, generator=other.generator).std() > 0
