"""What each estimator estimates, by enumerating every mask, every order and every completion of a small model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
import torch
from helpers.enumerable import CANVAS, WORDS, Toy, toy_batch
from helpers.estimator_cases import complementary
from torch import Tensor

from coupled.rl.estimators import espo, gdpo
from coupled.rl.estimators.coupled import draw_pairs, of_pairs
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.estimators.score import estimate_logp
from coupled.rl.objective.loss import coupled_grpo_loss
from coupled.rl.recipe.objective import Estimator, Loss
from coupled.rl.types import MaskDraw, MaskPair, TrainBatch, View

KEY = (0, "mask", 1, 0)
YS = (2, 0, 1, 1)
POSITIONS = range(CANVAS)
MASKS = [m for n in range(CANVAS + 1) for m in itertools.combinations(POSITIONS, n)]
AS_TENSOR = torch.tensor([[k in m for k in POSITIONS] for m in MASKS])
"""Every set of positions, [16, 4]."""
SIZES = AS_TENSOR.sum(-1)
EVERY = toy_batch(YS, len(MASKS))


def bernoulli_probability(t: float) -> Tensor:
    return t ** SIZES.double() * (1 - t) ** (CANVAS - SIZES).double()


def integrate(f: Callable[[float], Tensor]) -> Tensor:
    """∫_0^1 f(t) dt, exact for polynomials of degree 15."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    return torch.stack([f(float(x + 1) / 2) * float(w) / 2 for x, w in zip(nodes, weights, strict=True)]).sum(0)


def scores_of(toy: Toy, draw: MaskDraw, batch: TrainBatch = EVERY) -> Tensor:
    return estimate_logp(toy, batch, draw, Estimator())


def pair_of_each_mask(t: float) -> MaskPair:
    """Row m holds the m-th set of positions and its complement, ratio t in fp64."""
    return complementary(torch.full((len(MASKS),), t, dtype=torch.float64), AS_TENSOR, EVERY.valid)


def elbo_per_token(toy: Toy) -> list[float]:
    """`Σ_{M∋k} (|M|-1)! (C-|M|)! / C! · ℓ_k(M)` for each k."""
    weight = [math.factorial(n - 1) * math.factorial(CANVAS - n) / math.factorial(CANVAS) for n in range(1, CANVAS + 1)]
    return [sum(weight[len(m) - 1] * toy.exact(YS, m, k) for m in MASKS if k in m) for k in POSITIONS]


def order_logp(toy: Toy, order: Sequence[int]) -> float:
    """`Σ_i log p(y_σ(i) | y_σ(<i))`."""
    return sum(toy.exact(YS, order[i:], order[i]) for i in POSITIONS)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_five_ways_to_the_elbo_agree(seed: int) -> None:
    """The sum over masks, the mean over orders, the antithetic integral over t, and each half of ESPO's estimate."""
    toy = Toy(seed)
    elbo = elbo_per_token(toy)
    orders = [order_logp(toy, order) for order in itertools.permutations(POSITIONS)]
    assert np.mean(orders) == pytest.approx(sum(elbo), abs=1e-9)

    def antithetic(t: float) -> Tensor:
        scores = scores_of(toy, of_pairs((pair_of_each_mask(t),), EVERY, "antithetic"))
        return (bernoulli_probability(t)[:, None] * scores).sum(0)

    assert integrate(antithetic).tolist() == pytest.approx(elbo, abs=1e-9), "token by token"

    probability = torch.tensor([1 / (CANVAS + 1) / math.comb(CANVAS, len(m)) for m in MASKS], dtype=torch.float64)
    for half in espo.halves(AS_TENSOR, EVERY.valid):
        estimate = scores_of(toy, MaskDraw(forwards=((half,),), total=1, is_sequence=True)).sum(-1)
        assert float(probability @ estimate) == pytest.approx(sum(elbo), abs=1e-9)
    both = MaskDraw(forwards=(espo.halves(AS_TENSOR, EVERY.valid),), total=2, is_sequence=True)
    assert float(probability @ scores_of(toy, both).sum(-1)) == pytest.approx(sum(elbo), abs=1e-9)


