"""The records that cross module borders, and the words for them.

prompt      token ids the model reads; never masked
canvas      the fixed number of positions after the prompt that start as MASK and are denoised
completion  the canvas up to and including its first end token
rollout     one completion with the commit step, log-probability and entropy of every token
group       the rollouts of one prompt; advantages are relative to it
valid (V)   canvas positions of the completion: what is scored, masked and trained
mask ratio  t, the expected share of V that is masked
MaskPair    two masks over V: one of ratio t and, for the coupled estimator, its complement in V
view        the completion with some positions masked, and which of those are scored from it
MaskDraw    the views that make one estimate of a completion's log-probabilities, and how they are summed
policy      the model being trained; `old` is the policy that rolled out, `reference` the one that KL pulls towards
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
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
    kl_bound: float = 0.0
    """Nats, summed over the steps: Σ H - max H over the tokens that a step committed at once bounds the KL divergence
    from committing them one by one [EB-Sampler]. 0 at one token a step."""
    fill_bound: float = 0.0
    """Probability, summed over the positions that `end_fill` filled, of any other token; bounds the total variation."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """The rollouts of one prompt, with the judge's verdict on each."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """One step's rollouts as tensors. Prompts are padded on the left, so that all canvases line up."""

    uids: tuple[str, ...]
    ids: Int[Tensor, "B S"]
    """Prompt, then the canvas as the sampler left it."""
    pad_lengths: Int[Tensor, " B"]
    """Leading positions of each row that are padding."""
    valid: Bool[Tensor, "B C"]
    advantages: Float[Tensor, " B"]
    is_scored: Bool[Tensor, " B"]
    """False where the judge had no verdict: such rows carry no loss."""
    commit_step: Int[Tensor, "B C"] | None = None
    """The denoising step at which the sampler unmasked each position, -1 where it never did; None: not recorded. With
    block attention it is counted within the block."""

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
            commit_step=None if self.commit_step is None else self.commit_step[index],
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

    def rows(self, index: slice) -> MaskPair:
        return MaskPair(ratio=self.ratio[index], first=self.first[index], second=self.second[index])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """One masked input per row. It adds ℓ_k(hidden) / divisor to the score of each k in `scored`.

    Example: the mask [1, 0, 0, 1] of ratio 0.5 hides and scores positions 0 and 3, and divides by 0.5.
    """

    hidden: Bool[Tensor, "B C"]
    """MASK in the input; also positions beyond the end token, where the estimator hides them."""
    scored: Bool[Tensor, "B C"]
    """Valid positions among the hidden ones."""
    divisor: Float[Tensor, " B"]
    """Divisor of the log-probabilities: the probability that a token is scored, where that is random."""
    is_shared: bool = False
    """True if completions of one prompt often have this input in common: each distinct input is computed once."""

    @staticmethod
    def of_mask(mask: Bool[Tensor, "B C"], divisor: Float[Tensor, " B"]) -> View:
        """Hide and score the same positions."""
        return View(hidden=mask, scored=mask, divisor=divisor)

    @staticmethod
    def fully_masked(valid: Bool[Tensor, "B C"]) -> View:
        """Hide and score all valid positions."""
        return View(hidden=valid, scored=valid, divisor=torch.ones(len(valid), device=valid.device), is_shared=True)

    def rows(self, index: slice) -> View:
        return View(
            hidden=self.hidden[index],
            scored=self.scored[index],
            divisor=self.divisor[index],
            is_shared=self.is_shared,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskDraw:
    """The views that make one estimate, drawn once and shared by old, reference and new.

    Example: one coupled pair with the paper's weights has two forward passes, (full,) and (first, second), and total 2.
    """

    forwards: tuple[tuple[View, ...], ...]
    """Views of one inner tuple are computed in one forward pass."""
    total: int
    """Divisor of the sum over the views."""
    is_sequence: bool = False
    """True if the estimate E is of the completion as a whole; each of its L tokens then gets E/L."""
    hidden_prompt: Bool[Tensor, "B P"] | None = None
    """Prompt positions that are MASK in every view, padding included in the count; None: all are visible."""

    @property
    def views(self) -> tuple[View, ...]:
        return tuple(view for forward in self.forwards for view in forward)

    def rows(self, index: slice) -> MaskDraw:
        """The same record for some of its rows."""
        return MaskDraw(
            forwards=tuple(tuple(view.rows(index) for view in forward) for forward in self.forwards),
            total=self.total,
            is_sequence=self.is_sequence,
            hidden_prompt=None if self.hidden_prompt is None else self.hidden_prompt[index],
        )


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
