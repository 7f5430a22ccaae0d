"""Scoring replays what the rollout did; each way in which the two can differ is broken on purpose, and named."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.toys import MakePolicy, make_recipe, make_requests, plain_logits
from torch import Tensor

from coupled.reward import Task
from coupled.rl.errors import RolloutError
from coupled.rl.judging.grader import Grader
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import denoise
from coupled.rl.rollout.engine import policy_engine
from coupled.rl.rollout.parity import (
    NUM_ROLLOUTS,
    NUM_STEPS,
    check_parity,
    prompts_to_check,
    replay_of,
    sampler_for_parity,
)
from coupled.rl.run import Run
from coupled.rl.run_folder.folder import RunFolder
from coupled.rl.types import Prompt, Rollout

pytestmark = pytest.mark.slow

TEMPERATURE = 0.7
SAMPLER = Sampler(canvas=8, denoising_steps=4, temperature=TEMPERATURE)


def prompt_of(token_ids: tuple[int, ...]) -> Prompt:
    return Prompt(task=Task(uid="t", prompt="p", hidden_tests=("assert f(1) == 1",)), token_ids=token_ids)


def rolled_out(policy: Policy, sampler: Sampler = SAMPLER, num: int = 4) -> tuple[list[Prompt], list[Rollout]]:
    """Prompts of 3, 7, 2 and 5 tokens, in one padded batch."""
    requests = make_requests(num)
    return [prompt_of(r.prompt_ids) for r in requests], denoise(policy, requests, sampler, seed=0)


def check(policy: Policy, made: tuple[list[Prompt], list[Rollout]], temperature: float = TEMPERATURE) -> float:
    return check_parity(policy, *made, temperature, 5)


# --- what is replayed ---------------------------------------------------------------------------------------------


def test_a_replay_puts_each_canvas_back_as_it_was_before_the_step(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    prompts, rollouts = rolled_out(policy)
    replay = replay_of(policy, prompts, rollouts)
    made = {r.uid: r for r in rollouts}
    longest, seen = 7, 0
    assert len(replay.uids) == sum(len({s for s in r.commit_step.tolist() if s >= 0}) for r in rollouts)
    for row, (uid, step) in enumerate(zip(replay.uids, replay.steps, strict=True)):
        rollout = made[uid]
        pad = longest - len(rollout.prompt_ids)
        assert replay.pad_lengths[row] == pad
        assert replay.ids[row, pad:].tolist() == [*rollout.prompt_ids, *rollout.canvas_ids.tolist()]
        committed = [s == step for s in rollout.commit_step.tolist()]
        assert any(committed)
        assert replay.committed[row].tolist() == [False] * longest + committed
        assert replay.masked[row].tolist() == [False] * longest + [not 0 <= s < step for s in rollout.commit_step]
        count = sum(committed)
        assert replay.recorded[seen : seen + count].tolist() == rollout.commit_logp[committed].tolist()
        seen += count
    assert seen == len(replay.recorded)


@pytest.mark.parametrize("order", ["entropy", "maskgit", "margin", "origin"])
@pytest.mark.parametrize("shift", [0, 1])
def test_the_record_is_reproduced_to_1e_5(tiny_policy: MakePolicy, shift: int, order: str) -> None:
    policy = tiny_policy(shift=shift, end_scale=3.0)
    made = rolled_out(policy, SAMPLER.changed(order=order), num=8)
    assert any((r.commit_step < 0).any() for r in made[1]), "some canvases are left unfinished"
    assert check(policy, made) <= 1e-5


def test_the_record_is_that_of_a_plain_computation_of_one_row(tiny_policy: MakePolicy) -> None:
    """So that agreement is not of two computations that are wrong alike."""
    policy = tiny_policy()
    prompts, rollouts = rolled_out(policy)
    for rollout in rollouts:
        for step in {s for s in rollout.commit_step.tolist() if s >= 0}:
            canvas = [
                token if 0 <= s < step else policy.mask_id
                for token, s in zip(rollout.canvas_ids.tolist(), rollout.commit_step.tolist(), strict=True)
            ]
            logits = plain_logits(policy, [*rollout.prompt_ids, *canvas])[len(rollout.prompt_ids) :]
            logp = torch.log_softmax(logits / TEMPERATURE, -1).detach()
            for place, s in enumerate(rollout.commit_step.tolist()):
                if s == step:
                    expected = float(logp[place, rollout.canvas_ids[place]])
                    assert float(rollout.commit_logp[place]) == pytest.approx(expected, abs=1e-5)
    assert check(policy, (prompts, rollouts)) <= 1e-5


def test_bfloat16_agrees_within_its_tolerance(tiny_policy: MakePolicy) -> None:
    """Rolled out one by one and scored in a batch."""
    policy = tiny_policy()
    policy.compute_dtype = torch.bfloat16
    requests = make_requests(4)
    made = [denoise(policy, [r], SAMPLER, seed=0)[0] for r in requests]
    assert check(policy, ([prompt_of(r.prompt_ids) for r in requests], made)) <= 0.05
    policy.family = dataclasses.replace(policy.family, shift=0)
    with pytest.raises(RolloutError, match="on average"):
        check(policy, ([prompt_of(r.prompt_ids) for r in requests], made))


def test_the_check_is_small_and_includes_the_shortest_and_the_longest_prompt() -> None:
    prompts = [prompt_of((9,) * n) for n in (5, 40, 2, 30, 17, 8, 8, 11)]
    chosen = [len(p.token_ids) for p in prompts_to_check(prompts)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1], len(chosen)) == (2, 40, NUM_ROLLOUTS)
    assert prompts_to_check(prompts[:1]) == prompts[:1]
    assert sampler_for_parity(Sampler(canvas=256, denoising_steps=256, temperature=1.0, top_p=0.9)) == Sampler(
        canvas=256, denoising_steps=NUM_STEPS, temperature=1.0, top_p=1.0
    )
    assert sampler_for_parity(SAMPLER) == SAMPLER


# --- broken on purpose ----------------------------------------------------------------------------------------------
# Twice each: in the code that scores (the record is right, `logp_at` is not), and as two policies with different
# settings, of which the trainer's is the one that is looked at.


class WrongInScoring(Policy):
    """A policy whose `logp_at` differs from its `logits_at` in one way."""

    slip: str

    def logp_at(
        self, ids: Tensor, pad_lengths: Tensor, rows: Tensor, targets: Tensor, temperature: float = 1.0
    ) -> Tensor:
        if self.slip == "mask token":
            ids = ids.masked_fill(ids == self.mask_id, 3)
        if self.slip == "padding":
            pad_lengths = torch.zeros_like(pad_lengths)
        if self.slip == "temperature":
            temperature = 1.0
        family = self.family
        if self.slip == "logit shift":
            self.family = dataclasses.replace(family, shift=1 - family.shift)
        try:
            return super().logp_at(ids, pad_lengths, rows, targets, temperature)
        finally:
            self.family = family


def wrong_in_scoring(policy: Policy, slip: str) -> Policy:
    wrong = WrongInScoring(policy.model, policy.tokenizer, policy.family)
    wrong.slip = slip
    return wrong


def complaint(policy: Policy, made: tuple[list[Prompt], list[Rollout]], temperature: float = TEMPERATURE) -> str:
    with pytest.raises(RolloutError) as caught:
        check(policy, made, temperature)
    return str(caught.value)


SAID = {
    "mask token": "the rollout used '<mask>' (2), scoring '?' (3)",
    "padding": "Padding must never be attended",
    "temperature": "the rollout used 0.7, scoring 1.",
    "logit shift": "the rollout used 1, scoring 0",
}


@pytest.mark.parametrize("slip", SAID)
def test_a_slip_in_the_scoring_code_is_named(tiny_policy: MakePolicy, slip: str) -> None:
    policy = tiny_policy()
    text = complaint(wrong_in_scoring(policy, slip), rolled_out(policy))
    assert f"The cause is the {slip}: " in text
    assert SAID[slip] in text


def with_mask_id(policy: Policy) -> Policy:
    policy.mask_id = 3
    return policy


def with_shift(policy: Policy) -> Policy:
    policy.family = dataclasses.replace(policy.family, shift=0)
    return policy


def attending_to_padding(policy: Policy) -> Policy:
    for name in ("hidden_at", "hidden_read"):
        plain = getattr(policy, name)
        setattr(policy, name, lambda ids, pads, *rest, plain=plain: plain(ids, torch.zeros_like(pads), *rest))
    return policy


def unchanged(policy: Policy) -> Policy:
    return policy


@pytest.mark.parametrize(
    ("slip", "change", "temperature"),
    [
        ("mask token", with_mask_id, TEMPERATURE),
        ("padding", attending_to_padding, TEMPERATURE),
        ("temperature", unchanged, 1.0),
        ("logit shift", with_shift, TEMPERATURE),
    ],
    ids=list(SAID),
)
def test_a_setting_that_only_the_scoring_side_has_is_named(
    tiny_policy: MakePolicy, slip: str, change: Callable[[Policy], Policy], temperature: float
) -> None:
    made = rolled_out(tiny_policy())
    text = complaint(change(tiny_policy()), made, temperature)
    assert f"The cause is the {slip}: " in text
    assert SAID[slip] in text


def test_a_rollout_that_attends_to_its_padding_is_named(tiny_policy: MakePolicy) -> None:
    text = complaint(tiny_policy(), rolled_out(attending_to_padding(tiny_policy())))
    assert "The cause is the padding: the rollout attended to all positions, scoring the real ones" in text


def test_what_none_of_the_four_explains_is_said_so(tiny_policy: MakePolicy) -> None:
    text = complaint(tiny_policy(seed=1), rolled_out(tiny_policy(seed=0)))
    assert "Neither the mask token, nor padding, nor the temperature, nor the shift explains it alone" in text
    assert "other weights" in text
    both = complaint(with_shift(with_mask_id(tiny_policy())), rolled_out(tiny_policy()))
    assert "Neither the mask token" in both


def test_the_message_states_rule_value_and_place(tiny_policy: MakePolicy) -> None:
    policy, made = tiny_policy(), rolled_out(tiny_policy())
    text = complaint(policy, made, 1.0)
    found = re.search(
        r"within 1e-05 nats; of (\d+) tokens of 4 rollouts (\d+) differ, most by ([\d.e+-]+): (request-\d), step (\d), "
        r"canvas position (\d), drawn with (\S+) and scored (\S+)\. The cause",
        text,
    )
    assert found, text
    total, num, most, uid, step, place, drawn, scored = found.groups()
    rollout = next(r for r in made[1] if r.uid == uid)
    assert int(num) <= int(total) == sum(int((r.commit_step >= 0).sum()) for r in made[1])
    assert rollout.commit_step[int(place)] == int(step)
    assert float(rollout.commit_logp[int(place)]) == pytest.approx(float(drawn), rel=1e-3)
    assert float(most) == pytest.approx(abs(float(drawn) - float(scored)), abs=2e-3)


def test_a_temperature_that_is_a_little_off_is_found_to_four_digits(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    made = rolled_out(policy, SAMPLER.changed(temperature=0.8667))
    assert "the temperature: the rollout used 0.8667, scoring 0.9." in complaint(policy, made, 0.9)


# --- in a run -------------------------------------------------------------------------------------------------------


def toy_run(policy: Policy, engine_policy: Policy, folder: Path, **sections: object) -> Run:
    rollout = {"canvas": 6, "denoising_steps": 6, "temperature": 1.3, "top_p": 0.8}
    recipe = make_recipe(**({"rollout": rollout, "num_steps": 2} | sections))
    prompts = [prompt_of(tuple(range(4, 4 + n))) for n in (3, 6, 1, 9, 4)]
    # An engine that does not hold the trainer's policy, as one outside this process would not.
    engine = policy_engine(engine_policy, 4)
    return Run(recipe, policy, prompts, [], Grader.__new__(Grader), RunFolder(folder, keep=1), engine)


def test_a_run_checks_its_engine_before_it_trains(
    tiny_policy: MakePolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_run(tiny_policy(), tiny_policy(), tmp_path).check_parity()
    assert "scoring agrees with 4 replayed rollouts within" in capsys.readouterr().out
    with pytest.raises(RolloutError, match="The cause is the logit shift: the rollout used 1, scoring 0"):
        toy_run(with_shift(tiny_policy()), tiny_policy(), tmp_path).check_parity()


def test_a_run_that_scores_at_another_temperature_than_it_should_is_refused(
    tiny_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = tiny_policy()
    run = toy_run(policy, policy, tmp_path)
    run.learner.temperature = 1.0
    with pytest.raises(RolloutError, match=r"the temperature: the rollout used 1\.3, scoring 1\."):
        run.check_parity()
    toy_run(policy, policy, tmp_path, estimator={"temperature": 1.0}).check_parity()


def test_the_check_takes_no_random_number_from_the_run(tiny_policy: MakePolicy, tmp_path: Path) -> None:
    policy = tiny_policy()
    before = denoise(policy, make_requests(3), SAMPLER, seed=0)
    toy_run(policy, policy, tmp_path).check_parity()
    after = denoise(policy, make_requests(3), SAMPLER, seed=0)
    assert [r.canvas_ids.tolist() for r in before] == [r.canvas_ids.tolist() for r in after]
