"""Dataset rows for the stages before RL, one at a time: JSONL, Parquet, a folder of either, or a hub dataset.

What cannot be read is a `Bad` row with its reason, in its place: the reader counts it, and goes on.
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
from coupled.rl.data.tasks import SUFFIXES, refuse_missing, stream_hub
from coupled.rl.errors import DataError


@dataclass(frozen=True, slots=True)
class Bad:
    """A row, or the rest of a shard, that cannot be used. Example: `Bad("not UTF-8")`."""

    reason: str


Row = dict[str, Any] | Bad


def read_rows(path: str, *, split: str = "train", first: int = 0) -> Iterator[Row]:
    """Rows from number `first` on, in the order of the files and within them. Blank lines are not rows.

    Raises:
        DataError: there is no such file, or a hub dataset that cannot be streamed.
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
