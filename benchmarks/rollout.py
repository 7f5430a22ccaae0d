"""The cost of rollouts against the published loop: tokens a second, forwards, memory, and that the tokens are the same.

    python benchmarks/rollout.py         # CPU, some minutes; docs/results/rollout.json and .md
    python benchmarks/rollout.py --gpu   # 7.6 B parameters with random weights on one GPU, under eight minutes
    python benchmarks/rollout.py --gpu --toy   # the same code at toy size on a CPU, which says nothing of speed
    python benchmarks/rollout.py --rounds 1 --arms reference "reference, sorted nucleus" --write /tmp/rollout

The published loop is written below from its description: every step computes all positions and their logits, shifts
them, sorts the nucleus of every masked position and draws a token for each. Ours is the code of a run; arms leave one
part of it out. Arms take turns; a ratio is of two times of the same round. For blocks the baseline computes everything
before the block anew in every step.

On a GPU sixteen steps stand for 256: each commits sixteen tokens a row, so that the shares of masked positions
are the same as in the whole loop, and the time is multiplied by sixteen. What a step of an arm does that depends on the
earlier ones is run whole, once. At half of what an H200 can do (the floors are in the table) a step of ten rows takes
.17 s: 12 arms in 3 rounds of 16 steps, 98 s; 4 whole arms, 100 s; 64 rows, 4 arms of 16 steps of 1.1 s, 70 s; blocks
and profiles, 30 s; drawing the weights, 30 s: 330 s. After `GPU_SECONDS` no further arm is begun, and the page says
which were left out. `--gpu` has not been run on a GPU: none was there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from harness.arms import Arm as AnyArm
from harness.arms import alternate, in_child, memory_now, memory_peak, synchronize, timed
from harness.models import (
    DREAM_7B,
    FIRST_TOKEN,
    MASK_ID,
    PAD_ID,
    compute_dtype,
    embedded,
    shape,
)
from harness.models import random_policy as random_policy_of
from harness.report import RESULTS, conditions, hardware, read_report, whole_help, write_report
from harness.tables import held, spread, table
from torch import Tensor

from coupled.rl.model import vocabulary
from coupled.rl.model.families import FAMILIES
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import PRESETS, Sampler
from coupled.rl.rollout import readout
from coupled.rl.rollout.denoise import keyed_draws
from coupled.rl.rollout.distributions import draw_tokens
from coupled.rl.rollout.engine import policy_engine, roll_out
from coupled.rl.rollout.readout import chunks
from coupled.rl.rollout.sampler import Request, Step, plan_steps, unmask_counts
from coupled.rl.types import Rollout

SHAPES = {
    "small": shape(32768, 512, 1408, 6, 8, 4),
    "toy": shape(512, 32, 64, 2, 4, 2),
    "dream-7b": DREAM_7B,
}
TEMPERATURE, SEED = 1.0, 0
LOGIT_SPREAD = 5.0
"""Standard deviation of the logits: with it some positions are sure and some are not, as with trained models."""
LEAST_SPEEDUP = 2.0
PEAK_FLOPS, PEAK_BYTES = 790e12, 4.3e12
"""Of one H200, a second (docs/method.md, section 6): floors are at 100 % of it."""
GPU_SECONDS = 400
GPU_STEPS = 16


# --- the published loop, from its description -------------------------------------------------------------------------


@torch.no_grad()
def published_loop(policy: Policy, requests: list[Request], sampler: Sampler, draw: Callable[..., Tensor]) -> Tensor:
    """Canvases [B, C]. `draw(logp, step, is_masked)` gives a token for every masked position."""
    longest = max(len(r.prompt_ids) for r in requests)
    rows = [
        [PAD_ID] * (longest - len(r.prompt_ids)) + list(r.prompt_ids) + [MASK_ID] * sampler.canvas for r in requests
    ]
    x = torch.tensor(rows, device=policy.device)
    pads = torch.tensor([longest - len(r.prompt_ids) for r in requests], device=policy.device)
    place = torch.arange(x.shape[1], device=policy.device) - pads[:, None]
    dtype: Any = policy.model.dtype
    mask = torch.zeros((len(x), 1, 1, x.shape[1]), dtype=dtype, device=x.device)
    mask = mask.masked_fill((place < 0)[:, None, None], torch.finfo(dtype).min)
    for step, count in enumerate(unmask_counts(sampler.canvas, sampler.denoising_steps)):
        is_masked = x == MASK_ID
        logits = policy.model(input_ids=x, attention_mask=mask, position_ids=place.clamp(min=0)).logits
        logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)[is_masked]
        logits[:, MASK_ID] = -torch.inf
        logits[:, policy.num_vocabulary :] = -torch.inf
        if sampler.temperature:
            logits = logits / sampler.temperature
        if sampler.top_p < 1:
            ordered, order = torch.sort(logits, descending=True)
            is_out = ordered.softmax(-1).cumsum(-1) > sampler.top_p
            is_out[:, 1:] = is_out[:, :-1].clone()
            is_out[:, 0] = False
            is_out = torch.zeros_like(is_out).scatter(-1, order, is_out)
            logits = logits.masked_fill(is_out, torch.finfo(logits.dtype).min)
        p = logits.softmax(-1)
        tokens = draw(p, step, is_masked) if sampler.temperature else p.argmax(-1)
        confidence = torch.full(x.shape, -torch.inf, dtype=p.dtype, device=x.device)
        confidence[is_masked] = (p * (p + 1e-10).log()).sum(-1)
        proposed = x.clone()
        proposed[is_masked] = tokens
        chosen = confidence.topk(count, dim=-1).indices
        x.scatter_(1, chosen, proposed.gather(1, chosen))
    return x[:, longest:]


def drawn_by_torch(p: Tensor, step: int, is_masked: Tensor) -> Tensor:
    """As published."""
    return torch.distributions.Categorical(probs=p, validate_args=False).sample()


def drawn_by_key(requests: list[Request], sampler: Sampler) -> Callable[..., Tensor]:
    """With the random numbers of our rollouts, so that the tokens can be compared."""
    draws = keyed_draws(requests, sampler, SEED)[0]

    def draw(p: Tensor, step: int, is_masked: Tensor) -> Tensor:
        row, place = is_masked[:, -sampler.canvas :].nonzero(as_tuple=True)
        return draw_tokens(p.log(), draws[row.cpu(), step, place.cpu()].to(p.device))

    return draw


# --- the parts that an arm leaves out ---------------------------------------------------------------------------------


def sorted_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The nucleus by sorting."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    return logits.masked_fill(torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > top_p), -torch.inf)


def read_and_draw_everything(head: Any, hidden: Tensor, sampler: Sampler, tokens: Tensor, *others: Tensor) -> Any:
    """A token for every position, before any is chosen."""
    which = others[-1]
    read = hidden[which]
    drawn = [readout.choose_tokens(head, read[part], sampler, tokens[part]) for part in readout.chunks(head, read)]
    found = readout.Choice.joined(drawn)
    return readout.Reading(
        confidence=-found.entropy,
        entropy=found.entropy,
        best_probability=torch.zeros_like(found.logp),
        best_token=None,
        tokens=found.tokens,
        which=which,
    )


def all_steps(sampler: Sampler) -> list[Step]:
    """With those that commit nothing."""
    known = {step.number: step for step in plan_steps(sampler)}
    whole = slice(0, sampler.canvas)
    return [
        known.get(i) or Step(number=i, block=whole, count=0, is_refresh=False) for i in range(sampler.denoising_steps)
    ]


def every_row(policy: Policy, ids: Tensor, pad_lengths: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of all positions are made as well; only the wanted ones are used."""
    everywhere = torch.ones_like(wanted)
    everywhere[:, : policy.family.shift] = False
    hidden = policy.hidden_at(ids, pad_lengths, everywhere)
    for rows in chunks(policy.head, hidden):
        vocabulary.project(policy.head, hidden[rows])
    return hidden, wanted[everywhere].nonzero()[:, 0]


