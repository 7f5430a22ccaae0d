"""The comparison with exact rollouts, and the reaction of a run to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from coupled.reward import Status, Task, Verdict
from coupled.rl import run as run_module
from coupled.rl.errors import RecipeError, RolloutError
from coupled.rl.monitoring import checks
from coupled.rl.recipe.read import apply_overrides, dump_recipe, load_recipe
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.exactness import Mismatch, compare, exact_counterpart, token_agreement
from coupled.rl.run import open_run
from coupled.rl.train import train
from coupled.rl.types import Group, Prompt, Rollout

pytestmark = pytest.mark.slow

TASK = Task(uid="t", prompt="p", hidden_tests=("assert True",))


def rollout(ids: list[int], length: int, entropy: float = 1.0, uid: str = "u") -> Rollout:
    return Rollout(
        uid=uid,
        prompt_ids=(5,),
        canvas_ids=np.array(ids),
        completion_length=length,
        text="",
        finish_reason="end",
        commit_step=np.zeros(len(ids), dtype=np.int32),
        commit_logp=np.zeros(len(ids), dtype=np.float32),
        commit_entropy=np.full(len(ids), entropy, dtype=np.float32),
        num_forwards=1,
        weight_version=0,
        sampler_hash="",
    )


def group(rollouts: list[Rollout], rewards: list[float | None]) -> Group:
    verdicts = tuple(Verdict(score=r, parts={}, status=Status.OK if r is not None else Status.INFRA) for r in rewards)
    return Group(prompt=Prompt(task=TASK, token_ids=(5,)), rollouts=tuple(rollouts), verdicts=verdicts)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (([5, 6, 7, 1], 4), ([5, 9, 1, 0], 3), 0.25),
        (([5, 6, 1, 9], 3), ([5, 6, 1, 8], 3), 1.0),
        (([5, 1, 7, 8], 2), ([5, 1, 7, 8], 4), 0.5),
    ],
)
def test_tokens_agree_position_by_position(
    one: tuple[list[int], int], other: tuple[list[int], int], expected: float
) -> None:
    assert token_agreement(rollout(*one), rollout(*other)) == expected
    assert token_agreement(rollout(*other), rollout(*one)) == expected


def test_differences_are_ours_less_theirs_and_what_nobody_judged_is_left_out() -> None:
    ours = group([rollout([5, 6, 1], 3, 0.5, uid) for uid in "abcd"], [1.0, 2.0, 0.0, None])
    theirs = group([rollout([5, 1, 1], 2, 1.5, uid) for uid in "abcd"], [0.0, 2.0, 2.0, 1.0])
    found = compare([ours], [theirs])
    assert found.reward == pytest.approx((1 + 0 - 2) / 3)
    assert found.reward_error == pytest.approx(np.std([1, 0, -2], ddof=1) / 3**0.5)
    assert (found.completion_length, found.entropy, found.token_agreement) == pytest.approx((1.0, -1.0, 1 / 3))


@pytest.mark.parametrize(
    ("reward", "error", "expected"), [(0.3, 0.05, True), (-0.3, 0.05, True), (0.3, 0.2, False), (0.05, 0.0, False)]
)
def test_a_mismatch_is_more_than_the_tolerance_and_more_than_chance(
    reward: float, error: float, expected: bool
) -> None:
    found = Mismatch(reward=reward, reward_error=error, completion_length=0.0, entropy=0.0, token_agreement=1.0)
    assert found.is_beyond(0.1) == expected


def test_the_exact_counterpart_keeps_the_distribution_and_nothing_else() -> None:
    fast = Sampler(
        canvas=8,
        denoising_steps=4,
        temperature=1.1,
        top_p=0.9,
        top_k=7,
        entropy_bound=1.0,
        end_fill=0.9,
        cache="prefix",
    )
    assert exact_counterpart(fast) == Sampler(
        canvas=8, denoising_steps=4, temperature=1.1, top_p=0.9, top_k=7, has_early_exit=False
    )


# --- presets --------------------------------------------------------------------------------------------------------


def test_presets_set_what_is_not_given() -> None:
    by_name = {
        name: load_recipe("quickstart", (f"rollout.preset={name}",)).rollout for name in ("rl", "reference", "fast")
    }
    assert by_name["rl"] == load_recipe("quickstart").rollout
    assert (by_name["reference"].top_p, by_name["reference"].has_early_exit) == (0.95, False)
    assert (by_name["fast"].entropy_bound, by_name["fast"].end_fill, by_name["fast"].top_p) == (0.1, 0.99, 1.0)
    hashes = {load_recipe("quickstart", (f"rollout.preset={n}",)).rollout.sampler.hash for n in by_name}
    assert len(hashes) == 3
    own = load_recipe("quickstart", ("rollout.preset=fast", "rollout.entropy_bound=0.5")).rollout
    assert (own.entropy_bound, own.end_fill) == (0.5, 0.99)


def test_another_preset_takes_effect_on_a_saved_recipe(tmp_path: Path) -> None:
    saved = tmp_path / "recipe.yaml"
    saved.write_text(dump_recipe(load_recipe("quickstart", ("rollout.preset=fast",))))
    assert load_recipe(saved).rollout.entropy_bound == 0.1
    for recipe in (
        load_recipe(saved, ("rollout.preset=reference",)),
        apply_overrides(load_recipe(saved), ("rollout.preset=reference",)),
    ):
        assert (recipe.rollout.entropy_bound, recipe.rollout.end_fill, recipe.rollout.top_p) == (None, None, 0.95)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.cache=dual", "makes the whole canvas one block; set a block_length"),
        ("rollout.refresh_steps=4", "refresh_steps=4 has no effect without a cache"),
        ("rollout.preset=faster", "rollout.preset"),
    ],
)
def test_settings_that_mean_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", (override,))


# --- a run ----------------------------------------------------------------------------------------------------------

SMALL = (
    "num_steps=2",
    "optimizer.warmup_steps=0",
    "evaluation.num_problems=1",
    "evaluation.num_samples=1",
    "evaluation.has_greedy=false",
    "rollout.num_prompts=2",
    "rollout.group_size=4",
    "rollout.denoising_steps=10",
    "sandbox.num_workers=1",
    "num_threads=1",
    "rollout.preset=fast",
    "rollout.monitor_every=1",
)


def rows_of(tmp_path: Path, *overrides: str) -> list[dict[str, float]]:
    recipe = load_recipe("quickstart", (*SMALL, f"output_dir={tmp_path}", *overrides))
    folder = train(recipe).path
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_fast_run_logs_its_bounds_and_its_distance_from_exact_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "NUM_COMPARED", 1)
    monkeypatch.setattr(checks, "TOLERANCE", 100.0)
    rows = rows_of(tmp_path)
    for row in rows:
        assert row["kl_bound"] > 0
        assert row["fill_bound"] >= 0
        assert 0 < row["mismatch/token_agreement"] <= 1
        assert {
            "mismatch/reward",
            "mismatch/reward_error",
            "mismatch/completion_length",
            "mismatch/entropy",
        } < row.keys()
        assert "mismatch/fell_back" not in row


def test_a_run_falls_back_to_exact_rollouts_and_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mismatch, "is_beyond", lambda *_: True)
    rows = rows_of(tmp_path, "rollout.on_mismatch=fall_back")
    assert rows[0]["mismatch/fell_back"] == 1
    assert "kl_bound" in rows[0]
    assert not any(name.startswith("mismatch/") or name == "kl_bound" for name in rows[1])
    folder = next(tmp_path.glob("quickstart-*"))
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["mismatch/fell_back"] == 1
    recipe = load_recipe("quickstart", (*SMALL, f"output_dir={tmp_path}", "rollout.on_mismatch=fall_back"))
    with open_run(recipe, resume=str(folder)) as run:
        assert run._sampler.is_exact, "a resumed run remembers"


def test_a_run_stops_where_the_recipe_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mismatch, "is_beyond", lambda *_: True)
    with pytest.raises(RolloutError, match="rollouts differ from exact ones by more than chance: reward"):
        rows_of(tmp_path, "rollout.on_mismatch=stop")
