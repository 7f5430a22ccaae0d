"""Fields that recipes once had: an error with the remedy in a recipe file, translated in the recipe of an old run."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """A field that is gone, and the meaning that it had."""

    remedy: str
    """What to write now, or the behaviour now."""
    default: Any = None
    """A saved recipe with this value is still the same run."""
    renamed: str = ""
    """The field that has the meaning now."""
    translated: tuple[tuple[Any, str, Any], ...] = ()
    """Values that another field expresses now: (old value, field, new value)."""
    has_effect: bool = True
    """Whether another value than the default computes something else."""


RETIRED: dict[str, Retired] = {
    "model.has_cuda_graphs": Retired(
        default=False, has_effect=False, remedy="rollouts no longer replay CUDA graphs; leave it out"
    ),
    "rollout.monitor.every": Retired(renamed="rollout.monitor_every", remedy="write rollout.monitor_every"),
    "rollout.monitor.on_mismatch": Retired(renamed="rollout.on_mismatch", remedy="write rollout.on_mismatch"),
    "rollout.monitor.num_prompts": Retired(default=4, remedy="four groups of a step are compared; leave it out"),
    "rollout.monitor.tolerance": Retired(
        default=0.1, remedy="mean rewards may differ by 0.1, in units of the reward; leave it out"
    ),
    "optimizer.schedule": Retired(
        default="cosine",
        translated=(("constant", "optimizer.final_fraction", 1.0),),
        remedy="the learning rate follows a cosine to optimizer.final_fraction of its peak; leave it out, or write "
        "optimizer.final_fraction=1 for a constant rate",
    ),
    "cluster.max_mismatch": Retired(renamed="cluster.max_policy_drift", remedy="write cluster.max_policy_drift"),
    "cluster.weights": Retired(
        default="object",
        has_effect=False,
        remedy="weights go to Ray workers through Ray's object store, and to other processes through files in the run "
        "folder; leave it out",
    ),
    "cluster.dashboard": Retired(
        default=False,
        has_effect=False,
        remedy="a Ray that the run starts has no dashboard; leave it out, or start Ray yourself and set "
        "cluster.address=auto",
    ),
    "fit.noise_warmup_start": Retired(default=0.001, remedy="the cap rises from 0.001; leave it out"),
}
"""Old field → what became of it."""


def without_retired(values: dict[str, Any], *, is_saved: bool) -> tuple[dict[str, Any], list[str]]:
    """The values of a recipe without the fields that are gone, and a complaint for each that must not be dropped.

    Args:
        is_saved: the values are those of a run folder, which names every field. Renamed fields are moved there, and
            fields are dropped where the run computes the same without them.
    """
    kept, complaints = copy.deepcopy(values), []
    for place, old in RETIRED.items():
        *parents, name = place.split(".")
        section = _section(kept, parents)
        if section is None or name not in section:
            continue
        value = section.pop(name)
        if not is_saved:
            complaints.append(f"{place}: no longer a field: {old.remedy}")
        elif old.renamed:
            _put(kept, old.renamed, value)
        elif moved := [(field, new) for was, field, new in old.translated if was == value]:
            _put(kept, *moved[0])
        elif value != old.default and old.has_effect:
            complaints.append(
                f"{place}: no longer a field, and the run was made with {value!r}: {old.remedy}. This release computes "
                "something else; continue the run with the release that began it"
            )
    rollout = kept.get("rollout")
    if isinstance(rollout, dict) and rollout.get("monitor") == {}:
        del rollout["monitor"]  # the section of fields that are gone
    return kept, complaints


def _section(values: dict[str, Any], parents: list[str]) -> dict[str, Any] | None:
    node: Any = values
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None


def _put(values: dict[str, Any], place: str, value: Any) -> None:
    section, name = place.split(".")
    values[section][name] = value
