"""The rules of optimizers from other packages, held against those optimizers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.stability.quadratic import (
    LONG_RUN,
    SIZE,
    Make,
    all_parameters,
    arguments,
    at_ratio,
    fate,
    flat,
    normal,
    parameters,
    random_steps,
    rule_of,
    set_gradients,
)
from warmctl.stability.update_rules import stability_threshold, update_rule

schedulefree: Any = pytest.importorskip("schedulefree")
pytorch_optimizer: Any = pytest.importorskip("pytorch_optimizer")

FREE = {
    "SGD": partial(schedulefree.SGDScheduleFree, lr=0.3, momentum=0.8),
    "AdamW": partial(schedulefree.AdamWScheduleFree, lr=0.3, betas=(0.8, 0.99)),
}
ADAPTIVE = {"AdaBelief": pytorch_optimizer.AdaBelief, "ADOPT": pytorch_optimizer.ADOPT}
DECAYS = {"none": {}, "coupled": {"weight_decay": 0.3, "weight_decouple": False},
          "decoupled": {"weight_decay": 0.02, "weight_decouple": True}}  # fmt: skip


def step_of(optimizer: Optimizer) -> Tensor:
    before = flat(all_parameters(optimizer))
    optimizer.step()
    return before - flat(all_parameters(optimizer))


def long_after(make: Make) -> Make:
    def made(params: list[Tensor]) -> Optimizer:
        optimizer: Any = make(params)
        for group in optimizer.param_groups:
            group |= {"step": LONG_RUN, "k": LONG_RUN, "weight_sum": 1e12}
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer  # type: ignore[no-any-return]

    return made


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_edge(name: str, decay: str) -> None:
    make = long_after(partial(ADAPTIVE[name], lr=1.0, betas=(0.9, 0.99), **DECAYS[decay]))
    for target, expected in ((0.98, "trains"), (1.02, "diverges")):
        assert fate(at_ratio(make, LONG_RUN, target)) == expected


def test_decay_by_the_same_part_whatever_the_rate() -> None:
    optimizer = pytorch_optimizer.AdaBelief(
        parameters(), lr=1e-3, weight_decay=0.3, weight_decouple=True, fixed_decay=True
    )
    assert stability_threshold(optimizer) == [pytest.approx(38 * (1 - 0.3 / 2))]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", FREE)
def test_edge_of_schedule_free(name: str, decay: float) -> None:
    """Long after the start, where the average stands still."""
    for target, expected in ((0.98, "trains"), (1.02, "diverges")):
        optimizer = at_ratio(long_after(partial(FREE[name], weight_decay=decay)), 1, target)
        for p in all_parameters(optimizer):
            optimizer.state[p]["z"] = p.detach() / (1 - 0.8)  # the average at the minimum
        assert fate(optimizer, momentum=("z",)) == expected


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", FREE)
def test_root_of_schedule_free_is_at_minus_one(name: str, steps: int) -> None:
    """At the ratio 1 and any weight of the average, a step turns the parameters and z round."""
    (p,) = params = [torch.ones(1, dtype=torch.float64, requires_grad=True)]
    optimizer: Any = FREE[name](params, weight_lr_power=0.0, r=1.0)
    optimizer.train()
    for number in range(steps):
        p.grad = normal(number, 1)
        optimizer.step()
    group, rule = optimizer.param_groups[0], rule_of(optimizer)
    new = (steps + 1) / sum(range(1, steps + 2))
    z = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        p.copy_(0.2 * z + 0.8 * new / (2 - new) * z)
    if steps == 0:
        assert new == 1 and p == z  # z begins as the parameters
    else:
        optimizer.state[p]["z"] = z.clone()
    before = p.detach().clone()
    p.grad = before.clone()
    (scale,) = rule.scale(*arguments(optimizer, group))
    group["lr"] /= float(scale)  # a curvature of 1 is at the edge
    optimizer.step()
    torch.testing.assert_close(p.detach(), -before)
    torch.testing.assert_close(optimizer.state[p]["z"], -z)


@pytest.mark.parametrize("next_step", [2, 5, 50])
@pytest.mark.parametrize("decay", ["none", "coupled"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_step_from_an_empty_momentum(name: str, decay: str, next_step: int) -> None:
    """(1 − β₁) g η / (q P), which ADOPT clips."""
    optimizer = ADAPTIVE[name](parameters(), lr=0.1, betas=(0.9, 0.99), **DECAYS[decay])
    (group,), rule = optimizer.param_groups, rule_of(optimizer)
    random_steps(optimizer, 3)
    for p in all_parameters(optimizer):
        optimizer.state[p]["exp_avg"].zero_()
    group["step"] = next_step - 1
    gradient = 0.01 * normal(4, SIZE)
    set_gradients(group["params"], gradient)
    seen = gradient + rule.coupled_decay(group) * flat(group["params"])
    expected = flat(rule.scale(*arguments(optimizer, group))) * 38 * (1 - 0.9) * seen
    torch.testing.assert_close(step_of(optimizer), expected, rtol=1e-6, atol=1e-12)


def test_first_step_of_adopt_moves_nothing() -> None:
    optimizer = pytorch_optimizer.ADOPT(parameters(), lr=0.1)
    set_gradients(all_parameters(optimizer), normal(4, SIZE))
    scale = flat(rule_of(optimizer).scale(*arguments(optimizer, optimizer.param_groups[0])))
    assert not scale.any() and not step_of(optimizer).any()


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW4bit"])
def test_moments_in_few_bits(name: str) -> None:
    cls = getattr(pytest.importorskip("torchao.optim"), name)
    torch.manual_seed(0)
    (p,) = params = [nn.Parameter(torch.randn(64, 128))]
    optimizer = cls(params, lr=0.1, betas=(0.0, 0.9), weight_decay=0.3)
    rule, (group,) = rule_of(optimizer), optimizer.param_groups
    with torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            p.grad = torch.randn_like(p)
            (scale,) = rule.scale(*arguments(optimizer, group))
            before = p.detach().clone()
            optimizer.step()
            coupled, decoupled = rule.coupled_decay(group), rule.decoupled_decay(group)
            assert {coupled, decoupled} == {0.0, 0.3}
            expected = 2 * scale * (p.grad + coupled * before) + 0.1 * decoupled * before
            torch.testing.assert_close(before - p.detach(), expected, rtol=1e-4, atol=1e-6)
    assert type(optimizer.state[p]["exp_avg_sq"]) is not Tensor


@pytest.mark.parametrize("option", ["rectify", "ams_bound", "maximize", "cautious"])
def test_an_option_that_makes_another_rule_of_it(option: str) -> None:
    assert update_rule(pytorch_optimizer.AdaBelief) is not None
    assert update_rule(pytorch_optimizer.AdaBelief(parameters(), **{option: True})) is None
