"""A loop that clips its gradient before the step: the copy from before is measured with, and costs no evaluation."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from tests.helpers import Batch, OwnLoss, batch_of, mlp, own_loss
from tests.loss.helpers import dense, exact_monitor, sharpness_of
from warmctl import AdaptiveWarmup

SOURCES = "closure", "captured"
Clip = Callable[[nn.Module], object]


def hard(model: nn.Module) -> object:
    return clip_grad_norm_(model.parameters(), 1e-3)


def not_at_all(model: nn.Module) -> object:
    return None


def step(source: str, opt: Optimizer, model: nn.Module, batch: int, clip: Clip, passes: int = 1) -> None:
    def evaluate() -> Tensor:
        opt.zero_grad()
        for index in range(passes):
            loss = own_loss(model, batch_of(batch + index)) / passes
            loss.backward()
        clip(model)
        return loss

    if source == "closure":
        opt.step(evaluate)  # type: ignore[arg-type]
    else:
        evaluate()
        opt.step()


def by_data(model: nn.Module) -> object:
    """As was done before `clip_grad_value_`: no version counter tells of it."""
    return [p.grad.data.clamp_(-1e-3, 1e-3) for p in model.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize("source", SOURCES)
def test_a_gradient_that_is_written_to_past_its_version_counter(source: str) -> None:
    model = OwnLoss()
    opt = exact_monitor(model, SGD(model.parameters(), 1e-5), hvp="finite_difference", every=1)
    for clip in (not_at_all, by_data):
        step(source, opt, model, 0, clip)
    assert opt.history["sharpness"][1] == pytest.approx(opt.history["sharpness"][0], rel=0.05)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("hvp", ["finite_difference", "double_backward"])
def test_what_is_measured_is_the_loss_before_clipping(source: str, hvp: str) -> None:
    model = OwnLoss()
    expected = [dense(model, batch_of(0), own_loss)]
    opt = exact_monitor(model, SGD(model.parameters(), 0.1), hvp=hvp)
    step(source, opt, model, 0, hard)
    found = [sharpness_of(opt)]
    expected.append(dense(model, batch_of(1), own_loss))
    step(source, opt, model, 1, hard)  # the first was also compared with an evaluation of its own
    assert [*found, sharpness_of(opt)] == pytest.approx(expected, rel=1e-3)


def run(source: str, clip: Clip, steps: int = 12, copied_after: int | None = None) -> AdaptiveWarmup:
    model = OwnLoss()
    opt = AdaptiveWarmup(AdamW(model.parameters(), 1e-3), model, every=4)
    for index in range(steps):
        if index == copied_after:
            opt, model = copy.deepcopy((opt, model))
        if copied_after is not None and index == copied_after + 1:
            file = io.BytesIO()
            torch.save((opt, model), file)
            file.seek(0)
            opt, model = torch.load(file, weights_only=False)
        step(source, opt, model, index, clip)
    return opt


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("copied_after", [None, 3])
def test_a_probe_costs_what_it_does_without_clipping(source: str, copied_after: int | None) -> None:
    clipped, plain = run(source, hard, copied_after=copied_after), run(source, not_at_all)
    assert clipped.metrics["probes"] == plain.metrics["probes"] == 3
    assert clipped.metrics["overhead"] == plain.metrics["overhead"]


def copies(opt: AdaptiveWarmup) -> int:
    """How many there are now, of this step's gradient."""
    run = opt.sources.closure.run
    return (opt.sources.watch.copy is not None) + (run is not None and run._copy is not None)


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_copied_where_nothing_is_measured_nor_kept_after_the_step(source: str) -> None:
    model = OwnLoss()
    opt = AdaptiveWarmup(AdamW(model.parameters(), 1e-3), model, every=4, control=False)
    at_hand: list[int] = []

    def clip(model: nn.Module) -> None:
        hard(model)
        at_hand.append(copies(opt))

    for index in range(9):
        before = len(at_hand)
        step(source, opt, model, index, clip)
        del at_hand[before + 1 :]  # a probe evaluates a closure again
        assert copies(opt) == 0
    assert at_hand == [1, 0, 0, 0] * 2 + [1]


