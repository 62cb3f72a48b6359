"""The mathematics, against formulas written out slowly and against stable-baselines3."""

import copy
import math

import numpy as np
import pytest
import torch

import ai_breakout_game as script

CPU = torch.device("cpu")


def random_steps(num_steps=12, num_envs=3, seed=0):
    """Rewards, values, terminations, cut-offs: (T, N) tensors, values one longer."""
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(num_steps, num_envs, generator=rng)
    values = torch.randn(num_steps + 1, num_envs, generator=rng)
    terminated = torch.rand(num_steps, num_envs, generator=rng) < 0.2
    truncated = ~terminated & (torch.rand(num_steps, num_envs, generator=rng) < 0.15)
    return rewards, values, terminated, truncated


def slow_gae(rewards, values, terminated, truncated, gamma, lam):
    """Equation 16 of arXiv:1506.02438 as it stands: for each step the sum over all later ones."""
    num_steps, num_envs = rewards.shape
    advantages = np.zeros((num_steps, num_envs))
    for n in range(num_envs):
        for t in range(num_steps):
            for k in range(t, num_steps):
                value_after = 0.0 if terminated[k, n] else values[k + 1, n]
                delta = rewards[k, n] + gamma * value_after - values[k, n]
                advantages[t, n] += (gamma * lam) ** (k - t) * delta
                if terminated[k, n] or truncated[k, n]:
                    break
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_the_papers_sum(gamma, lam):
    rewards, values, terminated, truncated = random_steps()
    assert terminated.any() and truncated.any()
    dones = terminated | truncated
    fast = script.compute_gae(rewards, values, terminated, dones, gamma, lam)
    slow = slow_gae(*(x.numpy() for x in (rewards, values, terminated, truncated)), gamma, lam)
    np.testing.assert_allclose(fast.numpy(), slow, rtol=1e-5, atol=1e-5)


def test_gae_agrees_with_stable_baselines3():
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    from gymnasium import spaces

    rewards, values, terminated, _ = random_steps()
    num_steps, num_envs = rewards.shape
    buffer = buffers.RolloutBuffer(
        num_steps, spaces.Box(0, 1, (1,)), spaces.Discrete(2), "cpu", 0.95, 0.99, num_envs
    )
    start = np.zeros(num_envs)  # theirs: the flag stands at the step after the end
    for t in range(num_steps):
        zeros = np.zeros((num_envs, 1))
        buffer.add(zeros, zeros, rewards[t].numpy(), start, values[t], torch.zeros(num_envs))
        start = terminated[t].numpy()
    buffer.compute_returns_and_advantage(values[-1], start)
    ours = script.compute_gae(rewards, values, terminated, terminated, 0.99, 0.95)
    np.testing.assert_allclose(ours.numpy(), buffer.advantages, rtol=1e-5, atol=1e-5)


def random_batch(size=16, actions=4, seed=0):
    """What the network says now, and the steps it says it of."""
    rng = torch.Generator().manual_seed(seed)
    logits, values = torch.randn(size, actions, generator=rng), torch.randn(size, generator=rng)
    batch = script.Batch(
        frames=torch.zeros(size),
        temperatures=torch.ones(size),
        actions=torch.randint(actions, (size,), generator=rng),
        log_probs=-torch.rand(size, generator=rng) * 2 - 0.1,
        values=torch.randn(size, generator=rng),
        advantages=torch.randn(size, generator=rng) * 3 + 1,
        returns=torch.randn(size, generator=rng),
        mask=torch.rand(size, generator=rng) < 0.7,
    )
    return logits, values, batch


def direct_loss(logits, values, batch, clip, norm_adv, clip_vloss):
    """Each term of the loss, a step at a time, over the steps in the mask only."""
    keep = [i for i in range(len(values)) if batch.mask[i]]
    advantages = np.array([float(batch.advantages[i]) for i in keep])
    if norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    policy, value, entropy, clipped = [], [], [], 0
    for i, advantage in zip(keep, advantages):
        probs = np.exp(logits[i].double().numpy())
        probs /= probs.sum()
        ratio = probs[batch.actions[i]] / math.exp(batch.log_probs[i])
        clipped_ratio = float(np.clip(ratio, 1 - clip, 1 + clip))
        policy.append(-min(ratio * advantage, clipped_ratio * advantage))
        clipped += abs(ratio - 1) > clip
        new, old, target = (float(x[i]) for x in (values, batch.values, batch.returns))
        error = (new - target) ** 2
        if clip_vloss:
            error = max(error, (old + float(np.clip(new - old, -clip, clip)) - target) ** 2)
        value.append(0.5 * error)
        entropy.append(-(probs * np.log(probs)).sum())
    return np.mean(policy), np.mean(value), np.mean(entropy), clipped / len(keep)


