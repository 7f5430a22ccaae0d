#!/usr/bin/env python3
"""Prose check: idioms that plain technical English does without, in docstrings, comments, messages and documentation.

    scripts/prose.py [FILE or FOLDER ...]    # default: packages, benchmarks, scripts, test helpers and documentation

Prints one line per finding and ends with status 1 when there is one. docs/development.md has the word list.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKED = ("rl", "sandbox", "reward", "recipes", "benchmarks", "scripts", "tests/helpers", "docs", "README.md")
HISTORY = ("docs/LOG.md", "docs/results")
"""Records of measurements stay as they were written."""
WORD_LIST = "docs/development.md"
"""The page whose table quotes the idioms: its table rows are not checked."""
IDIOMS = (
    (r"\b(whoever|nobody|somebody)\b", "name the component or the reader"),
    (r"\b(is|are|was|were|be|been|being) (said|told)\b", "software reports, logs, prints or receives"),
    (r", too(?=[.,;:)]|$)", "put 'also' before the verb"),
    (r"\b(says|said|say) of\b", "software reports or states"),
    (r"\b(becomes|became|become) of\b", "'happens to'"),
    (r"\bin vain\b", "say what does not happen"),
    (r"\b(that|those) of\b", "repeat the noun"),
    (r"\bno room\b", "'no capacity', or name what is full"),
)
OPENINGS = (
    (r"What\b", "begin with the thing"),
    (r"Of (the|a|an|all|each|every|this|what)\b", "begin with the noun"),
)
"""Beginnings that a docstring must not have."""
OWN = {"scripts/prose.py"}


def texts(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, text and whether it is a docstring: strings and comments of a Python file, lines of any other file."""
    source = path.read_text()
    if path.suffix != ".py":
        is_quoted = path == ROOT / WORD_LIST
        lines = enumerate(source.splitlines(), 1)
        yield from ((number, line, False) for number, line in lines if not (is_quoted and line.startswith("|")))
        return
    tree = ast.parse(source)
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value, id(node) in docstrings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string, False


def findings(path: Path) -> Iterator[str]:
    """One line per idiom of a file. Example: `rl/run.py:7: 'nobody': name the component or the reader`."""
    name = path.relative_to(ROOT).as_posix()
    for line, text, is_docstring in texts(path):
        if is_docstring:
            for pattern, remedy in OPENINGS:
                if found := re.match(pattern, text.lstrip()):
                    yield f"{name}:{line}: docstring begins with {found[0]!r}: {remedy}"
        for pattern, remedy in IDIOMS:
            for found in re.finditer(pattern, text, re.MULTILINE | re.IGNORECASE):
                at = line + text[: found.start()].count("\n")
                yield f"{name}:{at}: {found[0]!r}: {remedy}"


def files(paths: list[Path]) -> Iterator[Path]:
    """Python and Markdown files below the paths, without records of history."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            name = file.relative_to(ROOT).as_posix()
            if file.suffix in (".py", ".md") and name not in OWN and not name.startswith(HISTORY):
                yield file


def main() -> int:
    """Check the files named on the command line, or all of them."""
    paths = [Path(argument).resolve() for argument in sys.argv[1:]] or [ROOT / name for name in CHECKED]
    found = [line for file in files(paths) for line in findings(file)]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