class _Heads:
    """In the place of a cache: the whole prompt blocks, which are of one length."""

    def __init__(self, requests: list[Request], start: Tensor) -> None:
        heads = [request.prompt_ids[:size] for request, size in zip(requests, start.tolist(), strict=True)]
        self.ids = torch.tensor(heads, dtype=torch.int64, device=start.device)

    def get_seq_length(self) -> int:
        return 1  # as if it held something, so that no real cache is put in its place

    def batch_select_indices(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]


def states_anew(
    policy: Policy, line: Any, heads: _Heads, rows: Tensor, columns: slice, wanted: Tensor, _: None
) -> Tensor:
    """The states of a block from everything before it, computed again."""
    ids = torch.cat((heads.ids, line.ids[rows][:, : columns.stop]), dim=1)
    places = torch.zeros_like(ids, dtype=torch.bool)
    places[:, -wanted.shape[1] :] = wanted
    return policy.hidden_at(ids, torch.zeros_like(rows), places)


def each_row(policy: Policy, ids: Tensor, pad_lengths: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Equal inputs are computed again and again."""
    hidden = policy.hidden_read(ids, pad_lengths, wanted)
    return hidden, torch.arange(len(hidden), device=hidden.device)


@dataclass(frozen=True, kw_only=True)
class Arm(AnyArm):
    """One way to roll out. `settings` are the sampler's; `patches` stand for parts of the code."""

    baseline: str
    settings: dict[str, Any] = field(default_factory=dict)
    patches: tuple[tuple[str, Any], ...] = ()
    is_published: bool = False
    is_same: bool = True
    """The tokens are the same as its baseline's."""


NUCLEUS, WHOLE = "published loop", "published loop, top-p 1"
REFERENCE = dict(PRESETS["reference"])
NO_BOUNDS = ("coupled.rl.rollout.readout._has_bounds", lambda _: False)
LAST_LAYER, FEWEST_ROWS = "coupled.rl.model.policy.is_known", "coupled.rl.rollout.engine.FEWEST_ROWS"
READ, STATES = "coupled.rl.rollout.denoise.read_out", "coupled.rl.rollout.denoise.distinct_states"
RANDOM_ARMS = (
    Arm(name=NUCLEUS, baseline=NUCLEUS, settings=REFERENCE, is_published=True),
    Arm(name=WHOLE, baseline=WHOLE, is_published=True),
    Arm(name="reference", baseline=NUCLEUS, settings=REFERENCE),
    Arm(name="rl", baseline=WHOLE),
    Arm(name="reference, logits everywhere", baseline=NUCLEUS, settings=REFERENCE, patches=((STATES, every_row),)),
    Arm(
        name="reference, a token for every position",
        baseline=NUCLEUS,
        settings=REFERENCE,
        patches=((READ, read_and_draw_everything),),
    ),
    Arm(name="reference, no bounds", baseline=NUCLEUS, settings=REFERENCE, patches=(NO_BOUNDS,)),
    Arm(
        name="reference, sorted nucleus",
        baseline=NUCLEUS,
        settings=REFERENCE,
        patches=(("coupled.rl.rollout.readout.nucleus", sorted_nucleus),),
    ),
    Arm(
        name="reference, no bounds, sorted nucleus",
        baseline=NUCLEUS,
        settings=REFERENCE,
        patches=(NO_BOUNDS, ("coupled.rl.rollout.readout.nucleus", sorted_nucleus)),
    ),
    Arm(name="rl, nothing shared", baseline=WHOLE, patches=((STATES, each_row),)),
    Arm(
        name="rl, the last layer whole",
        baseline=WHOLE,
        patches=((LAST_LAYER, lambda _: False),),
    ),
    Arm(
        name="rl, logits of chosen positions again",
        baseline=WHOLE,
        patches=(("coupled.rl.rollout.readout.Reading.source", lambda reading, picked: (reading.which[picked], None)),),
    ),
    Arm(name="rl, empty steps run", baseline=WHOLE, patches=(("coupled.rl.rollout.denoise.plan_steps", all_steps),)),
    Arm(
        name="rl, logits not in chunks",
        baseline=WHOLE,
        patches=(("coupled.rl.rollout.readout.CHUNK_LOGITS", {"cpu": 2**60, "cuda": 2**60}),),
    ),
    Arm(name="fast", baseline=WHOLE, settings=dict(PRESETS["fast"]), is_same=False),
    Arm(name="approximate: two tokens a step", baseline=WHOLE, settings={"denoising_steps": 2}, is_same=False),
    Arm(name="approximate: threshold .9", baseline=WHOLE, settings={"confidence_threshold": 0.9}, is_same=False),
    Arm(name="approximate: prefix cache", baseline=WHOLE, settings={"cache": "prefix"}, is_same=False),
    Arm(name="approximate: dual cache", baseline=WHOLE, settings={"cache": "dual", "block_length": 8}, is_same=False),
)
OURS = "rl"
EMBEDDED_ARMS = (
    Arm(name="rl", baseline="rl"),
    Arm(name="rl, to the end of the canvas", baseline="rl", settings={"has_early_exit": False}, is_same=False),
    Arm(name="rl, lengths mixed in a batch", baseline="rl", patches=((FEWEST_ROWS, 10**9),)),
    Arm(name="rl, nothing shared", baseline="rl", patches=((STATES, each_row),)),
    Arm(name="fast", baseline="rl", settings=dict(PRESETS["fast"]), is_same=False),
)
GPU_ARMS = (
    *(arm for arm in RANDOM_ARMS if "chunks" not in arm.name),
    Arm(
        name="rl, statistics by torch",
        baseline=WHOLE,
        patches=(("coupled.rl.rollout.row_statistics.is_fused", lambda _: False),),
    ),
)
BLOCKS = "coupled.rl.rollout.denoise_blocks."
ANEW = "everything anew"
BLOCK_ARMS = (
    Arm(
        name=ANEW,
        baseline=ANEW,
        patches=(
            (BLOCKS + "_read_prompts", lambda _, requests, start, __: (_Heads(requests, start), None)),
            (BLOCKS + "_states_of_block", states_anew),
            (BLOCKS + "_commit_block", lambda *_: None),
        ),
    ),
    Arm(name="rl", baseline=ANEW),
)
"""In blocks: the exact cache, and without any."""


# --- the problems -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Requests for a policy, and how they are decoded."""

    policy: Policy
    requests: list[Request]
    sampler: Sampler
    batch_size: int

    @property
    def device(self) -> str:
        return self.policy.device.type

    def sampler_of(self, arm: Arm) -> Sampler:
        settings = dict(arm.settings)
        if "denoising_steps" in settings:  # tokens a step
            settings["denoising_steps"] = self.sampler.denoising_steps // settings["denoising_steps"]
        return self.sampler.changed(**settings)

    def generate(self, sampler: Sampler) -> list[Rollout]:
        return policy_engine(self.policy, self.batch_size).generate(self.requests, sampler, seed=SEED)


def random_policy(shape_name: str, device: str, block_length: int | None = None) -> Policy:
    """Random weights of a shape; the head such that positions differ in how sure they are. No completion ends."""
    values = SHAPES[shape_name]
    policy = random_policy_of(
        values,
        device,
        family=replace(FAMILIES["dream"], block_length=block_length, shift=0 if block_length else 1),
        weights=compute_dtype(device),
        head_width=LOGIT_SPREAD / values["hidden_size"] ** 0.5,
    )
    policy.end_ids = ()
    return policy


def random_problem(policy: Policy, group: int, prompt: int, canvas: int, steps: int) -> Problem:
    """One group."""
    ids = torch.randint(FIRST_TOKEN, policy.num_vocabulary, (prompt,), generator=torch.Generator().manual_seed(2))
    requests = [Request(uid=f"row-{i}", prompt_ids=tuple(ids.tolist())) for i in range(group)]
    sampler = Sampler(canvas=canvas, denoising_steps=steps, temperature=TEMPERATURE)
    return Problem(policy=policy, requests=requests, sampler=sampler, batch_size=group)


def embedded_problem(num_prompts: int) -> Problem:
    """A step of the quickstart: real prompts of several lengths, completions that end."""
    recipe, policy, prompts = embedded()
    chosen = [prompts[37 * i % len(prompts)] for i in range(num_prompts)]
    requests = [
        Request(uid=f"{i}/{k}", prompt_ids=p.token_ids)
        for i, p in enumerate(chosen)
        for k in range(recipe.rollout.group_size)
    ]
    sampler, batch_size = recipe.rollout.sampler, recipe.rollout.batch_size
    return Problem(policy=policy, requests=requests, sampler=sampler, batch_size=batch_size)


# --- measuring --------------------------------------------------------------------------------------------------------


@contextmanager
def prepared(arm: Arm) -> Iterator[None]:
    """The library as the arm wants it."""
    with ExitStack() as stack:
        for target, stand_in in arm.patches:
            stack.enter_context(patch(target, stand_in))
        yield


def canvases(problem: Problem, arm: Arm, *, is_keyed: bool) -> np.ndarray:
    """Canvases that the arm decodes, [B, C]."""
    sampler = problem.sampler_of(arm)
    if arm.is_published:
        draw = drawn_by_key(problem.requests, sampler) if is_keyed else drawn_by_torch
        return published_loop(problem.policy, problem.requests, sampler, draw).cpu().numpy()
    return np.stack([r.canvas_ids for r in problem.generate(sampler)])


@contextmanager
def counted(policy: Policy, found: dict[str, int]) -> Iterator[None]:
    """Positions that pass through the body, passes, and rows of logits."""
    body, head = policy._base.model, policy._base.lm_head

    def of_body(_: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        found["passes"] += 1
        found["positions"] += keywords["input_ids"].numel()

    def of_head(_: Any, arguments: tuple[Tensor, ...]) -> None:
        found["rows"] += arguments[0].shape[:-1].numel()

    hooks = (body.register_forward_pre_hook(of_body, with_kwargs=True), head.register_forward_pre_hook(of_head))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check(problem: Problem, arms: list[Arm]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Once each, with the same random numbers: counts, and the share of tokens that are the baseline's."""
    kept: dict[str, np.ndarray] = {}
    for arm in arms:
        counts = {"passes": 0, "positions": 0, "rows": 0}
        with prepared(arm), counted(problem.policy, counts):
            made = canvases(problem, arm, is_keyed=True)
        kept[arm.name] = made
        tokens = settled_tokens(problem, made)
        same = float((made == kept[arm.baseline])[tokens].mean())
        if arm.is_same and problem.device == "cpu" and same < 1:
            raise SystemExit(f"{arm.name}: only {same:.4f} of the tokens are the same as with {arm.baseline}")
        yield arm.name, {"counts": counts, "tokens": int(tokens.sum()), "same": same}


def settled_tokens(problem: Problem, made: np.ndarray) -> np.ndarray:
    """Positions up to the first end token of each row."""
    is_end = np.isin(made, problem.policy.end_ids)
    return is_end.cumsum(-1) - is_end == 0


def measure_time(problem: Problem, arms: list[Arm], rounds: int, scale: int = 1) -> dict[str, list[float]]:
    """Seconds, all arms in turn."""

    def once(arm: Arm) -> float:
        with prepared(arm):
            return scale * timed(lambda: canvases(problem, arm, is_keyed=False), problem.device).seconds

    return alternate(arms, rounds, once)


def measure_memory(problem: Problem, arms: list[Arm], steps: int) -> Iterator[tuple[str, float]]:
    """MB that an arm adds, at its first steps, which are its largest."""
    few = replace(problem, sampler=problem.sampler.changed(denoising_steps=steps))
    for arm in arms:
        if "denoising_steps" in arm.settings:
            continue
        with prepared(arm):
            canvases(few, arm, is_keyed=False)
            before = memory_now(problem.device)
            canvases(few, arm, is_keyed=False)
            yield arm.name, memory_peak(problem.device) - before


def profile(problem: Problem, arm: Arm) -> list[dict[str, Any]]:
    """Where the time of an arm goes: the eight operations that take most."""
    is_gpu = problem.device == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if is_gpu else [])]
    few = replace(problem, sampler=problem.sampler.changed(denoising_steps=4))
    with prepared(arm), torch.profiler.profile(activities=kinds) as found:
        canvases(few, arm, is_keyed=False)
        synchronize(problem.device)
    rows = [
        (event.key, event.self_device_time_total if is_gpu else event.self_cpu_time_total)
        for event in found.key_averages()
    ]
    total = sum(spent for _, spent in rows)
    return [{"operation": name, "share": spent / total} for name, spent in sorted(rows, key=lambda r: -r[1])[:8]]


def memory_in_child(given: argparse.Namespace, arms: list[Arm]) -> dict[str, float]:
    """In a process whose allocator gives freed blocks back at once."""
    sizes = [given.group, given.prompt, given.canvas]
    (found,) = in_child(__file__, json.dumps([*sizes, [arm.name for arm in arms]]), is_for_memory=True)
    return found


def child(text: str) -> None:
    """The process that `memory_in_child` starts."""
    group, prompt, canvas, names = json.loads(text)
    torch.set_num_threads(1)
    problem = random_problem(random_policy("small", "cpu"), group, prompt, canvas, canvas)
    print(json.dumps(dict(measure_memory(problem, [a for a in RANDOM_ARMS if a.name in names], steps=2))))


# --- a GPU ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes that `--gpu` measures. `groups`: rows of a batch, and rounds."""

    shape: str
    device: str
    prompt: int
    canvas: int
    steps: int
    """That stand for as many as the canvas has positions."""
    groups: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...] = (4, 32)
    block_rows: int = 64
    block_canvas: int = 64


