"""Parquet files, through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from coupled.rl.errors import DataError

BATCH_ROWS = 1024


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a file, which appears complete or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = path.with_name(f".partial-{path.name}")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    partial.rename(path)


def read_parquet(path: Path, first: int = 0) -> Iterator[dict[str, Any]]:
    """Rows from number `first` on, a row group at a time; earlier row groups are not read.

    Raises:
        DataError: not a Parquet file, or a corrupt one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            start = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if start + size > first:
                    yield from file.read_row_group(group).to_pylist()[max(0, first - start) :]
                start += size
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}); download or write it again") from error


def count_rows(path: Path) -> int:
    """Rows of a file, from its footer alone. Raises DataError when the file is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}); take it out of the folder") from error


def read_chosen(path: Path, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The rows with the given numbers, in file order. At most one batch is in memory, whatever the size of the file.

    Example: `read_chosen(path, [0, 5])`. Files of earlier versions may lack columns.
    """
    import pyarrow.parquet as pq

    wanted, start = sorted(rows), 0
    found: list[dict[str, Any]] = []
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS) if wanted else ():
            here = [row - start for row in wanted if start <= row < start + batch.num_rows]
            found += batch.take(here).to_pylist() if here else []
            start += batch.num_rows
            if start > wanted[-1]:
                break
    return found
