"""What a report says, read from the page without a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.report_runs import HOSTILE, TESTS, make_evaluation, metrics_row, write_run

from coupled.rl.cli import main
from coupled.rl.errors import CoupledError, DataError
from coupled.rl.evaluation.held_out import paired_gain
from coupled.rl.report import render, write_report
from coupled.rl.report.curves import GROUPS, curve_groups
from coupled.rl.report.data import read_run, spread
from coupled.rl.report.plots import Series, draw, thin
from coupled.rl.report.sample import NUM_SAMPLED_STEPS, denoising_orders, sample_rollouts

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


class Page(HTMLParser):
    """A page as a browser would take it apart."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words = ""
        self.source = text
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.words += " "
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.words += data

    @property
    def text(self) -> str:
        return " ".join(self.words.split())

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def page_of(*runs: Path, limit: int = 300) -> Page:
    return Page(render([read_run(run) for run in runs], limit))


# --- the page is whole and safe ------------------------------------------------------------------------------------


def test_no_text_of_a_model_or_a_user_becomes_part_of_the_page(tmp_path: Path) -> None:
    rows = [metrics_row(1) | {"reward/<b>mine</b>": 1.0}]
    run = write_run(tmp_path / "run", num_steps=1, rows=rows)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "# </pre><b>bold</b></details>\n")
    (run / "environment.jsonl").write_text(json.dumps({"command": HOSTILE, "commit": "<b>", "step": 0}) + "\n")
    page = page_of(run)
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == ["application/json", None]
    assert not {"b", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert any(item["text"] == f"no code {HOSTILE}" for item in page.data["rollouts"])
    assert page.data["samples"][0]["tasks"]["task-1"] == {"prompt": f"Write f. {HOSTILE}", "tests": list(TESTS)}
    assert "<b>mine</b>" in page.text
    assert "# </pre><b>bold</b></details>" in page.text
    assert " ".join(HOSTILE.split()) in page.text
    assert page.source.isascii()


def test_the_page_asks_the_network_for_nothing(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", evaluations=[make_evaluation(0, [0, 0, 1, 0])]))
    loads = [a for t, a in page.tags if t in ("link", "img", "iframe", "script") and (a.get("src") or a.get("href"))]
    assert loads == [{"rel": "icon", "href": "data:,"}]
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page.source))
    assert "@import" not in page.source
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_no_two_elements_have_the_same_id(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", evaluations=[make_evaluation(0, [0, 0, 1, 0]), make_evaluation(3, [1, 0, 1, 0])])
    ids = [attributes["id"] for tag, attributes in page_of(run).tags if attributes.get("id")]
    own = [name for name in ids if not re.fullmatch(r"[pmC][0-9a-f_]{6,}", str(name))]
    assert len(own) == len(set(own))
    assert set(page_of(run).data["plots"]) <= set(own)


def test_a_report_of_the_same_run_is_the_same_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", evaluations=[make_evaluation(0, [0, 0, 1, 0])])
    first = write_report(run, out=tmp_path / "a.html").read_bytes()
    assert write_report(run, out=tmp_path / "b.html").read_bytes() == first


def test_by_default_the_report_is_written_into_the_run_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert write_report(run) == run / "report.html"
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")


# --- what it says ---------------------------------------------------------------------------------------------------


def test_held_out_results_have_intervals_and_a_paired_gain(tmp_path: Path) -> None:
    before, after = make_evaluation(0, [0.0, 0.5, 0.0, 1.0]), make_evaluation(3, [0.5, 1.0, 0.0, 1.0])
    page = page_of(write_run(tmp_path / "run", evaluations=[before, after]))
    assert str(before.sampled.pass_at_1) in page.text
    assert f"+{paired_gain(before.sampled, after.sampled)}" in page.text
    assert "37.5 → 62.5 %" in page.text
    assert "No held-out results" not in page.text


def test_every_metric_of_the_log_is_in_a_plot(tmp_path: Path) -> None:
    row = metrics_row(1) | {"mine": 3.0, "mine/too": 4.0, "text": "not a number", "unscored": 0.0}
    run = read_run(write_run(tmp_path / "run", num_steps=2, rows=[row, row | {"step": 2}]))
    groups = curve_groups([run], ["run"])
    drawn = {panel.title: [line["name"] for line in panel.lines] for group in groups for panel in group["panels"]}
    assert drawn["Reward"] == ["reward", "code", "format"]
    assert drawn["Clipped tokens"] == ["low", "high"]
    assert drawn["Time of a step"] == ["rollout", "update"], "the total is no area of its own"
    assert {"mine", "mine/too"} <= drawn.keys()
    assert "text" not in drawn
    assert len(drawn) == sum(len(group["panels"]) for group in groups)


def test_the_names_of_the_curves_are_those_of_the_metrics() -> None:
    """A metric that is renamed would fall among the others without anybody noticing."""
    files = [Path(__file__).parents[3] / "rl" / f"{name}.py" for name in ("monitoring/metrics", "rollout/exactness")]
    source = "".join(file.read_text() for file in files) + '"memory/ "time/'
    names = [name for _, curves in GROUPS for curve in curves for name in curve.names]
    missing = [name for name in names if f'"{name.rstrip("*")}' not in source]
    assert missing == []


def test_a_plot_has_gaps_where_a_number_is_missing(tmp_path: Path) -> None:
    rows = [metrics_row(1), metrics_row(2) | {"reward": math.nan}, metrics_row(3)]
    page = page_of(write_run(tmp_path / "run", rows=rows))
    (plot,) = [plot for name, plot in page.data["plots"].items() if name.startswith("plot-reward-")]
    assert plot["lines"][0] == {"x": [1, 2, 3], "y": [0.6, None, 0.8]}


def test_a_rollout_has_its_tests_tokens_and_program(tmp_path: Path, tiny_tokenizer: Any) -> None:
    page = page_of(write_run(tmp_path / "run", num_steps=1, tokenizer=tiny_tokenizer))
    by_state = {item["state"]: item for item in page.data["rollouts"]}
    assert by_state.keys() == {"passed", "failed", "unjudged"}
    whole, half, broken = by_state["passed"], by_state["failed"], by_state["unjudged"]
    assert whole["code"] == "def f(x): return x\n"
    assert half["code"] is None
    assert (whole["per_test"], half["per_test"], broken["per_test"]) == ([1, 1], [1, 0], [])
    assert whole["at"] == [2, 0, 1, 3, 4, 5]
    vocabulary = page.data["samples"][0]["vocabulary"]
    assert [vocabulary[token] for token in whole["ids"]] == ["a", "b", "c", "d", "<end>", "f"]
    assert whole["logp"][0] == pytest.approx(math.log(0.5), abs=1e-4)
    assert broken["score"] is None


def test_without_a_tokenizer_the_rest_is_shown(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", num_steps=1))
    assert len(page.data["rollouts"]) == 3
    assert all("ids" not in item for item in page.data["rollouts"])


def test_runs_of_earlier_versions_have_fewer_columns(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=1)
    path = run / "rollouts/step_000001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["tests", "per_test", "detail"]), path)
    page = page_of(run)
    assert [item["per_test"] for item in page.data["rollouts"]] == [[], [], []]
    assert "has no environment.jsonl" in page.text


def test_the_environment_says_commit_machine_and_every_start(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    start = {"started": "2026-01-02T03:04:05+00:00", "command": "coupled train x.yaml", "commit": "a" * 40, "step": 0}
    start |= {"has_uncommitted": False, "processor": "Z80", "num_cores": 2, "gpus": ["H200", "H200"], "versions": {}}
    rows = [start, start | {"step": 2, "has_uncommitted": True}]
    (run / "environment.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page_of(run).text
    assert "2 × H200, 2 cores of Z80" in text
    assert "2026-01-02 03:04:05 UTC" in text
    assert "aaaaaaaaaaaa with changes" in text
    assert "Resumed after step 2." in text
    assert "The source differed from its commit." in text


def test_what_lessens_the_trust_in_a_run_is_said_first(tmp_path: Path) -> None:
    rows = [metrics_row(1) | {"unscored": 3.0, "weak_verdicts": 0.5}]
    text = page_of(write_run(tmp_path / "run", num_steps=3, rows=rows)).text
    assert "Not finished: 1 of 3 steps." in text
    assert "3 completions had no verdict" in text
    assert "In 1 step the verdicts on some programs could have been forged by them (T2)." in text
    assert "No held-out results before and after" in text


def test_a_run_of_likelihood_training_has_curves_and_no_rollouts(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1 / step, "grad_norm": 1.0, "tokens_per_second": 5.0} for step in (1, 2)]
    run = write_run(tmp_path / "run", num_steps=2, rows=rows, texts=(), stage="sft")
    page = page_of(run)
    assert page.data["rollouts"] == []
    assert "Gradient norm" in page.text
    assert "held-out" not in page.text.lower()


# --- two runs -------------------------------------------------------------------------------------------------------


def test_two_runs_share_their_plots_and_their_gain_is_paired(tmp_path: Path) -> None:
    ends = [make_evaluation(3, [0.0, 0.5, 0.0, 1.0]), make_evaluation(3, [0.5, 1.0, 0.5, 1.0])]
    one = write_run(tmp_path / "one", evaluations=[ends[0]])
    other = write_run(tmp_path / "other", evaluations=[ends[1]], seed=5, optimizer={"learning_rate": 0.5})
    page = page_of(one, other)
    assert f"+{paired_gain(ends[0].sampled, ends[1].sampled)}" in page.text
    (kl,) = [plot for name, plot in page.data["plots"].items() if name.startswith("plot-kl-")]
    assert len(kl["lines"]) == 2
    assert "seed 0 5" in page.text
    assert "optimizer.learning_rate" in page.text
    assert {item["run"] for item in page.data["rollouts"]} == {0, 1}


def test_different_held_out_problems_are_not_compared(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", evaluations=[make_evaluation(3, [0.0, 0.5, 0.0, 1.0])])
    other = write_run(tmp_path / "other", evaluations=[make_evaluation(3, [1, 1], uids=("x", "y"))])
    text = page_of(one, other).text
    assert "gain of other over one not paired not paired" in text
    assert "measured on different problems" in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "a/run"), write_run(tmp_path / "b/run")
    names = [sample["name"] for sample in page_of(one, other).data["samples"]]
    assert names == [str(one), str(other)]
    assert len(page_of(one, one).data["samples"]) == 2


# --- sampling and caps ----------------------------------------------------------------------------------------------


def test_a_sample_is_spread_over_the_steps_and_the_same_every_time(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", num_steps=30, texts=["x"] * 5, passed=[2] * 5))
    first, second = sample_rollouts(run, 45), sample_rollouts(run, 45)
    assert first == second
    steps = [item["step"] for item in first.rollouts]
    assert len(first.rollouts) == 45
    assert (min(steps), max(steps), len(set(steps)), first.num_steps) == (1, 30, NUM_SAMPLED_STEPS, NUM_SAMPLED_STEPS)
    assert {steps.count(step) for step in set(steps)} == {2, 3}
    assert len({item["uid"] for item in first.rollouts}) == 45
    assert first.num_total == 150


def test_every_rollout_of_a_step_is_as_likely_to_be_shown(tmp_path: Path) -> None:
    """Of 20 steps with 50 rollouts, 10 each are drawn: 20 in each tenth on average, with a standard deviation of 4."""
    run = read_run(write_run(tmp_path / "run", num_steps=20, texts=["x"] * 50, passed=[2] * 50))
    places = [int(item["uid"].rpartition("/")[2]) for item in sample_rollouts(run, 200).rollouts]
    counts = np.bincount(np.array(places) // 5, minlength=10)
    assert counts.sum() == 200
    assert counts.min() >= 8
    assert counts.max() <= 32


def test_a_sample_does_not_outgrow_its_bytes(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", num_steps=3, texts=["y" * 5000] * 4, passed=[2] * 4))
    capped = sample_rollouts(run, 12, max_bytes=30_000)
    assert 3 <= len(capped.rollouts) < 12
    assert sum(len(json.dumps(item)) for item in capped.rollouts) <= 30_000
    assert len(sample_rollouts(run, 12, max_bytes=1).rollouts) == 1, "one rollout says more than none"


def test_long_texts_are_cut_and_said_to_be(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", num_steps=1, texts=["z" * 100_000], passed=[0]))
    (item,) = sample_rollouts(run, 5).rollouts
    assert len(item["text"]) == 20_000
    assert item["is_cut"]


def test_a_hundred_thousand_rollouts_make_a_page_of_the_same_size(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=2)
    path = run / "rollouts/step_000002.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table] * 33_334), path, row_group_size=10_000)
    page = page_of(run)
    assert len(page.data["rollouts"]) == 3 + 150
    assert "153 of 100,005 rollouts" in page.text
    assert len(page.source) < 600_000


@pytest.mark.parametrize(
    ("values", "limit", "kept"),
    [([], 3, []), ([1, 2], 3, [1, 2]), ([1, 2, 3, 4, 5], 3, [1, 3, 5]), (list(range(100)), 2, [0, 99])],
)
def test_values_are_spread_evenly_with_both_ends(values: list[int], limit: int, kept: list[int]) -> None:
    assert spread(values, limit) == kept


def test_long_curves_are_means_of_neighbours() -> None:
    assert thin([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, math.nan, 7.0], 2) == ((1.5, 3.5), (2.0, 7.0))
    x, y = thin([0.0] * 1000, [0.0] * 1000)
    assert len(x) == len(y) == 250
    assert thin([1.0], [2.0]) == ((1.0,), (2.0,))


# --- plots ----------------------------------------------------------------------------------------------------------


def test_a_drawing_has_the_colours_of_the_page_and_says_where_its_axis_is() -> None:
    drawing = draw(
        [Series(name="a", x=(1.0, 2.0, 3.0), y=(0.0, 1.0, 2.0)), Series(name="b", x=(1.0, 3.0), y=(1.0, 2.0), colour=1)]
    )
    assert drawing.svg.startswith("<svg ")
    assert "var(--series-0)" in drawing.svg
    assert "var(--series-1)" in drawing.svg
    assert not re.search(r"#[0-9a-f]{6}", drawing.svg), "a colour that does not follow the theme"
    assert "<style" not in drawing.svg
    assert 0 < drawing.left < drawing.right < 1
    assert drawing.x_min < 1 < 3 < drawing.x_max


def test_the_order_of_denoising_is_the_mean_share_of_the_steps_that_had_passed(tmp_path: Path) -> None:
    """Commit steps 2, 0, 1, 3, 4 of 5 for the five positions up to the end token; the sixth comes after it."""
    first, last = denoising_orders(read_run(write_run(tmp_path / "run", num_steps=4)))
    assert (first.step, last.step, first.num_rollouts) == (1, 4, 3)
    assert first.commit_share == pytest.approx((0.4, 0.0, 0.2, 0.6, 0.8))
    assert first.entropy == pytest.approx((0.0, 0.2, 0.4, 0.6, 0.8))


# --- bad input ------------------------------------------------------------------------------------------------------


def test_damaged_lines_are_left_out_and_noted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=3)
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(whole[0] + '{"step": 2, "rew\n' + whole[2] + '{"step": 4, "reward": 1')
    (run / "evaluation.jsonl").write_text('{"step": 0, "sampled": {}}\n')
    found = read_run(run)
    assert [row["step"] for row in found.metrics] == [1, 3]
    assert "2 damaged lines of metrics.jsonl left out: truncated by a crash, or edited." in found.notes
    assert any("evaluation.jsonl is not in this version's format" in note for note in found.notes)
    assert "2 damaged lines" in page_of(run).text


def test_a_missing_run_names_the_nearest(tmp_path: Path) -> None:
    write_run(tmp_path / "quick-001")
    with pytest.raises(DataError, match=r"no run folder at .*quik-001; did you mean 'quick-001'\?"):
        write_report(tmp_path / "quik-001")
    with pytest.raises(DataError, match="no run folder at"):
        write_report(tmp_path / "nowhere" / "run")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no recipe\.yaml, so it is not a run folder$"):
        write_report(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(DataError, match="it is a checkpoint: name the run folder that holds it"):
        write_report(tmp_path)


@pytest.mark.parametrize("content", [None, "", '{"step": 1'])
def test_a_run_without_a_finished_step_says_how_to_get_one(tmp_path: Path, content: str | None) -> None:
    run = write_run(tmp_path / "run", rows=[])
    if content is None:
        (run / "metrics.jsonl").unlink()
    else:
        (run / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"no finished step.*resume=.*run$"):
        write_report(run)


def test_files_that_were_damaged_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=1)
    (run / "rollouts/step_000001.parquet").write_bytes(b"PAR1 half a file")
    with pytest.raises(DataError, match=r"step_000001\.parquet is not a whole Parquet file"):
        write_report(run)
    (run / "recipe.yaml").write_text("seed: [1")
    with pytest.raises(DataError, match=r"recipe\.yaml is not a mapping of settings"):
        write_report(run)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=1)
    with pytest.raises(DataError, match="--out names the file to write"):
        write_report(run, out=tmp_path)
    with pytest.raises(DataError, match=r"cannot be written to .*missing/report\.html"):
        write_report(run, out=tmp_path / "missing" / "report.html")
    with pytest.raises(DataError, match="at least one rollout; received 0"):
        write_report(run, num_rollouts=0)


def test_without_matplotlib_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", num_steps=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CoupledError, match=r"pip install .*\[report\]"):
        write_report(run)


def test_the_command_line_writes_a_report_or_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["coupled", "report", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out + captured.err

    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other")
    out = tmp_path / "page.html"
    code, text = call(str(run), "--compare", str(other), "--out", str(out), "--rollouts", "4")
    assert code == 0
    assert str(out) in text
    assert len(Page(out.read_text()).data["rollouts"]) == 4
    code, text = call(str(tmp_path / "othre"))
    assert code == 2
    assert "did you mean 'other'?" in text
    assert "Traceback" not in text
