"""A rate that stays low because nothing can be measured is spoken of, once, with the cause and the remedy."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch

from tests.helpers import batch_of, closure_for, loss_fn, mlp
from warmctl import AdaptiveWarmup
from warmctl.control.controller import UNMEASURED
from warmctl.loss.marks import UNSTEPPED


def plain_step(opt: AdaptiveWarmup, model: torch.nn.Module, index: int) -> None:
    """As Lightning's manual optimization makes it: the closure given to `step` does nothing."""
    opt.zero_grad()
    loss_fn(model, batch_of(index)).backward()
    opt.step(lambda: None)


def spoken(before: int, steps: int, control: bool, every: int | str = "auto") -> list[tuple[str, float]]:
    """What is said in `steps` steps, after some in which the loss went through `backward`; each with the scale then."""
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 30.0), model, control=control, every=every)
    for index in range(before):
        opt.zero_grad()
        opt.backward(loss_fn(model, batch_of(index)))
        opt.step()
    said: list[tuple[str, float]] = []
    for index in range(steps):
        scale = opt.metrics["scale"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if before:
                opt.zero_grad()
                loss_fn(model, batch_of(index)).backward()
                opt.step()
            else:
                plain_step(opt, model, index)
        said += [(str(w.message), scale) for w in caught if "warmctl" in str(w.message)]
    assert not control or opt.metrics["scale"] < 0.1
    return [(message, scale) for message, scale in said if "not finite" not in message]  # far too high, if not scaled


def test_plain_steps_of_manual_optimization() -> None:
    """Their batches can be looked at, so that the scale is not that of a run which has measured nothing."""
    ((message, scale),) = spoken(0, 120, control=True)
    assert (
        "calls no backward" in message and "opt.step(closure)" in message and f"{scale:.2g} of the schedule" in message
    )
    assert scale > 2 * UNMEASURED


def test_backward_that_is_used_once_and_not_again() -> None:
    ((message, scale),) = spoken(1, 200, control=True, every=2)
    assert f"{scale:.2g} of the schedule" in message
    assert "opt.backward(loss)" in message and "at every step" in message


@pytest.mark.parametrize(("steps", "control"), [(49, True), (120, False)])
def test_not_before_fifty_steps_and_not_where_the_rate_is_not_scaled(steps: int, control: bool) -> None:
    assert not spoken(0, steps, control)


def test_probes_that_are_far_apart_are_no_silence() -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 300.0), model, every=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(120):
            opt.step(closure_for(opt, model, batch_of(index)))
    assert opt.metrics["scale"] < 0.1 and opt.metrics["probes"] == 2


@pytest.mark.parametrize(("stepped", "passes"), [("inside", 300), ("wrapper", 100), ("wrapper", 300)])
def test_stepping_the_optimizer_inside_is_spoken_of_and_many_micro_batches_are_not(stepped: str, passes: int) -> None:
    model = mlp()
    inside = torch.optim.SGD(model.parameters(), 1e-3)
    opt = AdaptiveWarmup(inside, model, loss_fn=loss_fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if stepped == "wrapper":
            opt.step(closure_for(opt, model, batch_of(0)))
        for index in range(passes):
            loss_fn(model, batch_of(index)).backward()
            if stepped == "inside":
                inside.step()
                inside.zero_grad()
        opt.observe(batch_of(0))
        opt.step()
    said = [w for w in caught if "has not been called yet" in str(w.message)]
    assert len(said) == (stepped == "inside")
    assert all(w.filename == __file__ for w in said)  # at the user's own line


def test_a_wrapper_that_was_made_anew_leaves_nothing_of_the_first() -> None:
    """As where the cell of a notebook is run again."""
    model = mlp()
    base = torch.optim.SGD(model.parameters(), 0.05)
    first = weakref.ref(AdaptiveWarmup(base, model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt = AdaptiveWarmup(base, model)
        gc.collect()
        assert first() is None
        assert sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()) == 1
        for step in range(UNSTEPPED + 2):
            opt.zero_grad()
            opt.backward(loss_fn(model, batch_of(step)))
            opt.step()
    assert not caught
