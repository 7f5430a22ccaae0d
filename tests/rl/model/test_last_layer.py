"""The last layer for the columns that are read gives what the whole layer gives there, in every class that it knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.toys import MakePolicy, make_requests
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import coupled.rl.model.policy
from coupled.rl.model.attention import left_padded, may_attend
from coupled.rl.model.families import Family
from coupled.rl.model.last_layer import is_known, only, read_columns
from coupled.rl.model.loading import add_adapter
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import denoise

CLASSES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2, a key for each query": {"num_key_value_heads": 4},
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {},
    "qwen3, biases and wide heads": {"attention_bias": True, "head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1},
}


def random_policy(name: str, tokenizer: PreTrainedTokenizerFast, shift: int, attention: str = "eager") -> Policy:
    """Three layers of a class of transformers, with weights such that attention matters."""
    model_type = name.split(",")[0]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        is_causal=False,
        use_cache=False,
        eos_token_id=1,
        pad_token_id=0,
        **{"num_key_value_heads": 2} | CLASSES[name],
    )
    config._attn_implementation = attention
    stream = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.3)
            else:
                parameter.normal_(0.0, 0.25, generator=stream)
    return Policy(model, tokenizer, Family(name="dream", model_type=model_type, shift=shift))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, paddings and places to predict: rows of several lengths, of which several are asked for, or one, or none."""
    ids = torch.randint(4, 42, (4, 11), generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    wanted[0, 4:] = True
    wanted[1, [5, 8, 10]] = True
    wanted[2, 10] = True
    return ids, torch.tensor([0, 3, 1, 4]), wanted


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_logits_are_those_of_the_whole_layer(
    tiny_tokenizer: PreTrainedTokenizerFast, name: str, shift: int, attention: str
) -> None:
    policy = random_policy(name, tiny_tokenizer, shift, attention)
    if "moe" not in name:  # torch has no grouped product in fp64
        policy.model.double()
    head: Any = policy.model.lm_head
    ids, pad_lengths, wanted = batch()
    for pads in (pad_lengths, torch.zeros_like(pad_lengths)):
        plain, found = policy.hidden_at(ids, pads, wanted), policy.hidden_read(ids, pads, wanted)
        assert found.shape == plain.shape
        # Norms round to fp32 in between, whatever the weights are.
        torch.testing.assert_close(head(found), head(plain), atol=3e-6 if "moe" not in name else 1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_layer_runs_on_the_columns_that_are_read_and_whole_where_its_class_is_unknown(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids, pad_lengths, wanted = batch()
    pad_lengths.zero_()
    for name, columns in (("qwen2", 7), ("glm4_moe", 11)):
        policy = random_policy(name, tiny_tokenizer, 1)
        *_, last = policy.layers
        assert is_known(last) == (columns == 7)
        seen: list[torch.Size] = []
        last.mlp.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0].shape))
        policy.hidden_read(ids, pad_lengths, wanted)
        assert seen == [(4, columns, 32)]
        policy.hidden_at(ids, pad_lengths, wanted)
        assert seen[1] == (4, 11, 32), "nothing is left behind"


@torch.no_grad()
def test_adapters_of_the_last_layer_are_applied(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    policy = add_adapter(policy, rank=2, alpha=4.0, targets=("q_proj", "k_proj", "v_proj", "down_proj"), seed=0)
    for parameter in policy.trainable_parameters():
        parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(3))
    ids, pad_lengths, wanted = batch()
    plain = policy.hidden_at(ids, pad_lengths, wanted)
    torch.testing.assert_close(policy.hidden_read(ids, pad_lengths, wanted), plain, atol=1e-5, rtol=1e-5)
    with policy.model.disable_adapter():  # type: ignore[operator]
        assert not torch.allclose(policy.hidden_read(ids, pad_lengths, wanted), plain, atol=1e-3)


@torch.no_grad()
def test_a_mask_that_differs_from_query_to_query_goes_with_the_queries(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(block_length=4)
    ids, pad_lengths, wanted = batch()
    layout = left_padded(pad_lengths, ids.shape[1])
    allowed = may_attend(layout, layout, block_length=4)
    plain = policy.hidden_after(ids, layout.position, allowed)[wanted]
    columns, is_there = read_columns(wanted)
    *_, last = policy.layers
    with only(last, columns):
        found = policy.hidden_after(ids, layout.position, allowed)[is_there]
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_columns_are_found_in_order_and_filled_up() -> None:
    columns, is_there = read_columns(torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.bool))
    assert columns.tolist() == [[1, 2], [0, 1]]
    assert is_there.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("order", ["entropy", "origin"])
def test_completions_are_those_of_the_whole_layer(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    policy, requests = tiny_policy(end_scale=1.5), make_requests(9)
    sampler = Sampler(canvas=10, denoising_steps=10, temperature=1.0, order=order)
    found = denoise(policy, requests, sampler, seed=0)
    monkeypatch.setattr(coupled.rl.model.policy, "is_known", lambda _: False)
    for mine, its in zip(found, denoise(policy, requests, sampler, seed=0), strict=True):
        assert mine.canvas_ids.tolist() == its.canvas_ids.tolist()
        assert mine.commit_step.tolist() == its.commit_step.tolist()