class TwoTasks(nn.Module):
    """Two losses on one body; the smallest parameter is the bias of the first head, which the second does not reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 3)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(batch[0]))
        first = (self.one(hidden) - batch[1][:, :1]).square().mean()
        return first, (self.two(hidden) - batch[1]).square().mean()


@pytest.mark.parametrize("between", [hard, not_at_all])
@pytest.mark.parametrize("clip", [hard, not_at_all])
@pytest.mark.parametrize("joins", [0, 2])
def test_two_passes_of_which_the_watch_sees_one(between: Clip, clip: Clip, joins: int) -> None:
    model = TwoTasks()
    opt = exact_monitor(model, SGD(model.parameters(), 0.1), hvp="finite_difference")
    for index in range(4):

        def closure(index: int = index) -> Tensor:
            opt.zero_grad()
            first, second = model.losses(batch_of(index))
            first.backward(retain_graph=True)
            if index >= joins:
                between(model)
                second.backward()
            clip(model)
            return first + second

        def total(model: Any, batch: Batch, index: int = index) -> Tensor:
            first, second = model.losses(batch)
            return first + second if index >= joins else first + 0.0 * second

        expected = dense(model, batch_of(index), total)
        opt.step(closure)
        assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)
        return result


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("clip", [hard, not_at_all])
def test_reentrant_checkpoints_end_passes_of_their_own(source: str, clip: Clip) -> None:
    def run(reentrant: bool) -> list[float]:
        model = OwnLoss(Checkpointed(mlp(), reentrant))
        opt = exact_monitor(model, SGD(model.parameters(), 0.1), hvp="finite_difference")
        found = []
        for index in range(3):
            step(source, opt, model, index, clip)
            found.append(sharpness_of(opt))
        return found

    assert run(True) == pytest.approx(run(False), rel=1e-4)


@pytest.mark.parametrize("source", SOURCES)
def test_without_memory_for_a_copy_training_goes_on(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("warmctl.vectors.owned", full)
    model = OwnLoss()
    opt = AdaptiveWarmup(AdamW(model.parameters(), 1e-3), model, every=1)
    for index in range(3):
        step(source, opt, model, index, hard)
    assert opt.metrics["probes"] == 3 and opt.metrics["sharpness"] > 0.0


@pytest.mark.parametrize("source", SOURCES)
def test_the_model_does_not_keep_the_wrapper_alive(source: str) -> None:
    model = OwnLoss()
    opt = AdaptiveWarmup(AdamW(model.parameters(), 1e-3), model)
    step(source, opt, model, 0, hard)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None


def test_what_several_passes_have_added_up_is_no_gradient_of_one() -> None:
    """Then, as before, the gradient is evaluated anew."""
    model = OwnLoss()
    opt = exact_monitor(model, SGD(model.parameters(), 0.1), hvp="finite_difference")
    for index in (0, 2):
        expected = dense(model, batch_of(index + 1), own_loss)
        step("captured", opt, model, index, hard, passes=2)
        assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_a_gradient_that_a_scaler_has_scaled_is_not_that_of_the_loss() -> None:
    """Mixed precision is switched on in mid-run: the first probe has found nothing between the two."""
    model = OwnLoss()
    opt = exact_monitor(model, SGD(model.parameters(), 0.1), hvp="finite_difference")
    for index, factor in enumerate([1.0, 2.0**16]):
        expected = dense(model, batch_of(index), own_loss)
        opt.zero_grad()
        (own_loss(model, batch_of(index)) * factor).backward()
        for p in model.parameters():
            p.grad.div_(factor)  # type: ignore[union-attr]
        opt.step()
        assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


def test_a_gradient_by_another_function_than_backward_is_not_copied() -> None:
    """Then nothing was left by the pass, and what the loop writes itself may be anything."""
    model = OwnLoss()
    opt = exact_monitor(model, SGD(model.parameters(), 0.1), hvp="finite_difference")
    step("captured", opt, model, 0, hard)
    expected = dense(model, batch_of(1), own_loss)
    opt.zero_grad()
    parts = list(model.parameters())
    for p, gradient in zip(parts, torch.autograd.grad(own_loss(model, batch_of(1)), parts), strict=True):
        p.grad = 0.1 * gradient
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [1e-3, 1e-1, None])
def test_the_steps_of_adam_do_not_depend_on_the_length_of_gradients_nor_does_the_ratio(
    source: str, size: float | None
) -> None:
    """With gradients of one length all along its steps are those without clipping."""

    def ratio(size: float | None) -> float:
        model = OwnLoss()
        opt = exact_monitor(model, AdamW(model.parameters(), 1e-3, eps=1e-30, weight_decay=0.0))

        def shorten(model: nn.Module) -> None:
            for p in model.parameters():
                if p.grad is not None and size is not None:
                    p.grad.mul_(size)

        for batch in range(3):
            step(source, opt, model, batch, shorten)
        return float(opt.metrics["stability_ratio"])

    assert ratio(size) == pytest.approx(ratio(None), rel=1e-3)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [1e-2, 0.5])
def test_a_clipped_step_of_sgd_is_one_on_the_loss_times_what_clipping_left(source: str, size: float) -> None:
    """Its ratio is; the sharpness is that of the loss."""

    def shorten(model: nn.Module) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(size)

    model, rate, decay = OwnLoss(), 0.1, 0.3
    expected = dense(model, batch_of(0), own_loss)
    opt = exact_monitor(model, SGD(model.parameters(), rate, weight_decay=decay))
    step(source, opt, model, 0, shorten)
    assert opt.metrics["stability_ratio"] == pytest.approx(rate * (size * expected + decay) / 2, rel=1e-3)
    assert sharpness_of(opt) == pytest.approx(expected + decay / size, rel=1e-3)


def test_sgd_reaches_a_rate_that_clipping_alone_allows() -> None:
    """The edge of the loss is at a tenth of the scheduled rate; of steps clipped to a hundredth, at ten times it."""

    def scale(size: float) -> float:
        model = nn.Linear(10, 1, bias=False)
        nn.init.constant_(model.weight, 1.0)
        opt = AdaptiveWarmup(SGD(model.parameters(), 0.2), model)

        def closure() -> Tensor:
            opt.zero_grad()
            loss = 50 * model.weight.square().sum()  # curvature 100
            loss.backward()
            model.weight.grad.mul_(size)  # type: ignore[union-attr]
            return loss

        for _ in range(60):
            opt.step(closure)
        return float(opt.metrics["scale"])

    assert scale(1.0) < 0.11 and scale(0.01) > 0.5


def test_a_gradient_clipped_by_value_is_that_of_the_loss_all_the_same() -> None:
    def by_value(model: nn.Module) -> None:
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)

    model = OwnLoss()
    expected = dense(model, batch_of(0), own_loss)
    opt = exact_monitor(model, SGD(model.parameters(), 0.1))
    step("captured", opt, model, 0, by_value)
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_weight_decay_that_joins_a_clipped_gradient_is_not_clipped() -> None:
    def ratio(weight: float, size: float) -> float:
        model = OwnLoss()
        opt = exact_monitor(model, Adam(model.parameters(), 1e-3, eps=1e-30, weight_decay=1.0))

        def closure() -> Tensor:
            opt.zero_grad()
            loss = weight * own_loss(model, batch_of(0))
            loss.backward()
            for p in model.parameters():
                if p.grad is not None and size != 1.0:
                    p.grad.mul_(size)
            return loss

        opt.step(closure)
        return float(opt.metrics["stability_ratio"])

    assert ratio(1.0, 1e-2) == pytest.approx(ratio(1e-2, 1.0), rel=1e-3)
