"""The run folder: its files, written so that a crash loses at most the step under way.

recipe.yaml            the resolved recipe
environment.jsonl      commit, command, machine and versions: one row per start or resumption
metrics.jsonl          one row per step, appended after the step is committed
rollouts/*.parquet     every completion with its verdict
checkpoints/step_N/    weights, tokenizer, optimizer, state.json, MANIFEST.json; appears by one rename or not at all
logs/rank_N.log        output of the trainer's ranks other than the first
events.jsonl           events of batches and workers
fence/generation_N     one per process that opened the run; only the newest may commit
evaluation.jsonl       held-out results
tensorboard/           the same metrics for TensorBoard
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from coupled.rl.errors import CheckpointError, FencedError, SaveError
from coupled.rl.recipe.read import dump_recipe, validate
from coupled.rl.recipe.schema import AnyRecipe, RunRecipe
from coupled.rl.run_folder.provenance import describe_provenance

MANIFEST = "MANIFEST.json"
COMMITTED = re.compile(r"step_(\d+)$")
ENVIRONMENT = "environment.jsonl"
FENCE = "fence"
CLAIMED = re.compile(r"(?:generation|epoch)_(\d+)")
"""Files in `fence/`. Folders of earlier versions have `epoch_N`, and are continued with the next number."""
MAY_CHANGE = ("num_threads", "checkpoint", "output_dir", "cluster")
"""Recipe fields that may differ between a run and its resumption."""


class RunFolder:
    """A folder that owns one run. Use `open_run_folder`."""

    def __init__(self, path: Path, *, keep: int, generation: int = 0) -> None:
        self.path = path
        self._keep = keep
        self._generation = generation
        self._tensorboard: Any = None
        self._unwritten: dict[str, list[str]] = {}

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def latest(self) -> Path | None:
        """The newest committed checkpoint whose files match its manifest, or None."""
        for folder in reversed(committed_checkpoints(self.checkpoints)):
            if not broken_files(folder):
                return folder
        return None

    def commit(self, step: int, write: Callable[[Path], None], facts: Mapping[str, Any] | None = None) -> Path:
        """Write checkpoint `step` (steps finished), which exists whole or not at all; then drop the oldest.

        `facts` go into its manifest.

        Raises:
            SaveError: the disk is full or not writable; earlier checkpoints are intact.
            FencedError: another process has taken over the run.
        """
        final = self.checkpoints / f"step_{step:06d}"
        partial = self.checkpoints / f".partial-{final.name}.g{self._generation}"
        self._refuse_if_fenced()
        try:
            self.checkpoints.mkdir(exist_ok=True)
            for left in self.checkpoints.glob(".partial-*"):  # left by a crash, or by a failed save
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
            write(partial)
            about = {"step": step, "generation": self._generation, **(facts or {}), "sha256": _hashes(partial)}
            (partial / MANIFEST).write_text(json.dumps(about, indent=1) + "\n")
            for file in partial.rglob("*"):
                if file.is_file():
                    _sync(file)
            self._refuse_if_fenced()
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync(self.checkpoints)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise SaveError(
                f"could not write checkpoint {final} ({error}); earlier checkpoints are whole. Free some space, "
                "then continue with resume=auto"
            ) from error
        for old in committed_checkpoints(self.checkpoints)[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def log(self, row: Mapping[str, Any], *, file: str = "metrics.jsonl") -> None:
        """Append one row, whole, and mirror its numbers to TensorBoard.

        Rows that cannot be written, because the disk is full, are kept and written with the next row.

        Raises:
            FencedError: another process has taken over the run, and logs this step itself.
        """
        self._refuse_if_fenced()
        self._unwritten.setdefault(file, []).append(json.dumps(row) + "\n")
        try:
            self._write(file)
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._tensorboard.add_scalar(name, value, row["step"])
        except OSError as error:
            print(f"alarm: {self.path / file} cannot be written ({error}); its rows are kept until it can", flush=True)

    def _write(self, file: str) -> None:
        path = self.path / file
        size = path.stat().st_size if path.is_file() else 0
        try:
            with path.open("a") as out:
                out.writelines(self._unwritten[file])
                out.flush()
                os.fsync(out.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # no half of a row
            raise
        self._unwritten[file] = []

    def rows(self, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """All whole rows of a log; a line cut off by a crash is left out."""
        path = self.path / file
        return read_rows(path) if path.is_file() else []

    def forget_after(self, step: int) -> None:
        """Drop the log rows of steps after the checkpoint that a run resumes from, because these steps are repeated."""
        for file in ("metrics.jsonl", "evaluation.jsonl"):
            if (self.path / file).is_file():
                kept = [row for row in self.rows(file) if row["step"] <= step]
                atomic_write(self.path / file, "".join(json.dumps(row) + "\n" for row in kept))
        for parquet in (self.path / "rollouts").glob("step_*.parquet"):
            if int(parquet.name.split(".")[0].removeprefix("step_")) > step:
                parquet.unlink()

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _refuse_if_fenced(self) -> None:
        newest = _newest_generation(self.path)
        if self._generation and newest > self._generation:
            raise FencedError(
                f"process {newest} has taken over {self.path} since this one, process {self._generation}, opened it; "
                "this process stops and writes nothing more. Only one process may train a run: start another run "
                "with resume=never"
            )


def run_folders(recipe: RunRecipe) -> list[Path]:
    """The numbered folders of a recipe's name, `output_dir/name-001` first, without folders of `name-other`."""
    start = len(recipe.name) + 1
    found = Path(recipe.output_dir).glob(f"{recipe.name}-*")
    return sorted((p for p in found if re.fullmatch(r"\d+", p.name[start:])), key=lambda p: int(p.name[start:]))


