"""The relative representation change, against whole outputs that plain forward passes give."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import OwnLoss, batch_of, mlp, monitor, noisy_net, own_loss
from tests.stability.outputs import (
    LoRA,
    Loss,
    OwnParameters,
    Recurrent,
    Transformer,
    children,
    conv_net,
    exact,
    image,
    measured,
    replay_of,
    sequence,
    shake,
    squared,
    tokens,
    trainable,
)
from warmctl import AdaptiveWarmup
from warmctl.loss.replay import Replay
from warmctl.stability.probe import BLIND
from warmctl.stability.representation import CALLS, RepresentationChange

FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[nn.Module], list[nn.Module]]]] = {
    "conv": (conv_net, image, children(nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.Linear)),
    "recurrent": (Recurrent, sequence, children(nn.LSTM, nn.GRUCell, nn.RNN)),
    "transformer": (
        Transformer, tokens,
        lambda model: [
            m for name, m in model.named_modules()
            if isinstance(m, (nn.Embedding, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention))
            and "out_proj" not in name
        ],
    ),
    "own parameters": (
        lambda: nn.Sequential(OwnParameters(), nn.Linear(6, 6), nn.Tanh(), OwnParameters()), sequence,
        children(OwnParameters, nn.Linear),
    ),
    "parametrised": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5, bias=False)), nn.Linear(5, 2)),
        sequence, children(nn.Linear),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_small_outputs_are_compared_whole(name: str) -> None:
    make, data, layers = FAMILIES[name]
    torch.manual_seed(0)
    model, x = make(), data()
    twin = copy.deepcopy(model)
    found = measured(model, squared(model, x))
    assert found == pytest.approx(exact(twin, layers(twin), squared(twin, x)), rel=1e-5)
    assert 0.01 < found < 1.0


def test_what_is_written_over_an_output_is_not_seen() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)), sequence()
    twin = copy.deepcopy(model)
    assert measured(model, squared(model, x)) == pytest.approx(exact(twin, [twin[0]], squared(twin, x)), rel=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_large_outputs_are_sampled(channels_last: bool) -> None:
    """Outputs of 18432 to 36864 entries. Four standard errors of normal entries: 6.4 %; the median's is smaller."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))]
    model, x = nn.Sequential(*layers), torch.randn(9, 3, 16, 16)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    found = measured(model, squared(model, x))
    truth = exact(twin, list(twin), squared(twin, x))
    assert found == pytest.approx(truth, rel=0.064)
    assert found != pytest.approx(truth, rel=1e-6)  # it is a sample


def test_reduced_precision_and_autocast() -> None:
    torch.manual_seed(0)
    model, x = mlp(), batch_of(0)[0]
    twin = copy.deepcopy(model)

    def cast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().square().mean()

    assert measured(model, cast) == pytest.approx(exact(twin, children(nn.Linear)(twin), squared(twin, x)), rel=0.02)


def test_a_module_called_twice_is_compared_call_by_call() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    x, far = torch.randn(8, 4), 100 * torch.randn(8, 4)

    def micro_batches() -> Tensor:
        for part in (x, far):
            loss = layer(part).square().mean()
            loss.backward()
        return loss

    twin = copy.deepcopy(layer)
    change, replay = RepresentationChange(layer), Replay(micro_batches, trainable(layer), layer)
    change.before(replay)
    shake(layer)
    both = exact(twin, [twin], lambda: twin(x).square().mean() + twin(far).square().mean())
    assert change.after(replay) == pytest.approx(both, rel=1e-5)


