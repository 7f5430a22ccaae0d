from __future__ import annotations

from collections.abc import Iterator

import pytest

from coupled.sandbox import LocalExecutor, open_executor


@pytest.fixture(scope="session")
def executor() -> Iterator[LocalExecutor]:
    """Two workers, shared by the tests of rewards."""
    with open_executor(num_workers=2) as executor:
        yield executor