@pytest.mark.parametrize(
    ("weights", "a", "w_first", "w_second"),
    [
        ("paper", 1 / 2, 1 / (2 * 0.3), 1 / (2 * 0.7)),
        ("normalized", 1 / 3, 1 / (3 * 0.3), 1 / (3 * 0.7)),
        ("antithetic", 0, 1 / (2 * 0.3), 1 / (2 * 0.7)),
        ("unit", 0, 1, 1),
    ],
)
def test_the_released_formula_for_a_fixed_mask_and_ratio(
    weights: str, a: float, w_first: float, w_second: float
) -> None:
    """r masks positions 0 and 3 with t = 0.3; the weights are written out from the table of the method page."""
    toy, batch = Toy(), toy_batch(YS, 1)
    r, t = torch.tensor([[True, False, False, True]]), torch.tensor([0.3], dtype=torch.float64)
    scores = scores_of(toy, of_pairs((complementary(t, r, batch.valid),), batch, weights), batch)
    expected = [
        a * toy.exact(YS, (0, 1, 2, 3), 0) + w_first * toy.exact(YS, (0, 3), 0),
        a * toy.exact(YS, (0, 1, 2, 3), 1) + w_second * toy.exact(YS, (1, 2), 1),
        a * toy.exact(YS, (0, 1, 2, 3), 2) + w_second * toy.exact(YS, (1, 2), 2),
        a * toy.exact(YS, (0, 1, 2, 3), 3) + w_first * toy.exact(YS, (0, 3), 3),
    ]
    assert scores[0].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("weights", ["paper", "normalized", "unit"])
def test_the_other_weights_are_not_estimates_of_the_elbo(weights: str) -> None:
    """Even with t over all of (0, 1): `paper` is scaled, `normalized` holds the fully masked term, `unit` no 1/t."""
    toy = Toy()

    def mean(t: float) -> Tensor:
        scores = scores_of(toy, of_pairs((pair_of_each_mask(t),), EVERY, weights))
        return (bernoulli_probability(t)[:, None] * scores).sum()

    assert abs(float(integrate(mean)) - sum(elbo_per_token(toy))) > 1e-2


def test_a_narrow_range_of_t_and_the_full_mask_are_biased_for_the_elbo() -> None:
    toy, nodes = Toy(), np.linspace(0.2, 0.8, 601)
    elbo = sum(elbo_per_token(toy))

    def mean(t: float) -> float:
        scores = scores_of(toy, of_pairs((pair_of_each_mask(t),), EVERY, "antithetic"))
        return float((bernoulli_probability(t)[:, None] * scores).sum())

    assert abs(np.mean([mean(t) for t in nodes]) - elbo) > 1e-3
    full = MaskDraw(forwards=((View.fully_masked(EVERY.valid),),), total=1)
    assert abs(float(scores_of(toy, full)[0].sum()) - elbo) > 1e-2


def test_gdpo_is_its_quadrature_and_tends_to_the_elbo_with_many_nodes() -> None:
    toy = Toy()
    elbo = sum(elbo_per_token(toy))
    # f(n): the mean over all masks of n positions of L/n · Σ ℓ.
    by_size = {
        n: np.mean([CANVAS / n * sum(toy.exact(YS, m, k) for k in m) for m in MASKS if len(m) == n])
        for n in range(1, CANVAS + 1)
    }
    expected = 5 / 18 * by_size[1] + 8 / 18 * by_size[2] + 5 / 18 * by_size[4]
    size = 4000
    batch = toy_batch(YS, size)
    estimate = estimate_logp(toy, batch, draw_masks(batch, Estimator(name="gdpo"), KEY), Estimator()).sum(-1)
    assert abs(float(estimate.mean()) - expected) < 4 * float(estimate.std()) / size**0.5
    assert abs(expected - elbo) > 2e-2, "three nodes are biased"
    nodes, weights = gdpo.gauss_legendre(1000)
    limit = sum(w * by_size[math.ceil(t * CANVAS)] for t, w in zip(nodes, weights, strict=True))
    assert limit == pytest.approx(elbo, abs=5e-3)


def test_the_nodes_of_gdpo_are_those_of_the_paper() -> None:
    nodes, weights = gdpo.gauss_legendre(3)
    assert nodes == pytest.approx([0.1127, 0.5, 0.8873], abs=1e-4)
    assert weights == pytest.approx([5 / 18, 8 / 18, 5 / 18])
    draw = draw_masks(toy_batch(YS, 5), Estimator(name="gdpo"), KEY)
    assert [view.hidden.sum(-1).tolist() for view in draw.views] == [[1] * 5, [2] * 5, [4] * 5]
    divisors = [[1 / 4 / (5 / 18)] * 5, [2 / 4 / (8 / 18)] * 5, [1 / (5 / 18)] * 5]
    for view, divisor in zip(draw.views, divisors, strict=True):
        assert view.divisor.tolist() == pytest.approx(divisor)