def test_a_closure_that_must_start_anew_is_seen_from_its_start() -> None:
    """It needs a .grad after its first backward: the replay finds out and begins again."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    x, far = torch.randn(8, 4), 100 * torch.randn(8, 4)

    def clipped() -> Tensor:
        for part in (x, far):
            loss = layer(part).square().mean()
            loss.backward()
            layer.weight.grad.clamp_(-1.0, 1.0)  # type: ignore[union-attr]
        return loss

    twin = copy.deepcopy(layer)
    change, replay = RepresentationChange(layer), Replay(clipped, trainable(layer), layer)
    change.before(replay)
    shake(layer)
    both = exact(twin, [twin], lambda: twin(x).square().mean() + twin(far).square().mean())
    assert change.after(replay) == pytest.approx(both, rel=1e-5)
    assert replay.closure is clipped


def test_only_the_first_calls_of_a_recurrence_are_looked_at() -> None:
    cell, x = nn.RNNCell(2, 3), torch.randn(2 * CALLS, 5, 2)

    def unrolled(count: int) -> Loss:
        def loss() -> Tensor:
            state = torch.zeros(5, 3)
            for position in x[:count]:
                state = cell(position, state)
            return state.square().mean()

        return loss

    change = RepresentationChange(cell)
    change.before(replay_of(cell, unrolled(2 * CALLS)))
    assert change._before is not None and len(change._before) == CALLS


@pytest.mark.parametrize("inner", ["checkpoint", "no_grad", "eval"])
def test_inner_forwards_of_any_mode_are_matched(inner: str) -> None:
    torch.manual_seed(0)
    model, x = noisy_net(), batch_of(0)[0]

    def loss(net: nn.Module) -> Tensor:
        if inner == "checkpoint":
            out: Any = checkpoint(net, x, use_reentrant=False)
        else:
            net.train(inner != "eval")
            with torch.set_grad_enabled(inner != "no_grad"):
                teacher = net(x)
            net.train()
            out = net(x) + teacher.detach()
        return out.square().mean()

    twin = copy.deepcopy(model)
    found = measured(model, lambda: loss(model))
    truth = exact(twin, children(nn.Linear, nn.BatchNorm1d)(twin), lambda: loss(twin))
    assert found == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_look_that_fails_costs_the_passes_that_it_made(fails_at: int) -> None:
    """A third of a gradient each; after the first has failed there is no second."""

    class Refuses(OwnLoss):
        looks, armed = 0, False

        def forward(self, batch: Any) -> Any:
            self.looks += not torch.is_grad_enabled()
            if self.armed and self.looks == fails_at and not torch.is_grad_enabled():
                raise RuntimeError("no forward pass without a gradient")
            return super().forward(batch)

    costs, looks = [], []
    for armed in (False, True):
        model = Refuses()
        model.armed = armed
        opt = monitor(model)
        own_loss(model, batch_of(0)).backward()
        opt.step()
        costs.append(opt.counts.cost)
        looks.append(model.looks)
    assert looks == [2, fails_at]
    assert costs[0] - costs[1] == pytest.approx((2 - fails_at) / 3)


def test_forwards_in_other_threads_are_not_looked_at() -> None:
    """Replicas run in threads, in no fixed order."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    x, far = torch.randn(8, 4), 100 * torch.randn(8, 4)

    def loss() -> Tensor:
        other = threading.Thread(target=layer, args=(far,))
        other.start()
        other.join()
        return layer(x).square().mean()

    twin = copy.deepcopy(layer)
    assert measured(layer, loss) == pytest.approx(exact(twin, [twin], squared(twin, x)), rel=1e-5)


# What is left out ---------------------------------------------------------------------------------------------


def test_outputs_that_were_zero_are_left_out() -> None:
    """LoRA as it starts: the frozen layers and the first matrices count, the second ones do not yet."""
    torch.manual_seed(0)
    model, x = nn.Sequential(LoRA(nn.Linear(6, 6)), nn.Tanh(), LoRA(nn.Linear(6, 6))), sequence()
    twin = copy.deepcopy(model)
    found = measured(model, squared(model, x))
    counted = [twin[0].lora_A["default"], twin[2].base_layer, twin[2].lora_A["default"]]  # the first base sees data
    truth = exact(twin, counted, squared(twin, x))
    assert found == pytest.approx(truth, rel=1e-5)


def test_a_head_that_starts_at_zero_is_left_out() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), sequence()
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    twin = copy.deepcopy(model)
    assert measured(model, squared(model, x)) == pytest.approx(exact(twin, [twin[0]], squared(twin, x)), rel=1e-5)


