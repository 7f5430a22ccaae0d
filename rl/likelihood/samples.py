"""Training samples of the stages before RL: rows as token ids, in an order that can be resumed at any row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from coupled.rl.data.order import epoch_order
from coupled.rl.data.prompts import render_prompt
from coupled.rl.data.rows import Bad, Row, read_rows
from coupled.rl.errors import CheckpointError, DataError
from coupled.rl.keys import generator
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.data import Data
from coupled.rl.recipe.likelihood import Fit

RESPONSE = "```python\n{solution}\n```"
"""The response for a solution; the format reward requires the same fence."""
LAYOUTS = (("messages",), ("prompt", "response"), ("prompt", "solution"), ("text",))
"""Sets of columns that make a sample; the first set that a row has is used."""
MAX_CHARACTERS = 10_000_000
"""Limit of one text. Longer texts are not documents, and tokenising them takes minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and its response, end token included, as token ids; or a plain text, which has no prompt."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """A run's place in its data, kept in checkpoints, from which a resumed run reads on."""

    epoch: int = 0
    row: int = 0
    """Places of the epoch's order that have been read, skipped ones included."""
    offset: int = 0
    """Tokens of the next text that are part of an earlier row."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Reason → rows left out so far."""

    def past(self, reason: str | None = None) -> Cursor:
        """The cursor at the next row of the epoch; a reason counts this row as skipped."""
        counted = dict(self.skipped) if reason is None else {**self.skipped, reason: self.skipped.get(reason, 0) + 1}
        return replace(self, row=self.row + 1, offset=0, skipped=counted)


@runtime_checkable
class Source(Protocol):
    """An endless stream of samples, epoch after epoch."""

    def read(self, cursor: Cursor) -> Iterator[tuple[Example, Cursor, Cursor]]:
        """Samples from a cursor on, each with the cursor before it and the cursor after it."""
        ...


class Encoder:
    """Encodes rows as samples, within the lengths of the recipe. Rows that do not fit become `Bad` with a reason."""

    def __init__(self, data: Data, fit: Fit, policy: Policy) -> None:
        self._data = data
        self._fit = fit
        self._tokenizer: Any = policy.tokenizer
        if self._tokenizer.eos_token_id is None:
            raise CheckpointError(
                "a response ends with an end token, and tokenizer.eos_token is not set; set it in the checkpoint's "
                "tokenizer_config.json"
            )

    def encode(self, rows: list[Row]) -> list[Example | Bad]:
        """One result per row.

        Raises:
            DataError: the recipe or the tokenizer lacks a setting that rows of this kind need.
        """
        texts = [row if isinstance(row, Bad) else self._texts(row) for row in rows]
        good = [text for text in texts if not isinstance(text, Bad)]
        prompts = iter(self._ids([prompt for prompt, _ in good]))
        responses = iter(self._ids([response for _, response in good]))
        return [text if isinstance(text, Bad) else self._fitting(next(prompts), next(responses)) for text in texts]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return found

    def _fitting(self, prompt: list[int], response: list[int]) -> Example | Bad:
        data, fit = self._data, self._fit
        if not response:
            return Bad("an empty text")
        example = Example(prompt_ids=tuple(prompt), response_ids=(*response, self._tokenizer.eos_token_id))
        if not prompt:
            return example if fit.context else Bad("an empty prompt")
        if len(prompt) > data.max_prompt_tokens:
            return Bad(f"a prompt over data.max_prompt_tokens = {data.max_prompt_tokens}")
        if fit.context and len(example) > fit.context:
            return Bad(f"a sample over fit.context = {fit.context}")
        if not fit.context and len(example.response_ids) > fit.canvas:
            return Bad(f"a response over fit.canvas = {fit.canvas}")
        return example

    def _texts(self, row: dict[str, Any]) -> tuple[str, str] | Bad:
        """Prompt, as the chat template renders it, and response; an empty prompt for plain text."""
        layout = next((names for names in LAYOUTS if all(self._column(n) in row for n in names)), None)
        if layout is None:
            wanted = "; ".join(" and ".join(repr(self._column(n)) for n in names) for names in LAYOUTS)
            return Bad(f"none of the columns {wanted}, but {', '.join(row)} (data.columns maps names)")
        values = {name: row.get(self._column(name)) for name in layout}
        if layout == ("messages",):
            return self._of_chat(values["messages"])
        for name, value in values.items():
            if not isinstance(value, str):
                return Bad(f"no text in column {self._column(name)!r}")
            if not value.strip():
                return Bad("an empty prompt" if name == "prompt" else "an empty text")
            if len(value) > MAX_CHARACTERS:
                return Bad(f"a text of more than {MAX_CHARACTERS} characters")
        if layout == ("text",):
            if not self._fit.context:
                raise DataError("plain text is packed into rows; set their length, for example fit.context=512")
            return "", str(values["text"])
        answer = values["response"] if "response" in values else RESPONSE.format(solution=values["solution"])
        return render_prompt(str(values["prompt"]), self._tokenizer), str(answer)

    def _of_chat(self, messages: Any) -> tuple[str, str] | Bad:
        """Everything before the last message is the prompt; the assistant's last message is the response."""
        is_chat = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not is_chat or len(messages) < 2 or messages[-1]["role"] != "assistant":
            return Bad("messages that do not end with one of the assistant")
        if not messages[-1]["content"].strip():
            return Bad("an empty text")
        if sum(len(m["content"]) for m in messages) > MAX_CHARACTERS:
            return Bad(f"a text of more than {MAX_CHARACTERS} characters")
        if not self._tokenizer.chat_template:
            raise DataError(
                "column 'messages' is read through a chat template, and the tokenizer has none; add "
                "chat_template.jinja to the checkpoint, or use columns prompt and response"
            )
        prompt = self._tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        return str(prompt), messages[-1]["content"]

    def _column(self, name: str) -> str:
        return self._data.columns.get(name, name)