def loss_of(logits, values, batch, norm_adv=True, clip_vloss=True):
    """The loss of a minibatch and its parts, as an update comes to them."""
    weighed = script.weigh(batch, norm_adv)
    return script.ppo_loss(logits, values, *weighed, 0.1, 0.01, 0.5, clip_vloss)


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_the_loss_is_the_formulas(norm_adv, clip_vloss):
    logits, values, batch = random_batch()
    loss, parts = loss_of(logits, values, batch, norm_adv=norm_adv, clip_vloss=clip_vloss)
    parts = dict(zip(script.LOSS_NAMES, parts.tolist()))
    policy, value, entropy, clipfrac = direct_loss(logits, values, batch, 0.1, norm_adv, clip_vloss)
    assert parts["policy_loss"] == pytest.approx(policy, rel=1e-4)
    assert parts["value_loss"] == pytest.approx(value, rel=1e-4)
    assert parts["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert parts["clipfrac"] == pytest.approx(clipfrac)
    assert float(loss) == pytest.approx(policy - 0.01 * entropy + 0.5 * value, rel=1e-4)


def test_an_unchanged_policy_has_no_divergence_and_clips_nothing():
    logits, values, batch = random_batch()
    log_probs = logits.log_softmax(-1).gather(-1, batch.actions[:, None]).squeeze(-1)
    _, parts = loss_of(logits, values, batch._replace(log_probs=log_probs))
    parts = dict(zip(script.LOSS_NAMES, parts.tolist()))
    assert parts["approx_kl"] == parts["old_approx_kl"] == parts["clipfrac"] == 0


def test_steps_that_the_agent_did_not_decide_change_nothing():
    logits, values, batch = random_batch()
    junk = {
        name: torch.where(batch.mask, getattr(batch, name), torch.full_like(values, 99.0))
        for name in ("log_probs", "values", "advantages", "returns")
    }
    results = []
    for one in (batch, batch._replace(**junk)):
        leaf = logits.clone().requires_grad_()
        loss, parts = loss_of(leaf, values, one)
        loss.backward()
        results.append((loss.item(), parts.tolist(), leaf.grad))
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])
    assert results[0][2][~batch.mask].abs().max() == 0
    assert results[0][2][batch.mask].abs().min() > 0


def test_the_mean_and_variance_under_a_mask_are_those_of_what_it_holds():
    _, _, batch = random_batch(200)
    kept = batch.advantages[batch.mask]
    mean, variance, count = script.masked_moments(batch.advantages, batch.mask)
    torch.testing.assert_close(mean, kept.mean())
    torch.testing.assert_close(variance, kept.var())
    assert count == len(kept)


def test_a_variance_under_weights_does_not_depend_on_their_scale():
    _, _, batch = random_batch(200)
    weights = torch.rand(200, generator=torch.Generator().manual_seed(1))
    _, variance, _ = script.masked_moments(batch.advantages, weights)
    again = script.masked_moments(batch.advantages, weights / 1000)[1]
    torch.testing.assert_close(again, variance)
    assert variance == pytest.approx(np.cov(batch.advantages, aweights=weights), rel=1e-4)


def test_all_steps_are_learnt_from_once_each_in_an_order_of_chance():
    _, _, batch = random_batch(200)
    steps, mask = script.draw_steps(batch, 200, torch.rand(200))
    assert sorted(steps.tolist()) == list(range(200)) != steps.tolist()
    assert torch.equal(mask, batch.mask[steps])