def test_the_masks_of_gdpo_round_up() -> None:
    """Two nodes, .2113 and .7887, of 4 positions: 1 and 4, not 1 and 3."""
    draw = draw_masks(toy_batch(YS, 3), Estimator(name="gdpo", num_nodes=2), KEY)
    assert [view.hidden.sum(-1).tolist() for view in draw.views] == [[1] * 3, [4] * 3]


# --- draws: what is enumerated above is what is drawn ---------------------------------------------------------------


def frequencies(rows: Iterable[Sequence[bool]]) -> dict[tuple[bool, ...], int]:
    found: dict[tuple[bool, ...], int] = {}
    for row in rows:
        found[tuple(row)] = found.get(tuple(row), 0) + 1
    return found


def chi_square(counts: dict[tuple[bool, ...], int], expected: dict[tuple[bool, ...], float]) -> float:
    assert counts.keys() <= expected.keys()
    return sum((counts.get(k, 0) - e) ** 2 / e for k, e in expected.items())


def test_espo_draws_every_size_alike_and_every_set_of_a_size_alike() -> None:
    size = 6000
    (mask, complement) = draw_masks(toy_batch(YS, size), Estimator(name="espo"), KEY).views
    expected = {tuple(k in m for k in POSITIONS): size / (CANVAS + 1) / math.comb(CANVAS, len(m)) for m in MASKS}
    for view in (mask, complement):
        # 15 degrees of freedom, p = 0.001.
        assert chi_square(frequencies(view.hidden.tolist()), expected) < 37.7
    assert torch.equal(mask.hidden, ~complement.hidden)


def test_espo_divides_by_size_over_length_plus_one() -> None:
    batch = toy_batch(YS, 50)
    mask, complement = draw_masks(batch, Estimator(name="espo"), KEY).views
    for view in (mask, complement):
        sizes = view.hidden.sum(-1)
        assert sizes.min() == 0, "otherwise the empty half is not tested"
        assert view.divisor.tolist() == pytest.approx([n / 5 if n else 1.0 for n in sizes.tolist()])


@pytest.mark.parametrize("name", ["coupled", "decoupled"])
def test_exact_counts_hold_a_share_t_of_the_valid_positions_and_no_mask_is_empty(name: str) -> None:
    batch = toy_batch(YS, 4000)
    estimator = Estimator(name=name, draw="exact_count", mask_ratio=(0.001, 0.999))
    (pair,) = draw_pairs(batch, estimator, KEY)
    counts = pair.first.sum(-1)
    assert torch.equal(counts, (pair.ratio * CANVAS).round().long())
    assert torch.equal(pair.second.sum(-1), CANVAS - counts)
    assert sorted(set(counts.tolist())) == [1, 2, 3]
    # t below 3/8 rounds to 1, above 5/8 to 3.
    assert float((counts == 1).double().mean()) == pytest.approx(3 / 8, abs=0.03)
    assert torch.equal(pair.first ^ pair.second, batch.valid) == (name == "coupled")
    pairs_of_two = frequencies(pair.first[counts == 2].tolist())
    expected = {tuple(k in m for k in POSITIONS): float((counts == 2).sum()) / 6 for m in MASKS if len(m) == 2}
    assert chi_square(pairs_of_two, expected) < 20.5, "5 degrees of freedom, p = 0.001"


def test_exact_random_masks_are_divided_by_the_share_they_hold() -> None:
    batch = toy_batch(YS, 500)
    estimator = Estimator(name="random_mask", draw="exact_count", mask_ratio=(0.001, 0.999))
    for view in draw_masks(batch, estimator, KEY).views:
        counts = view.hidden.sum(-1)
        assert sorted(set(counts.tolist())) == [1, 2, 3, 4]
        assert torch.equal(view.divisor, counts.double() / CANVAS)


def test_a_completion_of_one_token_is_in_one_mask_of_an_exact_pair_by_chance() -> None:
    batch = toy_batch(YS, 3000)
    valid = torch.zeros_like(batch.valid)
    valid[:, 0] = True
    single = TrainBatch(
        uids=batch.uids,
        ids=batch.ids,
        pad_lengths=batch.pad_lengths,
        valid=valid,
        advantages=batch.advantages,
        is_scored=batch.is_scored,
    )
    (pair,) = draw_pairs(single, Estimator(draw="exact_count"), KEY)
    assert torch.equal(pair.first ^ pair.second, valid)
    assert float((pair.first[:, 0].float() - pair.ratio).mean()) == pytest.approx(0, abs=0.04)


