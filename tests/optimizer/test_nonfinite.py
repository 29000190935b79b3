"""A step whose loss or gradient is not finite: made as the bare optimizer makes it, with a word, or left out."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import assert_same, batch_of, closure_for, everything, loss_fn, mlp, sgd, weights
from warmctl import AdaptiveWarmup

BAD = {"inf": math.inf, "nan": math.nan}
STEPS, AT = 6, 2


class Loop:
    """Six steps by one source of the loss; the third loss is multiplied by `factor`."""

    def __init__(self, source: str, factor: float) -> None:
        self.source, self.factor = source, factor

    def loss(self, model: nn.Module, step: int) -> Any:
        return loss_fn(model, batch_of(step)) * (self.factor if step == AT else 1.0)

    def step(self, opt: Any, model: nn.Module, step: int) -> Any:
        def closure() -> Any:
            return closure_for(opt, model, step, self.loss)()

        if self.source == "closure":
            return opt.step(closure)
        opt.zero_grad()
        if self.source == "backward" and isinstance(opt, AdaptiveWarmup):
            opt.backward(self.loss(model, step))
        else:
            self.loss(model, step).backward()
        if self.source == "observed" and isinstance(opt, AdaptiveWarmup):
            opt.observe(step)
        return opt.step()


def run(source: str, factor: float, wrapped: bool = True, without: bool = False, **options: Any) -> Any:
    """Weights after it, the wrapper, and what was said. `without`: the bad step is never made."""
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), 0.01)
    loop = Loop(source, factor)
    opt: Any = base
    if wrapped:
        options |= {"loss_fn": loop.loss} if source == "observed" else {}
        opt = AdaptiveWarmup(base, model, every=1, **({"control": False} | options))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(STEPS):
            if not (without and step == AT):
                loop.step(opt, model, step)
    return model, opt, [str(w.message) for w in said if "not finite" in str(w.message)]


SOURCES = ["closure", "backward", "observed"]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("source", SOURCES)
def test_by_default_it_is_made_as_without_the_wrapper_and_said_once(source: str, bad: str) -> None:
    model, _, said = run(source, BAD[bad])
    assert not weights(model).isfinite().any()
    assert_same(weights(model), weights(run(source, BAD[bad], wrapped=False)[0]))
    assert sum("skip_nonfinite=True" in message for message in said) == 1


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("source", SOURCES)
def test_skipped_it_leaves_the_run_as_if_it_had_not_been(source: str, bad: str) -> None:
    model, opt, said = run(source, BAD[bad], skip_nonfinite=True)
    twin, bare, _ = run(source, BAD[bad], wrapped=False, without=True)
    assert_same(weights(model), weights(twin))
    assert_same(list(opt.base.state.values()), list(bare.state.values()))
    assert sum("left out" in message for message in said) == 1
    rows = list(opt.history)
    assert [("skipped" in row["reason"]) for row in rows] == [step == AT for step in range(STEPS)]
    assert any(row["probed"] and math.isfinite(row["stability_ratio"]) for row in rows[AT + 1 :])


@pytest.mark.parametrize("source", SOURCES)
def test_a_finite_run_is_the_same_with_the_option(source: str) -> None:
    for control in (False, True):
        plain, option = (run(source, 1.0, control=control, skip_nonfinite=skip) for skip in (False, True))
        assert_same(weights(option[0]), weights(plain[0]))
        assert not option[2] and not plain[2]


def test_after_warmup_too() -> None:
    model, opt, said = run("closure", math.nan, skip_nonfinite=True, max_warmup=1, after="release")
    assert opt.phase == "done" and weights(model).isfinite().all() and len(said) == 1


def test_a_skipped_step_leaves_no_trace_in_the_optimizer() -> None:
    model = mlp()
    opt = AdaptiveWarmup(sgd(model), model, skip_nonfinite=True)
    Loop("closure", 1.0).step(opt, model, 0)
    before = everything(model, opt)
    with pytest.warns(RuntimeWarning, match="left out"):
        loss = Loop("closure", math.nan).step(opt, model, AT)
    after = everything(model, opt)
    assert math.isnan(loss.item())
    assert_same({k: v for k, v in after.items() if k != "grad"}, {k: v for k, v in before.items() if k != "grad"})


def test_a_closure_that_the_base_calls_again_is_evaluated_again() -> None:
    """As SAM calls it: the first evaluation is not made twice, later ones are real."""
    calls = []

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            closure()
            super().step()
            loss = closure()
            super().step()
            return loss

    for skip in (False, True):
        model = mlp()
        opt = AdaptiveWarmup(Twice(model.parameters(), 0.01), model, every=100, skip_nonfinite=skip)
        count = 0

        def closure(model: nn.Module = model, opt: Any = opt) -> Any:
            nonlocal count
            count += 1
            return closure_for(opt, model, batch_of(0))()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                opt.step(closure)
        calls.append((count, weights(model)))
    assert calls[0][0] == calls[1][0]
    assert_same(calls[1][1], calls[0][1])


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_what_is_no_bool_is_refused(value: Any) -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"skip_nonfinite must be True or False, got"):
        AdaptiveWarmup(sgd(model), model, skip_nonfinite=value)
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_sparse_gradient_is_looked_at_without_making_it_dense(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    table = nn.Embedding(50, 4, sparse=True)
    opt = AdaptiveWarmup(torch.optim.SGD(table.parameters(), 0.1), table, skip_nonfinite=True)
    before = table.weight.detach().clone()
    table(torch.tensor([1, 1, 7])).sum().backward()
    table.weight.grad = table.weight.grad * value  # type: ignore[operator]
    monkeypatch.setattr(torch.Tensor, "to_dense", lambda *_: pytest.fail("it was made dense"))
    assert opt._nonfinite.to_skip(None, list(table.parameters())) == math.isnan(value)
    assert torch.equal(before, table.weight)
