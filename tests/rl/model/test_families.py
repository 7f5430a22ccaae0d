"""Published checkpoints, opened as they are: recognised, translated, complete, and computing what their code does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden import FAMILIES as PUBLISHED
from helpers.golden import GOLDEN, golden_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from coupled.rl.errors import CheckpointError
from coupled.rl.model.attention import Layout, left_padded, may_attend
from coupled.rl.model.families import FAMILIES, family_of
from coupled.rl.model.loading import add_adapter, load_policy, merge_adapter, verify_buffers
from coupled.rl.model.policy import Policy
from coupled.rl.model.reference import keep_reference
from coupled.rl.model.special_tokens import find_end_ids, find_mask_id
from coupled.rl.model.vocabulary import project
from coupled.rl.model.weights import save_policy

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CONFIGS = GOLDEN.parent / "checkpoint_configs"
BLOCKS = {"llada2": 32, "sdar": 4, "sdar_moe": 4, "stable_diffcoder": 4}
Open = Callable[..., Policy]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Open a golden checkpoint: `opened("sdar", block_length=0)`."""

    def open_golden(name: str, **options: Any) -> Policy:
        return load_policy(golden_folder(name, tmp_path / name), **options)

    return open_golden


def tensors_of(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "io.safetensors")


def raw_logits(policy: Policy, ids: Tensor, layout: Layout) -> Tensor:
    """The head's rows [B, S, V] at every position, as the files hold them: not moved by the family's shift."""
    with torch.no_grad():
        allowed = may_attend(layout, layout, block_length=policy.family.block_length)
        hidden = policy.hidden_after(ids, layout.position, allowed)
        return project(policy.head, hidden.flatten(0, 1)).unflatten(0, tuple(ids.shape))


def at_rest(ids: Tensor) -> Layout:
    return left_padded(torch.zeros(len(ids), dtype=torch.int64), ids.shape[1])


# --- logits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_bidirectional_logits_are_those_of_the_published_code(opened: Open, name: str) -> None:
    policy, tensors = opened(name, block_length=0), tensors_of(name)
    logits = raw_logits(policy, tensors["input_ids"], at_rest(tensors["input_ids"]))
    torch.testing.assert_close(logits, tensors["logits_bidir"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in PUBLISHED if not n.startswith("llada") or n == "llada2"])
