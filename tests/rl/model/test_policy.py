from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.toys import MakePolicy, global_random_states, make_batch, plain_logits, row_parts
from safetensors.torch import load_file, save_file

from coupled.rl.errors import CheckpointError
from coupled.rl.model.families import FAMILIES, family_of
from coupled.rl.model.loading import add_adapter, load_policy
from coupled.rl.model.policy import Policy
from coupled.rl.model.reference import keep_reference
from coupled.rl.model.weights import load_trainable_state, save_policy, trainable_state
from coupled.rl.types import TrainBatch

MakeFolder = Callable[..., Path]
# peft asks transformers for a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = ("q_proj", "v_proj", "down_proj")


def canvas_rows(batch: TrainBatch) -> torch.Tensor:
    rows = torch.zeros_like(batch.ids, dtype=torch.bool)
    rows[:, -batch.canvas_length :] = True
    return rows


def canvas_logits(policy: Policy, batch: TrainBatch) -> torch.Tensor:
    """[B, C, V]."""
    logits = policy.logits_at(batch.ids, batch.pad_lengths, canvas_rows(batch))
    return logits.reshape(len(batch), batch.canvas_length, -1).detach()


@pytest.mark.parametrize("shift", [0, 1])
@torch.no_grad()
def test_every_position_sees_the_last_token_with_and_without_padding(tiny_policy: MakePolicy, shift: int) -> None:
    policy, batch = tiny_policy(shift=shift), make_batch([3, 8], [6, 6])
    changed = batch.ids.clone()
    changed[:, -1] = 4 + (changed[:, -1] - 3) % 30
    assert (changed[:, -1] != batch.ids[:, -1]).all()
    rows = canvas_rows(batch)
    rows[:, -1] = False
    difference = policy.logits_at(changed, batch.pad_lengths, rows) - policy.logits_at(
        batch.ids, batch.pad_lengths, rows
    )
    assert (difference.abs().amax(-1) > 1e-4).all(), "causal attention would leave earlier positions as they were"


@torch.no_grad()
def test_padding_is_never_attended(tiny_policy: MakePolicy) -> None:
    policy, batch = tiny_policy(), make_batch([2, 7, 4], [6, 6, 6])
    before = canvas_logits(policy, batch)
    is_padding = torch.arange(batch.ids.shape[1])[None] < batch.pad_lengths[:, None]
    assert int(is_padding.sum()) == 8
    for token in (0, 1, 30):
        ids = batch.ids.masked_fill(is_padding, token)
        after = policy.logits_at(ids, batch.pad_lengths, canvas_rows(batch)).reshape(before.shape)
        assert torch.equal(after, before)