def test_few_steps_drawn_by_importance_have_the_mean_of_all_and_a_surer_one_than_others_have():
    _, _, batch = random_batch(4000)
    batch = batch._replace(advantages=batch.advantages**3)  # a few are large, as in a game
    kept = batch.advantages[batch.mask]
    drawn, others = [], []
    for seed in range(200):
        keys = torch.rand(4000, generator=torch.Generator().manual_seed(seed))
        steps, mask = script.draw_steps(batch, 400, keys)
        assert len(steps) == 400 and batch.mask[steps].all()
        drawn.append(script.masked_moments(batch.advantages[steps], mask)[0])
        some = keys.argsort()[:400]
        others.append(script.masked_moments(batch.advantages[some], batch.mask[some])[0])
    drawn, others = torch.stack(drawn), torch.stack(others)
    assert abs(drawn.mean() - kept.mean()) < 4 * drawn.std() / 200**0.5
    assert drawn.std() < others.std() / 2


@pytest.mark.parametrize("advantages", [0.0, 5.0])
@pytest.mark.parametrize("steps_in_mask", [0, 1, 16])
def test_steps_that_are_all_alike_can_be_drawn(steps_in_mask, advantages):
    _, _, batch = random_batch()
    batch = batch._replace(
        mask=torch.arange(16) < steps_in_mask, advantages=torch.full((16,), advantages)
    )
    for count in (8, 1):
        steps, mask = script.draw_steps(batch, count, torch.rand(16))
        assert len(steps) == count and mask.isfinite().all()
        assert bool(mask.any()) == bool(steps_in_mask)


@pytest.mark.parametrize("steps_in_mask", [0, 1])
def test_a_minibatch_with_hardly_a_decision_gives_finite_numbers(steps_in_mask):
    logits, values, batch = random_batch()
    batch = batch._replace(mask=torch.arange(16) < steps_in_mask)
    loss, parts = loss_of(logits, values, batch)
    assert loss.isfinite() and parts.isfinite().all()


def test_the_network_has_the_usual_names_and_shapes():
    agent = script.Agent(4)
    shapes = {name: tuple(tensor.shape) for name, tensor in agent.state_dict().items()}
    assert shapes["network.0.weight"] == (32, 4, 8, 8)
    assert shapes["network.2.weight"] == (64, 32, 4, 4)
    assert shapes["network.4.weight"] == (64, 64, 3, 3)
    assert shapes["network.7.weight"] == (512, 3136)
    assert shapes["actor.weight"] == (4, 512) and shapes["critic.weight"] == (1, 512)
    assert len(shapes) == 12


def test_the_first_layers_are_orthogonal_and_the_first_policy_is_about_uniform():
    torch.manual_seed(0)
    agent = script.Agent(4)
    rows = agent.network[0].weight.reshape(32, -1)
    torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(32), rtol=1e-4, atol=1e-4)
    logits, values = agent(torch.randint(0, 255, (8, 4, 84, 84), dtype=torch.uint8))
    assert logits.shape == (8, 4) and values.shape == (8,)
    assert (logits.softmax(-1) - 0.25).abs().max() < 0.02


def test_the_layout_of_the_frames_in_memory_changes_no_result():
    torch.manual_seed(0)
    agent = script.Agent(4)
    frames = torch.randint(0, 255, (8, 4, 84, 84), dtype=torch.uint8)
    last = frames.contiguous(memory_format=torch.channels_last)
    assert last.stride() != frames.stride()
    torch.testing.assert_close(agent(frames), agent(last), rtol=1e-4, atol=1e-5)


def test_actions_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    noise = script.gumbel_noise(logits.shape, torch.Generator().manual_seed(0))
    temperatures = torch.ones(len(logits))
    actions, log_probs, _ = script.act(lambda frames: (frames, None), logits, temperatures, noise)
    shares = torch.bincount(actions) / len(actions)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)
    torch.testing.assert_close(log_probs, logits.gather(1, actions[:, None]).squeeze(1))


def test_patience_is_lost_in_a_line_and_a_hot_policy_draws_what_it_likes_less():
    idle = np.array([0, 99, 100, 150, 400])
    temperatures = script.policy_temperatures(idle, 100)
    torch.testing.assert_close(temperatures, torch.tensor([1, 1, 1, 1.5, 4]))
    assert torch.equal(script.policy_temperatures(idle, 0), torch.ones(5)), "endless patience"

    logits = torch.tensor([0.9, 0.09, 0.01]).log().expand(20_000, 3)
    noise = script.gumbel_noise(logits.shape, torch.Generator().manual_seed(0))
    temperatures = torch.full((20_000,), 2.0)
    actions, log_probs, _ = script.act(lambda frames: (frames, None), logits, temperatures, noise)
    roots = torch.tensor([0.9, 0.09, 0.01]).sqrt()
    probs = roots / roots.sum()
    torch.testing.assert_close(torch.bincount(actions) / 20_000, probs, atol=0.02, rtol=0)
    torch.testing.assert_close(log_probs, probs.log()[actions])


