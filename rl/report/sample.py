"""Rollouts of a run for a report: a uniform sample, bounded in number and size."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupled.reward import extract
from coupled.rl.data.parquet import count_rows, read_chosen
from coupled.rl.keys import generator
from coupled.rl.model.loading import load_tokenizer
from coupled.rl.report.data import RunRecord, spread
from coupled.rl.run_folder.folder import committed_checkpoints
from coupled.rl.run_folder.rollout_log import rollout_files

NUM_SAMPLED_STEPS = 20
"""Maximum number of steps whose rollouts are shown: evenly spaced, the first and the last included."""

MAX_SAMPLE_BYTES = 4_000_000
"""Maximum size of a page's sampled rollouts."""

MAX_TEXT = 20_000
"""Maximum number of characters shown of a completion, a program or a prompt."""

MAX_CANVAS = 2048
"""Maximum number of tokens replayed of a canvas."""

NUM_FOR_ORDER = 512
"""Number of a step's rollouts over which its order of denoising is averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Sampled rollouts as plain values, ready to be written as JSON, and the size of their population."""

    rollouts: tuple[Mapping[str, Any], ...]
    tasks: Mapping[str, Mapping[str, Any]]
    """uid → prompt and tests, which rollouts share."""
    vocabulary: tuple[str, ...]
    """Texts of the occurring tokens; rollouts hold indices into it. Empty without a tokenizer."""
    num_total: int
    """Number of rollouts that the run keeps."""
    num_steps: int
    """Number of steps in the sample."""