@pytest.mark.parametrize("draw", ["bernoulli", "exact_count"])
@pytest.mark.parametrize(
    ("name", "weights", "factor"),
    [
        ("coupled", "paper", 5 / 3),
        ("coupled", "normalized", 1.0),
        ("coupled", "antithetic", 1.0),
        ("coupled", "unit", 1.0),
        ("decoupled", "paper", 5 / 3),
        ("decoupled", "normalized", 1.0),
        ("decoupled", "antithetic", 1.0),
        ("decoupled", "unit", 1.0),
        ("random_mask", "paper", 1.0),
    ],
)
def test_where_context_does_not_matter_the_mean_is_the_documented_multiple(
    name: str, weights: str, draw: str, factor: float
) -> None:
    """λ = 2, t over [.2, .8], one distribution in every state: E[s_k] / ℓ_k is in the table of the method page."""
    toy, size = Toy(), 4000
    toy.table = toy.table[:1].repeat(len(toy.table), 1, 1)
    batch = toy_batch(YS, size)
    estimator = Estimator(name=name, weights=weights, draw=draw, num_pairs=2)
    scores = estimate_logp(toy, batch, draw_masks(batch, estimator, KEY), estimator)
    for k in POSITIONS:
        multiple = scores[:, k] / toy.exact(YS, (k,), k)
        assert abs(float(multiple.mean()) - factor) < 4.5 * float(multiple.std()) / size**0.5 + 1e-9
    if name == "coupled" and weights == "unit":
        assert float((scores - scores[0]).abs().max()) < 1e-12, "each token is scored once by each pair: no variance"


def test_the_drawn_antithetic_pairs_are_unbiased_for_the_elbo_over_almost_all_t() -> None:
    """Real draws. Over [.02, .98] the missing ends bias the mean by less than its error here, and keep it finite."""
    toy, size = Toy(), 10_000
    batch, estimator = toy_batch(YS, size), Estimator(weights="antithetic", mask_ratio=(0.02, 0.98))
    totals = estimate_logp(toy, batch, draw_masks(batch, estimator, KEY), estimator).sum(-1)
    assert abs(float(totals.mean()) - sum(elbo_per_token(toy))) < 5 * float(totals.std()) / size**0.5


@pytest.mark.parametrize(
    "estimator",
    [Estimator(name="espo", num_pairs=2), Estimator(name="random_mask", num_pairs=2, mask_ratio=(0.02, 0.98))],
    ids=lambda estimator: estimator.name,
)
def test_the_drawn_estimates_are_unbiased_for_the_elbo(estimator: Estimator) -> None:
    toy, size = Toy(), 10_000
    batch = toy_batch(YS, size)
    totals = estimate_logp(toy, batch, draw_masks(batch, estimator, KEY), estimator).sum(-1)
    assert abs(float(totals.mean()) - sum(elbo_per_token(toy))) < 5 * float(totals.std()) / size**0.5


# --- variance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.2, 0.5, 0.7])
def test_the_two_terms_of_a_coupled_pair_have_covariance_minus_the_product_of_their_means(t: float) -> None:
    """One of the two is always 0, so E[XY] = 0. The mean of X and Y then varies less by E[X]E[Y]/2 than with
    independent masks, where the covariance is 0: v_k²/2 for one pair at t = ½."""
    toy = Toy()
    first, second = of_pairs((pair_of_each_mask(t),), EVERY, "antithetic").views
    x, y = (scores_of(toy, MaskDraw(forwards=((view,),), total=1)) for view in (first, second))
    probability = bernoulli_probability(t)[:, None]
    mean_x, mean_y = (probability * x).sum(0), (probability * y).sum(0)
    assert (x * y).abs().max() == 0
    coupled = (probability * ((x + y) / 2) ** 2).sum(0) - ((mean_x + mean_y) / 2) ** 2
    # The decoupled second mask: any set, with ratio 1 - t, whatever the first was.
    other = scores_of(toy, MaskDraw(forwards=((View.of_mask(AS_TENSOR, torch.full((16,), 1 - t)),),), total=1))
    other_probability = bernoulli_probability(1 - t)
    joint = probability[:, :, None] * other_probability[None, None, :]
    both = (x[:, :, None] + other.T[None]) / 2
    decoupled = (joint * both**2).sum((0, 2)) - ((joint * both).sum((0, 2))) ** 2
    torch.testing.assert_close(decoupled - coupled, mean_x * mean_y / 2, atol=1e-6, rtol=1e-6)
    assert float((mean_x * mean_y).min()) > 0.05


