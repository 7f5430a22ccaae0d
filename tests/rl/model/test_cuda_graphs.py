"""Passes in few shapes give what they give in their own, and a graph that is replayed what the pass gives."""

from __future__ import annotations

import pytest
import torch
from helpers.toys import MakePolicy
from torch import Tensor, nn

import coupled.rl.model.cuda_graphs
from coupled.rl.model.cuda_graphs import Graphs, fill_up, is_small
from coupled.rl.model.last_layer import only
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import denoise
from coupled.rl.rollout.sampler import Request

SAMPLER = Sampler(canvas=10, denoising_steps=10, temperature=1.0)
REQUESTS = [Request(uid=f"{i}", prompt_ids=(5, 9, 12, 6)) for i in range(5)]


def test_columns_are_filled_up_to_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupled.rl.model.cuda_graphs, "READ_COLUMNS", 4)
    assert fill_up(torch.tensor([[3, 5]]), 9).tolist() == [[3, 5, 0, 0]]
    assert fill_up(torch.tensor([[1, 2, 3, 5]]), 9).tolist() == [[1, 2, 3, 5]]
    assert fill_up(torch.tensor([[1, 2, 3, 4, 5]]), 6).shape == (1, 6), "there are no more"
    assert is_small(torch.zeros((2, 1024), dtype=torch.int64))
    assert not is_small(torch.zeros((3, 1024), dtype=torch.int64))


@pytest.mark.parametrize("order", ["entropy", "origin"])
def test_rollouts_in_few_shapes_are_those_in_their_own(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr(coupled.rl.model.cuda_graphs, "READ_COLUMNS", 4)
    policy, sampler = tiny_policy(end_scale=1.5), SAMPLER.changed(order=order)
    plain = denoise(policy, REQUESTS, sampler, seed=0)
    seen: list[int] = []

    def told(layer: nn.Module, columns: Tensor) -> object:
        seen.append(columns.shape[1])
        return only(layer, columns)

    monkeypatch.setattr("coupled.rl.model.policy.only", told)
    policy.graphs = Graphs()
    for mine, its in zip(denoise(policy, REQUESTS, sampler, seed=0), plain, strict=True):
        assert mine.canvas_ids.tolist() == its.canvas_ids.tolist()
        assert mine.commit_step.tolist() == its.commit_step.tolist()
        assert mine.commit_logp == pytest.approx(its.commit_logp, abs=1e-5)
    assert set(seen) <= {4, 8, 12}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_a_replayed_pass_is_the_pass_also_after_the_weights_have_changed_or_moved(tiny_policy: MakePolicy) -> None:
    policy: Policy = tiny_policy()
    policy.model.cuda()
    graphs = Graphs()
    stream = torch.Generator("cuda").manual_seed(0)
    for change in ("none", "in place", "moved"):
        for parameter in policy.model.parameters():
            if change == "in place":
                parameter.mul_(1.1)
            elif change == "moved":
                parameter.data = parameter.data * 0.9
        for _ in range(3):
            ids = torch.randint(4, 42, (2, 14), device="cuda", generator=stream)
            columns = torch.tensor([[5, 9, 13], [1, 2, 3]], device="cuda")
            found = graphs.run(policy.model, policy._whole_rows, (ids, columns))
            torch.testing.assert_close(found, policy._whole_rows(ids, columns))
    assert len(graphs._known) == 2, "captured once, and once more where the weights had moved"
