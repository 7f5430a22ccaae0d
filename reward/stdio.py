"""Tests that feed standard input and compare standard output."""

from __future__ import annotations

import json

from coupled.reward.types import UnsupportedTest


def parse_stdio(text: str) -> tuple[str, str]:
    """Return input and expected output of the text that `stdio_test` gave; UnsupportedTest for any other."""
    try:
        test = json.loads(text)
        stdin, stdout = test["input"], test["output"]
    except (ValueError, KeyError, TypeError):
        stdin = stdout = None
    if type(stdin) is not str or type(stdout) is not str:
        raise UnsupportedTest(
            f"a stdio test is a JSON object with texts 'input' and 'output'; received {text[:300]!r}: "
            "build it with coupled.reward.stdio_test"
        )
    return stdin, stdout


def same_output(received: str, expected: str) -> bool:
    """True when all lines are the same up to blanks within a line and blank lines at the end."""
    return _lines(received) == _lines(expected)


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.rstrip().split("\n")]
