"""The benchmark of rollouts: what it runs on a GPU runs here at toy size, and its floors are the method page's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("rollout")


@pytest.mark.slow
def test_all_that_is_measured_on_a_gpu_runs_at_toy_size(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    report: dict[str, Any] = {"parts": {}, "runs": [{"gpu": "none"}]}
    size = replace(benchmark.SIZES["toy"], canvas=32, groups=((2, 1),), block_rows=1)
    benchmark.measure_gpu(report, size)
    assert set(report["parts"]) == {"G = 2", "blocks of 4, 1 rows", "blocks of 32, 1 rows"}
    for part in report["parts"].values():
        assert all(row["seconds"] for row in part["rows"].values()), "no arm failed"
        assert part["profile"]
        assert len(benchmark.part_table(part)) == 2 + len(part["rows"])
    monkeypatch.setattr(benchmark, "GPU_SECONDS", -1)
    benchmark.measure_gpu(report, replace(size, blocks=()))
    assert {row["failed"] for row in report["parts"]["G = 2"]["rows"].values()} == {"no time left"}


@pytest.mark.parametrize("length", [4, 32])
def test_blocks_over_the_cache_have_the_tokens_of_blocks_computed_anew(benchmark: ModuleType, length: int) -> None:
    policy = benchmark.random_policy("toy", "cpu", block_length=length)
    problem = benchmark.random_problem(policy, 2, 37, 32, 32)
    found = dict(benchmark.check(problem, list(benchmark.BLOCK_ARMS)))
    assert found["rl"]["same"] == 1
    assert found["rl"]["counts"]["positions"] < found["everything anew"]["counts"]["positions"]


def test_floors_of_the_shape_of_dream_are_those_of_the_method_page(benchmark: ModuleType) -> None:
    """Tokens a second of ten rows, prompt 200, canvas 256: 121 with all logits, 128 with masked rows only. Ours is a
    little less work: the last layer of masked rows only."""
    arms = {arm.name: arm for arm in benchmark.RANDOM_ARMS}
    with torch.device("meta"):
        config = Qwen2Config(**benchmark.SHAPES["dream-7b"], tie_word_embeddings=False)
        model = Qwen2ForCausalLM(config)
    policy = replace_model(benchmark.random_policy("toy", "cpu"), model)
    problem = benchmark.random_problem(policy, 10, 200, 256, 256)
    assert 2560 / benchmark.floor_of(arms["published loop"], problem) == pytest.approx(121, abs=1)
    assert 128 < 2560 / benchmark.floor_of(arms["rl"], problem) < 133
    assert benchmark.floor_of(arms["fast"], problem) is None
    blocks = benchmark.random_problem(policy, 64, 200, 256, 256)
    assert 64 * 256 / benchmark.floor_of_blocks(blocks, 32) == pytest.approx(1707, rel=0.05)


def replace_model(policy: Any, model: torch.nn.Module) -> Any:
    policy.model = model
    return policy
