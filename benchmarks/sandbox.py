"""The cost of running a program: processor time per program by method, and programs per second.

    python benchmarks/sandbox.py                 # a table; writes docs/results/sandbox.json and .md; under four minutes
    python benchmarks/sandbox.py --soak 5000     # a soak instead: growth, leftovers and changing verdicts end it with 1

A row needs what it measures: `bwrap` for bubblewrap (or `--bwrap PATH`); an environment with `evalplus` 0.3.1 for its
checker: `python -m venv /tmp/e && /tmp/e/bin/pip install evalplus==0.3.1`, then `--evalplus-python /tmp/e/bin/python`.

As root, the tiers `landlock` and `process` need an interpreter that everybody may read; where this one is not, name
another of the same version: `--python /usr/bin/python3`. All methods use it.

A job is one program with five tests. The methods take turns, round by round, so that a busy machine is unfair to all
alike; figures are medians over the rounds, with the smallest and the largest. Processor time counts everything that
works for a method: this process, the zygotes, what they run, and every process that was waited for. Bubblewrap does not
wait for the first process of its pid namespace; this one adopts such orphans and waits for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.report import RESULTS, commit, loads, processor, whole_help, write_report
from harness.tables import held, ranged, table

from coupled.sandbox import TIERS, Call, Job, Limits, Outcome, SandboxUnavailable, open_executor, zygote_process
from coupled.sandbox.executor import LocalExecutor

TICK = os.sysconf("SC_CLK_TCK")
LIMITS = Limits(cpu_seconds=10, wall_seconds=60.0)
NUM_TESTS = 5

_BODY = "def f(x):\n    total = 0\n    for n in range(x):\n        total += n * n\n    return total + 7\n"
_USUAL = (
    "from typing import List, Dict, Optional\nimport math, re, heapq, itertools, collections, functools, random, "
    "string, datetime\n"
)
PROGRAMS = {
    "trivial": _BODY,
    "usual imports": _USUAL + _BODY,
    "numpy": "import numpy as np\n" + _BODY.replace("total + 7", "int(np.int64(total)) + 7"),
    "10 ms of work": _BODY.replace("    return", "    for n in range(30_000): total ^= n & 0\n    return"),
}
EXPECTED = [sum(n * n for n in range(x)) + 7 for x in range(1, NUM_TESTS + 1)]
BARS = {
    "python -c per test": {"trivial": 15, "usual imports": 30, "numpy": 80},
    "bubblewrap and python per program": {"trivial": 3, "usual imports": 7, "numpy": 20},
}
"""At least how many times the processor time of ours."""
_PR_SET_CHILD_SUBREAPER = 36
_EVALPLUS = """
import json, sys
from evalplus.eval import PASS, untrusted_check
print("ready", flush=True)
for line in sys.stdin:
    source, count, inputs, expected = json.loads(line)
    for _ in range(count):
        status, _ = untrusted_check("humaneval", source, inputs, "f", expected, 0, [1.0] * len(inputs))
        if status != PASS:
            sys.exit(f"evalplus gave {status}")
    print("done", flush=True)
"""
PROGRAMS_PER_SECOND = 200

_ASSERTS = [f"assert f({x}) == {value}" for x, value in enumerate(EXPECTED, 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Median, smallest and largest over the rounds. Example: `Figure(median=3.1, low=2.9, high=3.6)`."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(median=statistics.median(values), low=min(values), high=max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to run programs: `run` takes a source and how often, and raises if a result is wrong."""

    name: str
    run: Callable[[str, int], None]
    num_jobs: int
    """Programs per round: more for a fast method, so that the clock's ticks do not matter."""
    roots: Callable[[], Sequence[int]] = list
    """Processes of its own that live on between programs."""


def cpu_seconds(roots: Sequence[int]) -> float:
    """Processor time so far of this process, of all it has waited for, and of `roots` with their descendants."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used) + sum(map(_family_seconds, roots))


def _wait_for_orphans(known: set[int]) -> None:
    """Wait for every child of this process but the known ones, so that their time is charged to it."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for pid in set(map(int, children)) - known:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _family_seconds(pid: int) -> float:
    try:
        # utime, stime, and both of the children it has waited for: a program's time goes to its zygote
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields)) / TICK + sum(_family_seconds(int(child)) for child in children)