def small_run(multithreading=True, **knobs):
    """Everything that one update needs, small."""
    config = script.Config(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=2, **knobs)
    game = script.find_game(config)
    games = script.make_vector_env(game, 2, multithreading)
    state = script.make_state(config, game, CPU)
    rollout = script.make_rollout(16, 2, CPU)
    rollout.frames[-1] = script.to_blocks(torch.from_numpy(games.reset(config.seed)))
    return config, games, state, rollout


def learn(updates, seed=1, multithreading=True):
    """The weights after some updates."""
    config, games, state, rollout = small_run(seed=seed, multithreading=multithreading)
    for _ in range(updates):
        script.collect_rollout(state, games, rollout, script.StopRequest())
        script.update(state, rollout, config, script.StopRequest())
    return torch.cat([p.flatten() for p in state.agent.parameters()])


@pytest.mark.parametrize("multithreading", [True, False])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(multithreading):
    first, again = (learn(3, multithreading=multithreading) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, learn(3, seed=2, multithreading=multithreading))


def test_a_rollout_starts_where_the_last_one_ended():
    _, games, state, rollout = small_run()
    script.collect_rollout(state, games, rollout, script.StopRequest())
    last = rollout.frames[-1].clone()
    script.collect_rollout(state, games, rollout, script.StopRequest())
    assert torch.equal(rollout.frames[0], last)
    assert rollout.frames[1:].float().std() > 0


def test_a_rollout_says_what_was_decided_and_which_games_ended():
    _, games, state, rollout = small_run(max_frames=4 * 10)
    over = script.collect_rollout(state, games, rollout, script.StopRequest())
    assert [(t, game.slot, game.length) for t, game in over] == [(10, 0, 10), (10, 1, 10)]
    assert rollout.dones[9].all() and not rollout.terminated[9].any()
    assert not rollout.decided[10].any() and rollout.decided[:10].all()


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_learning_makes_rewarded_actions_likelier_and_returns_foreseen(fraction):
    config, _, state, rollout = small_run(learning_rate=1e-3, learn_fraction=fraction)
    rng = torch.Generator().manual_seed(0)
    rollout.frames[:] = torch.randint(0, 255, rollout.frames.shape, generator=rng)
    rollout.actions[:] = torch.randint(4, rollout.actions.shape, generator=rng)
    rollout.rewards[:] = (rollout.actions == 2).float()
    rollout.dones[:] = rollout.terminated[:] = rollout.decided[:] = True
    rollout.log_probs[:] = math.log(0.25)
    for _ in range(8):
        losses = script.update(state, rollout, config, script.StopRequest())
        logits, values = state.agent(rollout.frames[:-1].flatten(0, 1))
        log_probs = logits.detach().log_softmax(-1)
        rollout.values[:-1] = values.detach().reshape(16, 2)
        rollout.log_probs[:] = log_probs.gather(1, rollout.actions.reshape(-1, 1)).reshape(16, 2)
    assert log_probs.exp().mean(0).argmax() == 2
    assert log_probs.exp().mean(0)[2] > 0.5
    assert losses["explained_variance"] > 0.5


@pytest.mark.parametrize("cost", [0.0, 3.0])
def test_a_lost_life_costs_what_it_is_said_to_and_a_cut_off_nothing(cost):
    config, _, state, rollout = small_run(life_cost=cost, gamma=0.0)
    rollout.decided[:] = rollout.dones[:] = True
    rollout.terminated[:, 0] = True  # the second game is cut off at every step
    rollout.rewards[:] = 1
    rollout.frames[:, 0] = 255  # by which a step of the first game is known
    loss, seen = state.loss, []

    def look(agent, batch, *others):
        seen.append((batch.frames.float().mean((1, 2, 3)) == 255, batch.returns))
        return loss(agent, batch, *others)

    state.loss = look
    script.update(state, rollout, config, script.StopRequest())
    first, returns = (torch.cat(x) for x in zip(*seen))
    assert first.sum() == len(first) / 2
    torch.testing.assert_close(returns, torch.where(first, 1 - cost, 1.0))


