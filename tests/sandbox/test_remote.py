"""Tier `remote` against a server that really runs the programs, in this process's own threads."""

from __future__ import annotations

import socket
import textwrap
from collections.abc import Iterator

import pytest
from fusion import Server, serve

from coupled.reward import Judge, Task
from coupled.sandbox import (
    Call,
    Execution,
    Job,
    Limits,
    Outcome,
    RemoteExecutor,
    SandboxUnavailable,
    TestProgram,
    remote,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def executor(server: Server) -> Iterator[RemoteExecutor]:
    with RemoteExecutor(server.url, num_workers=2) as executor:
        yield executor


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_BACKOFF_SECONDS", 0.01)


def run(executor: RemoteExecutor, source: str, *args: object, setup: str = "", **limits: float) -> Execution:
    calls = tuple(Call(function="f", args=(arg,)) for arg in args or (1, 2))
    given = Limits(**({"cpu_seconds": 2, "wall_seconds": 30.0} | limits))  # type: ignore[arg-type]
    (execution,) = executor.run([Job(uid="r", source=source, setup=setup, calls=calls, limits=given)])
    return execution


def test_values_come_back_and_their_types_are_exact(executor: RemoteExecutor) -> None:
    execution = run(executor, "def f(x): return [x, (1.5, {2}), {'k': None}, b'\\x00', 2**70, float('inf'), 'ä\\n☃']")
    assert execution.outcome is Outcome.OK, execution.detail
    assert execution.results[0].value == [1, (1.5, {2}), {"k": None}, b"\x00", 2**70, float("inf"), "ä\n☃"]
    assert execution.tier == "remote"
    assert execution.usage.wall_seconds > 0


def test_exceptions_setup_and_prints_are_as_in_a_local_jail(executor: RemoteExecutor) -> None:
    source = "print('noise', flush=True)\ndef f(x):\n    print('more')\n    return g(x) if x > 1 else 1 / 0"
    execution = run(executor, source, setup="def g(x): return x * 10")
    assert [result.value for result in execution.results] == [None, 20]
    assert execution.results[0].raised is not None
    assert execution.results[0].raised.type == "ZeroDivisionError"


def test_seeds_are_fixed_so_that_a_program_gives_the_same_values_every_time(executor: RemoteExecutor) -> None:
    source = "import random\ndef f(x): return [random.random(), [*{'a', 'b', 'c', 'd', 'e', 'f'}], hash('text')]"
    assert run(executor, source).results == run(executor, source).results


@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("def f(x) return", Outcome.LOAD_ERROR),
        ("raise ValueError('no')", Outcome.LOAD_ERROR),
        ("import os\ndef f(x): os._exit(0)", Outcome.INCOMPLETE),
        ("import sys\nsys.exit(0)", Outcome.LOAD_ERROR),
        ("def f(x):\n    while True: pass", Outcome.TIMEOUT),
        ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSEGV)", Outcome.CRASH),
        ("import os\ndef f(x): os.close(200)", Outcome.INCOMPLETE),
    ],
)
def test_outcomes_are_those_of_a_local_jail(executor: RemoteExecutor, source: str, outcome: Outcome) -> None:
    execution = run(executor, source, cpu_seconds=1)
    assert execution.outcome is outcome, execution


def test_the_wall_limit_is_the_servers_to_keep(executor: RemoteExecutor) -> None:
    execution = run(executor, "import time\ndef f(x): time.sleep(60)", wall_seconds=1.5)
    assert execution.outcome is Outcome.TIMEOUT
    assert execution.usage.wall_seconds < 20


def test_memory_is_limited_on_top_of_the_interpreters_own(executor: RemoteExecutor) -> None:
    execution = run(executor, "def f(x): return len(bytearray(x << 20))", 16, 512, memory_mb=128)
    assert execution.results[0].value == 16 << 20
    assert execution.results[1].raised is not None
    assert execution.results[1].raised.type == "MemoryError"


def test_output_beyond_the_limit_is_the_programs_fault(executor: RemoteExecutor) -> None:
    assert run(executor, "def f(x): return 'x' * 100_000", output_kb=64).outcome is Outcome.OUTPUT_LIMIT
    printing = Job(uid="s", source="print('x' * 100_000)", stdin_cases=("",), limits=Limits(output_kb=64))
    assert executor.run([printing])[0].outcome is Outcome.OUTPUT_LIMIT


