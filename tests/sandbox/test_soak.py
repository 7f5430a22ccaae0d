"""Many mixed programs on one worker: nothing grows, nothing is left, every program ends as it did before."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import pytest

from coupled.sandbox import TIERS, SandboxUnavailable, zygote_process

NUM_PROGRAMS = int(os.environ.get("COUPLED_SOAK_PROGRAMS", "300"))
"""5000 for the whole soak, which takes minutes per tier."""


@pytest.mark.slow
@pytest.mark.parametrize("tier", [tier for tier in TIERS if tier != "auto"])
def test_nothing_grows_and_every_program_ends_as_before(
    tier: str,
    load_benchmark: Callable[[str], ModuleType],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tier != "namespaces":
        # There programs read the interpreter where it lies; in `namespaces` it is shown to them.
        monkeypatch.setattr(zygote_process, "PYTHON", request.getfixturevalue("open_python"))
    try:
        assert load_benchmark("sandbox").soak(tier, NUM_PROGRAMS) == []
    except SandboxUnavailable as error:
        pytest.skip(f"this machine has no tier {tier}: {error}")
