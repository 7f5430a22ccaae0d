"""A trainer of several ranks does what one rank does: losses, gradients, weights, rollouts and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rank_cases import (
    ADAPTER,
    NUM_STEPS,
    ONES,
    TOLERANCE,
    Case,
    assert_goes_on,
    assert_same,
    run_case,
    run_together,
)
from helpers.toys import make_recipe

from coupled.rl.model.loading import load_policy
from coupled.rl.model.weights import save_policy, trainable_state
from coupled.rl.recipe.schema import Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
FAMILIES = {"whole": {"shift": 1}, "blocks": {"shift": 0, "block_length": 4}, "tied": {"tie_word_embeddings": True}}
MOVING = {"kl_beta": 0.1, "reference": "synced", "sync_every": 2, "sync_mix": 0.6}


def recipe_of(folder: Path, *, adapter: bool = False, **sections: Any) -> dict[str, Any]:
    values = {
        "model": {"path": str(folder), "adapter": ADAPTER if adapter else None} | sections.pop("model", {}),
        "loss": MOVING | sections.pop("loss", {}),
        "optimizer": {"learning_rate": 1e-4, "final_fraction": 1.0, "micro_batch_size": 2}
        | sections.pop("optimizer", {}),
        "rollout": {"canvas": 6, "denoising_steps": 6, "batch_size": 2},
        "num_steps": 4,
    }
    recipe: Recipe = make_recipe(**values, **sections)
    return recipe.model_dump(mode="json")


@pytest.fixture(scope="module")
def cases(tiny_policy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("models")
    for name, options in FAMILIES.items():
        save_policy(tiny_policy(**options), folder / name)
    low_memory = {"has_two_passes": True, "has_gradient_checkpointing": True, "micro_batch_size": 1}
    found = {
        f"{kind}-{family}": Case(recipe=recipe_of(folder / family, adapter=kind == "lora"))
        for kind in ("lora", "full")
        for family in ("whole", "blocks")
    }
    found["full-whole"] = Case(recipe=recipe_of(folder / "whole"), writes=folder / "full")
    found["lora-whole"] = Case(recipe=recipe_of(folder / "whole", adapter=True), writes=folder / "lora")
    found["full-tied"] = Case(recipe=recipe_of(folder / "tied", loss={"reference": "frozen"}), num_ranks=(2,))
    # Completions of one token: some views of a micro-batch score nothing, and must be computed all the same.
    for family in ("whole", "blocks"):
        found[f"low-memory-{family}"] = Case(
            recipe=recipe_of(folder / family, optimizer=low_memory), num_ranks=(2,), lengths=ONES
        )
    # With one update nothing is scored before it: the second rank has made no pass at all, the first has rolled out.
    found["idle"] = Case(recipe=recipe_of(folder / "whole", num_updates=1), num_ranks=(2,), num_requests=1)
    found["bfloat16"] = Case(recipe=recipe_of(folder / "whole", model={"compute_dtype": "bfloat16"}), num_ranks=(2,))
    return found


@pytest.fixture(scope="module")
def alone(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """What one rank gives, in this process; it also leaves the checkpoints that others go on from."""
    return {name: run_case(case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def together(
    cases: dict[str, Case], alone: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What 2 and 4 ranks give, by `name-ranks`."""
    resumed = {
        f"{kind}-resumed-by-2": Case(
            recipe=cases[f"{kind}-whole"].recipe, num_ranks=(2,), resumes=cases[f"{kind}-whole"].writes / "from-1"
        )
        for kind in ("full", "lora")
    }
    resumed["full-resumed-from-4"] = Case(
        recipe=cases["full-whole"].recipe, num_ranks=(2,), resumes=cases["full-whole"].writes / "from-4"
    )
    return run_together(cases | resumed, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", ["lora-whole", "lora-blocks", "full-whole", "full-blocks"])
def test_losses_norms_weights_and_reference_are_those_of_one_rank(
    alone: dict[str, Any], together: dict[str, Any], name: str, num_ranks: int
) -> None:
    found, expected = together[f"{name}-{num_ranks}"], alone[name]
    assert len(expected["losses"]) == 2 * NUM_STEPS
    assert_same(found, expected)
    moved = max(float((expected["weights"][n] - t).abs().max()) for n, t in expected["start"].items())
    assert moved > 100 * TOLERANCE, "weights that stay would agree anyway"
    assert len(set(expected["losses"])) == 2 * NUM_STEPS
    assert found["is_sharded"] == name.startswith("full")


@pytest.mark.parametrize("name", ["full-tied-2", "low-memory-whole-2", "low-memory-blocks-2", "idle-2"])
def test_so_are_those_of_tied_weights_of_views_that_score_nothing_and_of_ranks_that_rolled_out_nothing(
    alone: dict[str, Any], together: dict[str, Any], name: str
) -> None:
    assert_same(together[name], alone[name[:-2]])


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", ["lora-whole", "lora-blocks", "full-whole", "full-blocks"])
def test_ranks_share_the_rollouts_and_make_the_same_ones(
    alone: dict[str, Any], together: dict[str, Any], name: str, num_ranks: int
) -> None:
    found, expected = together[f"{name}-{num_ranks}"], alone[name]
    assert found["before"] == expected["before"]
    assert found["after"] == expected["after"]


def test_full_weights_are_split_and_adapters_are_not(alone: dict[str, Any], together: dict[str, Any]) -> None:
    def share(name: str, size: int) -> float:
        return together[f"{name}-{size}"]["local_numbers"] / alone[name]["local_numbers"]

    assert share("full-whole", 2) == pytest.approx(1 / 2, rel=0.01)
    assert share("full-whole", 4) == pytest.approx(1 / 4, rel=0.01)
    assert share("lora-whole", 4) == 1


def test_layers_that_are_gathered_in_bfloat16_train_as_under_autocast(
    alone: dict[str, Any], together: dict[str, Any]
) -> None:
    found, expected = together["bfloat16-2"], alone["bfloat16"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=0.02)
    assert found["norms"] == pytest.approx(expected["norms"], rel=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in found["weights"].values()), "what is trained stays fp32"


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_of_one_rank_is_resumed_by_two(alone: dict[str, Any], together: dict[str, Any], kind: str) -> None:
    assert_goes_on(together[f"{kind}-resumed-by-2-2"], alone[f"{kind}-whole"])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_of_two_ranks_is_resumed_by_one(
    cases: dict[str, Case], alone: dict[str, Any], together: dict[str, Any], kind: str
) -> None:
    case = cases[f"{kind}-whole"]
    assert case.writes is not None
    assert_goes_on(run_case(Case(recipe=case.recipe, resumes=case.writes / "from-2")), alone[f"{kind}-whole"])


def test_a_checkpoint_of_four_ranks_is_resumed_by_two(alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert_goes_on(together["full-resumed-from-4-2"], alone["full-whole"])


def test_a_checkpoint_of_several_ranks_opens_as_one_of_a_single_rank(
    cases: dict[str, Case], together: dict[str, Any]
) -> None:
    for kind in ("full", "lora"):
        folder = cases[f"{kind}-whole"].writes
        assert folder is not None
        one, two = (sorted(p.name for p in (folder / f"from-{n}").iterdir()) for n in (1, 2))
        if kind == "lora":
            assert one == two
        else:
            assert {*one} - {"optimizer.pt", "reference.pt"} == {*two} - {"shards"}
        first, second = (trainable_state(load_policy(folder / f"from-{n}")) for n in (1, 2))
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, atol=TOLERANCE, rtol=0)
