"""A process that hangs ends with a status that asks for a resumption, and says where it hung."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.toys import MakePolicy, make_batch, make_recipe, make_requests

from coupled.rl.model.loading import add_adapter
from coupled.rl.monitoring.events import EventLog
from coupled.rl.monitoring.watchdog import FILE, STATE_SECONDS, Watchdog
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.engine import roll_out
from coupled.rl.trainer.rl_learner import RLLearner

SECONDS = 0.5
Make = Callable[..., Watchdog]


@pytest.fixture
def ended() -> list[int]:
    return []


@pytest.fixture
def watchdog(tmp_path: Path, ended: list[int]) -> Iterator[Make]:
    made: list[Watchdog] = []

    def make(**settings: object) -> Watchdog:
        made.append(Watchdog(SECONDS, tmp_path, end=ended.append, **settings))  # type: ignore[arg-type]
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close()


class Beats:
    """A watchdog that counts what is reported to it."""

    def __init__(self, dog: Watchdog) -> None:
        self.dog, self.count = dog, 0
        dog.moved = self._moved  # type: ignore[method-assign]

    def _moved(self) -> None:
        self.count += 1


@pytest.fixture
def beats(tmp_path: Path) -> Beats:
    return Beats(Watchdog(3600.0, tmp_path))


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_silence_ends_the_process_and_names_the_phase_the_workers_and_the_line_that_hangs(
    watchdog: Make, ended: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dog = watchdog(state=lambda: "train/3/0 is rolling, held by roll-1#2 for 9 s")

    def hangs_in_here() -> None:
        with dog.phase("update"):
            wait_until(lambda: bool(ended))

    hangs_in_here()
    assert ended == [75]
    said = capsys.readouterr().err
    assert "no progress in phase 'update' for" in said
    assert "train/3/0 is rolling, held by roll-1#2 for 9 s." in said
    assert "resume=auto" in said
    text = (tmp_path / FILE).read_text()
    assert text.startswith(said)
    assert "hangs_in_here" in text


def test_nothing_ends_while_something_moves(watchdog: Make, ended: list[int]) -> None:
    dog = watchdog()
    events = EventLog()
    events.on_result = dog.moved
    for _ in range(15):
        time.sleep(SECONDS / 5)
        events.emit("rolled", key="train/1/0")
    for _ in range(4):
        with dog.phase("update"):
            time.sleep(SECONDS / 2)
    with dog.phase("sandbox", 100 * SECONDS), dog.phase("more of it", 100 * SECONDS):
        time.sleep(3 * SECONDS)
    dog.close()
    time.sleep(2 * SECONDS)
    assert ended == []


@pytest.mark.parametrize(
    ("family", "cache"), [({}, "none"), ({}, "prefix"), ({}, "dual"), ({"block_length": 2}, "none")], ids=str
)
def test_each_pass_through_the_layers_is_a_beat_in_rollouts(
    tiny_policy: MakePolicy, beats: Beats, family: dict[str, int], cache: str
) -> None:
    policy = tiny_policy(**family)
    beats.dog.beat_on(policy.body)
    settings = {} if family else {"cache": cache, "block_length": 0 if cache == "none" else 3}
    sampler = Sampler(canvas=6, denoising_steps=6, temperature=1.0, has_early_exit=False, **settings)
    (made,) = roll_out(policy, make_requests(1), sampler, seed=0)
    num_prompts = int(policy.family.block_length is not None)  # the blocks of the prompt are read once, for all rows
    assert beats.count == made.num_forwards + num_prompts > 1


@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("is_early", [False, True])
def test_each_pass_is_a_beat_in_training_and_under_the_reference_and_none_after_closing(
    tiny_policy: MakePolicy, beats: Beats, has_adapter: bool, is_early: bool
) -> None:
    policy, batch = tiny_policy(), make_batch()
    if has_adapter:
        policy = add_adapter(policy, rank=2, alpha=4.0, targets=("q_proj",), seed=0)
    if is_early:  # a copy of a module has its hooks
        beats.dog.beat_on(policy.body)
    recipe = make_recipe(loss={"kl_beta": 0.1}, optimizer={"has_gradient_checkpointing": True})
    learner = RLLearner(recipe, policy)
    if not is_early:
        beats.dog.beat_on(*learner.bodies)
    assert len(learner.bodies) == 1 + (not has_adapter)
    everywhere = torch.ones_like(batch.ids, dtype=torch.bool)
    policy.logits_at(batch.ids, batch.pad_lengths, everywhere).sum().backward()
    assert beats.count == 1, "layers that are computed again are no pass"
    with learner.reference.policy() as frozen:
        frozen.logits_at(batch.ids, batch.pad_lengths, everywhere)
    assert beats.count == 2
    beats.dog.close()
    policy.logits_at(batch.ids, batch.pad_lengths, everywhere)
    assert beats.count == 2


def test_events_that_are_no_results_do_not_count(watchdog: Make, ended: list[int]) -> None:
    dog = watchdog()
    events = EventLog()
    events.on_result = dog.moved
    deadline = time.monotonic() + 30
    while not ended and time.monotonic() < deadline:
        events.emit("spawn", worker="roll-0#1")
        time.sleep(0.01)
    assert ended == [75]


def test_a_question_or_a_folder_that_hangs_or_fails_does_not_keep_it_alive(
    watchdog: Make, ended: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = threading.Lock()
    (tmp_path / FILE).mkdir()
    with lock:
        watchdog(state=lambda: str(lock.acquire()))
        wait_until(lambda: bool(ended), 30 + STATE_SECONDS)
    assert ended == [75]
    assert "no progress in phase 'the run'" in capsys.readouterr().err


def test_a_file_system_that_hangs_does_not_keep_it_alive(watchdog: Make, ended: list[int], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)  # opening it waits for a reader
    watchdog()
    wait_until(lambda: bool(ended), 30 + STATE_SECONDS)
    assert ended == [75]


def test_a_process_that_was_stopped_has_not_hung(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom coupled.rl.monitoring.watchdog import Watchdog\n"
        f"Watchdog(2.0, Path({str(tmp_path)!r})).start()\nprint('ready', flush=True)\ntime.sleep(0.5)\n"
        "print('well', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.kill(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "well\n"
    assert process.returncode == 0
