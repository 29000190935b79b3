"""Two optimizers on one model, measurements beside it, steps that are skipped: what a probe must keep apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from tests.helpers import batch_of, loss_fn, mlp
from warmctl import AdaptiveWarmup, sharpness


class Own(nn.Module):
    """Returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": loss_fn(self.net, batch)}


def halves(model: nn.Sequential) -> tuple[list[Tensor], list[Tensor]]:
    params = list(model.parameters())
    return params[:2], params[2:]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_probe_keeps_the_gradients_of_another_optimizer(set_to_none: bool) -> None:
    def run(wrap: bool) -> list[Tensor]:
        model = mlp()
        first, second = halves(model)
        one: Any = SGD(first, 0.05)
        one = AdaptiveWarmup(one, model, control=False, every=1) if wrap else one
        two = SGD(second, 0.05)
        for step in range(3):

            def closure(step: int = step) -> Tensor:
                model.zero_grad(set_to_none=set_to_none)
                loss = loss_fn(model, batch_of(step))
                loss.backward()
                return loss

            one.step(closure)
            two.step()
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, run(True), run(False)))


def captured(before: Callable[[Own, int], None], rate: float = 1e-4) -> list[float]:
    """Sharpness at each step of a loop without closures, which is `before` interrupted by something else."""
    model = Own()
    _, second = halves(model.net)
    opt = AdaptiveWarmup(SGD(second, rate), model, control=False, every=1)
    found = []
    for step in range(4):
        opt.zero_grad()
        model(batch_of(0))["loss"].backward()
        before(model, step)
        opt.step()
        found.append(opt.metrics["sharpness"])
    return found


def test_measurements_beside_a_captured_loss_are_no_micro_batches_of_it() -> None:
    def measure(model: Own, step: int) -> None:
        sharpness(model, lambda m, b: m(b)["loss"], batch_of(1), tol=0.1)

    assert captured(measure) == pytest.approx(captured(lambda model, step: None), rel=1e-6)


def test_another_wrapper_on_a_captured_loss_is_no_micro_batch_of_it() -> None:
    others: list[AdaptiveWarmup] = []

    def step_other(model: Own, step: int) -> None:
        if not others:
            others.append(AdaptiveWarmup(SGD(halves(model.net)[0], 1e-12), model, every=1))
        others[0].step()

    # The other is made after the first forward, which it has not seen.
    with pytest.raises(RuntimeError, match="no loss to measure"):
        captured(step_other)
    model = Own()
    one, two = (AdaptiveWarmup(SGD(half, 1e-6), model, control=False, every=1) for half in halves(model.net))
    alone = captured(lambda model, step: None, 1e-6)
    for expected in alone:
        model.zero_grad()
        model(batch_of(0))["loss"].backward()
        one.step()
        two.step()
        assert two.metrics["sharpness"] == pytest.approx(expected, rel=1e-2)


def test_an_optimizer_that_steps_before_does_not_mix_gradients_of_two_places() -> None:
    def step_other(model: Own, step: int) -> None:
        with torch.no_grad():
            for p in halves(model.net)[0]:
                p += 1e-3

    assert captured(step_other) == pytest.approx(captured(lambda model, step: None), rel=0.05)


def test_a_scalar_prediction_is_no_loss() -> None:
    model = nn.Linear(8, 1, bias=False)
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=1.0), model)
    (model(torch.ones(1, 8)) - 3.0).square().sum().backward()
    with pytest.raises(RuntimeError, match="no loss to measure"):
        opt.step()


def test_an_energy_that_is_trained_on_by_a_function_of_it_is_no_loss() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).square().mean()

    model = Energy()
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=0.1), model)
    (model(batch_of(0)[0]) - 3.0).square().backward()
    with pytest.warns(RuntimeWarning, match="not what is trained on"):
        opt.step()


@pytest.mark.parametrize("size", [2.0**16, 2.0**10, 2.0**5])
@pytest.mark.parametrize("source", ["captured", "backward"])
def test_the_factor_of_a_gradient_scaler_is_none_of_the_loss(size: float, source: str) -> None:
    def run(scaler: torch.amp.GradScaler) -> float:
        model = Own()
        opt = AdaptiveWarmup(SGD(model.parameters(), 1e-3), model, every=1)
        for step in range(3):
            opt.zero_grad()
            if source == "captured":
                scaler.scale(model(batch_of(step))["loss"]).backward()
            else:
                opt.backward(scaler.scale(loss_fn(model.net, batch_of(step))))
            scaler.step(opt)
            scaler.update()
        return float(opt.metrics["sharpness"])

    plain = run(torch.amp.GradScaler("cpu", enabled=False))
    assert run(torch.amp.GradScaler("cpu", init_scale=size)) == pytest.approx(plain, rel=1e-2)


def test_a_fullgraph_of_the_wrapped_model_compiles() -> None:
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), 0.1), model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    opt.backward(loss_fn(compiled, batch_of(0)))
    opt.step()


def test_the_own_loss_of_a_compiled_model_is_found() -> None:
    def run(compiled: bool) -> float:
        model: Any = Own()
        params = list(model.parameters())
        model = torch.compile(model, backend="aot_eager") if compiled else model
        opt = AdaptiveWarmup(SGD(params, 1e-3), model, control=False, every=1)
        for step in range(3):
            opt.zero_grad()
            model(batch_of(step))["loss"].backward()
            opt.step()
        assert opt.metrics["probes"] == 3
        return float(opt.metrics["sharpness"])

    assert run(True) == pytest.approx(run(False), rel=1e-3)


