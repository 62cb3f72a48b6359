"""The agent that ships: what its card says is what was measured."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, curves, run_script

import ai_breakout_game as script

MODEL = ROOT / "models" / "ai_breakout_game.mdl"
RUN = ROOT / "models" / "champion"
CARD = (ROOT / "models" / "README.md").read_text()
REPORT, SECOND = (
    json.loads((RUN / name).read_text()) for name in ("evaluation.json", "evaluation_1001.json")
)
HUMAN = 31.8


def test_it_is_found_from_any_folder_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = []
    monkeypatch.setattr(script, "record", lambda config, agent: paths.append(agent.path))
    assert script.main(["--record=a.gif"]) == 0
    assert paths == [MODEL]


def test_its_files_are_small():
    assert MODEL.stat().st_size <= 7e6
    assert all(path.stat().st_size <= 3e6 for path in (ROOT / "models").glob("*.gif"))
    assert sum(path.stat().st_size for path in RUN.iterdir()) <= 5e6


@pytest.mark.parametrize("report", [REPORT, SECOND])
def test_the_card_says_what_was_measured(report):
    assert len(report["scores"]) == 100 and not report["greedy"] and report["model"] == MODEL.name
    assert report["mean"] == pytest.approx(sum(report["scores"]) / 100)
    assert f"{report['mean']:.1f} ± {report['interval_95']:.1f}" in CARD


def test_card_and_readme_say_what_both_evaluations_measured():
    scores = REPORT["scores"] + SECOND["scores"]
    mean, interval = sum(scores) / 200, script.confidence_interval(scores)
    for text in (CARD, (ROOT / "README.md").read_text()):
        said = re.search(rf"\D{mean:.1f} ± (\d+\.\d)", text)
        assert float(said[1]) == pytest.approx(interval, abs=0.2)


def test_its_curve_ends_at_its_steps_with_its_score():
    steps = int(re.search(r"\| steps \| ([\d,]+)", CARD)[1].replace(",", ""))
    last = curves(RUN).Scalars("charts/mean_return_100")[-1]
    assert steps - 40_000 < last.step <= steps, "a game ended every 13,500 steps at last"
    assert last.value == pytest.approx(script.read_file(MODEL)["mean_return"])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_its_score_comes_out_again(tmp_path):
    """Other games than those of the card: the two means differ by chance alone."""
    shutil.copy(MODEL, tmp_path / "again.mdl")
    args = ("--evaluate=8", "--seed=1000", "--model-filename=again.mdl")
    done = run_script(*args, cwd=tmp_path, timeout=2900, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again.mdl.evaluations.jsonl").read_text())
    standard_error = np.std(REPORT["scores"]) / len(again["scores"]) ** 0.5
    assert abs(again["mean"] - REPORT["mean"]) < 3 * standard_error
    assert again["mean"] > HUMAN
