"""The control arm of an evaluation: a causal language model under the same prompts, judge and keyed random numbers.

`generate` of transformers decodes; `KeyedChoice` picks each token with the uniform number of its (seed,
uid, position), so completions do not depend on the batch and no global generator is touched.

Shapes: B rows, V vocabulary (see `shapes`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from coupled.rl.errors import CheckpointError
from coupled.rl.keys import uniform
from coupled.rl.model.families import family_of
from coupled.rl.model.loading import ADAPTER_CONFIG, load_tokenizer, require_end_token
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import completion_length, make_rollout
from coupled.rl.rollout.distributions import draw_tokens, nucleus
from coupled.rl.rollout.engine import request_chunks
from coupled.rl.rollout.sampler import Request
from coupled.rl.shapes import Float
from coupled.rl.types import Rollout


def is_causal_checkpoint(path: Path | str) -> bool:
    """True for the checkpoint of an ordinary causal language model, without a diffusion family or a mask token.

    Adapter folders and hub names count as diffusion models; --autoregressive overrides this.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file():
        return False
    config = json.loads((folder / "config.json").read_text())
    if config.get("mask_token_id") is not None or config.get("auto_map"):
        return False
    try:
        family_of(config)
    except CheckpointError:
        return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ())
    return False


class CausalModel:
    """A causal language model with its tokenizer.

    Raises:
        CheckpointError: the checkpoint cannot be opened, or its tokenizer names no end token.
    """

    def __init__(self, path: Path | str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        try:
            config = AutoConfig.from_pretrained(path)
            config.is_causal = True  # a checkpoint of this project may state bidirectional attention
            model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
            self.tokenizer: Any = load_tokenizer(path)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot open {path} as a causal language model: {error}") from error
        require_end_token(self.tokenizer, path)
        self.model: Any = model.to(device).eval()
        self.end_ids = tuple(sorted({int(self.tokenizer.eos_token_id), *_listed(model.generation_config.eos_token_id)}))
        pad = self.tokenizer.pad_token_id
        self.pad_id = int(self.tokenizer.eos_token_id if pad is None else pad)
        # The checkpoint's own settings may sample, penalise or suppress; only the sampler's settings must apply.
        self.model.generation_config = GenerationConfig(eos_token_id=list(self.end_ids), pad_token_id=self.pad_id)


class CausalEngine:
    """A rollout engine that decodes from left to right. It uses `canvas`, `temperature` and `top_p` of the sampler."""

    def __init__(self, model: CausalModel, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int) -> list[Rollout]:
        """One rollout per request, in the order of the requests; position k is committed at step k."""
        made: dict[str, Rollout] = {}
        for chunk in request_chunks(requests, self._batch_size):
            made.update((rollout.uid, rollout) for rollout in _generate(self._model, chunk, sampler, seed))
        return [made[request.uid] for request in requests]

    def load_weights(self, policy: Policy, version: int) -> None:
        raise NotImplementedError("the control arm is evaluated, not trained")

    def close(self) -> None:
        """There is nothing to release."""


class KeyedChoice(LogitsProcessor):
    """Allows one token per row: the likeliest at temperature 0, else the one drawn with the row's random number."""

    def __init__(self, requests: list[Request], sampler: Sampler, seed: int, first: int) -> None:
        self._sampler = sampler
        self._first = first
        shape = (sampler.canvas,)
        draws = np.stack([uniform(shape, seed, "autoregressive", r.uid) for r in requests])
        self._draws = torch.from_numpy(draws)
        self.logp: list[Tensor] = []
        self.entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        temperature, place = self._sampler.temperature, input_ids.shape[1] - self._first
        logits = scores.float()
        logp = torch.log_softmax(nucleus(logits / temperature if temperature else logits, self._sampler.top_p), -1)
        chosen = draw_tokens(logp, self._draws[:, place].to(logp.device)) if temperature else logp.argmax(-1)
        self.logp.append(logp.gather(-1, chosen[:, None])[:, 0].cpu())
        self.entropy.append(-(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1).cpu())
        return torch.full_like(scores, float("-inf")).scatter(-1, chosen[:, None], 0.0)


@torch.no_grad()
def _generate(model: CausalModel, requests: list[Request], sampler: Sampler, seed: int) -> list[Rollout]:
    longest = max(len(r.prompt_ids) for r in requests)
    pads = [longest - len(r.prompt_ids) for r in requests]
    device = model.model.device
    rows = [[model.pad_id] * pad + list(r.prompt_ids) for pad, r in zip(pads, requests, strict=True)]
    seen = [[0] * pad + [1] * (longest - pad) for pad in pads]
    choice = KeyedChoice(requests, sampler, seed, longest)
    out = model.model.generate(
        input_ids=torch.tensor(rows, device=device),
        attention_mask=torch.tensor(seen, device=device),
        do_sample=False,
        max_new_tokens=sampler.canvas,
        logits_processor=LogitsProcessorList([choice]),
    )
    written = out[:, longest:].cpu().numpy()
    logp = torch.stack(choice.logp, 1).numpy()
    entropy = torch.stack(choice.entropy, 1).numpy()
    return [
        _rollout(model, request, written[row], logp[row], entropy[row], sampler) for row, request in enumerate(requests)
    ]


def _rollout(
    model: CausalModel, request: Request, ids: np.ndarray, logp: np.ndarray, entropy: np.ndarray, sampler: Sampler
) -> Rollout:
    length, _ = completion_length(ids, model.end_ids)
    canvas_ids = np.full(sampler.canvas, model.pad_id, dtype=np.int64)
    canvas_ids[:length] = ids[:length]
    step = np.full(sampler.canvas, -1, dtype=np.int32)
    step[:length] = np.arange(length)
    kept = [np.zeros(sampler.canvas, dtype=np.float32) for _ in range(2)]
    for array, values in zip(kept, (logp, entropy), strict=True):
        array[:length] = values[:length]
    return make_rollout(
        model, request, canvas_ids, step, kept[0], kept[1], num_forwards=length, weight_version=0, sampler=sampler
    )


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