def ours(executor: LocalExecutor, tier: str) -> Method:
    def run(source: str, count: int) -> None:
        calls = tuple(Call(function="f", args=(x,)) for x in range(1, NUM_TESTS + 1))
        for execution in executor.run([Job(uid="b", source=source, calls=calls, limits=LIMITS)] * count):
            values = [result.value for result in execution.results]
            if execution.outcome is not Outcome.OK or values != EXPECTED:
                raise RuntimeError(f"tier {tier} gave {execution}")

    def roots() -> list[int]:
        return [worker.pid for worker in executor._workers if worker.pid is not None]

    return Method(name=f"ours, {tier}", run=run, num_jobs=100, roots=roots)


def commands(name: str, prefix: Sequence[str], *, is_per_test: bool = False, num_jobs: int = 4) -> Method:
    """A fresh interpreter per program, or per test; passed means exit status 0."""
    # Another interpreter finds numpy where this one has it.
    site_packages = str(Path(zygote_process.find_packages(["numpy"])[0]).parent)
    borrowed = os.environ | {"PYTHONPATH": site_packages}

    def run(source: str, count: int) -> None:
        is_borrower = "numpy" in source and sys.executable != zygote_process.PYTHON
        environment = borrowed if is_borrower else os.environ
        bodies = [[line] for line in _ASSERTS] if is_per_test else [_ASSERTS]
        for _ in range(count):
            for lines in bodies:
                code = source + "\n" + "\n".join(lines)
                subprocess.run([*prefix, zygote_process.PYTHON, "-c", code], check=True, timeout=60, env=environment)

    return Method(name=name, run=run, num_jobs=num_jobs)