def test_a_new_agent_has_patience_unless_the_user_says_otherwise():
    for knobs, patience in (({}, 250), ({"patience": 0.0}, 0), ({"patience": 9.0}, 9)):
        assert small_run(**knobs)[2].agent.patience == patience


def test_what_was_played_in_heat_is_learnt_in_the_same_heat():
    config, games, state, rollout = small_run(patience=4, learning_rate=0.0)
    state.agent.actor.weight.data *= 100  # so that the heat makes a difference
    script.collect_rollout(state, games, rollout, script.StopRequest())
    assert rollout.temperatures[:4].max() == 1 and rollout.temperatures.max() >= 3
    assert abs(script.update(state, rollout, config, script.StopRequest())["approx_kl"]) < 1e-6
    rollout.temperatures[:] = 1
    assert script.update(state, rollout, config, script.StopRequest())["approx_kl"] > 1e-3


def test_a_sharpened_agent_thinks_alike_but_hesitates_less():
    said = []
    for factor in (1.0, 2.0):
        *_, state, rollout = small_run(model_filename="ai_breakout_game.mdl", sharpen=factor)
        with torch.no_grad():
            said.append(state.agent(rollout.frames[-1]))
    (logits, values), (sharp_logits, same_values) = said
    torch.testing.assert_close(sharp_logits, 2 * logits)
    assert torch.equal(values, same_values)


def test_a_target_kl_ends_an_update_early():
    config, games, state, rollout = small_run(learning_rate=1e-2, target_kl=1e-6)
    steps = 0
    step, state.optimizer.step = state.optimizer.step, lambda: None

    def count():
        nonlocal steps
        steps += 1
        step()

    state.optimizer.step = count
    script.collect_rollout(state, games, rollout, script.StopRequest())
    script.update(state, rollout, config, script.StopRequest())
    assert steps == config.num_minibatches, "one epoch of two"


def test_the_gradient_is_clipped_as_a_whole():
    config, games, state, rollout = small_run(max_grad_norm=1e-3)
    norms = []
    step = state.optimizer.step

    def measure():
        grads = [p.grad.flatten() for p in state.agent.parameters()]
        norms.append(torch.cat(grads).norm().item())
        step()

    state.optimizer.step = measure
    script.collect_rollout(state, games, rollout, script.StopRequest())
    script.update(state, rollout, config, script.StopRequest())
    assert len(norms) == 4 and max(norms) <= 1.01e-3


@pytest.mark.parametrize("anneal", [True, False])
def test_the_learning_rate_falls_in_a_line_to_zero_if_it_falls(anneal):
    config = script.Config(total_timesteps=1024 * 4, learning_rate=1.0, anneal_lr=anneal)
    state = small_run()[2]
    rates = []
    for update in range(config.num_updates):
        state.update = update
        rates.append(script.anneal(config, state))
        assert state.optimizer.param_groups[0]["lr"] == rates[-1]
    assert rates == ([1.0, 0.75, 0.5, 0.25] if anneal else [1.0] * 4)


def test_a_stop_leaves_the_weights_between_two_steps():
    config, games, state, rollout = small_run()
    before = copy.deepcopy(state.agent.state_dict())
    stop = script.StopRequest()
    stop.requested = True
    script.collect_rollout(state, games, rollout, stop)
    assert not rollout.frames[1:-1].any(), "no step was taken"
    assert script.update(state, rollout, config, stop) == {}
    assert all(torch.equal(before[name], x) for name, x in state.agent.state_dict().items())


