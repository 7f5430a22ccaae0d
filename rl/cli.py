"""The command line: train, eval, sample, export, analyze, report, sandbox run, top, doctor, schema."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from coupled.reward import RewardError, extract
from coupled.rl.errors import CoupledError
from coupled.sandbox import SandboxUnavailable

if TYPE_CHECKING:
    from coupled.rl.evaluation.benchmarks.command import EvalOptions
    from coupled.rl.recipe.schema import AnyRecipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Post-train diffusion language models with coupled-GRPO.",
)
sandbox_app = typer.Typer(no_args_is_help=True, help="Try the sandbox by hand.")
app.add_typer(sandbox_app, name="sandbox")
console = Console(soft_wrap=True)
INTERRUPTED = 130
BUG = 70
"""EX_SOFTWARE: a bug, which no input of the user explains."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="recipe file, or the name of a packaged recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. num_steps=10 resume=auto")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved recipe and an estimate of memory and time, and stop")
    ] = False,
    supervised: Annotated[bool, typer.Option("--supervise", help="resume the run when it is interrupted")] = False,
) -> None:
    """Train by a recipe of stage rl, sft or pretrain. `resume=auto` continues the newest run of the recipe.

    Exit status 0: done; 2: an error that the user must fix; 75: resuming may succeed; 70: a bug in coupled.
    """
    from coupled.rl.recipe.read import dump_recipe, load_recipe

    resume, settings = _split_resume(overrides or [])
    loaded = load_recipe(recipe, tuple(settings))
    if dry_run:
        print(dump_recipe(loaded), end="")
        from coupled.rl.commands.dry_run import estimate_run

        print(estimate_run(loaded), file=sys.stderr)
        return
    if supervised:
        from coupled.rl.commands.supervise import supervise
        from coupled.rl.run_folder.folder import committed_checkpoints, run_folders

        command = [sys.executable, "-m", "coupled.rl.cli", "train", recipe]
        again = [*command, *settings, "resume=auto" if resume == "never" else f"resume={resume}"]

        def committed() -> frozenset[str]:
            runs = run_folders(loaded) if resume in ("never", "auto") else [Path(resume)]
            return frozenset(str(step) for run in runs for step in committed_checkpoints(run / "checkpoints"))

        def say(text: str) -> None:
            print(text, file=sys.stderr)

        raise typer.Exit(supervise([*command, *(overrides or [])], again, say, committed=committed))
    try:
        _train(loaded, resume)
    except KeyboardInterrupt:
        print("stopped. Finished steps are kept: continue with the same command and resume=auto", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="checkpoint folder, or a run folder (its newest checkpoint)")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. evaluation.num_samples=8")] = None,
    recipe: Annotated[str | None, typer.Option(help="recipe of the evaluation; default: the run's own")] = None,
    benchmark: Annotated[
        str, typer.Option(help="comma-separated: humaneval+, mbpp+, cruxeval, ... or a JSONL file of tasks")
    ] = "",
    samples: Annotated[int, typer.Option(help="completions per problem", min=1)] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="default: 0 with one sample, the recipe's with more", min=0.0)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; default: the recipe's", min=1)] = None,
    data: Annotated[Path, typer.Option(help="folder with the benchmarks' files; nothing is downloaded")] = Path("data"),
    out: Annotated[
        Path | None, typer.Option(help="folder for the results; an interrupted evaluation is continued")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the random draws", min=0)] = 0,
    limit: Annotated[int | None, typer.Option(help="number of problems, from the first; default: all", min=1)] = None,
    prompting: Annotated[str, typer.Option(help="auto, chat or completion")] = "auto",
    autoregressive: Annotated[
        bool | None, typer.Option("--autoregressive/--diffusion", help="default: detected from the checkpoint")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="paired test of two evaluations or two checkpoints")
    ] = None,
) -> None:
    """Measure pass rates with 95 % intervals; every program is executed in the sandbox.

    Without --benchmark: pass@1 on the held-out problems of the run's recipe.
    """
    if benchmark or compare:
        from coupled.rl.evaluation.benchmarks.command import EvalOptions

        options = EvalOptions(
            benchmarks=benchmark,
            data=data,
            out=out,
            num_samples=samples,
            temperature=temperature,
            num_steps=steps,
            seed=seed,
            limit=limit,
            prompting=prompting,
            is_autoregressive=autoregressive,
            recipe=recipe,
            overrides=tuple(overrides or ()),
        )
        _evaluate_on_benchmarks(checkpoint, options, compare)
        return
    if checkpoint is None:
        raise CoupledError("eval needs a checkpoint or run folder, or --compare A B; got neither")
    from coupled.rl.evaluation.held_out import evaluate_checkpoint

    found = evaluate_checkpoint(checkpoint, recipe, tuple(overrides or ()))
    for name, rates in (("sampled", found.sampled), ("greedy", found.greedy)):
        if rates is not None:
            console.print(
                f"{name} pass@1 {rates.pass_at_1} %  ({len(rates.rates)} problems × {rates.num_samples}, "
                f"temperature {rates.temperature:g}, 95 % interval)"
            )


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, or a run folder (its newest checkpoint)")],
    prompt: Annotated[str, typer.Argument(help="prompt")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. rollout.canvas=64")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="of the random draws", min=0)] = 0,
    recipe: Annotated[str | None, typer.Option(help="recipe of the sampler; default: the run's own")] = None,
    watch: Annotated[bool, typer.Option(help="show the canvas after every step")] = True,
    tests: Annotated[
        Path | None, typer.Option(help="JSON file of tests for the program; see coupled sandbox run --help")
    ] = None,
) -> None:
    """Denoise one completion and show the canvas after every step.

    With --tests its program is run against them. Exit status 0: all passed; 1: not all; 2: nothing was judged.
    """
    from coupled.rl.commands.canvas_view import CanvasView
    from coupled.rl.commands.sample import sample_checkpoint
    from coupled.rl.commands.sandbox import read_task, try_program

    task = None if tests is None else read_task(tests)
    with CanvasView(console, is_shown=watch) as view:
        _, rollout = sample_checkpoint(
            checkpoint, prompt, recipe, tuple(overrides or ()), temperature=temperature, seed=seed, on_step=view.show
        )
    console.print("[dim]── completion ──[/dim]")
    console.print(rollout.text, markup=False, highlight=False)
    if task is None:
        return
    program = extract(rollout.text).code
    if program is None:
        console.print("no closed python block in the completion: nothing to run", highlight=False)
        raise typer.Exit(1)
    trial = try_program(task, program)
    console.print(trial.as_table())
    raise typer.Exit(0 if trial.has_passed else 1 if trial.is_judged else 2)


