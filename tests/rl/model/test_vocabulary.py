"""The chunked log-softmax against the plain one: values, gradients, and what is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.toys import MakePolicy, make_batch
from torch import Tensor, nn

import coupled.rl.model.vocabulary as vocabulary
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.estimators.score import estimate_logp
from coupled.rl.model.loading import add_adapter
from coupled.rl.model.policy import Policy
from coupled.rl.model.vocabulary import OutputHead
from coupled.rl.recipe.objective import Estimator

# peft asks transformers for a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROWS, WIDTH, HEAD_ROWS, TOKENS, MASK_ID = 11, 7, 29, 25, 4
KEY = (0, "mask", 1, 0)
trained_or_frozen = pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])


def make_head(is_trained: bool, module: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> OutputHead:
    if module is None:
        module = nn.Linear(WIDTH, HEAD_ROWS, bias=False, dtype=dtype)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=stream)
    return OutputHead(module=module.requires_grad_(is_trained), mask_id=MASK_ID, num_tokens=TOKENS)


def make_tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, then tokens in no order (several on a row, none on row 3, two forbidden), and a slope for each."""
    stream = torch.Generator().manual_seed(2)
    hidden = torch.randn((ROWS, WIDTH), generator=stream, dtype=dtype)
    line = torch.tensor([0, 5, 1, 10, 5, 5, 2, 9, 9, 4, 8, 7, 6, 0])
    targets = torch.tensor([1, 0, 24, 3, 17, 17, MASK_ID, 8, 9, 24, 27, 5, 0, 2])
    return hidden, line, targets, torch.randn(len(line), generator=stream, dtype=dtype)


def token_logp(
    head: OutputHead, hidden: Tensor, line: Tensor, targets: Tensor, temperature: float = 1.0, *, chunk_logits: int
) -> Tensor:
    """`vocabulary.token_logp` with `chunk_logits` logits in memory at a time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(vocabulary.CHUNK_LOGITS, "cpu", chunk_logits)
        return vocabulary.token_logp(head, hidden, line, targets, temperature)


def by_hand(head: OutputHead, hidden: Tensor, line: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Token by token over the tokens that have a name."""
    named = [v for v in range(TOKENS) if v != MASK_ID]
    found = []
    for row, target in zip(line.tolist(), targets.tolist(), strict=True):
        logits = head.module(hidden[row]) / temperature
        total = logits[named].exp().sum().log()
        found.append(logits[target] - total if target in named else -torch.inf - total)
    return torch.stack(found)


def gradients(head: OutputHead, score: Callable[[Tensor], Tensor], hidden: Tensor, slope: Tensor) -> list[Tensor]:
    """Scores, and the gradients of the hidden states and of what the head trains."""
    leaf = hidden.clone().requires_grad_()
    head.module.zero_grad(set_to_none=True)
    logp = score(leaf)
    logp.backward(slope)
    grads = [leaf.grad, *(p.grad for p in head.module.parameters() if p.requires_grad)]
    assert all(g is not None for g in grads)
    return [logp.detach(), *(g for g in grads if g is not None)]


@trained_or_frozen
@pytest.mark.parametrize("temperature", [1.0, 1.2, 0.3])
@pytest.mark.parametrize("num_rows", [1, 2, 4, 10, 11, 100])
def test_values_and_gradients_are_those_of_the_plain_way_for_any_chunk(
    num_rows: int, temperature: float, is_trained: bool
) -> None:
    head, (hidden, line, targets, slope) = make_head(is_trained), make_tokens()
    expected = gradients(head, lambda h: by_hand(head, h, line, targets, temperature), hidden, slope)
    found = gradients(
        head,
        lambda h: token_logp(head, h, line, targets, temperature, chunk_logits=num_rows * TOKENS),
        hidden,
        slope,
    )
    assert len(found) == 2 + is_trained
    assert torch.isneginf(found[0]).nonzero().flatten().tolist() == [6, 10], "MASK, and a row that no token names"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert (found[1][3] == 0).all(), "nobody asked for row 3"


@trained_or_frozen
def test_one_chunk_is_the_plain_operations_to_the_last_bit(is_trained: bool) -> None:
    head, (hidden, line, targets, _) = make_head(is_trained), make_tokens()
    logits = head.module(hidden)
    logits[:, [MASK_ID, *range(TOKENS, HEAD_ROWS)]] = -torch.inf
    expected = torch.log_softmax(logits / 1.2, dim=-1)[line, targets]
    assert torch.equal(token_logp(head, hidden, line, targets, 1.2, chunk_logits=ROWS * TOKENS), expected)


@trained_or_frozen
def test_the_gradient_agrees_with_finite_differences(is_trained: bool) -> None:
    head, (hidden, line, targets, _) = make_head(is_trained, dtype=torch.float64), make_tokens(torch.float64)
    is_named = (targets != MASK_ID) & (targets < TOKENS)
    hidden.requires_grad_()
    weight = head.module.weight
    assert isinstance(weight, Tensor)

    def score(h: Tensor, _: Tensor) -> Tensor:
        return token_logp(head, h, line[is_named], targets[is_named], 0.7, chunk_logits=3 * TOKENS)

    assert torch.autograd.gradcheck(score, (hidden, weight))


class Counting:
    """The most elements of any tensor that autograd keeps."""

    def __init__(self) -> None:
        self.most = 0

    def __enter__(self) -> Counting:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._seen, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _seen(self, tensor: Tensor) -> Tensor:
        self.most = max(self.most, tensor.numel())
        return tensor