@pytest.mark.parametrize("draw", ["bernoulli", "exact_count"])
@pytest.mark.parametrize("weights", ["paper", "normalized", "antithetic", "unit"])
def test_coupled_varies_less_than_decoupled_at_equal_forwards_whatever_the_weights(weights: str, draw: str) -> None:
    size, variance, rows = 4000, {}, {}
    for name in ("coupled", "decoupled"):
        toy, batch = Toy(), toy_batch(YS, size)
        estimator = Estimator(name=name, weights=weights, draw=draw)
        scores = estimate_logp(toy, batch, draw_masks(batch, estimator, KEY), estimator)
        variance[name], rows[name] = float(scores.var(0).sum()), toy.num_rows
    assert rows["coupled"] == rows["decoupled"]
    assert variance["decoupled"] > 2 * variance["coupled"]


# --- orders ---------------------------------------------------------------------------------------------------------


def test_the_left_to_right_oracle_is_a_probability_over_all_completions() -> None:
    toy, total = Toy(), 0.0
    for words in itertools.product(range(WORDS), repeat=CANVAS):
        batch = toy_batch(words, 1)
        scores = estimate_logp(toy, batch, draw_masks(batch, Estimator(name="ar_order"), KEY), Estimator())
        total += float(scores.sum().exp())
        by_hand = [toy.exact(words, range(k, CANVAS), k) for k in POSITIONS]
        assert scores[0].tolist() == pytest.approx(by_hand, abs=1e-9)
    assert total == pytest.approx(1, abs=1e-9)


def test_the_trajectory_of_every_order_is_the_product_along_it() -> None:
    toy, trajectory = Toy(), Estimator(name="trajectory")
    totals = []
    for order in itertools.permutations(POSITIONS):
        steps = [order.index(k) for k in POSITIONS]
        batch = toy_batch(YS, 1, steps)
        scores = estimate_logp(toy, batch, draw_masks(batch, trajectory, KEY), trajectory)
        totals.append(float(scores.sum()))
        assert totals[-1] == pytest.approx(order_logp(toy, order), abs=1e-9)
        if order == tuple(POSITIONS):
            left_to_right = estimate_logp(toy, batch, draw_masks(batch, Estimator(name="ar_order"), KEY), trajectory)
            assert torch.equal(scores, left_to_right)
    assert np.mean(totals) == pytest.approx(sum(elbo_per_token(toy)), abs=1e-9), "the any-order mean, once more"


STEPS = (5, 0, 3, 0)
"""Positions 1 and 3 at step 0, position 2 at step 3, position 0 at step 5."""


@pytest.mark.parametrize(
    ("shrink", "hidden"),
    [
        (1, {0: (0,), 1: (0, 1, 2, 3), 2: (0, 2), 3: (0, 1, 2, 3)}),
        (3, {0: (0, 2), 1: (0, 1, 2, 3), 2: (0, 2), 3: (0, 1, 2, 3)}),  # ⌊τ/3⌋ = 1, 0, 1, 0
        (5, {0: (0,), 1: (0, 1, 2, 3), 2: (0, 1, 2, 3), 3: (0, 1, 2, 3)}),
        (9, dict.fromkeys(POSITIONS, tuple(POSITIONS))),  # one step: the fully masked estimate
    ],
)
def test_shrink_hides_the_whole_group_of_steps_a_token_belongs_to(shrink: int, hidden: dict[int, tuple[int]]) -> None:
    toy, batch = Toy(), toy_batch(YS, 1, STEPS)
    estimator = Estimator(name="trajectory", shrink=shrink)
    scores = estimate_logp(toy, batch, draw_masks(batch, estimator, KEY), estimator)
    assert scores[0].tolist() == pytest.approx([toy.exact(YS, hidden[k], k) for k in POSITIONS], abs=1e-9)


