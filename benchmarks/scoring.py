"""The cost of an update against the straightforward way: peak memory, time, and that the gradient is the same.

    python benchmarks/scoring.py                                # CPU, some minutes; docs/results/scoring.json and .md
    python benchmarks/scoring.py --shape dream-7b --adapter 16  # with a GPU; takes fewer --layers
    python benchmarks/scoring.py --only time --arms ours        # again, and beside the straightforward way alone

One update of one group: estimate, loss, backward. The straightforward way is written below from the equations: three
full forward passes per completion, logits of every position, log-softmax, gather. Ours is the code of a run. Arms
leave one part of ours out.

Memory is what an update adds to a process that holds weights and gradients. On a CPU: the resident-set high-water mark,
with an allocator that gives freed blocks back at once (MALLOC_MMAP_THRESHOLD_). On a GPU: torch's allocator. Time on a
CPU is taken in another process, with the usual allocator, in which the arms take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness.arms import Arm as AnyArm
from harness.arms import Spent, alternate, in_child, memory_now, memory_peak, timed
from harness.models import DREAM_7B, FIRST_TOKEN, NUM_UNNAMED, config_of, embedded, random_policy, shape
from harness.report import RESULTS, conditions, hardware, read_report, whole_help, write_report
from harness.tables import held, spread, table
from torch import Tensor
from transformers import Qwen2ForCausalLM

from coupled.rl.estimators.coupled import draw_pairs, of_pairs
from coupled.rl.estimators.score import estimate_logp
from coupled.rl.model import vocabulary
from coupled.rl.model.attention import Layout
from coupled.rl.model.gradient_checkpointing import checkpoint_gradients
from coupled.rl.model.loading import add_adapter
from coupled.rl.model.policy import Policy
from coupled.rl.objective.gradient import add_gradient
from coupled.rl.objective.loss import loss_denominator
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.engine import policy_engine
from coupled.rl.rollout.sampler import Request
from coupled.rl.types import Anchor, MaskDraw, MaskPair, TrainBatch

SHAPES = {"small": shape(32768, 256, 768, 8, 4, 2), "dream-7b": DREAM_7B}
TEMPERATURE = 1.2
MOST_MEMORY, MOST_TIME = 1 / 4, 0.75
"""The bars, as shares of the straightforward way, and for the same arm."""


@dataclass(frozen=True, kw_only=True)
class Arm(AnyArm):
    """One way to compute the update; `ours` has everything but the second pass."""

    is_straightforward: bool = False
    is_shared: bool = True
    """The fully masked input of the group is computed once."""
    has_chosen_rows: bool = True
    """Logits at the scored positions only."""
    is_chunked: bool = True
    has_checkpointing: bool = True
    has_two_passes: bool = False
    is_update: bool = True
    """False: the scores alone, without gradients, as `old` and `reference` are computed."""


OURS, PLAIN = "ours", "straightforward"
ARMS = (
    Arm(name=PLAIN, is_straightforward=True, has_checkpointing=False),
    Arm(name=OURS),
    Arm(name="ours, no checkpointing", has_checkpointing=False),
    Arm(name="ours, two passes", has_two_passes=True),
    Arm(name="ours, two passes, no checkpointing", has_two_passes=True, has_checkpointing=False),
    Arm(name="ours, logits not chunked", is_chunked=False),
    Arm(name="ours, logits of all rows", has_chosen_rows=False),
    Arm(name="ours, fully masked pass not shared", is_shared=False),
    Arm(name=f"{PLAIN}, checkpointing", is_straightforward=True),
    Arm(name=f"scores alone: {PLAIN}", is_straightforward=True, has_checkpointing=False, is_update=False),
    Arm(name="scores alone: ours", is_update=False),
)
BASELINE = {arm.name: ARMS[0].name if arm.is_update else ARMS[-2].name for arm in ARMS}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of the problem."""

    shape: str
    layers: int
    group: int
    prompt: int
    canvas: int
    adapter: int
    device: str


class EveryRow(Policy):
    """Projects the vocabulary at every position, and picks from that."""

    def logp_of(
        self,
        ids: Tensor,
        pad_lengths: Tensor | Layout,
        rows: Tensor,
        line: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        clean: Tensor | None = None,
    ) -> Tensor:
        """As in `Policy`, from more rows."""
        everywhere = torch.ones_like(rows)
        everywhere[:, : self.family.shift] = False  # no state predicts these
        place = torch.full(rows.shape, -1, device=rows.device)
        place[everywhere] = torch.arange(int(everywhere.sum()), device=rows.device)
        hidden = self.hidden_at(ids, pad_lengths, everywhere, clean)
        return vocabulary.token_logp(self.head, hidden, place[rows][line], targets, temperature)


