"""The records that cross module borders, and the words for them.

prompt      token ids the model reads; never masked
canvas      the fixed number of positions after the prompt that start as MASK and are denoised
completion  the canvas up to and including its first end token
rollout     one completion with how it came about: commit step, log-prob and entropy of every token
group       the rollouts of one prompt; advantages are relative to it
valid (V)   canvas positions of the completion: what is scored, masked and trained
mask ratio  t, the expected share of V that is masked
MaskPair    two masks over V: the ratio-t one and, for the coupled estimator, its complement in V
policy      the model being trained; `old` is the policy that rolled out, `reference` what KL pulls towards
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from coupled.reward import Task, Verdict
from coupled.rl.shapes import Bool, Float, Int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A task as the model reads it. Example: `Prompt(task=task, token_ids=(1, 57, 12, 2))`."""

    task: Task
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One denoised completion. Arrays have one entry per canvas position; unsettled ones hold -1, 0 and 0."""

    uid: str
    """Names the random stream; unique within a run, e.g. `step-3/list-000123/5`."""
    prompt_ids: tuple[int, ...]
    canvas_ids: np.ndarray
    """int64 [C], as the sampler left it: positions after the end may still be MASK."""
    completion_length: int
    """Tokens up to and including the first end token; C when there is none."""
    text: str
    """The completion decoded, without the end token and anything after it."""
    finish_reason: Literal["end", "length"]
    commit_step: np.ndarray
    """int32 [C]: the denoising step at which the position was unmasked; -1 where it never was."""
    commit_logp: np.ndarray
    """float32 [C]: log-probability of the token under the sampler's distribution when it was committed, in nats."""
    commit_entropy: np.ndarray
    """float32 [C]: entropy of that distribution, in nats."""
    num_forwards: int
    weight_version: int
    sampler_hash: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """The rollouts of one prompt and what the judge said of each."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """What the learner sees of a step. Prompts are padded on the left, so that all canvases line up."""

    uids: tuple[str, ...]
    ids: Int[Tensor, "B S"]
    """Prompt, then the canvas as the sampler left it."""
    pad_lengths: Int[Tensor, " B"]
    """How many leading positions of each row are padding."""
    valid: Bool[Tensor, "B C"]
    advantages: Float[Tensor, " B"]
    is_scored: Bool[Tensor, " B"]
    """False where the judge had no verdict: such rows carry no loss."""

    @property
    def canvas_length(self) -> int:
        return self.valid.shape[1]

    def __len__(self) -> int:
        return len(self.uids)

    def rows(self, index: slice) -> TrainBatch:
        """The same record for some of its rows."""
        return TrainBatch(
            uids=self.uids[index],
            ids=self.ids[index],
            pad_lengths=self.pad_lengths[index],
            valid=self.valid[index],
            advantages=self.advantages[index],
            is_scored=self.is_scored[index],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskPair:
    """Two masks over the valid positions, drawn once and shared by old, reference and new.

    Example for V = 4 and t = 0.5: first = [1, 0, 0, 1], second = [0, 1, 1, 0].
    """

    ratio: Float[Tensor, " B"]
    """t of the first mask; the second has 1 - t."""
    first: Bool[Tensor, "B C"]
    second: Bool[Tensor, "B C"]

    @staticmethod
    def complementary(ratio: Float[Tensor, " B"], first: Bool[Tensor, "B C"], valid: Bool[Tensor, "B C"]) -> MaskPair:
        """The coupled pair: each valid position is masked in exactly one of the two, by construction."""
        return MaskPair(ratio=ratio, first=first & valid, second=valid & ~first)

    def rows(self, index: slice) -> MaskPair:
        return MaskPair(ratio=self.ratio[index], first=self.first[index], second=self.second[index])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Anchor:
    """Log-probabilities that do not move during the updates of a step."""

    old: Float[Tensor, "B C"] | None
    """Scores of the rollout policy. None: the policy has not moved yet, so its own detached scores are the old ones."""
    reference: Float[Tensor, "B C"] | None
    """Scores of the reference; None when there is no KL penalty."""

    def rows(self, index: slice) -> Anchor:
        return Anchor(
            old=None if self.old is None else self.old[index],
            reference=None if self.reference is None else self.reference[index],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossOutput:
    """A loss and the sums that metrics of the whole batch are made of (add them, then divide)."""

    loss: Float[Tensor, ""]
    sums: dict[str, float] = field(default_factory=dict)
