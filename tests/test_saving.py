"""Model files, checkpoints and --resume: what was learned is never lost, damaged or mixed up."""

import contextlib
import io
import math
import os
import pickle
import random
import re
import shutil
import signal
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import SKIING, TINY, before_rollouts, only, points, start

import ai_breakout_game as script

RUN = (*TINY, *SKIING, "--seed=3", "--total-timesteps=24")  # three updates, eight games


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_weights(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes(), name


def mistake(capsys, *args):
    """The one line that the command line `args` gets, with code 2."""
    capsys.readouterr()
    assert script.main(list(args)) == 2
    output, errors = capsys.readouterr()
    assert "Traceback" not in errors and errors.count("\n") == 1 and len(errors) < 400
    return output + errors


@pytest.fixture(scope="module")
def agent():
    return script.make_state(script.Config(seed=5)).agent


def torch_file(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


# ---- Model files ---------------------------------------------------------------------------------


def test_weights_and_settings_come_back_bit_for_bit(here, agent):
    weights = {name: x.clone() for name, x in agent.state_dict().items()}
    weights["actor.bias"] = torch.tensor([0.1, -0.0, 1e-45, 3e38])
    settings = {"env_id": "ALE/Breakout-v5", "sticky_actions": 0.25, "max_frames": 99}
    about = {"patience": 7.5, "steps": 3000, "mean_return": 1.25}
    script.save_file({"weights": weights, **settings, **about}, Path("x.mdl"))
    loaded = script.load_agent("x.mdl")
    assert_same_weights(loaded.state_dict(), weights)
    assert loaded.settings == {**settings, "patience": 7.5} and loaded.path == Path("x.mdl")
    assert (loaded.steps, loaded.mean_score) == (3000, 1.25)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_bare_state_dict_is_loaded_whatever_wrapped_the_network(here, agent, prefix):
    torch.save({prefix + name: x for name, x in agent.state_dict().items()}, "bare.pt")
    loaded = script.load_agent("bare.pt")
    assert_same_weights(loaded.state_dict(), agent.state_dict())
    assert loaded.settings == {"patience": 0.0}, "it has learned without patience"
    assert loaded.steps == 0 and math.isnan(loaded.mean_score), "both are unknown"


@pytest.mark.parametrize(("name", "value"), [("frame_skip", 4), ("frame_size", 84)])
def test_a_model_or_run_with_other_frames_is_refused(here, monkeypatch, capsys, name, value):
    assert script.main([*RUN]) == 0
    monkeypatch.setattr(script, "OBSERVATION", {name: 2})
    problem = f"trained with {name} = {value}"
    with pytest.raises(script.UserError, match=problem):
        script.load_agent(str(only(Path("models").iterdir())))
    assert script.main(["--resume=latest"]) == 2 and problem in capsys.readouterr().err


def test_unknown_keys_are_ignored(here, agent):
    strange = {0: torch.ones(1), "x.y": torch.ones(2)}
    torch.save({"weights": agent.state_dict() | strange, "colour": "blue"}, "x.mdl")
    assert_same_weights(script.load_agent("x.mdl").state_dict(), agent.state_dict())


def test_the_weights_of_a_checkpoint_can_be_played(finished):
    with contextlib.chdir(finished):
        run = only(Path("runs").iterdir())
        loaded = script.load_agent(str(run / "checkpoint.pt"))
        assert_same_weights(loaded.state_dict(), load(run / "last.mdl")["weights"])


@pytest.mark.parametrize("name", ["here", "here.mdl", "there", "there.mdl", "models/there.mdl"])
def test_a_model_is_found_by_its_name_here_and_in_models(here, agent, name):
    for path in (Path("here.mdl"), Path("models/there.mdl")):
        script.save_file({"weights": agent.state_dict()}, path)
    assert_same_weights(script.load_agent(name).state_dict(), agent.state_dict())


def test_a_tilde_is_the_home_folder(here, agent, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    script.save_file({"weights": agent.state_dict(), "patience": 9.0}, Path("home/mine.mdl"))
    assert script.main([*TINY, "--total-timesteps=8", "--model-filename=~/mine.mdl"]) == 0
    assert load("models/ai_breakout_game8.mdl")["patience"] == 9


def test_a_misspelt_name_gets_the_one_that_is_near(here, agent, capsys):
    script.save_file({"weights": agent.state_dict()}, Path("models/ai_breakout_game3000.mdl"))
    line = mistake(capsys, "--evaluate=1", "--model-filename=ai_breakout_gane3000.mdl")
    assert "there is no ai_breakout_gane3000.mdl" in line
    assert "ai_breakout_game3000.mdl" in line


class Attack:
    """A careless program that loads this runs code."""

    def __reduce__(self):
        return os.system, ("touch attacked",)


def archive_of(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return buffer.getvalue()


def damaged(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


FIRST = "network.0.weight"
STRANGE = {
    "empty": lambda weights: b"",
    "text": lambda weights: b"no model\n" * 99,
    "picture": lambda weights: b"GIF89a\xff" + bytes(99),
    "archive": lambda weights: archive_of(data=b"x"),
    "stable_baselines3": lambda weights: archive_of(data=b"{}", policy_pth=torch_file(weights)),
    "pickle": lambda weights: pickle.dumps(Attack()),
    "object": lambda weights: torch_file({"weights": Attack()}),
    "old_format": lambda weights: torch_file(Attack(), _use_new_zipfile_serialization=False),
    "flipped_bit": lambda weights: damaged(torch_file(weights)),
    "cut": lambda weights: torch_file(weights)[:-1000],
    "list": lambda weights: torch_file([1, 2]),
    "no_weights": lambda weights: torch_file({}),
    "text_as_weights": lambda weights: torch_file({"weights": "x"}),
    "missing_layer": lambda weights: torch_file({k: x for k, x in weights.items() if k != FIRST}),
    "wrong_shape": lambda weights: torch_file(weights | {FIRST: weights[FIRST][:, :3]}),
    "scalar": lambda weights: torch_file(weights | {FIRST: torch.tensor(1.0)}),
    "nan": lambda weights: torch_file(weights | {FIRST: weights[FIRST] * float("nan")}),
    "infinite": lambda weights: torch_file(weights | {"critic.bias": torch.tensor([torch.inf])}),
    "too_large": lambda weights: torch_file(weights | {FIRST: weights[FIRST].double() * 1e300}),
    "huge": lambda weights: torch_file(weights | {"actor.weight": torch.zeros(1).expand(2**40)}),
}
SAID = {
    "flipped_bit": "checksum", "text": "text file", "stable_baselines3": "stable-baselines3",
    "nan": "finite", "infinite": "finite", "wrong_shape": "shape", "missing_layer": FIRST,
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_a_file_that_is_no_model_gets_one_line_and_runs_no_code(here, capsys, agent, kind):
    Path("bad.mdl").write_bytes(STRANGE[kind](agent.state_dict()))
    line = mistake(capsys, "--evaluate=1", "--model-filename=bad.mdl")
    assert "bad.mdl" in line and SAID.get(kind, "bad.mdl") in line
    assert os.listdir() == ["bad.mdl"], "nothing was written, and no code in it was run"


def damage(rng, data):
    """`data` cut off, or with a bit flipped, or with a piece changed, added or removed."""
    place = rng.randrange(len(data))
    end = place + rng.randrange(1, 200)
    middles = [
        bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :],
        bytes(x ^ 85 for x in data[place:end]) + data[end:],
        rng.randbytes(end - place) + data[place:],
        data[end:],
        b"",
    ]
    return data[:place] + rng.choice(middles)


def fuzz(agent, count, seed):
    """Damaged files are refused, or have the weights that they had: some bytes are only padding."""
    rng = random.Random(seed)
    whole = torch_file({"weights": agent.state_dict()})
    small = torch_file({"weights": {"actor.weight": torch.zeros(4, 512)}})  # mostly not tensors
    for number in range(count):
        Path("bad.mdl").write_bytes(damage(rng, whole if number % 2 else small))
        try:
            loaded = script.load_agent("bad.mdl")
        except script.UserError as error:
            assert "bad.mdl" in str(error)
        else:
            assert number % 2, "not even half of the weights are there"
            assert_same_weights(loaded.state_dict(), agent.state_dict())


def test_sixty_damaged_files_never_give_wrong_weights(here, agent):
    fuzz(agent, 60, seed=0)


@pytest.mark.slow
def test_a_thousand_damaged_files_never_give_wrong_weights(here, agent):
    fuzz(agent, 1000, seed=1)


@pytest.mark.parametrize("about", [{"steps": "many"}, {"mean_return": None}, {"steps": [1]}])
def test_strange_numbers_in_a_model_are_no_bug_of_the_program(here, agent, about):
    torch.save({"weights": agent.state_dict(), **about}, "x.mdl")
    with contextlib.suppress(script.UserError):
        assert_same_weights(script.load_agent("x.mdl").state_dict(), agent.state_dict())


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file_and_no_draft(here, monkeypatch, error):
    script.save_file({"a": 1}, Path("x.mdl"))
    monkeypatch.setattr(os, "replace", Mock(side_effect=error))
    with pytest.raises(type(error)):
        script.save_file({"a": 2}, Path("x.mdl"))
    assert load("x.mdl") == {"a": 1} and os.listdir() == ["x.mdl"]


# ---- Resume --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run. Tests do not change it."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder):
        assert script.main([*RUN]) == 0
    return folder


@pytest.fixture
def run(finished, here):
    """The folder of a finished run, in a copy that the test may change, and works in."""
    shutil.copytree(finished, here, dirs_exist_ok=True)
    return only(Path("runs").iterdir())


def seed_of(capsys, name):
    """The seed of the run that --resume=`name` finds: another one is refused."""
    return int(re.search(r"seed=(\d+)", mistake(capsys, f"--resume={name}", "--seed=99"))[1])


@pytest.mark.parametrize("form", ["latest", "{0.name}", "{0}", "{0}/", "{0}/checkpoint.pt"])
def test_a_run_can_be_named_in_several_ways(finished, capsys, form):
    with contextlib.chdir(finished):
        run = only(Path("runs").iterdir())
        assert seed_of(capsys, form.format(run)) == seed_of(capsys, run.absolute()) == 3


def test_latest_is_the_run_that_was_saved_last(run, capsys):
    other = run.with_name("z") / "checkpoint.pt"
    other.parent.mkdir()
    other.write_bytes(with_config((run / "checkpoint.pt").read_bytes(), seed=4))
    (run.parent / "without-a-checkpoint").mkdir()
    for time, seed in ((1e9, 3), (4e9, 4)):
        os.utime(other, (time, time))
        assert seed_of(capsys, "latest") == seed


@pytest.mark.parametrize("name", ["latest", "nothing", "runs", "x" * 5000, "a\0b"])
def test_a_run_that_is_not_there_gets_one_line(here, capsys, name):
    Path("runs").mkdir()
    assert "there is no" in mistake(capsys, f"--resume={name}")
    assert os.listdir() == ["runs"] and os.listdir("runs") == []


def test_a_resumed_run_continues_its_curves_and_its_schedule(run):
    assert script.main(["--resume=latest", "--total-timesteps=48"]) == 0
    assert os.listdir("runs") == [run.name]
    steps, rates = points(run, "charts/learning_rate")
    assert steps == [8, 16, 24, 32, 40, 48]
    expected = [(1 - i / 3) for i in range(3)] + [(1 - i / 6) for i in range(3, 6)]
    assert rates == pytest.approx([script.Config.learning_rate * x for x in expected])
    games = load(run / "checkpoint.pt")["num_games"]
    assert len(points(run, "charts/episodic_return")[0]) == games > 12


def test_points_after_the_last_checkpoint_are_replaced(here, monkeypatch):
    with monkeypatch.context() as patch:
        before_rollouts(patch, {3: Mock(side_effect=KeyboardInterrupt)})
        assert script.main([*RUN]) == 130
    run = only(Path("runs").iterdir())
    assert load(run / "checkpoint.pt")["global_step"] == 0
    assert points(run, "losses/entropy")[0] == [8, 16]
    assert script.main(["--resume=latest"]) == 0
    assert points(run, "losses/entropy")[0] == [8, 16, 24]


def given_rollout(state, games, rollout):
    """In place of `collect_rollout`: steps and 45 games that depend on the step number only. Mean
    scores fall.
    """
    generator = torch.Generator().manual_seed(state.global_step)
    for x in rollout.values():
        noise = torch.rand(x.shape, generator=generator)
        x.copy_(noise + 1 if x.is_floating_point() else noise * (255 if x.ndim > 2 else 2))
    torch.rand(5, generator=state.generator)
    state.global_step += rollout["actions"].numel()
    scores = (torch.rand(45, generator=generator) * 99 - state.global_step).tolist()
    state.num_games += 45
    state.scores.extend(scores)
    return [script.FinishedGame(0, score, 1) for score in scores]


def test_a_run_that_was_stopped_ends_like_one_that_was_not(here, monkeypatch):
    """Weights, moments of the optimizer, random numbers, best mean and scores, bit for bit; resumed
    in another process after 180 of 270 games, when the mean score is not the best any more.
    """
    flags = (*TINY, "--num-minibatches=2", "--update-epochs=2", "--total-timesteps=48")
    monkeypatch.setattr(script, "collect_rollout", given_rollout)
    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", 0)
    for folder in ("whole", "stopped"):
        Path(folder).mkdir()
        with contextlib.chdir(folder):
            stop = {4: lambda: signal.raise_signal(signal.SIGTERM)}
            before_rollouts(monkeypatch, stop if folder == "stopped" else {})
            assert script.main([*flags]) == 0
    whole, stopped = (only(Path(x, "runs").iterdir()) for x in ("whole", "stopped"))
    assert load(stopped / "checkpoint.pt")["num_games"] == 180
    patch = "import test_saving; script.collect_rollout = test_saving.given_rollout"
    patch += "; script.CHECKPOINT_SECONDS = 0"
    process = start("--resume=latest", cwd="stopped", before=patch)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output

    wanted, got = load(whole / "checkpoint.pt"), load(stopped / "checkpoint.pt")
    assert_same_weights(got["weights"], wanted["weights"])
    for number, moments in wanted["optimizer"]["state"].items():
        assert_same_weights(got["optimizer"]["state"][number], moments)
    assert torch.equal(got["generator"], wanted["generator"])
    for name in ("update", "global_step", "num_games", "best_mean", "scores", "mean_return"):
        assert got[name] == wanted[name], name
    assert got["num_games"] == 270 and len(got["scores"]) == 100
    assert load(whole / "best.mdl")["steps"] == load(stopped / "best.mdl")["steps"] == 24


def test_games_after_a_resume_are_not_those_of_the_start(here, monkeypatch):
    frames, collect = [], script.collect_rollout

    def keep(state, games, rollout):
        finished = collect(state, games, rollout)
        frames.append(rollout["frames"][0].clone())
        return finished

    monkeypatch.setattr(script, "collect_rollout", keep)
    assert script.main([*TINY, "--total-timesteps=8"]) == 0
    assert script.main(["--resume=latest", "--total-timesteps=16"]) == 0
    assert len(frames) == 2 and not torch.equal(*frames)


def test_a_run_from_before_a_flag_existed_has_its_default(run, capsys):
    content = load(run / "checkpoint.pt")
    del content["config"]["ent_coef"]
    script.save_file(content, run / "checkpoint.pt")
    assert "a resumed run has ent_coef=0.003" in mistake(capsys, "--resume=latest", "--ent-coef=1")
    assert script.main(["--resume=latest"]) == 0


def test_a_resume_with_nothing_left_saves_the_weights_again(run, capsys):
    before = load("models/ai_skiing_game24.mdl")
    shutil.rmtree("models")
    (run / "last.mdl").unlink()
    assert script.main(["--resume=latest"]) == 0
    assert "Trained 24 steps" in capsys.readouterr().out
    for path in (Path("models/ai_skiing_game24.mdl"), run / "last.mdl"):
        assert_same_weights(load(path)["weights"], before["weights"])


@pytest.mark.parametrize(
    "flag",
    [
        "--num-envs=2", "--num-steps=16", "--gamma=0.98", "--seed=4", "--multithreading=no",
        "--env-id=ALE/Pong-v5", "--sticky-actions=0.5", "--patience=3", "--max-frames=100",
        "--model-filename=x.mdl", "--total-timesteps=23", "--run", "--evaluate=3", "--greedy",
    ],
)  # fmt: skip
def test_a_flag_that_would_make_it_another_run_is_refused(finished, capsys, flag):
    with contextlib.chdir(finished):
        before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
        line = mistake(capsys, "--resume=latest", flag)
        assert flag.split("=")[0].strip("-").replace("-", "_") in line.replace("-", "_")
        assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_the_same_flags_may_be_given_again(run, capsys):
    assert script.main([*RUN, "--resume=latest"]) == 0
    assert "Trained 24 steps" in capsys.readouterr().out


DAMAGES = {
    "flipped_bit": damaged,
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "text": lambda data: b"text",
    "model": lambda data: Path("models/ai_skiing_game24.mdl").read_bytes(),
    "list": lambda data: torch_file([1]),
    "object": lambda data: torch_file({"config": Attack()}),
    "unknown_flag": lambda data: with_config(data, surprise=1),
    "no_number": lambda data: with_config(data, num_envs="many"),
    "other_network": lambda data: with_config(data, env_id="ALE/Pong-v5"),
    "optimizer": lambda data: torch_file(load(io.BytesIO(data)) | {"optimizer": 3}),
}


def with_config(data, **changes):
    content = load(io.BytesIO(data))
    return torch_file(content | {"config": content["config"] | changes})


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_checkpoint_that_is_none_gets_one_line(run, capsys, kind):
    path = run / "checkpoint.pt"
    data = DAMAGES[kind](path.read_bytes())
    path.write_bytes(data)
    before = sorted(Path().rglob("*"))
    assert f"{path}" in mistake(capsys, "--resume=latest")
    assert sorted(Path().rglob("*")) == before and path.read_bytes() == data
