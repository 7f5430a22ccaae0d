"""The moments that `benchmarks/variance.py` prints, against hand computations and against an enumerable model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.enumerable import CANVAS, Toy, toy_batch

from coupled.rl.estimators.draw import draw_masks
from coupled.rl.estimators.score import estimate_logp
from coupled.rl.recipe.objective import Estimator

YS = (2, 0, 1, 1)


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("variance")


def test_the_moments_of_two_and_three_draws_match_the_hand_computation(benchmark: ModuleType) -> None:
    """Draws (1, 0) and (3, 2): their product is 3, their squares 1 and 13, so tr Cov = 7 - 3 = 4 = (2² + 2²) / 2."""
    draws = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    products = benchmark.gram(draws, draws)
    assert benchmark.squared_mean(products) == 3
    assert benchmark.noise(products) == pytest.approx(4 / 3)
    assert benchmark.squared_mean(benchmark.gram(draws[:1], draws[:1])) == 1, "one draw stands for no chance"
    # The mean of 1, 2 and 6: left out one by one 4, 3.5 and 1.5; √(2/3 · (1 + .25 + 2.25)) = std / √3.
    values = np.array([1.0, 2.0, 6.0])
    mean, error = benchmark.jackknife(lambda rows: float(values[rows].mean()), 3)
    assert (mean, error) == (3, pytest.approx(values.std(ddof=1) / math.sqrt(3)))


def test_the_moments_are_unbiased_where_a_plain_square_is_not(benchmark: ModuleType) -> None:
    stream = torch.Generator().manual_seed(0)
    mean = torch.tensor([1.0, -2.0, 0.5])
    estimates = []
    for _ in range(4000):
        draws = mean + 3 * torch.randn((4, 3), generator=stream)
        products = benchmark.gram(draws, draws)
        estimates.append((benchmark.squared_mean(products), products.trace() / 4 - benchmark.squared_mean(products)))
    squared, trace = np.mean(estimates, axis=0)
    errors = np.std(estimates, axis=0) / math.sqrt(4000)
    assert abs(squared - 5.25) < 4 * errors[0]
    assert abs(trace - 27) < 4 * errors[1]
    assert 4 * errors[0] < 27 / 4, "by which the squared length of the mean of four draws is too large"


def test_the_share_of_the_masks_is_that_of_a_sum_whose_parts_are_known(benchmark: ModuleType) -> None:
    """P = 8 parts: each a prompt's own vector (variance 4 per coordinate) and mask noise (variance 1) in each draw."""
    stream = torch.Generator().manual_seed(1)
    number, size, dim = 8, 5, 4000
    parts = 2 * torch.randn((number, dim), generator=stream)
    draws = parts + torch.randn((size, number, dim), generator=stream)
    gradients = draws.sum(1)
    products = benchmark.gram(gradients, gradients)
    drawn = benchmark.Sample(
        scores=np.zeros((size, 1)), gradients=gradients, of_prompts=draws.mean(0), num_forwards=1.0
    )
    share = benchmark.share_of_masks(drawn, products.trace() / size - benchmark.squared_mean(products))
    assert share == pytest.approx(1 / 5, abs=0.02)


def test_one_mask_of_every_size_is_unbiased_for_the_elbo(benchmark: ModuleType) -> None:
    """And each size is there once, however short the completion."""
    toy, size = Toy(), 4000
    batch = toy_batch(YS, size)
    draw = benchmark.elbo_draw(batch, (0, "elbo"))
    assert [view.hidden.sum(-1).unique().tolist() for view in draw.views] == [[1], [2], [3], [4]]
    scores = estimate_logp(toy, batch, draw, Estimator()).sum(-1)
    orders = [
        sum(toy.exact(YS, order[i:], order[i]) for i in range(CANVAS))
        for order in itertools.permutations(range(CANVAS))
    ]
    assert abs(float(scores.mean()) - float(np.mean(orders))) < 4 * float(scores.std()) / math.sqrt(size)
    plain = draw_masks(batch, Estimator(name="espo"), (0, "mask"))
    assert float(scores.var()) < float(estimate_logp(toy, batch, plain, Estimator()).sum(-1).var())
    short = batch.valid.clone()
    short[:, 2:] = False
    views = benchmark.elbo_draw(
        replace(batch, valid=short),
        (0, "elbo"),
    ).views
    assert [view.hidden.sum(-1).unique().tolist() for view in views] == [[1], [2], [0], [0]]
    assert not any((view.hidden & ~short).any() for view in views)


def test_every_row_of_the_table_is_an_estimator_that_a_recipe_may_name(benchmark: ModuleType) -> None:
    named = {estimator.name for _, estimator in benchmark.CONFIGURATIONS.values()}
    assert named == {"coupled", "decoupled", "random_mask", "espo", "gdpo", "full_mask", "trajectory"}
    for _, estimator in benchmark.CONFIGURATIONS.values():
        Estimator.model_validate(estimator.model_dump())
