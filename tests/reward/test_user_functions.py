from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from coupled.reward import RewardError, RewardSpec, Scorer, Status, Task, Verdict
from coupled.reward.functions.process import FunctionProcess
from coupled.reward.score import MAX_FAILURES

TASKS = [
    Task(
        uid=str(n),
        prompt=f"p{n}",
        hidden_tests=(f"assert f({n}) == 1",),
        entry_point="f",
        columns={"level": n, "tag": "x"},
    )
    for n in range(3)
]
COMPLETIONS = ["a", "bb", "ccc"]


def scores(tmp_path: Path, source: str, *, timeout_seconds: float = 10.0, name: str = "score") -> list[float | None]:
    (tmp_path / "my_reward.py").write_text(source)
    with Scorer([RewardSpec(path=f"my_reward.py:{name}")], timeout_seconds=timeout_seconds, root=tmp_path) as scorer:
        return [verdict.score for verdict in scorer.score(TASKS, COMPLETIONS)]


def test_a_function_of_trl_s_signature_runs_unchanged(tmp_path: Path) -> None:
    source = "def score(prompts, completions, **kwargs):\n    return [float(len(c)) for c in completions]"
    assert scores(tmp_path, source) == [1.0, 2.0, 3.0]


def test_an_async_function_runs_too(tmp_path: Path) -> None:
    source = (
        "import asyncio\nasync def score(completions, **kwargs):\n    await asyncio.sleep(0)\n    return [1, 2.5, None]"
    )
    assert scores(tmp_path, source) == [1.0, 2.5, None]


def test_columns_are_lists_of_the_dataset_s_and_the_task_s_values(tmp_path: Path) -> None:
    source = """
def score(prompts, completions, **columns):
    assert prompts == ["p0", "p1", "p2"] and completions == ["a", "bb", "ccc"]
    assert columns == {
        "level": [0, 1, 2], "tag": ["x"] * 3, "uid": ["0", "1", "2"], "visible_tests": [()] * 3, "setup": [""] * 3,
        "hidden_tests": [(f"assert f({n}) == 1",) for n in range(3)], "entry_point": ["f"] * 3,
    }, columns
    return columns["level"]
"""
    assert scores(tmp_path, source) == [0.0, 1.0, 2.0]


def test_a_function_without_keywords_gets_the_columns_it_names(tmp_path: Path) -> None:
    assert scores(tmp_path, "def score(level, unused=3): return level") == [0.0, 1.0, 2.0]


def test_a_class_in_the_user_s_file_can_be_a_dataclass(tmp_path: Path) -> None:
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 2\n"
    )
    assert scores(tmp_path, source + "def score(completions): return [P().x] * 3") == [2.0] * 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def score(completions): return [1.0]", "returned 1 for 3 completions"),
        ("def score(completions): return 1.0", "returned a float: convert it"),
        ("def score(completions): return None", "returned a NoneType: convert it"),
        ("def score(completions): return [1.0, float('nan'), 1.0]", "returned nan at 1: return None for what"),
        ("def score(completions): return [1.0, 1.0, float('inf')]", "returned inf at 2"),
        ("def score(completions): return [1.0, 10**400, 1.0]", "at 1: return None for what"),
        ("def score(completions): return ['1', 1, 1]", "returned '1' (a str) at 0: return a float or None"),
        ("def score(completions): return [1j, 1, 1]", "(a complex) at 0"),
        ("def score(levl): return levl", "requires 'levl': did you mean 'level'?"),
        ("def score(completions):\n    return [1 / 0]", "ZeroDivisionError: division by zero"),
        ("import sys\ndef score(completions): sys.exit(3)", "SystemExit: 3"),
        ("def scores(completions): return []", "must define the function 'score'"),
        ("def scores(completions): return []", "did you mean 'scores'?"),
        ("score = 5", "must define the function 'score'"),
        ("import nothing_of_the_name", "ModuleNotFoundError: No module named 'nothing_of_the_name'"),
        ("def score(", "SyntaxError"),
    ],
)
def test_a_function_that_breaks_a_rule_is_reported_by_name_rule_and_value(
    tmp_path: Path, source: str, message: str
) -> None:
    with pytest.raises(RewardError, match=re.escape(message)) as caught:
        scores(tmp_path, source)
    assert "my_reward.py" in str(caught.value)