@pytest.mark.parametrize("num_sampled", [1, 2])
def test_sampled_steps_are_scaled_by_their_chance_and_unbiased(num_sampled: int) -> None:
    """Each of the 3 steps is drawn with chance S/3: the mean over many draws is the whole trajectory."""
    toy, size = Toy(), 6000
    batch = toy_batch(YS, size, STEPS)
    estimator = Estimator(name="trajectory", num_sampled_steps=num_sampled)
    draw = draw_masks(batch, estimator, KEY)
    assert len(draw.forwards) == num_sampled
    scores = estimate_logp(toy, batch, draw, estimator)
    whole = estimate_logp(
        toy, batch, draw_masks(batch, Estimator(name="trajectory"), KEY), Estimator(name="trajectory")
    )[0]
    is_drawn = scores != 0
    torch.testing.assert_close(scores[is_drawn], (whole * 3 / num_sampled).expand(size, -1)[is_drawn])
    assert torch.equal(is_drawn[:, 1], is_drawn[:, 3]), "one step, drawn or not"
    share = is_drawn.double().mean(0)
    assert (share - num_sampled / 3).abs().max() < 4 * (1 / 4 / size) ** 0.5
    assert (is_drawn[:, :3].sum(-1) == num_sampled).all()


GOLDEN = {
    "exact": [[1, 0, 1, 1], [0, 1, 0, 0]],
    "random": [[1, 1, 1, 1], [1, 0, 0, 1]],
    "espo": [[1, 1, 1, 1], [0, 0, 0, 0]],
    "gdpo": [[0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]],
    "sampled": [[1, 1, 1, 1], [1, 0, 1, 0]],
}


def test_the_draws_of_a_key_never_change_between_versions() -> None:
    batch = toy_batch(YS, 1, STEPS)
    drawn = {
        name: [view.hidden[0].int().tolist() for view in draw_masks(batch, estimator, KEY).views]
        for name, estimator in (
            ("exact", Estimator(draw="exact_count", weights="unit")),
            ("random", Estimator(name="random_mask")),
            ("espo", Estimator(name="espo")),
            ("gdpo", Estimator(name="gdpo")),
            ("sampled", Estimator(name="trajectory", num_sampled_steps=2)),
        )
    }
    assert drawn == GOLDEN


def test_asking_for_more_steps_than_there_are_scores_them_all() -> None:
    toy, batch = Toy(), toy_batch(YS, 2, STEPS)
    several, all_steps = (
        estimate_logp(toy, batch, draw_masks(batch, e, KEY), e)
        for e in (Estimator(name="trajectory", num_sampled_steps=7), Estimator(name="trajectory"))
    )
    assert torch.equal(several, all_steps)


def test_a_trajectory_without_commit_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"commit_step=None; make it with coupled\.rl\.objective\.batch\.collate"):
        draw_masks(toy_batch(YS, 1), Estimator(name="trajectory"), KEY)


# --- the loss as a function of the weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["coupled", "decoupled", "full_mask", "random_mask", "espo", "gdpo", "trajectory", "ar_order"]
)
def test_the_gradient_of_the_loss_is_its_finite_difference(name: str) -> None:
    """fp64, off-policy, KL included: one logit of each of many states is moved by ± 1e-6."""
    toy, estimator, config = Toy(), Estimator(name=name), Loss(kl_beta=0.3)
    batch = toy_batch(YS, 3, STEPS)
    advantages = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    draw = draw_masks(batch, estimator, KEY)
    old, reference = (estimate_logp(Toy(seed), batch, draw, estimator) for seed in (0, 1))
    old = old + torch.linspace(-0.2, 0.2, CANVAS, dtype=torch.float64) * batch.valid

    def loss() -> Tensor:
        new = estimate_logp(toy, batch, draw, estimator)
        return coupled_grpo_loss(new, old, reference, advantages, batch.valid, 12, config).loss

    toy.table.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(), toy.table)
    toy.table.requires_grad_(False)
    touched = gradient.nonzero().tolist()
    assert len(touched) >= 3 * CANVAS, "three words at each position at least"
    for state, k, word in touched[:: max(1, len(touched) // 12)]:
        ends = []
        for sign in (1, -1):
            toy.table[state, k, word] += sign * 1e-6
            ends.append(float(loss()))
            toy.table[state, k, word] -= sign * 1e-6
        difference = (ends[0] - ends[1]) / 2e-6
        assert float(gradient[state, k, word]) == pytest.approx(difference, rel=1e-4, abs=1e-8)
