"""Rows of several lengths, one after the other and without padding, are what each of them is alone."""

from __future__ import annotations

import pytest
import torch
from helpers.toys import MakePolicy, make_requests
from torch import Tensor, nn

from coupled.rl.model.packing import Run, attend_within_runs, line_up
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import denoise

PADS = [2, 0, 2, 3, 0]
SAMPLER = Sampler(canvas=6, denoising_steps=6, temperature=1.0)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, paddings and read columns; of the rows of 6 columns one has three of those and one has two."""
    ids = torch.arange(40).reshape(5, 8)
    read = torch.zeros(ids.shape, dtype=torch.bool)
    for row, columns in enumerate(([5, 6, 7], [0, 7], [6, 7], [4], [1, 7])):
        read[row, columns] = True
    return ids, torch.tensor(PADS), read


def test_rows_stand_in_the_order_of_their_lengths_and_what_is_read_finds_its_way_back() -> None:
    ids, pads, read = batch()
    line = line_up(ids, pads, read)
    assert line.ids[0, :5].tolist() == [27, 28, 29, 30, 31], "the fourth row is the shortest"
    assert line.ids.shape == (1, 40 - sum(PADS))
    assert line.position[0, :11].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert line.runs == (
        Run(num_rows=1, queries=5, keys=5),
        Run(num_rows=2, queries=6, keys=6),
        Run(num_rows=2, queries=8, keys=8),
    )
    assert line.read_runs == (
        Run(num_rows=1, queries=1, keys=5),
        Run(num_rows=1, queries=2, keys=6),
        Run(num_rows=1, queries=3, keys=6),
        Run(num_rows=2, queries=2, keys=8),
    )
    assert line.ids[0, line.columns[0]][line.back].tolist() == ids[read].tolist()


def test_attention_within_runs_is_that_of_each_row_alone() -> None:
    stream = torch.Generator().manual_seed(0)
    runs = (Run(num_rows=2, queries=1, keys=3), Run(num_rows=1, queries=4, keys=4), Run(num_rows=1, queries=0, keys=5))
    query = torch.randn((1, 4, 6, 8), generator=stream)
    key, value = torch.randn((2, 1, 2, 15, 8), generator=stream)
    found, _ = attend_within_runs(nn.Module(), query, key, value, None, runs=runs, scaling=0.3)
    for mine, its in ((slice(0, 1), slice(0, 3)), (slice(1, 2), slice(3, 6)), (slice(2, 6), slice(6, 10))):
        scores = query[0, :, mine] @ key[0, :, its].repeat_interleave(2, 0).transpose(1, 2) * 0.3
        expected = scores.softmax(-1) @ value[0, :, its].repeat_interleave(2, 0)
        torch.testing.assert_close(found[0, mine], expected.transpose(0, 1), atol=1e-6, rtol=1e-5)


def passes(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Columns of every pass from here on."""
    seen: list[int] = []
    plain = policy.hidden_after

    def hidden_after(ids: Tensor, *rest: object, **others: object) -> Tensor:
        seen.append(ids.numel())
        return plain(ids, *rest, **others)

    monkeypatch.setattr(policy, "hidden_after", hidden_after)
    return seen


def test_no_padding_is_computed_and_the_model_is_left_as_it_was(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, requests = tiny_policy(), make_requests(4, lengths=(3, 9, 1, 5))
    seen = passes(policy, monkeypatch)
    denoise(policy, requests, SAMPLER, seed=0)
    assert seen[0] == 3 + 9 + 1 + 5 + 4 * 6
    assert policy.config._attn_implementation == "eager"


@pytest.mark.parametrize("seed", [0, 1])
def test_completions_of_prompts_of_several_lengths_are_those_of_each_alone(tiny_policy: MakePolicy, seed: int) -> None:
    policy, requests = tiny_policy(end_scale=1.5, seed=seed), make_requests(9, lengths=(3, 9, 1, 5), seed=seed)
    for request, rollout in zip(requests, denoise(policy, requests, SAMPLER, seed=seed), strict=True):
        (alone,) = denoise(policy, [request], SAMPLER, seed=seed)
        assert rollout.canvas_ids.tolist() == alone.canvas_ids.tolist()
        assert rollout.commit_step.tolist() == alone.commit_step.tolist()
        assert rollout.commit_logp == pytest.approx(alone.commit_logp, abs=1e-5)