def sample_rollouts(run: RunRecord, limit: int, max_bytes: int = MAX_SAMPLE_BYTES) -> Sample:
    """A uniform sample of each of at most `NUM_SAMPLED_STEPS` steps, reproducible.

    Only the files of these steps are read, in batches.
    """
    files = rollout_files(run.path)
    steps = spread(sorted(files), NUM_SAMPLED_STEPS)
    sizes = {step: count_rows(path) for step, path in files.items()}
    tokenizer = _tokenizer(run)
    found: list[dict[str, Any]] = []
    for place, step in enumerate(steps):
        quota = limit * (place + 1) // len(steps) - limit * place // len(steps)
        order = generator("report", step, sizes[step]).permutation(sizes[step])
        found += [{"step": step, **row} for row in read_chosen(files[step], order[:quota].tolist())]
    shown: dict[int, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    num_bytes = 0
    # When the page would be too large, whole rollouts are left out at random, so that the sample stays uniform.
    for i in generator("report", "bytes", len(found)).permutation(len(found)).tolist():
        item, task = _rollout(found[i], has_tokens=tokenizer is not None), _task(found[i])
        is_new = item["task"] not in tasks
        num_bytes += len(json.dumps(item)) + (len(json.dumps(task)) if is_new else 0)
        if num_bytes > max_bytes and shown:
            break
        shown[i] = item
        tasks.setdefault(item["task"], task)
    rollouts = [shown[i] for i in sorted(shown)]
    vocabulary = _index_tokens(rollouts, tokenizer) if tokenizer is not None else ()
    return Sample(
        rollouts=tuple(rollouts),
        tasks=tasks,
        vocabulary=vocabulary,
        num_total=sum(sizes.values()),
        num_steps=len({item["step"] for item in rollouts}),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisingOrder:
    """Commit time and entropy of each canvas position in one step's rollouts, averaged over rollouts."""

    step: int
    num_rollouts: int
    commit_share: tuple[float, ...]
    """Commit step divided by the last one, in [0, 1]; NaN where no completion has the position."""
    entropy: tuple[float, ...]
    """Nats."""


def denoising_orders(run: RunRecord) -> list[DenoisingOrder]:
    """Orders of the first and the last step with rollouts. Positions after the end token are left out."""
    files = rollout_files(run.path)
    ends = sorted({min(files), max(files)}) if files else []
    orders = (
        _order(step, read_chosen(files[step], range(min(count_rows(files[step]), NUM_FOR_ORDER)))) for step in ends
    )
    return [order for order in orders if order is not None]


def _order(step: int, rows: Sequence[Mapping[str, Any]]) -> DenoisingOrder | None:
    shares: dict[int, list[float]] = defaultdict(list)
    entropies: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        last = max(row["commit_step"], default=0)
        for k, at in enumerate(row["commit_step"][: row["completion_length"]]):
            if at >= 0 and last > 0:
                shares[k].append(at / last)
                entropies[k].append(row["commit_entropy"][k])
    if not shares:
        return None

    def means(found: Mapping[int, list[float]]) -> tuple[float, ...]:
        # A mean over fewer than a tenth of the rollouts would show only a few long completions.
        enough = max(1, len(rows) // 10)
        length = max(found) + 1
        return tuple(
            sum(found[k]) / len(found[k]) if len(found.get(k, ())) >= enough else math.nan for k in range(length)
        )

    return DenoisingOrder(step=step, num_rollouts=len(rows), commit_share=means(shares), entropy=means(entropies))


def _tokenizer(run: RunRecord) -> Any:
    """Tokenizer of the run's newest checkpoint, else of its initial one; None when both are missing."""
    model = run.recipe.get("model")
    began = [Path(str(model.get("path")))] if isinstance(model, dict) else []
    for folder in (*reversed(committed_checkpoints(run.path / "checkpoints")), *began):
        if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
            try:
                return load_tokenizer(folder)
            except (OSError, ValueError):
                continue
    return None


def _rollout(row: Mapping[str, Any], *, has_tokens: bool) -> dict[str, Any]:
    text = str(row["completion"])
    code = extract(text).code
    item: dict[str, Any] = {
        "step": row["step"],
        "uid": row["uid"],
        "task": row["task"],
        "state": _state(row),
        "outcome": row["outcome"],
        "detail": str(row.get("detail") or "")[:MAX_TEXT],
        "passed": row["passed"],
        "total": row["total"],
        "per_test": [int(passed) for passed in row.get("per_test") or ()],
        "score": _finite(row["score"]),
        "rewards": {part["name"]: _finite(part["value"]) for part in row["rewards"]},
        "finish": row["finish_reason"],
        "length": row["completion_length"],
        "forwards": row["num_forwards"],
        "text": text[:MAX_TEXT],
        "code": None if code is None else code[:MAX_TEXT],
        "is_cut": len(text) > MAX_TEXT or len(row["canvas_ids"]) > MAX_CANVAS,
    }
    if has_tokens:
        item |= {
            "ids": row["canvas_ids"][:MAX_CANVAS],
            "at": row["commit_step"][:MAX_CANVAS],
            "logp": [_finite(value) for value in row["commit_logp"][:MAX_CANVAS]],
            "entropy": [_finite(value) for value in row["commit_entropy"][:MAX_CANVAS]],
        }
    return item


def _state(row: Mapping[str, Any]) -> str:
    """`passed` all tests, `failed` one, or `unjudged`: no tests were run, or the sandbox failed."""
    if row["status"] == "infra" or not row["total"]:
        return "unjudged"
    return "passed" if row["passed"] == row["total"] else "failed"


def _task(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": str(row["prompt"])[:MAX_TEXT], "tests": list(row.get("tests") or ())}


def _index_tokens(rollouts: Sequence[dict[str, Any]], tokenizer: Any) -> tuple[str, ...]:
    """Replace token ids in place by indices into the returned texts."""
    known = sorted({token for item in rollouts for token in item["ids"]})
    index = {token: place for place, token in enumerate(known)}
    for item in rollouts:
        item["ids"] = [index[token] for token in item["ids"]]
    return tuple(tokenizer.decode([token], skip_special_tokens=False) for token in known)


def _finite(value: float | None) -> float | None:
    return round(value, 4) if value is not None and math.isfinite(value) else None
