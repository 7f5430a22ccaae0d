"""Extraction of the program from a completion, for benchmarks.

More lenient than `coupled.reward.extract`, which rewards the format: here a model must not lose points for the fences
of its answer. Rules:

* chat: the first fenced block (of Python, or of no stated language; the last one may lack its closing fence) that
  defines the entry point. A block with the body alone is put under the opening. Without a fence the
  whole text is the program.
* completion: the opening with its continuation, cut where the text stops being one program: at a fence, where it no
  longer parses, and at the first statement after the entry point that is no definition, import or assignment.
* Nothing is added to a program (no imports, no helpers of the prompt) and nothing is repaired.
"""

from __future__ import annotations

import ast
import re
import warnings

_FENCE = re.compile(r"^[ \t]{0,3}```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_LANGUAGES = ("", "python", "py", "python3")
_HARMLESS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)


def blocks(completion: str) -> list[str]:
    """The fenced blocks of Python, or of no stated language, in order; the last one may be unclosed."""
    text = completion.replace("\r\n", "\n")
    return [found[2] for found in _FENCE.finditer(text) if found[1].lower() in _LANGUAGES]


def parsed(code: str) -> ast.Module | None:
    """The syntax tree, or None when the text is not valid Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape in a string is no error
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def defines(code: str, entry_point: str | None) -> bool:
    """True when the code parses and defines the entry point at its top level (without one: has a statement)."""
    tree = parsed(code)
    if tree is None:
        return False
    return bool(tree.body) if not entry_point else any(_gives(node, _owner(entry_point)) for node in tree.body)


def chat_program(completion: str, entry_point: str | None, opening: str) -> str | None:
    """The program in the answer of a chat model; rules in the module docstring. None: no block and no code."""
    found = blocks(completion)
    for code in found:
        if defines(code, entry_point):
            return code
    for code in found or [completion]:
        whole = f"{opening.rstrip()}\n{code}"
        # A body goes under the opening's function. The opening alone already defines it, so the body must be its own.
        if code[:1] in (" ", "\t") and parsed(code) is None and defines(whole, entry_point):
            return whole
    if not found:
        return completion if defines(completion, entry_point) else None
    return found[0]


def continued_program(completion: str, entry_point: str | None, opening: str) -> str:
    """The program that a model without a chat template continued; rules in the module docstring."""
    text = opening + completion.replace("\r\n", "\n").split("\n```")[0]
    lines = text.split("\n")
    for end in range(len(lines), opening.count("\n"), -1):
        code = "\n".join(lines[:end])
        tree = parsed(code)
        if tree is not None and defines(code, entry_point):
            return _until_stray_statement(code, tree, entry_point)
    return text


def _until_stray_statement(code: str, tree: ast.Module, entry_point: str | None) -> str:
    has_begun = False
    for node in tree.body:
        if has_begun and not isinstance(node, _HARMLESS):
            return "\n".join(code.split("\n")[: node.lineno - 1])
        has_begun = has_begun or not entry_point or _gives(node, _owner(entry_point))
    return code


def _gives(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _owner(entry_point: str) -> str:
    return entry_point.partition("()")[0].partition(".")[0]
