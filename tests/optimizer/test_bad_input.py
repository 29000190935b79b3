"""Bad input gets an error that names it and says what to do, or a safe fallback."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import assert_same, batch_of, closure_for, everything, loss_fn, mlp, train
from warmctl import AdaptiveWarmup, sharpness


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9)


def monitor(model: nn.Module, base: torch.optim.Optimizer | None = None, **options: Any) -> AdaptiveWarmup:
    return AdaptiveWarmup(base or sgd(model), model, **({"every": 1, "control": False} | options))


# Arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, "adam", 1e-3, torch.optim.SGD])
def test_not_an_optimizer(optimizer: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got \w+"):
        AdaptiveWarmup(optimizer, mlp())


@pytest.mark.parametrize("model", [None, 3, lambda x: x])
def test_not_a_model(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got"):
        AdaptiveWarmup(sgd(mlp()), model)


def test_arguments_in_the_wrong_order() -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got Sequential"):
        AdaptiveWarmup(model, sgd(model))  # type: ignore[arg-type]


def test_wrapped_twice() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="AdaptiveWarmup already"):
        AdaptiveWarmup(AdaptiveWarmup(sgd(model), model), model)


def test_parameters_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"4 of the optimizer's 4 parameters are not .* of model \(Sequential\)"):
        AdaptiveWarmup(sgd(mlp(1)), mlp(2))


def test_an_optimizer_without_a_rate() -> None:
    class Rateless(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    model = mlp()
    with pytest.raises(ValueError, match="every parameter group of Rateless must have an 'lr'"):
        AdaptiveWarmup(Rateless(model.parameters()), model)


OPTIONS: list[tuple[str, Any, type[Exception]]] = [
    ("target", 0, ValueError),
    ("target", -0.5, ValueError),
    ("target", 1.6, ValueError),
    ("target", math.nan, ValueError),
    ("target", "0.5", ValueError),
    ("target", True, ValueError),
    ("loss_fn", 3, TypeError),
    ("every", 0, ValueError),
    ("every", -1, ValueError),
    ("every", 1.5, ValueError),
    ("every", "often", ValueError),
    ("budget", 0, ValueError),
    ("budget", 2, ValueError),
    ("budget", math.nan, ValueError),
    ("budget", None, ValueError),
    ("hvp", "exact", ValueError),
    ("hvp", None, ValueError),
    ("estimator", "qr", ValueError),
    ("probe_steps", 0, ValueError),
    ("probe_steps", 2.0, ValueError),
    ("after", "stop", ValueError),
    ("after", [], ValueError),
    ("max_warmup", 0, ValueError),
    ("max_warmup", 10.0, ValueError),
    ("control", "no", TypeError),
    ("seed", "a", TypeError),
]


@pytest.mark.parametrize("name, value, error", OPTIONS)
def test_options(name: str, value: Any, error: type[Exception]) -> None:
    """The message names the argument and what was given; the optimizer and the model are left alone."""
    model = mlp()
    base = sgd(model)
    before = everything(model, base), dict(base.param_groups[0])
    with pytest.raises(error) as caught:
        AdaptiveWarmup(base, model, **{name: value})
    said = str(caught.value)
    assert name in said and (repr(value) in said or type(value).__name__ in said)
    assert_same((everything(model, base), dict(base.param_groups[0])), before)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_all_parameters_frozen() -> None:
    model = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen.*nothing to train"):
        AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model)


def test_all_parameters_frozen_later() -> None:
    model = mlp()
    opt = monitor(model)
    train(opt, model, range(2))
    model.requires_grad_(False)
    opt.zero_grad()
    before = everything(model, opt)
    opt.step()
    assert_same(everything(model, opt), before)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="meta device: materialise it"):
        AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model)


def test_complex_parameters() -> None:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"complex.*view_as_real"):
        AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model)


# The source of the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Rprop], ids=["known rule", "unknown rule"])
def test_no_source_of_a_loss(base: Any) -> None:
    """One error with the three remedies, each on a line; then any of them goes on."""
    model = mlp()
    opt = AdaptiveWarmup(base(model.parameters(), 0.1), model)
    closure_for(opt, model, batch_of(0))()
    before = everything(model, opt)
    with pytest.raises(RuntimeError) as caught:
        opt.step()
    message = str(caught.value)
    lines = message.splitlines()
    for remedy in ("opt.step(closure)", "opt.backward(loss)", "opt.observe(batch)"):
        assert sum(remedy in line for line in lines) == 1, message
    assert_same(everything(model, opt), before)
    opt.step(closure_for(opt, model, batch_of(0)))
    assert opt.metrics["probes"] >= (base is torch.optim.SGD)


def test_observe_without_loss_fn() -> None:
    with pytest.raises(ValueError, match=r"observe\(batch\) needs AdaptiveWarmup\(\.\.\., loss_fn="):
        monitor(mlp()).observe(batch_of(0))


@pytest.mark.parametrize("loss", [None, 1.0, torch.zeros(3)])
def test_backward_on_something_else_than_a_loss(loss: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"backward\(loss\) takes a scalar tensor, got"):
        monitor(mlp()).backward(loss)


CLOSURES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "returns None": (lambda loss: loss.backward(), "returned None: it must return the loss"),
    "returns a vector": (lambda loss: (loss.backward(), torch.ones(3) * loss)[1], r"shape \(3,\).*scalar"),
    "returns a tuple": (lambda loss: (loss.backward(), (loss, 1))[1], "returned tuple.*scalar loss"),
    "does not call backward": (lambda loss: loss, "did not call loss.backward"),
}


@pytest.mark.parametrize("kind", CLOSURES)
@pytest.mark.parametrize("clears", [True, False], ids=["after zero_grad", "with an old gradient"])
def test_closures_that_break_the_contract(kind: str, clears: bool) -> None:
    model = mlp()
    opt = monitor(model)
    finish, message = CLOSURES[kind]
    if not clears:
        closure_for(opt, model, batch_of(1))()

    def closure() -> Any:
        if clears:
            opt.zero_grad()
        return finish(loss_fn(model, batch_of(0)))

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        opt.step(closure)
    assert_same([p.detach() for p in model.parameters()], before)
    assert opt.param_groups[0]["lr"] == 0.1 and opt.metrics["step"] == 0 and not opt.base.state
    opt.step(closure_for(opt, model, batch_of(0)))
    assert opt.metrics["step"] == 1


def test_a_loss_in_place_of_the_closure() -> None:
    model = mlp()
    opt = monitor(model)
    with pytest.raises(TypeError, match=r"step\(closure\) takes a function.*got Tensor"):
        opt.step(loss_fn(model, batch_of(0)))  # type: ignore[arg-type]


def test_a_closure_that_raises() -> None:
    model = mlp()
    opt = AdaptiveWarmup(sgd(model), model)
    train(opt, model, range(3))
    before = everything(model, opt)

    def closure() -> Tensor:
        raise KeyError("label")

    with pytest.raises(KeyError):
        opt.step(closure)
    assert_same(everything(model, opt), before)
    assert torch.autograd.backward.__module__ == "torch.autograd"


def test_a_closure_that_skips_the_step() -> None:
    """Nothing to learn from in this batch: no gradient, no loss. As in PyTorch, nothing happens."""
    model = mlp()
    opt = monitor(model)
    opt.zero_grad()
    before = everything(model, opt)
    opt.step(lambda: None)
    assert_same(everything(model, opt), before)
    assert opt.metrics["step"] == 0


@pytest.mark.parametrize("returned", [float, lambda loss: loss.item(), lambda loss: loss.detach().numpy()])
def test_a_closure_may_return_a_number(returned: Callable[[Tensor], Any]) -> None:
    model = mlp()
    opt = monitor(model)
    for _ in range(2):
        opt.step(lambda: returned(closure_for(opt, model, batch_of(0))().detach()))
    assert opt.metrics["probes"] == 2 and opt.metrics["sharpness"] > 0


def test_a_closure_that_sets_gradients_itself() -> None:
    """By autograd.grad, without a backward pass: cannot be measured, trains."""
    model = mlp()
    opt = monitor(model)

    def closure() -> Tensor:
        loss = loss_fn(model, batch_of(0))
        params = list(model.parameters())
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        return loss

    before = model[0].weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="did not call backward"):
        opt.step(closure)
    assert not torch.equal(model[0].weight, before)
    opt.step(closure)
    assert math.isnan(opt.metrics["sharpness"]) and opt.metrics["step"] == 2


# Values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("every", [1, "auto"])
@pytest.mark.parametrize("at", [0, 6])
def test_a_loss_or_gradient_that_is_not_finite_never_raises_the_scale(
    value: float, what: str, every: Any, at: int
) -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 3.0), model, every=every, target=0.1)
    train(opt, model, range(at))
    scale = opt.metrics["scale"]
    start = {name: t.clone() for name, t in model.state_dict().items()}

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(model, batch_of(at))
        loss.backward()
        if what == "gradient":
            for p in model.parameters():
                p.grad.mul_(value)  # type: ignore[union-attr]
            return loss
        return loss * value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            opt.step(closure)
            assert math.isfinite(opt.metrics["scale"])
            assert opt.metrics["scale"] <= scale
            assert opt.metrics["phase"] == "warmup"
            model.load_state_dict(start)  # as a loop does that goes back to its last good weights
        assert opt.prober.closure_replays == (1.0 if at else -1.0)
        train(opt, model, range(3))
    assert opt.last is not None and not opt.last.reason


@pytest.mark.parametrize("source", ["closure", "none"])
def test_gradients_none(source: str) -> None:
    model = mlp()
    opt = monitor(model)
    opt.zero_grad()
    before = everything(model, opt)
    if source == "closure":
        opt.step(lambda: torch.zeros(()))
    else:
        opt.step()
    assert_same(everything(model, opt), before)
    assert opt.metrics["step"] == 0


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_all_zero_gradients(base: Any) -> None:
    model = mlp()
    opt = AdaptiveWarmup(base(model.parameters(), 0.1), model, every=1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = 0.0 * loss_fn(model, batch_of(0))
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    assert opt.last is not None and opt.last.ratio == 0.0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_constant_loss_after_the_model_is_cut_off() -> None:
    model = mlp()
    opt = monitor(model)

    def closure() -> Tensor:
        opt.zero_grad()
        return loss_fn(model, batch_of(0)).detach()

    opt.step(closure)
    assert opt.metrics["step"] == 0


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_rate_zero(rate: Any) -> None:
    """The first step of a schedule from zero: nothing is measured or decided, momentum builds up."""
    model, bare = mlp(), mlp()
    opt = monitor(model, torch.optim.AdamW(model.parameters(), rate))
    plain = torch.optim.AdamW(bare.parameters(), 0.0)
    train(opt, model, range(2))
    train(plain, bare, range(2))
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in bare.parameters()])
    assert opt.metrics["step"] == 0 and opt.metrics["probes"] == 0
    for group in opt.param_groups:
        group["lr"] = 1e-3
    train(opt, model, range(2))
    assert opt.metrics["probes"] == 2 and opt.metrics["sharpness"] > 0


def test_one_group_at_rate_zero() -> None:
    model = mlp()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    base = torch.optim.SGD([{"params": first, "lr": 0.0}, {"params": second, "lr": 0.1}], lr=0.1)
    opt = monitor(model, base)
    train(opt, model, range(2))
    assert opt.metrics["sharpness"] > 0 and opt.metrics["stability_ratio"] > 0


# Probes that fail ------------------------------------------------------------------------------------------


class FailsInProbes(nn.Module):
    """Raises in the evaluations that a probe makes, which are those after the first of a step."""

    def __init__(self, error: BaseException, allowed: int = 1) -> None:
        super().__init__()
        self.body, self.error, self.allowed = mlp(), error, allowed
        self.register_buffer("calls", torch.zeros(()))  # put back after a probe: count beside it
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        if self.seen > self.allowed:
            raise self.error
        return self.body(x)


ERRORS: dict[str, BaseException] = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
    "forward raises": RuntimeError("shape mismatch"),
    "key error": KeyError("mask"),
    "assertion": AssertionError("bad"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("allowed", [1, 2, 3])  # in the check, in the first product, in the second
@pytest.mark.parametrize("control", [False, True])
def test_a_probe_that_fails_leaves_training_as_it_was(name: str, allowed: int, control: bool) -> None:
    model, twin = FailsInProbes(ERRORS[name], allowed), mlp()
    base, bare = torch.optim.AdamW(model.parameters(), 0.01), torch.optim.AdamW(twin.parameters(), 0.01)
    opt = AdaptiveWarmup(base, model, every=1, control=control, hvp="finite_difference")
    scale = opt.metrics["scale"]  # before anything was measured
    with pytest.warns(RuntimeWarning, match="learning rate is held") as caught:
        for step in range(3):
            model.seen = 0
            closure = closure_for(opt, model, batch_of(step))
            opt.step(closure)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert opt.last is not None
    if allowed == 1 and name != "out of memory":  # taken for one that cannot be repeated
        assert opt.prober.closure_replays == 0.0 and opt.last.ratio > 0
    else:
        assert opt.last.reason and math.isnan(opt.last.ratio)
        assert opt.metrics["scale"] == scale
    assert float(model.calls) == 3  # one a step
    assert opt.param_groups[0]["lr"] == 0.01
    if not control:
        train(bare, twin, range(3))
        assert_same([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()])


def test_memory_that_is_short_only_once_is_tried_again() -> None:
    model = FailsInProbes(ERRORS["out of memory"])
    opt = monitor(model, hvp="finite_difference")
    with pytest.warns(RuntimeWarning, match="out of memory"):
        opt.step(closure_for(opt, model, batch_of(0)))
    model.allowed = 1000
    opt.step(closure_for(opt, model, batch_of(1)))
    assert opt.last is not None and not opt.last.reason and opt.prober.closure_replays == 1.0


@pytest.mark.parametrize("allowed", [1, 2, 3])
@pytest.mark.parametrize("hvp", ["finite_difference", "double_backward"])
def test_keyboard_interrupt_inside_a_probe(allowed: int, hvp: str) -> None:
    """Goes through to the user; parameters, gradients, rates, buffers and modes are as before the probe."""
    model = FailsInProbes(KeyboardInterrupt(), allowed)
    opt = monitor(model, hvp=hvp, control=True)
    before = [p.detach().clone() for p in model.parameters()]
    grads: list[Tensor] = []

    def closure() -> Tensor:
        loss = closure_for(opt, model, batch_of(0))()
        if not grads:
            grads.extend(p.grad.clone() for p in model.parameters())  # type: ignore[union-attr]
        return loss

    if hvp == "double_backward" and allowed == 3:
        model.allowed = 2  # one graph is all it needs
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert_same([p.detach() for p in model.parameters()], before)
    assert_same([p.grad for p in model.parameters()], grads)
    assert float(model.calls) == 1 and model.training and opt.param_groups[0]["lr"] == 0.1
    assert torch.autograd.backward.__module__ == "torch.autograd" and opt.prober.capture._pending is None
    model.allowed = 1000
    opt.step(closure_for(opt, model, batch_of(0)))
    assert opt.last is not None and not opt.last.reason


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = nn.Linear(6, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(4, 4, 1, 3, 8).permute(3, 0, 2, 1, 4)
        return self.head(F.scaled_dot_product_attention(q, k, v).reshape(16, 8))


def test_an_exact_product_through_flash_attention() -> None:
    model = Attention()
    opt = monitor(model, hvp="double_backward")
    train(opt, model, range(2))
    assert opt.metrics["sharpness"] > 0


class NoSecondDerivative(nn.Module):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * gradient

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.Square.apply(self.body(x))


@pytest.mark.parametrize("source", ["closure", "backward"])
@pytest.mark.parametrize("hvp", ["double_backward", "auto"])
def test_an_exact_product_that_the_model_does_not_have(source: str, hvp: str) -> None:
    """Asked for, it fails safely and says so; "auto" takes finite differences; a live graph cannot."""
    model, twin = NoSecondDerivative(), NoSecondDerivative()
    opt, bare = monitor(model, hvp=hvp), sgd(twin)

    def step() -> None:
        if source == "closure":
            opt.step(closure_for(opt, model, batch_of(0)))
        else:
            opt.zero_grad()
            opt.backward(loss_fn(model, batch_of(0)))
            opt.step()

    if hvp == "auto" and source == "closure":
        step()
        assert opt.last is not None and opt.last.ratio > 0
    else:
        with pytest.warns(RuntimeWarning, match="once_differentiable"):
            step()
        assert opt.last is not None and math.isnan(opt.last.ratio)
    train(bare, twin, range(1))
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()])
    if source == "backward":
        assert "opt.step(closure)" in opt.last.reason


# What else happens in a loop -------------------------------------------------------------------------------


def test_gradients_left_from_before_the_wrapper() -> None:
    model = mlp()
    base = sgd(model)
    closure_for(base, model, batch_of(7))()
    opt = monitor(model, base)
    opt.step(closure_for(opt, model, batch_of(0)))
    assert opt.metrics["sharpness"] > 0


def test_zeroed_instead_of_cleared_gradients() -> None:
    model, twin = mlp(), mlp()
    opt, other = monitor(model, hvp="finite_difference"), monitor(twin, hvp="finite_difference")
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            opt.zero_grad(set_to_none=False)
            loss = loss_fn(model, batch_of(step))
            loss.backward()
            return loss

        opt.step(closure)
        other.step(closure_for(other, twin, batch_of(step)))
    assert opt.metrics["sharpness"] == other.metrics["sharpness"]
    assert opt.metrics["overhead"] == other.metrics["overhead"] == (5 + 2 + 2) / 3


def test_the_model_is_trained_with_closures_and_without_in_turn() -> None:
    model = mlp()
    opt = monitor(model, loss_fn=loss_fn)
    for step in range(4):
        if step % 2:
            opt.observe(batch_of(step))
            closure_for(opt, model, batch_of(step))()
            opt.step()
        else:
            opt.step(closure_for(opt, model, batch_of(step)))
    assert opt.metrics["probes"] == 4 and not opt.metrics["reason"].startswith("probe failed")


def test_parameters_frozen_and_thawed_between_probes() -> None:
    model = mlp()
    opt = monitor(model)
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        train(opt, model, range(2))
        assert opt.last is not None and not opt.last.reason


# Remedies -----------------------------------------------------------------------------------------------------


class SignDescent(torch.optim.Optimizer):
    """A rule that nobody has registered."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


