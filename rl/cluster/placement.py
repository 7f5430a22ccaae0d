"""Requested and available resources per host, formatted for error messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GIB = 2.0**30
SHOWN = {"CPU": "CPUs", "GPU": "GPUs", "memory": "memory, GiB"}
"""Ray's resources in the table, with their displayed names."""
DESCRIBED = SHOWN | {"object_store_memory": "object store, GiB"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HostResources:
    """One host as Ray reports it. Example: `HostResources(host="10.0.0.1", total={"CPU": 8}, free={"CPU": 3})`."""

    host: str
    total: Mapping[str, float]
    """Ray's resources, memory in bytes; a missing one is 0."""
    free: Mapping[str, float]
    is_here: bool = False
    """Whether the run's own process is on this host."""

    def fits(self, needs: Mapping[str, float], *, is_empty: bool = False) -> int:
        """Number of processes with these needs that fit now; `is_empty`: if nothing else ran."""
        have = self.total if is_empty else self.free
        # Ray counts in ten-thousandths.
        return min(int(have.get(name, 0.0) / amount + 1e-4) for name, amount in needs.items() if amount)

    def describe(self) -> str:
        """One line. Example: `CPUs 3 free of 8; memory, GiB 20.5 free of 30.0`."""
        parts = [f"{DESCRIBED[name]} {self.share(name, ' free of ')}" for name in DESCRIBED if self.total.get(name)]
        return "; ".join(parts)

    def share(self, name: str, between: str) -> str:
        """Free and total amount of a resource. Example: `3 of 8`."""
        return f"{_amount(name, self.free)}{between}{_amount(name, self.total)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceRequest:
    """A number of processes with equal needs. Example: four trainer ranks of 1 CPU and 1 GPU, the first here."""

    num: int
    what: str
    """Their name, in the plural."""
    needs: Mapping[str, float]
    has_one_here: bool = False
    """Whether one of them must be on the host of the run's own process."""

    def is_possible(self, hosts: Sequence[HostResources]) -> bool:
        """Whether the hosts could take all of them if nothing else ran."""
        has_place = not self.has_one_here or any(r.is_here and r.fits(self.needs, is_empty=True) for r in hosts)
        return has_place and sum(host.fits(self.needs, is_empty=True) for host in hosts) >= self.num


def placement_table(request: ResourceRequest, hosts: Sequence[HostResources]) -> str:
    """Table of the request and, per host, of free and total resources and the number of processes that fit."""
    each = ", ".join(f"{amount:g} {name}" for name, amount in request.needs.items() if amount)
    where = ", one of them here" if request.has_one_here else ""
    shown = [name for name in SHOWN if any(host.total.get(name) for host in hosts) or request.needs.get(name)]
    rows = [["host", *(f"{SHOWN[name]} free of" for name in shown), "fits"]]
    ordered = sorted(hosts, key=lambda host: (not host.is_here, host.host))
    rows += [
        [f"{host.host} (here)" if host.is_here else host.host]
        + [host.share(name, " of ") for name in shown]
        + [str(host.fits(request.needs))]
        for host in ordered
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([f"requested: {request.num} {request.what} of {each} each{where}", *lines])


def no_room(request: ResourceRequest, hosts: Sequence[HostResources], remedy: str) -> str:
    """Cause, table and remedy, for the error of a placement that timed out."""
    is_possible = request.is_possible(hosts)
    found = (
        "other work holds the resources"
        if is_possible
        else "the cluster has too few hosts, or hosts that are too small"
    )
    return f"{found}\n{placement_table(request, hosts)}\n{remedy}"


def _amount(name: str, amounts: Mapping[str, float]) -> str:
    amount = amounts.get(name, 0.0)
    return f"{amount / GIB:.1f}" if name.endswith("memory") else f"{amount:g}"
