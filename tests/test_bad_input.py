"""Thousands of mistyped command lines and damaged files: one line each, code 2, nothing written."""

import io
import os
import pickle
import random
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import only, run_script

import ai_breakout_game as script


def mistake(capsys, *args, silent=True):
    """The line that `args` get."""
    before = sorted(Path().rglob("*"))
    code = script.main(list(args))
    output, errors = capsys.readouterr()
    assert code == 2, (args, output, errors)
    assert output == "" or not silent, (args, output, errors)
    assert errors.count("\n") == 1 and len(errors) < 400, (args, output, errors)
    assert "Traceback" not in errors and errors.endswith("\n") and len(errors) > 30, args
    assert sorted(Path().rglob("*")) == before, args
    return errors


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty one, and we are in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------- command lines

FLAGS = [action.option_strings[0] for action in script.build_parser()._actions][1:]
FINE = [
    "--run", "--evaluate=3", "--num-envs=4", "--seed=7", "--greedy=no", "--gamma=0.9",
    "--env-id=ALE/Pong-v5", "--learning-rate=1e-3", "--panel", "--device=cpu", "--seconds=2",
]  # fmt: skip
JUNK = [
    "",
    "-1",
    "1e400",
    "nan",
    "-inf",
    "x",
    "8 8",
    "0x10",
    "½",
    "१",
    "9" * 400,
    "'",
    "\n",
    "--",
    "{}",
]


def any_text(rng, length):
    letters = "abc-=/.\\ \t\n0189%{}~é漢\x00\x1b\U0001f600"
    return "".join(rng.choice(letters) for _ in range(rng.randrange(1, length)))


def bad_word(rng):
    """A word that cannot be right, wherever it stands."""
    kind = rng.randrange(7)
    if kind == 0:
        return "--" + any_text(rng, 12).lstrip("-") + "?"  # no such flag
    if kind == 1:
        return rng.choice(FLAGS[1:])[:-1] + "=1"  # misspelt
    if kind == 2:
        numbers = ("num-envs", "num-steps", "gamma", "clip-coef", "total-timesteps", "seed")
        return f"--{rng.choice(numbers)}={rng.choice(['x', '-1', 'nan', '-inf', '1e400', '½', ''])}"
    if kind == 3:
        return f"--{rng.choice(['run', 'panel', 'greedy', 'norm-adv'])}={rng.choice(JUNK[1:])}"
    if kind == 4:
        return f"--env-id={any_text(rng, 30)}?"
    if kind == 5:
        return f"--resume={any_text(rng, 300)}?"
    return any_text(rng, 20).lstrip("-") + "?"  # an argument without a flag


