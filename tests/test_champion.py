"""The agent that ships: it is what its model card says, and no larger than promised."""

import json
import re
import shutil

import pytest
from conftest import ROOT, curves, run_script

import ai_breakout_game as script

MODEL = ROOT / "models" / "ai_breakout_game.mdl"
CARD = (ROOT / "models" / "README.md").read_text()
REPORT = json.loads((ROOT / "runs" / "champion" / "evaluation.json").read_text())
HUMAN = 31.8


def test_it_is_found_from_any_folder_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    agent, about = script.load_player(script.Config(run=True), script.Game("breakout"))[0:2]
    assert about == MODEL and agent.actor.out_features == 4


def test_its_files_are_small():
    assert MODEL.stat().st_size <= 7e6
    assert (ROOT / "models" / "breakout.gif").stat().st_size <= 3e6
    run = ROOT / "runs" / "champion"
    assert sum(path.stat().st_size for path in run.iterdir()) <= 5e6


def test_the_card_says_what_was_measured():
    assert REPORT["episodes"] == 100 and not REPORT["greedy"] and REPORT["model"] == MODEL.name
    interval = f"{REPORT['mean']:.1f} ± {REPORT['interval_95']:.1f}"
    assert interval in CARD and interval in (ROOT / "README.md").read_text()


def test_its_curve_is_that_of_its_steps():
    steps = int(re.search(r"\| steps \| ([\d,]+)", CARD)[1].replace(",", ""))
    last = curves(ROOT / "runs" / "champion").Scalars("charts/mean_return_100")[-1]
    assert steps - 40_000 < last.step <= steps, "a game ended every 13,500 steps at last"
    assert last.value == pytest.approx(script.read_file(MODEL, "model")["mean_return"])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_its_score_comes_out_again(tmp_path):
    """Other games than those of the card: the two means differ by chance alone."""
    shutil.copy(MODEL, tmp_path / "again.mdl")
    words = ("--evaluate=16", "--seed=1000", "--model-filename=again.mdl")
    done = run_script(*words, cwd=tmp_path, timeout=2900)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again.evaluation.json").read_text())
    bound = (2 * REPORT["interval_95"] ** 2 + 2 * again["interval_95"] ** 2) ** 0.5  # 2.8 sigma
    assert abs(again["mean"] - REPORT["mean"]) < bound
    assert again["mean"] > HUMAN
    assert re.search(r"mean +[\d.]+", done.stdout)