# --- the problem ------------------------------------------------------------------------------------------------------


def make_policy(size: Size, kind: type[Policy] = Policy) -> Policy:
    """Random weights of the shape, on the device, the same for every arm."""
    policy = random_policy(shape_of(size), size.device, kind=kind)
    if size.adapter:
        targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        policy = add_adapter(policy, rank=size.adapter, alpha=2.0 * size.adapter, targets=targets, seed=0)
    return policy


def shape_of(size: Size) -> dict[str, int]:
    """The shape with as many layers as are wanted."""
    return SHAPES[size.shape] | {"num_hidden_layers": size.layers}


def make_batch(size: Size) -> TrainBatch:
    """One group: a prompt, and G completions that reach the end of the canvas."""
    stream = torch.Generator().manual_seed(2)
    most = SHAPES[size.shape]["vocab_size"] - NUM_UNNAMED
    prompt = torch.randint(FIRST_TOKEN, most, (1, size.prompt), generator=stream).expand(size.group, -1)
    completions = torch.randint(FIRST_TOKEN, most, (size.group, size.canvas), generator=stream)
    return TrainBatch(
        uids=tuple(f"row-{i}" for i in range(size.group)),
        ids=torch.cat((prompt, completions), dim=1).to(size.device),
        pad_lengths=torch.zeros(size.group, dtype=torch.int64, device=size.device),
        valid=torch.ones((size.group, size.canvas), dtype=torch.bool, device=size.device),
        advantages=torch.randn(size.group, generator=stream).to(size.device),
        is_scored=torch.ones(size.group, dtype=torch.bool, device=size.device),
    )


def make_recipe(arm: Arm) -> Recipe:
    """The default recipe with the arm's settings."""
    memory = {"has_two_passes": arm.has_two_passes, "has_gradient_checkpointing": arm.has_checkpointing}
    return Recipe.model_validate(
        {"stage": "rl", "model": {"path": "-"}, "data": {"path": "-"}, "optimizer": memory, "loss": {"kl_beta": 0.1}}
    )


def reference_scores(size: Size, batch: TrainBatch, pair: MaskPair) -> Tensor:
    """Stands for the frozen policy's: the scores of a policy that finds all tokens alike, with noise of a nat."""
    stream = torch.Generator().manual_seed(3)
    noise = torch.randn(batch.valid.shape, generator=stream).to(batch.ids.device)
    weight = torch.where(pair.first, 1 / pair.ratio[:, None], 1 / (1 - pair.ratio[:, None]))
    return noise - 0.5 * (1 + weight) * math.log(SHAPES[size.shape]["vocab_size"])


# --- the straightforward way, from the equations ----------------------------------------------------------------------


def straightforward_scores(policy: Policy, batch: TrainBatch, pair: MaskPair) -> Tensor:
    """s_k = ½ [ ℓ_k(V) + 1[k∈M] ℓ_k(M)/t + 1[k∈M'] ℓ_k(M')/(1 - t) ], with all logits of three passes."""
    canvas, device = batch.canvas_length, batch.ids.device
    length = batch.ids.shape[1]
    everywhere = torch.zeros((1, 1, length, length), dtype=policy.compute_dtype, device=device)
    positions = torch.arange(length, device=device).expand(len(batch), -1)
    scores = torch.zeros(batch.valid.shape, device=device)
    weights = (torch.ones_like(pair.ratio), 1 / pair.ratio, 1 / (1 - pair.ratio))
    for mask, weight in zip((batch.valid, pair.first, pair.second), weights, strict=True):
        ids = batch.ids.clone()
        ids[:, -canvas:][mask] = policy.mask_id
        with torch.autocast(device.type, policy.compute_dtype, enabled=policy.compute_dtype != torch.float32):
            logits = policy.model(input_ids=ids, attention_mask=everywhere, position_ids=positions).logits
        logits = logits.float() / TEMPERATURE
        logits[..., policy.mask_id] = -torch.inf
        logits[..., policy.num_vocabulary :] = -torch.inf
        # Dream's logits at p predict the token at p + 1.
        logp = logits.log_softmax(-1)[:, -canvas - 1 : -1].gather(-1, batch.ids[:, -canvas:, None])[..., 0]
        scores = scores + 0.5 * weight[:, None] * logp * mask
    return scores


