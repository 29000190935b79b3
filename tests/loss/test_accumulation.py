"""Micro-batches and clipped gradients: the whole, unclipped loss is measured."""

from __future__ import annotations

import math
import warnings

import pytest
from torch import Tensor, nn

from tests.helpers import batch_of, loss_fn, mlp
from tests.loss.helpers import FORMS, Returns, dense, exact_monitor, loss_of, sharpness_of


@pytest.mark.stack("plain PyTorch", "accumulation")
@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize(
    "source, hvp",
    [
        ("closure", "finite_difference"),
        ("captured", "finite_difference"),
        ("captured", "double_backward"),
        ("captured and clipped", "finite_difference"),
        ("captured and scaled", "finite_difference"),
        ("backward", "double_backward"),
    ],
)
def test_accumulation_measures_the_whole_loss(source: str, mode: str, hvp: str) -> None:
    """With equal micro-batches the Hessian of the whole is that of one, once (mean) or n times (sum)."""
    model = Returns(FORMS["dict"])
    n, batch = 4, batch_of(0)
    share = 1 / n if mode == "mean" else 1.0
    scale = 2.0**16 if "scaled" in source else 1.0
    opt = exact_monitor(model, hvp=hvp, probe_steps=10)
    losses = []
    for _ in range(3):  # `backward` asks in the second step for the probe that it makes in the third
        expected = dense(model.body) * n * share
        losses.append(n * share * float(loss_fn(model.body, batch).detach()))
        if source == "closure":

            def closure() -> float:
                opt.zero_grad()
                total = 0.0
                for _ in range(n):
                    loss = loss_fn(model, batch) * share
                    loss.backward()
                    total += float(loss.detach())
                return total

            opt.step(closure)
        else:
            opt.zero_grad()
            for _ in range(n):
                if source == "backward":
                    opt.backward(loss_fn(model, batch) * share)
                else:
                    (loss_of(model(*batch)) * share * scale).backward()
            for p in model.parameters():
                p.grad.div_(scale)  # type: ignore[union-attr]
            if "clipped" in source:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)
    if (source, mode) != ("captured and scaled", "sum"):  # behind a scaler they are taken for an average
        assert opt.history["loss"] == pytest.approx(losses)


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_closure_that_adds_to_earlier_micro_batches(mode: str) -> None:
    """As Lightning does it: the closure is the last micro-batch only."""
    model, n = mlp(), 4
    share = 1 / n if mode == "mean" else 1.0
    expected = dense(model) * n * share
    opt = exact_monitor(model, hvp="finite_difference")

    def closure() -> Tensor:
        loss = loss_fn(model, batch_of(0)) * share
        loss.backward()
        return loss

    for _ in range(n - 1):
        closure()
    opt.step(closure)
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("where", ["inside the closure", "replaced inside the closure", "after backward"])
def test_clipping_does_not_change_the_sharpness(where: str) -> None:
    model = Returns(FORMS["dict"])
    expected = dense(model.body)
    opt = exact_monitor(model, hvp="finite_difference")

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model(*batch_of(0)))
        loss.backward()
        if "replaced" in where:
            for p in model.parameters():
                p.grad = p.grad * 1e-3  # type: ignore[operator]
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return loss

    if "closure" in where:
        opt.step(closure)
    else:
        closure()
        opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("clipped", range(4))
def test_clipping_one_layer_is_noticed(clipped: int) -> None:
    """A finite difference against a gradient that is not that of the loss would be wrong by any amount."""
    model = Returns(FORMS["dict"])
    opt = exact_monitor(model, hvp="finite_difference")
    for step in range(2):  # the first probe compares the gradients in any case
        expected = dense(model.body)
        opt.zero_grad()
        loss_of(model(*batch_of(0))).backward()
        if step:
            list(model.parameters())[clipped].grad.mul_(0.01)  # type: ignore[union-attr]
        opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("own, others", [(1.0, 0.0), (0.1, 20.0)])
def test_of_micro_batches_too_the_models_own_loss_must_be_what_is_trained_on(own: float, others: float) -> None:
    model = Returns(FORMS["dict"])
    opt = exact_monitor(model)
    for index in range(2):
        output = model(*batch_of(index))
        loss = own * output["total"] + others * model.body(batch_of(index)[0]).square().mean()
        (loss / 2).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
    assert any("is not what is trained on" in str(w.message) for w in caught) == (others > 0.0)
    assert math.isnan(opt.metrics["sharpness"]) == (others > 0.0)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_sixteen_micro_batches_are_no_gradient_scaler(clip: float | None) -> None:
    def sharpness(count: int) -> float:
        model = Returns(FORMS["dict"])
        opt = exact_monitor(model)
        for index in range(count):
            model(*batch_of(index))["total"].backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        assert not opt.sources.captured.capture.scaled
        return sharpness_of(opt) / count

    assert sharpness(16) == pytest.approx(sharpness(15), rel=0.5)  # of two last micro-batches
