"""A worker: one zygote of a tier, replaced when it has died, and a second one beside it for tests that are programs."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from typing import Any

from coupled.sandbox import zygote_process
from coupled.sandbox.conversation import LOCKED, Conversation, Finished, run_program
from coupled.sandbox.diagnosis import remedy
from coupled.sandbox.types import Isolation, Limits, SandboxUnavailable
from coupled.sandbox.zygote_process import START_SECONDS, WorkerDied, ZygoteProcess, claim_uid, find_packages

_TRIAL = "import sched"
"""A module of the standard library that the zygote does not load beforehand."""


class Worker:
    """Owns a zygote and its companion. Not for use by two threads at once; `run` brings a dead zygote back."""

    def __init__(self, tier: str, preload: Sequence[str] = ()) -> None:
        self.tier = tier
        self._preload = tuple(preload)
        self._packages = find_packages(preload)
        self._claim: socket.socket | None
        self._uid, self._claim = claim_uid() if os.geteuid() == 0 else (os.getuid(), None)
        self._zygote: ZygoteProcess | None = None
        self._companion: Worker | None = None
        self._is_closed = False
        self.incarnation = 0
        try:
            self.isolation: Isolation = self._start()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """Process id of the zygote; None while there is none."""
        return None if self._zygote is None else self._zygote.pid

    def companion(self) -> Worker:
        """Return the worker beside this one, for the tests of the program that runs here; both are ready.

        Raises SandboxUnavailable when one cannot be started.
        """
        self._make_ready("strict")
        if self._companion is None:
            self._companion = Worker(self.tier, self._preload)
        self._companion._make_ready("strict")
        return self._companion

    def converse(self, body: bytes, limits: Limits, profile: str = "strict") -> Conversation:
        """Start one program whose job is `body` and exchange frames with it. Raises as `run` does."""
        zygote = self._make_ready(profile)
        conversation = Conversation(zygote, *zygote.start_program(limits, profile), limits)
        try:
            conversation.send(body)
        except BaseException:
            conversation.abandon()
            raise
        return conversation

    def run(self, body: bytes, limits: Limits, stdin: bytes | None = None, profile: str = "strict") -> Finished:
        """Run one program whose job is `body`; with `stdin` all of its standard output is collected.

        Raises WorkerDied when the zygote is gone before the program could start, SandboxUnavailable when it
        cannot be started again, or has no such profile.
        """
        return run_program(self._make_ready(profile), body, limits, stdin, profile)

    def _make_ready(self, profile: str) -> ZygoteProcess:
        if profile != "strict" and self.tier != "namespaces":
            raise SandboxUnavailable(
                f"profile {profile!r} is available in tier 'namespaces' only; this is {self.tier!r}"
            )
        if self._zygote is None or not self._zygote.is_idle:
            self.restart()
        assert self._zygote is not None, "restart started one"
        return self._zygote

    def restart(self) -> None:
        """End the zygote, if it lives, and start another; SandboxUnavailable when that fails."""
        self._stop()
        if self._companion is not None:
            self._companion._stop()  # and started again when it is needed
        self.isolation = self._start()

    def close(self) -> None:
        """End the zygote and whatever it runs, for good; harmless when repeated."""
        self._is_closed = True
        self._stop()
        if self._claim is not None:
            self._claim.close()
        if self._companion is not None:
            self._companion.close()

    def forget(self) -> None:
        """In a forked copy of the host: drop the sockets, so that the zygote still notices its host's end."""
        if self._companion is not None:
            self._companion.forget()
        if self._claim is not None:
            self._claim.close()
        if self._zygote is not None:
            self._zygote.forget()
        self._zygote = None

    def _start(self) -> Isolation:
        if self._is_closed:
            raise RuntimeError("a worker that was closed starts no more: make another")
        self.incarnation += 1
        self._zygote = ZygoteProcess(self.tier, self._uid, self._packages, self._preload)
        try:
            _try_out(self._zygote, self.tier)
        except BaseException:
            self._stop()
            raise
        return _isolation(self.tier, self._zygote.hello)

    def _stop(self) -> None:
        if self._zygote is not None:
            self._zygote.stop()
            self._zygote = None


def _try_out(zygote: ZygoteProcess, tier: str) -> None:
    """Prove that a program is locked down and can import what the zygote has not loaded; else SandboxUnavailable."""
    job = {"mode": "calls", "source": _TRIAL, "setup": "", "calls": []}
    try:
        # Not `Worker.run`, which would restart a zygote that dies at once forever.
        run = run_program(zygote, json.dumps(job).encode(), Limits(wall_seconds=START_SECONDS), None, "strict")
    except WorkerDied as error:
        raise SandboxUnavailable(
            f"tier {tier!r} could not start: {error}\nremedy: {remedy(tier, str(error))}"
        ) from error
    if run.stream[:1] != bytes([LOCKED]) or json.loads(run.stream[5:] or b"0") != {"load": None}:
        written = run.stream[:1].hex() + run.stream[5:].decode(errors="replace")
        raise SandboxUnavailable(
            f"tier {tier!r}: a program must be locked down as uid {zygote.hello['uid']} and read the standard library; "
            f"the trial ({_TRIAL!r}) gave {written[-1500:]!r}, exit {run.exit}; {'; '.join(zygote.hello['notes'])}\n"
            f"remedy: as root grant CAP_SETUID and CAP_SETGID and use an interpreter everybody may read "
            f"(this one: {zygote_process.PYTHON}), or run as a normal user"
        )


def _isolation(tier: str, hello: dict[str, Any]) -> Isolation:
    namespaces = hello["namespaces"]
    filesystem, processes = {
        "namespaces": (
            "private root (system libraries and the interpreter, read-only; an empty /tmp per program)",
            "own pid namespace",
        ),
        "landlock": ("host (system libraries and the interpreter can be read, nothing written)", "none can be started"),
        "process": (f"host (whatever uid {hello['uid']} may read)", "killed by the worker"),
    }[tier]
    return Isolation(
        tier=tier,
        user=f"uid {hello['uid']}",
        has_network=tier == "process" and "network" not in namespaces,
        filesystem=filesystem,
        processes=processes,
        has_filter=tier != "process",
        shown=tuple(hello["shown"]),
        notes=tuple(hello["notes"]),
    )