def straightforward_update(policy: Policy, batch: TrainBatch, pair: MaskPair, reference: Tensor) -> float:
    """Clipped objective with k3, as the recipe's defaults have it."""
    scores = straightforward_scores(policy, batch, pair)
    ratio = (scores - scores.detach()).exp()
    advantage = batch.advantages[:, None]
    gap = (reference - scores).clamp(-5, 5)
    terms = -torch.minimum(ratio * advantage, ratio.clamp(0.5, 1.5) * advantage) + 0.1 * (gap.exp() - gap - 1)
    loss = terms[batch.valid].mean()
    loss.backward()
    return float(loss.detach())


# --- an arm ---------------------------------------------------------------------------------------------------------


@contextmanager
def prepared(arm: Arm, policy: Policy) -> Iterator[None]:
    """The policy and the library as the arm wants them, and as they were afterwards."""
    chunk, kind = dict(vocabulary.CHUNK_LOGITS), type(policy)
    if arm.has_checkpointing:
        checkpoint_gradients(policy)
    if not arm.is_chunked:
        vocabulary.CHUNK_LOGITS.update(cpu=2**60, cuda=2**60)
    policy.__class__ = Policy if arm.has_chosen_rows else EveryRow
    try:
        yield
    finally:
        policy.__class__ = kind
        vocabulary.CHUNK_LOGITS.update(chunk)
        for layer in policy.layers:
            vars(layer).pop("forward", None)


def task_of(arm: Arm, policy: Policy, size: Size, batch: TrainBatch) -> Callable[[], SimpleNamespace]:
    """A function that does the arm's work once: `loss`, and `scores` where only they are computed."""
    recipe = make_recipe(arm)
    (pair,) = pairs = draw_pairs(batch, recipe.estimator, (0, "mask", 1, 0))
    draw = of_pairs(pairs, batch, recipe.estimator.weights)
    if not arm.is_shared:
        full = replace(draw.forwards[0][0], is_shared=False)
        draw = MaskDraw(forwards=((full,), *draw.forwards[1:]), total=draw.total)
    reference = reference_scores(size, batch, pair)
    anchor = Anchor(old=None, reference=reference)
    denominator = loss_denominator(batch.valid, recipe.loss.norm)

    def update() -> SimpleNamespace:
        if arm.is_straightforward:
            return SimpleNamespace(loss=straightforward_update(policy, batch, pair, reference), scores=None)
        output = add_gradient(
            policy,
            batch,
            draw,
            anchor,
            recipe.estimator,
            recipe.loss,
            TEMPERATURE,
            denominator,
            has_two_passes=recipe.optimizer.has_two_passes,
        )
        return SimpleNamespace(loss=output.sums["loss"], scores=None)

    @torch.no_grad()
    def scores() -> SimpleNamespace:
        if arm.is_straightforward:
            found = straightforward_scores(policy, batch, pair)
        else:
            found = estimate_logp(policy, batch, draw, recipe.estimator, TEMPERATURE)
        return SimpleNamespace(loss=float(found.sum()), scores=found)

    return update if arm.is_update else scores


def work(arm: Arm, policy: Policy, size: Size, batch: TrainBatch) -> dict[str, int]:
    """Masked inputs that one estimate of the group computes, and rows of logits made of them; by counting, for ours."""
    if arm.is_straightforward:
        return {"inputs": 3 * len(batch), "rows": 3 * batch.ids.numel()}
    inputs, rows = 0, 0
    body, plain = policy._base.model, policy.hidden_at
    layers, body.layers = body.layers, torch.nn.ModuleList()  # what they compute does not matter here

    def hidden_at(ids: Tensor, pad_lengths: Tensor, places: Tensor, clean: Tensor | None = None) -> Tensor:
        nonlocal inputs, rows
        inputs, rows = inputs + len(ids), rows + int(places.sum())
        return plain(ids, pad_lengths, places, clean)

    policy.hidden_at = hidden_at  # type: ignore[method-assign]
    try:
        task_of(replace(arm, is_update=False), policy, size, batch)()
    finally:
        del policy.hidden_at
        body.layers = layers
    return {"inputs": inputs, "rows": rows}


# --- processes --------------------------------------------------------------------------------------------------------


def fresh_gradients(policy: Policy) -> None:
    """Gradients belong to the baseline: their pages are touched before an update is measured."""
    for parameter in policy.trainable_parameters():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.fill_(0.0)


