from __future__ import annotations

from collections.abc import Iterator

import pytest

from coupled.sandbox import LocalExecutor, open_executor


@pytest.fixture(scope="session")
def executor() -> Iterator[LocalExecutor]:
    """Two workers, shared by the tests of rewards."""
    with open_executor(num_workers=2) as executor:
        yield executor


@pytest.fixture(scope="session")
def numpy_executor() -> Iterator[LocalExecutor]:
    """One worker whose programs may import numpy."""
    pytest.importorskip("numpy")
    with open_executor(num_workers=1, preload=("numpy",)) as executor:
        yield executor
