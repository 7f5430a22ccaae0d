# ruff: noqa: E402
"""Shapes are checked in every test, torch runs on one thread, and a tiny random model stands in for a checkpoint."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, runtime_checkable
from unittest.mock import patch

from jaxtyping import install_import_hook

# beartype draws which item of a container it checks. It gets a generator of its own, so that tests can tell whether
# the package itself leaves the global one alone.
with patch("random.getrandbits", random.Random(0).getrandbits):
    import beartype.door  # noqa: F401

TENSOR_CODE = ("types", "model", "estimators", "objective", "rollout", "likelihood", "trainer")
"""Parts of rl/ whose calls are checked against their annotations, shapes included."""
# Before anything of coupled.rl is imported. `scripts/check --all` checks the calls of the rest as well.
_is_all = os.environ.get("COUPLED_CHECKED_TYPES") == "all"
install_import_hook("coupled.rl" if _is_all else [f"coupled.rl.{part}" for part in TENSOR_CODE], "beartype.beartype")

import pytest

pytest.register_assert_rewrite("helpers")
import torch

# Triton asks when it is first imported, which transformers does: without a GPU, kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import coupled.rl.cluster.transport
import coupled.rl.rollout.engine
from coupled.rl.model.families import Family
from coupled.rl.model.policy import Policy
from coupled.rl.model.weights import save_policy
from coupled.sandbox import Executor

# beartype checks a protocol by its method names, which Python allows only for protocols that are marked so.
runtime_checkable(Executor)
runtime_checkable(coupled.rl.rollout.engine.RolloutEngine)
runtime_checkable(coupled.rl.cluster.transport.Transport)
runtime_checkable(coupled.rl.cluster.transport.Carrier)

torch.set_num_threads(1)
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

PAD, END, MASK, UNKNOWN = "<pad>", "<end>", "<mask>", "?"
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 \n"
HEAD_ROWS = 48
"""More than there are tokens, as in published checkpoints: the head is padded."""

MakePolicy = Callable[..., Policy]


UNIT_TESTS = ("data", "estimators", "likelihood", "model", "objective", "recipe", "rollout", "run_folder")
"""Folders of tests/rl/ whose tests start no process; those of all others do, and are marked so."""
TOGETHER = {
    "ranks": ("test_rank_equality.py", "test_likelihood_ranks.py", "test_rank_group.py"),
    "ray": ("test_runs.py", "test_ray_sandbox.py", "test_nodes.py", "test_ray_ranks.py"),
}
"""Files that share a test process, so that their ranks or Rays never run side by side."""
FIRST = ("test_runs.py", "test_rank_equality.py", "test_end_to_end.py", "test_attack_suite.py")
"""Files that take longest, in the order in which test processes take them."""


def group_of(file: str) -> str:
    """Name of the group of files that a file shares a test process with, or its own name."""
    return next((group for group, files in TOGETHER.items() if file in files), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes, and put what takes longest first."""
    for item in items:
        file, folder = item.path.name, item.path.parent
        if not (folder.parent.name == "rl" and folder.name in UNIT_TESTS) and file != "test_architecture.py":
            item.add_marker(pytest.mark.processes)
    first = {group_of(file): rank for rank, file in enumerate(FIRST)}
    items.sort(key=lambda item: first.get(group_of(item.path.name), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A test process takes whole files: what a file opens once is opened once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            group = group_of(Path(file).name)
            return group if group in TOGETHER else file

    return ByFile(config, log)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: pad 0, end 1, mask 2, unknown 3, then the alphabet."""
    words = {word: i for i, word in enumerate((PAD, END, MASK, UNKNOWN, *ALPHABET))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        mask_token=MASK,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def build_policy(
    tokenizer: PreTrainedTokenizerFast,
    *,
    shift: int = 1,
    block_length: int | None = None,
    seed: int = 0,
    scale: float = 0.25,
    end_scale: float = 1.0,
    **config: object,
) -> Policy:
    """A random model of two layers whose predictions depend strongly on the context.

    `end_scale` above 1 spreads the end token's logit, so that it is often the likeliest and completions end early.
    """
    values: dict[str, object] = {
        "vocab_size": HEAD_ROWS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "is_causal": False,
        "use_cache": False,
        "diffusion": {"family": "dream", "shift": shift, "block_length": block_length},
    }
    settings = Qwen2Config(**(values | config))
    settings._attn_implementation = "eager"
    stream = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = Qwen2ForCausalLM(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, scale, generator=stream)
        model.lm_head.weight[tokenizer.eos_token_id] *= end_scale
    family = Family(name="dream", model_type="qwen2", shift=shift, block_length=block_length)
    return Policy(model, tokenizer, family)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Shared: tests must not change it."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_policy(tiny_tokenizer: PreTrainedTokenizerFast) -> MakePolicy:
    """Make a fresh tiny policy: `tiny_policy(shift=0, seed=3)`; other keywords go to the model's configuration."""

    def make(**options: object) -> Policy:
        return build_policy(tiny_tokenizer, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def tiny_folder(tiny_policy: MakePolicy, tmp_path: Path) -> Callable[..., Path]:
    """Make a checkpoint folder of a tiny policy: `tiny_folder(shift=0)`."""

    def make(name: str = "checkpoint", **options: object) -> Path:
        folder = tmp_path / name
        save_policy(tiny_policy(**options), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def load_benchmark() -> Callable[[str], ModuleType]:
    """A script of benchmarks/ as a module: `load_benchmark("variance")`; `"hosts"` is the folder's `__main__.py`."""

    def load(name: str) -> ModuleType:
        path = BENCHMARKS / name
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        spec = importlib.util.spec_from_file_location(f"{name.replace('/', '_')}_benchmark", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclasses look themselves up
        with patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):  # a script may add to it
            spec.loader.exec_module(module)
        return module

    return load
