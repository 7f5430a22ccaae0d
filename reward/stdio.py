"""Tests that feed standard input and compare standard output."""

from __future__ import annotations

import json
import math

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


def same_output(received: str, expected: str, atol: float = 0.0) -> bool:
    """True when all lines are the same up to blanks within a line and blank lines at the end.

    With a tolerance, two words that are numbers may differ by `atol`, or by `atol` times the expected one where
    that is larger than 1.
    """
    left, right = _lines(received), _lines(expected)
    if left == right or atol == 0:
        return left == right
    return [len(line) for line in left] == [len(line) for line in right] and all(
        _same_word(word, wanted, atol)
        for line, other in zip(left, right, strict=True)
        for word, wanted in zip(line, other, strict=True)
    )


def _same_word(word: str, wanted: str, atol: float) -> bool:
    if word == wanted:
        return True
    try:
        number, received = float(wanted), float(word)
    except ValueError:
        return False
    if not (math.isfinite(number) and math.isfinite(received)):
        return number == received  # to an infinite one, every number would be near
    return abs(received - number) <= atol * max(1.0, abs(number))


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.rstrip().split("\n")]
