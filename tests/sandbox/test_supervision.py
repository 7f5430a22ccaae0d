"""Workers: order, restarts, ends, forks and threads of the host."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coupled.sandbox import (
    Call,
    Execution,
    Job,
    Limits,
    LocalExecutor,
    Outcome,
    SandboxUnavailable,
    TestProgram,
    conversation,
    open_executor,
    zygote_process,
)
from coupled.sandbox import executor as executor_module
from coupled.sandbox import worker as worker_module
from coupled.sandbox.jail import zygote as zygote_module

REPOSITORY = Path(__file__).parents[2]


def job(uid: str, body: str = "return x + 1", **limits: float) -> Job:
    given = Limits(**({"cpu_seconds": 1, "wall_seconds": 20.0} | limits))  # type: ignore[arg-type]
    source = f"import os, time, signal\ndef f(x): {body}"
    return Job(uid=uid, source=source, calls=(Call(function="f", args=(1,)),), limits=given)


def test_executions_come_in_the_order_of_the_jobs_and_each_job_has_one() -> None:
    jobs = [job("slow", "time.sleep(0.3); return 0"), *(job(str(n), f"return {n}") for n in range(20))]
    with open_executor(num_workers=2) as executor:
        executions = executor.run(jobs)
    assert [execution.uid for execution in executions] == [job.uid for job in jobs]
    assert [execution.results[0].value for execution in executions] == [0, *range(20)]


def test_programs_that_hang_do_not_keep_others_from_their_status() -> None:
    hang = job("hang", "time.sleep(60)", wall_seconds=0.3)
    with open_executor() as executor:
        outcomes = [execution.outcome for execution in executor.run([hang, job("a"), hang, job("b")])]
    assert outcomes == [Outcome.TIMEOUT, Outcome.OK, Outcome.TIMEOUT, Outcome.OK]


def test_no_jobs_give_no_executions(executor: LocalExecutor) -> None:
    assert executor.run([]) == []


def _zygote(executor: LocalExecutor) -> int:
    pid = executor._workers[0].pid
    assert pid is not None
    return pid


def test_a_zygote_that_died_is_started_again() -> None:
    with open_executor() as executor:
        os.kill(_zygote(executor), signal.SIGKILL)
        os.waitid(os.P_PID, _zygote(executor), os.WEXITED | os.WNOWAIT)
        assert executor.run([job("a")])[0].outcome is Outcome.OK
        assert executor.run([job("b")])[0].outcome is Outcome.OK


def test_a_zygote_that_no_longer_answers_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote_process, "_REPORT_SECONDS", 0.2)
    with open_executor() as executor:
        first = _zygote(executor)
        # The whole family: the first process of the pid namespace is the one that answers.
        stopped = [first, *_descendants(first)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        assert executor.run([job("a", wall_seconds=0.3)])[0].outcome is Outcome.OK
        assert _zygote(executor) != first
        assert not any(_is_alive(pid) for pid in stopped)


def _descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in _descendants(child)]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_failure_before_the_program_starts_is_infrastructure_and_tried_three_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries = []
    run = worker_module.Worker.run

    def counting(self: worker_module.Worker, body: bytes, *args: object) -> object:
        if b"cannot" in body:
            tries.append(1)
        return run(self, body, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(worker_module.Worker, "run", counting)
    impossible = job("cannot", "return 'cannot'")
    object.__setattr__(impossible.limits, "max_files", -7)  # no limit of the kernel's: the lock-down fails
    with open_executor() as executor:
        (execution,) = executor.run([impossible])
        assert execution.outcome is Outcome.SANDBOX_ERROR
        assert execution.outcome.is_infrastructure
        assert "setrlimit" in execution.detail or "ValueError" in execution.detail
        assert len(tries) == 3
        assert executor.run([job("after")])[0].outcome is Outcome.OK


def test_an_overloaded_run_is_tried_again_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def overloaded(run: object, job: Job) -> executor_module.Reading:
        attempts.append(1)
        return executor_module.Reading(outcome=Outcome.OVERLOADED)

    monkeypatch.setattr(executor_module, "read_calls", overloaded)
    with open_executor() as executor:
        assert executor.run([job("a")])[0].outcome is Outcome.OVERLOADED
    assert len(attempts) == 3


EXITS = Job(uid="exits", source="import sys; print('right'); sys.exit(1)", stdin_cases=("",))
TESTS = TestProgram(source="with __part__(0):\n    assert f(1) == 2", parts=("0",), names=("f",))
TESTED = Job(uid="tested", source="def f(x): return x + 1", tests=TESTS)


@pytest.mark.parametrize("interrupted", [job("calls"), dataclasses.replace(TESTED, source="while True: pass")])
def test_after_an_interrupted_run_the_next_program_gets_its_own_report(
    interrupted: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object, *args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with open_executor() as executor:
        executor.run([TESTED])
        before = _zygote(executor)
        num_open = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(conversation, "_attend", interrupt)
            patch.setattr(conversation.Conversation, "send", interrupt)
            with pytest.raises(KeyboardInterrupt):
                executor.run([interrupted])
        assert not _is_alive(before)  # nor what it ran
        assert [executor.run([EXITS])[0].outcome for _ in range(2)] == [Outcome.CRASH] * 2
        assert executor.run([TESTED])[0].results[0].value is True
        assert len(os.listdir("/proc/self/fd")) == num_open


def test_the_report_of_a_program_before_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    receive = zygote_process.ZygoteProcess._receive
    stale = [{"serial": 1, "exit": 0, "cpu_seconds": 0.0, "memory_kb": 0, "queued_seconds": 0.0}]
    with open_executor() as executor:
        monkeypatch.setattr(
            zygote_process.ZygoteProcess,
            "_receive",
            lambda self, seconds: stale.pop() if stale else receive(self, seconds),
        )
        (execution,) = executor.run([EXITS])
    assert stale == []
    assert (execution.outcome, execution.detail) == (Outcome.CRASH, "exit 1")


def test_when_the_program_s_end_fails_its_tests_are_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = conversation.Conversation.finish
    with open_executor() as executor:
        assert executor.run([TESTED])[0].outcome is Outcome.OK
        companion = executor._workers[0].companion()

        def fails(self: conversation.Conversation) -> conversation.Finished:
            if self._zygote is companion._zygote:
                return finish(self)
            self.abandon()
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(conversation.Conversation, "finish", fails)
            with pytest.raises(MemoryError):
                executor.run([TESTED])
        assert companion._zygote is not None
        assert companion._zygote.is_idle
        assert executor.run([TESTED])[0].outcome is Outcome.OK


def test_the_tests_worker_is_ready_before_the_program_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    start, converse = worker_module.Worker._start, worker_module.Worker.converse

    def starting(self: worker_module.Worker) -> object:
        order.append("start")
        return start(self)

    def conversing(self: worker_module.Worker, *args: object) -> object:
        order.append("converse")
        return converse(self, *args)  # type: ignore[arg-type]

    with open_executor() as executor:
        monkeypatch.setattr(worker_module.Worker, "_start", starting)
        monkeypatch.setattr(worker_module.Worker, "converse", conversing)
        assert executor.run([TESTED])[0].results[0].value is True
        assert order == ["start", "converse", "converse"]
        executor._workers[0].companion()._stop()
        assert executor.run([TESTED])[0].results[0].value is True
        assert order == ["start", "converse", "converse"] * 2


def test_nothing_to_read_where_there_was_to_be_something_is_no_end_and_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program that may open its own output for reading can take back what it wrote, between poll and read."""
    read = conversation._read_some
    calls: list[int] = []

    def every_other(fd: int, most: int) -> bytes | None:
        calls.append(fd)
        return None if len(calls) % 2 else read(fd, most)

    with open_executor() as executor, monkeypatch.context() as patch:
        patch.setattr(conversation, "_read_some", every_other)
        assert executor.run([job("a")])[0].results[0].value == 2
        assert executor.run([TESTED])[0].results[0].value is True
    receiving, sending = os.pipe()
    os.set_blocking(receiving, False)
    assert read(receiving, 9) is None
    os.close(sending)
    assert read(receiving, 9) == b""
    os.close(receiving)
    assert read(receiving, 9) == b""


