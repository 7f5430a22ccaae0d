"""`coupled eval --benchmark`, `--compare` and `coupled sample --tests`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupled.rl.cli import main
from coupled.rl.commands.canvas_view import CanvasView

ROOT = Path(__file__).parents[3]
TINY = ROOT / "recipes" / "tiny" / "checkpoint"
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
SETTINGS = ("num_threads=1", "rollout.denoising_steps=8", "rollout.batch_size=4", "sandbox.num_workers=1")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    lines = (ROOT / "recipes" / "tiny" / "tasks" / "test.jsonl").read_text().splitlines()[:4]
    path = tmp_path / "four.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["coupled", *arguments])
    monkeypatch.setattr("coupled.rl.cli.console._width", 200)
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.err + captured.out


def test_a_checkpoint_is_evaluated_and_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tasks: Path
) -> None:
    common = (str(TINY), *SETTINGS, "--recipe", QUICKSTART, "--benchmark", str(tasks))
    code, text = call(monkeypatch, capsys, "eval", *common, "--out", str(tmp_path / "greedy"))
    assert code == 0, text
    assert "4 of 4" in text
    score = json.loads((tmp_path / "greedy" / "four" / "score.json").read_text())
    assert (score["arm"], score["num_samples"], score["temperature"]) == ("diffusion", 1, 0.0)
    code, text = call(
        monkeypatch, capsys, "eval", *common, "--samples", "2", "--steps", "4", "--out", str(tmp_path / "sampled")
    )
    assert code == 0, text
    score = json.loads((tmp_path / "sampled" / "four" / "score.json").read_text())
    assert (score["num_samples"], score["temperature"], score["denoising_steps"]) == (2, 1.0, 4)
    code, text = call(
        monkeypatch, capsys, "eval", "--compare", str(tmp_path / "greedy"), str(tmp_path / "greedy" / "four")
    )
    assert code == 0, text
    assert "0.0 [0.0, 0.0]" in text
    assert "exact McNemar" in text
    code, text = call(monkeypatch, capsys, "eval", "--compare", str(tmp_path / "greedy"), str(tmp_path / "sampled"))
    assert code == 0, text
    assert "note: four was run with num_samples 1 and 2" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--benchmark", "humanevl+"), "did you mean 'humaneval+'?"),
        (("--benchmark", "humaneval+", "--data", "/nowhere"), "no data of humaneval+ below /nowhere"),
        (("--benchmark", "FILE", "--samples", "3", "--temperature", "0"), "would give the same completion every time"),
        (("--benchmark", "FILE", "--prompting", "chatty"), "did you mean 'chat'?"),
        (("--benchmark", "FILE", "--steps", "41"), "must not exceed rollout.canvas (40)"),
    ],
)
def test_bad_input_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tasks: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    asked = [str(tasks) if part == "FILE" else part for part in arguments]
    out = str(tmp_path / "out")
    code, text = call(monkeypatch, capsys, "eval", str(TINY), "--recipe", QUICKSTART, "--out", out, *asked)
    assert code == 2
    assert message in text.replace("\n", " ")
    assert "Traceback" not in text


def test_nothing_to_evaluate_is_said_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "needs a checkpoint or run folder" in call(monkeypatch, capsys, "eval")[1]
    code, text = call(monkeypatch, capsys, "eval", "--compare", str(tmp_path), str(tmp_path))
    assert code == 2
    assert "holds no evaluation" in text


def test_a_sampled_program_is_run_against_tests(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tests = tmp_path / "tests.json"
    tests.write_text(json.dumps(["assert f([]) == 'never'"]))
    prompt = "Write f(xs): add 4 to each, return the sum."
    code, text = call(
        monkeypatch, capsys, "sample", str(TINY), prompt, "--recipe", QUICKSTART, "--no-watch", "--tests", str(tests)
    )
    assert code == 1
    assert "FAIL" in text or "nothing to run" in text
    assert "step 0" not in text


def test_watching_shows_every_step_and_the_canvas_fills(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = call(monkeypatch, capsys, "sample", str(TINY), "Write f(xs): sum.", *SETTINGS, "--recipe", QUICKSTART)
    assert code == 0, text
    steps = [line for line in text.splitlines() if line.startswith("── step")]
    assert len(steps) >= 2
    first, last = text.split("── step")[1], text.split("── step")[-1].split("── completion")[0]
    assert first.count("▢") > last.count("▢") == 0


def test_on_a_terminal_the_canvas_fills_in_place() -> None:
    import io

    import numpy as np
    from rich.console import Console

    from coupled.rl.model.loading import load_policy

    policy = load_policy(TINY)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, color_system=None)
    canvas = np.full(4, policy.mask_id)
    with CanvasView(console) as view:
        view.show(policy, 0, canvas)
        canvas[1] = policy.tokenizer("x")["input_ids"][0]
        view.show(policy, 1, canvas)
    text = out.getvalue()
    assert "4 of 4 masked" in text
    assert "step 1, 3 of 4 masked" in text
    assert "▢x▢▢" in text
