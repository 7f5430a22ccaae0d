"""Rows of every kind become samples; what cannot is counted with its reason; and reading resumes anywhere."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from helpers.toys import MakePolicy, make_likelihood_recipe

from coupled.rl.data.parquet import write_parquet
from coupled.rl.data.rows import Bad, read_rows
from coupled.rl.errors import DataError
from coupled.rl.likelihood.batch import RowMaker
from coupled.rl.likelihood.samples import RESPONSE, Cursor, Encoder, Example, Loaded, Source, Streamed, open_source
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.schema import LikelihoodRecipe

END = 1
ROWS = [{"prompt": f"write {c}", "response": c * (1 + i % 5)} for i, c in enumerate("abcdefghijklm")]


def recipe_for(path: Path, *, data: dict[str, object] | None = None, seed: int = 0, **fit: object) -> LikelihoodRecipe:
    return make_likelihood_recipe(
        stage="sft",
        seed=seed,
        data={"path": str(path), **(data or {})},
        fit={"canvas": 24, "batch_size": 3, **fit},
    )


def source_of(recipe: LikelihoodRecipe, policy: Policy) -> Source:
    return open_source(recipe.data, recipe.fit, recipe.seed, policy)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encode(policy: Policy, rows: list[object], **fit: object) -> list[Example | Bad]:
    recipe = recipe_for(Path("nowhere"), **fit)  # type: ignore[arg-type]
    return Encoder(recipe.data, recipe.fit, policy).encode(rows)  # type: ignore[arg-type]


def said(policy: Policy, example: Example | Bad) -> tuple[str, str]:
    assert isinstance(example, Example)
    assert example.response_ids[-1] == END
    decode = policy.tokenizer.decode
    return decode(example.prompt_ids), decode(example.response_ids[:-1])


# --- columns ------------------------------------------------------------------------------------------------------


def test_the_columns_decide_what_is_prompt_and_what_is_response(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    made = encode(
        policy,
        [
            {"prompt": "write a", "response": "aaa", "uid": 3},
            {"prompt": "write a", "solution": "aaa"},
            {"text": "abc"},
        ],
        context=64,
    )
    solution = RESPONSE.format(solution="aaa")
    shown = policy.tokenizer.decode(policy.tokenizer(solution)["input_ids"])
    assert [said(policy, e) for e in made] == [("write a", "aaa"), ("write a", shown), ("", "abc")]


def test_a_chat_is_rendered_by_the_tokenizer_s_template_and_its_last_message_is_learned(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy()
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"},
    ]
    with pytest.raises(DataError, match=r"the tokenizer has none; add chat_template\.jinja"):
        encode(policy, [{"messages": chat}])
    template = (
        "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}"
    )
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    assert said(policy, encode(policy, [{"messages": chat}])[0]) == ("u hi\na yes\nu more\na ", "no")
    assert said(policy, encode(policy, [{"prompt": "x", "response": "y"}])[0]) == ("u x\na ", "y")
    for broken in ([], chat[:1], chat[:3], "text", [{"role": "user"}, {"role": "assistant", "content": "x"}]):
        (bad,) = encode(policy, [{"messages": broken}])
        assert bad == Bad("messages that do not end with one of the assistant")


def test_columns_may_be_called_otherwise(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    recipe = recipe_for(Path("nowhere"), data={"columns": {"prompt": "q", "response": "answer"}})
    (made,) = Encoder(recipe.data, recipe.fit, policy).encode([{"q": "write", "answer": "b"}])
    assert said(policy, made) == ("write", "b")


# --- what cannot be used ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "fit", "reason"),
    [
        ({"prompt": "", "response": "a"}, {}, "an empty prompt"),
        ({"prompt": "a", "response": " \n"}, {}, "an empty text"),
        ({"prompt": "a", "response": None}, {}, "no text in column 'response'"),
        ({"prompt": 3, "response": "a"}, {}, "no text in column 'prompt'"),
        ({"prompt": "a", "response": "b" * 24}, {}, "a response over fit.canvas = 24"),
        ({"prompt": "a" * 201, "response": "b"}, {}, "a prompt over data.max_prompt_tokens = 200"),
        ({"prompt": "a" * 10, "response": "b" * 10}, {"context": 20}, "a sample over fit.context = 20"),
        ({"prompt": "a", "response": "b" * 10_000_001}, {}, "a text of more than 10000000 characters"),
        ({"a": "b"}, {}, "none of the columns 'messages'; 'prompt' and 'response'; 'prompt' and 'solution'; 'text',"),
        (Bad("not UTF-8"), {}, "not UTF-8"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_row_that_cannot_be_used_says_why(
    tiny_policy: MakePolicy, row: object, fit: dict[str, object], reason: str
) -> None:
    good = {"prompt": "a", "response": "b"}
    first, bad, last = encode(tiny_policy(), [good, row, good], **fit)
    assert first == last
    assert isinstance(bad, Bad)
    assert bad.reason.startswith(reason)


def test_the_longest_sample_that_fits_is_taken(tiny_policy: MakePolicy) -> None:
    assert isinstance(encode(tiny_policy(), [{"prompt": "a", "response": "b" * 23}])[0], Example)
    packed = encode(tiny_policy(), [{"prompt": "a" * 10, "response": "b" * 9}], context=20)
    assert isinstance(packed[0], Example)


def test_plain_text_needs_rows_to_be_packed_into(tiny_policy: MakePolicy) -> None:
    with pytest.raises(DataError, match="plain text is packed into rows; set their length"):
        encode(tiny_policy(), [{"text": "abc"}])


@pytest.mark.parametrize("window", [0, 4])
def test_rows_that_are_left_out_are_counted_and_a_dataset_of_nothing_else_is_refused(
    tiny_policy: MakePolicy, tmp_path: Path, window: int
) -> None:
    rows = [*ROWS, {"prompt": "a", "response": ""}, {"prompt": "a", "response": "b" * 99}, {"prompt": ""}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with file.open("ab") as out:
        out.write(b'{"prompt": "a", "response": "\xff"}\nnot json\n[1]\n\n')
    policy, recipe = tiny_policy(), recipe_for(file, data={"window": window})
    samples = source_of(recipe, policy).read(Cursor())
    epoch = [next(samples) for _ in range(len(ROWS) + 1)]
    assert {e.prompt_ids for e, *_ in epoch[:-1]} == {
        tuple(policy.tokenizer(row["prompt"])["input_ids"]) for row in ROWS
    }
    cursor = epoch[-1][1]
    assert cursor.epoch == 1
    # Streamed rows are counted as they are met, and the second epoch may have begun with some.
    assert sum(cursor.skipped.values()) == 6 or window
    assert sorted(reason[:22] for reason in cursor.skipped) == [
        "a response over fit.ca",
        "an empty text",
        "none of the columns 'm",
        "not JSON",
        "not UTF-8",
        "not a JSON object",
    ]

    only_bad = recipe_for(write_jsonl(tmp_path / "bad.jsonl", rows[-3:-1]), data={"window": window})
    with pytest.raises(DataError, match=r"no row can be trained on: 1 × a response over fit.canvas = 24, 1 × an empty"):
        next(source_of(only_bad, policy).read(Cursor()))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no row can be trained on: it has none"):
        next(source_of(recipe_for(tmp_path / "empty.jsonl", data={"window": window}), policy).read(Cursor()))


# --- files --------------------------------------------------------------------------------------------------------


def test_files_of_every_kind_hold_the_same_rows(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    write_parquet(tmp_path / "rows.parquet", ROWS)
    shards = tmp_path / "shards"
    shards.mkdir()
    write_jsonl(shards / "a.jsonl", ROWS[:5])
    write_parquet(shards / "b.parquet", ROWS[5:])
    (shards / "README.md").write_text("not data")
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet", "shards"):
        for first in (0, 1, 6, 13, 20):
            assert list(read_rows(str(tmp_path / name), first=first)) == ROWS[first:], name


def test_a_corrupt_shard_costs_its_rows_and_no_others(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    packed = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS * 50))
    (shards / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (shards / "b.jsonl.gz").write_bytes(b"no gzip at all")
    (shards / "c.parquet").write_bytes(b"PAR1 or not")
    write_jsonl(shards / "d.jsonl", ROWS)
    rows = list(read_rows(str(shards)))
    assert rows[-len(ROWS) :] == ROWS
    assert [row for row in rows if isinstance(row, Bad)] == [
        Bad(f"the rest of the corrupt shard {name}") for name in ("a.jsonl.gz", "b.jsonl.gz", "c.parquet")
    ]
    (tmp_path / "x.parquet").write_bytes(b"")
    assert list(read_rows(str(tmp_path / "x.parquet"))) == [Bad("the rest of the corrupt shard x.parquet")]


def test_a_missing_file_names_the_nearest_and_a_folder_without_data_says_so(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no dataset at .*tran\.jsonl; did you mean 'train\.jsonl'"):
        next(read_rows(str(tmp_path / "tran.jsonl")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no dataset"):
        next(read_rows(str(tmp_path / "folder")))


def test_a_hub_dataset_is_streamed_through_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(path: str, **options: object) -> datasets.IterableDataset:
        asked.append((path, options))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows("owner/name", split="part", first=2)) == ROWS[2:]
    assert asked == [("owner/name", {"split": "part", "streaming": True})]

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"cannot stream the dataset owner/name \(ConnectionError: no network\)"):
        next(read_rows("owner/name"))


# --- order and resumption -----------------------------------------------------------------------------------------


@pytest.fixture
def source(tiny_policy: MakePolicy, tmp_path: Path) -> Callable[..., Loaded | Streamed]:
    file = write_jsonl(tmp_path / "rows.jsonl", [*ROWS[:6], {"prompt": "", "response": "x"}, *ROWS[6:]])

    def make(window: int, **options: object) -> Loaded | Streamed:
        recipe = recipe_for(file, data={"window": window}, **options)  # type: ignore[arg-type]
        found = source_of(recipe, tiny_policy())
        assert isinstance(found, Streamed if window else Loaded)
        return found

    return make


@pytest.mark.parametrize("window", [0, 1, 4, 100])
def test_every_epoch_visits_each_sample_once_in_a_new_order(
    source: Callable[..., Loaded | Streamed], window: int
) -> None:
    made = list(islice(source(window).read(Cursor()), 3 * len(ROWS)))
    epochs = [[e for e, *_ in made[k : k + len(ROWS)]] for k in range(0, len(made), len(ROWS))]
    assert all(len(set(epoch)) == len(ROWS) for epoch in epochs)
    assert (epochs[0] != epochs[1]) == (window != 1)
    other = [e for e, *_ in islice(source(window, seed=1).read(Cursor()), len(ROWS))]
    assert (other != epochs[0]) == (window != 1)
    assert set(other) == set(epochs[0])


@pytest.mark.parametrize("window", [0, 1, 4, 100])
def test_reading_goes_on_from_any_cursor(source: Callable[..., Loaded | Streamed], window: int) -> None:
    made = list(islice(source(window).read(Cursor()), 30))
    for number, (example, before, after) in enumerate(made):
        assert next(source(window).read(before))[0] == example
        assert list(islice(source(window).read(after), 3)) == made[number + 1 : number + 4] or number > 26


# --- packing ------------------------------------------------------------------------------------------------------


def text(size: int, first: int = 4) -> Example:
    return Example(prompt_ids=(), response_ids=(*range(first, first + size - 1), END))


def sample(prompt: int, response: int) -> Example:
    return Example(prompt_ids=tuple(range(4, 4 + prompt)), response_ids=(*range(20, 19 + response), END))


class Fixed:
    """A source that gives what it is told, over and over."""

    def __init__(self, *examples: Example) -> None:
        self.examples = examples

    def read(self, cursor: Cursor):  # type: ignore[no-untyped-def]
        while True:
            after = cursor.past()
            yield self.examples[cursor.row % len(self.examples)], cursor, after
            cursor = after


def maker(*examples: Example, cursor: Cursor | None = None, seed: int = 0, **fit: object) -> RowMaker:
    recipe = recipe_for(Path("nowhere"), seed=seed, **fit)
    return RowMaker(Fixed(*examples), recipe.fit, recipe.seed, END, cursor or Cursor())


def test_whole_samples_share_a_row_while_there_is_room() -> None:
    examples = [sample(2, 3), sample(1, 4), sample(3, 3), sample(5, 5)]
    made = maker(*examples, context=11)
    assert made.rows_of_step(0) == [(examples[0], examples[1]), (examples[2],), (examples[3],)]
    assert made.cursor.row == 4


def test_plain_text_is_cut_where_a_row_ends_and_no_token_is_lost_or_repeated() -> None:
    texts = [text(7), text(20, first=40), text(3)]
    made = maker(*texts, context=8)
    rows = [row for step in range(5) for row in made.rows_of_step(step)]
    assert all(sum(len(e) for e in row) == 8 for row in rows)
    stream = [i for row in rows for e in row for i in e.response_ids]
    wanted = [i for e in texts * 5 for i in e.response_ids]
    assert stream == wanted[: len(stream)]


@pytest.mark.parametrize("examples", [[text(7), text(20), text(3)], [sample(2, 3), sample(1, 4), sample(3, 3)]])
@pytest.mark.parametrize("random_length", [0.0, 0.5])
def test_packing_resumes_exactly_after_any_step(examples: list[Example], random_length: float) -> None:
    options = {"context": 9, "random_length": random_length, "end_tokens": (1, 3)}
    whole = maker(*examples, **options)
    steps, cursors = [], []
    for step in range(8):
        steps.append(whole.rows_of_step(step))
        cursors.append(whole.cursor)
    for step, cursor in enumerate(cursors[:-1]):
        assert maker(*examples, cursor=cursor, **options).rows_of_step(step + 1) == steps[step + 1]


def test_a_share_of_the_rows_of_plain_text_ends_at_a_random_length() -> None:
    made = maker(text(50), context=20, random_length=0.5, batch_size=400)
    lengths = [sum(len(e) for e in row) for row in made.rows_of_step(0)]
    assert sum(length < 20 for length in lengths) / 400 == pytest.approx(0.475, abs=0.08)
    short = [length for length in lengths if length < 20]
    assert min(short) <= 2
    assert sum(short) / len(short) == pytest.approx(10, abs=1.5)


@pytest.mark.parametrize("context", [0, 200])
def test_a_response_gets_a_random_number_of_end_tokens(context: int) -> None:
    made = maker(sample(2, 3), context=context, end_tokens=(1, 4), batch_size=300)
    examples = [e for row in made.rows_of_step(0) for e in row]
    counts = [sum(i == END for i in e.response_ids) for e in examples]
    assert {number: counts.count(number) / len(counts) for number in range(1, 5)} == pytest.approx(
        dict.fromkeys(range(1, 5), 0.25), abs=0.1
    )
    assert all(e.response_ids[:2] == (20, 21) for e in examples)
    full = maker(sample(2, 24), end_tokens=(4, 4)).rows_of_step(0)
    assert all(len(e.response_ids) == 24 for row in full for e in row), "no more than the canvas holds"
    tight = maker(sample(2, 8), context=11, end_tokens=(4, 4)).rows_of_step(0)
    assert all(sum(len(e) for e in row) == 11 for row in tight)