def evalplus(python: str, stack: ExitStack) -> Method:
    """The checker of the package evalplus, in the interpreter that has it: a fork per program, no isolation."""
    process = stack.enter_context(
        subprocess.Popen([python, "-c", _EVALPLUS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    stack.callback(stdin.close)

    def expect(word: str) -> None:
        if (said := stdout.readline().strip()) != word:
            raise RuntimeError(f"evalplus in {python} was to say {word!r}; it said {said!r}")

    def run(source: str, count: int) -> None:
        inputs = [[x] for x in range(1, NUM_TESTS + 1)]
        print(json.dumps([source, count, inputs, EXPECTED]), file=stdin, flush=True)
        expect("done")

    expect("ready")
    return Method(name="evalplus' own checker (fork, no isolation)", run=run, num_jobs=20, roots=lambda: [process.pid])


def in_namespaces(bwrap: str | None) -> tuple[list[Method], list[str]]:
    """A fresh interpreter per program in namespaces made for it, by bubblewrap and by `unshare`."""
    methods, notes = [], []
    user = [] if os.getuid() == 0 else ["--user", "--map-current-user"]
    spaces = ["--mount", "--pid", "--ipc", "--net", "--uts", "--fork", "--mount-proc"]
    view = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]
    for name, prefix in {
        "bubblewrap": [bwrap or "bwrap", "--unshare-all", *view],
        "unshare": [shutil.which("unshare") or "unshare", *user, *spaces],
    }.items():
        try:
            subprocess.run([*prefix, "true"], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            notes.append(f"{name} and python per program: not measured, {error}")
        else:
            methods.append(commands(f"{name} and python per program", prefix))
    notes.append(
        "bubblewrap (`--unshare-all`, the host's / read-only, new /dev, /proc and /tmp) does not wait for the first "
        "process of its pid namespace: this benchmark adopts it (PR_SET_CHILD_SUBREAPER) and waits for it"
    )
    return methods, notes


def measure(methods: Sequence[Method], programs: dict[str, str], rounds: int) -> dict[str, dict[str, Figure]]:
    """Milliseconds of processor time per program: method -> program -> figure."""
    seen: dict[tuple[str, str], list[float]] = {}
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0) != 0:
        raise OSError("orphans cannot be adopted, so bubblewrap's time would be lost: use Linux 3.4 or newer")
    for number in range(rounds + 1):
        for kind, source in programs.items():
            for method in methods:
                count = method.num_jobs if number else 1  # the first round warms caches and is not counted
                before = cpu_seconds(method.roots())
                method.run(source, count)
                _wait_for_orphans({pid for other in methods for pid in other.roots()})
                spent = cpu_seconds(method.roots()) - before
                if number:
                    seen.setdefault((method.name, kind), []).append(1000 * spent / count)
    return {method.name: {kind: Figure.of(seen[method.name, kind]) for kind in programs} for method in methods}


def throughput(tier: str, rounds: int) -> Figure:
    """Trivial programs per second of wall time with a worker per processor."""
    num_workers = len(os.sched_getaffinity(0))
    with _open(tier, num_workers, ["numpy"]) as executor:
        method = ours(executor, tier)
        method.run(PROGRAMS["trivial"], 50)
        rates = []
        for _ in range(rounds):
            start = time.perf_counter()
            method.run(PROGRAMS["trivial"], 300)
            rates.append(300 / (time.perf_counter() - start))
    return Figure.of(rates)


def _open(tier: str, num_workers: int, preload: Sequence[str] = ()) -> LocalExecutor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tier process says that it contains nothing; here it is one row of a table
        return open_executor(tier, num_workers=num_workers, preload=preload)


def verdicts(costs: dict[str, dict[str, Figure]], rates: dict[str, Figure]) -> list[str]:
    """One line per bar: held or missed, with the ratio."""
    lines = []
    for tier in [name for name in costs if name in ("ours, namespaces", "ours, landlock")]:
        for other, bars in BARS.items():
            if other not in costs:
                continue
            for kind, bar in bars.items():
                ratio = costs[other][kind].median / costs[tier][kind].median
                lines.append(
                    f"{tier}: {other} costs {ratio:.1f} times as much, {kind} (bar {bar}): {held(ratio >= bar)}"
                )
    for tier, rate in rates.items():
        lines.append(
            f"ours, {tier}: {rate.median:.0f} trivial programs/s (bar {PROGRAMS_PER_SECOND} on two quiet cores): "
            f"{held(rate.median >= PROGRAMS_PER_SECOND)}"
        )
    return lines


def markdown(report: dict[str, Any], costs: dict[str, dict[str, Figure]], lines: Sequence[str]) -> str:
    """The report as a page."""
    kinds = list(PROGRAMS)
    rows = [
        (name, *(ranged(f.median, f.low, f.high, ".1f") for f in map(row.get, kinds) if f))
        for name, row in costs.items()
    ]
    about = [f"* {key}: {value}" for key, value in report.items() if isinstance(value, str)]
    return "\n".join(
        [
            "# The cost of running a program",
            "",
            "One program with five tests. Median (smallest–largest) of rounds that take turns.",
            "",
            *table(("ms of processor time per program", *kinds), rows),
            "",
            *(f"* {line}" for line in lines),
            "",
            *about,
            "",
        ]
    )


def benchmark(rounds: int, output: Path, bwrap: str | None, evalplus_python: str | None) -> bool:
    """Measure, print and write; True when every bar that applies was held."""
    notes: list[str] = []
    tiers: list[str] = []
    with ExitStack() as stack:
        methods = []
        for tier in (name for name in TIERS if name != "auto"):
            try:
                methods.append(ours(stack.enter_context(_open(tier, 1, ["numpy"])), tier))
                tiers.append(tier)
            except SandboxUnavailable as error:
                notes.append(f"tier {tier}: {error}".splitlines()[0])
        methods.append(commands("python -c per test", [], is_per_test=True, num_jobs=2))
        methods.append(commands("one python per program", []))
        confined, how = in_namespaces(bwrap)
        methods += confined
        notes += how
        if evalplus_python is None:
            notes.append("evalplus' own checker: not measured; see the head of benchmarks/sandbox.py")
        else:
            methods.append(evalplus(evalplus_python, stack))
            notes.append("evalplus 0.3.1: its process has its imports loaded before the first program, as ours have")
        costs = measure(methods, PROGRAMS, rounds)
    rates = {tier: throughput(tier, rounds) for tier in tiers}
    bars = verdicts(costs, rates)
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/sandbox.py", *sys.argv[1:]]),
        "commit": commit("--verify"),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {processor() or 'processor unknown'}",
        "system": platform.platform(),
        "interpreter": f"{platform.python_version()}; of the programs: {_version(zygote_process.PYTHON)}",
        "load": loads() + " at the end",
        "cpu_ms": {name: {kind: asdict(figure) for kind, figure in row.items()} for name, row in costs.items()},
        "programs_per_second": {tier: asdict(rate) for tier, rate in rates.items()},
        "bars": bars,
        "notes": notes,
    }
    page = markdown(report, costs, [*bars, *notes])
    print(page)
    write_report(report, output / "sandbox.json", lambda _: page, indent=2)
    return not any("MISSED" in line for line in bars)


def _version(python: str) -> str:
    return subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]


