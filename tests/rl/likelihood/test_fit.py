from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fit_runs import numbers, sft_recipe
from helpers.toys import MakePolicy

from coupled.rl.errors import DataError
from coupled.rl.fit import fit
from coupled.rl.likelihood.batch import LikelihoodBatch, PackedRow, collate
from coupled.rl.likelihood.samples import Example
from coupled.rl.model.loading import load_policy
from coupled.rl.recipe.likelihood import Fit
from coupled.rl.recipe.model import Adapter
from coupled.rl.run_folder.folder import RunFolder, read_rows

EXAMPLES = [
    Example(prompt_ids=(4, 5, 6), response_ids=(7, 8, 1)),
    Example(prompt_ids=(9,), response_ids=(10, 11, 12, 13, 1)),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_samples_are_padded_on_the_left_and_filled_on_the_right(tiny_policy: MakePolicy) -> None:
    rows = [(example,) for example in EXAMPLES]
    batch = collate(rows, tiny_policy(), Fit(canvas=6))
    assert batch.ids.tolist() == [[4, 5, 6, 7, 8, 1, 0, 0, 0], [0, 0, 9, 10, 11, 12, 13, 1, 0]]
    assert batch.layout.position.tolist() == [[*range(9)], [0, 0, *range(7)]]
    assert batch.layout.sequence.tolist() == [[0] * 9, [-1, -1, *[0] * 7]]
    assert batch.carries_loss.tolist() == [[True] * 6] * 2, "what follows the end token is learned, too"
    shorter = collate(rows, tiny_policy(), Fit(canvas=6, objective="autoregressive"))
    assert shorter.ids.shape == (2, 8)
    assert shorter.carries_loss.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_packed_samples_follow_each_other_and_padding_comes_last(tiny_policy: MakePolicy) -> None:
    text = Example(prompt_ids=(), response_ids=(20, 21, 1))
    rows = [(EXAMPLES[0], text), (EXAMPLES[1],)]
    batch = collate(rows, tiny_policy(shift=0), Fit(context=10))
    assert batch.ids.tolist() == [[4, 5, 6, 7, 8, 1, 20, 21, 1], [9, 10, 11, 12, 13, 1, 0, 0, 0]]
    assert batch.layout.position.tolist() == [[*range(6), 0, 1, 2], [*range(6), 0, 0, 0]]
    assert batch.layout.sequence.tolist() == [[0] * 6 + [1] * 3, [0] * 6 + [-1] * 3]
    assert batch.carries_loss.int().tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0, 0]]
    given = collate(rows, tiny_policy(shift=1), Fit(context=10)).carries_loss[0].int().tolist()
    assert given == [0, 0, 0, 1, 1, 1, 0, 1, 1], "nothing predicts the first token of a text when logits are shifted"


# --- a whole run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({}, 0),
        ({"objective": "autoregressive"}, 3),
        ({"objective": "causal_diffusion", "context": 50, "micro_batch_size": 3}, 0),
        ({"objective": "block_diffusion", "clipped_noise": "exact", "noise_warmup_steps": 2, "end_tokens": [1, 4]}, 3),
        ({"objective": "block_diffusion", "clipped_noise": "paper", "context": 60, "random_length": 0.5}, 3),
        ({"attention_anneal_steps": 3, "context": 60}, 3),
    ],
    ids=["plain", "autoregressive-streamed", "causal-packed", "block-streamed", "block-packed", "annealed"],
)
def test_training_lowers_the_loss_and_an_interrupted_run_ends_with_the_same_weights(
    tiny_policy: MakePolicy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    window: int,
) -> None:
    recipe = sft_recipe(tmp_path, tiny_policy(), options, window)
    whole = fit(recipe)
    rows = numbers(whole.parents[1])
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1].get("skipped/an empty text") == 1 or window
    if not options or options.get("objective") == "autoregressive":  # the others are noisier than what four steps gain
        assert rows[-1]["loss"] < rows[0]["loss"]  # type: ignore[operator]
    commit = RunFolder.commit

    def interrupted(self: RunFolder, step: int, write: object, *facts: object) -> Path:
        if step == 3:
            raise KeyboardInterrupt
        return commit(self, step, write, *facts)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe)
    resumed = fit(recipe, "auto")
    assert resumed.parents[1].name == "run-002"
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert numbers(resumed.parents[1]) == rows


def test_a_resumed_run_reads_on_where_the_last_checkpoint_stopped(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sft_recipe(tmp_path, tiny_policy(), {"batch_size": 3}, 2)
    seen: list[tuple[tuple[int, ...], ...]] = []

    def remembered(rows: Sequence[PackedRow], *rest: Any) -> LikelihoodBatch:
        seen.append(tuple(example.prompt_ids for row in rows for example in row))
        return collate(rows, *rest)

    monkeypatch.setattr("coupled.rl.fit.collate", remembered)
    fit(recipe)
    whole, seen[:] = list(seen), []
    commit = RunFolder.commit

    def interrupted(self: RunFolder, step: int, write: object, *facts: object) -> Path:
        if step == 3:
            raise KeyboardInterrupt
        return commit(self, step, write, *facts)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe)
    fit(recipe, "auto")
    assert seen == [*whole[:3], *whole[2:]], "the third step was not committed, and is done again"
    assert len(set(sum(whole, ())[:8])) == 8, "an epoch has each sample once"


def test_what_was_left_out_is_said_at_the_end(
    tiny_policy: MakePolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(sft_recipe(tmp_path, tiny_policy(), {"canvas": 20}))
    assert "rows left out: 1 × an empty text" in capsys.readouterr().out


def test_a_dataset_without_a_sample_stops_before_anything_is_written(tiny_policy: MakePolicy, tmp_path: Path) -> None:
    recipe = sft_recipe(tmp_path, tiny_policy(), {"canvas": 3})
    with pytest.raises(DataError, match=r"8 × a response over fit\.canvas = 3, 1 × an empty text"):
        fit(recipe)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("window", [0, 3])
def test_adapters_alone_are_trained_and_saved(tiny_policy: MakePolicy, tmp_path: Path, window: int) -> None:
    recipe = sft_recipe(tmp_path, tiny_policy(), None, window)
    adapted = recipe.model.model_copy(update={"adapter": Adapter(rank=2, targets=("q_proj", "v_proj"))})
    folder = fit(recipe.model_copy(update={"model": adapted}))
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    opened, base = load_policy(folder), load_policy(tmp_path / "base")
    ids = torch.tensor([[4, 5, 2, 2]])
    rows = torch.tensor([[False, False, True, True]])
    made = [policy.logits_at(ids, torch.zeros(1, dtype=torch.int64), rows) for policy in (opened, base)]
    assert not torch.allclose(made[0], made[1], atol=1e-3)


def test_a_run_that_stopped_before_its_first_checkpoint_logs_each_step_once(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sft_recipe(tmp_path, tiny_policy(), checkpoint={"every": 4})
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(recipe)
    path = tmp_path / "runs/run-001/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    fit(recipe, "auto")
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