def test_the_traceback_of_the_user_s_error_shows_the_user_s_line(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r'my_reward\.py", line 2, in helper'):
        scores(tmp_path, "def helper():\n    raise KeyError('x')\ndef score(completions): return helper()")


def test_a_function_that_hangs_is_reported_with_its_name_and_the_time_it_had(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"my_reward\.py:score was still running after 0\.2 s on 3 completions"):
        scores(tmp_path, "import time\ndef score(completions): time.sleep(60)", timeout_seconds=0.2)
    assert time.monotonic() - start < 20.0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import ctypes; ctypes.string_at(0)", "ended its process with signal 11"),
        ("import os; os._exit(7)", "ended its process with status 7"),
        ("import time; time.sleep(600)", "still running after 0.5 s on 3 completions"),
        ("import os, time; os.fork() or time.sleep(600)", "still running after 0.5 s"),
        ("import os, time; os.fork() and os._exit(7); time.sleep(600)", "still running after 0.5 s"),
    ],
    ids=["segmentation fault", "exit", "hang", "hang of a child that keeps the pipe", "a child outlives it"],
)
def test_a_function_that_ends_or_hangs_is_named_and_is_started_anew_for_the_next_call(
    tmp_path: Path, body: str, message: str
) -> None:
    (tmp_path / "my_reward.py").write_text(
        f"from pathlib import Path\ndef score(completions):\n    if not Path({str(tmp_path / 'fixed')!r}).exists():\n"
        f"        {body}\n        __import__('time').sleep(600)\n    return [1.0] * len(completions)\n"
    )
    spec = RewardSpec(path="my_reward.py:score")
    with Scorer([spec], timeout_seconds=0.5, root=tmp_path) as scorer:
        pids = [scorer._users["score"]._process.pid]
        with pytest.raises(RewardError, match=rf"my_reward\.py:score.*{message}"):
            scorer.score(TASKS, COMPLETIONS)
        (tmp_path / "fixed").touch()
        assert [verdict.score for verdict in scorer.score(TASKS, COMPLETIONS)] == [1.0] * 3
        pids.append(scorer._users["score"]._process.pid)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_function_may_import_the_modules_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "scales.py").write_text("TWO = 2.0\n")
    assert scores(tmp_path, "from scales import TWO\ndef score(completions): return [TWO] * 3") == [2.0] * 3


def test_a_process_that_is_killed_between_calls_is_replaced_and_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "my_reward.py").write_text("def score(completions): return [1.0] * len(completions)")
    with Scorer([RewardSpec(path="my_reward.py:score")], root=tmp_path) as scorer:
        counts = []
        for _ in range(3):
            scorer.score(TASKS, COMPLETIONS)
            counts.append(len(list(Path("/proc/self/fd").iterdir())))
            scorer._users["score"]._process.kill()
            scorer._users["score"]._process.wait()
    assert len(set(counts)) == 1


def test_a_function_keeps_its_state_and_what_it_prints_is_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_reward.py").write_text(
        "import sys\nseen = []\ndef score(completions):\n    seen.extend(completions)\n"
        "    print('x' * 10**6, flush=True)\n    return [len(seen)] * len(completions)\n"
    )
    with Scorer([RewardSpec(path="my_reward.py:score")], root=tmp_path) as scorer:
        scores = [[verdict.score for verdict in scorer.score(TASKS, COMPLETIONS)] for _ in range(2)]
    assert scores == [[3.0] * 3, [6.0] * 3]
    assert len(capfd.readouterr().out) == 2 * (10**6 + 1)


