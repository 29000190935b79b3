"""Several optimizers on one model, in the usual two-line loop: one probe serves them all."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian  # type: ignore[attr-defined]
from torch.optim import SGD, Adam, AdamW, Optimizer

from tests.helpers import assert_same, batch_of, loss_fn, mlp, weights
from tests.integrations.helpers import decisions, failures
from warmctl import AdaptiveWarmup, stability_threshold
from warmctl.stability.update_rules import update_rule

Muon: Any = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(Muon is None, reason="torch.optim.Muon is younger than this torch")


class Net(nn.Module):
    """Returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(x), y)}

    @property
    def matrices(self) -> list[Tensor]:
        return [p for p in self.parameters() if p.dim() == 2]

    @property
    def rest(self) -> list[Tensor]:
        return [p for p in self.parameters() if p.dim() != 2]


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x[:, :3].argmax(-1)


def train(model: nn.Module, optimizers: Sequence[Any], steps: range = range(10)) -> None:
    for step in steps:
        for opt in optimizers:
            opt.zero_grad()
        model(*batch(step))["loss"].backward()
        for opt in optimizers:
            opt.step()


def muon_and_adamw(model: Net, rate: float = 0.02) -> list[Optimizer]:
    return [Muon(model.matrices, lr=rate, weight_decay=0.0), AdamW(model.rest, lr=rate / 4)]


def sgd_and_adam(model: Net, rate: float = 0.1) -> list[Optimizer]:
    return [SGD(model.matrices, lr=rate, momentum=0.9, weight_decay=1e-2), Adam(model.rest, lr=rate / 10)]


PAIRS = {"SGD, Adam": sgd_and_adam, "Muon, AdamW": muon_and_adamw}
pairs = pytest.mark.parametrize(
    "pair", [pytest.param(name, marks=needs_muon if "Muon" in name else ()) for name in PAIRS]
)


@pytest.mark.stack("two optimizers", "one line changed")
@pairs
def test_monitored_each_steps_as_it_does_alone(pair: str) -> None:
    bare, model = Net(), Net()
    train(bare, PAIRS[pair](bare))
    members = PAIRS[pair](model)
    decays = [torch.optim.lr_scheduler.StepLR(member, 100) for member in members]
    opt = AdaptiveWarmup(members, model, control=False, every=2)
    train(model, [opt])
    assert_same(weights(model), weights(bare))
    assert opt.metrics["probes"] >= 4 and not failures(list(opt.history))
    assert [decay.get_last_lr() for decay in decays] == [[g["lr"]] for g in opt.param_groups]


@pairs
def test_one_scale_for_all_and_rates_far_too_high_train(pair: str) -> None:
    model = Net()
    opt = AdaptiveWarmup(PAIRS[pair](model, rate=30.0), model)
    before = float(model(*batch(99))["loss"])
    train(model, [opt], range(40))
    rows = list(opt.history)
    assert 0.0 < rows[-1]["scale"] < 0.5 and not failures(rows)
    assert [group["lr"] for group in opt.param_groups] == [m.param_groups[0]["lr"] for m in PAIRS[pair](Net(), 30.0)]
    assert float(model(*batch(99))["loss"]) < before


def test_two_halves_of_one_optimizer_are_that_optimizer() -> None:
    rows = []
    for halves in (False, True):
        model = Net()
        groups = [{"params": model.matrices, "lr": 0.3}, {"params": model.rest, "lr": 0.1}]
        base: Any = [Adam([group]) for group in groups] if halves else Adam(groups)
        opt = AdaptiveWarmup(base, model, every=1)
        train(model, [opt])
        rows.append(decisions(list(opt.history)))
    assert rows[0] == rows[1]


