"""`coupled doctor`: checks of versions, processor, GPU, sandbox and disk, each with a remedy."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass

import torch

from coupled.rl.errors import CoupledError
from coupled.rl.run_folder.provenance import PACKAGES, installed_version, usable_cores
from coupled.sandbox import Isolation, SandboxUnavailable, open_executor, run_self_check

MIN_SHM_GIB = 1.0
MIN_DISK_GIB = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Result of one check. `is_needed`: training is impossible without it."""

    name: str
    is_good: bool
    detail: str
    remedy: str = ""
    is_needed: bool = False


def examine(address: str | None = None) -> list[Finding]:
    """All findings, the most important first. Starts and stops a sandbox; takes a few seconds.

    `address`: address of a Ray cluster whose hosts are also checked.
    """
    found = [_python(), *_packages(), _families(), _processor(), _gpu(), *_sandbox(), _shared_memory(), _disk()]
    return found if address is None else [*found, *_cluster(address)]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding(
        name="python",
        is_good=good,
        detail=platform.python_version(),
        remedy="" if good else "install Python 3.11 or newer",
        is_needed=True,
    )


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        if version := installed_version(name):
            findings.append(Finding(name=name, is_good=True, detail=version))
        else:
            findings.append(
                Finding(
                    name=name,
                    is_good=False,
                    detail="not installed",
                    remedy=f"pip install -c constraints.txt {name}",
                    is_needed=name not in ("ray", "tensorboard"),
                )
            )
    return findings


def _families() -> Finding:
    """Check that this transformers version has the class of every model family."""
    from transformers import CONFIG_MAPPING

    from coupled.rl.model.families import FAMILIES

    absent = [f"{f.name} ({f.model_type})" for f in FAMILIES.values() if f.model_type not in CONFIG_MAPPING]
    return Finding(
        name="model families",
        is_good=not absent,
        detail=", ".join(FAMILIES) if not absent else f"this transformers version has no class for {', '.join(absent)}",
        remedy="" if not absent else "pip install -U 'transformers>=5.16,<6'",
    )


def _processor() -> Finding:
    used = torch.get_num_threads()
    return Finding(name="processor", is_good=True, detail=f"{usable_cores()} cores usable, torch uses {used}")


def _gpu() -> Finding:
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding(name="gpu", is_good=True, detail=names)
    return Finding(
        name="gpu",
        is_good=False,
        detail=f"torch {torch.__version__} finds none; the embedded model trains on a CPU",
        remedy="for larger models: a CUDA build of torch on a machine with a GPU",
    )


def _sandbox() -> list[Finding]:
    try:
        executor = open_executor(tier="auto", num_workers=1)
    except SandboxUnavailable as error:
        # The text has every tier with its reason and its remedy.
        return [Finding(name="sandbox", is_good=False, detail=str(error), is_needed=True)]
    with executor:
        isolation = executor.isolation()
        findings = [Finding(name="sandbox", is_good=True, detail=_isolation(isolation))]
        for note in isolation.notes:
            reason, _, remedy = note.partition("\nremedy: ")
            findings.append(Finding(name="sandbox: not granted", is_good=not remedy, detail=reason, remedy=remedy))
        findings += [
            Finding(name=f"sandbox: {check.name}", is_good=check.held, detail=check.detail)
            for check in run_self_check(executor)
        ]
    return findings


def _isolation(found: Isolation) -> str:
    network = "a network" if found.has_network else "no network"
    calls = "filtered system calls" if found.has_filter else "any system call"
    return f"tier {found.tier}; {found.user}; {network}; {calls}; {found.filesystem}; {found.processes}"


def _shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0.0
    good = free >= MIN_SHM_GIB
    return Finding(
        name="shared memory",
        is_good=good,
        detail=f"{free:.1f} GiB free in /dev/shm",
        remedy="" if good else "Ray falls back to slow files; start the container with --shm-size=2g",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    good = free >= MIN_DISK_GIB
    return Finding(
        name="disk",
        is_good=good,
        detail=f"{free:.0f} GiB free here",
        remedy="" if good else "free some space, or set output_dir to another disk",
    )


def _cluster(address: str) -> list[Finding]:
    from coupled.rl.cluster.ray import look_at_cluster

    try:
        hosts = look_at_cluster(address)
    except CoupledError as error:
        return [Finding(name="cluster", is_good=False, detail=str(error), is_needed=True)]
    return [
        Finding(name=f"cluster: {room.host}{' (here)' if room.is_here else ''}", is_good=True, detail=room.describe())
        for room in hosts
    ]
