"""Dataset rows for the stages before RL, one at a time: JSONL, Parquet, a folder of either, or a hub dataset.

An unreadable row is replaced by a `Bad` row with the reason, which the reader counts and skips.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from coupled.rl.data.parquet import read_parquet
from coupled.rl.errors import DataError, nearest


@dataclass(frozen=True, slots=True)
class Bad:
    """An unusable row, or the unusable rest of a shard. Example: `Bad("not UTF-8")`."""

    reason: str


Row = dict[str, Any] | Bad


def read_rows(path: str, *, split: str = "train", first: int = 0) -> Iterator[Row]:
    """Rows from number `first` on, in the order of the files and within them. Blank lines are not rows.

    Raises:
        DataError: the file does not exist, or the hub dataset cannot be streamed.
    """
    place = Path(path)
    if place.is_dir():
        shards = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES)
        if not shards:
            raise DataError(f"{path} holds no dataset: put {', '.join(SUFFIXES)} files there")
    elif place.suffix.lower() in SUFFIXES:
        refuse_missing(place)
        shards = [place]
    else:
        yield from stream_hub(path, split=split, first=first)
        return
    if len(shards) == 1 and shards[0].suffix.lower() == ".parquet":
        yield from _whole(read_parquet(shards[0], first), shards[0])
        return
    yield from islice((row for shard in shards for row in _shard(shard)), first, None)


def _shard(file: Path) -> Iterator[Row]:
    return _whole(read_parquet(file) if file.suffix.lower() == ".parquet" else _json_rows(file), file)


def _whole(rows: Iterator[Row] | Iterator[dict[str, Any]], file: Path) -> Iterator[Row]:
    try:
        yield from rows
    except (DataError, EOFError, OSError, zlib.error):
        yield Bad(f"the rest of the corrupt shard {file.name}")


def _json_rows(file: Path) -> Iterator[Row]:
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines):
            if number == 0 and ".json" in file.suffixes and line.lstrip().startswith(b"["):
                yield from _array(line + lines.read())
                return
            if line.strip():
                yield _json_row(line)


def _array(text: bytes) -> Iterator[Row]:
    """Rows of a file that is one JSON array."""
    rows = _parsed(text)
    if isinstance(rows, Bad):
        yield rows
        return
    yield from (row if isinstance(row, dict) else Bad("not a JSON object") for row in rows)


def _json_row(line: bytes) -> Row:
    row = _parsed(line)
    return row if isinstance(row, dict | Bad) else Bad("not a JSON object")


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError:
        return Bad("not UTF-8")
    except (json.JSONDecodeError, RecursionError):
        return Bad("not JSON")


SUFFIXES = (".jsonl", ".json", ".parquet", ".gz")
"""Suffixes of data files; any other path is a dataset of the hub."""


def load_rows(path: str, *, split: str = "train") -> list[dict[str, Any]]:
    """All rows of a dataset, through the `datasets` library.

    Raises:
        DataError: the file does not exist, is not a dataset, or has no rows.
    """
    import datasets

    datasets.disable_progress_bars()
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix in SUFFIXES:
        refuse_missing(file)
        kind = "parquet" if suffix == ".parquet" else "json"
        arguments: dict[str, Any] = {"path": kind, "data_files": str(file), "split": "train"}
    else:
        arguments = {"path": path, "split": split}
    try:
        rows = datasets.load_dataset(**arguments).to_list()
    except Exception as error:  # the library raises a dozen types for unreadable input; all mean the same to a user
        raise DataError(f"cannot read the dataset {path} ({type(error).__name__}: {error})") from error
    if not rows:
        raise DataError(f"the dataset {path} has no rows")
    return list(rows)


def stream_hub(path: str, *, split: str, first: int) -> Iterator[dict[str, Any]]:
    """Rows of a hub dataset from number `first` on, downloaded on demand.

    Raises:
        DataError: not a dataset, or no network.
    """
    import datasets

    try:
        yield from datasets.load_dataset(path, split=split, streaming=True).skip(first)
    except Exception as error:  # as in load_rows
        raise DataError(f"cannot stream the dataset {path} ({type(error).__name__}: {error})") from error


def refuse_missing(file: Path) -> None:
    """Raise a DataError that names the nearest file name if the file does not exist."""
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path()
        raise DataError(f"no dataset at {file}; {nearest(file.name, [p.name for p in folder.iterdir()])}")
