"""The layers' outputs of a closure are heard while it is evaluated for the step, not computed once more."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import assert_same, batch_of, closure_for, everything, noisy_net
from warmctl import AdaptiveWarmup


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = noisy_net()

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


class Unsampled(Tensor):
    """No function but those of a model works on it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.flatten, torch.take):
            raise NotImplementedError("not for this kind of tensor")
        return super().__torch_function__(func, types, args, kwargs or {})


class GivesUnsampled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).as_subclass(Unsampled)


def wrapped(model: nn.Module) -> AdaptiveWarmup:
    return AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), model)


def train(opt: AdaptiveWarmup, model: nn.Module, steps: int = 6) -> list[tuple[float, float]]:
    found = []
    for index in range(steps):
        torch.manual_seed(index)
        opt.step(closure_for(opt, model, batch_of(index)))
        found.append((opt.metrics["representation_change"], opt.metrics["overhead"]))
    return found


@pytest.mark.parametrize("build", [noisy_net, Checkpointed])
def test_it_is_the_number_of_a_forward_pass_of_its_own(build: Any) -> None:
    """To the last bit, with dropout and batch norm; a third of an evaluation a step less."""
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(0)
    twin = build()
    opt, other = wrapped(model), wrapped(twin)
    other.meter.prober.listening = lambda due: nullcontext()  # type: ignore[method-assign]
    heard, computed = train(opt, model), train(other, twin)
    assert [change for change, _ in heard] == [change for change, _ in computed]
    assert min(change for change, _ in heard) > 0.0
    assert [spent for _, spent in heard] == pytest.approx([spent - 1.0 / 3.0 for _, spent in computed])
    assert_same(everything(model, opt), everything(twin, other))


def test_an_output_that_cannot_be_sampled_does_not_stop_the_closure() -> None:
    model = nn.Sequential(nn.Linear(6, 5), GivesUnsampled(5, 3))
    opt = wrapped(model)
    before = model[1].weight.clone()
    train(opt, model, 3)
    assert opt.metrics["step"] == 3 and not torch.equal(model[1].weight, before)


def test_a_closure_that_raises_leaves_no_hook() -> None:
    model = noisy_net()
    opt = wrapped(model)
    before = sum(len(module._forward_hooks) for module in model.modules())

    def fails() -> Tensor:
        model(batch_of(0)[0])
        raise OSError("the data are gone")

    with pytest.raises(OSError, match="the data are gone"):
        opt.step(fails)
    assert sum(len(module._forward_hooks) for module in model.modules()) == before
    assert train(opt, model, 1)[0][0] > 0.0


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_is_compiled_as_without_it(fullgraph: bool) -> None:
    """Also where its first evaluation is one that is listened to; its layers are seen by a pass of their own."""
    graphs = []
    for listens in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = noisy_net()
        compiled: Any = torch.compile(model, backend="eager", fullgraph=fullgraph)
        opt = wrapped(model)
        if not listens:
            opt.meter.prober.listening = lambda due: nullcontext()  # type: ignore[method-assign]
        changes = [change for change, _ in train(opt, compiled)]
        graphs.append((dict(torch._dynamo.utils.counters["stats"]), changes))
    assert graphs[0] == graphs[1] and min(graphs[0][1]) > 0.0