def test_an_answer_too_large_to_read_is_the_programs_fault_and_no_failure_of_the_server(
    executor: RemoteExecutor, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_MAX_ANSWER", 1 << 16)
    server.requests.clear()
    assert run(executor, "def f(x): return 'x' * 60_000").outcome is Outcome.OUTPUT_LIMIT
    printing = Job(uid="s", source="print('x' * 100_000)", stdin_cases=("",))
    assert executor.run([printing])[0].outcome is Outcome.OUTPUT_LIMIT
    assert len(server.requests) == 4, "each once, and a canary"


def test_tests_that_speak_with_the_program_are_refused_before_anything_runs(
    executor: RemoteExecutor, server: Server
) -> None:
    server.requests.clear()
    tests = TestProgram(source="with __part__(0): assert f(1)", parts=("0",), names=("f",))
    jobs = [Job(uid="plain", source="", calls=(Call(function="f"),)), Job(uid="t1", source="", tests=tests)]
    with pytest.raises(SandboxUnavailable, match=r"(?s)job 't1' has tests.*remedy: choose another sandbox.tier"):
        executor.run(jobs)
    assert server.requests == []


FORGERIES = {
    "replies in front of ours": """
        import os, __main__
        marker = __main__.GIVEN["marker"].encode()
        os.write(200, b"\\n" + marker + b' {"load":null}\\n')
        for n in range(2):
            os.write(200, b"\\n" + marker + b' {"n":%d,"v":0}\\n' % n)
    """,
    "replies instead of ours": """
        import os, __main__
        marker = __main__.GIVEN["marker"].encode()
        os.write(200, b"\\n" + marker + b' {"load":null}\\n')
        for n in range(2):
            os.write(200, b"\\n" + marker + b' {"n":%d,"v":0}\\n' % n)
        os._exit(0)
    """,
    "a verdict": """
        import os, __main__
        marker = __main__.GIVEN["marker"].encode()
        os.write(200, b"\\n" + marker + b' {"passed":true}\\n')
        os._exit(0)
    """,
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_program_that_reads_the_marker_can_say_values_and_nothing_else(executor: RemoteExecutor, name: str) -> None:
    execution = run(executor, textwrap.dedent(FORGERIES[name]) + "\ndef f(x): return x")
    if name == "replies instead of ours":  # the best it can do: values, which the host compares
        assert [result.value for result in execution.results] == [0, 0]
    else:
        assert execution.outcome is Outcome.PROTOCOL


def test_what_a_request_carries_has_inputs_and_no_expected_value(executor: RemoteExecutor, server: Server) -> None:
    server.requests.clear()
    task = Task(uid="t", prompt="", hidden_tests=("assert f(12345) == 98765",), entry_point="f")
    (judgement,) = Judge(executor).judge_programs([task], ["def f(x): return 98000 + 765"])
    assert judgement.per_test == (True,)
    assert "12345" in server.requests[0]["code"]
    assert "98765" not in str(server.requests)


def test_programs_that_read_stdin_run_once_per_case(executor: RemoteExecutor) -> None:
    source = "import sys\nprint(sum(map(int, sys.stdin)), 'ü')\nprint('noise', file=sys.stderr)"
    (execution,) = executor.run([Job(uid="s", source=source, stdin_cases=("1\n2\n", "40\n2"))])
    assert execution.outcome is Outcome.OK, execution
    assert [result.value for result in execution.results] == ["3 ü\n", "42 ü\n"]
    (failed,) = executor.run([Job(uid="s", source="print(1)\nraise SystemExit(3)", stdin_cases=("",))])
    assert failed.outcome is Outcome.CRASH


@pytest.mark.parametrize("fault", [500, 503, 429, "hang up", "garbage", "sandbox error", "silence"])
def test_a_failure_of_the_server_is_tried_again(executor: RemoteExecutor, server: Server, fault: int | str) -> None:
    server.faults = [fault, fault]
    execution = run(executor, "def f(x): return x")
    assert execution.outcome is Outcome.OK, execution
    assert server.faults == []


def test_a_server_that_keeps_failing_is_infrastructure_and_given_up(executor: RemoteExecutor, server: Server) -> None:
    server.faults = [500] * 3
    execution = run(executor, "def f(x): return x")
    server.faults = []
    assert execution.outcome is Outcome.SANDBOX_ERROR
    assert execution.outcome.is_infrastructure
    assert "status 500" in execution.detail


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as server, RemoteExecutor(server.url) as executor:
        monkeypatch.setattr(remote, "_GRACE_SECONDS", 0.1)
        server.faults = ["hang"] * 3
        execution = run(executor, "def f(x): return x", wall_seconds=0.2)
        assert execution.outcome is Outcome.SANDBOX_ERROR
        assert "imed" in execution.detail


def test_a_connection_is_used_again_and_one_that_the_server_closed_is_replaced() -> None:
    with serve() as server, RemoteExecutor(server.url) as executor:
        for _ in range(3):
            run(executor, "def f(x): return x")
        assert server.num_connections == 1
        server.faults = ["hang up"]
        num_requests = len(server.requests)
        assert run(executor, "def f(x): return x").outcome is Outcome.OK
        assert server.num_connections == 2
        assert len(server.requests) == num_requests + 3, "one that was hung up on, the same again, and a canary"


def test_programs_run_side_by_side_and_keep_their_order(executor: RemoteExecutor) -> None:
    jobs = [
        Job(
            uid=str(n),
            source=f"import time\ndef f(): time.sleep({0.3 * (n == 0)}); return {n}",
            calls=(Call(function="f"),),
        )
        for n in range(6)
    ]
    executions = executor.run(jobs)
    assert [(execution.uid, execution.results[0].value) for execution in executions] == [(str(n), n) for n in range(6)]


def test_no_server_or_another_one_is_refused_at_once_with_a_remedy(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    with pytest.raises(SandboxUnavailable, match=r"(?s)refused.*remedy: sandbox.url is the base address"):
        RemoteExecutor(f"http://127.0.0.1:{free}")
    with pytest.raises(SandboxUnavailable, match=r"(?s)status 404.*remedy"):
        RemoteExecutor(f"{server.url}/elsewhere")
    server.faults = ["garbage"] * 3
    with pytest.raises(SandboxUnavailable, match=r"(?s)no answer of SandboxFusion's.*remedy"):
        RemoteExecutor(server.url)
    RemoteExecutor(f"{server.url}/run_code").close()


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://host", "http://", "http://host/?key=1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="an address is http://"):
        RemoteExecutor(url)


def test_isolation_does_not_claim_what_the_server_does_not_say(executor: RemoteExecutor) -> None:
    isolation = executor.isolation()
    assert isolation.tier == "remote"
    assert isolation.has_network
    assert "isolated as its operator configured it" in isolation.notes[0]


def test_a_closed_executor_refuses(server: Server) -> None:
    executor = RemoteExecutor(server.url)
    executor.close()
    with pytest.raises(RuntimeError, match="open another"):
        executor.run([])
    with pytest.raises(ValueError, match="num_workers=0"):
        RemoteExecutor(server.url, num_workers=0)