def warm_up(policy: Policy, arm: Arm, size: Size) -> None:
    """Threads, libraries and, on a GPU, kernels: on a canvas of four."""
    small = make_batch(replace(size, group=2, prompt=4, canvas=4))
    task_of(arm, policy, size, small)()
    policy.model.zero_grad(set_to_none=True)


def measure_memory(arms: list[Arm], size: Size, rounds: int) -> Iterator[dict[str, Any]]:
    """In this process, arm after arm, `rounds` times each: what it adds, and how far it is from the baseline's numbers.

    Memory of earlier arms is given back before, and what stays is part of the level that is subtracted.
    """
    policy, batch = make_policy(size), make_batch(size)
    kept: dict[str, dict[str, Tensor]] = {}
    for arm in arms:
        counted = work(arm, policy, size, batch)
        with prepared(arm, policy):
            warm_up(policy, arm, size)
            task = task_of(arm, policy, size, batch)
            fresh_gradients(policy)
            before = memory_now(size.device)
            spent = []
            for _ in range(rounds):
                fresh_gradients(policy)
                spent.append(timed(task, size.device))
            peak = memory_peak(size.device)
        results = results_of(arm, policy, spent[-1].result)
        if arm.name in BASELINE.values():
            kept[arm.name] = results
        row = {"before_mb": before, "peak_mb": peak - before, **times_of(spent), **counted}
        yield {"name": arm.name, **row, "difference": largest_difference(results, kept[BASELINE[arm.name]])}


def times_of(spent: list[Spent]) -> dict[str, list[float]]:
    """Seconds, and processor seconds, round by round."""
    return {"seconds": [one.seconds for one in spent], "cpu_seconds": [one.cpu_seconds for one in spent]}


def results_of(arm: Arm, policy: Policy, found: SimpleNamespace) -> dict[str, Tensor]:
    """The loss with the gradients, or the scores, on the CPU."""
    results = {"loss": torch.tensor(found.loss, dtype=torch.float64)}
    if not arm.is_update:
        return results | {"scores": found.scores.cpu()}
    total = sum(p.numel() for p in policy.trainable_parameters())
    most = 2**24 if total < 2**27 else 2**14  # of each tensor: enough to compare
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            results[name] = parameter.grad.flatten()[:most].to("cpu", copy=True)
    return results


def measure_time(arms: list[Arm], size: Size, rounds: int) -> dict[str, dict[str, list[float]]]:
    """In this process, all arms in turn, so that a busy machine is unfair to all alike."""
    policy, batch = make_policy(size), make_batch(size)
    for arm in arms:
        with prepared(arm, policy):
            warm_up(policy, arm, size)

    def once(arm: Arm) -> Spent:
        with prepared(arm, policy):
            task = task_of(arm, policy, size, batch)
            fresh_gradients(policy)
            return timed(task, size.device)

    return {name: times_of(spent) for name, spent in alternate(arms, rounds, once).items()}


def measured_in_child(what: str, size: Size, arms: list[Arm], rounds: int) -> Iterator[Any]:
    """Memory or time, by this file in a process of its own."""
    given = json.dumps([asdict(size), [arm.name for arm in arms], rounds])
    remedy = "; where memory was short, take fewer --layers or a smaller --group, or leave arms out with --arms"
    return in_child(__file__, what, given, is_for_memory=what == "memory", remedy=remedy)


def child(what: str, given: str) -> None:
    """The process that `measured_in_child` starts."""
    size_values, names, rounds = json.loads(given)
    size, arms = Size(**size_values), [arm for arm in ARMS if arm.name in names]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for found in measure_memory(arms, size, rounds) if what == "memory" else [measure_time(arms, size, rounds)]:
        print(json.dumps(found), flush=True)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Differences of the loss, and of the gradients (or scores) beside the largest of them."""
    names = [name for name in one if name != "loss"]
    return {
        "loss": float((one["loss"] - other["loss"]).abs()),
        "largest": max(float((one[name] - other[name]).abs().max()) for name in names),
        "scale": max(float(other[name].abs().max()) for name in names),
    }


def add_memory(report: dict[str, Any], size: Size, arms: list[Arm], rounds: int) -> Iterator[None]:
    """Arm by arm: memory, counts, seconds, how far its numbers are from the straightforward ones."""
    rows = report["rows"]
    for row in measured_in_child("memory", size, arms, rounds):
        name = row.pop("name")
        (arm,) = (arm for arm in arms if arm.name == name)
        if size.device == "cpu":  # the allocator of this process is slow: time is another part
            del row["seconds"], row["cpu_seconds"]
        rows[name] = rows.get(name, {}) | row
        if size.device == "cuda":
            rows[name] |= _beside(rows, arm)
        print(f"{arm.name:45} {row['peak_mb']:9.0f} MB", flush=True)
        yield


def add_time(report: dict[str, Any], size: Size, arms: list[Arm], rounds: int) -> None:
    """Of some arms, beside the straightforward one in the same rounds."""
    (found,) = measured_in_child("time", size, arms, rounds)
    for arm in arms:
        report["rows"][arm.name] |= found[arm.name] | _beside(found, arm)
        print(f"{arm.name:45} {statistics.median(found[arm.name]['seconds']):9.1f} s", flush=True)


def _beside(rows: dict[str, Any], arm: Arm) -> dict[str, list[float]]:
    """The straightforward way's times of the same rounds."""
    return {f"base_{field}": rows[BASELINE[arm.name]][field] for field in ("seconds", "cpu_seconds")}


