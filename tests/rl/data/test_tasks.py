from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from coupled.reward import Task
from coupled.rl.data.order import epoch_order, rows_of_step
from coupled.rl.data.prompts import encode_prompts, render_prompt
from coupled.rl.data.rows import load_rows
from coupled.rl.data.tasks import load_tasks
from coupled.rl.errors import DataError
from coupled.rl.recipe.data import Data

SHARED = Path(__file__).parents[3] / "../shared/data"
TEST = "assert f(1) == 1"
Rows = list[dict[str, Any]]
Write = Callable[[Rows], Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets library keeps what it has read; not in the user's home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(rows: Rows, name: str = "tasks.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def row(i: int = 0, **columns: object) -> dict[str, Any]:
    return {"uid": f"task-{i}", "prompt": f"Write f, number {i}.", "hidden_tests": [TEST], **columns}


def data(path: Path, **fields: object) -> Data:
    return Data.model_validate({"path": str(path), **fields})


# --- the order of rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "per_step"), [(5, 2), (6, 3), (7, 1), (3, 5), (10, 10), (4, 9)])
def test_each_epoch_visits_every_row_exactly_once(num_rows: int, per_step: int) -> None:
    steps = range(num_rows * 3)
    visited = [i for s in steps for i in rows_of_step(num_rows, step=s, per_step=per_step, seed=0, stream="x")]
    assert len(visited) == len(steps) * per_step
    for start in range(0, len(visited) - num_rows + 1, num_rows):
        assert sorted(visited[start : start + num_rows]) == list(range(num_rows))


def test_a_step_may_take_the_last_row_of_one_epoch_and_the_first_of_the_next() -> None:
    first, second = (epoch_order(5, seed=0, epoch=e, stream="prompts") for e in (0, 1))
    taken = [rows_of_step(5, step=s, per_step=2, seed=0, stream="prompts") for s in range(3)]
    assert taken == [first[0:2], first[2:4], [first[4], second[0]]]


def test_the_order_depends_on_seed_epoch_and_stream_and_on_nothing_else() -> None:
    order = epoch_order(50, seed=0, epoch=0, stream="prompts")
    assert order == epoch_order(50, seed=0, epoch=0, stream="prompts")
    assert order != list(range(50))
    for other in (
        epoch_order(50, seed=1, epoch=0, stream="prompts"),
        epoch_order(50, seed=0, epoch=1, stream="prompts"),
        epoch_order(50, seed=0, epoch=0, stream="fit"),
    ):
        assert other != order


# --- reading ------------------------------------------------------------------------------------------------------


def test_rows_become_tasks(write: Write) -> None:
    path = write(
        [
            row(0, entry_point="f", setup="import math", difficulty="hard", visible_tests=["assert f(2) == 2"]),
            row(1, visible_tests=[]),
        ]
    )
    first, second = load_tasks(data(path))
    assert first.uid == "task-0"
    assert first.prompt == "Write f, number 0."
    assert first.hidden_tests == (TEST,)
    assert first.visible_tests == ("assert f(2) == 2",)
    assert first.entry_point == "f"
    assert first.setup == "import math"
    assert dict(first.columns) == {"difficulty": "hard"}
    assert second.visible_tests == ()
    assert second.setup == ""
    assert second.entry_point is None


def test_a_text_column_of_tests_holds_one_a_line(write: Write) -> None:
    (task,) = load_tasks(data(write([row(0, hidden_tests="assert f(3) == 3\n\nassert f(4) == 4\n")])))
    assert task.hidden_tests == ("assert f(3) == 3", "assert f(4) == 4")


def test_an_optional_column_may_be_empty_in_some_rows(write: Write) -> None:
    path = write([row(0, visible_tests=["assert f(2) == 2"]), row(1), row(2, visible_tests=None)])
    assert [t.visible_tests for t in load_tasks(data(path))] == [("assert f(2) == 2",), (), ()]


def test_rows_without_a_uid_are_numbered(write: Write) -> None:
    path = write([{"prompt": "a", "hidden_tests": [TEST]}, {"prompt": "b", "hidden_tests": [TEST]}])
    assert [t.uid for t in load_tasks(data(path))] == ["row-0", "row-1"]


def test_parquet_is_read_like_jsonl(write: Write, tmp_path: Path) -> None:
    import datasets

    rows = [row(i, level=i) for i in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "tasks.parquet"))
    assert load_rows(str(tmp_path / "tasks.parquet")) == load_rows(str(write(rows))) == rows


def test_a_wrong_column_names_the_nearest_one_and_the_setting_that_mends_it(write: Write) -> None:
    path = write([{"promt": "Write f.", "hidden_tests": [TEST]}])
    with pytest.raises(
        DataError, match=r"no column 'prompt' \(for prompt\); did you mean 'promt'.*data\.columns\.prompt=NAME"
    ):
        load_tasks(data(path))
    assert load_tasks(data(path, columns={"prompt": "promt"}))[0].prompt == "Write f."


def test_a_misspelt_key_of_the_column_map_is_refused(write: Write) -> None:
    """Otherwise the map is silently without effect."""
    path = write([row(0, test_list=["assert f(2) == 2"])])
    with pytest.raises(ValueError, match="hidden_tests"):
        load_tasks(data(path, columns={"hiden_tests": "test_list"}))


