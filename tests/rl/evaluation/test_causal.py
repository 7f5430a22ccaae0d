"""The causal control arm against the plain loop: one row, no cache, no padding."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toys import global_random_states, make_recipe, make_requests

from coupled.rl.errors import CheckpointError
from coupled.rl.evaluation.benchmarks.command import open_arm
from coupled.rl.evaluation.causal import CausalEngine, CausalModel, is_causal_checkpoint
from coupled.rl.keys import uniform
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import completion_length
from coupled.rl.rollout.distributions import draw_tokens, nucleus
from coupled.rl.rollout.sampler import Request
from coupled.rl.types import Rollout

CANVAS = 7
MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(tiny_folder: MakeFolder) -> Path:
    """A tiny checkpoint that says nothing of diffusion."""
    path = tiny_folder(end_scale=3.0, is_causal=True)
    config = json.loads((path / "config.json").read_text())
    for name in ("diffusion", "mask_token_id", "is_causal"):
        config.pop(name, None)
    (path / "config.json").write_text(json.dumps(config))
    return path


def sampler(temperature: float, top_p: float = 1.0) -> Sampler:
    return Sampler(canvas=CANVAS, denoising_steps=CANVAS, temperature=temperature, top_p=top_p)


@torch.no_grad()
def plain(model: CausalModel, request: Request, how: Sampler, seed: int) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities, one full forward pass per token."""
    ids, logps = list(request.prompt_ids), []
    draws = torch.from_numpy(uniform((CANVAS,), seed, "autoregressive", request.uid))
    for place in range(CANVAS):
        logits = model.model(input_ids=torch.tensor([ids])).logits[0, -1:].float()
        logp = torch.log_softmax(nucleus(logits / (how.temperature or 1.0), how.top_p), -1)
        token = int(draw_tokens(logp, draws[place : place + 1])) if how.temperature else int(logp.argmax())
        ids.append(token)
        logps.append(float(logp[0, token]))
        if token in model.end_ids:
            break
    return ids[len(request.prompt_ids) :], logps


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_generation_is_that_of_the_plain_loop_whatever_the_batch(
    folder: Path, temperature: float, top_p: float
) -> None:
    model, how, requests = CausalModel(folder), sampler(temperature, top_p), make_requests(6)
    expected = [plain(model, request, how, seed=3) for request in requests]
    assert len({tuple(tokens) for tokens, _ in expected}) > 1
    for batch_size in (1, 4):
        made = CausalEngine(model, batch_size).generate(requests, how, seed=3)
        assert [r.uid for r in made] == [r.uid for r in requests]
        for rollout, (tokens, logps) in zip(made, expected, strict=True):
            length = rollout.completion_length
            assert rollout.canvas_ids[:length].tolist() == tokens
            np.testing.assert_allclose(rollout.commit_logp[:length], logps, atol=1e-5)


def test_a_rollout_is_written_from_left_to_right_and_ends_at_its_end_token(folder: Path) -> None:
    model = CausalModel(folder)
    rollouts: list[Rollout] = CausalEngine(model, 4).generate(make_requests(24), sampler(1.0), seed=0)
    assert {r.finish_reason for r in rollouts} == {"end", "length"}
    for rollout in rollouts:
        length, has_end = completion_length(rollout.canvas_ids[: rollout.completion_length], model.end_ids)
        assert length == rollout.completion_length
        assert rollout.finish_reason == ("end" if has_end else "length")
        assert rollout.commit_step[:length].tolist() == list(range(length))
        assert (rollout.commit_step[length:] == -1).all()
        assert len(rollout.canvas_ids) == CANVAS


def test_generation_leaves_the_global_generators_alone(folder: Path) -> None:
    engine = CausalEngine(CausalModel(folder), 4)
    torch.rand(1)
    random.random()
    before = global_random_states()
    engine.generate(make_requests(3), sampler(1.0), seed=0)
    assert global_random_states() == before


def test_settings_of_the_checkpoint_do_not_change_the_distribution(folder: Path) -> None:
    """A generation_config.json with a repetition penalty, top-k and sampling is overruled."""
    expected = CausalEngine(CausalModel(folder), 4).generate(make_requests(4), sampler(0.0), seed=0)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    settings |= {"do_sample": True, "repetition_penalty": 5.0, "top_k": 3, "top_p": 0.1, "temperature": 0.2}
    path.write_text(json.dumps(settings))
    found = CausalEngine(CausalModel(folder), 4).generate(make_requests(4), sampler(0.0), seed=0)
    assert [r.canvas_ids.tolist() for r in found] == [r.canvas_ids.tolist() for r in expected]


def test_a_causal_checkpoint_is_told_from_a_diffusion_one(folder: Path, tiny_folder: MakeFolder) -> None:
    diffusion = tiny_folder("other")
    assert is_causal_checkpoint(folder)
    assert not is_causal_checkpoint(diffusion)
    assert not is_causal_checkpoint(folder.parent)
    recipe = make_recipe()
    assert open_arm(folder, recipe).kind == "autoregressive"
    assert open_arm(diffusion, recipe).kind == "diffusion"
    assert open_arm(diffusion, recipe, is_autoregressive=True).kind == "autoregressive"


def test_a_checkpoint_that_says_it_looks_both_ways_is_run_causally_when_asked(tiny_folder: MakeFolder) -> None:
    """As the autoregressive stage of this project saves it: a later token must not change what came before."""
    model = CausalModel(tiny_folder())
    with torch.no_grad():
        one, two = (model.model(input_ids=torch.tensor([[5, 6, 7, last]])).logits[0, 2] for last in (8, 9))
    assert torch.equal(one, two)


@pytest.mark.parametrize("arm", ["diffusion", "autoregressive"])
def test_a_checkpoint_without_an_end_token_is_refused(tiny_folder: MakeFolder, arm: str) -> None:
    path = tiny_folder()
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"names no end token.*eos_token.*tokenizer_config\.json"):
        open_arm(path, make_recipe(), is_autoregressive=arm == "autoregressive")