def test_bytes_out_of_band_are_bytes_like_any_other(executor: LocalExecutor) -> None:
    """Refused in `strict`; a program that may use sockets can send one."""
    source = "import socket, time\nsocket.socket(fileno=3).send(b'x', socket.MSG_OOB)\ntime.sleep(0.1)"
    limits = Limits(cpu_seconds=1, wall_seconds=20.0)
    for tried in (
        Job(uid="c", source=source, calls=(Call(function="f"),), limits=limits, profile="compat"),
        Job(uid="t", source=source, tests=TESTS, limits=limits, profile="compat"),
    ):
        first, second = executor.run([tried, job("b")])
        assert first.outcome in (Outcome.PROTOCOL, Outcome.INCOMPLETE), first
        assert first.usage.wall_seconds < 10.0
        assert second.results[0].value == 2


def test_a_pipe_that_is_filled_as_fast_as_it_is_emptied_does_not_hold_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_executor() as executor:
        talk = executor._workers[0].converse(b"{}", Limits(cpu_seconds=1, wall_seconds=20.0))
        with monkeypatch.context() as patch:
            patch.setattr(conversation, "_read_some", lambda fd, most: b"x" * most)
            talk._drain()
        assert len(talk._stdout) == conversation.STDOUT_KEPT
        talk.finish()


