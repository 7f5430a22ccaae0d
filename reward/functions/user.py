"""Reward functions of the user: loaded from a file, called with columns, and checked."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupled.reward.functions.spec import nearest
from coupled.reward.types import RewardError, Task

_OWN_COLUMNS = ("uid", "visible_tests", "hidden_tests", "entry_point", "setup")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserFunction:
    """A loaded function of the user; `label` is its path as the recipe gave it."""

    label: str
    call: Callable[..., Any]


def load_function(path: str, root: Path) -> UserFunction:
    """Import `file.py:function`; RewardError when either is missing or the import fails."""
    file_name, colon, name = path.rpartition(":")
    if not colon or not file_name or not name.isidentifier():
        raise RewardError(f"a path to a reward function is 'file.py:function'; received {path!r}")
    file = (root / file_name).expanduser()
    if not file.is_file():
        siblings = [entry.name for entry in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise RewardError(
            f"the file of a reward function must exist; received {path!r}, looked for {file.resolve()}: "
            f"{nearest(file.name, siblings)}"
        )
    module = _import_file(file.resolve(), path)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise RewardError(f"{file.name} must define the function {name!r}; {path!r}: {nearest(name, known)}")
    return UserFunction(label=path, call=function)


def columns_of(tasks: Sequence[Task], completions: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns that a user's function may take: name → one entry per completion."""
    offered: dict[str, list[Any]] = {name: [getattr(task, name) for task in tasks] for name in _OWN_COLUMNS}
    names = {name for task in tasks for name in task.columns}
    offered |= {name: [task.columns.get(name) for task in tasks] for name in sorted(names)}
    return offered | {"prompts": [task.prompt for task in tasks], "completions": list(completions)}


def call_function(function: UserFunction, offered: Mapping[str, list[Any]]) -> list[float | None]:
    """Return the user's score of each completion, checked.

    RewardError when it raises (with the traceback), or returns anything but one finite number or None for each.
    """
    keywords = _arguments(function, offered)
    try:
        result = function.call(**keywords)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
    except BaseException:  # the border to the user's code, which may also call sys.exit
        raise RewardError(f"the reward function {function.label} raised:\n{traceback.format_exc()}") from None
    return _checked(function.label, result, len(offered["completions"]))


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _import_file(file: Path, path: str) -> Any:
    name = f"coupled_user_reward_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RewardError(f"the file of a reward function is Python source ending in .py; received {path!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle in the user's file look their module up
    try:
        spec.loader.exec_module(module)
    except Exception:  # the border to the user's code
        del sys.modules[name]
        raise RewardError(
            f"the file of the reward function {path!r} failed to import:\n{traceback.format_exc()}"
        ) from None
    return module


def _arguments(function: UserFunction, offered: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the keyword arguments the signature accepts; RewardError when it requires one we lack."""
    parameters = inspect.signature(function.call).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    missing = [name for name in required if name not in offered]
    if missing:
        raise RewardError(
            f"a reward function's parameters are prompts, completions and columns of the dataset; "
            f"{function.label} requires {missing[0]!r}: {nearest(missing[0], offered)}"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(offered)
    accepted = {p.name for p in parameters}
    return {name: column for name, column in offered.items() if name in accepted}


def _checked(label: str, result: Any, num_completions: int) -> list[float | None]:
    rule = f"a reward function returns a list with one number or None per completion; {label}"
    if not isinstance(result, list | tuple):
        raise RewardError(f"{rule} returned a {type(result).__name__}: convert it, e.g. with .tolist()")
    if len(result) != num_completions:
        raise RewardError(f"{rule} returned {len(result)} for {num_completions} completions")
    for index, score in enumerate(result):
        if score is None:
            continue
        if not isinstance(score, numbers.Real):
            raise RewardError(
                f"{rule} returned {score!r} (a {type(score).__name__}) at {index}: return a float or None"
            )
        if not _is_finite(score):
            raise RewardError(f"{rule} returned {score!r:.40} at {index}: return None for what cannot be scored")
    return [None if score is None else float(score) for score in result]


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int beyond all floats
        return False
