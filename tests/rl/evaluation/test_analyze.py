"""`coupled analyze`: which points are decoded, what is claimed of them, and what is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from coupled.rl.errors import DataError
from coupled.rl.evaluation.analyze import (
    Claim,
    Point,
    Sweep,
    analyze,
    claim_table,
    point_table,
    sweep_settings,
    temperature_claims,
    training_claims,
    write_analysis,
)
from coupled.rl.evaluation.statistics import Interval
from coupled.rl.recipe.rollout import Sampler

ROOT = Path(__file__).parents[3]
TINY = ROOT / "recipes" / "tiny" / "checkpoint"
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


def point(temperature: float, steps: int, passed: list[int], ness: float, n: int = 4) -> Point:
    """Each problem has n completions, of which `passed` pass."""
    values = tuple(ness + 0.01 * i for i in range(len(passed)))
    return Point(
        temperature=temperature,
        denoising_steps=steps,
        num_samples=n,
        passes=tuple(tuple(i < count for i in range(n)) for count in passed),
        local={1: values},
        global_={1: values},
        tokens_per_second=100.0,
        num_forwards=float(steps),
    )


def test_each_point_is_decoded_once() -> None:
    sampler = Sampler(canvas=40, denoising_steps=20, temperature=1.0)
    assert sweep_settings(Sweep(temperatures=(0.0, 1.0, 1.5)), sampler) == [
        (0.0, 20), (1.0, 20), (1.5, 20), (0.0, 10), (1.0, 10), (0.0, 5), (1.0, 5),
    ]  # fmt: skip


def test_two_steps_are_not_cut_to_none() -> None:
    sampler = Sampler(canvas=4, denoising_steps=2, temperature=1.0)
    assert {steps for _, steps in sweep_settings(Sweep(temperatures=(0.0,)), sampler)} == {1, 2}


@pytest.mark.parametrize(
    ("low", "high", "expected", "shows"),
    [
        (0.1, 0.2, "above 0", "yes"),
        (0.1, 0.2, "below 0", "the opposite"),
        (-0.2, -0.1, "below 0", "yes"),
        (-0.1, 0.2, "below 0", "cannot tell"),
        (0.0, 0.2, "above 0", "cannot tell"),
    ],
)
def test_a_claim_shows_only_where_the_interval_excludes_nothing(
    low: float, high: float, expected: str, shows: str
) -> None:
    difference = Interval(mean=(low + high) / 2, low=low, high=high)
    assert Claim(text="", expected=expected, difference=difference).shows == shows


def test_temperature_is_compared_from_the_lowest_that_samples_to_the_highest() -> None:
    points = [point(0.0, 8, [1, 1], 0.9, n=1), point(0.5, 8, [1, 0], 0.8), point(1.5, 8, [2, 2], 0.5)]
    local, global_, passed = temperature_claims(points, 8, 4)
    assert local.difference.mean == pytest.approx(-0.3)
    assert (local.shows, global_.shows) == ("yes", "yes")
    assert passed.difference.mean == pytest.approx(0.5)
    assert "0.5 → 1.5" in local.text


def test_what_halving_costs_is_compared_before_and_after() -> None:
    """Before: 2 of 4 to 0 of 4. After: 4 of 4 to 3 of 4. The loss shrinks by a quarter."""
    before = [point(1.0, 8, [2, 2], 0.8), point(1.0, 4, [0, 0], 0.8)]
    after = [point(1.0, 8, [4, 4], 0.6), point(1.0, 4, [3, 3], 0.6)]
    claims = {claim.text: claim for claim in training_claims(before, after, 8, 1.0)}
    assert len(claims) == 3
    halving = claims["pass@1 lost by steps/2, temperature 1: loss before - loss after"]
    assert halving.difference.mean == pytest.approx(0.25)
    assert halving.shows == "yes"
    assert claims["before → after, temperature 1, global AR-ness@1"].difference.mean == pytest.approx(-0.2)


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    """The embedded model against itself, on three problems."""
    sweep = Sweep(num_problems=3, num_samples=2, temperatures=(0.0, 0.5, 1.0), num_mapped=4)
    overrides = ("num_threads=1", "rollout.denoising_steps=8", "rollout.batch_size=6", "sandbox.num_workers=1")
    return analyze([TINY, TINY], sweep, QUICKSTART, overrides)


def test_a_checkpoint_against_itself_differs_by_nothing(result: dict[str, object]) -> None:
    one, two = result["checkpoints"]  # type: ignore[misc]
    assert [{k: v for k, v in p.items() if k != "tokens_per_second"} for p in one["points"]] == [
        {k: v for k, v in p.items() if k != "tokens_per_second"} for p in two["points"]
    ]
    assert len(one["points"]) == 7
    claims = [claim for claim in result["claims"] if claim["text"].startswith(("before", "pass@1 lost"))]  # type: ignore[attr-defined]
    assert len(claims) == 8
    assert all(claim["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0} for claim in claims)
    assert {claim["shows"] for claim in claims} == {"cannot tell"}


def test_maps_cover_every_step_and_position(result: dict[str, object]) -> None:
    (one, _) = result["checkpoints"]  # type: ignore[misc]
    assert len(one["confidence"]) == len(one["commit"]) == 8
    assert all(len(row) == 40 for row in (*one["confidence"], *one["commit"]))
    assert one["entropy_sink"] == one["confidence"][0]
    assert all(0 < value <= 1 for value in one["entropy_sink"])
    shares = [sum(row[0] for row in one["commit"])]
    assert shares == pytest.approx([1.0], abs=1e-3)


def test_json_pictures_and_tables_are_written(result: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = write_analysis(result, tmp_path)
    assert [path.name for path in written] == ["analysis.json", "analysis.svg", "analysis-maps.svg"]
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(result))
    assert all("<svg" in path.read_text() for path in written[1:])
    console = Console(width=200, record=True)
    with console.capture() as captured:
        console.print(point_table(result))
        console.print(claim_table(result))
    text = captured.get()
    assert "global@1" in text
    assert "cannot tell" in text


def test_without_matplotlib_the_numbers_still_come(
    result: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "coupled.rl.evaluation.plots", raising=False)
    assert [path.name for path in write_analysis(result, tmp_path)] == ["analysis.json"]


def test_an_analysis_without_problems_says_how_to_name_some() -> None:
    with pytest.raises(DataError, match="no held-out problems; give --benchmark"):
        analyze([TINY], Sweep(), QUICKSTART, ("data.eval_path=null",))
    with pytest.raises(DataError, match="an analysis covers one benchmark"):
        analyze([TINY], Sweep(), QUICKSTART, (), benchmark="humaneval+,mbpp+", data=Path("nowhere"))