def test_no_descriptor_leaks_when_an_input_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise OSError("no seals here")

    with open_executor() as executor:
        num_open = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(zygote_process.fcntl, "fcntl", refuse)
            (execution,) = executor.run([EXITS])
        assert execution.outcome is Outcome.SANDBOX_ERROR
        assert "no seals here" in execution.detail
        assert len(os.listdir("/proc/self/fd")) == num_open
        assert executor.run([EXITS])[0].outcome is Outcome.CRASH


def test_a_zygote_that_dies_after_its_hello_is_unavailable_and_not_started_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_temporary_files: Path
) -> None:
    for name in ("zygote", "child", "codec", "confine", "seccomp", "landlock"):
        shutil.copy(REPOSITORY / "sandbox/jail" / f"{name}.py", tmp_path)
    source = (tmp_path / "zygote.py").read_text()
    hello = "    control.send(json.dumps(hello).encode())\n"
    assert hello in source
    (tmp_path / "zygote.py").write_text(source.replace(hello, f"{hello}    os._exit(3)\n"))
    monkeypatch.setattr(zygote_process, "_ZYGOTE", tmp_path / "zygote.py")
    monkeypatch.setattr(executor_module, "_held", set())
    with pytest.raises(SandboxUnavailable, match=r"(?s)'namespaces'.*'landlock'.*remedy: "):
        open_executor()
    assert not list(own_temporary_files.glob("coupled-sandbox-*"))