def test_a_function_ends_with_the_process_that_asked_it(tmp_path: Path) -> None:
    (tmp_path / "my_reward.py").write_text(
        f"import os, time\nfrom pathlib import Path\ndef score(completions):\n"
        f"    Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n    time.sleep(600)\n"
    )
    program = (
        "from pathlib import Path\nfrom coupled.reward import RewardSpec, Scorer, Task\n"
        f"scorer = Scorer([RewardSpec(path='my_reward.py:score')], root=Path({str(tmp_path)!r}))\n"
        "scorer.score([Task(uid='u', prompt='', hidden_tests=())], ['text'])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    child = Path("/proc") / (tmp_path / "pid").read_text()
    while child.exists():
        assert time.monotonic() < deadline, "it outlives the process that reads its answers"
        time.sleep(0.02)


FAILS_ON_BB = "def score(completions, uid, **columns):\n    return [{'a': 1.0, 'ccc': 3.0}[c] for c in completions]"


def masked(tmp_path: Path, source: str, **more: Any) -> list[Verdict]:
    (tmp_path / "my_reward.py").write_text(source)
    specs = [RewardSpec(path="my_reward.py:score"), RewardSpec(name="format", weight=0.5)]
    with Scorer(specs, on_error="mask", root=tmp_path, **more) as scorer:
        return scorer.score(TASKS, COMPLETIONS)


def test_with_mask_the_completions_that_a_function_fails_on_have_no_score_and_the_others_keep_theirs(
    tmp_path: Path,
) -> None:
    verdicts = masked(tmp_path, FAILS_ON_BB)
    assert [verdict.score for verdict in verdicts] == [1.0, None, 3.0]
    assert [verdict.status for verdict in verdicts] == [Status.OK, Status.INFRA, Status.OK]
    assert "my_reward.py:score raised" in verdicts[1].detail
    assert "KeyError: 'bb'" in verdicts[1].detail


def test_with_mask_a_function_that_always_fails_is_not_asked_for_ever(tmp_path: Path) -> None:
    many = [replace(TASKS[0], uid=str(n)) for n in range(10)]
    source = "def score(completions):\n    print('asked', flush=True)\n    raise KeyError(len(completions))"
    (tmp_path / "my_reward.py").write_text(source)
    with Scorer([RewardSpec(path="my_reward.py:score")], on_error="mask", root=tmp_path) as scorer:
        with patch.object(FunctionProcess, "score", autospec=True, side_effect=FunctionProcess.score) as asked:
            verdicts = scorer.score(many, ["text"] * 10)
        assert asked.call_count == 1 + MAX_FAILURES
    assert [verdict.score for verdict in verdicts] == [None] * 10
    assert masked(tmp_path, "def score(completions): __import__('os')._exit(3)")[0].status is Status.INFRA


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"path": "my_rewards.py:score"}, r"must exist; received 'my_rewards.py:score'.*did you mean 'my_reward.py'"),
        ({"path": "nowhere/x.py:score"}, r"must exist.*nowhere/x.py: there are: none"),
        ({"path": "my_reward.py"}, r"is 'file.py:function'; received 'my_reward.py'"),
        ({"path": "my_reward.py:not a name"}, r"is 'file.py:function'"),
        ({"name": "cod"}, r"received 'cod': did you mean 'code'\?, or give the path of your own"),
        ({}, r"name=None, path=None: give one; built-in names: code, format"),
        ({"name": "code", "path": "my_reward.py:score"}, r"has a name or a path"),
        ({"name": "format", "weight": float("nan")}, r"a weight is a finite number; format has nan"),
    ],
)
def test_a_specification_that_breaks_a_rule_is_refused(tmp_path: Path, spec: dict[str, Any], message: str) -> None:
    (tmp_path / "my_reward.py").write_text("def score(completions): return [0.0] * 3")
    with pytest.raises(RewardError, match=f"(?s){message}"):
        Scorer([RewardSpec(**spec)], root=tmp_path)


def test_functions_need_names_of_their_own_and_there_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def score(completions): return [0.0] * 3")
    twice = [RewardSpec(path="a.py:score"), RewardSpec(path="./a.py:score")]
    with pytest.raises(RewardError, match="rename one of the functions called 'score'"):
        Scorer(twice, root=tmp_path)
    with pytest.raises(RewardError, match="add one, such as name: code"):
        Scorer([])
    with pytest.raises(RewardError, match="timeout_seconds is above 0; received 0"):
        Scorer([RewardSpec(name="format")], timeout_seconds=0)
    with pytest.raises(RewardError, match="received no executor"):
        Scorer()