SIZES = {
    "gpu": Size(shape="dream-7b", device="cuda", prompt=200, canvas=256, steps=GPU_STEPS, groups=((10, 3), (64, 1))),
    "toy": Size(
        shape="toy", device="cpu", prompt=12, canvas=64, steps=4, groups=((2, 1), (3, 1)), block_rows=2, block_canvas=32
    ),
}


def floor_seconds(policy: Policy, positions: int, of_last: int, rows: int, width: int, passes: int) -> float:
    """The least time of one H200 for columns through the body (the last layer of `of_last` of them), rows of logits and
    passes that read all weights; attention over `width` columns."""
    config = policy.config
    layers: list[Any] = list(policy.layers)
    weights = sum(p.numel() for p in layers[0].parameters())
    head = policy.model.lm_head.weight.numel()  # type: ignore[union-attr]
    flops = (positions * (len(layers) - 1) + of_last) * (2 * weights + 4 * width * config.hidden_size) + 2 * rows * head
    return max(flops / PEAK_FLOPS, passes * 2 * (weights * len(layers) + head) / PEAK_BYTES)


def floor_of(arm: Arm, problem: Problem) -> float | None:
    """The least time of the arm's whole loop; none where it depends on what the model says, or is cached."""
    sampler, policy = problem.sampler_of(arm), problem.policy
    if "denoising_steps" in arm.settings or sampler.is_parallel or sampler.cache != "none":
        return None
    group, width = len(problem.requests), len(problem.requests[0].prompt_ids) + sampler.canvas
    canvas = sampler.canvas
    everywhere, masked = group * canvas * width, group * canvas * (canvas + 1) // 2
    if arm.is_published:
        return floor_seconds(policy, everywhere, everywhere, everywhere, width, canvas)
    return floor_seconds(policy, everywhere, masked, masked, width, canvas)


