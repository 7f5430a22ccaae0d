"""Score of one evaluation from its rows, and paired comparison of two evaluations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from coupled.rl.errors import CoupledError
from coupled.rl.evaluation.decoding_order import global_arness, local_arness, unmasking_order
from coupled.rl.evaluation.statistics import Comparison, Interval, bootstrap, compare_paired, pass_at_k, wilson

KS = (1, 2, 4, 8, 10, 16, 32, 50, 64, 100)
"""Values of k at which pass@k is reported, up to the number of samples."""

Row = Mapping[str, Any]


def passes_by_task(rows: Sequence[Row], tasks: Sequence[str], measure: str = "is_pass") -> list[list[bool]]:
    """Pass or fail of every judged completion, per problem. Completions that the sandbox failed on are left out.

    Raises:
        CoupledError: a problem has no judged completion.
    """
    found: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row["status"] != "infra":
            found[row["task"]].append(bool(row[measure]))
    missing = [task for task in tasks if not found[task]]
    if missing:
        raise CoupledError(
            f"{len(missing)} problems have no judged completion, the first is {missing[0]}: the sandbox could not run "
            "them (see the column detail of results.jsonl). The same command retries them; on an overloaded "
            "machine add sandbox.num_workers=1"
        )
    return [found[task] for task in tasks]


def pass_rates(passes: Sequence[Sequence[bool]], k: int = 1) -> list[float]:
    """Unbiased pass@k of each problem."""
    return [pass_at_k(len(each), sum(each), k) for each in passes]


def pass_at(passes: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """pass@k with 95 % intervals: Wilson's where each problem has one completion, else by bootstrap over problems."""
    fewest = min(len(each) for each in passes)
    found: dict[str, Any] = {}
    for k in sorted({*(k for k in KS if k <= fewest), fewest}):
        is_proportion = max(len(each) for each in passes) == 1
        rates = pass_rates(passes, k)
        interval = wilson(int(sum(rates)), len(rates)) if is_proportion else bootstrap(rates)
        found[f"pass@{k}"] = {**asdict(interval), "interval": "wilson" if is_proportion else "bootstrap over problems"}
    return found


def arness_by_task(rows: Sequence[Row], tasks: Sequence[str], k: int, *, is_local: bool) -> list[float]:
    """Mean AR-ness@k of each problem's completions; NaN where none has a token."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["commit_step"]:
            order = unmasking_order(row["commit_step"])
            found[row["task"]].append((local_arness if is_local else global_arness)(order, k))
    return [float(np.mean(found[task])) if found[task] else float("nan") for task in tasks]


def score_of(rows: Sequence[Row], tasks: Sequence[str], *, name: str, base: str = "") -> dict[str, Any]:
    """The score of one benchmark, and of the one that it extends, with statistics of the completions."""
    scores = {name: pass_at(passes_by_task(rows, tasks))}
    if base:
        scores[base] = pass_at(passes_by_task(rows, tasks, "is_base_pass"))
    judged = [row for row in rows if row["status"] != "infra"]
    seconds = sum(row["generation_seconds"] for row in rows)
    lengths = [row["completion_length"] for row in rows]
    outcomes: dict[str, int] = defaultdict(int)
    for row in rows:
        outcomes["pass" if row["is_pass"] else "fail" if row["outcome"] == "ok" else row["outcome"]] += 1
    arness = {
        f"{kind}@{k}": _mean(arness_by_task(rows, tasks, k, is_local=kind == "local"))
        for kind in ("local", "global")
        for k in (1, 2, 4)
    }
    return {
        "scores": scores,
        "num_problems": len(tasks),
        "num_completions": len(rows),
        "num_unjudged": len(rows) - len(judged),
        "num_weak_verdicts": sum(row["tier"] == "T2" for row in judged),
        "outcomes": dict(sorted(outcomes.items())),
        "completion_length": float(np.mean(lengths)),
        "end_rate": float(np.mean([row["finish_reason"] == "end" for row in rows])),
        "tokens_per_second": sum(lengths) / seconds if seconds else None,
        "arness": arness,
    }


def compare_rows(
    first: Sequence[Row], second: Sequence[Row], tasks: Sequence[str], *, name: str, base: str = ""
) -> dict[str, Comparison]:
    """Paired difference of pass@1, second - first.

    Raises:
        CoupledError: the two are measured on different problems.
    """
    if {row["task"] for row in first} != set(tasks) or {row["task"] for row in second} != set(tasks):
        raise CoupledError(
            f"the two evaluations of {name} differ in their problems: a paired test needs the same problems"
        )
    measures = {name: "is_pass"} | ({base: "is_base_pass"} if base else {})
    return {
        label: compare_paired(
            pass_rates(passes_by_task(first, tasks, measure)), pass_rates(passes_by_task(second, tasks, measure))
        )
        for label, measure in measures.items()
    }


def _mean(values: Sequence[float]) -> dict[str, float] | None:
    known = [value for value in values if not np.isnan(value)]
    return asdict(bootstrap(known)) if known else None


def as_interval(row: Mapping[str, Any]) -> Interval:
    """The interval in a row of `score.json`."""
    return Interval(mean=row["mean"], low=row["low"], high=row["high"])
