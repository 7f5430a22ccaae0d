"""The records of the sandbox: jobs, limits, executions and isolation, and the protocol of executors."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

PROFILES = ("strict", "compat")


class SandboxUnavailable(RuntimeError):
    """This machine cannot run untrusted programs as requested; the message names the reason and a remedy."""


class Outcome(enum.StrEnum):
    """The end of one program. No outcome means that the program is right: the caller compares the values."""

    OK = "ok"
    """Every call was answered (a raised exception is an answer), every input was run to exit status 0."""
    LOAD_ERROR = "load_error"
    """The program, or the setup after it, does not compile or raised while it was loaded."""
    TIMEOUT = "timeout"
    KILLED = "killed"
    """Something other than a limit of ours killed it, such as the kernel's out-of-memory killer."""
    CRASH = "crash"
    """It died of a signal of its own, or, reading stdin, ended with a status other than 0."""
    VIOLATION = "violation"
    """It did what a program here must not do: a forbidden system call, or an attack on its worker."""
    OUTPUT_LIMIT = "output_limit"
    PROTOCOL = "protocol"
    """It wrote something other than the requested replies; its replies are discarded."""
    INCOMPLETE = "incomplete"
    """It ended, or stopped replying, before every call was answered."""
    SANDBOX_ERROR = "sandbox_error"
    """The sandbox failed before the program began."""
    OVERLOADED = "overloaded"
    """The wall time went by while the program waited for a processor."""

    @property
    def is_infrastructure(self) -> bool:
        """True when the outcome proves nothing about the program and nothing it did can have caused it."""
        return self in (Outcome.SANDBOX_ERROR, Outcome.OVERLOADED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Resources that one program may use. Example: `Limits(cpu_seconds=1, memory_mb=256)`."""

    cpu_seconds: int = 2
    """Processor time of the program with all its calls; whole seconds because the kernel counts so."""
    wall_seconds: float = 6.0
    """Time from start to end, whatever the program waits for."""
    memory_mb: int = 512
    """Address space on top of the interpreter's own."""
    output_kb: int = 4096
    """All replies, or all of standard output for all inputs, together."""
    max_files: int = 64
    """Descriptors open at once."""
    file_kb: int = 16_384
    """Size of one file."""
    max_processes: int = 16
    """Threads besides the program itself (profile `compat`: threads and processes together); 0: it can start none.
    Tier `landlock` allows none, whatever the value: there they could not be distinguished from the host's."""

    def __post_init__(self) -> None:
        for name in ("cpu_seconds", "wall_seconds", "memory_mb", "output_kb", "max_files", "file_kb"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"a limit is a finite number above 0; received {name}={value!r}")
        if not isinstance(self.cpu_seconds, int):
            raise ValueError(f"cpu_seconds counts whole seconds; received {self.cpu_seconds!r}: round it up")
        if self.max_files < 8:
            raise ValueError(f"an interpreter needs 8 descriptors; received max_files={self.max_files}")
        if self.max_processes < 0:
            raise ValueError(f"max_processes is 0 or more; received {self.max_processes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the program's. Example: `Call(function="add", args=(1, 2))`."""

    function: str
    """`name`, or `Class().method` for a method of a fresh instance."""
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    may_digest: bool = False
    """True: a reply larger than 64 KB comes as a `Digest`, because it is only compared for equality; one that has no
    digest, because it is equal to nothing, as an opaque value."""
    keep_floats: bool = False
    """True: floats, and lists and tuples of floats alone, come as they are all the same."""
    items: str = ""
    """The only use of a reply by its test: `walked` (as `list` does) or `counted` (as `len` does). One of
    a type that does not travel, such as a generator or a deque, then comes as the list of what it gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestProgram:
    """Tests that are a program of their own. Example: `TestProgram(source="with __part__(0): assert f(1) == 2",
    parts=("0",), names=("f",))`
    """

    __test__ = False  # pytest: this is no test class
    source: str
    parts: tuple[str, ...]
    """The units that are judged one by one: numbers, which the source enters as `with __part__(number):`, or, for test
    classes, `Class.method`."""
    names: tuple[str, ...] = ()
    """Names that the tests take from the program."""
    classes: tuple[str, ...] = ()
    """The names of classes whose objects the tests may hold. Replies of their methods are the program's word."""
    is_in_process: bool = False
    """False: the tests run in a second sandbox, and the program in its own answers their calls. True: both
    share one process, so the program can forge the results of its tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One program with its task: calls, or inputs to read from stdin, or a program that tests it.

    With `calls` the source is loaded once and answers them in order in one process. With `stdin_cases` it
    runs once per input as `__main__`, each in a process of its own. With `tests` there is one result per part:
    True or False, or, in process, [the result of the tests, [[site, value], ...]].
    """

    uid: str
    source: str
    setup: str = ""
    """Code that is loaded after the source, in its namespace, before the first call."""
    calls: tuple[Call, ...] = ()
    stdin_cases: tuple[str, ...] = ()
    tests: TestProgram | None = None
    limits: Limits = field(default_factory=Limits)
    profile: str = "strict"
    """`strict`: computes, with threads. `compat`: may also start processes and open sockets that reach no other
    program; only in tier `namespaces`, and its memory is bounded per process, not in all."""

    def __post_init__(self) -> None:
        if self.calls and self.stdin_cases:
            raise ValueError(f"a job has calls or stdin_cases, not both; job {self.uid!r} has both: make two jobs")
        if self.setup and self.stdin_cases:
            raise ValueError(f"setup goes with calls; job {self.uid!r} reads stdin: put it into the source")
        if self.tests is not None and (self.calls or self.stdin_cases):
            raise ValueError(f"a job has tests alone; job {self.uid!r} has calls or stdin_cases too: make two jobs")
        if self.profile not in PROFILES:
            raise ValueError(f"profile is one of {PROFILES}; job {self.uid!r} has {self.profile!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """An exception as the program reported it: its type's name and its text, both untrusted."""

    type: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallResult:
    """One reply: a value built of builtins only (see `codec`), or an exception."""

    value: object = None
    raised: Raised | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Resources that one program used."""

    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    memory_mb: float = 0.0
    """Most memory resident at once, in MiB, the interpreter's own included; 0.0 when unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """The execution of a job. `results` has one entry per answered call (or input), in order; maybe not all."""

    uid: str
    outcome: Outcome
    results: tuple[CallResult, ...] = ()
    usage: Usage = field(default_factory=Usage)
    tier: str
    stdout: str = ""
    """The beginning of what the program printed (of `calls`, standard error included): untrusted, for people."""
    detail: str = ""
    """One line for people; untrusted where the program caused it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """The isolation of programs on this machine, as it took effect and not as it was requested."""

    tier: str
    user: str
    """User of the program. Example: `uid 62001`."""
    has_network: bool
    """True: nothing keeps the program from the host's network."""
    filesystem: str
    """`private root (...)`, or `host (...)`: what the host lets that user read can be read."""
    processes: str
    """The means that stops processes of the program: `own pid namespace`, `none can be started`, or `killed by the
    worker`."""
    has_filter: bool
    """True: system calls that computing does not need are refused."""
    shown: tuple[str, ...] = ()
    """The host's paths that a program can read."""
    notes: tuple[str, ...] = ()
    """Why something did not take effect, one line each."""


class Executor(Protocol):
    """Runs untrusted programs. Fails closed: an executor that exists isolates as `isolation` reports."""

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        """Return one execution per job, in the order of the jobs, whatever the programs do."""
        ...

    def isolation(self) -> Isolation:
        """Return the isolation of a program on this machine."""
        ...

    def close(self) -> None:
        """End all workers and what they run."""
        ...