def open_run_folder(recipe: RunRecipe, resume: str = "never") -> RunFolder:
    """A new numbered folder `output_dir/name-001`, or with `resume` an existing one.

    Args:
        resume: `never`; `auto` takes the newest folder of this recipe's name, or a new one if there is none;
            anything else is the path of a run folder.

    Raises:
        CheckpointError: the folder is not a run, or was made by another recipe.
    """
    parent, earlier = Path(recipe.output_dir), run_folders(recipe)
    if resume == "auto":
        # A folder without its recipe comes from a crash at the start, and holds nothing.
        whole = [p for p in earlier if (p / "recipe.yaml").is_file()]
        chosen = whole[-1] if whole else None
    elif resume == "never":
        chosen = None
    else:
        chosen = Path(resume)
        if not (chosen / "recipe.yaml").is_file():
            raise CheckpointError(f"resume={resume}: that folder holds no recipe.yaml, so it is not a run")
    if chosen is not None:
        _refuse_other_recipe(chosen, recipe)
        _record_environment(chosen)
        return RunFolder(chosen, keep=recipe.checkpoint.keep, generation=_claim(chosen))
    number = 1 + (int(earlier[-1].name[len(recipe.name) + 1 :]) if earlier else 0)
    while True:
        path = parent / f"{recipe.name}-{number:03d}"
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:  # another run took the number at the same time
            number += 1
    atomic_write(path / "recipe.yaml", dump_recipe(recipe))
    _record_environment(path)
    return RunFolder(path, keep=recipe.checkpoint.keep, generation=_claim(path))


def broken_files(folder: Path) -> list[str]:
    """Files of a checkpoint that are missing or do not match its manifest; [] without one, as in earlier versions."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError):
        return [MANIFEST]
    return [name for name, wanted in hashes.items() if _sha256(folder / name) != wanted]


def committed_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; unfinished ones are not among them."""
    found = [p for p in folder.glob("step_*") if COMMITTED.search(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def read_run_recipe(run: Path) -> AnyRecipe:
    """The recipe a run folder was made with."""
    return validate(read_run_values(run), source=str(run / "recipe.yaml"), is_saved=True)


def read_run_values(run: Path) -> Any:
    """The recipe of a run folder as it was written, perhaps by an earlier release."""
    return yaml.safe_load((run / "recipe.yaml").read_text())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line without a newline was cut off by a crash and is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def atomic_write(path: Path, text: str) -> None:
    """Replace a file whole: readers see the old or the new text, never half of either."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text)
    _sync(partial)
    partial.rename(path)


def _record_environment(run: Path) -> None:
    latest = committed_checkpoints(run / "checkpoints")
    step = int(latest[-1].name.removeprefix("step_")) if latest else 0
    path = run / ENVIRONMENT
    rows = [*(read_rows(path) if path.is_file() else []), {"step": step, **describe_provenance()}]
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _refuse_other_recipe(run: Path, recipe: RunRecipe) -> None:
    before = read_run_recipe(run).model_dump(mode="json")
    now = recipe.model_dump(mode="json")
    differing = [k for k in now if k not in MAY_CHANGE and before.get(k) != now[k]]
    if differing:
        raise CheckpointError(
            f"{run} was made with another recipe: {', '.join(differing)} differ. Resume with the same recipe, "
            "or start a new run with resume=never"
        )


def _claim(run: Path) -> int:
    """Take the next generation of the run for this process; processes of earlier generations can commit no more."""
    (run / FENCE).mkdir(exist_ok=True)
    while True:
        generation = _newest_generation(run) + 1
        try:
            # O_EXCL: only one of two simultaneous processes gets the number.
            os.close(os.open(run / FENCE / f"generation_{generation:06d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return generation
        except FileExistsError:
            continue


def _newest_generation(run: Path) -> int:
    """Generation of the newest process that opened the run, from 1; 0 for none."""
    found = (CLAIMED.fullmatch(path.name) for path in (run / FENCE).glob("*"))
    return max((int(match[1]) for match in found if match), default=0)


def _hashes(folder: Path) -> dict[str, str | None]:
    return {str(file.relative_to(folder)): _sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