def test_a_zygote_that_falls_silent_is_no_program_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a contained program does can stop it: the machine did."""
    monkeypatch.setattr(zygote_process, "_REPORT_SECONDS", 0.2)
    monkeypatch.setattr(executor_module, "_NUM_RETRIES", 0)
    with open_executor() as executor:
        first = _zygote(executor)

        def stop() -> None:
            for pid in [first, *_descendants(first)]:
                os.kill(pid, signal.SIGSTOP)

        timer = threading.Timer(1.0, stop)
        timer.start()
        (execution,) = executor.run([job("a", "time.sleep(60)", wall_seconds=3.0)])
        timer.join()
        assert execution.outcome is Outcome.SANDBOX_ERROR, execution
        assert "did not report" in execution.detail
        assert executor.run([job("b")])[0].outcome is Outcome.OK


def test_only_time_that_nobody_in_the_program_took_counts_as_waiting() -> None:
    assert zygote_module.kept_waiting(queued=0.9, ran=0.1, cpu_seconds=0.1) == pytest.approx(0.9)
    assert zygote_module.kept_waiting(queued=0.75, ran=0.25, cpu_seconds=1.0) == 0.0  # four threads, one processor
    assert zygote_module.kept_waiting(queued=1.5, ran=0.25, cpu_seconds=1.0) == pytest.approx(0.75)
    assert zygote_module.kept_waiting(queued=0.0, ran=0.5, cpu_seconds=4.0) == 0.0


def test_busy_threads_of_a_program_are_not_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing runs without the interpreter's lock: five threads want one processor, and wait for each other."""
    body = """
    import hashlib, threading
    def spin():
        while True: hashlib.sha256(bytes(1 << 20))
    for _ in range(4): threading.Thread(target=spin, daemon=True).start()
    spin()"""
    monkeypatch.setattr(executor_module, "_NUM_RETRIES", 0)
    outcomes = []
    with open_executor() as executor:
        zygote = _zygote(executor)
        for pid in [zygote, *_descendants(zygote)]:
            os.sched_setaffinity(pid, {min(os.sched_getaffinity(0))})
        for _ in range(6):  # the machine may really be busy, but hardly every time
            outcomes += [run.outcome for run in executor.run([job("a", body, cpu_seconds=9, wall_seconds=1.0)])]
            if outcomes[-1] is Outcome.TIMEOUT:
                break
    assert outcomes[-1] is Outcome.TIMEOUT, outcomes


