"""The network: its layers, its precision, its policy, and what the shipped agent computes."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ai_breakout_game as script

CPU = torch.device("cpu")
MODEL = Path(script.__file__).with_name("models") / "ai_breakout_game.mdl"


def random_frames(size):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(256, (size, 4, 84, 84), generator=rng, dtype=torch.uint8)


@pytest.fixture(scope="module")
def new_agent():
    torch.manual_seed(0)
    return script.Agent(4)


@pytest.fixture(scope="module")
def shipped():
    return script.load_agent(str(MODEL))


# ---- The network ----


def test_weights_have_the_usual_names_and_shapes(new_agent):
    layers = {"network.0": (32, 4, 8, 8), "network.2": (64, 32, 4, 4), "network.4": (64, 64, 3, 3)}
    layers |= {"network.7": (512, 3136), "actor": (4, 512), "critic": (1, 512)}
    wanted = {f"{name}.weight": shape for name, shape in layers.items()}
    wanted |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    assert {name: tuple(x.shape) for name, x in new_agent.state_dict().items()} == wanted


@pytest.mark.parametrize("layer", [0, 2, 4, 7])
def test_hidden_layers_start_orthogonal_with_the_gain_of_a_relu(new_agent, layer):
    rows = new_agent.network[layer].weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), rtol=1e-4, atol=1e-4)
    assert not new_agent.network[layer].bias.any()


def test_the_first_policy_is_nearly_uniform_and_the_first_values_are_not(new_agent):
    logits, values = new_agent(random_frames(8))
    assert logits.shape == (8, 4) and values.shape == (8,)
    assert logits.std() > 0 and (logits.softmax(-1) - 0.25).abs().max() < 0.02
    assert values.std() > 0 and new_agent.critic.weight.norm().item() == pytest.approx(1)


def made_frames():
    """Frames that have no symmetry, (1, 4, 84, 84)."""
    c, y, x = np.indices((4, 84, 84))
    pixels = (17 * c * c + 3 * y + 5 * x + x * y // 7) % 256
    return torch.from_numpy(pixels.astype(np.uint8))[None]


def played_frames(native, monkeypatch):
    """What the agent sees after 60 steps of a game, six of each action in turn."""
    monkeypatch.setattr(script, "NOOP_MAX", 1)  # no random start
    games = script.Games(script.Config(multithreading=native), 1)
    games.reset(1)
    for step in range(60):
        games.step(np.array([step // 6 % 4]))
    return torch.from_numpy(games.frames)


@torch.no_grad()
def test_the_shipped_agent_computes_known_numbers_from_made_frames(shipped):
    logits, values = shipped(made_frames())
    np.testing.assert_allclose(logits[0], [-242.727, -37.0808, 907.690, -819.993], rtol=1e-3)
    np.testing.assert_allclose(values, [39.4403], rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
def test_the_shipped_agent_computes_known_numbers_in_a_game(shipped, native, monkeypatch):
    logits, values = shipped(played_frames(native, monkeypatch))
    np.testing.assert_allclose(logits[0], [4.72425, 3.34895, -7.64052, -3.28895], rtol=1e-3)
    np.testing.assert_allclose(values, [11.0112], rtol=1e-3)


@torch.no_grad()
def test_the_layout_of_the_frames_in_memory_makes_no_difference(shipped):
    frames, wide = random_frames(8), torch.zeros(8, 4, 84, 168, dtype=torch.uint8)
    wide[..., ::2] = frames
    layouts = [frames.contiguous(memory_format=torch.channels_last), wide[..., ::2]]
    layouts += [frames.transpose(2, 3).contiguous().transpose(2, 3)]
    wanted = shipped(frames)
    for other in layouts:
        assert torch.equal(other, frames) and other.stride() != frames.stride()
        torch.testing.assert_close(shipped(other), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_first_convolution_is_an_ordinary_one_of_scaled_frames(dtype, error):
    torch.manual_seed(0)
    layer, frames = script.FrameConv(32), random_frames(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = layer(frames)
    assert output.dtype == dtype
    wanted = nn.functional.conv2d(frames / 255, layer.weight, layer.bias, stride=4)
    torch.testing.assert_close(output.float(), wanted, rtol=error, atol=error)


def output_and_gradients(outputs, inputs):
    """An output, and the gradients of a weighted sum of it."""
    factors = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    return [outputs, *torch.autograd.grad((outputs * factors).sum(), inputs)]


def test_the_gradient_of_the_first_convolution_is_that_of_an_ordinary_one():
    torch.manual_seed(0)
    layer, frames = script.FrameConv(32), random_frames(3)
    inputs = layer.weight, layer.bias
    got = output_and_gradients(layer(frames), inputs)
    wanted = output_and_gradients(nn.functional.conv2d(frames / 255, *inputs, stride=4), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [8, 256])
def test_a_dense_layer_is_a_linear_layer_and_so_are_its_gradients(size):
    torch.manual_seed(0)
    layer, x = script.Dense(300, 50), torch.randn(size, 300, requires_grad=True)
    inputs = x, layer.weight, layer.bias
    got = output_and_gradients(layer(x), inputs)
    wanted = output_and_gradients(nn.functional.linear(*inputs), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# ---- Precision ----


@pytest.fixture(scope="module")
def in_both_precisions(new_agent):
    """Logits, values and gradient in float32 and in bfloat16, from the same frames."""
    agent, frames, results = copy.deepcopy(new_agent), random_frames(32), []
    frames[:, :, 20:60] //= 8  # most of the picture is dark, as in a game
    nn.init.orthogonal_(agent.actor.weight, 1.0)  # so that the actions differ
    for agent.precision in (torch.float32, torch.bfloat16):
        agent.zero_grad()
        logits, values = agent(frames)
        (-logits.log_softmax(-1)[:, 1] + values.square()).mean().backward()
        gradient = torch.cat([x.grad.flatten() for x in agent.parameters()])
        results.append((logits.detach(), values.detach(), gradient))
    return results


def test_outputs_and_gradients_in_bfloat16_are_given_in_float32(in_both_precisions):
    exact, rounded = in_both_precisions
    assert {x.dtype for x in rounded} == {torch.float32}
    assert not torch.equal(exact[0], rounded[0]), "but they were computed in bfloat16"


def test_the_gradient_in_bfloat16_points_where_it_points_in_float32(in_both_precisions):
    exact, rounded = (gradient for _, _, gradient in in_both_precisions)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.999
    torch.testing.assert_close(rounded.norm(), exact.norm(), rtol=0.02, atol=0)


def test_policy_and_values_in_bfloat16_are_close_to_those_in_float32(in_both_precisions):
    exact, rounded = in_both_precisions
    assert exact[0].softmax(-1).std() > 0.02, "not all actions are alike"
    torch.testing.assert_close(rounded[0].softmax(-1), exact[0].softmax(-1), rtol=0, atol=0.02)
    torch.testing.assert_close(rounded[1], exact[1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("name", "features", "wanted"),
    [
        ("AMD EPYC", {"avx512_bf16": True}, torch.bfloat16),
        ("AMD EPYC", {"avx512_bf16": False}, torch.float32),
        ("Intel Xeon", {"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ("Intel Xeon", {"avx512_bf16": True, "amx_bf16": False}, torch.float32),
    ],
)
def test_auto_is_bfloat16_only_where_it_is_fast(name, features, wanted, monkeypatch):
    processor = {"cpu_name": name, **features}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert script.pick_precision("auto", CPU) == wanted
    assert script.pick_precision("float32", CPU) == torch.float32
    assert script.pick_precision("bfloat16", CPU) == torch.bfloat16


def test_a_run_sets_the_precision_and_patience_of_its_agent(new_agent):
    config = script.Config(precision="bfloat16", patience=9.0, device="cpu")
    agent = script.make_state(config, copy.deepcopy(new_agent)).agent
    assert (agent.precision, agent.patience) == (torch.bfloat16, 9.0)


# ---- The policy ----


class FixedAgent(script.Agent):
    """Has the same policy for all frames."""

    def __init__(self, probs, patience=0.0):
        nn.Module.__init__(self)
        self.actor = nn.Linear(1, 1)  # tells the device
        self.logits, self.patience = torch.tensor(probs).log() + 3, patience

    def forward(self, frames):
        return self.logits.expand(len(frames), -1), torch.zeros(len(frames))


def decide(agent, idle, greedy=False, seed=0):
    frames, generator = torch.zeros(len(idle), 1), torch.Generator().manual_seed(seed)
    return agent.act(frames, np.array(idle), generator, greedy)


def test_actions_are_sampled_with_their_probabilities():
    actions = decide(FixedAgent([0.5, 0.3, 0.2]), np.zeros(20_000, int))["actions"]
    shares = torch.bincount(actions) / len(actions)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)


def test_predict_samples_the_action_for_one_observation():
    class ShapedAgent(FixedAgent):
        def forward(self, frames):
            assert frames.shape == (1, 4, 84, 84) and frames.dtype == torch.uint8
            return super().forward(frames)

    torch.manual_seed(0)
    agent, obs = ShapedAgent([0.9, 0.0, 0.1]), np.zeros((4, 84, 84), np.uint8)
    actions = [agent.predict(obs) for _ in range(500)]
    assert all(type(action) is int for action in actions) and set(actions) == {0, 2}
    assert 20 < actions.count(2) < 90


def test_a_greedy_agent_takes_the_most_probable_action():
    actions = decide(FixedAgent([0.3, 0.36, 0.34]), np.zeros(100, int), greedy=True)["actions"]
    assert set(actions.tolist()) == {1}


def test_the_same_state_of_the_generator_gives_the_same_actions():
    agent, idle = FixedAgent([0.5, 0.3, 0.2]), np.zeros(50, int)
    first, again, other = (decide(agent, idle, seed=seed)["actions"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("patience", "wanted"), [(100, [1, 1, 1, 1.5, 4]), (0, [1] * 5)])
def test_the_temperature_is_idle_steps_over_patience_beyond_it(patience, wanted):
    decision = decide(FixedAgent([0.5, 0.5], patience), [0, 99, 100, 150, 400])
    torch.testing.assert_close(decision["temperatures"], torch.tensor(wanted).float())


def test_actions_and_log_probs_are_those_of_the_policy_at_its_temperature():
    decision = decide(FixedAgent([0.9, 0.09, 0.01], patience=10.0), np.full(20_000, 20))
    probs = torch.tensor([0.9, 0.09, 0.01]).sqrt()
    probs /= probs.sum()
    shares = torch.bincount(decision["actions"]) / 20_000
    torch.testing.assert_close(shares, probs, atol=0.02, rtol=0)
    torch.testing.assert_close(decision["log_probs"], probs.log()[decision["actions"]])


def test_each_game_has_its_own_temperature():
    decision = decide(FixedAgent([0.9, 0.1], patience=10.0), [0, 20], greedy=True)
    hot = 0.9**0.5 / (0.9**0.5 + 0.1**0.5)
    torch.testing.assert_close(decision["log_probs"].exp(), torch.tensor([0.9, hot]))


def test_values_and_log_probs_of_a_decision_are_those_of_the_network(new_agent):
    frames = random_frames(3)
    logits, values = new_agent(frames)
    decision = new_agent.act(frames, np.zeros(3, int), torch.Generator())
    wanted = logits.log_softmax(-1)[torch.arange(3), decision["actions"]]
    torch.testing.assert_close(decision["log_probs"], wanted)
    torch.testing.assert_close(decision["values"], values)