def test_backward_with_an_unknown_rule_says_what_else_to_call() -> None:
    model = mlp()
    opt = AdaptiveWarmup(SignDescent(model.parameters(), 1e-3), model)
    opt.backward(loss_fn(model, batch_of(0)))
    with pytest.raises(RuntimeError, match=r"SignDescent.*opt\.step\(closure\).*opt\.observe\(batch\)"):
        opt.step()


def test_a_criterion_in_place_of_loss_fn() -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, loss_fn=nn.CrossEntropyLoss())
    opt.observe(batch_of(0))
    loss_fn(model, batch_of(0)).backward()
    with pytest.warns(RuntimeWarning, match=r"loss_fn failed: it must run the model itself"):
        opt.step()


def test_loss_fn_without_observe_is_noticed_within_a_few_steps() -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, loss_fn=loss_fn)
    with pytest.warns(RuntimeWarning, match=r"observe\(batch\) was not called") as said:
        for step in range(30):
            opt.zero_grad()
            loss_fn(model, batch_of(step)).backward()
            opt.step()
    assert len(said) == 1


def test_a_warning_points_at_the_users_line() -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, loss_fn=lambda model, batch: 1 / 0)
    opt.observe(batch_of(0))
    loss_fn(model, batch_of(0)).backward()
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError") as said:
        opt.step()
    assert said[0].filename == __file__


def test_numbers_of_numpy_are_numbers() -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, every=np.int64(5), target=np.float32(0.5))
    assert type(opt.metrics["target"]) is float


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(("net", loss_fn), TypeError), ((None, None), TypeError), ((None, loss_fn, -1.0), ValueError)],
)
def test_sharpness_names_its_arguments(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    model, loss, tol = (*arguments, 1e-3)[:3]
    with pytest.raises(error, match=r"sharpness\(model, loss_fn, batch\)|tol must not be negative"):
        sharpness(model or mlp(), loss, batch_of(0), tol=tol)