def count_distinct_inputs(num_groups: int, group: int) -> dict[str, Any]:
    """Distinct fully masked inputs of a group, in rollouts of the quickstart's start, for both kinds of `post_eos`."""
    recipe, policy, prompts = embedded((f"rollout.group_size={group}",))
    requests = [
        Request(uid=f"{i}/{k}", prompt_ids=p.token_ids)
        for i, p in enumerate(prompts[:num_groups])
        for k in range(group)
    ]
    made = policy_engine(policy, recipe.rollout.batch_size).generate(requests, recipe.rollout.sampler, seed=recipe.seed)
    found: dict[str, Any] = {"groups": num_groups, "group": group}
    found["end_rate"] = statistics.mean(rollout.finish_reason == "end" for rollout in made)
    for post_eos in ("kept", "mask"):
        counts = []
        for i in range(num_groups):
            canvases = set()
            for rollout in made[i * group : (i + 1) * group]:
                canvas = rollout.canvas_ids.copy()
                canvas[slice(None) if post_eos == "mask" else slice(rollout.completion_length)] = policy.mask_id
                canvases.add(tuple(canvas.tolist()))
            counts.append(len(canvases))
        found[post_eos] = statistics.mean(counts)
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def ratios(rows: dict[str, Any], name: str) -> dict[str, list[float]]:
    """Memory and seconds as shares of the straightforward way, the seconds round by round."""
    row = rows[name]
    return {
        "memory": [row["peak_mb"] / rows[BASELINE[name]]["peak_mb"]],
        **{
            what: [mine / its for mine, its in zip(row[field], row[f"base_{field}"], strict=True)]
            for what, field in (("time", "seconds"), ("processor time", "cpu_seconds"))
            if field in row
        },
    }


def verdicts(rows: dict[str, Any]) -> list[str]:
    """The two bars, each held or missed by the same arm."""
    if OURS not in rows:
        return []
    found = ratios(rows, OURS)
    return [
        f"{what}: ours takes {statistics.median(found[what]):.2f} of the straightforward way (bar {bar:g}): "
        + held(statistics.median(found[what]) <= bar)
        for what, bar in (("memory", MOST_MEMORY), ("time", MOST_TIME))
        if what in found
    ]


def arm_table(report: dict[str, Any]) -> list[str]:
    """A row per arm."""
    rows, size = report["rows"], report["size"]
    columns = (
        "one update of a group",
        "masked inputs",
        "rows of logits per completion",
        "peak memory, MB",
        "of straightforward",
        "seconds, median (range)",
        "of straightforward, median (range)",
        "processor time, of straightforward",
        "loss differs by",
        "gradient differs by",
    )
    cells = []
    for name, row in rows.items():
        share, difference = ratios(rows, name), row["difference"]
        differs = ["–", "–"]
        if name != BASELINE[name]:
            differs = [f"{difference['loss']:.1e}", f"{difference['largest']:.1e} of {difference['scale']:.1e}"]
        cells.append(
            [
                name,
                row["inputs"],
                f"{row['rows'] / size['group']:.1f}",
                f"{row['peak_mb']:.0f}",
                f"{share['memory'][0]:.2f}",
                spread(row.get("seconds"), 1),
                spread(share.get("time")),
                spread(share.get("processor time")),
                *differs,
            ]
        )
    return table(columns, cells)