@app.command()
def analyze(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, or a run folder (its newest checkpoint)")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. rollout.temperature=0.8")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="a second checkpoint or run, e.g. after training; the first is before")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="recipe of the sampler; default: the (second) run's own")] = None,
    benchmark: Annotated[str, typer.Option(help="default: the recipe's held-out problems")] = "",
    data: Annotated[Path, typer.Option(help="folder with the benchmarks' files")] = Path("data"),
    problems: Annotated[int, typer.Option(help="number of problems, from the first", min=2)] = 100,
    samples: Annotated[int, typer.Option(help="completions per problem above temperature 0", min=1)] = 8,
    temperatures: Annotated[str, typer.Option(help="comma-separated")] = "0,0.25,0.5,1,1.5",
    seed: Annotated[int, typer.Option(help="of the random draws", min=0)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="folder for analysis.json and the figures; default: analysis/ in the (second) run"),
    ] = None,
) -> None:
    """Measure AR-ness, confidence, order of commit, and scores over temperature and steps; before and after."""
    from coupled.rl.evaluation.analyze import Sweep, analyze, claim_table, default_out, point_table, write_analysis

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    sweep = Sweep(num_problems=problems, num_samples=samples, temperatures=_numbers(temperatures), seed=seed)
    paths = [checkpoint] if compare is None else [checkpoint, compare]
    result = analyze(paths, sweep, recipe, tuple(overrides or ()), benchmark=benchmark, data=data, show=say)
    written = write_analysis(result, out or default_out(paths[-1]))
    console.print(point_table(result))
    console.print(claim_table(result))
    console.print("wrote " + ", ".join(map(str, written)), highlight=False)
    if len(written) == 1:
        console.print("no figures: matplotlib is not installed (pip install 'coupled[report]')", highlight=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="run folder")],
    compare: Annotated[Path | None, typer.Option(help="second run folder, shown in the same plots")] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; default: report.html in the run folder")] = None,
    rollouts: Annotated[
        int, typer.Option(help="maximum number of rollouts shown, sampled over the steps", min=1)
    ] = 300,
) -> None:
    """Write one self-contained HTML page of a run: held-out results, curves, rollouts, settings and environment."""
    from coupled.rl.report import write_report

    console.print(f"report: {write_report(run, compare, out, num_rollouts=rollouts)}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, or a run folder (its newest checkpoint)")],
    out: Annotated[Path, typer.Argument(help="folder to write, which must be new or empty")],
    merge: Annotated[bool, typer.Option("--merge", help="add the adapters to the weights they adapt")] = False,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
) -> None:
    """Write a checkpoint as a separate model folder, with its tokenizer."""
    import torch

    from coupled.rl.commands.export import export_checkpoint
    from coupled.rl.errors import CheckpointError

    if dtype not in ("float32", "bfloat16"):
        raise CheckpointError(f"--dtype must be float32 or bfloat16; got {dtype!r}")
    written = export_checkpoint(checkpoint, out, merge=merge, dtype=getattr(torch, dtype))
    console.print(f"written: {written}")