@pytest.mark.parametrize("tests", [[], 3, [1, 2], {"a": "b"}, "", None])
def test_tests_that_are_not_a_list_of_strings_are_refused(write: Write, tests: object) -> None:
    path = write([row(0, hidden_tests=tests)])
    with pytest.raises(DataError, match=r"'hidden_tests' must hold a non-empty list of test strings; got "):
        load_tasks(data(path))


def test_a_prompt_that_is_not_text_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match="'prompt' must hold text; got int"):
        load_tasks(data(write([row(0, prompt=3)])))


def test_a_missing_file_names_the_nearest_one(write: Write, tmp_path: Path) -> None:
    write([row()])
    with pytest.raises(DataError, match=r"no dataset at .*task\.jsonl; did you mean 'tasks\.jsonl'\?"):
        load_tasks(data(tmp_path / "task.jsonl"))


@pytest.mark.parametrize("text", ["", "\n", "{\n", "not json\n"])
def test_a_file_without_a_row_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"tasks\.jsonl"):
        load_tasks(data(path))


def test_two_tasks_with_one_uid_are_refused(write: Write) -> None:
    with pytest.raises(DataError, match=r"same uid.*data\.columns\.uid"):
        load_tasks(data(write([row(0), row(1), row(0)])))


def test_visible_tests_move_from_the_scored_ones_to_the_prompt(write: Write) -> None:
    tests = [f"assert f({i}) == {i}" for i in range(4)]
    (task,) = load_tasks(data(write([row(0, hidden_tests=tests)]), num_visible_tests=2))
    assert task.hidden_tests == tuple(tests[2:]), "a test that is shown is never scored"
    assert task.visible_tests == tuple(tests[:2])
    assert task.prompt == "Write f, number 0.\nassert f(0) == 0\nassert f(1) == 1"


def test_showing_all_tests_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match=r"num_visible_tests \(1\) must leave a test.*row 0 has 1"):
        load_tasks(data(write([row()]), num_visible_tests=1))


def test_tasks_whose_tests_cannot_be_judged_are_left_out_and_said_so(write: Write) -> None:
    path = write([row(0), row(1, hidden_tests=["import os; os.system('x')"]), row(2)])
    with pytest.warns(UserWarning, match=r"left out 1 of 3 tasks"):
        tasks = load_tasks(data(path))
    assert [t.uid for t in tasks] == ["task-0", "task-2"]


def test_a_dataset_of_which_nothing_can_be_judged_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match="no task has tests that can be judged"):
        load_tasks(data(write([row(0, hidden_tests=["import os; os.system('x')"])])))


def test_tests_are_not_needed_by_rewards_that_do_not_run_any(write: Write) -> None:
    path = write([{"prompt": "Say hello.", "answer": "hello"}])
    (task,) = load_tasks(data(path), needs_tests=False)
    assert task.hidden_tests == ()
    assert dict(task.columns) == {"answer": "hello"}
    with pytest.raises(DataError, match="no column 'hidden_tests'"):
        load_tasks(data(path))


# --- prompts ------------------------------------------------------------------------------------------------------


def task(prompt: str) -> Task:
    return Task(uid=prompt, prompt=prompt, hidden_tests=(TEST,))


def test_prompts_that_are_too_long_are_dropped(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = encode_prompts([task("abc"), task("abcdef"), task("abcd")], tiny_tokenizer, 4)
    assert [p.task.prompt for p in prompts] == ["abc", "abcd"]
    assert prompts[0].token_ids == (4, 5, 6)


def test_dropping_every_prompt_is_refused_with_the_length_that_would_do(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(DataError, match=r"max_prompt_tokens is 2 but the shortest prompt has 3"):
        encode_prompts([task("abcd"), task("abc")], tiny_tokenizer, 2)


def test_prompts_go_through_the_chat_template_when_there_is_one(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render_prompt("abc", tiny_tokenizer) == "abc"
    template = "{% for m in messages %}u {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} a{% endif %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    assert render_prompt("abc", tiny_tokenizer) == "u abc a"
    (prompt,) = encode_prompts([task("abc")], tiny_tokenizer, 20)
    assert tiny_tokenizer.decode(prompt.token_ids) == "u abc a"


# --- public data --------------------------------------------------------------------------------------------------


def test_mbpp_loads_with_a_column_map() -> None:
    path = SHARED / "mbpp/mbpp.jsonl"
    if not path.is_file():
        pytest.skip(f"no MBPP at {path}")
    columns = {
        "prompt": "text",
        "hidden_tests": "test_list",
        "solution": "code",
        "uid": "task_id",
        "setup": "test_setup_code",
    }
    with pytest.warns(UserWarning, match="left out"):
        tasks = load_tasks(data(path, columns=columns, num_visible_tests=1))
    assert len(tasks) > 850, "of 974"
    first = next(t for t in tasks if t.uid == "2")
    assert first.prompt.startswith("Write a function to find the similar elements")
    assert first.prompt.endswith(first.visible_tests[0])
    assert [len(first.visible_tests), len(first.hidden_tests)] == [1, 2]
    assert set(first.columns) == {"challenge_test_list"}
    assert Counter(len(t.visible_tests) for t in tasks) == {1: len(tasks)}
