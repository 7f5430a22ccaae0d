"""The program in a completion, and how well the completion keeps to the format.

The format part is 1.0 for a fenced python block whose code parses, 0.5 for a fenced block whose code does
not, 0.0 without one. Decisions on the cases that the rule leaves open:

* A fence opens on a line of its own: three backticks and `python`, at most three spaces before, blanks after.
* It closes on the next line that starts with three backticks. Without that line there is no block: 0.0. A
  completion cut off inside its program has not kept to the format.
* The first python block counts, whatever comes after it; blocks in other languages, or in none, are skipped.
* A block without a statement (empty, comments only) does not count as parsing: 0.5.
* Code without a fence is 0.0, even when it would run. Indented body-only code does not parse: 0.5.
"""

from __future__ import annotations

import ast
import re
import unicodedata
import warnings
from dataclasses import dataclass

MAX_CODE = 100_000
"""Characters; a longer program is not parsed and counts as one that does not parse. The host parses without a time
limit, and parsing can cost time that grows with the square of the text: half a second at this length."""
MAX_NAME = 300
"""Bound on the marks of one letter, and on the parts of one dotted name. A longer name would cost minutes: such a
program counts as one that does not parse."""

_FENCE = re.compile(r"^ {0,3}```([^`\n]*)$", re.MULTILINE)
_CLOSE = re.compile(r"^[ \t]*```", re.MULTILINE)
_DOTTED = re.compile(rf"(?:\.[\s\\]*+\w++[\s\\]*+){{{MAX_NAME}}}")
_FOREIGN = re.compile(rf"[^\x00-\x7f]{{{MAX_NAME}}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """The program and the format part of a completion. Example: `Extraction(code="x = 1", format=1.0)`."""

    code: str | None
    """The text of the first closed python block; None without one."""
    format: float
    """1.0, 0.5 or 0.0; see the head of this file."""


def extract(completion: str) -> Extraction:
    """Return the first python block of a completion and its format part. Never raises, never runs code."""
    text = completion.replace("\r\n", "\n")
    start = 0
    while (opening := _FENCE.search(text, start)) is not None:
        closing = _CLOSE.search(text, opening.end())
        if closing is None:
            break
        if opening[1].strip() == "python":
            code = text[opening.end() + 1 : closing.start()]
            return Extraction(code=code, format=1.0 if has_program(code) else 0.5)
        line_end = text.find("\n", closing.end())
        start = len(text) if line_end < 0 else line_end + 1
    return Extraction(code=None, format=0.0)


def has_program(code: str) -> bool:
    """True when the text parses as Python and has at least one statement."""
    if len(code) > MAX_CODE or _DOTTED.search(code) or (_FOREIGN.search(code) and _has_endless_name(code)):
        return False
    with warnings.catch_warnings():
        # An invalid escape in a string is a warning; a caller that turns warnings into errors must get the same reward.
        warnings.simplefilter("ignore")
        try:
            return bool(ast.parse(code).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False


def _has_endless_name(code: str) -> bool:
    """True when more than MAX_NAME marks in a row follow one letter: Python sorts them pair by pair."""
    length = 0
    for character in code:
        is_mark = all(map(unicodedata.combining, unicodedata.normalize("NFKD", character)))
        length = length + 1 if is_mark else 0
        if length > MAX_NAME:
            return True
    return False
