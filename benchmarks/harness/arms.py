"""Arms that take turns: time, processor time and memory, the latter in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

Measured = TypeVar("Measured")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to do the work that a benchmark measures."""

    name: str


def alternate(arms: Sequence[Any], rounds: int, measure: Callable[[Any], Measured]) -> dict[str, list[Measured]]:
    """Values of `measure` by arm, round by round: arms take turns, so that a busy machine is unfair to all alike."""
    found: dict[str, list[Measured]] = {arm.name: [] for arm in arms}
    for _ in range(rounds):
        for arm in arms:
            found[arm.name].append(measure(arm))
    return found


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Wall-clock seconds, and processor seconds of this process, that a task took; and its result."""

    seconds: float
    cpu_seconds: float
    result: Any


def timed(task: Callable[[], Any], device: str) -> Spent:
    """Do the task; on a GPU the clock runs from an idle device to an idle device."""
    synchronize(device)
    clock, processor = time.perf_counter(), time.process_time()
    result = task()
    synchronize(device)
    return Spent(seconds=time.perf_counter() - clock, cpu_seconds=time.process_time() - processor, result=result)


def synchronize(device: str) -> None:
    """Wait for the GPU, if it is the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def memory_now(device: str) -> float:
    """Memory in use, in MB: torch's on a GPU, else the resident set. The high-water mark starts anew from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return _resident_mb("VmRSS")


def memory_peak(device: str) -> float:
    """The high-water mark since `memory_now`, in MB."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _resident_mb("VmHWM")


def _resident_mb(field: str) -> float:
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def in_child(script: str, *words: str, is_for_memory: bool, remedy: str = "") -> Iterator[Any]:
    """The values that a script prints, one JSON text a line, when it is run as `script --child WORDS`.

    For memory, its allocator gives freed blocks back at once, so that the resident set is what is in use.

    Raises:
        SystemExit: The child failed; its own message is on the standard error already. `remedy` ends the text.
    """
    settings = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**16)) if is_for_memory else {}
    command = [sys.executable, script, "--child", *words]
    with subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        for line in started.stdout:
            yield json.loads(line)
    if started.returncode:
        what = "memory" if is_for_memory else "time"
        raise SystemExit(f"measuring {what} ended with status {started.returncode}{remedy}")