@pytest.mark.parametrize("size", [8, 256])
def test_the_hidden_layer_is_a_linear_layer_whatever_multiplies_it(size):
    layer = script.Dense(3136, 512)
    x, weights = torch.randn(size, 3136, requires_grad=True), torch.randn(size, 512)
    results = []
    for y in (layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)):
        inputs = (x, layer.weight, layer.bias)
        results.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------ compiled, and in 16 bits


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_code_plays_and_learns_the_same(precision):
    rollouts, weights, losses = [], [], []
    for compile in (False, True):
        config, games, state, rollout = small_run(compile=compile, precision=precision)
        script.collect_rollout(state, games, rollout, script.StopRequest())
        losses.append(script.update(state, rollout, config, script.StopRequest()))
        rollouts.append(rollout)
        weights.append(state.agent.state_dict())
    bound = {"float32": 1e-5, "bfloat16": 1e-2}[precision]
    plain, compiled = rollouts
    assert torch.equal(plain.actions, compiled.actions)
    assert torch.equal(plain.frames, compiled.frames)
    torch.testing.assert_close(compiled.values, plain.values, rtol=bound, atol=bound)
    assert weights[0].keys() == weights[1].keys(), "the same file, compiled or not"
    for name, weight in weights[0].items():
        # Adam moves a weight by its rate at most, whatever the gradient, so twice that is the most
        # that four steps of a different sign could come to where the gradient is next to nothing.
        atol = {"float32": 2e-6, "bfloat16": 2 * 4 * config.learning_rate}[precision]
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=atol)
    assert losses[1] == pytest.approx(losses[0], rel=20 * bound, abs=20 * bound)


def test_what_cannot_be_compiled_is_refused_or_left_as_it_is(monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(script.UserError, match=r"--compile=yes does not work .*: no compiler$"):
        script.pick_compiler(True, CPU)
    assert script.pick_compiler(None, CPU)(script.act) is script.act


@pytest.fixture(scope="module")
def played():
    """What 16 bits are measured on: real frames, and an agent whose actions are not all alike."""
    _, games, state, rollout = small_run(precision="float32", seed=4)
    script.collect_rollout(state, games, rollout, script.StopRequest())
    torch.nn.init.orthogonal_(state.agent.actor.weight, 1.0)
    return state.agent, rollout.frames.flatten(0, 1)


def gradient_of(agent, frames, precision):
    """Outputs, and a gradient through all layers as one vector, with the layers in `precision`."""
    agent.precision = precision
    agent.zero_grad()
    logits, values = agent(frames)
    (-logits.log_softmax(-1)[:, 1] + values.square()).mean().backward()
    return logits, values, torch.cat([p.grad.flatten() for p in agent.parameters()])


def test_the_gradient_in_16_bits_points_where_it_points_in_32(played):
    exact, rounded = (gradient_of(*played, x) for x in (torch.float32, torch.bfloat16))
    assert rounded[2].dtype == torch.float32 and not torch.equal(exact[2], rounded[2])
    assert torch.cosine_similarity(exact[2], rounded[2], dim=0) > 0.999
    torch.testing.assert_close(rounded[2].norm(), exact[2].norm(), rtol=0.01, atol=0)


def test_the_policy_in_16_bits_is_the_policy_in_32(played):
    exact, rounded = (gradient_of(*played, x) for x in (torch.float32, torch.bfloat16))
    assert exact[0].softmax(-1).std() > 0.01, "not all actions are alike"
    torch.testing.assert_close(rounded[0].softmax(-1), exact[0].softmax(-1), rtol=0, atol=0.01)
    torch.testing.assert_close(rounded[1], exact[1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("processor", "wanted"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, torch.float32),
    ],
)
def test_auto_takes_16_bits_only_where_the_processor_multiplies_them_fast(
    processor, wanted, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert script.pick_precision("auto", CPU) == wanted
    assert script.pick_precision("float32", CPU) == torch.float32
    with pytest.raises(script.UserError, match="--precision=half is neither"):
        script.Config(precision="half")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "kernel", "stride", "side"), [(4, 8, 4, 84), (32, 4, 2, 20)])
def test_a_convolution_in_blocks_is_the_same_convolution(dtype, channels, kernel, stride, side):
    torch.manual_seed(0)
    layer = script.BlockConv(channels, 16, kernel, stride).to(dtype)
    x = torch.randn(64, channels, side, side).to(dtype)
    wanted = torch.nn.functional.conv2d(x.float(), layer.weight.float(), layer.bias.float(), stride)
    rounding = 1e-5 if dtype == torch.float32 else 0.02
    for given in (x, script.to_blocks(x, stride)):
        torch.testing.assert_close(layer(given).float(), wanted, rtol=rounding, atol=rounding)
