"""Recomputed layers: the same gradients from less memory, for every kind of policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.estimator_cases import open_toy_run
from helpers.toys import MakePolicy, global_random_states, make_batch
from torch import Tensor

from coupled.rl.estimators.draw import draw_masks
from coupled.rl.estimators.score import estimate_logp
from coupled.rl.model.gradient_checkpointing import checkpoint_gradients
from coupled.rl.model.loading import add_adapter, load_policy
from coupled.rl.model.policy import Policy
from coupled.rl.model.reference import ReferenceKind, keep_reference
from coupled.rl.model.weights import save_policy
from coupled.rl.recipe.objective import Estimator

KEY = (0, "mask", 1, 0)
# peft asks transformers for a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def kept_elements(policy: Policy) -> tuple[dict[str, Tensor], int]:
    """Scores and gradients of an estimate, and how many elements autograd keeps for the backward pass."""
    batch, estimator = make_batch(), Estimator()
    storages: dict[int, int] = {}

    def seen(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    policy.model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        scores = estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator)
    kept = sum(size for pointer, size in storages.items() if pointer not in parameters)
    (scores * batch.advantages[:, None]).sum().backward()
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    return {"scores": scores.detach()} | found, kept


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["all weights", "tied", "adapter", "bfloat16"])
def test_gradients_are_those_without_it_and_less_is_kept(
    tiny_policy: MakePolicy, attention: str, kind: str, tmp_path: Path
) -> None:
    policy = tiny_policy(tie_word_embeddings=kind == "tied", num_hidden_layers=6)
    policy.model.set_attn_implementation(attention)
    if kind == "adapter":
        policy = add_adapter(policy, rank=2, alpha=4.0, targets=("q_proj", "down_proj"), seed=0)
    if kind == "bfloat16":
        save_policy(policy, tmp_path)
        policy = load_policy(tmp_path, compute_dtype=torch.bfloat16)
    expected, much = kept_elements(policy)
    before = global_random_states()
    checkpoint_gradients(policy)
    found, little = kept_elements(policy)
    assert global_random_states() == before
    assert not policy.model.training, "dropout, where a configuration names one, stays off"
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert any(g.abs().max() > 1e-3 for name, g in expected.items() if name != "scores")
    assert little < 0.4 * much


def count_calls(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often the first layer computes."""
    calls = [0]
    first = next(iter(policy.layers))
    attention = first.self_attn.forward

    def counting(*arguments: object, **named: object) -> object:
        calls[0] += 1
        return attention(*arguments, **named)

    monkeypatch.setattr(first.self_attn, "forward", counting)
    return lambda: calls[0]


def test_layers_are_computed_again_in_the_backward_pass_and_only_there(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, batch, estimator = tiny_policy(), make_batch(), Estimator(name="full_mask")
    draw = draw_masks(batch, estimator, KEY)
    checkpoint_gradients(policy)
    calls = count_calls(policy, monkeypatch)
    with torch.no_grad():
        estimate_logp(policy, batch, draw, estimator)
    assert calls() == 1
    scores = estimate_logp(policy, batch, draw, estimator)
    assert calls() == 2
    scores.sum().backward()
    assert calls() == 3


@pytest.mark.parametrize("has_adapter", [False, True])
@pytest.mark.parametrize("is_moving", [False, True])
def test_a_reference_keeps_its_own_weights_whichever_comes_first(
    tiny_policy: MakePolicy, has_adapter: bool, is_moving: bool
) -> None:
    """A copied layer must recompute itself, and with adapters turned off they stay off."""
    batch, estimator = make_batch(), Estimator(name="full_mask")
    draw = draw_masks(batch, estimator, KEY)
    kind: ReferenceKind = "moving" if is_moving else "adapter_off" if has_adapter else "frozen"
    for is_frozen_first in (True, False):
        policy = tiny_policy()
        if has_adapter:
            policy = add_adapter(policy, rank=2, alpha=4.0, targets=("q_proj", "down_proj"), seed=0)
        with torch.no_grad():
            start = estimate_logp(policy, batch, draw, estimator)
        if is_frozen_first:
            kept = keep_reference(policy, kind)
        checkpoint_gradients(policy)
        if not is_frozen_first:
            kept = keep_reference(policy, kind)
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.add_(0.1)
            moved = estimate_logp(policy, batch, draw, estimator)
            with kept.policy() as frozen:
                reference = estimate_logp(frozen, batch, draw, estimator)
        assert torch.equal(reference, start)
        assert not torch.allclose(moved, start, atol=1e-2)
        estimate_logp(policy, batch, draw, estimator).sum().backward()
        assert all(p.grad is not None for p in policy.trainable_parameters())


@pytest.mark.parametrize("is_wanted", [False, True])
def test_the_recipe_turns_it_on(tiny_policy: MakePolicy, tmp_path: Path, is_wanted: bool) -> None:
    policy = tiny_policy()
    expected, much = kept_elements(policy)
    open_toy_run(policy, tmp_path, Estimator(), optimizer={"has_gradient_checkpointing": is_wanted})
    found, kept = kept_elements(policy)
    assert (kept < much) == is_wanted
    for name in expected:
        assert torch.equal(found[name], expected[name])
