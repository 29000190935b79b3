"""A state that is not one of ours is refused, by the name of the field, and everything is as it was before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from tests.helpers import OwnLoss, assert_same, batch_of, closure_for, everything, mlp, own_loss, train
from warmctl import AdaptiveWarmup
from warmctl.checkpoint import AVERAGE, NUMBERS, VECTOR
from warmctl.common_rate import CommonRate
from warmctl.follow.followers import Followers
from warmctl.loss.captured import CapturedSource
from warmctl.loss.live_graph import LiveGraph
from warmctl.loss.source import Verdict
from warmctl.stability.measurement import Measurement
from warmctl.stability.meter import Meter
from warmctl.stability.signals import StepSignals
from warmctl.state import FloatState

Run = tuple[nn.Module, AdaptiveWarmup]
State = dict[str, Any]


FOUND = ["there", *(entry.name for entry in fields(Measurement) if entry.name != "reason")]
NAMES_OF: dict[type, list[str]] = {
    CommonRate: ["first rate of group 0", "first rate of group 1"],
    Followers: [],
    LiveGraph: ["wanted", "passes_before"],
    CapturedSource: ["enabled", "trained_on", "scaled"],
    Verdict: ["repeats"],
    Meter: ["method", "rate", "representation_change", *(f"{r}_{n}" for r in ("last", "along") for n in FOUND)],
    StepSignals: [
        *("awaited_loss", "awaited_square", "along", "length", "gradients", "known"),
        *("end_slope", "sent", "followed"),
    ],
}


def built(optimizer_class: Any = torch.optim.AdamW, steps: int = 6, seed: int = 0, **options: Any) -> Run:
    model = mlp(seed)
    first, last = model[0].parameters(), model[-1].parameters()
    groups = [{"params": first}, {"params": last, "lr": 0.02}]
    run = model, AdaptiveWarmup(optimizer_class(groups, lr=0.03), model, **{"every": 2, "max_warmup": 5} | options)
    train(run[1], run[0], range(steps))
    return run


def all_of(run: Run) -> dict[str, Any]:
    """What loading may write to, copied, and which objects hold it."""
    model, opt = run
    holders = opt.param_groups, opt.state, opt.controller.state, opt.cadence.state, opt.meter.estimator.vector
    return {
        **everything(model, opt),
        "metrics": opt.metrics,
        "saved": copy.deepcopy(opt.state_dict()),
        "recording": [opt.sources.captured.capture.enabled, len(model._forward_hooks), opt.sources.watch.marking],
        "holders": [id(holder) for holder in (*holders, *opt.param_groups)],
        "last": repr(opt.meter.last),
    }


@cache
def number_names() -> list[str]:
    """Of all that is saved, in order. Of equal names the first counts: the controller comes before the cadence."""
    names = ["format"]
    for part in built(steps=0)[1]._parts():
        own = list(vars(part)) if isinstance(part, FloatState) else NAMES_OF[type(part)]
        assert len(own) == len(part.state_values()), type(part)
        names += own
    return names


def put(name: str, value: float) -> Callable[[State], None]:
    """Damage: this value in place of the number of that name."""
    index = number_names().index(name)

    def damage(saved: State) -> None:
        saved["param_groups"][0][NUMBERS][index] = value

    return damage


def whole(value: Any) -> Callable[[State], None]:
    return lambda saved: saved["param_groups"][0].update({NUMBERS: value})


def vectors(change: Callable[[Any], Any], name: str = VECTOR) -> Callable[[State], None]:
    def damage(saved: State) -> None:
        for entry in saved["state"].values():
            entry[name] = change(entry[name])

    return damage


def group(index: int, **values: Any) -> Callable[[State], None]:
    return lambda saved: saved["param_groups"][index].update(values)


DAMAGE: dict[str, tuple[Callable[[State], Any], str]] = {
    **{f"scale {v}": (put("scale", v), "scale is") for v in (-1.0, 0.0, 100.0, math.nan, math.inf, -math.inf)},
    **{f"phase {v}": (put("phase", v), "phase is") for v in (-1.0, 0.5, 3.0, 1e300, math.nan)},
    **{f"method {v}": (put("method", v), "method is") for v in (-1.0, 1.5, 4.0, math.inf, math.nan)},
    "share": (put("share", 0.0), "share is"),
    "forecast": (put("forecast", -1.0), "forecast is"),
    "shortening": (put("shortening", 0.0), "shortening is"),
    "change over rate": (put("per_rate", -1.0), "per_rate is"),
    "mean slope": (put("mean", -1.5), "mean is"),
    "highest rate": (put("highest", math.nan), "highest is"),
    "next look": (put("next_look", math.nan), "next_look is"),
    "next slope": (put("next_slope", -1.0), "next_slope is"),
    "representation change": (put("representation_change", -1.0), "representation_change is"),
    "end slope": (put("end_slope", 1.5), "end_slope is"),
    "followed": (put("followed", 0.5), "followed is"),
    "steps": (put("steps", math.nan), "steps is"),
    "steps in part": (put("steps", 2.5), "steps is"),
    "repeats": (put("repeats", 0.3), "repeats is"),
    "rate": (put("rate", -1.0), "rate is"),
    "hvps": (put("last_hvps", math.inf), "last_hvps is"),
    "format": (put("format", math.nan), "format nan"),
    "no numbers": (whole(torch.zeros(0)), "warmctl"),
    "words": (whole("warmctl"), "warmctl"),
    "none": (whole(None), "warmctl"),
    "nested": (whole(torch.zeros(2, 2)), "warmctl"),
    "vector of nan": (vectors(lambda v: v * math.nan), "warmctl_vector"),
    "vector too long": (vectors(lambda v: v * 1e9), "warmctl_vector"),
    "vector of words": (vectors(lambda v: "v"), "warmctl_vector"),
    "vector of integers": (vectors(lambda v: v.long()), "warmctl_vector"),
    "vector cut short": (vectors(lambda v: v[:-1]), "shape"),
    "average of nan": (vectors(lambda v: v * math.nan, AVERAGE), "warmctl_average"),
    "average of words": (vectors(lambda v: "v", AVERAGE), "warmctl_average"),
    "average cut short": (vectors(lambda v: v[:-1], AVERAGE), "shape"),
    "no groups": (lambda saved: saved.pop("param_groups"), "param_groups"),
    "no state": (lambda saved: saved.pop("state"), "state"),
    "groups of words": (lambda saved: saved.update(param_groups="ab"), "param_groups"),
    "a group of words": (lambda saved: saved.update(param_groups=["ab"]), "params of group 0"),
    "params": (group(1, params=3), "params of group 1"),
    "params of lists": (group(1, params=[[], []]), "params of group 1"),
    "rate of words": (group(1, lr="high"), "lr of group 1"),
    "rate of nan": (group(0, lr=math.nan), "lr of group 0"),
    "rate below 0": (group(0, lr=torch.tensor(-1.0)), "lr of group 0"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_is_named_and_nothing_is_loaded(name: str) -> None:
    damage, message = DAMAGE[name]
    saved, run = copy.deepcopy(built()[1].state_dict()), built(steps=3, seed=1)
    damage(saved)
    before = all_of(run)
    with pytest.raises(ValueError, match=message):
        run[1].load_state_dict(saved)
    assert_same(all_of(run), before)


class Breaks(torch.optim.AdamW):
    """Raises when its state has been replaced."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.param_groups[0]["lr"] = 77.0
        self.note = "half way"
        raise KeyError("mine")


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("broken", ["base", "vector", "record", "announcing"])
def test_an_error_half_way_leaves_everything_as_it_was(
    broken: str, done: bool, bare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = copy.deepcopy(built(after="hold", steps=6 if not done else 3)[1].state_dict())
    run = built(Breaks if broken == "base" else torch.optim.AdamW, after="hold", steps=8 if done else 4, seed=1)
    if bare:
        saved["param_groups"][0].pop(NUMBERS)

    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("mine")

    if broken == "vector" and not bare:
        monkeypatch.setattr(run[1].meter.estimator, "load_vector", fails)
    elif broken == "record" and not bare:
        monkeypatch.setattr("warmctl.optimizer._row", fails)
    elif broken != "base":
        monkeypatch.setattr(run[1]._saved, "announce_numbers", fails)
    before = all_of(run)
    with pytest.raises(KeyError, match="mine"):
        run[1].load_state_dict(saved)
    assert_same(all_of(run), before)
    assert not hasattr(run[1].base, "note")


def test_forwards_are_recorded_again_after_a_state_that_would_have_ended_it() -> None:
    """Loading a state of closures takes the hooks off the model; an error puts them on again."""
    model = OwnLoss()
    opt = AdaptiveWarmup(torch.optim.AdamW(model.parameters(), 0.01), model)
    twin = OwnLoss()
    closures = AdaptiveWarmup(torch.optim.AdamW(twin.parameters(), 0.01), twin)
    closures.step(closure_for(closures, twin, batch_of(0), own_loss))
    opt.register_load_state_dict_post_hook(lambda _: None)
    opt.meter.estimator.load_vector = None  # type: ignore[assignment,method-assign]
    assert model._forward_hooks and not twin._forward_hooks
    with pytest.raises(TypeError):
        opt.load_state_dict(closures.state_dict())
    assert opt.sources.captured.capture.enabled and len(model._forward_hooks) == len(model._forward_pre_hooks) == 1


NUMBER = st.one_of(
    st.floats(),
    st.integers(-3, 5).map(float),
    st.sampled_from([0.0, -0.0, 0.5, 1e-4, 5e-324, 1.7e308, -1.7e308, 1e-300, 2.0**53, 2.0**60, math.inf, math.nan]),
)
JUNK = st.one_of(st.none(), st.text(max_size=3), NUMBER, st.lists(NUMBER, max_size=3), st.just({}), st.just(b"\xff"))
VALUES = st.one_of(JUNK, st.lists(NUMBER, max_size=90).map(lambda v: torch.tensor(v, dtype=torch.float64)))
DTYPES = torch.float64, torch.float64, torch.complex128
PHASES: dict[str, State] = {}
RUNS: dict[bool, Run] = {}


def saved_in(phase: str) -> State:
    if not PHASES:
        PHASES["fresh"] = built(steps=0)[1].state_dict()
        PHASES["warmup"] = built(steps=4)[1].state_dict()
        PHASES["guard"] = built(steps=8)[1].state_dict()
        PHASES["done"] = built(steps=8, after="hold")[1].state_dict()
    return copy.deepcopy(PHASES[phase])


def first_group(saved: State) -> Any:
    groups = saved.get("param_groups")
    return groups[0] if isinstance(groups, list) and groups else None


@st.composite
def states(draw: st.DrawFn) -> State:
    """A state that was saved, changed in up to three places."""
    saved = saved_in(draw(st.sampled_from(["fresh", "warmup", "guard", "done"])))
    for kind in draw(st.lists(st.sampled_from(["number", "number", "number", *KINDS]), max_size=3)):
        first = first_group(saved)
        if kind == "number" and isinstance(first, dict) and isinstance(first.get(NUMBERS), torch.Tensor):
            numbers = first[NUMBERS]
            if numbers.numel():
                numbers.view(-1)[draw(st.integers(0, numbers.numel() - 1))] = draw(NUMBER)
        elif kind == "numbers" and isinstance(first, dict):
            first[NUMBERS] = draw(VALUES)
        elif kind == "cut" and isinstance(first, dict) and isinstance(first.get(NUMBERS), torch.Tensor):
            first[NUMBERS] = first[NUMBERS][: draw(st.integers(0, 80))]
        elif kind == "vector" and isinstance(saved.get("state"), dict):
            for entry in saved["state"].values():
                if isinstance(entry, dict) and VECTOR in entry and draw(st.booleans()):
                    shape = draw(st.sampled_from([(), (8,), (8, 6), (3, 8), (3,)]))
                    entry[VECTOR] = torch.full(shape, draw(NUMBER), dtype=draw(st.sampled_from(DTYPES)))
                    if draw(st.booleans()):
                        entry[VECTOR] = draw(VALUES)
        elif kind == "group" and isinstance(first, dict):
            first[draw(st.sampled_from(["lr", "params"]))] = draw(JUNK)
        elif kind == "top":
            saved[draw(st.sampled_from(["param_groups", "state"]))] = draw(JUNK)
        elif kind == "missing":
            saved.pop(draw(st.sampled_from(["param_groups", "state"])), None)
    return saved


KINDS = ("numbers", "cut", "vector", "group", "top", "missing")


def loads_right_or_refuses(saved: State, done: bool) -> None:
    """And what was loaded trains: no error, a finite scale in (0, 1], parameters that are finite."""
    if done not in RUNS:
        RUNS[done] = built(steps=7, seed=1, after="hold") if done else built(steps=3, seed=1)
    run = copy.deepcopy(RUNS[done])
    before = all_of(run)
    first = first_group(saved)
    numbers = first.get(NUMBERS) if isinstance(first, dict) else None
    try:
        run[1].load_state_dict(saved)
    except ValueError as error:
        assert str(error)
        assert_same(all_of(run), before)
        return
    if numbers is not None:
        expected = numbers.double().clone()
        if expected[-1] != len(run[1].trainable):  # an average of other parameters than these is let go
            expected[-1] = 0.0
        assert_same(run[1].state_dict()["param_groups"][0][NUMBERS], expected)
    if any(group["lr"] > 10.0 for group in run[1].param_groups):
        return  # a possible rate, at which the bare optimizer diverges, or stops at one beyond float32
    for step in range(3):
        run[1].step(closure_for(run[1], run[0], batch_of(step)))
        assert 0.0 < run[1].metrics["scale"] <= 1.0 and run[1].phase in ("warmup", "guard", "done")
    assert all(p.isfinite().all() for p in run[0].parameters())


LENIENT = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:warmctl:RuntimeWarning")
@settings(max_examples=1000, deadline=None, suppress_health_check=LENIENT)
@given(states(), st.booleans())
def test_a_thousand_states_load_right_or_are_refused(saved: State, done: bool) -> None:
    """Other states each time."""
    loads_right_or_refuses(saved, done)