def test_block_attention_logits_are_those_of_the_published_code(opened: Open, name: str) -> None:
    """Dream's, too, although it was not trained with blocks: the file has them."""
    policy, tensors = opened(name, block_length=4, shift=0), tensors_of(name)
    logits = raw_logits(policy, tensors["input_ids"], at_rest(tensors["input_ids"]))
    torch.testing.assert_close(logits, tensors["logits_blockcausal4"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_padded_logits_are_those_of_the_published_code(opened: Open, name: str) -> None:
    policy, tensors = opened(name, block_length=0), tensors_of(name)
    is_real = tensors["pad_mask"].bool()
    layout = left_padded((~is_real).sum(-1), is_real.shape[1])
    assert torch.equal(layout.is_real, is_real)
    assert torch.equal(layout.position, tensors["pad_position_ids"])
    expected = tensors.get("logits_leftpad", tensors.get("logits_leftpad_nopos"))
    logits = raw_logits(policy, tensors["input_ids"], layout)
    torch.testing.assert_close(logits[is_real], expected[is_real], atol=1e-5, rtol=0)


def test_causal_logits_are_those_of_the_published_code(opened: Open) -> None:
    policy, tensors = opened("stable_diffcoder", block_length=1), tensors_of("stable_diffcoder")
    logits = raw_logits(policy, tensors["input_ids"], at_rest(tensors["input_ids"]))
    torch.testing.assert_close(logits, tensors["logits_causal_default"], atol=1e-5, rtol=0)


# --- recognition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_is_recognised_without_being_told(opened: Open, name: str) -> None:
    policy = opened(name)
    assert policy.family == FAMILIES[name]
    assert policy.family.block_length == BLOCKS.get(name)
    assert policy.family.shift == (1 if name == "dream" else 0)
    assert policy.mask_id == (5 if name == "stable_diffcoder" else 500)
    assert not hasattr(policy.config, "auto_map")


@pytest.mark.parametrize(
    ("folder", "family", "block_length", "layers", "vocabulary"),
    [
        ("dream-7b", "dream", None, 28, 152064),
        ("llada-8b", "llada", None, 32, 126464),
        ("llada2.0-mini", "llada2", 32, 20, 157184),
        ("sdar-4b", "sdar", 4, 36, 151936),
    ],
)
def test_the_configuration_of_a_real_checkpoint_is_understood(
    folder: str, family: str, block_length: int | None, layers: int, vocabulary: int
) -> None:
    if not (CONFIGS / folder).is_dir():
        pytest.skip(f"no configurations at {CONFIGS}")
    config = json.loads((CONFIGS / folder / "config.json").read_text())
    found = family_of(config)
    assert (found.name, found.block_length) == (family, block_length)
    settings = found.translate(config)
    assert (settings["num_hidden_layers"], settings["vocab_size"]) == (layers, vocabulary)
    assert settings["hidden_size"] == {"dream": 3584, "llada": 4096, "llada2": 2048, "sdar": 2560}[family]


@pytest.mark.parametrize(
    ("tokens", "config", "family", "mask_id", "end_ids"),
    [
        ("dream-7b", "dream-7b", "dream", 151666, (151643, 151645)),
        ("llada-8b", "llada-8b", "llada", 126336, (126081, 126348)),
        ("stable-diffcoder-8b", None, "stable_diffcoder", 5, (1, 2)),
    ],
)
def test_mask_and_end_tokens_of_a_real_tokenizer_are_found(
    tokens: str, config: str | None, family: str, mask_id: int, end_ids: tuple[int, ...]
) -> None:
    """LLaDA's tokenizer does not say which token is MASK, and Stable-DiffCoder's comes without settings here."""
    from transformers import PreTrainedTokenizerFast

    file = GOLDEN.parent / "tokenizers" / tokens / "tokenizer.json"
    if not file.is_file():
        pytest.skip(f"no tokenizer at {file}")
    special = {"eos_token": "<[end▁of▁sentence]>", "pad_token": "<[PAD▁TOKEN]>"}
    if config is not None:
        stated = json.loads((CONFIGS / config / "special_tokens_map.json").read_text())
        special = {k: v["content"] for k, v in stated.items() if k in ("eos_token", "pad_token", "mask_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
    assert find_mask_id(tokenizer, object(), FAMILIES[family]) == mask_id
    assert find_end_ids(tokenizer, object(), FAMILIES[family]) == end_ids
    assert tokenizer.decode([mask_id]) in (FAMILIES[family].mask_token, tokenizer.mask_token)


def test_a_tokenizer_without_a_mask_token_takes_the_configuration_s(tmp_path: Path) -> None:
    policy = load_policy(golden_folder("llada", tmp_path / "llada", has_mask_token=False))
    assert policy.tokenizer.mask_token is None
    assert policy.mask_id == 500


def test_what_the_recipe_says_wins(opened: Open) -> None:
    assert opened("sdar", block_length=8).family.block_length == 8
    assert opened("dream", shift=0).family.shift == 0
    assert opened("dream", mask_token="w7").mask_id == 7
    assert opened("dream", end_tokens=("w3", "w9")).end_ids == (3, 9)
    with pytest.raises(CheckpointError, match="'nope' is not one"):
        opened("dream", end_tokens=("nope",))
    with pytest.raises(CheckpointError, match=r"'<new>' is not in the checkpoint's vocabulary"):
        opened("dream", mask_token="<new>")


def test_what_cannot_be_opened_says_what_can() -> None:
    with pytest.raises(CheckpointError) as plain:
        family_of({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    assert "an autoregressive model" in str(plain.value)
    assert "model.family=qwen2 and model.mask_token" in str(plain.value)
    with pytest.raises(CheckpointError) as unknown:
        family_of({"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"]})
    assert "model_type 'gpt_neo', architectures: GPTNeoForCausalLM" in str(unknown.value)
    for error in (plain, unknown):
        assert all(family.name in str(error.value) for family in FAMILIES.values())
        assert "docs/families.md" in str(error.value)
    with pytest.raises(CheckpointError, match=r"'drem'; did you mean 'dream'"):
        family_of({}, name="drem")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("llada", "alibi", True), ("llada", "include_qkv_bias", True), ("llada2", "norm_head", True)],
)
def test_a_setting_that_the_class_does_not_have_is_refused(name: str, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{key} = .*this one has {value!r}"):
        FAMILIES[name].translate({key: value})


# --- completeness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_saved_and_opened_again_it_is_the_same(opened: Open, tmp_path: Path, name: str) -> None:
    policy, tensors = opened(name), tensors_of(name)
    save_policy(policy, tmp_path / "saved")
    again = load_policy(tmp_path / "saved")
    assert (again.family, again.mask_id, again.end_ids) == (policy.family, policy.mask_id, policy.end_ids)
    before, after = policy.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    layout = at_rest(tensors["input_ids"])
    assert torch.equal(
        raw_logits(again, tensors["input_ids"], layout), raw_logits(policy, tensors["input_ids"], layout)
    )


def sharded(name: str, into: Path) -> Path:
    """The same checkpoint in three files, as large ones are published."""
    folder = golden_folder(name, into)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {key: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, key in enumerate(sorted(weights))}
    for file in set(where.values()):
        save_file({k: v for k, v in weights.items() if where[k] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["dream", "llada", "llada2", "sdar_moe"])
def test_a_checkpoint_in_several_files_is_the_same(opened: Open, tmp_path: Path, name: str) -> None:
    whole, parts = opened(name), load_policy(sharded(name, tmp_path / "parts"))
    before, after = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    (tmp_path / "parts" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 weight files, model-00002"):
        load_policy(tmp_path / "parts")


def rewritten(name: str, into: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    folder = golden_folder(name, into)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "lost", "called"),
    [
        ("llada", "model.transformer.blocks.1.ff_out.weight", "model.layers.1.mlp.down_proj.weight"),
        ("llada2", "model.layers.0.attention.query_key_value.weight", "model.layers.0.self_attn.k_proj.weight"),
        ("sdar_moe", "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_a_lost_weight_is_missed(tmp_path: Path, name: str, lost: str, called: str) -> None:
    folder = rewritten(name, tmp_path / name, lambda weights: weights.pop(lost))
    with pytest.raises(CheckpointError, match=rf"missing \['{called}"):
        load_policy(folder)


def test_a_weight_that_nobody_wants_is_noticed(tmp_path: Path) -> None:
    folder = rewritten("llada", tmp_path / "a", lambda w: w.update({"model.transformer.wpe.weight": torch.ones(4, 4)}))
    with pytest.raises(CheckpointError, match=r"unexpected \['model\.transformer\.wpe"):
        load_policy(folder)


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    def double(weights: dict[str, Tensor]) -> None:
        weights["model.norm.weight"] = torch.ones(64)

    with pytest.raises(CheckpointError, match=r"are both model\.norm\.weight"):
        load_policy(rewritten("llada", tmp_path / "a", double))


def test_uninitialised_rotary_frequencies_are_noticed(opened: Open) -> None:
    policy = opened("dream")
    verify_buffers(policy.model)
    policy.model.model.rotary_emb.inv_freq.mul_(1.01)
    with pytest.raises(CheckpointError, match=r"rotary_emb\.inv_freq is not what the configuration gives"):
        verify_buffers(policy.model)


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_adapters_train_merge_and_open_again(opened: Open, tmp_path: Path, name: str) -> None:
    policy, tensors = opened(name), tensors_of(name)
    ids, layout = tensors["input_ids"], at_rest(tensors["input_ids"])
    base = raw_logits(policy, ids, layout)
    policy = add_adapter(policy, rank=2, alpha=4.0, targets=("q_proj", "v_proj"), seed=0)
    kept = keep_reference(policy, "adapter_off")
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.3)
    moved = raw_logits(policy, ids, layout)
    assert not torch.allclose(moved, base, atol=1e-2)
    with kept.policy() as reference:
        assert torch.equal(raw_logits(reference, ids, layout), base)
    save_policy(policy, tmp_path / "adapter")
    again = load_policy(tmp_path / "adapter")
    assert again.family == policy.family
    assert torch.equal(raw_logits(again, ids, layout), moved)
    again = merge_adapter(again)
    assert not again.has_adapter
    save_policy(again, tmp_path / "merged")
    merged = load_policy(tmp_path / "merged")
    assert merged.family == policy.family
    torch.testing.assert_close(raw_logits(merged, ids, layout), moved, atol=1e-4, rtol=0)


# --- autoregressive checkpoints -----------------------------------------------------------------------------------


def autoregressive(name: str, into: Path) -> Path:
    """A golden checkpoint whose configuration says nothing of diffusion."""
    folder = golden_folder(name, into, has_mask_token=False)
    config = json.loads((folder / "config.json").read_text())
    model_type = {"dream": "qwen2", "sdar": "qwen3", "stable_diffcoder": "llama"}[name]
    for key in ("auto_map", "mask_token_id", "block_size"):
        config.pop(key, None)
    (folder / "config.json").unlink()
    config |= {"model_type": model_type, "architectures": [f"{model_type.capitalize()}ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["dream", "sdar", "stable_diffcoder"])
def test_an_autoregressive_checkpoint_opens_only_when_asked_and_then_looks_both_ways(tmp_path: Path, name: str) -> None:
    folder, tensors = autoregressive(name, tmp_path / name), tensors_of(name)
    with pytest.raises(CheckpointError, match="is an autoregressive model"):
        load_policy(folder)
    family = json.loads((folder / "config.json").read_text())["model_type"]
    with pytest.raises(CheckpointError, match=r"set model\.mask_token"):
        load_policy(folder, family=family)
    policy = load_policy(folder, family=family, mask_token="w9")
    assert (policy.mask_id, policy.family.shift, policy.family.block_length) == (9, 1, None)
    ids = tensors["input_ids"]
    torch.testing.assert_close(raw_logits(policy, ids, at_rest(ids)), tensors["logits_bidir"], atol=1e-5, rtol=0)
    blocks = load_policy(folder, family=family, mask_token="w9", block_length=4)
    assert (blocks.family.shift, blocks.family.block_length) == (0, 4)
    torch.testing.assert_close(raw_logits(blocks, ids, at_rest(ids)), tensors["logits_blockcausal4"], atol=1e-5, rtol=0)


def test_a_new_mask_token_gets_a_row_of_its_own_and_is_remembered(tmp_path: Path) -> None:
    folder = autoregressive("dream", tmp_path / "qwen")
    state = torch.get_rng_state()
    policy = load_policy(folder, family="qwen2", mask_token="<|mask|>")
    assert torch.equal(torch.get_rng_state(), state)
    assert (policy.mask_id, policy.config.vocab_size) == (512, 513)
    table = policy.model.get_input_embeddings().weight
    torch.testing.assert_close(table[512], table[:512].mean(0))
    save_policy(policy, tmp_path / "saved")
    again = load_policy(tmp_path / "saved")
    assert (again.mask_id, again.family.name) == (512, "qwen2")
    ids = torch.tensor([[5, 6, 512, 7]])
    assert torch.equal(raw_logits(again, ids, at_rest(ids)), raw_logits(policy, ids, at_rest(ids)))
    policy = add_adapter(policy, rank=2, alpha=4.0, targets=("q_proj",), seed=0)
    save_policy(policy, tmp_path / "adapter")
    adapted = load_policy(tmp_path / "adapter")
    assert (adapted.mask_id, adapted.family) == (512, policy.family)
    assert torch.equal(raw_logits(adapted, ids, at_rest(ids)), raw_logits(policy, ids, at_rest(ids)))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 50_000, "no embeddings in it"


# --- remote code --------------------------------------------------------------------------------------------------


REMOTE = """
from transformers import Qwen2Config, Qwen2ForCausalLM


class OddConfig(Qwen2Config):
    model_type = "odd"


class OddModel(Qwen2ForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        open({mark!r}, "w").write("ran")
"""


@pytest.mark.filterwarnings("ignore")
def test_code_of_a_checkpoint_runs_only_when_trusted_and_says_what_that_costs(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    mark = tmp_path / "ran"
    expected = opened("dream")
    folder = golden_folder("dream", tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    code = {"AutoConfig": "odd_model.OddConfig", "AutoModelForCausalLM": "odd_model.OddModel"}
    config |= {"model_type": "odd", "architectures": ["OddModel"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd_model.py").write_text(REMOTE.format(mark=str(mark)))
    native = load_policy(folder, family="dream")
    assert not mark.exists()
    assert "trust_remote_code" not in capsys.readouterr().err
    policy = load_policy(folder, family="dream", trust_remote_code=True)
    assert mark.exists()
    assert "The code may do anything that you may do" in capsys.readouterr().err
    assert type(policy.model).__name__ == "OddModel"
    ids = tensors_of("dream")["input_ids"]
    logits = raw_logits(expected, ids, at_rest(ids))
    for other in (native, policy):
        torch.testing.assert_close(raw_logits(other, ids, at_rest(ids)), logits, atol=1e-5, rtol=0)
    (folder / "odd_model.py").write_text("raise RuntimeError('of another version')")
    with pytest.raises(CheckpointError, match=r"cannot be used: .*of another version"):
        load_policy(folder, family="dream", trust_remote_code=True)
