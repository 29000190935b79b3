"""The relative representation change in a training process: no trace, no memory, compiled models, sources, ranks."""

from __future__ import annotations

import copy
import gc
import math
import tempfile
import weakref
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import OwnLoss, assert_same, batch_of, closure_for, everything, loss_fn, mlp, noisy_net, sgd
from tests.stability.outputs import (
    children,
    exact,
    measured,
    replay_of,
    squared,
    trainable,
)
from warmctl.loss.replay import Replay
from warmctl.loss.source import EXACT, Replays
from warmctl.loss.sources import Sources
from warmctl.stability.representation import SAMPLE, RepresentationChange


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def test_no_trace() -> None:
    model = noisy_net()
    opt = sgd(model)
    opt.step(closure_for(opt, model, batch_of(0)))
    replay = Replay(closure_for(opt, model, batch_of(1)), trainable(model), model)
    change = RepresentationChange(model)
    before = everything(model, opt)
    change.before(replay)
    assert_same(everything(model, opt), before)
    assert hooks(model) == 0
    opt.step()
    moved = everything(model, opt)
    found = change.after(replay)
    assert_same(everything(model, opt), moved)
    assert hooks(model) == 0 and 0.0 < found < 1.0
    assert change._before is None


def test_a_forward_that_fails_leaves_nothing_and_raises() -> None:
    model, x = mlp(), batch_of(0)[0]
    healthy = True

    def loss() -> Tensor:
        out = model(x)
        if not healthy:
            raise ZeroDivisionError("in the loss")
        return out.square().mean()

    replay, change = replay_of(model, loss), RepresentationChange(model)
    closure, streams = replay.closure, torch.get_rng_state()
    change.before(replay)
    healthy = False
    with pytest.raises(ZeroDivisionError):
        change.after(replay)
    assert change._before is None
    with pytest.raises(ZeroDivisionError):
        change.before(replay)
    assert change._before is None and hooks(model) == 0 and replay.closure is closure
    assert torch.equal(torch.get_rng_state(), streams)
    healthy = True
    assert math.isnan(change.after(replay))  # there is nothing to compare with


def test_memory_is_that_of_the_samples() -> None:
    """No output is kept, no view of one either; and nothing when it is over."""
    model, x = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 3)), torch.randn(100, 6)
    outputs: list[weakref.ref[Any]] = []

    def mark(module: nn.Module, args: Any, out: Tensor) -> None:
        outputs.append(weakref.ref(out.untyped_storage()))

    for layer in model:
        layer.register_forward_hook(mark)
    change, replay = RepresentationChange(model), replay_of(model, squared(model, x))
    change.before(replay)
    gc.collect()
    assert len(outputs) == 3 and not any(ref() is not None for ref in outputs)
    assert change._before is not None
    kept = list(change._before.values())
    assert [t.untyped_storage().nbytes() for t in kept] == [4 * SAMPLE, 4 * 300]
    assert not any(t.requires_grad for t in kept)
    refs = [weakref.ref(t) for t in kept]
    del kept
    change.forget()
    assert not any(ref() is not None for ref in refs)
    change.before(replay)
    refs = [weakref.ref(t) for t in change._before.values()]
    change.after(replay)
    assert not any(ref() is not None for ref in refs)