_FILES = """
import os
def f(x):
    try: os.close(os.open("a", os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError: pass  # tier landlock has no place to write
    return 5
"""
_THREADS = """
import threading
def f(x):
    threads = [threading.Thread(target=print) for _ in range(2)]
    try:
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    except RuntimeError: pass  # tier landlock has no threads
    return 6
"""
# What a soak mixes: source, how it must end each time, and how many in a hundred.
MIX: tuple[tuple[str, str, int], ...] = (
    ("def f(x): return x * x + 7", "ok 8", 44),
    ("def f(x): return x", "ok 1", 15),
    ("def f(x): raise ValueError(x)", "ok ValueError", 10),
    ("def f(x) return x", "load_error", 5),
    ("import os\ndef f(x): os._exit(0)", "incomplete", 8),
    ("def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 22))", "ok MemoryError", 5),
    (_FILES, "ok 5", 6),
    (_THREADS, "ok 6", 5),
    ("import ctypes\nctypes.string_at(0)", "crash", 1),
    ("import time\ntime.sleep(60)", "timeout", 1),
)


def soak(tier: str, num_programs: int) -> list[str]:
    """Run mixed programs on one worker; return what grew, was left, or ended otherwise than before."""
    found: list[str] = []
    with _open(tier, 1) as executor:
        worker = executor._workers[0]
        assert worker.pid is not None
        first, ran = worker.pid, 0
        after_warm_up: dict[str, float] = {}
        jobs = [
            Job(
                uid=expected,
                source=source,
                calls=(Call(function="f", args=(1,)),),
                limits=Limits(
                    cpu_seconds=1, wall_seconds=0.3 if "sleep" in source else 30.0, memory_mb=64, max_processes=4
                ),
            )
            for source, expected, share in MIX
            for _ in range(share)
        ]
        while ran < num_programs:
            for execution in executor.run(jobs):
                ending = str(execution.outcome)
                if execution.results:
                    reply = execution.results[0]
                    ending += f" {reply.raised.type if reply.raised else reply.value}"
                if ending != execution.uid:
                    found.append(f"{execution.uid} ended as {ending}: {execution.detail}")
            ran += len(jobs)
            now = _held_by(os.getpid()) | {f"zygote {k}": v for k, v in _held_by(*_family(first)).items()}
            after_warm_up = after_warm_up or now
        for name, value in now.items():
            # Pages come and go with the allocator; descriptors and processes may not.
            allowed = after_warm_up[name] + (6 if "MB" in name else 0)
            print(f"tier {tier}, {ran} programs, {name}: {after_warm_up[name]:.1f} after {len(jobs)}, {value:.1f} now")
            if value > allowed:
                found.append(f"{name} grew from {after_warm_up[name]} to {value}")
        if worker.pid != first:
            found.append("the zygote was replaced")
    return found


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in _family(int(child)))]


def _held_by(*pids: int) -> dict[str, float]:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return {
        "MB": pages * os.sysconf("SC_PAGESIZE") / (1 << 20),
        "descriptors": float(sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)),
        "processes": float(len(pids)),
    }


def main() -> None:
    parser = whole_help(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often every method takes its turn")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="run N mixed programs per tier instead")
    parser.add_argument("--python", default=zygote_process.PYTHON, help="the interpreter that programs run in")
    parser.add_argument("--bwrap", help="bubblewrap, where it is not on the path")
    parser.add_argument("--evalplus-python", metavar="PATH", help="an interpreter that has evalplus 0.3.1")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    zygote_process.PYTHON = options.python
    if not options.soak:
        sys.exit(0 if benchmark(options.rounds, options.output, options.bwrap, options.evalplus_python) else 1)
    failed = False
    for tier in (name for name in TIERS if name != "auto"):
        try:
            found = soak(tier, options.soak)
        except SandboxUnavailable as error:
            print(f"tier {tier}: {error}")
            continue
        print("\n".join(found) or f"tier {tier}: nothing grew, nothing is left, every program ended as before")
        failed |= bool(found)
    sys.exit(failed)


if __name__ == "__main__":
    main()
