"""Provenance of a run: commit, command, machine and versions, so that its numbers can be reproduced."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "pydantic",
    "datasets",
    "ray",
    "tensorboard",
)
"""Libraries whose versions are recorded."""


def describe_provenance() -> dict[str, Any]:
    """Plain values, for environment.jsonl. `commit` is None if the package is not in a git checkout or git is not
    installed; `has_uncommitted`: the files differ from that commit."""
    commit, has_uncommitted = _commit(Path(__file__).resolve().parents[2])
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit,
        "has_uncommitted": has_uncommitted,
        "system": platform.platform(),
        "processor": _processor(),
        "num_cores": usable_cores(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "versions": {name: version for name in ("coupled", *PACKAGES) if (version := installed_version(name))},
    }


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit(source: Path) -> tuple[str | None, bool]:
    # Installed into an environment, the package may lie inside an unrelated repository, which does not count.
    if not (source / ".git").exists():
        return None, False
    try:
        commit = _git(source, "rev-parse", "HEAD")
        return commit, bool(_git(source, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, False


def _git(source: Path, *arguments: str) -> str:
    command = ["git", "-C", str(source), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
