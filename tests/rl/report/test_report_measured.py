"""Evaluations and analyses that lie in a run folder are part of its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.report_runs import HOSTILE, write_run

from coupled.rl.evaluation.analyze import default_out
from coupled.rl.report import write_report

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def write_score(run: Path, benchmark: str = "humaneval+", **changed: Any) -> Path:
    """As `coupled eval` leaves it."""
    folder = run / "evaluations" / "step_000003" / "T0-n1-steps6-seed0" / benchmark
    folder.mkdir(parents=True)
    score = {
        "benchmark": benchmark,
        "scores": {benchmark: {"pass@1": interval(0.25)}, "humaneval": {"pass@1": interval(0.5)}},
        "num_problems": 160,
        "of_problems": 164,
        "num_unjudged": 2,
        "num_weak_verdicts": 0,
        "checkpoint": f"{run}/checkpoints/step_000003",
        "temperature": 0.0,
        "denoising_steps": 6,
        "num_samples": 1,
    }
    (folder / "score.json").write_text(json.dumps(score | changed))
    return folder / "score.json"


def point(temperature: float, steps: int) -> dict[str, Any]:
    rates = {name: interval(0.4) for name in ("pass@1", "pass@2", "local@1", "global@1", "local@2", "global@2")}
    return {"temperature": temperature, "denoising_steps": steps, "num_samples": 2, **rates}


def write_analysis(run: Path) -> Path:
    """As `coupled analyze` leaves it."""
    settings = [(0.0, 6), (0.5, 6), (1.0, 6), (0.0, 3), (1.0, 3)]
    checkpoint = {
        "name": "run/step_000003",
        "points": [point(*each) for each in settings],
        "entropy_sink": [0.9, None, 0.1],
        "confidence": [[0.9, 0.5], [None, 0.1]],
        "commit": [[1.0, 0.0], [0.0, 1.0]],
    }
    claim = {"text": f"temperature lowers AR-ness {HOSTILE}", "expected": "below 0", "shows": "cannot tell"}
    result = {
        "problems": "held-out",
        "num_problems": 8,
        "canvas": 6,
        "denoising_steps": 6,
        "temperature": 1.0,
        "order": "entropy",
        "sweep": {"num_samples": 2},
        "checkpoints": [checkpoint],
        "claims": [claim | {"difference": interval(-0.05)}],
    }
    (run / "analysis").mkdir()
    path = run / "analysis" / "analysis.json"
    path.write_text(json.dumps(result))
    return path


def page_of(*runs: Path) -> str:
    return write_report(*runs, out=runs[0] / "report.html").read_text()


def test_scores_of_benchmarks_are_in_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert 'id="benchmarks"' not in page_of(run)
    write_score(run)
    weak = {"num_weak_verdicts": 3, "num_unjudged": 0, "scores": {"b": {"pass@1": interval(0.125)}}}
    write_score(run, "bigcodebench-hard", **weak)
    page = page_of(run)
    assert 'href="#benchmarks"' in page
    for text in ("humaneval+", "25.0 [15.0, 35.0]", "50.0 [40.0, 60.0]", "160 of 164, 2 not judged"):
        assert text in page
    assert "12.5 [2.5, 22.5]</td><td>160 of 164, weak verdicts</td><td>T 0, 6 steps, 1 per problem" in page


def test_an_analysis_is_in_the_report_with_its_pictures(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other")
    assert 'id="analysis"' not in page_of(run)
    write_analysis(run)
    page = page_of(run)
    assert page.count('<img class="picture" src="data:image/svg+xml;base64,') == 2
    assert "-5.0 [-15.0, 5.0]" in page
    assert "cannot tell" in page
    assert "window.hacked = 1</script>" not in page.partition('<script type="application/json"')[0]
    both = page_of(run, other)
    assert both.count('<img class="picture"') == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"scores": 3}'])
def test_what_cannot_be_read_is_said_and_loses_nothing_else(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run")
    write_score(run)
    write_score(run, "mbpp+").write_text(text)
    write_analysis(run).write_text(text)
    page = page_of(run)
    assert "25.0 [15.0, 35.0]" in page
    assert "cannot be read: evaluations/step_000003/T0-n1-steps6-seed0/mbpp+/score.json" in page
    assert "analyse the run again" in page


def test_an_analysis_is_written_where_the_report_looks_for_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    checkpoint = run / "checkpoints" / "step_000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    assert default_out(run) == run / "analysis"
    assert default_out(checkpoint) == run / "analysis"
    alone = tmp_path / "model"
    alone.mkdir()
    (alone / "config.json").write_text("{}")
    assert default_out(alone) == Path("analysis")
