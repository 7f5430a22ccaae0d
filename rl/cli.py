"""The command line: train, eval, sample, export, sandbox run, doctor, schema."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from coupled.reward import RewardError
from coupled.rl.errors import CoupledError
from coupled.sandbox import SandboxUnavailable

if TYPE_CHECKING:
    from coupled.rl.recipe import Recipe

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


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="recipe file, or the name of one that ships with the package")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. num_steps=10 resume=auto")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved recipe, and what it may take, and stop")
    ] = False,
) -> None:
    """Train as the recipe says: stage rl, sft or pretrain. `resume=auto` continues the newest run of the recipe."""
    from coupled.rl.recipe import dump_recipe, load_recipe

    resume, settings = _split_resume(overrides or [])
    loaded = load_recipe(recipe, tuple(settings))
    if dry_run:
        print(dump_recipe(loaded), end="")
        from coupled.rl.estimate import estimate_run

        print(estimate_run(loaded), file=sys.stderr)
        return
    try:
        _train(loaded, resume)
    except KeyboardInterrupt:
        print("stopped. The finished steps are kept: the same command with resume=auto continues", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, or a run folder (its newest checkpoint)")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. evaluation.num_samples=8")] = None,
    recipe: Annotated[str | None, typer.Option(help="recipe to evaluate by; default: the run's own")] = None,
) -> None:
    """Pass@1 on the recipe's held-out problems, with 95 % intervals, every program executed in the sandbox."""
    from coupled.rl.standalone import evaluate_checkpoint

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
    prompt: Annotated[str, typer.Argument(help="what to ask")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. rollout.canvas=64")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="of the random draws", min=0)] = 0,
    recipe: Annotated[str | None, typer.Option(help="recipe to take the sampler from; default: the run's own")] = None,
    watch: Annotated[bool, typer.Option(help="show the canvas after every step")] = True,
) -> None:
    """Denoise one completion and watch it happen."""
    from coupled.rl.standalone import canvas_history, sample_checkpoint

    policy, rollout = sample_checkpoint(
        checkpoint, prompt, recipe, tuple(overrides or ()), temperature=temperature, seed=seed
    )
    if watch:
        for step, text in canvas_history(policy, rollout):
            console.print(f"[dim]── step {step} ──[/dim]")
            console.print(text, markup=False, highlight=False)
    console.print("[dim]── completion ──[/dim]")
    console.print(rollout.text, markup=False, highlight=False)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, or a run folder (its newest checkpoint)")],
    out: Annotated[Path, typer.Argument(help="folder to write, which must not hold anything")],
    merge: Annotated[bool, typer.Option("--merge", help="add the adapters to the weights they adapt")] = False,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
) -> None:
    """Write a checkpoint as a model folder of its own, with its tokenizer."""
    import torch

    from coupled.rl.errors import CheckpointError
    from coupled.rl.export import export_checkpoint

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
        bool, typer.Option("--allow-weak", help="also tests that run in the program's process, where it can forge them")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON instead of a table")] = False,
) -> None:
    """Run a file against tests. Exit status 0: all passed; 1: not all; 2: nothing was judged."""
    from coupled.rl.sandbox_command import try_file

    trial = try_file(program, tests, tier=tier, url=url, allow_weak=allow_weak)
    if as_json:
        print(trial.as_json())
    else:
        console.print(trial.as_table())
    raise typer.Exit(0 if trial.has_passed else 1 if trial.is_judged else 2)


@app.command()
def doctor() -> None:
    """Say what this machine can and cannot do, and the remedy."""
    from coupled.rl.doctor import examine

    findings = examine()
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.is_good else "[red]no[/red]  "
        console.print(f"{mark} {finding.name}: {escape(finding.detail)}")
        if finding.remedy:
            console.print(f"      remedy: {escape(finding.remedy)}")
    if any(f.is_needed and not f.is_good for f in findings):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipe files, for editors (kept at recipes/schema.json)."""
    from coupled.rl.recipe import json_schema

    print(json_schema(), end="")


def main() -> None:
    """Entry point: errors that a user can mend are printed without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    _quiet_libraries()
    try:
        app()
    except (CoupledError, RewardError, SandboxUnavailable) as error:
        _fail(str(error), code=2)


def _train(recipe: Recipe, resume: str) -> None:
    started = time.monotonic()
    if recipe.stage != "rl":
        from coupled.rl.fit import fit

        console.print(f"checkpoint: {fit(recipe, resume)}  ({_minutes(started)})")
        return
    from coupled.rl.evaluate import comparison_table
    from coupled.rl.train import train as run_training

    result = run_training(recipe, resume)
    if result.before is not None and result.after is not None:
        console.print(comparison_table(result.before, result.after))
    console.print(f"checkpoint: {result.checkpoint}")
    console.print(f"run:        {result.path}  ({_minutes(started)})")


def _split_resume(overrides: list[str]) -> tuple[str, list[str]]:
    chosen = [o.removeprefix("resume=") for o in overrides if o.startswith("resume=")]
    return (chosen[-1] if chosen else "never"), [o for o in overrides if not o.startswith("resume=")]


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