def test_the_first_ratio_against_the_dense_hessian() -> None:
    """λ_max(D^½ (H + c) D^½) with each member's own D and c; the parameters of the two are coupled in H."""
    model = Net()
    members = sgd_and_adam(model)
    names, params = zip(*model.named_parameters(), strict=True)
    shapes, sizes = [p.shape for p in params], [p.numel() for p in params]

    rows = batch(0)

    def loss(flat: Tensor) -> Any:
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return functional_call(model, dict(zip(names, parts, strict=True)), rows)["loss"]

    flat = weights(model)
    grads = dict(zip(params, torch.autograd.grad(model(*batch(0))["loss"], params), strict=True))
    scale, decay = [], []
    for p in params:
        (member,) = [m for m in members if any(q is p for q in m.param_groups[0]["params"])]
        rule, group = update_rule(member), member.param_groups[0]
        assert rule is not None
        scale.append(rule.scale([p.detach()], [grads[p]], [{}], group)[0].flatten())
        decay.append(torch.full_like(scale[-1], rule.coupled_decay(group)))
    root = torch.cat(scale).sqrt()
    dense = root[:, None] * (hessian(loss)(flat) + torch.cat(decay).diag()) * root
    opt = AdaptiveWarmup(members, model, control=False, probe_steps=40, hvp="double_backward")
    train(model, [opt], range(1))
    assert opt.meter.last is not None
    share = 0.1  # of Adam's first step, the smaller: 1 - 0.9
    assert opt.meter.last.ratio == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]) * share, rel=1e-3)
    assert stability_threshold(opt) == pytest.approx([3.8, 38.0])


@pairs
def test_saved_and_resumed_in_mid_warmup(pair: str) -> None:
    model = Net()
    opt = AdaptiveWarmup(PAIRS[pair](model), model, every=3)
    train(model, [opt], range(8))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, [opt], range(8, 16))
    other = Net()
    resumed = AdaptiveWarmup(PAIRS[pair](other), other, every=3)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, [resumed], range(8, 16))
    assert_same(weights(other), weights(model))
    assert decisions(list(resumed.history)) == decisions(list(opt.history))[8:]
    broken = copy.deepcopy(saved[1])
    broken["param_groups"][0]["warmctl"][5] = float("nan")
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(ValueError):
        resumed.load_state_dict(broken)
    assert_same(resumed.state_dict()["state"], before["state"])
    assert [set(member.state) for member in resumed.base.members] == [
        {p for p in member.param_groups[0]["params"]} for member in resumed.base.members
    ]


def test_lists_that_cannot_work() -> None:
    model = Net()
    adam = Adam(model.parameters())
    with pytest.raises(ValueError, match="empty: give at least one"):
        AdaptiveWarmup([], model)
    with pytest.raises(ValueError, match="in two of the optimizers"):
        AdaptiveWarmup([adam, SGD(model.rest, 0.1)], model)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Net"):
        AdaptiveWarmup([adam, model], model)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="LBFGS chooses its own step length"):
        AdaptiveWarmup([torch.optim.LBFGS(model.parameters())], model)
    with pytest.raises(ValueError, match="add the group to one of the optimizers"):
        AdaptiveWarmup([adam], model).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


@needs_muon
def test_the_member_without_a_rule_is_named() -> None:
    """Nobody has made the chain that holds them."""
    model = mlp()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    opt = AdaptiveWarmup([Muon(matrices, lr=0.02), AdamW(rest, lr=0.01)], model)
    opt.backward(loss_fn(model, batch_of(0)))
    with pytest.raises(RuntimeError, match=r"backward\(loss\) cannot measure Muon: "):
        opt.step()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_measures_its_own_members(duplicate: Any) -> None:
    model = Net()
    opt = AdaptiveWarmup(PAIRS["SGD, Adam"](model), model, every=1)
    train(model, [opt], range(4))
    other, twin = duplicate((model, opt))
    for net, run in ((model, opt), (other, twin)):
        train(net, [run], range(4, 8))
    assert decisions(list(twin.history)) == decisions(list(opt.history))
    assert_same(weights(other), weights(model))
    assert math.isfinite(twin.metrics["sharpness"]) and twin.counts.probes == opt.counts.probes > 5
