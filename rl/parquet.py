"""Parquet files, through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coupled.rl.errors import DataError


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = path.with_name(f".partial-{path.name}")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    partial.rename(path)


def read_parquet(path: Path, first: int = 0) -> Iterator[dict[str, Any]]:
    """Rows from number `first` on, a row group at a time; groups before it are not read.

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
