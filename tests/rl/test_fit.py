from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toys import MakePolicy, make_recipe, plain_logits

from coupled.rl.errors import DataError
from coupled.rl.fit import RESPONSE, Example, collate_examples, fit, fit_loss, load_examples
from coupled.rl.policy import Policy
from coupled.rl.recipe import Recipe
from coupled.rl.rundir import RunDir, read_rows

EXAMPLES = [
    Example(prompt_ids=(4, 5, 6), response_ids=(7, 8, 1)),
    Example(prompt_ids=(9,), response_ids=(10, 11, 12, 13, 1)),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_examples_are_padded_on_the_left_and_filled_on_the_right(tiny_policy: MakePolicy) -> None:
    batch = collate_examples(EXAMPLES, tiny_policy(), 6, "masked_diffusion")
    assert batch.ids.tolist() == [[4, 5, 6, 7, 8, 1, 0, 0, 0], [0, 0, 9, 10, 11, 12, 13, 1, 0]]
    assert batch.pad_lengths.tolist() == [0, 2]
    assert batch.is_response.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    shorter = collate_examples(EXAMPLES, tiny_policy(), 6, "autoregressive")
    assert shorter.ids.shape == (2, 8)
    assert shorter.is_response.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def next_token_loss(policy: Policy) -> torch.Tensor:
    """Mean over response tokens of -log p(token | everything before it), one unpadded row at a time."""
    terms = []
    for example in EXAMPLES:
        ids = [*example.prompt_ids, *example.response_ids]
        size = len(ids)
        mask = torch.full((size, size), -1e9).triu(1)[None, None]
        out = policy.model(
            input_ids=torch.tensor([ids]), attention_mask=mask, position_ids=torch.arange(size)[None], use_cache=False
        )
        logits = out.logits[0].clone()
        logits[:, [2, *range(42, 48)]] = -torch.inf
        logp = logits.log_softmax(-1)
        terms += [-logp[k - 1, ids[k]] for k in range(len(example.prompt_ids), size)]
    return torch.stack(terms).mean()


def test_the_autoregressive_objective_is_next_token_prediction(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    recipe = make_recipe(stage="pretrain", fit={"objective": "autoregressive"})
    batch = collate_examples(EXAMPLES, policy, 6, "autoregressive")
    loss = fit_loss(policy, batch, recipe, 0)
    torch.testing.assert_close(loss, next_token_loss(policy), atol=1e-5, rtol=1e-5)
    assert not policy.is_causal, "the policy looks both ways again"


def test_the_diffusion_objective_is_the_weighted_loss_of_the_masked_positions(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of canvas 6 with masks given by hand: -Σ_rows 1/t Σ_masked log p / 12. Fill positions count, too."""
    policy = tiny_policy()
    masks = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1]]).bool()
    monkeypatch.setattr("coupled.rl.fit.bernoulli_mask", lambda *_: masks)
    monkeypatch.setattr("coupled.rl.fit.stratified_ratios", lambda *_: torch.tensor([0.5, 0.25]))
    loss = fit_loss(policy, collate_examples(EXAMPLES, policy, 6, "masked_diffusion"), make_recipe(stage="sft"), 0)
    total = torch.tensor(0.0)
    for example, mask, t in zip(EXAMPLES, masks, (0.5, 0.25), strict=True):
        canvas = [*example.response_ids, *[0] * (6 - len(example.response_ids))]
        noisy = [2 if m else token for m, token in zip(mask, canvas, strict=True)]
        logp = plain_logits(policy, [*example.prompt_ids, *noisy]).log_softmax(-1)[-6:]
        total = total - sum(logp[k, canvas[k]] for k in range(6) if mask[k]) / t
    torch.testing.assert_close(loss, total / 12, atol=1e-5, rtol=1e-5)


def test_noise_differs_between_steps_and_is_the_same_for_a_step(tiny_policy: MakePolicy) -> None:
    policy, recipe = tiny_policy(), make_recipe(stage="sft")
    batch = collate_examples(EXAMPLES, policy, 6, "masked_diffusion")
    losses = [float(fit_loss(policy, batch, recipe, step).detach()) for step in (0, 1, 2, 0)]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3


# --- a whole run --------------------------------------------------------------------------------------------------


def sft_recipe(tmp_path: Path, policy: Policy, **fields: object) -> Recipe:
    if not (tmp_path / "base").exists():
        policy.save(tmp_path / "base")
        rows = [{"prompt": f"write {c}", "solution": f"{c * 3} {i}"} for i, c in enumerate("abcdefgh")]
        (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_recipe(
        stage="sft",
        num_steps=4,
        output_dir=str(tmp_path / "runs"),
        model={"path": str(tmp_path / "base")},
        data={"path": str(tmp_path / "tasks.jsonl")},
        optimizer={"learning_rate": 1e-2, "max_grad_norm": 1.0},
        fit={"batch_size": 4, "canvas": 24},
        **fields,
    )


def test_examples_hold_the_prompt_the_fenced_solution_and_an_end_token(tiny_policy: MakePolicy, tmp_path: Path) -> None:
    policy = tiny_policy()
    recipe = sft_recipe(tmp_path, policy)
    examples = load_examples(recipe, policy)
    assert len(examples) == 8
    first = examples[0]
    assert policy.tokenizer.decode(first.prompt_ids) == "write a"
    assert first.response_ids[-1] == policy.tokenizer.eos_token_id
    expected = policy.tokenizer(RESPONSE.format(solution="aaa 0"), add_special_tokens=False)["input_ids"]
    assert list(first.response_ids[:-1]) == expected
    short = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"canvas": 3})})
    with pytest.raises(DataError, match=r"no row fits fit\.canvas = 3.*the shortest response has 20 tokens"):
        load_examples(short, policy)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"columns": {"solution": "code"}})})
    with pytest.raises(DataError, match=r"'prompt' and 'code'; the dataset has prompt, solution\."):
        load_examples(other, policy)


def test_training_lowers_the_loss_and_an_interrupted_run_ends_with_the_same_weights(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sft_recipe(tmp_path, tiny_policy(), num_updates=1)
    whole = fit(recipe)
    losses = [row["loss"] for row in read_rows(whole.parents[1] / "metrics.jsonl")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    commit = RunDir.commit

    def interrupted(self: RunDir, step: int, write: object) -> Path:
        if step == 3:
            raise KeyboardInterrupt
        return commit(self, step, write)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe)
    resumed = fit(recipe, "auto")
    assert resumed.parents[1].name == "run-002"
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    rows = read_rows(resumed.parents[1] / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(i + 1, loss) for i, loss in enumerate(losses)]


def test_a_run_that_stopped_before_its_first_checkpoint_logs_each_step_once(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sft_recipe(tmp_path, tiny_policy(), checkpoint={"every": 4})
    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(recipe)
    path = tmp_path / "runs/run-001/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    fit(recipe, "auto")
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
