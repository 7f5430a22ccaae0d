"""How sure positions are and which tokens they get, against the plain computation: all logits, sorted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import coupled.rl.rollout.readout
from coupled.rl.keys import generator, uniform
from coupled.rl.model.vocabulary import CHUNK_LOGITS, OutputHead
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.distributions import FEW, least_kept, nucleus
from coupled.rl.rollout.readout import _bounds, choose_tokens, read_out
from coupled.rl.rollout.row_statistics import measure_states

SAMPLER = Sampler(canvas=8, denoising_steps=8, temperature=0.9)
VOCABULARY, NUM_TOKENS, MASK_ID, WIDTH = 300, 290, 7, 16


def random_head(scale: float = 1.0) -> OutputHead:
    stream = generator("head")
    module = nn.Linear(WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(stream.normal(size=(VOCABULARY, WIDTH))) * scale)
        module.weight[MASK_ID] *= 30  # so that a MASK that is not forbidden would show
    return OutputHead(module=module, mask_id=MASK_ID, num_tokens=NUM_TOKENS)


def random_states(num: int) -> Tensor:
    """Some of them sure, some not."""
    stream = generator("states")
    spread = np.linspace(0.05, 1.6, num)[:, None]
    return torch.from_numpy(stream.normal(size=(num, WIDTH)) * stream.permutation(spread)).float()


def plain_distribution(head: OutputHead, hidden: Tensor, sampler: Sampler) -> Tensor:
    """Probabilities in fp64, by sorting all tokens of all positions."""
    logits = (hidden.double() @ head.module.weight.double().t()) / (sampler.temperature or 1)
    logits[:, MASK_ID] = -torch.inf
    logits[:, NUM_TOKENS:] = -torch.inf
    if sampler.top_k:
        logits[logits < logits.sort(dim=-1).values[:, -sampler.top_k, None]] = -torch.inf
    p = logits.softmax(-1)
    if sampler.top_p < 1:
        ordered, place = p.sort(dim=-1, descending=True, stable=True)
        dropped = ordered.cumsum(-1) - ordered > sampler.top_p
        p = p.masked_fill(torch.zeros_like(dropped).scatter(1, place, dropped), 0)
    return p / p.sum(-1, keepdim=True)


def plain_confidence(p: Tensor, sampler: Sampler, draws: Tensor) -> Tensor:
    if sampler.order == "entropy":
        return torch.special.xlogy(p, p).sum(-1)
    if sampler.order == "margin":
        best = p.sort(dim=-1, descending=True).values
        return best[:, 0] - best[:, 1]
    return p.gather(-1, plain_tokens(p, sampler, draws)[:, None])[:, 0].log()


def plain_tokens(p: Tensor, sampler: Sampler, draws: Tensor) -> Tensor:
    if sampler.temperature == 0:
        return p.argmax(-1)
    return (p.cumsum(-1) > draws[:, None]).int().argmax(-1)


# --- the nucleus without sorting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.95, 0.999])
def test_the_nucleus_without_sorting_is_the_sorted_one(top_p: float, scale: float) -> None:
    logits = torch.from_numpy(generator("nucleus", str(scale)).normal(size=(40, 3000)) * scale * 3).double()
    ordered, place = logits.softmax(-1).sort(dim=-1, descending=True)
    dropped = ordered.cumsum(-1) - ordered > top_p
    expected = logits.masked_fill(torch.zeros_like(dropped).scatter(1, place, dropped), -torch.inf)
    found = nucleus(logits, top_p)
    assert torch.equal(found, expected)
    kept = found.isfinite().sum(-1)
    if scale == 0.01:
        assert kept.min() > FEW or top_p < 0.05, "the nucleus is larger than what is looked at first"
    if scale == 3.0:
        assert kept.max() < 3000 / 2


def test_equally_likely_tokens_stay_or_go_together() -> None:
    p = torch.tensor([[0.3, 0.2, 0.2, 0.2, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]])
    for top_p, kept in ((0.29, 1), (0.31, 4), (0.89, 4), (0.91, 5)):
        assert nucleus(p[:1].log(), top_p).isfinite().sum() == kept
    assert nucleus(p[1:].log(), 0.3).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-6, 0.5, 1.0, 1.5, 2.0]), min_size=1, max_size=400), st.floats(0.01, 0.99)
)
def test_the_nucleus_is_right_for_any_distribution(weights: list[float], top_p: float) -> None:
    p = torch.tensor(weights, dtype=torch.float64)
    p = (p + (p.sum() == 0)) / (p + (p.sum() == 0)).sum()
    least = float(least_kept(p[None], top_p)[0])
    mass_above = [float(p[p > value].sum()) for value in p]
    near = [abs(mass - top_p) < 1e-12 for mass in mass_above]
    expected = [mass <= top_p for mass in mass_above]
    found = (p >= least).tolist()
    assert all(f == e or n for f, e, n in zip(found, expected, near, strict=True))


# --- how sure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 700, 2**22])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"order": "margin"},
        {"order": "maskgit"},
        {"order": "maskgit", "temperature": 0.0},
        {"order": "maskgit", "top_p": 0.9},
        {"order": "margin", "top_k": 5},
        {"top_k": 9, "top_p": 0.8},
        {"top_p": 0.8, "entropy_bound": 0.1},
        {"order": "maskgit", "temperature": 0.0, "top_p": 0.8},
    ],
    ids=str,
)
def test_confidence_is_that_of_the_whole_distribution(
    settings: dict[str, object], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", chunk)
    sampler, head, hidden = SAMPLER.changed(**settings), random_head(), random_states(20)
    draws = torch.from_numpy(uniform((20,), "draws"))
    row_of, count = torch.arange(20) // 5, torch.ones(4, dtype=torch.int64)
    reading = read_out(head, hidden, sampler, draws, draws, row_of=row_of, count=count)
    p = plain_distribution(head, hidden, sampler)
    expected = plain_confidence(p, sampler, draws)
    if sampler.order == "maskgit" and reading.tokens is None:
        expected = expected.exp()
    torch.testing.assert_close(reading.confidence.double(), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(reading.entropy.double(), -torch.special.xlogy(p, p).sum(-1), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(reading.best_probability.double(), p.amax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("order", ["entropy", "margin"])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.95])
@pytest.mark.parametrize(("count", "chunk"), [(1, 2**22), (3, 2**22), (3, 290 * 13)])
def test_with_a_nucleus_only_rivals_are_computed_and_the_choice_is_the_same(
    order: str, top_p: float, count: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, head, hidden = SAMPLER.changed(order=order, top_p=top_p), random_head(0.7), random_states(120)
    draws = torch.from_numpy(uniform((120,), "draws"))
    row_of = torch.arange(120) // 30
    computed: list[int] = []
    plain = coupled.rl.rollout.readout.nucleus
    monkeypatch.setattr("coupled.rl.rollout.readout.nucleus", lambda x, p: computed.append(len(x)) or plain(x, p))
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", chunk)
    reading = read_out(head, hidden, sampler, draws, draws, row_of=row_of, count=torch.full((4,), count))
    assert 4 * count <= sum(computed) <= 120
    assert sum(computed) < 100 or (order == "entropy" and top_p == 0.5), "its bounds are too wide there"
    exact = plain_confidence(plain_distribution(head, hidden, sampler), sampler, draws)
    for row in range(4):
        mine = reading.confidence[row_of == row].argsort(descending=True)[:count]
        its = exact[row_of == row].argsort(descending=True)[:count]
        if exact[row_of == row].unique().numel() == 30:  # else some are equally sure: nothing else is in their nucleus
            assert sorted(mine.tolist()) == sorted(its.tolist())
        np.testing.assert_allclose(
            sorted(reading.confidence[row_of == row][mine].tolist()),
            sorted(exact[row_of == row][its].tolist()),
            atol=2e-5,
        )


@pytest.mark.parametrize("order", ["entropy", "margin"])
@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0])
def test_the_bounds_hold(order: str, scale: float) -> None:
    head, hidden = random_head(scale), random_states(400)
    nowhere = torch.zeros(400, dtype=torch.float64)
    for top_p in (0.2, 0.5, 0.8, 0.95, 0.99):
        sampler = SAMPLER.changed(order=order, top_p=top_p)
        with torch.no_grad():
            unfiltered, _ = measure_states(head, hidden, sampler.temperature, has_margin=True, has_token=False)
            low, high = _bounds(unfiltered, sampler, NUM_TOKENS)
        exact = -plain_confidence(plain_distribution(head, hidden, sampler), sampler, nowhere)
        assert (low <= exact + 1e-4).all()
        assert (exact <= high + 1e-4).all()


# --- which tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_p": 0.7}, {"top_k": 4}], ids=str)
def test_tokens_log_probabilities_and_entropies_are_those_of_the_whole_distribution(
    settings: dict[str, object], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", chunk)
    sampler, head, hidden = SAMPLER.changed(**settings), random_head(), random_states(50)
    draws = torch.from_numpy(uniform((50,), "token"))
    choice = choose_tokens(head, hidden, sampler, draws)
    p = plain_distribution(head, hidden, sampler)
    assert torch.equal(choice.tokens, plain_tokens(p, sampler, draws))
    logp = p.gather(-1, choice.tokens[:, None])[:, 0].log()
    torch.testing.assert_close(choice.logp.double(), logp, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(choice.entropy.double(), -torch.special.xlogy(p, p).sum(-1), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_given_tokens_are_taken_and_the_others_drawn() -> None:
    head, hidden, draws = random_head(), random_states(4), torch.from_numpy(uniform((4,), "token"))
    drawn = choose_tokens(head, hidden, SAMPLER, draws).tokens
    mixed = choose_tokens(head, hidden, SAMPLER, draws, torch.tensor([-1, 3, -1, 5]))
    assert mixed.tokens.tolist() == [int(drawn[0]), 3, int(drawn[2]), 5]
    p = plain_distribution(head, hidden, SAMPLER)
    assert float(mixed.logp[1]) == pytest.approx(math.log(p[1, 3]), abs=1e-4)