class Loaded:
    """All rows in memory, in a new order every epoch. Unusable rows are counted once, when loaded."""

    def __init__(self, data: Data, seed: int, encoder: Encoder) -> None:
        encoded = encoder.encode(list(read_rows(data.path, split=data.split)))
        self.examples = [e for e in encoded if isinstance(e, Example)]
        self.skipped = dict(Counter(e.reason for e in encoded if isinstance(e, Bad)))
        if not self.examples:
            raise DataError(f"{data.path}: no row can be trained on: {told(self.skipped) or 'it has none'}")
        self._order = cache(partial(_order, len(self.examples), seed))

    def read(self, cursor: Cursor) -> Iterator[tuple[Example, Cursor, Cursor]]:
        cursor = replace(cursor, skipped=self.skipped)
        while True:
            for place in self._order(cursor.epoch)[cursor.row :]:
                after = cursor.past()
                yield self.examples[place], cursor, after
                cursor = after
            cursor = replace(cursor, epoch=cursor.epoch + 1, row=0)


def _order(num: int, seed: int, epoch: int) -> list[int]:
    return epoch_order(num, seed=seed, epoch=epoch, stream="fit")


class Streamed:
    """Rows read on demand, shuffled within windows of `data.window` rows."""

    def __init__(self, data: Data, seed: int, encoder: Encoder) -> None:
        self._data = data
        self._seed = seed
        self._encoder = encoder

    def read(self, cursor: Cursor) -> Iterator[tuple[Example, Cursor, Cursor]]:
        data = self._data
        while True:
            number, place = divmod(cursor.row, data.window)
            rows = read_rows(data.path, split=data.split, first=number * data.window)
            has_any = cursor.row > 0
            while window := list(islice(rows, data.window)):
                encoded = self._encoder.encode(window)
                order = generator(self._seed, "fit-window", cursor.epoch, number).permutation(len(window))
                for row in order[place:]:
                    found = encoded[row]
                    after = cursor.past(found.reason if isinstance(found, Bad) else None)
                    if isinstance(found, Example):
                        has_any = True
                        yield found, cursor, after
                    cursor = after
                number, place = number + 1, 0
            if not has_any:
                raise DataError(f"{data.path}: no row can be trained on: {told(cursor.skipped) or 'it has none'}")
            cursor = replace(cursor, epoch=cursor.epoch + 1, row=0, offset=0)


def open_source(data: Data, fit: Fit, seed: int, policy: Policy) -> Source:
    """The samples to train on: in memory, or streamed where `data.window` is not 0.

    Raises:
        DataError: the dataset has no usable row.
    """
    encoder = Encoder(data, fit, policy)
    if not data.window:
        return Loaded(data, seed, encoder)
    stream = Streamed(data, seed, encoder)
    next(stream.read(Cursor()))  # a dataset without a sample is refused before anything is written
    return stream


def told(skipped: Mapping[str, int]) -> str:
    """Reasons with their counts. Example: `12 × a response over fit.canvas = 40, 1 × not UTF-8`."""
    return ", ".join(f"{count} × {reason}" for reason, count in sorted(skipped.items()))