def fuzz_command_lines(capsys, count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        bad, fine = bad_word(rng), rng.sample(FINE, rng.randrange(4))
        words = [bad, *(word for word in fine if word.split("=")[0] != bad.split("=")[0])]
        rng.shuffle(words)
        mistake(capsys, *words)


def test_a_drive_that_is_not_there_gets_one_line(folder, capsys, monkeypatch):
    """Windows' Z:\\ is its own parent, and need not exist."""
    monkeypatch.setattr(script.os.path, "lexists", lambda path: False)
    monkeypatch.setattr(script.Path, "is_dir", lambda path: False)
    with pytest.raises(script.UserError, match="cannot write to"):
        script.check_writable(Path("films"))


def test_hundreds_of_bad_command_lines_get_one_line_each(folder, capsys):
    fuzz_command_lines(capsys, 300, seed=0)


@pytest.mark.slow
def test_thousands_of_bad_command_lines_get_one_line_each(folder, capsys):
    fuzz_command_lines(capsys, 4000, seed=1)


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_told_apart_from_junk(folder, capsys, flag):
    for junk in JUNK:
        takes_text = flag in ("--model-filename", "--env-id", "--device", "--record", "--resume")
        started = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("train", "play", "record", "evaluate"):
                patch.setattr(script, name, lambda *args, log=started: log.append(args))
            code = script.main([f"{flag}={junk}"])
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        assert (code == 0 and errors == "") or (code == 2 and errors.count("\n") == 1)
        assert started or code == 2
        assert takes_text or code == 2 or junk in ("", "१", "0x10", "9" * 400, "-1"), (flag, junk)


# ------------------------------------------------------------------------------------------- files


class Attack:
    """Unpickled by a careless program, it runs code."""

    def __reduce__(self):
        return os.system, ("touch attacked",)


def damage(rng, data):
    """`data`, not as it was."""
    kind, data = rng.randrange(5), bytearray(data)
    if kind == 0:  # one bit
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # cut off
        del data[rng.randrange(len(data)) :]
    elif kind == 2:  # a stretch of noise
        place, length = rng.randrange(len(data)), rng.randrange(1, 100)
        noise = bytes(x ^ rng.randrange(1, 256) for x in data[place : place + length])
        data[place : place + length] = noise
    elif kind == 3:  # something too much
        data += rng.randbytes(rng.randrange(1, 50))
    else:  # a piece is missing
        place = rng.randrange(len(data) - 1)
        del data[place : place + rng.randrange(1, 200)]
    return bytes(data)


def bomb():
    """100 kB that unpack to 100 MB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    return file.getvalue()


def overlapping_bomb():
    """One stretch of the file, listed a thousand times, not packed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data/0", bytes(10**6))
        first = archive.infolist()[0]
        for number in range(1000):
            entry = zipfile.ZipInfo(f"archive/data/{number}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(entry, name, getattr(first, name))
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
    return file.getvalue()


def torch_file(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def huge_tensor():
    """A few bytes, shown as 4 TB."""
    return torch.zeros(1).expand(2**40)


def strange_files(agent):
    weights = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    first = "network.0.weight"
    return {
        "empty": b"", "text": b"no model\n" * 99, "zeros": bytes(10**5),
        "gif": b"GIF89a" + bytes(99),
        "bomb": bomb(), "overlapping bomb": overlapping_bomb(), "attack": pickle.dumps(Attack()),
        "attack in torch": torch_file({"weights": Attack()}),
        "attack, old format": torch_file(Attack(), _use_new_zipfile_serialization=False),
        "pickle": pickle.dumps({"weights": {}}), "deep": b"\x80\x02" + b"]" * 10**5 + b".",
        "deep in torch": torch_file(nested_list(200)),
        "list": torch_file([1, 2]), "number": torch_file(7), "text in torch": torch_file("x"),
        "tensor": torch_file(torch.zeros(3)), "nothing": torch_file({}),
        "weights of text": torch_file({"weights": "x"}),
        "keys are numbers": torch_file({1: torch.zeros(2)}),
        "nan": torch_file(weights | {first: weights[first] * float("nan")}),
        "float8": torch_file(weights | {first: weights[first].to(torch.float8_e4m3fn)}),
        "infinite": torch_file(weights | {"critic.bias": torch.tensor([float("inf")])}),
        "too large": torch_file(weights | {"actor.weight": torch.full((4, 512), 3e38)}),
        "too large as float32": torch_file(weights | {first: weights[first].double() * 1e300}),
        "nested": torch_file(weights | {first: torch.nested.nested_tensor([weights[first]])}),
        "huge": torch_file(weights | {"actor.weight": huge_tensor()}),
        "sparse": torch_file(weights | {first: weights[first].to_sparse()}),
        "no device": torch_file(weights | {first: weights[first].to("meta")}),
        "complex": torch_file(weights | {first: weights[first].to(torch.complex64) * 1j}),
        "scalar": torch_file(weights | {first: torch.tensor(1.0)}),
        "other game": torch_file({"weights": weights, "game": ["a", "list"]}),
    }  # fmt: skip


def nested_list(depth):
    nested = []
    for _ in range(depth):
        nested = [nested]
    return nested


@pytest.fixture(scope="module")
def agent():
    torch.manual_seed(0)
    return script.Agent(4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    place = tmp_path_factory.mktemp("run")
    quick = ("--num-envs=1", "--num-steps=8", "--num-minibatches=1", "--total-timesteps=16")
    assert run_script(*quick, cwd=place).returncode == 0
    return only((place / "runs").iterdir())


def test_strange_files_are_no_models(folder, capsys, agent):
    for name, data in strange_files(agent).items():
        Path("bad.mdl").write_bytes(data)
        for mode in ("--evaluate=1", "--record=x.gif", "--total-timesteps=1"):
            line = mistake(capsys, mode, "--model-filename=bad.mdl")
            assert "bad.mdl" in line, (name, line)
    assert not Path("attacked").exists()


def test_names_that_are_not_the_networks_are_let_be(folder, agent):
    Path("good.mdl").write_bytes(
        torch_file(agent.state_dict() | {0: torch.zeros(1), "x.y": torch.ones(2)})
    )
    assert script.main(["--record=x.gif", "--seconds=0.1", "--model-filename=good.mdl"]) == 0


def test_strange_files_are_no_checkpoints(folder, capsys, agent):
    Path("runs/x").mkdir(parents=True)
    for name, data in strange_files(agent).items():
        Path("runs/x/checkpoint.pt").write_bytes(data)
        line = mistake(capsys, "--resume=runs/x")
        assert "checkpoint.pt is not a checkpoint" in line, (name, line)
    assert not Path("attacked").exists()


def test_a_checkpoint_of_strange_content_is_refused_although_its_checksum_is_right(
    folder, capsys, run
):
    content = script.read_file(run / "checkpoint.pt", "checkpoint")
    Path("runs/x").mkdir(parents=True)
    changes = [
        {"config": 7}, {"config": {}}, {"config": content["config"] | {"num_envs": "many"}},
        {"config": content["config"] | {"surprise": 1}}, {"weights": {}}, {"optimizer": 3},
        {"config": content["config"] | {"num_envs": -3}}, {"generator": "x"},
        {"replay": {}}, {"replay": content["replay"] | {"actions": torch.full((9, 1), 77)}},
        {"replay": content["replay"] | {"seeds": "x"}}, {"update": "x"}, {"scores": 5},
    ]  # fmt: skip
    for change in changes:
        script.save_file(content | change, Path("runs/x/checkpoint.pt"))
        for flags in ([], ["--total-timesteps=16"]):
            line = mistake(capsys, "--resume=runs/x", *flags, silent="replay" not in change)
            assert "runs/x" in line or "--num-envs" in line, (change, line)


def fuzz_files(capsys, count, seed, agent, run):
    """Damage a model in the ways of `damage`, by turns sealed or bare, and a checkpoint."""
    rng = random.Random(seed)
    script.save_file({"weights": agent.state_dict(), "game": "breakout"}, Path("whole.mdl"))
    whole, bare = Path("whole.mdl").read_bytes(), torch_file({"small": torch.zeros(9)})
    checkpoint = (run / "checkpoint.pt").read_bytes()
    Path("runs/x").mkdir(parents=True)
    for number in range(count):
        if number % 10 == 0:  # 20 MB
            Path("runs/x/checkpoint.pt").write_bytes(damage(rng, checkpoint))
            mistake(capsys, "--resume=runs/x")
        Path("bad.mdl").write_bytes(damage(rng, whole if number % 10 else bare))
        mistake(capsys, "--evaluate=1", "--model-filename=bad.mdl")


def test_a_hundred_damaged_files_get_one_line_each(folder, capsys, agent, run):
    fuzz_files(capsys, 100, 0, agent, run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_damaged_files_get_one_line_each_and_no_memory(folder, capsys, agent, run):
    fuzz_files(capsys, 100, 1, agent, run)
    shutil.rmtree("runs")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz_files(capsys, 3000, 2, agent, run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000  # kB


def test_a_bomb_takes_no_memory(folder, capsys, agent):
    mistake(capsys, "--evaluate=1", "--model-filename=nothing.mdl")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("bomb", "overlapping bomb"):
        Path("bad.mdl").write_bytes(strange_files(agent)[name])
        mistake(capsys, "--evaluate=1", "--model-filename=bad.mdl")
    with open("bad.mdl", "wb") as file:
        file.truncate(2**40)  # a terabyte that takes no room on the disk
    mistake(capsys, "--evaluate=1", "--model-filename=bad.mdl")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 50_000  # kB


def test_a_batch_that_memory_cannot_hold_gets_one_line(folder, capsys):
    errors = mistake(capsys, "--num-steps=65536", "--num-envs=1024")
    assert "GB has no room in memory" in errors
