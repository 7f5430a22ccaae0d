"""The attack suite: hostile, odd and honest programs by category, as data. `test_attack_suite.py` runs them.

`arrays` is apart: its programs need a worker with numpy.
"""

from __future__ import annotations

from attacks import (
    clocks,
    exits,
    filesystem,
    forgery,
    honest,
    judges,
    kernel,
    leftovers,
    liars,
    network,
    processes,
    resources,
    snooping,
    sources,
)
from attacks.record import Program

CATEGORIES: dict[str, tuple[Program, ...]] = {
    "filesystem": filesystem.PROGRAMS,
    "network": network.PROGRAMS,
    "processes": processes.PROGRAMS,
    "resources": resources.PROGRAMS,
    "exits": exits.PROGRAMS,
    "forgery": forgery.PROGRAMS,
    "liars": liars.PROGRAMS,
    "judges": judges.PROGRAMS,
    "snooping": snooping.PROGRAMS,
    "leftovers": leftovers.PROGRAMS,
    "kernel": kernel.PROGRAMS,
    "sources": sources.PROGRAMS,
    "clocks": clocks.PROGRAMS,
    "honest": honest.PROGRAMS,
}