def test_processes_that_fork_faster_than_they_are_ended_do_not_hold_the_zygote(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    class Endless:
        def living_children(self, here: object) -> list[int]:
            started.append(os.posix_spawn("/bin/sleep", ["sleep", "60"], {}, setpgroup=0))
            return started[-1:]

    monkeypatch.setattr(zygote_module, "_MAX_SWEEPS", 5)
    zygote_module.sweep(None, Endless())
    assert len(started) == 5
    assert not any(map(_is_alive, started))


def test_time_spent_waiting_for_a_processor_is_measured() -> None:
    """Three busy programs on one processor: each waits for two thirds of its wall time."""
    outcomes = _crowd("\n    while True: pass")
    assert outcomes == [Outcome.OVERLOADED] * 3


@pytest.mark.parametrize("request_less", ["os.nice(1)", "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))"])
def test_a_program_that_asks_for_less_than_its_share_has_only_itself_to_blame(request_less: str) -> None:
    assert Outcome.OVERLOADED not in _crowd(f"\n    {request_less}\n    while True: pass")


def _crowd(body: str) -> list[Outcome]:
    crowd = [job(str(n), body, cpu_seconds=5, wall_seconds=1.0) for n in range(3)]
    with pytest.MonkeyPatch.context() as patch, open_executor(num_workers=3) as executor:
        patch.setattr(executor_module, "_NUM_RETRIES", 0)
        cpu = min(os.sched_getaffinity(0))
        for worker in executor._workers:
            assert worker.pid is not None
            for pid in [worker.pid, *_descendants(worker.pid)]:
                os.sched_setaffinity(pid, {cpu})
        return [execution.outcome for execution in executor.run(crowd)]


def test_an_executor_opened_in_a_pool_thread_outlives_the_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        executor = pool.submit(open_executor).result()
    with executor:
        first = _zygote(executor)
        assert executor.run([job("a")])[0].outcome is Outcome.OK
        assert _zygote(executor) == first


def test_threads_of_the_host_may_share_an_executor() -> None:
    with open_executor(num_workers=2) as executor:
        results: list[Execution] = []
        threads = [
            threading.Thread(target=lambda n=n: results.extend(executor.run([job(str(n), f"return {n}")] * 5)))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 20
    assert all(result.results[0].value == int(result.uid) for result in results)


def _try_in_fork(executor: LocalExecutor, answer: multiprocessing.SimpleQueue[str]) -> None:
    try:
        executor.run([job("a")])
    except RuntimeError as error:
        answer.put(str(error))


def test_a_forked_copy_refuses_to_run_and_does_no_harm() -> None:
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    with open_executor() as executor:
        process = context.Process(target=_try_in_fork, args=(executor, answer))
        process.start()
        process.join()
        assert "belongs to the process that opened it" in answer.get()
        assert executor.run([job("a")])[0].outcome is Outcome.OK


_HOST = """
import os, sys, time
from coupled.sandbox import *
executor = open_executor()
zygote = executor._workers[0].pid
if os.fork() == 0:
    time.sleep(60)  # an innocent fork must not keep the zygote alive
    os._exit(0)
print(zygote, flush=True)
executor.run([Job(uid="a", source="while True: pass", calls=(), limits=Limits(cpu_seconds=50, wall_seconds=50.0))])
"""


def test_when_the_host_is_killed_its_zygotes_and_their_programs_go_too(own_temporary_files: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOST], stdout=subprocess.PIPE, start_new_session=True) as host:
        assert host.stdout is not None
        zygote = int(host.stdout.readline())
        deadline = time.monotonic() + 20
        while len(family := [zygote, *_descendants(zygote)]) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(family) >= 2
        host.kill()
        host.wait()
        while any(map(_is_alive, family)) and time.monotonic() < deadline:
            time.sleep(0.02)
        left = [pid for pid in family if _is_alive(pid)]
        os.killpg(host.pid, signal.SIGKILL)  # the innocent fork
    assert left == []
    assert not list(own_temporary_files.glob("coupled-sandbox-*"))


def test_close_ends_every_process_and_removes_every_directory(own_temporary_files: Path) -> None:
    executor = open_executor(num_workers=2)
    family = [worker.pid for worker in executor._workers if worker.pid is not None]
    family += [below for pid in family for below in _descendants(pid)]
    executor.close()
    executor.close()
    assert not any(map(_is_alive, family))
    assert not list(own_temporary_files.glob("coupled-sandbox-*"))
    with pytest.raises(RuntimeError, match="open another"):
        executor.run([job("a")])


def test_descriptors_and_directories_do_not_pile_up(executor: LocalExecutor) -> None:
    kinds = [job("a"), job("b", "os._exit(0)"), job("c", "return 'x' * (8 << 20)")]
    read = Job(uid="s", source="print(input())", stdin_cases=("a",))
    executor.run([*kinds, read])
    before = len(os.listdir("/proc/self/fd"))
    executor.run([*kinds, read] * 5)
    assert len(os.listdir("/proc/self/fd")) == before


def test_unknown_tiers_and_impossible_numbers_are_refused_with_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"tier is one of 'auto', 'namespaces', 'landlock', 'process'; received 'fortress'"
    ):
        open_executor("fortress")
    with pytest.raises(ValueError, match="num_workers=0"):
        open_executor(num_workers=0)
    with pytest.raises(ValueError, match="cpu_seconds=0"):
        Limits(cpu_seconds=0)
    with pytest.raises(ValueError, match="round it up"):
        Limits(cpu_seconds=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="make two jobs"):
        Job(uid="a", source="", calls=(Call(function="f"),), stdin_cases=("a",))


def test_other_systems_than_linux_are_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module.sys, "platform", "darwin")
    with pytest.raises(SandboxUnavailable, match="this is darwin: use a Linux machine"):
        open_executor()


def test_a_worker_that_cannot_lock_programs_down_is_not_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("zygote", "child", "codec", "confine", "seccomp", "landlock"):
        shutil.copy(REPOSITORY / "sandbox/jail" / f"{name}.py", tmp_path)
    source = (tmp_path / "confine.py").read_text()
    broken = source.replace("    _drop_capabilities()\n", "    raise PermissionError('no capset here')\n", 1)
    assert broken != source
    (tmp_path / "confine.py").write_text(broken)
    monkeypatch.setattr(zygote_process, "_ZYGOTE", tmp_path / "zygote.py")
    with pytest.raises(SandboxUnavailable, match=r"(?s)no capset here.*remedy: "):
        open_executor("namespaces")


