"""Results as JSON and Markdown, the environment that they were made in, and pictures of them."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"

Report = dict[str, Any]
"""The content of a result's JSON file."""


def environment() -> dict[str, Any]:
    """Commit, processor, versions and command, for the record. Torch is not imported: its size would count."""
    return {
        "commit": commit(),
        "processor": processor() or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "command": " ".join(["python", *sys.argv]),
    }


def commit(*options: str) -> str:
    """The commit of the checkout, short unless `options` of `git rev-parse` are given."""
    command = ["git", "rev-parse", *(options or ("--short",)), "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    """The name of the processor, or nothing where Linux does not know it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else ""


def loads() -> str:
    """Load averages of 1, 5 and 15 minutes. Example: "6.8 5.6 6.3"."""
    return " ".join(f"{load:.1f}" for load in os.getloadavg())


def conditions() -> dict[str, Any]:
    """The environment with the GPU's name, or None, and the load average of five minutes."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return environment() | {"gpu": gpu, "load": f"{os.getloadavg()[1]:.1f}"}


def hardware(made: dict[str, Any], cores: str = "cores", gpu: str = "no GPU") -> str:
    """Example: "2 cores of an AMD EPYC, no GPU; Python 3.11.7, torch 2.13.0"."""
    return f"{made['cores']} {cores} of an {made['processor']}, {gpu}; {software(made)}"


def software(made: dict[str, Any]) -> str:
    """Example: "Python 3.11.7, torch 2.13.0"."""
    return f"Python {made['python']}, torch {made['torch']}"


def provenance(made: dict[str, Any]) -> str:
    """Command, commit and machine of a part that was measured in a sitting of its own, as one line without its end."""
    return (
        f"`{made['command']}`, commit {made['commit']}, {made['cores']} cores of an {made['processor']} "
        f"(load {made['load']}), Python {made['python']}"
    )


def whole_help(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's whole docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def short_help(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the first line of a module's docstring."""
    return argparse.ArgumentParser(description=(doc or "").split("\n")[0])


def read_report(file: Path, default: Report | None = None) -> Report:
    """A JSON report, or the default where there is none."""
    return json.loads(file.read_text()) if file.is_file() else default or {}


def write_report(
    report: Report, file: Path, page: Callable[[Report], str] | None = None, indent: int | None = 1
) -> None:
    """The report as JSON, and beside it as a page with the ending .md."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=indent) + "\n")
    if page is not None:
        file.with_suffix(".md").write_text(page(report))


def draw_if_possible(draw: Callable[[Any, Path], None], results: Any, to: Path) -> None:
    """Call `draw(results, to)`, or print that matplotlib is missing."""
    try:
        draw(results, to)
    except ImportError:
        print("no picture: matplotlib is not installed")


def pyplot() -> Any:
    """`matplotlib.pyplot` without a display.

    Raises:
        ImportError: Without matplotlib, see pip install -e '.[bench]'.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, to: Path) -> None:
    """The figure as a file, its axes open at the top and on the right."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(to)
