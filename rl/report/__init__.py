"""`coupled report`: one HTML file with the settings, curves, held-out results and rollouts of a run.

Everything is inside the file: style, script, plots and data. Its content policy forbids the network, and every text
by a model or a user is escaped, by jinja2 in the page and by `_as_script_data` in its data.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coupled.rl.errors import DataError
from coupled.rl.report.curves import curve_groups, smoothing
from coupled.rl.report.data import RunRecord, read_run
from coupled.rl.report.held_out import held_out_results
from coupled.rl.report.measured import analyses, benchmark_results
from coupled.rl.report.plots import require_matplotlib
from coupled.rl.report.sample import sample_rollouts
from coupled.rl.report.words import differences, lead, rollout_words, run_words, tiles
from coupled.rl.run_folder.folder import atomic_write
from coupled.rl.run_folder.provenance import installed_version

PAGE = Path(__file__).with_name("page")

NUM_ROLLOUTS = 300


def write_report(
    run: Path, other: Path | None = None, out: Path | None = None, *, num_rollouts: int = NUM_ROLLOUTS
) -> Path:
    """Write the report of a run, or of two in the same plots, and return its path: by default `run/report.html`.

    Raises:
        CoupledError: a run cannot be read, matplotlib or jinja2 is not installed, or `out` cannot be written.
    """
    require_matplotlib()
    if num_rollouts < 1:
        raise DataError(f"a report shows at least one rollout; received {num_rollouts}")
    runs = [read_run(path) for path in (run, other) if path is not None]
    to = run / "report.html" if out is None else out
    if to.is_dir():
        raise DataError(
            f"--out names the file to write; {to} is a folder: add a file name, such as {to / 'report.html'}"
        )
    page = render(runs, num_rollouts)
    try:
        atomic_write(to, page)
    except OSError as error:
        raise DataError(f"the report cannot be written to {to} ({error}); name another file with --out") from error
    return to


def render(runs: Sequence[RunRecord], num_rollouts: int = NUM_ROLLOUTS) -> str:
    """The page of one or two runs, in ASCII, so that it does not depend on the encoding."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    names = run_names(runs)
    held_out = held_out_results(runs, names)
    groups = curve_groups(runs, names)
    shares = [num_rollouts // len(runs) + (i < num_rollouts % len(runs)) for i in range(len(runs))]
    samples = [sample_rollouts(run, share) for run, share in zip(runs, shares, strict=True)]
    panels = [panel for group in groups for panel in group["panels"]]
    if held_out and held_out["panel"]:
        panels.append(held_out["panel"])
    rollouts = [{"run": i, **item} for i, sample in enumerate(samples) for item in sample.rollouts]
    data = {
        "plots": {panel.id: panel.data() for panel in panels},
        "samples": [
            {"name": name, "tasks": sample.tasks, "vocabulary": sample.vocabulary}
            for name, sample in zip(names, samples, strict=True)
        ],
        "rollouts": sorted(rollouts, key=lambda item: -item["step"]),  # the newest first
    }
    script = "\n" + (PAGE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    templates = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = templates.get_template("report.html.j2").render(
        title=" and ".join(names),
        lead=lead(runs),
        tiles=tiles(runs, names),
        held_out=held_out,
        benchmarks=benchmark_results(runs, names),
        analyses=analyses(runs, names),
        groups=groups,
        smoothing=smoothing(runs),
        rollouts=rollout_words(samples),
        runs=[run_words(run, name) for run, name in zip(runs, names, strict=True)],
        differences=differences(runs),
        version=installed_version("coupled"),
        made_from=" and ".join(str(run.path) for run in runs),
        script_hash=f"sha256-{digest}",
        style=Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        data=Markup(_as_script_data(data)),
    )
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def run_names(runs: Sequence[RunRecord]) -> list[str]:
    """Names of the runs on the page: their folders, or longer paths when these are equal."""
    if len({run.name for run in runs}) == len(runs):
        return [run.name for run in runs]
    return (
        [str(run.path) for run in runs]
        if runs[0].path != runs[-1].path
        else [f"{run.name} ({i + 1})" for i, run in enumerate(runs)]
    )


def _as_script_data(data: Mapping[str, Any]) -> str:
    """JSON for a script element: no text in it can close the element or begin a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
