"""Fields of recipes of earlier releases: refused with a remedy in recipe files, translated in recipes of old runs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """A field that no longer exists, and its meaning."""

    remedy: str
    """Replacement of the field, or the present behaviour."""
    default: Any = None
    """Value with which a saved recipe still describes the same run."""
    renamed: str = ""
    """Name of the field that now has this meaning; empty: none."""
    translated: tuple[tuple[Any, str, Any], ...] = ()
    """Values that another field now expresses: (old value, field, new value)."""
    has_effect: bool = True
    """Whether values other than the default change what a run computes."""


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
"""Old field → its replacement."""


def without_retired(values: dict[str, Any], *, is_saved: bool) -> tuple[dict[str, Any], list[str]]:
    """A recipe's values without retired fields, and an error line for each field that must not be dropped.

    Args:
        is_saved: the values come from a run folder, whose recipe names every field. Renamed fields are moved, and other
            retired fields are dropped where the run computes the same without them.
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
                "something else; continue the run with the release that started it"
            )
    rollout = kept.get("rollout")
    if isinstance(rollout, dict) and rollout.get("monitor") == {}:
        del rollout["monitor"]  # a section without remaining fields
    return kept, complaints


def _section(values: dict[str, Any], parents: list[str]) -> dict[str, Any] | None:
    node: Any = values
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None


def _put(values: dict[str, Any], place: str, value: Any) -> None:
    section, name = place.split(".")
    values[section][name] = value
