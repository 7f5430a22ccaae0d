from __future__ import annotations

import pytest
import torch
from helpers.toys import MakePolicy

from coupled.rl.model.weights import trainable_state
from coupled.rl.recipe.objective import Optimizer
from coupled.rl.trainer.optimizer import apply_step, learning_rate, make_optimizer

COSINE = Optimizer(learning_rate=1.0, warmup_steps=2, final_fraction=0.1)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.5),
        (1, 1.0),
        (2, 1.0),  # cosine begins at the peak
        (4, 0.1 + 0.9 * 0.8535534),  # a quarter: (1 + cos 45°) / 2
        (6, 0.55),  # half way
        (8, 0.1 + 0.9 * 0.1464466),
        (10, 0.1),
        (15, 0.1),
    ],
)
def test_the_learning_rate_warms_up_and_follows_a_cosine_to_its_final_share(step: int, expected: float) -> None:
    assert learning_rate(step, 10, COSINE) == pytest.approx(expected, abs=1e-6)


def test_a_constant_schedule_stays_at_the_peak_after_the_warm_up() -> None:
    config = Optimizer(learning_rate=3e-4, warmup_steps=3, final_fraction=1.0)
    rates = [learning_rate(step, 6, config) for step in range(6)]
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 3e-4, 3e-4, 3e-4])


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_the_learning_rate_is_positive_and_at_most_the_peak_when_all_is_warm_up_or_none(warmup_steps: int) -> None:
    config = Optimizer(learning_rate=1.0, warmup_steps=warmup_steps)
    rates = [learning_rate(step, 5, config) for step in range(6)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1.0


def test_norms_and_biases_are_not_decayed(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    optimizer = make_optimizer(policy, Optimizer(learning_rate=0.5, weight_decay=0.1, betas=(0.8, 0.9)))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == (0.8, 0.9)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(policy.trainable_parameters())


def test_the_first_adamw_step_matches_the_hand_computation(tiny_policy: MakePolicy) -> None:
    """Adam's first step is the learning rate times the gradient's sign, after decay by rate · weight_decay."""
    policy = tiny_policy()
    weight = policy.model.lm_head.weight
    optimizer = make_optimizer(policy, Optimizer(weight_decay=0.1))
    before = weight.detach().clone()
    weight.grad = torch.where(torch.arange(32) % 2 == 0, 0.01, -0.01).expand(48, 32).clone()
    norm = apply_step(optimizer, policy, 1e-3, 100.0)
    assert norm == pytest.approx(0.01 * (48 * 32) ** 0.5, rel=1e-5)
    expected = before * (1 - 1e-4) - 1e-3 * torch.where(torch.arange(32) % 2 == 0, 1.0, -1.0)
    torch.testing.assert_close(weight.detach(), expected, atol=1e-6, rtol=0)
    assert all(p.grad is None for p in policy.trainable_parameters()), "gradients must not add up over steps"


def test_the_gradient_is_scaled_down_to_the_maximal_norm(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy()
    optimizer = make_optimizer(policy, Optimizer())
    seen: list[float] = []

    def step() -> None:
        seen.append(float(sum(p.grad.square().sum() for p in policy.trainable_parameters()) ** 0.5))

    monkeypatch.setattr(optimizer, "step", step)
    for size, clipped in ((10.0, 0.2), (1e-4, None)):
        for parameter in policy.trainable_parameters():
            parameter.grad = torch.full_like(parameter, size)
        norm = apply_step(optimizer, policy, 1e-3, 0.2)
        assert seen[-1] == pytest.approx(norm if clipped is None else clipped, rel=1e-4)
    assert seen[1] < 0.2, "small gradients are left as they are"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_weights_and_moments_alone(tiny_policy: MakePolicy, bad: float) -> None:
    policy = tiny_policy()
    optimizer = make_optimizer(policy, Optimizer(weight_decay=0.1))
    before = {name: tensor.clone() for name, tensor in trainable_state(policy).items()}
    for parameter in policy.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    policy.model.lm_head.weight.grad[0, 0] = bad
    norm = apply_step(optimizer, policy, 1e-3, 0.2)
    assert not torch.isfinite(torch.tensor(norm))
    assert all(torch.equal(before[name], tensor) for name, tensor in trainable_state(policy).items())
    assert optimizer.state_dict()["state"] == {}
    assert all(p.grad is None for p in policy.trainable_parameters())


def test_each_step_uses_the_rate_it_is_given(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    optimizer = make_optimizer(policy, Optimizer(learning_rate=1.0))
    for rate in (1e-2, 1e-3):
        before = policy.model.lm_head.weight.detach().clone()
        for parameter in policy.trainable_parameters():
            parameter.grad = torch.ones_like(parameter)
        apply_step(optimizer, policy, rate, 1e9)
        assert float((before - policy.model.lm_head.weight).mean().detach()) == pytest.approx(rate, rel=1e-3)
