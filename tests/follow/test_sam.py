"""The radius of the ascent is ρ·s, in the common interface, in a two-step closure and round the wrapper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.follow.helpers import AFTER, WARMUP, drive, parameter
from tests.helpers import batch_of, loss_fn, mlp
from warmctl import AdaptiveWarmup, SAMRadius

RHO = 0.05


class SAM(torch.optim.Optimizer):
    """In the interface of the common packages (davda54/sam, pytorch-optimizer)."""

    def __init__(self, params: Any, base: Any, rho: float = RHO, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.ascents: list[float] = []

    @torch.no_grad()
    def first_step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        length = math.sqrt(sum(float(p.grad.square().sum()) for p in params))
        self.moved: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad * (group["rho"] / (length + 1e-12))
                self.moved.append((p, p.detach().clone()))
                p.add_(step)
        self.ascents.append(math.sqrt(sum(float((p - old).square().sum()) for p, old in self.moved)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, old in self.moved:
            p.copy_(old)
        self.base_optimizer.step()
        self.zero_grad()


class Held:
    def __init__(self) -> None:
        self.rho = RHO


@pytest.mark.parametrize("kind", ["attribute", "groups"])
def test_the_radius_is_in_proportion_to_the_scale(kind: str) -> None:
    p = parameter()
    sam: Any = Held() if kind == "attribute" else SAM([p], SGD, lr=0.1)
    place = sam.__dict__ if kind == "attribute" else sam.param_groups[0]
    steps = [*WARMUP, *AFTER]
    seen = drive(SGD([p], lr=0.1), SAMRadius(sam), steps, look=lambda: place["rho"])
    assert seen == [RHO * scale for scale, _ in steps]
    assert place["rho"] is not None and place["rho"] == RHO  # at scale 1 the user's own, to the bit


def test_a_radius_that_somebody_writes_is_the_new_full_one() -> None:
    held, p = Held(), parameter()
    follower = SAMRadius(held)
    drive(SGD([p], lr=0.1), follower, [(0.5, "warmup")])
    held.rho = 0.2
    follower.follow(0.25, 0.0, "warmup")
    assert held.rho == 0.2 * 0.25
    follower.follow(0.5, 0.0, "warmup")
    assert held.rho == 0.2 * 0.5
    follower.detach()
    assert held.rho == 0.2


def test_two_steps_round_the_wrapper_ascend_by_the_radius_of_the_step_before() -> None:
    model = mlp().double()
    sam = SAM(model.parameters(), SGD, lr=5.0)
    opt = AdaptiveWarmup(sam.base_optimizer, model).follow(SAMRadius(sam))
    sam.base_optimizer = opt
    start = sam.param_groups[0]["rho"] / RHO
    for step in range(8):
        x, y = (t.double() for t in batch_of(step))
        loss_fn(model, (x, y)).backward()
        sam.first_step()
        opt.backward(loss_fn(model, (x, y)))
        sam.second_step()
    scales = [start, *opt.history["scale"]]
    assert start < 0.1 and len(set(scales)) > 3
    torch.testing.assert_close(sam.ascents, [RHO * scale for scale in scales[:-1]])


@pytest.mark.filterwarnings("ignore:warmctl:RuntimeWarning")
def test_a_two_step_closure_of_ones_own_reads_the_radius() -> None:
    """The closure cannot be repeated with the gradients that a probe hides from it; that is said once."""
    model, held, read = mlp(), Held(), list[float]()
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=5.0), model).follow(SAMRadius(held))
    params = list(model.parameters())
    for batch in map(batch_of, range(6)):

        def closure(batch: Any = batch) -> Tensor:
            opt.zero_grad()
            loss: Tensor = loss_fn(model, batch)
            loss.backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
            length = torch.cat([g.flatten() for g in gradients]).norm() + 1e-12
            with torch.no_grad():
                old = [p.detach().clone() for p in params]
                torch._foreach_add_(params, torch._foreach_mul(gradients, held.rho / float(length)))
            opt.zero_grad()
            loss_fn(model, batch).backward()
            with torch.no_grad():
                torch._foreach_copy_(params, old)
            return loss

        read.append(held.rho)
        opt.step(closure)
    assert read[1:] == [RHO * scale for scale in opt.history["scale"][:-1]]
    assert all(bool(p.isfinite().all()) for p in params)


@pytest.mark.parametrize(
    ("sam", "error", "words"),
    [
        (SGD([nn.Parameter(torch.ones(1))], lr=0.1), TypeError, "SGD has none"),
        (SAM([nn.Parameter(torch.ones(1))], SGD, rho=0.0, lr=0.1), ValueError, "above 0, got 0.0"),
        (SAM([nn.Parameter(torch.ones(1))], SGD, rho=math.nan, lr=0.1), ValueError, "above 0, got nan"),
    ],
)
def test_what_has_no_radius_is_refused(sam: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        SAMRadius(sam)
