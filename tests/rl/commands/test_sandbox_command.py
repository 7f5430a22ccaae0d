"""`coupled sandbox run`, as a person calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coupled.rl.commands.sandbox import read_task
from coupled.rl.errors import DataError

SQUARE = "print('loading', '\\x1b[31mred')\ndef f(x): return x * x if x < 9 else 0\n"
ASSERTS = ["assert f(2) == 4", "assert f(3) == 9"]


def coupled(tmp_path: Path, source: str, tests: Any, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "program.py").write_text(source)
    (tmp_path / "tests.json").write_text(tests if isinstance(tests, str) else json.dumps(tests))
    command = [sys.executable, "-m", "coupled.rl.cli", "sandbox", "run", str(tmp_path / "program.py"), *options]
    return subprocess.run(
        [*command, "--tests", str(tmp_path / "tests.json")], capture_output=True, text=True, timeout=120
    )


def test_a_program_that_passes_is_shown_with_its_tests_usage_tier_and_output(tmp_path: Path) -> None:
    done = coupled(tmp_path, SQUARE, ASSERTS)
    assert "result" in done.stdout
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for shown in ("pass assert f(2) == 4", "passed 2 of 2", "status pass", " s CPU, ", "loading"):
        assert shown in said
    assert "tier namespaces: " in said or "tier landlock: " in said
    assert "\x1b[31m" not in done.stdout, "a program must not paint the terminal"


def test_a_program_that_fails_one_test_says_which_and_ends_with_1(tmp_path: Path) -> None:
    done = coupled(tmp_path, SQUARE, {"tests": [*ASSERTS, "assert f(9) == 81"], "entry_point": "f"}, "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert [test["passed"] for test in found["tests"]] == [True, True, False]
    assert (found["passed"], found["outcome"]) == (False, "ok")
    assert found["usage"]["wall_seconds"] > 0
    assert found["tier"] in ("namespaces", "landlock")
    assert (found["verdict_tier"], found["is_weak"]) == ("T0", False)


def test_tests_in_the_program_s_process_must_be_asked_for_and_are_called_weak(tmp_path: Path) -> None:
    unit = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(2), 4)"
    tests = {"style": "script", "tests": [unit], "entry_point": "f"}
    refused = coupled(tmp_path, SQUARE, tests)
    assert refused.returncode == 2, refused.stdout
    assert "--allow-weak" in refused.stderr
    done = coupled(tmp_path, SQUARE, tests, "--allow-weak")
    if "profile 'compat' is available in tier 'namespaces' only" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert "verdict T2: weak" in " ".join(done.stdout.split())


def test_stdio_tests_compare_what_is_printed(tmp_path: Path) -> None:
    cases = [{"input": "1 2", "output": "3\n"}, {"input": "4 5", "output": "10"}]
    done = coupled(tmp_path, "print(sum(map(int, input().split())))", {"style": "stdio", "tests": cases})
    assert done.returncode == 1, done.stderr
    assert "passed 1 of 2" in " ".join(done.stdout.split())
    assert r"'9\n'" in done.stdout, "what it printed instead is shown"


@pytest.mark.parametrize(
    ("tests", "options", "said"),
    [
        ("[", (), "is not JSON"),
        ([], (), "has no tests. Tests are a JSON list"),
        ({"test": ASSERTS, "tests": ASSERTS}, (), "has the unknown key 'test'; known are tests, entry_point"),
        ({"style": "riddle", "tests": ASSERTS}, (), "riddle"),
        (ASSERTS, ("--tier", "fortress"), "Input should be 'auto'"),
        (ASSERTS, ("--tier", "remote"), "sandbox.url goes with sandbox.tier=remote"),
        (ASSERTS, ("--tier", "remote", "--url", "http://127.0.0.1:9"), "remedy: sandbox.url is the base address"),
        (ASSERTS, ("--colour",), "No such option"),
    ],
)
def test_what_cannot_be_judged_ends_with_2_and_says_why(
    tmp_path: Path, tests: Any, options: tuple[str, ...], said: str
) -> None:
    done = coupled(tmp_path, SQUARE, tests, *options)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read"):
        read_task(tmp_path / "nowhere.json")


def test_a_syntax_error_fails_every_test_and_runs_nothing(tmp_path: Path) -> None:
    done = coupled(tmp_path, "def f(x) return", ASSERTS, "--json")
    assert done.returncode == 1, done.stderr
    assert not any(test["passed"] for test in json.loads(done.stdout)["tests"])