def test_passes_of_a_skipped_step_do_not_count() -> None:
    def run(skipped: int) -> float:
        model = mlp()
        opt = AdaptiveWarmup(SGD(model.parameters(), 1e-3), model, control=False, every=1)
        for _ in range(skipped):
            opt.backward(loss_fn(model, batch_of(0)))
            opt.zero_grad()
        opt.backward(loss_fn(model, batch_of(0)))
        opt.step()
        return float(opt.metrics["sharpness"])

    assert run(3) == pytest.approx(run(0), rel=0.05)  # not four times it


@pytest.mark.parametrize("batches", [1, 2])
def test_captured_passes_of_a_skipped_step_do_not_count(batches: int) -> None:
    def run(skipped: int) -> float:
        model = Own()
        opt = AdaptiveWarmup(SGD(model.parameters(), 1e-3), model, control=False, every=1)
        for step in range(2 + skipped):
            for _ in range(batches):
                (model(batch_of(0))["loss"] / batches).backward()
            if 0 < step < 1 + skipped:  # a spike, say
                opt.zero_grad()
                continue
            opt.step()
            opt.zero_grad()
        return float(opt.metrics["sharpness"])

    assert run(3) == pytest.approx(run(0), rel=0.02)  # not four times it


def test_a_gradient_scaler_that_has_come_down_is_still_none_of_the_loss() -> None:
    model = Own()
    opt = AdaptiveWarmup(SGD(model.parameters(), 1e-5), model, control=False, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    found = []
    for scale in (2.0**16, 2.0**10, 2.0**3, 2.0**3):  # of the next step
        opt.zero_grad()
        for _ in range(2):
            scaler.scale(model(batch_of(0))["loss"]).backward()
        scaler.step(opt)
        scaler.update(scale)
        found.append(opt.metrics["sharpness"])
    assert found[1:] == pytest.approx([found[1]] * 3, rel=0.02)


def test_thawing_parameters_begins_warmup_again() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    opt = AdaptiveWarmup(SGD(model.parameters(), 0.01), model, after="hold", max_warmup=2)

    def steps(count: int) -> str:
        for step in range(count):

            def closure(step: int = step) -> Tensor:
                opt.zero_grad()
                loss = loss_fn(model, batch_of(step))
                loss.backward()
                return loss

            opt.step(closure)
        return opt.phase

    assert steps(3) == "done"
    probes = opt.metrics["probes"]
    model[0].requires_grad_(True)
    assert steps(1) == "warmup" and opt.metrics["probes"] == probes + 1
    assert steps(3) == "done"
    model[2].requires_grad_(False)
    assert steps(1) == "done"


def test_micro_batches_are_probed_once_and_not_at_rate_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), 0.0), model)
    probes = []
    on_graph = opt.prober.on_graph
    monkeypatch.setattr(opt.prober, "on_graph", lambda *args: (probes.append(1), on_graph(*args))[1])
    opt.backward(loss_fn(model, batch_of(0)))
    opt.step()
    assert not probes
    opt.param_groups[0]["lr"] = 0.1
    for step in range(4):
        opt.backward(loss_fn(model, batch_of(step)))
    opt.step()
    assert len(probes) == opt.metrics["probes"] == 1


def test_a_nan_guard_in_the_closure_lets_the_step_through() -> None:
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), 0.1), model)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(model, batch_of(0)) * float("nan")
        if torch.isfinite(loss):
            loss.backward()
        return loss

    opt.step(closure)


def test_a_frozen_parameter_and_one_never_used_do_not_hinder_saving() -> None:
    model = nn.ModuleDict({"net": mlp(), "unused": nn.Linear(4, 3)})
    opt = AdaptiveWarmup(AdamW(model.parameters()), model, every=1)

    def step() -> None:
        def closure() -> Tensor:
            opt.zero_grad()
            loss = loss_fn(model["net"], batch_of(0))
            loss.backward()
            return loss

        opt.step(closure)

    step()
    opt.state_dict()
    copy.deepcopy(opt)
    next(model["net"].parameters()).requires_grad_(False)
    saved = opt.state_dict()
    AdaptiveWarmup(AdamW(model.parameters()), model).load_state_dict(saved)
    step()


def test_bfloat16_entries_below_its_rounding_of_the_largest_count() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = mlp().to(dtype)
        opt = AdaptiveWarmup(AdamW(model.parameters(), 1e-3), model, control=False)
        x, y = batch_of(0)
        x = (x * torch.logspace(0, -3, x.shape[1])).to(dtype)  # gradients over three decades

        def closure(opt: Any = opt, model: Any = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss = loss_fn(model, (x, y.to(x.dtype) if y.is_floating_point() else y))
            loss.backward()
            return loss

        opt.step(closure)
        found[dtype] = opt.metrics["stability_ratio"]
    assert found[torch.bfloat16] > 0.5 * found[torch.float32]


def test_adam_without_eps_and_an_entry_without_gradient() -> None:
    model = nn.Linear(4, 1, bias=False)
    opt = AdaptiveWarmup(torch.optim.Adam(model.parameters(), 0.1, eps=0.0), model, control=False)
    x = torch.tensor([[1.0, 2.0, 3.0, 0.0]])

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (model(x) - 1.0).square().sum()
        loss.backward()
        return loss

    closure()
    root = opt.estimator.scaling([model.weight])[0][0]
    assert torch.isfinite(root).all() and root[0, 3] == 0.0