@trained_or_frozen
def test_nothing_of_the_size_of_the_logits_is_kept(is_trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head, (hidden, line, targets, slope) = make_head(is_trained), make_tokens()
    sizes: list[int] = []
    plain = vocabulary._row_logp

    def spy(head: OutputHead, hidden: Tensor, matrix: Tensor, temperature: float) -> Tensor:
        sizes.append(len(hidden))
        return plain(head, hidden, matrix, temperature)

    monkeypatch.setattr(vocabulary, "_row_logp", spy)
    with Counting() as kept:
        token_logp(head, hidden.requires_grad_(), line, targets, chunk_logits=4 * TOKENS).backward(slope)
    assert kept.most == WIDTH * HEAD_ROWS, "the weight, which is there anyway"
    # A frozen head needs its logits once: the mean of its rows is taken while they are there.
    assert sizes == ([4, 4, 3] * 2 if is_trained else [4, 4, 3])
    with Counting() as kept:
        token_logp(head, hidden, line, targets, chunk_logits=ROWS * TOKENS)
    assert kept.most == ROWS * HEAD_ROWS, "the plain way keeps them"


@trained_or_frozen
def test_a_head_that_is_more_than_a_matrix_is_recomputed_chunk_by_chunk(is_trained: bool) -> None:
    head = make_head(is_trained, nn.Linear(WIDTH, HEAD_ROWS, bias=True))
    hidden, line, targets, slope = make_tokens()
    assert head.plain_weight is None
    expected = gradients(head, lambda h: by_hand(head, h, line, targets, 1.2), hidden, slope)

    def score(h: Tensor) -> Tensor:
        return token_logp(head, h, line, targets, 1.2, chunk_logits=3 * TOKENS)

    with Counting() as kept:
        found = gradients(head, score, hidden, slope)
    # The chunks of the backward pass are counted, too: three rows each.
    assert kept.most <= WIDTH * HEAD_ROWS
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_only_a_bare_matrix_is_taken_for_one() -> None:
    head = make_head(True)
    assert head.plain_weight is head.module.weight
    handle = head.module.register_forward_hook(lambda module, arguments, output: 2 * output)
    assert head.plain_weight is None
    handle.remove()
    assert make_head(True, nn.Sequential(nn.Linear(WIDTH, HEAD_ROWS, bias=False))).plain_weight is None


def test_in_bfloat16_the_product_is_rounded_and_the_statistics_are_not() -> None:
    """Over all tokens the probabilities of a row add up to 1 within 1e-6; bfloat16 itself has 8 bits."""
    plain = make_head(True)
    head = OutputHead(module=plain.module, mask_id=MASK_ID, num_tokens=TOKENS, compute_dtype=torch.bfloat16)
    hidden, *_ = make_tokens()
    line = torch.arange(ROWS).repeat_interleave(TOKENS)
    targets = torch.arange(TOKENS).repeat(ROWS)
    slope = torch.randn(len(line), generator=torch.Generator().manual_seed(3))
    slope[targets == MASK_ID] = 0.0
    exact, one_chunk, chunks = (
        gradients(h, lambda x, h=h, size=size: token_logp(h, x, line, targets, chunk_logits=size), hidden, slope)
        for h, size in ((plain, ROWS * TOKENS), (head, ROWS * TOKENS), (head, 4 * TOKENS))
    )
    for found in (one_chunk, chunks):
        assert [t.dtype for t in found] == [torch.float32] * 3
        totals = found[0].reshape(ROWS, TOKENS).exp().sum(-1)
        torch.testing.assert_close(totals, torch.ones(ROWS), atol=2e-6, rtol=0)
        assert not torch.equal(found[0], exact[0])
        for one, other in zip(found[1:], exact[1:], strict=True):
            torch.testing.assert_close(one, other, atol=0.15, rtol=0.05)
    torch.testing.assert_close(chunks[0], one_chunk[0], atol=1e-5, rtol=1e-5)


def test_scores_without_a_gradient_are_the_same() -> None:
    head, (hidden, line, targets, _) = make_head(False), make_tokens()
    with torch.no_grad():
        quiet = token_logp(head, hidden, line, targets, chunk_logits=4 * TOKENS)
    assert not quiet.requires_grad
    assert torch.equal(quiet, token_logp(head, hidden.requires_grad_(), line, targets, chunk_logits=4 * TOKENS))


# --- through the policy -------------------------------------------------------------------------------------------


def scored(policy: Policy, estimator: Estimator) -> dict[str, Tensor]:
    """The estimate and every gradient of a sum of it."""
    batch = make_batch([4] * 5, [6, 5, 6, 2, 1], shared_prompt=True)
    stream = torch.Generator().manual_seed(0)
    weights = torch.randn(batch.valid.shape, generator=stream)
    policy.model.zero_grad(set_to_none=True)
    scores = estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator, 1.2)
    (scores * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    return {"scores": scores.detach()} | grads


@pytest.mark.parametrize("kind", ["untied", "tied", "adapter", "adapter on the head"])
@pytest.mark.parametrize("post_eos", ["kept", "mask"])
def test_scores_and_gradients_of_a_policy_do_not_depend_on_the_chunk(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, kind: str, post_eos: str
) -> None:
    policy = tiny_policy(tie_word_embeddings=kind == "tied")
    if kind.startswith("adapter"):
        targets = ("q_proj", "lm_head") if kind.endswith("head") else ("q_proj", "down_proj")
        policy = add_adapter(policy, rank=2, alpha=4.0, targets=targets, seed=0)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    assert (policy.head.plain_weight is None) == (kind == "adapter on the head")
    estimator = Estimator(post_eos=post_eos)
    expected = scored(policy, estimator)
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", {"cpu": 3 * 42, "cuda": 3 * 42})
    found = scored(policy, estimator)
    assert found.keys() == expected.keys()
    assert len(found) >= 5
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert expected[name].abs().max() > 1e-4