def floor_of_blocks(problem: Problem, length: int) -> float:
    """The least time of blocks over a cache: a pass for each token of a block, and one to put it there."""
    policy, canvas, rows = problem.policy, problem.sampler.canvas, len(problem.requests)
    passes = canvas // length * (length + 1)
    masked = rows * canvas * (length + 1) // 2
    width = len(problem.requests[0].prompt_ids) + canvas // 2
    return floor_seconds(policy, rows * length * passes, rows * length * passes, masked, width, passes)


def gpu_arm(arm: Arm) -> Arm:
    """With blocks of 32, as usual."""
    return replace(arm, settings=arm.settings | {"block_length": 32}) if "block_length" in arm.settings else arm


def measure_arm(
    problem: Problem, arm: Arm, row: dict[str, Any], rounds: int, scale: int, stop_at: float, tokens: int
) -> None:
    """Times and memory of one arm, or why there are none."""
    if time.monotonic() > stop_at:
        row["failed"] = "no time left"
        return
    before = memory_now(problem.device)
    try:
        seconds = measure_time(problem, [arm], rounds, scale)[arm.name]
    except torch.cuda.OutOfMemoryError:
        row["failed"] = "out of memory"
        torch.cuda.empty_cache()
        return
    row |= {"seconds": seconds, "tokens": tokens, "memory_mb": memory_peak(problem.device) - before}
    print(f"{arm.name:45} {tokens / statistics.median(seconds):9.1f} tok/s", flush=True)


