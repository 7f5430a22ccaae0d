"""Likelihood training over several ranks does what one rank does: losses, gradient norms, weights and checkpoints."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fit_runs import numbers, sft_recipe
from helpers.rank_cases import ADAPTER, NUM_STEPS, TOLERANCE, Case, assert_goes_on, assert_same, run_case, run_together
from helpers.toys import MakePolicy, make_likelihood_recipe

from coupled.rl.errors import RankError
from coupled.rl.fit import fit
from coupled.rl.model.loading import load_policy
from coupled.rl.model.weights import save_policy, trainable_state
from coupled.rl.run_folder.folder import RunFolder
from coupled.rl.trainer.rank_process import ProcessRankHandle

pytestmark = pytest.mark.slow
OBJECTIVES: dict[str, dict[str, Any]] = {
    "autoregressive": {"canvas": 8},
    "masked_diffusion": {"context": 24, "attention_anneal_steps": 2, "micro_batch_size": 0},
    "causal_diffusion": {"canvas": 8, "noise_warmup_steps": 2},
    "block_diffusion": {"context": 24, "block_length": 3, "clipped_noise": "exact"},
}
"""Nine rows: five micro-batches of two, which come out even on no number of ranks, or one for each rank."""
SPARSE = {"mask_ratio": (0.03, 0.06)}
ODD: dict[str, dict[str, Any]] = {
    # Most micro-batches have nothing masked, and must be computed all the same.
    "sparse-whole": {"objective": "masked_diffusion", "canvas": 8, "micro_batch_size": 1} | SPARSE,
    "sparse-blocks": {"objective": "block_diffusion", "block_length": 2, "micro_batch_size": 1} | SPARSE,
    "fewer-rows-than-ranks": {"objective": "causal_diffusion", "batch_size": 3, "micro_batch_size": 0},
}


def recipe_of(folder: Path, fit: dict[str, Any], num_ranks: int = 1, **sections: Any) -> dict[str, Any]:
    recipe = make_likelihood_recipe(
        stage="sft",
        num_steps=4,
        model={"path": str(folder), "adapter": sections.pop("adapter", None)},
        optimizer={"learning_rate": 1e-4, "final_fraction": 1.0} | sections.pop("optimizer", {}),
        cluster={"trainer_ranks": num_ranks},
        fit={"batch_size": 9, "micro_batch_size": 2} | fit,
    )
    return recipe.model_dump(mode="json")


def cases_of(folder: Path, num_ranks: int) -> dict[str, Case]:
    """What a recipe says of the ranks is used where micro-batches are one for each."""
    found = {
        f"{kind}-{objective}": Case(
            recipe=recipe_of(
                folder / "model",
                {"objective": objective} | options,
                num_ranks,
                adapter=ADAPTER if kind == "lora" else None,
            ),
            num_ranks=(num_ranks,),
            writes=folder / kind if objective == "block_diffusion" else None,
        )
        for kind in ("lora", "full")
        for objective, options in OBJECTIVES.items()
    }
    low_memory = {"has_gradient_checkpointing": True}
    for name, options in ODD.items():
        recipe = recipe_of(folder / "model", options, num_ranks, optimizer=low_memory)
        found[f"full-{name}"] = Case(recipe=recipe, num_ranks=(num_ranks,))
    return found


@pytest.fixture(scope="module")
def folder(tiny_policy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model that all cases begin with: it reads everything, whatever the objective makes of it."""
    folder = tmp_path_factory.mktemp("fit")
    save_policy(tiny_policy(), folder / "model")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """What one rank gives, in this process; it also leaves the checkpoints that others go on from."""
    return {name: run_case(case) for name, case in cases_of(folder, 1).items()}