_DEGRADED = """
import json, os, pathlib, tempfile, threading, time, warnings
from coupled.sandbox import *
def go(executor, body, **limits):
    source = "import os, time, signal\\ndef f(): " + body
    given = Limits(**({"cpu_seconds": 1, "wall_seconds": 2.0} | limits))
    return executor.run([Job(uid="d", source=source, calls=(Call(function="f"),), limits=given)])[0]
DAEMON = '''
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 64)
            time.sleep(600)
        os._exit(0)
    os.wait()
    return 1
'''
def left(uid):
    found = []
    for p in pathlib.Path("/proc").iterdir():
        try:
            if p.name.isdigit() and p.stat().st_uid == uid:
                if (p / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found.append(str(p))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return found
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    opened = open_executor("process")
with opened as executor:
    uid = int(executor.isolation().user.split()[1])
    daemon = go(executor, DAEMON, max_processes=8)
    alive = left(uid)
    zygote = executor._workers[0].pid
    threading.Timer(0.5, os.kill, (zygote, 9)).start()
    orphan = go(executor, "time.sleep(600)", wall_seconds=20.0)
    time.sleep(0.1)
    alive += left(uid)
    found = {
        "orphan": [orphan.outcome, orphan.usage.wall_seconds < 10],
        "has_network": executor.isolation().has_network,
        "filesystem": executor.isolation().filesystem[:4],
        "daemon": daemon.results[0].value,
        "alive": alive,
        "kill parent": go(executor, "os.kill(os.getppid(), 9)").results[0].raised.type,
        "kill all": str(go(executor, "os.kill(-1, 9); return 8").outcome),
        "tree": go(executor, "[(os.mkdir('d'), os.chdir('d')) for _ in range(1500)]; return 1").outcome,
        "after": go(executor, "return os.listdir('.')").results[0].value,
        "limited": sorted({"infinite loop", "sleep", "memory hog", "many descriptors", "privileges", "thread bomb"}
            - {check.name for check in run_self_check(executor) if check.held}),
    }
found["warned"] = ["does not contain a hostile program" in str(warning.message) for warning in said]
found["left"] = [str(p) for p in pathlib.Path(tempfile.gettempdir()).glob("coupled-sandbox-*")]
print(json.dumps(found))
"""


def test_without_namespaces_root_still_confines_programs_and_says_what_it_lacks(tmp_path: Path) -> None:
    """As in a container with the usual capabilities: no CAP_SYS_ADMIN, so no namespace of any kind."""
    python, setpriv = "/usr/bin/python3", shutil.which("setpriv")
    if os.getuid() != 0 or setpriv is None or not os.access(python, os.X_OK):
        pytest.skip("needs root, setpriv and a python everybody may read, to give up CAP_SYS_ADMIN")
    version = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True
    )
    if version.stdout.strip() != "True":
        pytest.skip(f"{python} is older than 3.11")
    links = tmp_path / "coupled"
    links.mkdir()
    tmp_path.chmod(0o755)
    (links / "sandbox").symlink_to(REPOSITORY / "sandbox")
    scratch = Path(tempfile.mkdtemp(prefix="degraded-"))
    scratch.chmod(0o711)
    try:
        done = subprocess.run(
            [setpriv, "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", python, "-c", _DEGRADED],
            env={
                "PYTHONPATH": str(tmp_path),
                "TMPDIR": str(scratch),
                "PATH": os.environ["PATH"],
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            capture_output=True,
            text=True,
        )
    finally:
        shutil.rmtree(scratch)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "orphan": ["violation", True],
        "has_network": True,
        "filesystem": "host",
        "daemon": 1,
        "alive": [],
        "kill parent": "PermissionError",
        "kill all": "ok",
        "tree": "ok",
        "after": [],
        "limited": [],
        "warned": [True],
        "left": [],
    }
