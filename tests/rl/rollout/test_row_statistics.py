"""The Triton kernel says of every row what torch says. Where there is no GPU, Triton's interpreter runs it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.toys import MakePolicy, make_requests
from torch import Tensor, nn

import coupled.rl.rollout.row_statistics
from coupled.rl.model.vocabulary import OutputHead
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import denoise
from coupled.rl.rollout.distributions import FORBIDDEN
from coupled.rl.rollout.row_statistics import AGREES, _has_kernel, is_fused
from coupled.rl.rollout.row_statistics_torch import Choice, draw_logits, measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASK_ID = 7


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with the kernel, which holds 64 columns at a time, so that a row takes several turns."""
    pytest.importorskip("triton", reason="triton (1 GB) is not in extra `dev`: pip install triton runs this on a CPU")
    # Not through the import hook of the tests: Triton reads the source of its functions, which must not be wrapped.
    name = "coupled.rl.rollout.row_statistics_triton"
    file = Path(str(coupled.rl.rollout.row_statistics.__file__)).with_name("row_statistics_triton.py")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(module, "BLOCK", 64)
    return module


def head_of(num_tokens: int) -> OutputHead:
    return OutputHead(module=nn.Linear(1, 1), mask_id=MASK_ID, num_tokens=num_tokens)