@pytest.fixture(scope="module")
def together(
    folder: Path, alone: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What 2 and 4 ranks give, by `name-ranks`."""
    cases = {f"{name}-of-{size}": case for size in (2, 4) for name, case in cases_of(folder, size).items()}
    resumed = {
        f"{kind}-from-{wrote}": Case(
            recipe=cases[f"{kind}-block_diffusion-of-2"].recipe, num_ranks=(2,), resumes=folder / kind / f"from-{wrote}"
        )
        for kind in ("lora", "full")
        for wrote in (1, 4)
    }
    found = run_together(cases | resumed, tmp_path_factory.mktemp("ranks"))
    return {name.replace("-of-2-2", "-2").replace("-of-4-4", "-4"): outcome for name, outcome in found.items()}


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_losses_norms_and_weights_are_those_of_one_rank(
    alone: dict[str, Any], together: dict[str, Any], kind: str, objective: str, num_ranks: int
) -> None:
    found, expected = together[f"{kind}-{objective}-{num_ranks}"], alone[f"{kind}-{objective}"]
    assert len(set(expected["losses"])) == NUM_STEPS
    assert_same(found, expected)
    moved = max(float((expected["weights"][n] - t).abs().max()) for n, t in expected["start"].items())
    assert moved > 100 * TOLERANCE, "weights that stay would agree anyway"
    assert found["is_sharded"] == (kind == "full")
    share = found["local_numbers"] / expected["local_numbers"]
    assert share == pytest.approx(1 / num_ranks if kind == "full" else 1, rel=0.01)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", ODD)
def test_so_are_those_of_ranks_that_have_no_rows_or_nothing_masked_in_them(
    alone: dict[str, Any], together: dict[str, Any], name: str, num_ranks: int
) -> None:
    expected = alone[f"full-{name}"]
    masked = [count for step in expected["masked"] for count in step]
    assert any(masked)
    assert name == "fewer-rows-than-ranks" or masked.count(0) > len(masked) / 2
    assert_same(together[f"full-{name}-{num_ranks}"], expected)


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrote", [1, 4])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_checkpoint_of_one_rank_or_of_four_is_resumed_by_two(
    alone: dict[str, Any], together: dict[str, Any], kind: str, wrote: int
) -> None:
    assert_goes_on(together[f"{kind}-from-{wrote}-2"], alone[f"{kind}-block_diffusion"])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_checkpoint_of_two_ranks_is_resumed_by_one_and_opens_as_always(
    folder: Path, alone: dict[str, Any], together: dict[str, Any], kind: str
) -> None:
    written = folder / kind / "from-2"
    expected = alone[f"{kind}-block_diffusion"]
    recipe = cases_of(folder, 1)[f"{kind}-block_diffusion"].recipe
    assert_goes_on(run_case(Case(recipe=recipe, resumes=written)), expected)
    one, two = load_policy(folder / kind / "from-1"), load_policy(written)
    assert two.family.block_length == one.family.block_length == 3, "it attends as it was trained"
    for name, tensor in trainable_state(one).items():
        torch.testing.assert_close(trainable_state(two)[name], tensor, atol=TOLERANCE, rtol=0)


# --- whole runs ---------------------------------------------------------------------------------------------------


def test_a_run_that_loses_a_rank_names_it_and_is_resumed_by_any_number(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective is the model's to decide, and the other ranks receive the result."""
    model = tiny_policy(shift=0, block_length=4)
    alone = sft_recipe(tmp_path, model, {"micro_batch_size": 2})
    pair = sft_recipe(tmp_path, model, {"micro_batch_size": 2}, name="pair", cluster={"trainer_ranks": 2})
    whole = fit(alone)
    started: list[ProcessRankHandle] = []
    commit = RunFolder.commit

    def started_and_kept(*arguments: Any) -> ProcessRankHandle:
        started.append(ProcessRankHandle(*arguments))
        return started[-1]

    def killed_after_two_steps(self: RunFolder, step: int, write: Any, *facts: Any) -> Path:
        folder = commit(self, step, write, *facts)
        if step == 2:
            os.kill(started[-1].pid, signal.SIGKILL)
        return folder

    with monkeypatch.context() as patched:
        patched.setattr("coupled.rl.trainer.open.ProcessRankHandle", started_and_kept)
        patched.setattr(RunFolder, "commit", killed_after_two_steps)
        with pytest.raises(RankError, match=r"rank 1 of the trainer ended with signal 9 in 'fit'.*logs/rank_1\.log"):
            fit(pair)
    resumed = fit(pair, "auto")
    assert resumed.parents[1].name == "pair-001"
    assert [row["step"] for row in numbers(resumed.parents[1])] == [1, 2, 3, 4]
    for mine, expected in zip(numbers(resumed.parents[1]), numbers(whole.parents[1]), strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)
    assert load_policy(resumed).family.block_length == 4
