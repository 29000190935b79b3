"""Wrapped optimizers in threads of one process train as each does alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from warmctl import AdaptiveWarmup
from warmctl.curvature.operators import HessianOperator
from warmctl.loss.replay import Replay

STEPS = 24
SOURCES = ("closure", "clipping closure", "by name", "drawing closure", "captured", "observed", "live graph")
Run = list[tuple[float, float]]


def settings_of_the_process() -> list[object]:
    cuda, stance = torch.backends.cuda, torch._dynamo.eval_frame._stance.stance
    return [stance, cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled]


@pytest.fixture(autouse=True)
def nothing_stays_of_threads_that_measured_at_once() -> Iterator[None]:
    before = settings_of_the_process()
    yield
    assert settings_of_the_process() == before


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class ReturnsLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": loss_of(self.model, batch)}


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def mlp(generator: torch.Generator) -> nn.Module:
    """Its values come from `generator` alone: torch's own stream is the process's."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return model


def trained(source: str, seed: int) -> Run:
    """Loss and scale of every step."""
    generator = torch.Generator().manual_seed(seed)
    bare = mlp(generator)
    model: nn.Module = ReturnsLoss(bare) if source == "captured" else bare
    base = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    opt = AdaptiveWarmup(base, model, every=2, loss_fn=loss_of if source == "observed" else None)
    batches = [(torch.randn(16, 6, generator=generator), torch.randn(16, 1, generator=generator)) for _ in range(500)]
    drawn = iter(batches)
    found = []
    for batch in batches[:STEPS]:

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            opt.zero_grad()
            loss = loss_of(model, next(drawn) if source == "drawing closure" else batch)
            if source == "by name":
                torch.autograd.backward(loss)
            else:
                loss.backward()
            if source == "clipping closure":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return loss

        if source in ("captured", "observed", "live graph"):
            opt.zero_grad()
            loss = model(batch)["loss"] if source == "captured" else loss_of(model, batch)
            if source == "observed":
                opt.observe(batch)
            if source == "live graph":
                opt.backward(loss)
            else:
                loss.backward()
            opt.step()
        else:
            loss = opt.step(closure)
        found.append((float(loss.detach()), opt.metrics["scale"]))
    assert opt.metrics["probes"] >= STEPS // 3
    return found


def in_threads(jobs: list[Callable[[], Run]], threads: int) -> list[Run]:
    together = threading.Barrier(threads)

    def begin(job: Callable[[], Run]) -> Run:
        together.wait(60)
        return job()

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(begin, jobs))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("threads", [2, 8])
def test_trainings_in_threads_are_bit_for_bit_those_alone(threads: int) -> None:
    plan = [(source, seed) for seed in range(threads // 2) for source in (*SOURCES, "closure")]
    alone = [trained(source, seed) for source, seed in plan]
    original = torch.autograd.backward
    together = in_threads([lambda source=s, seed=i: trained(source, seed) for s, i in plan], threads)
    assert torch.autograd.backward is original
    differing = [key for key, a, b in zip(plan, alone, together, strict=True) if a != b]
    assert not differing


def test_nothing_of_torch_is_replaced_while_a_closure_runs() -> None:
    model = mlp(torch.Generator().manual_seed(0))
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=0.1), model, every=1)
    batch = torch.ones(4, 6), torch.ones(4, 1)
    original = torch.autograd.backward, Tensor.backward
    runs = 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        assert (torch.autograd.backward, Tensor.backward) == original
        opt.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    assert runs > 3 and "failed" not in opt.metrics["reason"]
    assert opt.meter.last is not None and not opt.meter.last.reason


def test_kernels_chosen_for_second_derivatives_are_put_back_by_the_last_thread() -> None:
    """Two threads that are both inside, and leave in the order in which they came."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    before = torch.backends.cuda.flash_sdp_enabled()

    def operator(generator: torch.Generator, entered: threading.Event, wait_for: threading.Event) -> None:
        model = mlp(generator)
        params: list[Tensor] = list(model.parameters())

        def loss() -> Tensor:
            entered.set()
            assert wait_for.wait(60)
            return loss_of(model, (torch.ones(4, 6), torch.ones(4, 1)))

        HessianOperator(Replay.of_loss(loss, params), params, "double_backward").matvec(list(params))

    def first() -> None:
        operator(torch.Generator().manual_seed(0), first_in, second_in)
        first_out.set()

    def second() -> None:
        assert first_in.wait(60)
        operator(torch.Generator().manual_seed(1), second_in, first_out)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            future.result(60)
    assert before and torch.backends.cuda.flash_sdp_enabled()
