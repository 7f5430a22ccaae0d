"""What no simulator can find: that real waits have deadlines, and that Ray tries nothing again by itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[3] / "rl").rglob("*.py"))
WAITS = ("get", "wait")


def calls_of(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def is_of_ray(call: ast.Call) -> bool:
    """`ray.get(...)`, `self._ray.wait(...)`."""
    return isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value).rpartition(".")[2] in ("ray", "_ray")


def test_every_wait_for_ray_has_a_deadline() -> None:
    waits = {
        f"{path.name}: {ast.unparse(call)}": {keyword.arg for keyword in call.keywords}
        for path in FILES
        for call in calls_of(path)
        if is_of_ray(call) and isinstance(call.func, ast.Attribute) and call.func.attr in WAITS
    }
    assert len(waits) >= 3
    assert {name for name, keywords in waits.items() if "timeout" not in keywords} == set()


def test_nobody_waits_for_a_placement_group_to_be_ready() -> None:
    """`group.ready()` of what does not fit blocks for ever; `group.wait(seconds)` does not."""
    calls = [call for path in FILES for call in calls_of(path) if isinstance(call.func, ast.Attribute)]
    assert not [ast.unparse(call) for call in calls if call.func.attr == "ready"]  # type: ignore[attr-defined]
    assert all(call.args for call in calls if ast.unparse(call.func) == "self._group.wait")


@pytest.mark.parametrize("option", ["max_restarts", "max_task_retries"])
def test_ray_neither_restarts_an_actor_nor_runs_a_call_twice(option: str) -> None:
    values = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                values += [ast.unparse(v) for k, v in pairs if isinstance(k, ast.Constant) and k.value == option]
            if isinstance(node, ast.keyword) and node.arg == option:
                values.append(ast.unparse(node.value))
    assert values == ["0"], f"the one place that makes actors sets {option} to 0"
