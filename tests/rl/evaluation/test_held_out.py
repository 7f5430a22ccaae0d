from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from coupled.reward import Judgement, Status
from coupled.rl.errors import CoupledError
from coupled.rl.evaluation.held_out import (
    Evaluation,
    Interval,
    PassRates,
    bootstrap,
    comparison_table,
    is_pass,
    paired_gain,
)
from coupled.rl.recipe.schema import Recipe


def rates(values: list[float], name: str = "p", temperature: float = 1.2) -> PassRates:
    uids = tuple(f"{name}-{i}" for i in range(len(values)))
    return PassRates(temperature=temperature, num_samples=4, uids=uids, rates=tuple(values))


def test_the_bootstrap_mean_is_exact_and_its_interval_holds_it() -> None:
    interval = bootstrap([0.25, 0.5, 1.0, 0.0, 0.75])
    assert interval.mean == 0.5
    assert 0 <= interval.low < 0.5 < interval.high <= 1


def test_the_bootstrap_interval_is_that_of_the_normal_law_for_many_problems() -> None:
    """400 coin tosses: 0.5 ± 1.96 · 0.5 / 20."""
    interval = bootstrap([0.0, 1.0] * 200)
    assert interval.low == pytest.approx(0.451, abs=0.004)
    assert interval.high == pytest.approx(0.549, abs=0.004)


def test_the_bootstrap_interval_shrinks_with_the_root_of_the_number_of_problems() -> None:
    widths = [i.high - i.low for i in (bootstrap([0.0, 0.5, 1.0] * n) for n in (10, 40, 160))]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.1)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.1)


def test_the_bootstrap_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].tolist()
    assert bootstrap([0.0, 1.0, 1.0]) == bootstrap([0.0, 1.0, 1.0])
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_values_leave_no_uncertainty(value: float) -> None:
    assert bootstrap([value] * 7) == Interval(mean=value, low=value, high=value)


def test_the_gain_is_paired_by_problem_so_its_interval_is_narrower() -> None:
    """Problems differ widely, but each gains 0.1: the difficulty cancels."""
    stream = np.random.default_rng(0)
    easy = stream.random(100) * 0.8
    gain = paired_gain(rates(easy.tolist()), rates((easy + 0.1).tolist()))
    assert gain.mean == pytest.approx(0.1)
    assert gain.high - gain.low < 1e-9
    reverse = paired_gain(rates((easy + 0.1).tolist()), rates(easy.tolist()))
    assert reverse.mean == pytest.approx(-0.1)


def test_a_gain_over_other_problems_is_refused() -> None:
    with pytest.raises(CoupledError, match="same problems"):
        paired_gain(rates([0.0, 1.0], "p"), rates([0.0, 1.0], "q"))
    with pytest.raises(CoupledError, match="same problems"):
        paired_gain(rates([0.0, 1.0]), rates([0.0, 1.0, 1.0]))


@pytest.mark.parametrize("has_greedy", [True, False])
def test_an_evaluation_survives_its_row_in_a_file(has_greedy: bool) -> None:
    evaluation = Evaluation(
        step=7,
        sampled=rates([0.25, 1.0, 0.0]),
        greedy=rates([1.0, 1.0, 0.0], temperature=0.0) if has_greedy else None,
    )
    row = evaluation.to_row()
    assert row["sampled"]["pass_at_1"]["mean"] == pytest.approx(1.25 / 3)
    assert Evaluation.from_row(json.loads(json.dumps(row))) == evaluation


def test_a_pass_needs_every_test_and_at_least_one() -> None:
    def judged(*per_test: bool) -> Judgement:
        return Judgement(status=Status.OK, outcome="ok", per_test=per_test)

    assert is_pass(judged(True, True))
    assert not is_pass(judged(True, False))
    assert not is_pass(judged())


def test_intervals_are_printed_in_per_cent() -> None:
    assert str(Interval(mean=0.5412, low=0.49, high=0.5949)) == "54.1 [49.0, 59.5]"


def test_the_comparison_shows_both_decodings_with_their_gain() -> None:
    before = Evaluation(step=0, sampled=rates([0.0, 0.5] * 50), greedy=rates([0.0] * 100, temperature=0.0))
    after = Evaluation(step=9, sampled=rates([0.25, 0.75] * 50), greedy=rates([1.0] * 100, temperature=0.0))
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(comparison_table(before, after))
    text = captured.get()
    assert "sampled, T = 1.2" in text
    assert "100 problems, 4 samples each" in text
    assert "25.0 [" in text
    assert "50.0 [" in text
    assert "+25.0 [25.0, 25.0]" in text
    assert "+100.0 [100.0, 100.0]" in text


def test_the_sampler_is_that_of_the_recipe() -> None:
    rollout = {"canvas": 40, "denoising_steps": 20, "temperature": 0.9, "top_p": 0.95, "order": "margin"}
    recipe = Recipe.model_validate(
        {"stage": "rl", "model": {"path": "m"}, "data": {"path": "d.jsonl"}, "rollout": rollout}
    )
    sampler = recipe.rollout.sampler
    assert {name: getattr(sampler, name) for name in rollout} == rollout
