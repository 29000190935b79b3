"""The collection: who is told what, who is dropped, what is put back, saved and resumed."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import warmctl
from tests.follow.helpers import Listener
from tests.helpers import assert_same, batch_of, closure_for, everything, mlp, noisy_net, train
from warmctl import (
    AdaptiveWarmup,
    BatchNormMomentum,
    Difficulty,
    Dither,
    EasyFirst,
    Momentum,
    SAMRadius,
    Unfreezing,
    Vitals,
    WeightDecay,
)
from warmctl.follow.follower import Levers

END = 30


class Radius:
    def __init__(self) -> None:
        self.rho = 0.05


def adam(model: nn.Module, **options: Any) -> AdaptiveWarmup:
    groups = [{"params": list(m.parameters()), "lr": 0.5 if i else 0.3} for i, m in enumerate((model[0], model[1:]))]
    return AdaptiveWarmup(torch.optim.AdamW(groups, weight_decay=0.1), model, **options)


def all_of_them(model: nn.Module) -> list[Any]:
    return [
        SAMRadius(Radius()),
        BatchNormMomentum(model),
        WeightDecay("delay"),
        Difficulty(EasyFirst(range(100))),
        Dither(period=8, amplitude=0.3, quiet=100.0),
        Momentum(low=0.5),
        Unfreezing([model[4], model[:4]], every=7),
        Vitals(model, every=5),
    ]


def test_a_follower_is_told_the_scale_the_applied_rate_and_the_phase_of_every_step() -> None:
    model, listener = mlp(), Listener()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=3.0), model, max_warmup=20)
    assert opt.follow(listener) is opt
    train(opt, model, range(END))
    rows = opt.history
    assert listener.told == list(zip(rows["scale"], rows["lr"], rows["phase"], strict=True))
    assert {phase for *_, phase in listener.told} == {"warmup", "guard"}


def test_the_rate_told_is_of_the_first_group_that_trains() -> None:
    model, listener = mlp(), Listener()
    model[0].requires_grad_(False)
    opt = adam(model).follow(listener)
    train(opt, model, range(3))
    assert [rate for _, rate, _ in listener.told] == opt.history["lr"]
    assert opt.history["scheduled_lr"] == [0.5] * 3


@pytest.mark.parametrize("options", [{}, {"max_warmup": 4, "after": "hold"}, {"control": False}])
def test_who_only_listens_changes_nothing(options: dict[str, Any]) -> None:
    runs = []
    for followers in ([], [Listener()]):
        model = noisy_net()
        opt = adam(model, **options)
        opt.follow(*followers, *([Vitals(model, every=3)] if followers else []))
        train(opt, model, range(END))
        runs.append(everything(model, opt))
    assert_same(*runs)


def test_without_control_nothing_is_moved() -> None:
    """Bitwise the bare optimizer, with every follower there is; radius, momentum and difficulty as they were."""
    model, bare_model = noisy_net(), noisy_net()
    opt = adam(model, control=False)
    followers = all_of_them(model)
    opt.follow(*followers)
    bare = adam(bare_model).base
    for step in range(END):
        torch.manual_seed(step)
        opt.step(closure_for(opt, model, batch_of(step)))
        torch.manual_seed(step)
        bare.step(closure_for(bare, bare_model, batch_of(step)))
    assert_same(everything(model, opt), everything(bare_model, bare))
    assert followers[0].sam.rho == 0.05 and model[1].momentum == 0.1 and followers[3].sampler.difficulty == 1.0
    assert followers[7].sampled >= END // 5  # it only watches
    assert "vitals/0/gradient" in opt.metrics and "rho" not in opt.metrics


def test_one_that_raises_is_dropped_with_a_word_and_training_goes_on() -> None:
    class Failing(Listener):
        def follow(self, scale: float, rate: float, phase: str) -> None:
            super().follow(scale, rate, phase)
            if len(self.told) == 3:
                raise RuntimeError("the sampler is gone\nand more")

        def state_dict(self) -> dict[str, float]:
            return {"told": float(len(self.told))}

    model, failing, other = mlp(), Failing(), Listener()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=3.0), model).follow(failing, other)
    with pytest.warns(RuntimeWarning, match="Failing raised RuntimeError: the sampler is gone. It no longer") as said:
        train(opt, model, range(10))
    assert len([w for w in said if "Failing" in str(w.message)]) == 1
    assert len(failing.told) == 3 and len(other.told) == len(opt.history) == 10

    fresh_model, fresh = mlp(), Failing()
    resumed = AdaptiveWarmup(torch.optim.SGD(fresh_model.parameters(), lr=3.0), fresh_model).follow(fresh, Listener())
    resumed.load_state_dict(opt.state_dict())
    train(resumed, fresh_model, range(10, 12))
    assert not fresh.told  # dropped is dropped


def test_what_a_dropped_follower_had_moved_is_put_back() -> None:
    class Fragile(SAMRadius):
        def follow(self, scale: float, rate: float, phase: str) -> None:
            super().follow(scale, rate, phase)
            assert len(opt.history) < 2

    model, radius = mlp(), Radius()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=3.0), model).follow(Fragile(radius))
    assert radius.rho < 0.05
    with pytest.warns(RuntimeWarning, match="Fragile raised AssertionError"):
        train(opt, model, range(4))
    assert radius.rho == 0.05


def test_values_are_lent_for_one_update_and_what_somebody_writes_meanwhile_stays() -> None:
    base = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9)
    levers, group = Levers(base), base.param_groups[0]
    levers.lend(group, "momentum", 0.5)
    levers.lend(group, "momentum", 0.4)
    assert group["momentum"] == 0.4
    levers.put_back()
    assert group["momentum"] == 0.9
    levers.lend(group, "momentum", 0.5)
    group["momentum"] = 0.7
    levers.put_back()
    assert group["momentum"] == 0.7
    for factor in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cannot be multiplied"):
            levers.multiply_rate(0, factor)


def test_groups_are_the_users_own_between_steps() -> None:
    model = noisy_net()
    opt = adam(model).follow(WeightDecay("compensate"), Momentum(low=0.5), Dither(4, 0.5, quiet=1e9))
    seen: list[dict[str, Any]] = []
    opt.register_step_post_hook(lambda base, *_: seen.append(dict(base.param_groups[0])))
    before = [{k: v for k, v in g.items() if k not in ("params", "warmctl")} for g in opt.param_groups]
    train(opt, model, range(5))
    assert [{k: v for k, v in g.items() if k not in ("params", "warmctl")} for g in opt.param_groups] == before
    assert all(g["betas"][0] < 0.9 and g["weight_decay"] > 0.1 for g in seen)
    assert [g["lr"] for g in seen] == opt.history["lr"]


@pytest.mark.parametrize("stop", [3, 7, 12, 20])
@pytest.mark.parametrize("which", [*range(8), "all"])
def test_resuming_is_bit_for_bit(which: Any, stop: int) -> None:
    """Through torch.save, with weights_only; what a follower holds outside of the optimizer too."""

    def build() -> tuple[Any, AdaptiveWarmup, list[Any]]:
        model = noisy_net()
        followers = all_of_them(model)
        opt = adam(model, max_warmup=15)
        return model, opt, followers if which == "all" else [followers[which]]

    def go_on(model: Any, opt: Any, followers: list[Any], steps: range) -> list[Any]:
        rows = []
        for step in steps:
            torch.manual_seed(step)
            rows += train(opt, model, [step])
        outside = [getattr(getattr(f, "sam", getattr(f, "sampler", None)), "__dict__", None) for f in followers]
        return [rows, everything(model, opt), outside, model[1].momentum, [p.requires_grad for p in model.parameters()]]

    unbroken, fresh = build(), build()
    for run in (unbroken, fresh):
        run[1].follow(*run[2])
    go_on(*unbroken, range(stop))
    buffer = io.BytesIO()
    torch.save([unbroken[0].state_dict(), unbroken[1].state_dict()], buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    fresh[0].load_state_dict(weights)
    fresh[1].load_state_dict(state)
    expected, found = go_on(*unbroken, range(stop, END)), go_on(*fresh, range(stop, END))
    for rows in (expected[0], found[0]):
        for row in rows:  # the weights of before the sample that the checkpoint fell before are not saved
            for name in [n for n in row if n.startswith("vitals/") and n.endswith("/update")]:
                del row[name]
    known = set(found[0][0])
    expected[0] = [
        {k: v for k, v in row.items() if k in known or k in found[0][i]} for i, row in enumerate(expected[0])
    ]
    assert_same(found, expected)


def test_a_state_of_other_followers_is_refused_and_nothing_is_changed() -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=3.0), model).follow(Difficulty(EasyFirst(range(9))))
    train(opt, model, range(4))
    state = copy.deepcopy(opt.state_dict())
    other_model, radius = mlp(), Radius()
    other = AdaptiveWarmup(torch.optim.SGD(other_model.parameters(), lr=3.0), other_model).follow(SAMRadius(radius))
    before = radius.rho
    with pytest.raises(ValueError, match=r"saved with other followers \(opt.follow\)"):
        other.load_state_dict(state)
    assert radius.rho == before


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.5, float("inf")])
def test_an_impossible_state_is_refused_and_nothing_is_changed(value: float) -> None:
    model = mlp()
    sampler = EasyFirst(range(9))
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=3.0), model).follow(Difficulty(sampler))
    train(opt, model, range(4))
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["warmctl"][-1] = value  # how many were drawn
    before = copy.deepcopy(sampler.__dict__), opt.metrics
    with pytest.raises(ValueError, match="drawn"):
        opt.load_state_dict(state)
    assert_same([sampler.__dict__, opt.metrics], list(before))


def test_old_checkpoints_load_where_nothing_follows_and_bare_ones_where_something_does() -> None:
    model = mlp()
    bare = torch.optim.SGD(model.parameters(), lr=3.0)
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=3.0), model)
    size = len(opt.param_groups[0]["warmctl"])
    opt.follow(SAMRadius(Radius()))
    assert len(opt.param_groups[0]["warmctl"]) > size
    opt.load_state_dict(bare.state_dict())
    assert opt.phase == "warmup"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "objects with a method follow"),
        (Momentum, "got Momentum; give an instance of it"),
        (lambda *_: None, "got function"),
    ],
)
def test_what_cannot_follow_is_named(given: Any, words: str) -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=3.0), model)
    with pytest.raises(TypeError, match=words):
        opt.follow(given)


def test_no_follower_twice() -> None:
    model, listener = mlp(), Listener()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=3.0), model).follow(listener)
    with pytest.raises(ValueError, match="Listener follows already"):
        opt.follow(listener)


def test_readings_are_columns_of_the_history_and_metrics() -> None:
    model, radius = mlp(), Radius()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=3.0), model)
    train(opt, model, range(2))
    opt.follow(SAMRadius(radius))
    train(opt, model, range(2, 5))
    assert opt.history["rho"] == [None, None, *(0.05 * scale for scale in opt.history["scale"][2:])]
    assert opt.metrics["rho"] == radius.rho == opt.history[-1]["rho"]


def test_copies_follow_on_their_own() -> None:
    model, sampler = mlp(), EasyFirst(range(9))
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=3.0), model).follow(Difficulty(sampler))
    train(opt, model, range(3))
    twin_model, twin = copy.deepcopy((model, opt))
    before = sampler.difficulty
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(twin, twin_model, range(3, 9))
    assert sampler.difficulty == before and twin.metrics["difficulty"] != before


def test_every_name_of_the_contract_is_public() -> None:
    names = ["SAMRadius", "BatchNormMomentum", "WeightDecay", "Difficulty", "Dither", "Momentum", "Unfreezing"]
    assert not [name for name in [*names, "Vitals", "Follower"] if not hasattr(warmctl, name)]