# Compiled models, and the sources of the loss -----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("given", ["compiled", "inner"])
def test_a_compiled_model_is_measured_and_not_compiled_again(backend: str, given: str) -> None:
    torch._dynamo.reset()
    inner = noisy_net()
    compiled: Any = torch.compile(inner, backend=backend)
    opt, twin = sgd(inner), noisy_net()
    plain = sgd(twin)

    def step(given: nn.Module, model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        found = []
        for index in range(3):
            torch.manual_seed(index)
            closure = closure_for(optimizer, model, batch_of(index))
            closure()
            replay, change = Replay(closure, trainable(given), given), RepresentationChange(given)
            change.before(replay)
            optimizer.step()
            found.append(change.after(replay))
        return found

    def frames() -> int:
        return torch._dynamo.utils.counters["frames"]["total"]

    closure_for(opt, compiled, batch_of(9))()
    closure_for(plain, twin, batch_of(9))()
    before = frames()
    assert before > 0
    found = step(compiled if given == "compiled" else inner, compiled, opt)
    assert frames() == before
    assert found == pytest.approx(step(twin, twin, plain), rel=1e-3) and min(found) > 0.0


@pytest.mark.parametrize("source", ["closure", "observed", "captured"])
def test_the_sources_of_the_loss(source: str) -> None:
    model: nn.Module = OwnLoss(noisy_net()) if source == "captured" else noisy_net()
    params, batch, opt = trainable(model), batch_of(0), sgd(model)
    sources = Sources(model, params, lambda: "clock", loss_fn if source == "observed" else None)
    replays, change = Replays(model), RepresentationChange(model)
    twin = copy.deepcopy(model)
    found: list[float] = []

    def decide(_: Any = None) -> None:
        sources.verdict.repeats = EXACT
        loss = sources.step_loss(params, replays)
        assert loss is not None
        change.before(loss.replay)
        opt.step()
        found.append(change.after(loss.replay))

    torch.manual_seed(3)
    if source == "closure":
        closure = closure_for(opt, model, batch)
        sources.deciding(closure, decide, lambda loss, backward: backward(), nullcontext())()
    elif source == "observed":
        sources.observed.observe(batch, params)
        loss_fn(model, batch).backward()
        decide()
    else:
        model(batch)["loss"].backward()
        decide()

    torch.manual_seed(3)
    other, loss = sgd(twin), lambda: twin(batch)["loss"] if source == "captured" else loss_fn(twin, batch)
    layers = children(nn.Linear, nn.BatchNorm1d)(twin)
    truth = exact(twin, layers, loss, lambda: other.step(closure_with_streams(other, loss)))
    assert found == [pytest.approx(truth, rel=1e-4)]
    assert replays.spent == 2


def closure_with_streams(opt: torch.optim.Optimizer, loss: Any) -> Any:
    """The step's own evaluation, from the streams that the test began with."""

    def closure() -> Any:
        torch.manual_seed(3)
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


# Several ranks ------------------------------------------------------------------------------------------------


@torch.no_grad()
def grow(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(1.1)


def check_copies(rank: int, halves: Any) -> None:
    model = mlp()
    wrapped = DistributedDataParallel(model)

    def exactly(x: Tensor) -> float:
        twin = mlp()
        return exact(twin, children(nn.Linear)(twin), squared(twin, x))

    found = measured(wrapped, squared(wrapped, halves[rank]))
    assert found == pytest.approx(exactly(torch.cat(halves)), rel=1e-5)
    assert exactly(halves[0]) != pytest.approx(exactly(halves[1]), rel=1e-3)
    both = [0.0, 0.0]
    dist.all_gather_object(both, found)
    assert both[0] == both[1]


def check_shards(rank: int, halves: Any) -> None:
    sharded = mlp()
    for layer in (*sharded, sharded):
        fully_shard(layer)
    replay, change = replay_of(sharded, squared(sharded, halves[rank])), RepresentationChange(sharded)
    change.before(replay)
    grow(sharded)
    whole = mlp()
    truth = exact(whole, children(nn.Linear)(whole), squared(whole, torch.cat(halves)), lambda: grow(whole))
    assert change.after(replay) == pytest.approx(truth, rel=1e-5)


def check_tensor_parallel(rank: int, halves: Any) -> None:
    split = parallelize_module(
        mlp(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
    )
    found = measured(split, squared(split, halves[0]), lambda: grow(split))
    plain = mlp()
    truth = exact(plain, children(nn.Linear)(plain), squared(plain, halves[0]), lambda: grow(plain))
    assert found == pytest.approx(truth, rel=1e-5)


def check_one_rank_alone(rank: int, halves: Any) -> None:
    """That sees no layer, or fails."""
    model = mlp()
    seen, unseen = squared(model, halves[rank]), lambda: model[0].weight.square().sum()
    twin = mlp()
    truth = exact(twin, children(nn.Linear)(twin), squared(twin, halves[0]))
    assert measured(model, unseen if rank else seen) == pytest.approx(truth, rel=1e-5)  # what the other saw

    failing = replay_of(model, seen)
    change = RepresentationChange(model)
    change.before(failing)
    if rank:
        failing.closure = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            change.after(failing)
    else:
        assert math.isnan(change.after(failing))


def on_rank(rank: int, store: str) -> None:
    """Asserts on both ranks; what fails is raised by the spawning process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(minutes=1)
    )
    for check in (check_copies, check_shards, check_tensor_parallel, check_one_rank_alone):
        check(rank, batch_of(0)[0].chunk(2))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_all_ranks_have_the_same_number() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (str(Path(folder) / "store"),), nprocs=2)  # type: ignore[no-untyped-call]
