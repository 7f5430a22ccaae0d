"""The ELBO by quadrature over t [GDPO]: fixed mask ratios, random masks.

    E = Σ_n w_n · L/|M_n| · Σ_{k∈M_n} ℓ_k(M_n)

with the Gauss-Legendre nodes t_n of (0, 1) and their weights w_n: for 3 nodes .1127, .5, .8873 and 5/18, 8/18, 5/18.
Only the masks are random, not t, which is where most of the variance of an ELBO comes from. A completion has one
score; its ratio is exp((E - E_old)/L).

|M_n| = ⌈t_n · L⌉: every mask has a token, and with many nodes each size has the weight 1/L that it has in the ELBO.
With few nodes E is a biased estimate of the ELBO.
"""

from __future__ import annotations

import math

import numpy as np

from coupled.rl.estimators.cost import ScoringCost
from coupled.rl.estimators.subsets import column, exact_count, stack
from coupled.rl.keys import Key, generator
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import MaskDraw, TrainBatch, View


def draw(batch: TrainBatch, config: Estimator, key: tuple[Key, ...]) -> MaskDraw:
    """`num_nodes` masks; `mask_ratio`, `weights`, `draw` and `num_pairs` are not read."""
    nodes = zip(*gauss_legendre(config.num_nodes), strict=True)
    forwards = tuple((_draw_view(batch, t, w, (*key, index)),) for index, (t, w) in enumerate(nodes))
    return MaskDraw(forwards=forwards, total=1, is_sequence=True)


def cost(config: Estimator, canvas: int, steps: int) -> ScoringCost:
    """One view per node, which scores ⌈t_n · canvas⌉ positions."""
    nodes, _ = gauss_legendre(config.num_nodes)
    return ScoringCost(own_views=config.num_nodes, shared_views=0, scored=sum(math.ceil(t * canvas) for t in nodes))


def gauss_legendre(num_nodes: int) -> tuple[list[float], list[float]]:
    """Nodes and weights for ∫_0^1: exact for polynomials up to degree 2 · num_nodes - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def _draw_view(batch: TrainBatch, t: float, weight: float, key: tuple[Key, ...]) -> View:
    masks, divisors = [], []
    for uid, valid in zip(batch.uids, batch.valid.cpu().numpy(), strict=True):
        length = int(valid.sum())
        size = math.ceil(t * length)
        masks.append(exact_count(generator(*key, uid).random(batch.canvas_length), size, valid))
        divisors.append(size / (length * weight) if length else 1.0)
    return View.of_mask(stack(masks, batch.valid), column(divisors, batch.valid))
