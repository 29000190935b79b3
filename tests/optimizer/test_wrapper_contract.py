"""What a PyTorch optimizer is to everyone who handles one: hooks, groups, copies, compilers, loggers."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree  # type: ignore[import-untyped]
import torch
import torch.optim.lr_scheduler as schedulers
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.helpers import METRICS, assert_same, batch_of, closure_for, everything, loss_fn, mlp, noisy_net, train
from tests.optimizer.helpers import wrapped
from warmctl import AdaptiveWarmup

# One optimizer, two names -----------------------------------------------------------------------------------


def test_it_is_an_optimizer_that_shares_all_state_with_its_base() -> None:
    model, opt = wrapped()
    for _ in range(2):
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.param_groups is opt.base.param_groups
        assert opt.state is opt.base.state
        assert opt.defaults is opt.base.defaults
        train(opt, model, range(2))
        opt.load_state_dict(opt.state_dict())  # replaces the base's lists and dictionaries


def test_repr_names_the_base_and_the_phase() -> None:
    text = repr(wrapped(optimizer_class=torch.optim.AdamW)[1])
    assert text.startswith("AdaptiveWarmup(AdamW,") and "phase='warmup'" in text


@pytest.mark.parametrize("control", [True, False])
def test_repr_has_the_scale_of_the_metrics(control: bool) -> None:
    model, opt = wrapped(control=control)
    train(opt, model, range(3))
    assert f"scale={opt.metrics['scale']:.4g})" in repr(opt) and (opt.metrics["scale"] == 1.0) != control


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model, opt = wrapped()
    loss_fn(model, batch_of(0)).backward()
    opt.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.count_nonzero() for p in model.parameters())


class _BreaksFirst(Exception):
    pass


def test_a_closure_that_raises_leaves_everything_as_it_was() -> None:
    model, opt = wrapped()
    train(opt, model, range(3))
    before = everything(model, opt)

    def closure() -> Tensor:
        raise _BreaksFirst

    with pytest.raises(_BreaksFirst):
        opt.step(closure)
    assert_same(everything(model, opt), before)
    assert opt.metrics["step"] == 3


# Metrics and the record -------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_contract_and_plain() -> None:
    model, opt = wrapped()
    for row in [opt.metrics, *train(opt, model, range(3))]:
        assert tuple(row) == METRICS
        assert all(type(value) in (int, float, str) for value in row.values())
        json.dumps(row)
    assert opt.metrics["step"] == len(opt.history) == 3
    assert opt.metrics["phase"] == opt.phase


@pytest.mark.parametrize("set_to", [0.0, torch.tensor(0.0)])
def test_metrics_at_no_rate(set_to: Any) -> None:
    model, opt = wrapped()
    train(opt, model, range(2))
    opt.param_groups[0]["lr"] = set_to
    train(opt, model, range(1))
    assert opt.metrics["lr"] == 0.0 and opt.metrics["step"] == 2


@pytest.mark.parametrize("after", ["guard", "hold"])
def test_the_record_has_the_loss_of_every_closure_to_the_end(after: str) -> None:
    """Also when warmup is over: the figure would draw a missing loss as a diverged run."""
    model = torch.nn.Linear(4, 2)
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=0.1), model, after=after, max_warmup=2)
    losses = []
    for step in range(6):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        losses.append(float(opt.step(closure_for(opt, model, x, lambda m, b: m(b).square().mean())).detach()))
    assert opt.history["loss"] == pytest.approx(losses)


# Hooks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_base", [False, True])
def test_every_hook_fires_once(on_base: bool) -> None:
    model, opt = wrapped()
    target = opt.base if on_base else opt
    fired: list[str] = []
    kinds = [name for name in dir(torch.optim.Optimizer) if name.startswith("register_") and "hook" in name]
    assert len(kinds) == 6
    for kind in kinds:
        getattr(target, kind)(lambda *_, kind=kind: fired.append(kind))
    train(opt, model, [0])
    opt.load_state_dict(opt.state_dict())
    assert sorted(fired) == sorted(kinds)


def test_global_step_hooks_and_the_profiler_see_one_step() -> None:
    model, opt = wrapped(optimizer_class=torch.optim.AdamW)
    fired: list[str] = []
    handle = register_optimizer_step_post_hook(lambda *_: fired.append("post"))
    try:
        with torch.profiler.profile() as profile:
            train(opt, model, [0])
    finally:
        handle.remove()
    assert fired == ["post"]
    names = [event.key for event in profile.key_averages() if event.key.startswith("Optimizer.step")]
    assert names == ["Optimizer.step#AdamW.step"]
    assert [e.count for e in profile.key_averages() if e.key == names[0]] == [1]


# Groups added later -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["guard", "hold", "release"])
def test_a_group_added_later_is_trained_and_restarts_warmup(after: str) -> None:
    model: Any = mlp()
    base = torch.optim.AdamW(model[0].parameters(), lr=0.01)
    opt = AdaptiveWarmup(base, model, every=1, max_warmup=3, after=after)
    train(opt, model, range(5))
    assert opt.phase == ("guard" if after == "guard" else "done")
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.02})
    assert opt.phase == "warmup" and len(opt.base.param_groups) == 2
    before, probes = model[2].weight.detach().clone(), opt.metrics["probes"]
    train(opt, model, range(2))
    assert opt.metrics["probes"] > probes
    assert not torch.equal(model[2].weight, before)


# Copies -----------------------------------------------------------------------------------------------------


def _saved(pair: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": _saved,
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_copy_goes_on_as_the_original_does(copied: str, optimizer_class: Any, scheduled: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 3, bias=False)) if optimizer_class is torch.optim.Muon else mlp()
    model, opt = wrapped(1.0, optimizer_class, model)
    if scheduled:  # a scheduler replaces `step` on the instance
        schedulers.StepLR(opt, 100)
    train(opt, model, range(5))
    twin_model, twin = COPIES[copied]((model, opt))
    assert twin.model is twin_model
    before = everything(model, opt)
    rows = train(twin, twin_model, range(5, 10))
    assert_same(everything(model, opt), before)  # the original did not move
    assert_same(train(opt, model, range(5, 10)), rows)
    assert_same(everything(model, opt), everything(twin_model, twin))


def test_a_shallow_copy_drives_the_same_base() -> None:
    model, opt = wrapped()
    twin = copy.copy(opt)
    assert twin.base is opt.base and twin.param_groups is opt.param_groups
    train(twin, model, range(2))
    assert opt.base.state and twin.metrics["step"] == 2


# Schedule-free ----------------------------------------------------------------------------------------------


def test_train_and_eval_reach_a_schedule_free_base() -> None:
    def run(wrap: bool) -> tuple[list[Any], Any]:
        model = mlp()
        opt: Any = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-9)
        if wrap:
            opt = AdaptiveWarmup(opt, model, every=2, control=False)
        trace = []
        for step in range(4):
            opt.train()
            train(opt, model, [step])
            opt.eval()
            trace.append(everything(model, opt))
        return trace, opt

    assert_same(run(True)[0], run(False)[0])
    with pytest.raises(Exception, match="train mode"):
        train(run(True)[1], mlp(), [0])
    plain = wrapped()[1]
    plain.train()
    plain.eval()


# Compilers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
def test_a_compiled_model_is_probed(backend: str, hvp: str) -> None:
    torch._dynamo.reset()

    def run(compiled: bool) -> list[dict[str, Any]]:
        model, opt = wrapped(0.5, hvp=hvp, model=noisy_net())
        called: Any = torch.compile(model, backend=backend) if compiled else model
        return train(opt, called, range(4))

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a failed probe
        rows, eager = run(True), run(False)
    assert rows[-1]["probes"] == eager[-1]["probes"] == 4
    for row, reference in zip(rows, eager, strict=True):
        assert row["sharpness"] == pytest.approx(reference["sharpness"], rel=1e-3)


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_a_compiled_step_does_the_same(tensor_rate: bool) -> None:
    torch._dynamo.reset()

    def run(compile_step: bool) -> Any:
        rate: Any = torch.tensor(1.0) if tensor_rate else 1.0
        model, opt = wrapped(rate, torch.optim.Adam)
        opt_step = torch.compile(opt.step, backend="eager") if compile_step else opt.step
        for step in range(4):
            opt_step(closure_for(opt, model, batch_of(step)))
        return everything(model, opt), opt.metrics

    compiled, eager = run(True), run(False)
    assert_same(compiled[1], eager[1])
    assert_same(compiled[0]["weights and buffers"], eager[0]["weights and buffers"])


def test_a_fullgraph_of_the_wrapped_model_compiles() -> None:
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), 0.1), model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    opt.backward(loss_fn(compiled, batch_of(0)))
    opt.step()