@pytest.mark.parametrize("shift", [0, 1])
@torch.no_grad()
def test_logits_are_those_of_the_unpadded_row_at_the_token_itself(tiny_policy: MakePolicy, shift: int) -> None:
    """Covers the shift, padding, and that positions count from the first real token."""
    policy, batch = tiny_policy(shift=shift), make_batch([3, 8, 1], [6, 6, 6])
    rows = canvas_rows(batch) & (torch.arange(batch.ids.shape[1]) % 3 != 1)[None]
    logits = policy.without_mask_token(policy.logits_at(batch.ids, batch.pad_lengths, rows))
    expected = []
    for i in range(3):
        prompt, canvas = row_parts(batch, i)
        wanted = rows[i, int(batch.pad_lengths[i]) :]
        expected.append(plain_logits(policy, prompt + canvas)[wanted])
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_count_from_the_first_real_token(tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions are relative, so the logits cannot tell; those of a long padded batch could exceed the limit."""
    policy, batch = tiny_policy(), make_batch([3, 1], [2, 2], canvas=2)
    seen: list[list[list[int]]] = []
    body = policy.model.model.forward

    def spy(**arguments: torch.Tensor) -> object:
        seen.append(arguments["position_ids"].tolist())
        return body(**arguments)

    monkeypatch.setattr(policy.model.model, "forward", spy)
    canvas_logits(policy, batch)
    assert seen == [[[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]]


@torch.no_grad()
def test_the_order_of_the_prompt_matters(tiny_policy: MakePolicy) -> None:
    policy, batch = tiny_policy(), make_batch([3], [6])
    turned = torch.cat((batch.ids[:, :3].flip(1), batch.ids[:, 3:]), dim=1)
    after = policy.logits_at(turned, batch.pad_lengths, canvas_rows(batch)).reshape(1, 6, -1)
    assert not torch.allclose(after, canvas_logits(policy, batch), atol=1e-2)


@torch.no_grad()
def test_causal_attention_is_used_where_it_is_asked_for(tiny_policy: MakePolicy) -> None:
    policy, batch = tiny_policy(), make_batch([3, 5], [6, 6])
    policy.attend(1)
    before = canvas_logits(policy, batch)
    ids = batch.ids.clone()
    ids[:, -1] = 5
    rows = canvas_rows(batch)
    after = policy.logits_at(ids, batch.pad_lengths, rows).reshape(before.shape)
    # With shift 1 the logits at a position come from the one before it, so none here has seen the last token.
    assert torch.equal(after, before)


# --- loading refuses ----------------------------------------------------------------------------------------------


def rewrite_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_a_tokenizer_bigger_than_the_model_is_refused(tiny_policy: MakePolicy) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer has 42 tokens .* embeds only 40"):
        tiny_policy(vocab_size=40)


def test_a_checkpoint_without_a_mask_token_is_refused(tiny_folder: MakeFolder) -> None:
    folder = tiny_folder()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_policy(folder).mask_id == 2, "the configuration names it too"
    rewrite_config(folder, mask_token_id=None)
    with pytest.raises(CheckpointError, match="needs a mask token"):
        load_policy(folder)


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "none", "a/b/c"])
def test_a_path_that_is_neither_a_folder_nor_a_hub_name_is_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint folder or a hub name.*" + path.replace(".", r"\.")):
        load_policy(path)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_policy(tmp_path)


def test_an_unknown_or_unstated_family_is_refused_with_the_known_ones(tiny_folder: MakeFolder) -> None:
    folder = tiny_folder()
    with pytest.raises(CheckpointError, match="unknown model family 'lamda'; did you mean 'llama'"):
        load_policy(folder, family="lamda")
    rewrite_config(folder, diffusion=None)
    with pytest.raises(CheckpointError, match=r"does not say which diffusion family.*'qwen2'.*model\.family"):
        load_policy(folder)
    assert load_policy(folder, family="dream").family == FAMILIES["dream"]


def test_weights_that_do_not_fill_the_model_are_refused(tiny_folder: MakeFolder) -> None:
    folder = tiny_folder()
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        load_policy(folder)
    weights |= {"model.layers.1.mlp.up_proj.weight": lost, "model.extra": lost.clone()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected \['model\.extra'\]"):
        load_policy(folder)


def test_weights_of_another_shape_are_refused(tiny_folder: MakeFolder) -> None:
    folder = tiny_folder()
    rewrite_config(folder, intermediate_size=72)
    with pytest.raises(CheckpointError, match="mlp"):
        load_policy(folder)


def test_a_folder_without_weights_is_refused(tiny_folder: MakeFolder) -> None:
    folder = tiny_folder()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="checkpoint"):
        load_policy(folder)


def test_a_folder_with_cut_off_weights_is_refused(tiny_folder: MakeFolder) -> None:
    folder = tiny_folder()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="checkpoint"):
        load_policy(folder)


def test_a_folder_whose_configuration_is_not_json_is_refused(tiny_folder: MakeFolder) -> None:
    folder = tiny_folder()
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_policy(folder)


def test_adapter_targets_that_the_model_lacks_are_refused(tiny_policy: MakePolicy) -> None:
    with pytest.raises(CheckpointError, match="query_key_value"):
        add_adapter(tiny_policy(), rank=2, alpha=4.0, targets=("query_key_value",), seed=0)


# --- families -----------------------------------------------------------------------------------------------------


def test_the_family_comes_from_the_recipe_then_the_checkpoint_then_the_model_type() -> None:
    assert family_of({"model_type": "Dream"}).name == "dream"
    assert family_of({"model_type": "Dream"}).shift == 1
    assert family_of({"model_type": "qwen2", "diffusion": {"family": "dream", "shift": 0}}).shift == 0
    assert family_of({"diffusion": {"family": "dream", "shift": 0}}, shift=1).shift == 1
    assert family_of({"model_type": "qwen2"}, name="dream").model_type == "qwen2"


@pytest.mark.parametrize("shift", [0, 1])
def test_a_saved_checkpoint_remembers_its_shift(tiny_folder: MakeFolder, shift: int) -> None:
    assert load_policy(tiny_folder(shift=shift)).family.shift == shift


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_saving_and_loading_a_model_changes_nothing(tiny_policy: MakePolicy, tmp_path: Path, tied: bool) -> None:
    policy, batch = tiny_policy(tie_word_embeddings=tied), make_batch()
    save_policy(policy, tmp_path / "saved")
    loaded = load_policy(tmp_path / "saved")
    assert torch.equal(canvas_logits(loaded, batch), canvas_logits(policy, batch))
    before, after = trainable_state(policy), trainable_state(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (loaded.mask_id, loaded.pad_id, loaded.end_ids) == (2, 0, (0, 1))
    assert loaded.tokenizer("ab c")["input_ids"] == policy.tokenizer("ab c")["input_ids"]


def test_weights_from_scratch_are_a_function_of_the_seed_and_touch_no_generator(tiny_folder: MakeFolder) -> None:
    folder = tiny_folder()
    (folder / "model.safetensors").unlink()
    before = global_random_states()
    one, same, other = (trainable_state(load_policy(folder, from_scratch_seed=seed)) for seed in (1, 1, 2))
    assert global_random_states() == before
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_state_of_another_model_is_refused(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    state = trainable_state(policy)
    with pytest.raises(CheckpointError, match=r"model\.adapter the same"):
        load_trainable_state(policy, {k: v for k, v in state.items() if "lm_head" not in k})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(48, 32\) here and \(47, 32\)"):
        load_trainable_state(policy, state | {"lm_head.weight": torch.zeros(47, 32)})


def test_loading_a_state_puts_it_into_the_same_parameters(tiny_policy: MakePolicy) -> None:
    policy, other, batch = tiny_policy(seed=0), tiny_policy(seed=1), make_batch()
    parameters = policy.trainable_parameters()
    load_trainable_state(policy, trainable_state(other))
    assert torch.equal(canvas_logits(policy, batch), canvas_logits(other, batch))
    assert all(a is b for a, b in zip(parameters, policy.trainable_parameters(), strict=True))


# --- adapters and the reference -----------------------------------------------------------------------------------


def perturb(policy: Policy) -> None:
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.1)


def with_adapter(policy: Policy, seed: int = 0) -> Policy:
    return add_adapter(policy, rank=4, alpha=8.0, targets=TARGETS, seed=seed)


def test_a_fresh_adapter_equals_its_base_exactly_and_is_all_that_trains(tiny_policy: MakePolicy) -> None:
    base, batch = tiny_policy(), make_batch()
    before = global_random_states()
    adapted = with_adapter(tiny_policy())
    assert global_random_states() == before
    assert adapted.has_adapter
    assert not base.has_adapter
    assert torch.equal(canvas_logits(adapted, batch), canvas_logits(base, batch))
    names = set(trainable_state(adapted))
    assert len(names) == 2 * len(TARGETS) * 2, "A and B of three layers in each of two blocks"
    assert all("lora_" in name for name in names)


def test_adapters_are_a_function_of_the_seed(tiny_policy: MakePolicy) -> None:
    one, same, other = (trainable_state(with_adapter(tiny_policy(), seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_reference_of_an_adapted_policy_is_its_base_however_the_adapter_moves(tiny_policy: MakePolicy) -> None:
    base, policy, batch = tiny_policy(), with_adapter(tiny_policy()), make_batch()
    kept = keep_reference(policy, "adapter_off")
    perturb(policy)
    moved = canvas_logits(policy, batch)
    assert not torch.allclose(moved, canvas_logits(base, batch), atol=1e-2)
    with kept.policy() as reference:
        assert torch.equal(canvas_logits(reference, batch), canvas_logits(base, batch))
    assert torch.equal(canvas_logits(policy, batch), moved)


def test_the_reference_of_full_fine_tuning_is_the_frozen_copy_when_the_weights_move(tiny_policy: MakePolicy) -> None:
    policy, batch = tiny_policy(), make_batch()
    before = canvas_logits(policy, batch)
    kept = keep_reference(policy, "frozen")
    perturb(policy)
    moved = canvas_logits(policy, batch)
    assert not torch.allclose(moved, before, atol=1e-2)
    with kept.policy() as reference:
        assert torch.equal(canvas_logits(reference, batch), before)
        assert reference.trainable_parameters() == [], "a reference that trains would follow the policy"
    assert torch.equal(canvas_logits(policy, batch), moved)
    with pytest.raises(KeyError), kept.policy():
        raise KeyError
    assert torch.equal(canvas_logits(policy, batch), moved), "the live weights are back after an error, too"


def test_asking_for_a_reference_that_was_never_frozen_is_our_own_mistake(tiny_policy: MakePolicy) -> None:
    with pytest.raises(RuntimeError, match="keep_reference"), keep_reference(tiny_policy(), "none").policy():
        pass


def test_saving_and_loading_an_adapter_changes_nothing(tiny_folder: MakeFolder, tmp_path: Path) -> None:
    batch = make_batch()
    policy = with_adapter(load_policy(tiny_folder(shift=0)))
    perturb(policy)
    save_policy(policy, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists(), "an adapter folder holds no base weights"
    loaded = load_policy(tmp_path / "adapter")
    assert loaded.has_adapter
    assert loaded.family.shift == 0
    assert torch.equal(canvas_logits(loaded, batch), canvas_logits(policy, batch))
    assert trainable_state(loaded).keys() == trainable_state(policy).keys()
    kept, again = (keep_reference(each, "adapter_off") for each in (policy, loaded))
    with again.policy() as reference, kept.policy() as expected:
        assert torch.equal(canvas_logits(reference, batch), canvas_logits(expected, batch))


def test_an_adapter_finds_its_base_from_any_working_folder(
    tiny_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_folder("base")
    monkeypatch.chdir(tmp_path)
    policy = with_adapter(load_policy("./base"))
    save_policy(policy, tmp_path / "adapter")
    monkeypatch.chdir("/")
    assert load_policy(tmp_path / "adapter").has_adapter


# --- precision ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bfloat16_runs_the_body_in_bfloat16_and_gives_fp32_log_probabilities(
    tiny_policy: MakePolicy, tiny_folder: MakeFolder
) -> None:
    exact, rough, batch = tiny_policy(), load_policy(tiny_folder(), compute_dtype=torch.bfloat16), make_batch()
    rows = canvas_rows(batch)
    one, other = (p.logp_at(batch.ids, batch.pad_lengths, rows, batch.ids) for p in (exact, rough))
    assert other.dtype == torch.float32
    assert not torch.equal(one, other)
    finite = torch.isfinite(one)
    torch.testing.assert_close(one[finite], other[finite], atol=0.3, rtol=0.1)


# --- a checkpoint of Dream, computed by its own code ---------------------------------------------------------------


def test_a_dream_checkpoint_is_recognised_without_being_told(dream: Policy) -> None:
    assert dream.family == FAMILIES["dream"]
    assert (dream.mask_id, dream.pad_id, dream.end_ids) == (500, 501, (501,))


@torch.no_grad()
def test_dream_logits_are_those_of_its_published_code(dream: Policy, dream_tensors: dict[str, torch.Tensor]) -> None:
    """The file holds the raw rows of the head, so a row at i predicts token i + 1."""
    ids, expected = dream_tensors["input_ids"], dream_tensors["logits_bidir"]
    rows = torch.ones_like(ids, dtype=torch.bool)
    rows[:, 0] = False
    logits = dream.logits_at(ids, torch.zeros(len(ids), dtype=torch.int64), rows)
    torch.testing.assert_close(logits, expected[:, :-1].reshape(-1, 512), atol=1e-5, rtol=0)


@torch.no_grad()
def test_left_padded_dream_logits_are_those_of_its_published_code(
    dream: Policy, dream_tensors: dict[str, torch.Tensor]
) -> None:
    ids, is_real = dream_tensors["input_ids"], dream_tensors["pad_mask"].bool()
    pad_lengths = (~is_real).sum(-1)
    assert pad_lengths.max() > 0
    rows = is_real & (torch.arange(ids.shape[1])[None] > pad_lengths[:, None])
    logits = dream.logits_at(ids, pad_lengths, rows)
    expected = torch.cat([dream_tensors["logits_leftpad"][i, int(n) : -1] for i, n in enumerate(pad_lengths)])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
