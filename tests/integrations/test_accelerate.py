"""Real accelerate.Accelerator on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import weights
from tests.integrations.helpers import Rows, decisions, failures
from warmctl import AdaptiveWarmup, sharpness
from warmctl.integrations import scalars

accelerate = pytest.importorskip("accelerate")

from accelerate import Accelerator  # type: ignore[import-untyped]  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # type: ignore[import-untyped]  # noqa: E402

BATCH, MICRO_BATCHES = 8, 6


@pytest.fixture(autouse=True)
def _fresh_state() -> Any:
    """Accelerate keeps its settings in singletons."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": F.cross_entropy(logits, labels)}


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH * MICRO_BATCHES, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 1).long())


class Run:
    """A script: built from a seed, trained for some epochs, with its own scheduler and clipping."""

    def __init__(self, accumulation: int = 1, *, wrapped: bool = True, lr: float = 30.0, **options: Any) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        self.bare = Classifier()
        base = torch.optim.SGD(self.bare.parameters(), lr=lr, momentum=0.9)
        self.opt: Any = AdaptiveWarmup(base, self.bare, **options) if wrapped else base
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, T_max=40)
        loader = DataLoader(data(), batch_size=BATCH)
        self.model, self.prepared, self.loader, self.scheduler = self.accelerator.prepare(
            self.bare, self.opt, loader, scheduler
        )
        self.norms: list[float] = []

    def epochs(self, count: int, clip: float | None = None) -> Run:
        """The loop of accelerate's own examples: the model returns its loss."""
        for _ in range(count):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(x, labels=y)["loss"])
                    if clip is not None and self.accelerator.sync_gradients:
                        self.norms.append(float(self.accelerator.clip_grad_norm_(self.model.parameters(), clip)))
                    self.prepared.step()
                    self.scheduler.step()
                    self.prepared.zero_grad()
        return self

    def closures(self, count: int) -> Run:
        """The same by closures, with the loss computed outside of the model."""
        for _ in range(count):
            for x, y in self.loader:

                def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                    self.prepared.zero_grad()
                    loss = F.cross_entropy(self.model(x)["logits"], y)
                    self.accelerator.backward(loss)
                    return loss

                self.prepared.step(closure)
                self.scheduler.step()
        return self

    @property
    def weights(self) -> Tensor:
        return weights(self.bare)

    @property
    def rows(self) -> Rows:
        return list(self.opt.history)


def test_prepare_recognises_the_wrapper() -> None:
    run = Run()
    assert isinstance(run.prepared, AcceleratedOptimizer)
    assert run.prepared.optimizer is run.opt
    assert run.scheduler.scheduler.optimizer is run.opt


@pytest.mark.parametrize("loop", [Run.epochs, Run.closures])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_monitor_leaves_no_trace(loop: Callable[..., Run], clip: float | None) -> None:
    arguments = (2, clip) if loop is Run.epochs else (2,)
    plain = loop(Run(wrapped=False, lr=0.1), *arguments)
    monitored = loop(Run(lr=0.1, control=False, every=1), *arguments)
    assert torch.equal(plain.weights, monitored.weights)
    assert plain.opt.param_groups[0]["lr"] == monitored.opt.param_groups[0]["lr"]
    assert monitored.norms == plain.norms
    assert monitored.opt.metrics["probes"] >= 12
    assert not failures(monitored.rows)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_only_real_steps_count(accumulation: int) -> None:
    run = Run(accumulation).epochs(3)
    assert run.opt.metrics["step"] == len(run.rows) == 3 * MICRO_BATCHES // accumulation
    assert not failures(run.rows)
    assert run.opt.metrics["scale"] < 1.0  # at this rate control shows