def random_logits(num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Flat rows and sharp ones, MASK the likeliest of all, and columns behind the vocabulary."""
    stream = torch.Generator().manual_seed(num_tokens)
    spread = torch.linspace(0.01, 8, 9)[:, None]
    logits = torch.randn((9, num_tokens + 5), generator=stream) * spread
    logits[:, MASK_ID] = 50.0
    logits[:, num_tokens:] = 60.0
    return logits.to(dtype=dtype, device=DEVICE)


def plain(logits: Tensor, num_tokens: int, temperature: float) -> Tensor:
    """Tempered logits in fp32, forbidden ones out of the way."""
    found = logits.float() / (temperature or 1.0)
    found[:, MASK_ID] = FORBIDDEN
    found[:, num_tokens:] = FORBIDDEN
    return found.clamp(min=FORBIDDEN)


def assert_equal_statistics(kernel: ModuleType, logits: Tensor, num_tokens: int, temperature: float) -> None:
    before = logits.clone()
    found = kernel.fused_statistics(head_of(num_tokens), logits, temperature)
    assert torch.equal(logits, before), "they are left as they are"
    expected = measure(plain(logits, num_tokens, temperature), has_margin=True, has_token=True)
    torch.testing.assert_close(found.entropy, expected.entropy, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(found.best_probability, expected.best_probability, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.margin, expected.margin, atol=1e-6, rtol=1e-6)
    assert torch.equal(found.best_token, expected.best_token)


def assert_equal_choices(kernel: ModuleType, logits: Tensor, num_tokens: int, temperature: float) -> None:
    draws = torch.linspace(0, 1 - 1e-9, len(logits), dtype=torch.float64, device=DEVICE)
    found = kernel.fused_choice(head_of(num_tokens), logits, temperature, draws)
    expected = draw_logits(plain(logits, num_tokens, temperature), temperature, draws)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logp, expected.logp, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(found.entropy, expected.entropy, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("num_tokens", [8, 63, 64, 65, 200, 257])
def test_statistics_and_tokens_are_those_of_torch_for_any_size_of_the_vocabulary(
    kernel: ModuleType, num_tokens: int
) -> None:
    logits = random_logits(num_tokens)
    assert_equal_statistics(kernel, logits, num_tokens, 1.0)
    assert_equal_choices(kernel, logits, num_tokens, 1.0)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_at_any_temperature_and_in_any_precision(kernel: ModuleType, dtype: torch.dtype, temperature: float) -> None:
    logits = random_logits(150, dtype)
    assert_equal_statistics(kernel, logits, 150, temperature)
    assert_equal_choices(kernel, logits, 150, temperature)


def test_the_same_token_for_every_one_of_many_uniform_numbers(kernel: ModuleType) -> None:
    logits = random_logits(150)[2:3].expand(60, -1).contiguous()
    draws = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = kernel.fused_choice(head_of(150), logits, 1.0, draws)
    expected = draw_logits(plain(logits, 150, 1.0), 1.0, draws)
    assert torch.equal(found.tokens, expected.tokens)
    assert len(found.tokens.unique()) > 10


def test_of_equally_likely_tokens_the_first_is_the_best(kernel: ModuleType) -> None:
    logits = torch.zeros((3, 200), device=DEVICE)
    logits[1, [150, 40, 90]] = 3.0  # in three blocks
    logits[2, 0] = 9.0
    assert_equal_statistics(kernel, logits, 200, 1.0)
    found = kernel.fused_statistics(head_of(200), logits, 1.0)
    assert found.best_token.tolist() == [0, 40, 0]
    assert found.margin[:2].abs().max() < 1e-7


def test_tokens_at_minus_infinity_weigh_nothing_and_are_never_drawn(kernel: ModuleType) -> None:
    logits = random_logits(200)
    logits[:, :130] = float("-inf")  # two whole blocks
    logits[0] = float("-inf")
    logits[0, 199] = 1.0  # one token is left
    assert_equal_statistics(kernel, logits, 200, 1.0)
    assert_equal_choices(kernel, logits, 200, 1.0)
    found = kernel.fused_choice(head_of(200), logits, 1.0, torch.zeros(9, dtype=torch.float64, device=DEVICE))
    assert found.tokens[0] == 199
    assert found.entropy[0].abs() < 1e-6
    assert (found.tokens >= 130).all()


def test_a_row_s_numbers_do_not_depend_on_the_others(kernel: ModuleType) -> None:
    logits, head = random_logits(150), head_of(150)
    together = kernel.fused_statistics(head, logits, 1.0)
    for row in (0, 8):
        alone = kernel.fused_statistics(head, logits[row : row + 1], 1.0)
        assert torch.equal(alone.entropy[0], together.entropy[row])
        assert torch.equal(alone.margin[0], together.margin[row])
    assert len(kernel.fused_statistics(head, logits[:0], 1.0).entropy) == 0
    assert len(kernel.fused_choice(head, logits[:0], 1.0, torch.zeros(0, device=DEVICE)).tokens) == 0


def test_tokens_that_are_given_are_taken(kernel: ModuleType) -> None:
    logits, head = random_logits(150), head_of(150)
    draws = torch.full((9,), 0.5, dtype=torch.float64, device=DEVICE)
    given = torch.tensor([-1, 3, -1, 5, 149, -1, -1, -1, 0], device=DEVICE)
    found = kernel.fused_choice(head, logits, 0.8, draws, given)
    expected = draw_logits(plain(logits, 150, 0.8), 0.8, draws, given)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logp, expected.logp, atol=2e-6, rtol=2e-6)


def test_the_kernel_is_used_where_it_is_seen_to_agree_with_torch(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel.largest_difference(torch.device(DEVICE)) < AGREES / 10
    choose = kernel.fused_choice

    def choose_another(*arguments: object) -> Choice:
        found = choose(*arguments)
        return replace(found, tokens=found.tokens + 1)

    monkeypatch.setattr(kernel, "fused_choice", choose_another)
    assert kernel.largest_difference(torch.device(DEVICE)) == float("inf")


class Broken(ModuleType):
    """Stands for the kernels where they do not compile, or are wrong."""

    def __init__(self, found: float | Exception) -> None:
        super().__init__("coupled.rl.rollout.row_statistics_triton")
        self.found = found

    def largest_difference(self, device: torch.device) -> float:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    ("found", "told"),
    [(RuntimeError("PassManager::run failed"), "PassManager::run failed"), (0.1, "differs from torch by 0.1")],
    ids=["it does not compile", "it is wrong"],
)
def test_a_kernel_that_fails_or_differs_is_left_aside_and_said_once(
    monkeypatch: pytest.MonkeyPatch, found: float | Exception, told: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "coupled.rl.rollout.row_statistics_triton", Broken(found))
    monkeypatch.setattr(coupled.rl.rollout, "row_statistics_triton", Broken(found), raising=False)
    device = torch.device("cuda", 99)
    _has_kernel.cache_clear()
    with pytest.warns(UserWarning, match=told):
        assert not _has_kernel(device)
    assert not _has_kernel(device)
    _has_kernel.cache_clear()


@pytest.mark.parametrize(
    "settings", [{}, {"order": "margin"}, {"temperature": 0.0}, {"top_p": 0.9}, {"end_fill": 0.3}], ids=str
)
def test_rollouts_are_the_same_with_it(
    kernel: ModuleType, tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    policy, requests = tiny_policy(end_scale=2.0), make_requests(3)
    policy.model.to(DEVICE)
    sampler = Sampler(canvas=6, denoising_steps=6, temperature=1.1).changed(**settings)
    monkeypatch.setattr(coupled.rl.rollout.row_statistics, "is_fused", lambda _: False)
    expected = denoise(policy, requests, sampler, seed=0)
    monkeypatch.setattr(coupled.rl.rollout.row_statistics, "is_fused", lambda _: True)
    for mine, its in zip(denoise(policy, requests, sampler, seed=0), expected, strict=True):
        assert mine.canvas_ids.tolist() == its.canvas_ids.tolist()
        assert mine.commit_step.tolist() == its.commit_step.tolist()
        assert mine.commit_logp == pytest.approx(its.commit_logp, abs=1e-5)


def test_torch_reads_rows_that_are_not_on_a_gpu() -> None:
    assert not is_fused(torch.zeros(2))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from coupled.rl.rollout import row_statistics_triton as module

TYPES = {"draws": "*fp64", "given": "*i64", "token": "*i64", "stride": "i32", "mask_id": "i32", "num_tokens": "i32"}
TYPES |= {"temperature": "fp32", "BLOCK": "constexpr", "IS_GREEDY": "constexpr", "logits": "*bf16"}
for kernel, greedy in ((module._statistics_kernel, {}), (module._choice_kernel, {"IS_GREEDY": False})):
    types = {name: TYPES.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs={"BLOCK": module.BLOCK, **greedy})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": module.NUM_WARPS})
    assert ".local" not in made.asm["ptx"], "registers are spilled"
    print(len(made.asm["cubin"]) > 0)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_whether_or_not_one_is_here(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does."""
    pytest.importorskip("triton", reason="triton (1 GB) is not in extra `dev`: pip install triton compiles them")
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(program, capture_output=True, text=True, env=clean, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]