@sandbox_app.command(name="run")
def sandbox_run(
    program: Annotated[Path, typer.Argument(help="Python file to run")],
    tests: Annotated[Path, typer.Option(help="JSON file: a list of asserts, or {style, tests, entry_point, setup}")],
    tier: Annotated[str, typer.Option(help="auto, namespaces, landlock, process or remote")] = "auto",
    url: Annotated[str | None, typer.Option(help="address of the server, with --tier remote")] = None,
    allow_weak: Annotated[
        bool, typer.Option("--allow-weak", help="also run tests in the program's process, where it can forge verdicts")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON instead of a table")] = False,
) -> None:
    """Run a file against tests. Exit status 0: all passed; 1: not all; 2: nothing was judged."""
    from coupled.rl.commands.sandbox import try_file

    trial = try_file(program, tests, tier=tier, url=url, allow_weak=allow_weak)
    if as_json:
        print(trial.as_json())
    else:
        console.print(trial.as_table())
    raise typer.Exit(0 if trial.has_passed else 1 if trial.is_judged else 2)


@app.command()
def top(
    run: Annotated[Path, typer.Argument(help="run folder")],
    once: Annotated[
        bool, typer.Option("--once", help="print once; default on a terminal: refresh every second")
    ] = False,
) -> None:
    """Show a run's workers and their jobs, queues, idle times of rollouts and training, and failures."""
    from coupled.rl.commands.top import has_events
    from coupled.rl.commands.top import top as show_run

    if not has_events(run):
        raise CoupledError(f"{run} holds no events.jsonl: give the folder of an RL run")
    try:
        show_run(run, console, is_live=console.is_terminal and not once)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command()
def doctor(
    address: Annotated[
        str | None,
        typer.Option(help="ip:port of a running Ray cluster, or auto: also report the resources of its hosts"),
    ] = None,
) -> None:
    """Check this machine, and print a remedy for each problem."""
    from coupled.rl.commands.doctor import examine

    findings = examine(address)
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.is_good else "[red]no[/red]  "
        console.print(f"{mark} {finding.name}: {escape(finding.detail)}")
        if finding.remedy:
            console.print(f"      remedy: {escape(finding.remedy)}")
    if any(f.is_needed and not f.is_good for f in findings):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipe files, for editors (also in recipes/schema.json)."""
    from coupled.rl.recipe.read import json_schema

    print(json_schema(), end="")


def main() -> None:
    """Entry point: errors that a user can fix are printed without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    _quiet_libraries()
    try:
        app()
    except (CoupledError, RewardError, SandboxUnavailable) as error:
        _fail(str(error), code=getattr(error, "exit_code", 2))
    except Exception:
        traceback.print_exc()
        sys.exit(BUG)


def _train(recipe: AnyRecipe, resume: str) -> None:
    started = time.monotonic()
    if recipe.stage != "rl":
        from coupled.rl.fit import fit

        console.print(f"checkpoint: {fit(recipe, resume)}  ({_minutes(started)})")
        return
    from coupled.rl.evaluation.held_out import comparison_table
    from coupled.rl.train import train as run_training

    result = run_training(recipe, resume)
    if result.before is not None and result.after is not None:
        console.print(comparison_table(result.before, result.after))
    console.print(f"checkpoint: {result.checkpoint}")
    console.print(f"run:        {result.path}  ({_minutes(started)})")


def _evaluate_on_benchmarks(checkpoint: Path | None, options: EvalOptions, pair: tuple[Path, Path] | None) -> None:
    from coupled.rl.evaluation.benchmarks.command import compare, comparison_table, evaluate_on, score_table

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    try:
        if pair is not None:
            console.print(comparison_table(compare(*pair, options, say)))
            return
        if checkpoint is None:
            raise CoupledError("eval --benchmark needs a checkpoint or run folder; got none")
        folders = evaluate_on(checkpoint, options, say)
    except KeyboardInterrupt:
        print("stopped. Finished batches are kept: continue with the same command", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    console.print(score_table(folders))
    console.print(f"results: {next(iter(folders.values())).parent}", highlight=False)


def _split_resume(overrides: list[str]) -> tuple[str, list[str]]:
    chosen = [o.removeprefix("resume=") for o in overrides if o.startswith("resume=")]
    return (chosen[-1] if chosen else "never"), [o for o in overrides if not o.startswith("resume=")]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 0:
        raise CoupledError(f"--temperatures must be a list of numbers, 0 or above, such as 0,0.5,1; got {text!r}")
    return found


def _minutes(started: float) -> str:
    seconds = time.monotonic() - started
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _fail(message: str, code: int) -> NoReturn:
    text = f"[bold red]error:[/bold red] {escape(message)}"
    Console(stderr=True, soft_wrap=True).print(text, highlight=False)
    sys.exit(code)


def _quiet_libraries() -> None:
    import logging

    for name in ("transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


if __name__ == "__main__":
    main()
