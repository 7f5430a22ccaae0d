"""Figures of an analysis; needs matplotlib (`pip install coupled[report]`)."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

STYLE = {"svg.hashsalt": "coupled", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
"""The salt makes equal figures equal files."""


def draw_curves(result: dict[str, Any], to: Path | BytesIO) -> None:
    """Plot score and AR-ness over temperature, steps and k, and the entropy sink; one colour per checkpoint."""
    most = f"pass@{result['sweep']['num_samples']}"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.4))
        axes = figure.subplots(2, 3)
        for colour, checkpoint in zip(("C0", "C1"), result["checkpoints"], strict=False):
            points, label = checkpoint["points"], checkpoint["name"]
            full = [p for p in points if p["denoising_steps"] == result["denoising_steps"]]
            by_heat = sorted(full, key=lambda p: p["temperature"])
            sampled = [p for p in by_heat if p["temperature"] > 0]
            _line(axes[0, 0], by_heat, "temperature", "pass@1", color=colour, label=f"{label}, pass@1")
            _line(axes[0, 0], sampled, "temperature", most, color=colour, ls="--", label=f"{label}, {most}")
            _line(axes[0, 1], by_heat, "temperature", "global@1", color=colour, label=f"{label}, global")
            _line(axes[0, 1], by_heat, "temperature", "local@1", color=colour, ls="--", label=f"{label}, local")
            for temperature, style in ((0.0, "--"), (result["temperature"], "-")):
                fast = sorted(
                    (p for p in points if p["temperature"] == temperature), key=lambda p: p["denoising_steps"]
                )
                name = f"{label}, {'greedy' if temperature == 0 else f'T = {temperature:g}'}"
                _line(axes[1, 0], fast, "denoising_steps", "pass@1", color=colour, ls=style, label=name)
                _line(axes[1, 1], fast, "denoising_steps", "global@1", color=colour, ls=style, label=name)
            own = next(p for p in full if p["temperature"] == result["temperature"])
            ks = sorted(int(name.removeprefix("global@")) for name in own if name.startswith("global@"))
            for kind, style in (("global", "-"), ("local", "--")):
                values = [100 * own[f"{kind}@{k}"]["mean"] for k in ks]
                axes[0, 2].plot(ks, values, marker="o", ms=3, color=colour, ls=style, label=f"{label}, {kind}")
            sink = [np.nan if value is None else 100 * value for value in checkpoint["entropy_sink"]]
            axes[1, 2].plot(range(len(sink)), sink, color=colour, label=label)
        for axis, x, y in (
            (axes[0, 0], "temperature", "pass rate, %"),
            (axes[0, 1], "temperature", "AR-ness@1, %"),
            (axes[0, 2], "k", f"AR-ness@k at T = {result['temperature']:g}, %"),
            (axes[1, 0], "denoising steps", "pass@1, %"),
            (axes[1, 1], "denoising steps", "global AR-ness@1, %"),
            (axes[1, 2], "position", "confidence at the first step, %"),
        ):
            axis.set(xlabel=x, ylabel=y)
            axis.legend(frameon=False, fontsize=6.5)
        figure.tight_layout()
        figure.savefig(to, format="svg", metadata={"Date": None})


def draw_maps(result: dict[str, Any], to: Path | BytesIO) -> None:
    """Plot confidence of masked positions and share committed over (step, position); one row per checkpoint."""
    rows = result["checkpoints"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.1 * len(rows)))
        axes = figure.subplots(len(rows), 2, squeeze=False)
        for row, checkpoint in enumerate(rows):
            for column, (name, title) in enumerate(
                (("confidence", "confidence of masked positions"), ("commit", "share committed"))
            ):
                values = np.array(checkpoint[name], dtype=float)  # None becomes NaN
                axis = axes[row, column]
                image = axis.imshow(values, origin="lower", aspect="auto", cmap="viridis", interpolation="nearest")
                axis.set(xlabel="position", ylabel="denoising step", title=f"{checkpoint['name']}: {title}")
                figure.colorbar(image, ax=axis)
        figure.tight_layout()
        figure.savefig(to, format="svg", metadata={"Date": None})


def _line(axis: Any, points: list[dict[str, Any]], x: str, y: str, **style: Any) -> None:
    """Plot means with their 95 % intervals, in per cent."""
    xs = [point[x] for point in points]
    means, lows, highs = (np.array([100 * point[y][part] for point in points]) for part in ("mean", "low", "high"))
    # A bootstrap of equal values may differ from their mean in the last digit.
    spread = np.maximum(0, (means - lows, highs - means))
    axis.errorbar(xs, means, yerr=spread, marker="o", ms=3, capsize=2, lw=1, **style)
