"""Benchmarks: lookup by name, and reading of problems from a local file. docs/benchmarks.md shows how to add one."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from coupled.reward import RewardError
from coupled.rl.data.rows import load_rows
from coupled.rl.data.tasks import to_task
from coupled.rl.errors import DataError, nearest
from coupled.rl.evaluation.benchmarks.adapters import BENCHMARKS, FAMILIES, fenced_program
from coupled.rl.evaluation.benchmarks.types import Benchmark, Problem, Prompting

__all__ = ["BENCHMARKS", "Benchmark", "Problem", "Prompting", "data_file", "find_benchmarks", "load_problems"]


def find_benchmarks(names: str) -> list[Benchmark]:
    """The benchmarks of a comma-separated list: known names, or JSONL and Parquet files of tasks.

    Example: `humaneval+,cruxeval,my/tasks.jsonl`.

    Raises:
        DataError: an unknown name; the message has the nearest known one.
    """
    found: dict[str, Benchmark] = {}
    for name in (part.strip() for part in names.split(",")):
        if not name:
            continue
        if name in BENCHMARKS or name in FAMILIES:
            found |= {each: BENCHMARKS[each] for each in FAMILIES.get(name, (name,))}
        elif name.endswith((".jsonl", ".json", ".parquet", ".gz")):
            own = _own(Path(name))
            found[own.name] = own
        else:
            raise DataError(
                f"unknown benchmark {name!r}; {nearest(name, [*BENCHMARKS, *FAMILIES])} A JSONL or Parquet file of "
                "tasks (columns prompt, hidden_tests) is accepted as well"
            )
    if not found:
        raise DataError(f"--benchmark names at least one of {', '.join([*BENCHMARKS, *FAMILIES])}; got {names!r}")
    return list(found.values())


def data_file(benchmark: Benchmark, data: Path) -> Path:
    """Path of the benchmark's data file.

    Raises:
        DataError: there is none; the message has its source and the place to put it.
    """
    for name in benchmark.files:
        if (data / name).is_file():
            return data / name
    raise DataError(
        f"no data of {benchmark.name} below {data}; files are not downloaded automatically. Get "
        f"{benchmark.download} and put it at {data / benchmark.files[0]}, or name its folder with --data"
    )


def load_problems(benchmark: Benchmark, file: Path) -> list[Problem]:
    """All problems of a file, in file order.

    Raises:
        DataError: the file cannot be read, or lacks a column of the benchmark.
    """
    problems = []
    for index, row in enumerate(_rows(file)):
        try:
            problems.append(benchmark.problem(row))
        except (KeyError, RewardError) as error:
            raise DataError(
                f"row {index} of {file} is not a row of {benchmark.name}: {error}. Get {benchmark.download}"
            ) from error
    if len({problem.task.uid for problem in problems}) != len(problems):
        raise DataError(f"two problems of {file} have the same name; names must be unique")
    return problems


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    digest = sha256()
    with file.open("rb") as source:
        while part := source.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def _rows(file: Path) -> Sequence[Mapping[str, Any]]:
    if file.suffix == ".parquet":
        return load_rows(str(file))
    # Not through `datasets`, which rejects a column with lists of numbers in one row and lists of texts in another.
    try:
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if file.name.removesuffix(".gz").endswith(".json"):
            content = json.loads(text)
            return list(content.values()) if isinstance(content, dict) else content
        return [json.loads(line) for line in text.decode().splitlines() if line.strip()]
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}): copy or download it again") from error


def _own(file: Path) -> Benchmark:
    """A user's file as a benchmark: tasks with the columns of training data."""

    def problem(row: Mapping[str, Any]) -> Problem:
        task = to_task(dict(row), {}, 0)
        if row.get("uid") is None:
            task = replace(task, uid=sha256(task.prompt.encode()).hexdigest()[:12])
        return Problem(task=task, question=task.prompt, opening=task.prompt)

    if not file.is_file():
        beside = [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(f"no benchmark file at {file}; {nearest(file.name, beside)}")
    name = file.name.split(".")[0]
    return Benchmark(
        name=name,
        files=(str(file.resolve()),),
        download="a file of tasks in our columns",
        num_problems=0,
        problem=problem,
        program=fenced_program,
    )