def sharing_lines(report: dict[str, Any]) -> list[str]:
    """Counts on the quickstart's rollouts, if they were made."""
    if (shared := report.get("sharing")) is None:
        return []
    return [
        f"How often the fully masked input is shared: in {shared['groups']} groups of {shared['group']} rollouts of "
        f"the quickstart's start, {100 * shared['end_rate']:.0f} % of which end before the canvas does, a group has "
        f"{shared['kept']:.1f} distinct ones with `post_eos: kept` and {shared['mask']:.1f} with `mask`.",
        "",
    ]


def page(report: dict[str, Any]) -> str:
    """docs/results/scoring.md."""
    size, where = report["size"], report["runs"][-1]
    has_gpu = size["device"] == "cuda"
    return "\n".join(
        [
            "# What scoring costs",
            "",
            "Made by `benchmarks/scoring.py`; every number is in [scoring.json](scoring.json). What the parts are:",
            "[method.md](../method.md).",
            "",
            *(f"* {line}" for line in verdicts(report["rows"])),
            f"* {'measured on ' + str(where['gpu']) if has_gpu else 'not measured on a GPU'}",
            "",
            *arm_table(report),
            "",
            f"One group: {size['group']} completions that fill a canvas of {size['canvas']}, a prompt of "
            f"{size['prompt']} tokens, one coupled pair; {report['parameters'] / 1e6:.0f} M random weights "
            f"({size['shape']}, {size['layers']} layers, vocabulary {SHAPES[size['shape']]['vocab_size']}"
            f"{', LoRA of rank ' + str(size['adapter']) if size['adapter'] else ', all trained'}). An arm below *ours* "
            "leaves out or adds what it names. Rows of logits are counted once, also where they are computed again in "
            "the backward pass. For *scores alone* the difference is between the scores.",
            "",
            "Memory is what the update adds to a process that holds weights and gradients: "
            + (
                "the most that torch's allocator held, less what it held before."
                if has_gpu
                else "the high-water mark of the resident set, less the resident set before, with an allocator that "
                "gives freed blocks back at once (MALLOC_MMAP_THRESHOLD_=65536). Time is of a process with "
                "the usual one, in which the arms took turns."
            ),
            "",
            *sharing_lines(report),
            *(f"* `{run['command']}` at commit {run['commit']}, load {run['load']}" for run in report["runs"]),
            f"* hardware: {hardware(where, gpu=where['gpu'] or 'no GPU')}",
            "",
        ]
    )


def main() -> None:
    """Measure, print the table, write the page."""
    parser = whole_help(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--layers", type=int, help="default: as many as the shape has")
    parser.add_argument("--adapter", type=int, default=0, help="LoRA rank; 0 trains all weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--group", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=120)
    parser.add_argument("--canvas", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=[arm.name for arm in ARMS], help="default: all")
    parser.add_argument("--write", type=Path, default=RESULTS / "scoring", help="without suffix")
    parser.add_argument(
        "--only", choices=["memory", "time", "sharing"], help="add this part to what is written already"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    size = Size(
        shape=given.shape,
        layers=given.layers or SHAPES[given.shape]["num_hidden_layers"],
        group=given.group,
        prompt=given.prompt,
        canvas=given.canvas,
        adapter=given.adapter,
        device=given.device,
    )
    wanted = {arm.name for arm in ARMS} if given.arms is None else set(given.arms)
    wanted |= {BASELINE[name] for name in wanted}
    arms = [arm for arm in ARMS if arm.name in wanted]
    to = given.write.with_suffix(".json")
    report: dict[str, Any] = {"size": asdict(size), "rows": {}, "runs": []}
    if given.only is not None:
        report = read_report(to, report)
        if report["size"] != asdict(size):
            raise SystemExit(f"{to} is of another size: {report['size']}; write elsewhere with --write")
    report["runs"].append(conditions())
    with torch.device("meta"):
        report["parameters"] = sum(
            p.numel() for p in Qwen2ForCausalLM(config_of(shape_of(size), size.device)).parameters()
        )
    if given.only in (None, "memory"):
        for _ in add_memory(report, size, arms, given.rounds):
            write_report(report, to)
    if given.only == "time" or (given.only is None and size.device == "cpu"):
        add_time(report, size, arms, given.rounds)
    if given.only in (None, "sharing"):
        report["sharing"] = count_distinct_inputs(num_groups=32, group=given.group)
    write_report(report, to, page)
    print("\n".join([*arm_table(report), *verdicts(report["rows"])]))


if __name__ == "__main__":
    main()
