"""The `data` section: rows of tasks and of text."""

from __future__ import annotations

from pydantic import Field, model_validator

from coupled.rl.errors import nearest
from coupled.rl.recipe.section import Positive, Section

COLUMNS = ("uid", "prompt", "hidden_tests", "visible_tests", "entry_point", "setup", "solution", "style")
"""Dataset columns with a meaning; all others are passed to the user's reward functions."""


FIT_COLUMNS = ("text", "messages", "response")
"""Further columns that the stages before RL read."""


class Data(Section):
    """The rows that a run trains on, and the held-out problems."""

    path: str = Field(description="JSONL or Parquet file (relative to the recipe file), or a dataset name of the hub")
    eval_path: str | None = Field(default=None, description="held-out problems, same format; none: no evaluation")
    split: str = Field(default="train", description="split of a hub dataset")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="column name of the recipe → name in the file, e.g. {prompt: text, hidden_tests: test_list}",
    )
    num_visible_tests: int = Field(
        default=0,
        ge=0,
        description="the first n hidden tests of a row are shown in its prompt and not scored",
    )
    max_prompt_tokens: Positive = Field(default=200, description="longer prompts are dropped")
    window: int = Field(
        default=0,
        ge=0,
        description="rows that pretrain and sft read ahead and shuffle; 0: all rows are read into memory first",
    )

    @model_validator(mode="after")
    def _known_columns(self) -> Data:
        for name in self.columns:
            if name not in COLUMNS + FIT_COLUMNS:
                raise ValueError(
                    f"data.columns maps names of the recipe to names of the file; {name!r} is not one of the former; "
                    f"{nearest(name, COLUMNS + FIT_COLUMNS)}"
                )
        return self