def test_a_frozen_trunk_does_not_hide_its_head() -> None:
    model, x = nn.Sequential(*(nn.Linear(6, 6).requires_grad_(False) for _ in range(5)), nn.Linear(6, 2)), sequence()
    twin = copy.deepcopy(model)
    assert measured(model, squared(model, x)) == pytest.approx(exact(twin, [twin[-1]], squared(twin, x)), rel=1e-5)


def test_an_update_that_moves_nothing() -> None:
    model = mlp()
    assert measured(model, squared(model, batch_of(0)[0]), lambda: None) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_no_longer_finite(value: float) -> None:
    """Even one of many: what follows from it is lost."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))

    def spoil() -> None:
        shake(model)
        with torch.no_grad():
            model[-1].bias[0] = value

    assert measured(model, squared(model, sequence()), spoil) == float("inf")


@pytest.mark.parametrize(
    "held", [nn.ParameterList, lambda factors: nn.ParameterDict({"a": factors[0], "b": factors[1]})]
)
def test_a_module_that_holds_its_parameters_in_a_list_is_a_layer(held: Callable[[list[Tensor]], nn.Module]) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            factors = [torch.randn(6, 4), torch.randn(4, 3)]
            self.held = held(factors)

        def forward(self, x: Tensor) -> Tensor:
            for factor in self.parameters():
                x = x @ factor
            return x

    torch.manual_seed(0)
    model, x = nn.Sequential(Product(), nn.Tanh()), sequence()
    twin = copy.deepcopy(model)
    assert measured(model, squared(model, x)) == pytest.approx(exact(twin, [twin[0]], squared(twin, x)), rel=1e-5)


@pytest.mark.parametrize("source", ["closure", "observed"])
def test_where_nothing_is_heard_a_look_is_half_as_dear_and_that_is_said_once(
    source: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(6, 3)

    def loss_fn(model: nn.Linear, x: Tensor) -> Tensor:  # type: ignore[override]
        return nn.functional.linear(x, model.weight, model.bias).square().mean()

    caplog.set_level("INFO", "warmctl")
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, every=1000, loss_fn=loss_fn)
    spent: list[float] = []
    look = opt.meter.prober.look
    monkeypatch.setattr(opt.meter.prober, "look", lambda params: spent.append(look(params)) or spent[-1])
    for _ in range(30):
        x = torch.randn(8, 6)

        def closure(x: Tensor = x) -> Tensor:
            opt.zero_grad()
            loss = loss_fn(model, x)
            loss.backward()
            return loss

        if source == "closure":
            opt.step(closure)
        else:
            opt.observe(x)
            closure()
            opt.step()
    assert math.isnan(opt.metrics["representation_change"]) and opt.meter.last is not None
    assert len(spent) > 8 and spent == pytest.approx([1 / 3] * len(spent))
    assert opt.counts.cost == pytest.approx(opt.meter.last.cost + sum(spent))
    assert [record.message for record in caplog.records if "no layer's output" in record.message] == [BLIND]


def test_where_no_layer_can_be_seen() -> None:
    weight = nn.Parameter(torch.ones(3))
    holder = nn.Module()
    holder.weight = weight
    assert math.isnan(measured(holder, lambda: weight.square().sum()))
    zero = nn.Linear(3, 3, bias=False)
    nn.init.zeros_(zero.weight)
    assert math.isnan(measured(zero, squared(zero, torch.ones(2, 3))))
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert math.isnan(measured(scripted, squared(scripted, torch.ones(2, 3))))


def test_what_runs_inside_a_transform_is_not_seen() -> None:
    model = nn.Linear(3, 3)
    x = torch.randn(4, 3)
    assert math.isnan(measured(model, lambda: torch.func.vmap(lambda row: model(row).square().sum())(x).mean()))


def test_the_loss_a_model_returns_is_no_representation() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = x * self.shift
            return {"loss": logits.square().mean(), "logits": logits}

    model, x = WithLoss(), torch.ones(4, 3)

    def double() -> None:
        with torch.no_grad():
            model.shift *= 2.0

    assert measured(model, lambda: model(x)["loss"], double) == pytest.approx(1.0)  # the loss changes by 3