def measure_gpu(report: dict[str, Any], size: Size) -> None:
    """Everything that the page wants of a GPU, the most important first."""
    stop_at = time.monotonic() + GPU_SECONDS
    policy = random_policy(size.shape, size.device)
    what = f"{sum(p.numel() for p in policy.model.parameters()) / 1e9:.2g} B random weights, {policy.model.dtype}"
    for group, rounds in size.groups:
        few = random_problem(policy, group, size.prompt, size.canvas, size.steps)
        whole = random_problem(policy, group, size.prompt, size.canvas, size.canvas)
        is_first = group == size.groups[0][0]
        arms = [gpu_arm(arm) for arm in GPU_ARMS if is_first or arm.name in (NUCLEUS, WHOLE, "reference", "rl")]
        arms.sort(key=lambda arm: arm.name not in (NUCLEUS, WHOLE, "reference", "rl"))
        rows: dict[str, Any] = {arm.name: {"base": arm.baseline} for arm in arms}
        part: dict[str, Any] = {
            "rows": rows,
            "about": f"{what}, prompt {size.prompt}, canvas {size.canvas}. Floors: 100 % of an H200.",
        }
        report["parts"][f"G = {group}"] = part
        measure_time(few, [arm for arm in arms if arm.name == OURS], 1)  # libraries and kernels
        for arm in arms:
            if (floor := floor_of(arm, whole)) is not None:
                rows[arm.name]["floor"] = floor
            # What a step does there depends on the steps before, so that all of them are done, once.
            is_whole = "cache" in arm.settings or few.sampler_of(arm).is_parallel
            problem, repeats, scale = (whole, 1, 1) if is_whole else (few, rounds, size.canvas // size.steps)
            measure_arm(problem, arm, rows[arm.name], repeats, scale, stop_at, group * size.canvas)
        part["profile"] = profile(few, next(arm for arm in arms if arm.name == OURS))
    measure_blocks(report, policy, what, size, stop_at)


def measure_blocks(report: dict[str, Any], policy: Policy, what: str, size: Size, stop_at: float) -> None:
    """The engine of block attention, over its cache and without."""
    rows, canvas = size.block_rows, size.block_canvas
    for length in size.blocks:
        policy.family = replace(policy.family, block_length=length, shift=0)
        problem = random_problem(policy, rows, size.prompt, canvas, canvas)
        name = f"blocks of {length}, {rows} rows"
        part: dict[str, Any] = {
            "rows": {arm.name: {"base": arm.baseline} for arm in BLOCK_ARMS},
            "about": f"{what}, prompt {size.prompt}, canvas {canvas}. Floor: 100 % of an H200.",
        }
        report["parts"][name] = part
        part["rows"][OURS]["floor"] = floor_of_blocks(problem, length)
        roll_out(policy, problem.requests[:2], problem.sampler.changed(denoising_steps=4), seed=SEED)
        for arm in reversed(BLOCK_ARMS):
            measure_arm(problem, arm, part["rows"][arm.name], 1 + (arm.name == OURS), 1, stop_at, rows * canvas)
        part["profile"] = profile(problem, next(arm for arm in BLOCK_ARMS if arm.name == OURS))


# --- the page ---------------------------------------------------------------------------------------------------------


def speedups(rows: dict[str, Any], name: str) -> list[float]:
    """Tokens a second beside the baseline's, round by round."""
    row, base = rows[name], rows.get(rows[name]["base"] or "", {})
    if any(name not in part for name in ("seconds", "tokens") for part in (row, base)):
        return []
    per_second = row["tokens"] / base["tokens"]
    return [per_second * its / mine for mine, its in zip(row["seconds"], base["seconds"], strict=False)]


def part_table(part: dict[str, Any]) -> list[str]:
    """A row per arm."""
    columns = (
        "arm",
        "tokens/s, median (range)",
        "times its baseline",
        "baseline",
        "positions computed per token",
        "rows of logits per token",
        "added memory, MB",
        "tokens as the baseline's",
    )
    has_floor = any("floor" in row for row in part["rows"].values())
    cells = [cells_of(part["rows"], name, has_floor) for name in part["rows"]]
    return table((*columns, "floor, tokens/s") if has_floor else columns, cells)


def cells_of(rows: dict[str, Any], name: str, has_floor: bool) -> list[str]:
    """The cells of an arm; a dash where nothing was measured."""
    row = rows[name]
    rates = [row["tokens"] / s for s in row.get("seconds", []) if "tokens" in row]
    counts = row.get("counts")
    cells = [
        name,
        spread(rates, 1) if rates else row.get("failed", "–"),
        spread(speedups(rows, name)),
        row["base"] or "–",
        f"{counts['positions'] / row['tokens']:.0f}" if counts else "–",
        f"{counts['rows'] / row['tokens']:.1f}" if counts else "–",
        f"{row['memory_mb']:.0f}" if "memory_mb" in row else "–",
        f"{100 * row['same']:.1f} %" if "same" in row else "–",
    ]
    if has_floor:
        cells.append(f"{row['tokens'] / row['floor']:.0f}" if {"tokens", "floor"} <= row.keys() else "–")
    return cells


def verdicts(report: dict[str, Any]) -> list[str]:
    """The bars that were measured."""
    found = []
    for name, part in report["parts"].items():
        for arm in ("rl", "reference"):
            if arm in part["rows"] and name.startswith("random"):
                ratios = speedups(part["rows"], arm)
                if not ratios:
                    continue
                ratio = statistics.median(ratios)
                found.append(
                    f"{arm}: {ratio:.2f} times the published loop at the same tokens (bar {LEAST_SPEEDUP:g}): "
                    + held(ratio >= LEAST_SPEEDUP)
                )
    if not report["runs"][-1]["gpu"]:
        found.append("not measured on a GPU: none was there; `python benchmarks/rollout.py --gpu` measures it all")
    return found


def page(report: dict[str, Any]) -> str:
    """docs/results/rollout.md."""
    lines = [
        "# What rollouts cost",
        "",
        "Made by `benchmarks/rollout.py`; every number is in [rollout.json](rollout.json). What the parts are:",
        "[rollout.md](../rollout.md).",
        "",
        *(f"* {line}" for line in verdicts(report)),
    ]
    for name, part in report["parts"].items():
        lines += ["", f"## {name}", "", part["about"], "", *part_table(part)]
        if "profile" in part:
            shares = ", ".join(f"{row['operation']} {100 * row['share']:.0f} %" for row in part["profile"])
            lines += ["", f"Where the time of `{OURS}` goes: {shares}."]
    lines += [
        "",
        "An arm below a preset leaves out what it names. Positions count columns of every forward pass, rows of logits "
        "are counted as often as they are made. Tokens are compared with the same random numbers; the published loop "
        "is timed with torch's own. Memory is the high-water mark of the resident set less the set before, in two "
        "steps, with an allocator that gives freed blocks back at once.",
        "",
    ]
    for run in report["runs"]:
        lines.append(f"* `{run['command']}` at commit {run['commit']}, load {run['load']}, threads {run['threads']}")
    where = report["runs"][-1]
    lines.append(f"* hardware: {hardware(where, gpu=where['gpu'] or 'no GPU')}")
    return "\n".join([*lines, ""])


def measure_cpu(report: dict[str, Any], given: argparse.Namespace) -> None:
    """The random model with a large vocabulary, then the embedded one."""
    random = random_problem(random_policy("small", "cpu"), given.group, given.prompt, given.canvas, given.canvas)
    arms = [a for a in RANDOM_ARMS if given.arms is None or a.name in given.arms or a.name in (NUCLEUS, WHOLE)]
    parameters = sum(p.numel() for p in random.policy.model.parameters())
    about = (
        f"One group of {given.group}, prompt {given.prompt}, canvas {given.canvas} in as many steps, "
        f"{parameters / 1e6:.0f} M random weights, vocabulary 32768, float32; no completion ends."
    )
    parts = [("random weights", about, random, arms)]
    if given.arms is None:
        about = (
            "A step of the quickstart: 16 prompts × 8, canvas 40 in 20 steps, completions that end. The published loop "
            "is not here; the baseline is the default."
        )
        parts.append(("the embedded model", about, embedded_problem(16), list(EMBEDDED_ARMS)))
    if given.arms is None:
        for length in (4, 32):
            policy = random_policy("small", "cpu", block_length=length)
            about = f"The random weights in blocks of {length}, one group of 4, prompt 64, canvas 64, a token a step."
            parts.append((f"blocks of {length}", about, random_problem(policy, 4, 64, 64, 64), list(BLOCK_ARMS)))
    for name, about, problem, chosen in parts:
        part = report["parts"].setdefault(name, {"about": about, "rows": {arm.name: {} for arm in chosen}})
        rows = part["rows"]
        for arm in chosen:
            rows.setdefault(arm.name, {})["base"] = arm.baseline
        if given.only != "time":
            for arm_name, found in check(problem, chosen):
                rows[arm_name] |= found
                print(f"{name}: {arm_name:45} {100 * found['same']:.1f} % of the tokens", flush=True)
            if problem is random:
                for arm_name, extra in memory_in_child(given, chosen).items():
                    rows[arm_name]["memory_mb"] = extra
            write(report, given.write)
        if given.only != "check":
            for arm_name, seconds in measure_time(problem, chosen, given.rounds).items():
                rows[arm_name]["seconds"] = seconds
                print(f"{name}: {arm_name:45} {statistics.median(seconds):9.1f} s", flush=True)
            for arm in chosen:
                if arm.name == OURS:
                    part["profile"] = profile(problem, arm)
        write(report, given.write)


def write(report: dict[str, Any], to: Path) -> None:
    """JSON and page of the parts that are measured so far; `to` has no suffix."""
    write_report(report, to.with_suffix(".json"), page)


def main() -> None:
    """Measure, print the tables, write the page."""
    parser = whole_help(__doc__)
    parser.add_argument("--gpu", action="store_true", help="7.6 B random weights on one GPU")
    parser.add_argument("--toy", action="store_true", help="with --gpu: the same code at toy size on a CPU")
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=12, help="with the canvas in the proportion of 200 to 256")
    parser.add_argument("--canvas", type=int, default=16)
    parser.add_argument(
        "--only",
        choices=["check", "time"],
        help="add the equality, counts and memory, or the times, to what is written",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="fewer on a busy machine")
    parser.add_argument("--arms", nargs="*", help="default: all")
    parser.add_argument("--write", type=Path, default=RESULTS / "rollout", help="without suffix")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    torch.set_num_threads(given.threads)
    run = conditions() | {"threads": given.threads}
    if given.gpu and run["gpu"] is None and not given.toy:
        raise SystemExit("--gpu needs a GPU that torch can use; `coupled doctor` lists what it finds")
    report: dict[str, Any] = {"parts": {}, "runs": []}
    if given.only:
        report = read_report(given.write.with_suffix(".json"), report)
    report["runs"].append(run)
    if given.gpu:
        given.write = given.write.with_name(given.write.name + "-gpu") if given.write.name == "rollout" else given.write
        measure_gpu(report, SIZES["toy" if given.toy else "gpu"])
    else:
        measure_cpu(report, given)
    write(report, given.write)
    for part in report["parts"].values():
        print("\n".join(part_table(part)))
    print("\n".join(verdicts(report)))


if __name__ == "__main__":
    main()
