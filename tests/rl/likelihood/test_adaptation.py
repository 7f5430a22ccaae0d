"""An autoregressive checkpoint becomes a diffusion one, and what it became is opened without being told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.toys import MakePolicy, make_likelihood_recipe
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from coupled.rl.errors import CheckpointError, RecipeError
from coupled.rl.fit import fit
from coupled.rl.model.loading import load_policy
from coupled.rl.model.weights import save_policy
from coupled.rl.recipe.model import Adapter
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import LikelihoodRecipe
from coupled.rl.rollout.engine import roll_out
from coupled.rl.rollout.sampler import Request

WORDS = ("<end>", "<spare>", *"abcdefghijklmnopqrstuvwxyz ")
NEW = len(WORDS)


@pytest.fixture
def autoregressive(tmp_path: Path) -> Path:
    """A checkpoint as a stranger would bring it: causal, of no diffusion family, without a mask or a pad token."""

    def save(name: str, *, rows: int, is_tied: bool) -> Path:
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=" "))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / name)
        config = Qwen2Config(
            vocab_size=rows,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=is_tied,
            eos_token_id=0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Qwen2ForCausalLM(config).save_pretrained(tmp_path / name)
        return tmp_path / name

    save("full", rows=NEW, is_tied=False)
    save("tied", rows=NEW, is_tied=True)
    return save("roomy", rows=NEW + 3, is_tied=False)


def recipe_for(
    tmp_path: Path, base: Path, *, model: dict[str, object] | None = None, **fit: object
) -> LikelihoodRecipe:
    rows = [{"prompt": f"say {c}", "response": c * 3} for c in "abcdefgh"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_likelihood_recipe(
        stage="pretrain",
        num_steps=2,
        output_dir=str(tmp_path / "runs"),
        model={"path": str(base), "family": "qwen2", "mask_token": "<mask>", **(model or {})},
        data={"path": str(tmp_path / "rows.jsonl")},
        optimizer={"learning_rate": 1e-2},
        fit={"batch_size": 4, "canvas": 6, **fit},
    )


def test_it_is_refused_as_it_is(autoregressive: Path) -> None:
    with pytest.raises(CheckpointError, match="is an autoregressive model"):
        load_policy(autoregressive)
    with pytest.raises(CheckpointError, match="a diffusion model needs a mask token"):
        load_policy(autoregressive, family="qwen2")


@pytest.mark.parametrize("name", ["roomy", "full", "tied"])
def test_a_new_mask_token_gets_the_mean_of_the_other_rows_and_changes_no_other(autoregressive: Path, name: str) -> None:
    base = autoregressive.parent / name
    policy = load_policy(base, family="qwen2", mask_token="<mask>")
    assert policy.mask_id == NEW
    assert policy.tokenizer.mask_token == "<mask>"
    assert policy.config.vocab_size == max(NEW + 1, NEW + 3 * (name == "roomy"))
    before = Qwen2ForCausalLM.from_pretrained(base)
    for now, then in (
        (policy.model.get_input_embeddings(), before.get_input_embeddings()),
        (policy.model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert torch.equal(now.weight[:NEW], then.weight[:NEW])
        torch.testing.assert_close(now.weight[NEW], then.weight[:NEW].mean(0))
    again = load_policy(base, family="qwen2", mask_token="<mask>")
    for one, other in zip(policy.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_token_of_the_vocabulary_is_reused_as_it_is(autoregressive: Path) -> None:
    policy = load_policy(autoregressive, family="qwen2", mask_token="<spare>")
    assert policy.mask_id == WORDS.index("<spare>")
    assert policy.config.vocab_size == NEW + 3
    before = Qwen2ForCausalLM.from_pretrained(autoregressive)
    assert torch.equal(policy.model.get_input_embeddings().weight, before.get_input_embeddings().weight)


def test_another_mask_token_than_the_checkpoint_s_is_refused(tiny_policy: MakePolicy, tmp_path: Path) -> None:
    save_policy(tiny_policy(), tmp_path / "base")
    assert load_policy(tmp_path / "base", mask_token="<mask>").mask_id == 2
    with pytest.raises(CheckpointError, match=r"model\.mask_token '<other>' is not in the checkpoint's vocabulary"):
        load_policy(tmp_path / "base", mask_token="<other>")


def test_a_tokenizer_without_an_end_token_is_refused(tiny_policy: MakePolicy, tmp_path: Path) -> None:
    policy = tiny_policy()
    save_policy(policy, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token")
    file.write_text(json.dumps(settings))
    recipe = recipe_for(tmp_path, tmp_path / "base", model={"family": None, "mask_token": None})
    with pytest.raises(CheckpointError, match=r"tokenizer\.eos_token is not set"):
        fit(recipe)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("adapter", [None, Adapter(rank=2, targets=("q_proj",))], ids=["all weights", "LoRA"])
@pytest.mark.parametrize(
    ("objective", "block_length"),
    [("masked_diffusion", None), ("causal_diffusion", 1), ("block_diffusion", 4), ("autoregressive", 1)],
)
def test_what_training_made_of_it_is_opened_without_being_told(
    autoregressive: Path,
    tmp_path: Path,
    objective: str,
    block_length: int | None,
    adapter: Adapter | None,
    shift: int,
) -> None:
    recipe = recipe_for(tmp_path, autoregressive, model={"shift": shift, "adapter": adapter}, objective=objective)
    opened = load_policy(fit(recipe))
    assert (opened.family.name, opened.family.shift, opened.family.block_length) == ("qwen2", shift, block_length)
    assert opened.mask_id == NEW
    assert opened.tokenizer.mask_token == "<mask>"
    assert opened.has_adapter == (adapter is not None)
    requests = [Request(uid="a", prompt_ids=(2, 3, 4))]
    sampler = Sampler(canvas=4, denoising_steps=4, temperature=1.0)
    assert roll_out(opened, requests, sampler, seed=0)[0].num_forwards > 0


def test_the_next_stage_switches_attention_again(autoregressive: Path, tmp_path: Path) -> None:
    """Next-token prediction, then blocks, then everything at once: each stage opens what the one before left."""
    first = fit(recipe_for(tmp_path, autoregressive, objective="autoregressive"))
    model = {"family": None, "mask_token": None}
    second = fit(recipe_for(tmp_path, first, model=model, objective="block_diffusion", block_length=2))
    assert load_policy(second).family.block_length == 2
    with pytest.raises(RecipeError, match=r"needs fit\.objective=masked_diffusion; got 'block_diffusion'"):
        fit(recipe_for(tmp_path, second, model=model, attention_anneal_steps=1))
    third = load_policy(
        fit(recipe_for(tmp_path, second, model=model, objective="masked_diffusion", attention_anneal_steps=1))
    )
    assert third.family.block_length is None
    assert "block_length" not in third.config.diffusion
    assert third.mask_id == NEW