@pytest.mark.stack("Accelerate", "accumulation")
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_first_probe_measures_the_whole_loss(accumulation: int, clip: float | None) -> None:
    """Not divided by the number of micro-batches, and not clipped."""
    truth = Run(lr=1e-3).bare.eval()
    run = Run(accumulation, lr=1e-3, every=100, probe_steps=30)
    for module in run.bare.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    run.epochs(1, clip)
    x, y = data()[(accumulation - 1) * BATCH : accumulation * BATCH]
    expected = sharpness(truth, lambda m, b: m(b[0], labels=b[1])["loss"], (x, y)).eigenvalue
    assert run.rows[0]["sharpness"] == pytest.approx(expected, rel=0.02)


@pytest.mark.stack("Accelerate", "level with bare")
def test_level_with_bare_training_at_a_usual_rate() -> None:
    x, y = data().tensors

    def loss(run: Run) -> float:
        with torch.no_grad():
            return float(run.bare.eval()(x, labels=y)["loss"])

    start = loss(Run(wrapped=False))
    bare, ours = loss(Run(wrapped=False, lr=0.1).epochs(15)), loss(Run(lr=0.1).epochs(15))
    assert bare < 0.6 * start and start - ours > 0.9 * (start - bare), (start, bare, ours)


@pytest.mark.stack("Accelerate", "logs")
def test_its_own_tracker_writes_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    bare = Classifier()
    opt = AdaptiveWarmup(torch.optim.SGD(bare.parameters(), lr=0.1), bare)
    model, prepared = accelerator.prepare(bare, opt)
    for step in range(3):
        accelerator.backward(model(*data()[:BATCH])["loss"])
        prepared.step()
        prepared.zero_grad()
        accelerator.log(scalars(prepared), step=step)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    written = [event.value for event in events.Scalars("warmup/scale")]
    assert written == pytest.approx([row["scale"] for row in opt.history], rel=1e-6)


def test_scheduler_keeps_its_own_rate() -> None:
    """AcceleratedScheduler reads and writes rates that were never scaled."""
    plain, run = Run(2, wrapped=False).epochs(2), Run(2).epochs(2)
    assert run.scheduler.get_last_lr() == plain.scheduler.get_last_lr()
    assert run.opt.param_groups[0]["lr"] == plain.opt.param_groups[0]["lr"]
    assert min(row["scale"] for row in run.rows) < 1.0


@pytest.mark.stack("Accelerate", "resume exact")
@pytest.mark.parametrize("loop", [Run.epochs, Run.closures])
def test_save_state_and_load_state_in_mid_warmup(loop: Callable[..., Run], tmp_path: Path) -> None:
    run = loop(Run(every=3), 2)
    assert run.opt.phase == "warmup"
    run.accelerator.save_state(str(tmp_path))
    step, scale = run.opt.metrics["step"], run.opt.metrics["scale"]
    loop(run, 2)

    resumed = Run(every=3)
    torch.manual_seed(99)  # load_state restores the random streams
    with torch.no_grad():
        for p in resumed.bare.parameters():
            p.zero_()
    resumed.accelerator.load_state(str(tmp_path))
    assert (resumed.opt.metrics["step"], resumed.opt.metrics["scale"]) == (step, scale)
    loop(resumed, 2)
    assert torch.equal(resumed.weights, run.weights)
    assert decisions(resumed.rows) == decisions(run.rows)[-len(resumed.rows) :]
    assert len(resumed.rows) == 12
    assert any(row["probed"] for row in resumed.rows)


@pytest.mark.stack("Accelerate", "AMP")
def test_bfloat16_autocast() -> None:
    """Accelerate patches `forward` to run under autocast; the probe goes through it too."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    bare = Classifier()
    opt = AdaptiveWarmup(torch.optim.SGD(bare.parameters(), lr=0.1), bare, every=1)
    model, prepared = accelerator.prepare(bare, opt)
    x, y = data()[:BATCH]
    for _ in range(3):
        accelerator.backward(model(x, labels=y)["loss"])
        prepared.step()
        prepared.zero_grad()
    assert not failures(list(opt.history))
    assert math.isfinite(opt.metrics["sharpness"]) and opt.metrics["probes"] == 3
