"""Wrong input of every kind: one clear error that names the rule, the value and the remedy, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupled.reward import RewardError
from coupled.rl.cli import main
from coupled.rl.errors import CheckpointError, CoupledError, DataError, RolloutError
from coupled.rl.recipe.read import load_recipe
from coupled.rl.train import train

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SMALL = (
    "num_threads=1",
    "num_steps=1",
    "optimizer.warmup_steps=0",
    "rollout.num_prompts=2",
    "rollout.group_size=2",
    "rollout.denoising_steps=4",
    "sandbox.num_workers=1",
    "data.eval_path=null",
)


def run(tmp_path: Path, *overrides: str) -> None:
    train(load_recipe(QUICKSTART, (*SMALL, f"output_dir={tmp_path / 'runs'}", *overrides)))


def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["coupled", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.err + captured.out


def test_the_command_line_prints_one_error_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run_cli(monkeypatch, capsys, "train", str(QUICKSTART), "optimizer.learning_rat=1")
    assert code == 2
    assert "optimizer.learning_rat: unknown key; did you mean 'learning_rate'?" in text
    assert "Traceback" not in text


def test_a_missing_recipe_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run_cli(monkeypatch, capsys, "train", str(ROOT / "recipes" / "quikstart.yaml"))
    assert code == 2
    assert "quickstart.yaml" in text


def test_dry_run_prints_the_resolved_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run_cli(monkeypatch, capsys, "train", str(QUICKSTART), "seed=7", "--dry-run")
    assert code == 0
    assert "seed: 7" in text
    assert "clip_low: 0.5" in text


def test_a_missing_dataset_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset at .*tran\.jsonl.*train\.jsonl"):
        run(tmp_path, f"data.path={ROOT}/recipes/tiny/tasks/tran.jsonl")
    assert not (tmp_path / "runs").exists(), "a run folder was made for a run that could not start"


def test_a_wrong_column_says_how_to_map_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'promt'.*did you mean 'prompt'.*data\.columns\.prompt="):
        run(tmp_path, "data.columns.prompt=promt")


def test_a_missing_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        run(tmp_path, f"model.path={tmp_path}/nowhere")


def test_a_folder_that_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(tmp_path, f"model.path={tmp_path}")


def test_a_tokenizer_bigger_than_the_model_is_refused(tmp_path: Path) -> None:
    source = ROOT / "recipes" / "tiny" / "architecture"
    folder = tmp_path / "model"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(CheckpointError, match=r"896 tokens but the model embeds only 100"):
        run(tmp_path, f"model.path={folder}", "model.init=random")


def test_a_canvas_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CoupledError, match=r"exceed the model's 256 positions"):
        run(tmp_path, "rollout.canvas=250")


def test_training_prompts_among_the_held_out_ones_are_refused(tmp_path: Path) -> None:
    tasks = ROOT / "recipes" / "tiny" / "tasks" / "rl.jsonl"
    with pytest.raises(DataError, match="held-out prompts are also training prompts"):
        run(tmp_path, f"data.eval_path={tasks}")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('answer')", "KeyError"),
        ("return [1.0]", r"1 .*4|4 .*1"),
        ("return [float('nan')] * len(completions)", "(?i)nan"),
        ("return ['good'] * len(completions)", "good"),
        ("import time; time.sleep(60)", r"1(\.0)? s|second"),
    ],
    ids=["raises", "wrong length", "nan", "not a number", "hangs"],
)
def test_a_reward_function_that_misbehaves_loses_no_rollout(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(f"def score(prompts, completions, **columns):\n    {body}\n")
    with pytest.raises(RewardError, match=message) as caught:
        run(tmp_path, f"reward.functions=[{{path: '{tmp_path}/mine.py:score'}}]", "reward.timeout_seconds=1")
    assert "resume=" in str(caught.value)
    kept = list((tmp_path / "runs").rglob("*.unscored.parquet"))
    assert len(kept) == 1
    assert str(kept[0]) in str(caught.value)


def test_with_mask_a_run_goes_on_without_what_a_reward_function_fails_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "calls = []\ndef score(prompts, completions, **columns):\n    calls.append(len(completions))\n"
        "    assert len(calls) not in (1, 3), 'the second prompt is one too many'\n"
        "    return [float(i) for i, _ in enumerate(completions)]\n"
    )
    function = f"reward.functions=[{{path: '{tmp_path}/mine.py:score'}}]"
    run(tmp_path, function, "reward.on_error=mask", "num_steps=2")
    (metrics,) = (tmp_path / "runs").rglob("metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["unscored"] for row in rows] == [2, 0]
    assert rows[0]["reward"] == 0.5
    out = capsys.readouterr().out
    assert "alarm: step 1: 2 of 4 completions have no score and are left out" in out
    assert "mine.py:score raised" in out


def test_with_mask_a_run_that_never_gets_a_score_ends(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(completions): raise KeyError('answer')\n")
    function = f"reward.functions=[{{path: '{tmp_path}/mine.py:score'}}]"
    with pytest.raises(RolloutError, match=r"in 3 steps running, to step 3, not one completion has a score"):
        run(tmp_path, function, "reward.on_error=mask", "num_steps=5")


def test_a_reward_function_of_the_users_own_is_what_is_optimised(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, composition, **columns):\n"
        "    assert len(composition) == len(prompts) == len(completions)\n"
        "    return [0.25 if i % 2 else None for i, _ in enumerate(completions)]\n"
    )
    run(tmp_path, f"reward.functions=[{{path: '{tmp_path}/mine.py:score', weight: 2.0}}]")
    (metrics,) = (tmp_path / "runs").rglob("metrics.jsonl")
    row = json.loads(metrics.read_text())
    assert row["reward"] == 0.5
    assert row["unscored"] == 2


def test_a_missing_reward_function_is_found_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def scoer(prompts, completions): return []\n")
    with pytest.raises(RewardError, match="score"):
        run(tmp_path, f"reward.functions=[{{path: '{tmp_path}/mine.py:score'}}]")
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_keeps_the_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coupled.rl.trainer import learner as trained

    real = trained.write_checkpoint

    def full_at_step_two(folder: Path, *parts: object) -> None:
        state = parts[-1]
        assert isinstance(state, dict)
        if state["step"] == 2:
            raise OSError(28, "No space left on device")
        real(folder, *parts)  # type: ignore[arg-type]

    monkeypatch.setattr(trained, "write_checkpoint", full_at_step_two)
    with pytest.raises(CheckpointError, match=r"No space left.*resume=auto"):
        run(tmp_path, "num_steps=2")
    (kept,) = (tmp_path / "runs").rglob("step_00*/state.json")
    assert json.loads(kept.read_text()) == {"step": 1}
