"""Real lightning.Trainer with automatic optimization on the CPU.

Lightning hands `step` a closure that runs training_step, zero_grad, backward and, at its end,
gradient clipping; under accumulate_grad_batches it adds to gradients that earlier micro-batches left.
"""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.helpers import weights
from tests.integrations.helpers import Resumable, Rows, decisions, failures, saved_at
from warmctl import AdaptiveWarmup, sharpness

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import Callback  # noqa: E402

from warmctl.integrations.lightning import WarmupLogger  # noqa: E402

BATCH, BATCHES = 8, 6
pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*LeafSpec", "ignore:.*isinstance")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH * BATCHES, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 1).long())


class Classifier(pl.LightningModule):  # type: ignore[misc,name-defined]
    """`skip`: batches for which training_step returns None."""

    def __init__(self, *, wrapped: bool = True, lr: float = 30.0, skip: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.wrapped, self.lr, self.skip, self.options = wrapped, lr, skip, options
        self.opt: Any = None

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return None if batch_idx in self.skip else loss

    def configure_optimizers(self) -> Any:
        base = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        self.opt = AdaptiveWarmup(base, self, **self.options) if self.wrapped else base
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, T_max=40)
        return {"optimizer": self.opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def rows(self) -> Rows:
        return list(self.opt.history)

    @property
    def weights(self) -> Tensor:
        return weights(self)


class Losses(Callback):
    """What a user would see: the loss handed to callbacks, and the logged values."""

    def __init__(self) -> None:
        self.outputs: list[float] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs:
            self.outputs.append(float(outputs["loss"]))
        self.logged.append(float(trainer.callback_metrics.get("train_loss", math.nan)))


def fit(model: Classifier, steps: int, *, resume: Path | None = None, **options: Any) -> Any:
    callbacks = options.pop("callbacks", [])
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=callbacks,
            **options,
        )
        trainer.fit(
            model,
            Resumable(data(), batch_size=BATCH),
            ckpt_path=resume,
            weights_only=True if resume else None,
        )
    return trainer


def drop_nothing(model: Classifier) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2}], ids=str)
def test_monitor_leaves_no_trace(options: dict[str, Any]) -> None:
    """Weights, batch norm, rates, and what callbacks and the logs show of the loss."""
    seen = Losses(), Losses()
    plain, model = Classifier(wrapped=False, lr=0.1), Classifier(lr=0.1, control=False, every=1)
    fit(plain, 12, callbacks=[seen[0]], **options)
    fit(model, 12, callbacks=[seen[1], WarmupLogger()], **options)
    states = zip(plain.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert plain.opt.param_groups[0]["lr"] == model.opt.param_groups[0]["lr"]
    assert seen[0].outputs == seen[1].outputs
    assert seen[0].logged == seen[1].logged
    assert model.opt.metrics["probes"] == 12
    assert not failures(model.rows)


def test_epoch_means_do_not_count_probes() -> None:
    plain, model = Classifier(wrapped=False, lr=0.1), Classifier(lr=0.1, control=False, every=1)
    means = [
        float(fit(m, BATCHES, callbacks=c).callback_metrics["train_loss_epoch"])
        for m, c in ((plain, []), (model, [WarmupLogger()]))
    ]
    assert means[0] == means[1]


@pytest.mark.stack("Lightning", "accumulation")
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_first_probe_measures_the_whole_unclipped_loss(accumulation: int, clip: float | None) -> None:
    model = Classifier(lr=1e-3, every=100, probe_steps=30)
    truth = Classifier()
    for m in (model, truth):
        drop_nothing(m)
    fit(model, 1, accumulate_grad_batches=accumulation, gradient_clip_val=clip)
    x, y = data()[(accumulation - 1) * BATCH : accumulation * BATCH]
    expected = sharpness(truth, lambda m, b: F.cross_entropy(m(b[0]), b[1]), (x, y)).eigenvalue
    assert model.rows[0]["sharpness"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_control_counts_steps_and_leaves_the_schedule_alone(accumulation: int) -> None:
    plain, model = Classifier(wrapped=False), Classifier()
    for m in (plain, model):
        fit(m, 9, accumulate_grad_batches=accumulation)
    assert model.opt.metrics["step"] == len(model.rows) == 9
    assert model.opt.param_groups[0]["lr"] == plain.opt.param_groups[0]["lr"]
    assert min(row["scale"] for row in model.rows) < 1.0
    assert not torch.equal(plain.weights, model.weights)
    assert not failures(model.rows)


@pytest.mark.stack("Lightning", "resume exact")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}], ids=str)
def test_checkpoint_and_resume_in_mid_warmup(options: dict[str, Any], tmp_path: Path) -> None:
    """In the middle of an epoch: after its fourth batch, or its second."""

    def build() -> Classifier:
        model = Classifier(every=2)
        drop_nothing(model)  # Lightning does not save random streams
        return model

    whole, resumed = build(), build()
    fit(whole, 12, callbacks=[saved_at(4, tmp_path / "mid.ckpt")], **options)
    assert whole.rows[3]["phase"] == "warmup"
    with torch.no_grad():
        next(resumed.parameters()).zero_()
    fit(resumed, 12, resume=tmp_path / "mid.ckpt", **options)
    assert torch.equal(resumed.weights, whole.weights)
    assert decisions(resumed.rows) == decisions(whole.rows)[4:]
    assert len(resumed.rows) == 8 and any(row["probed"] for row in resumed.rows)


@pytest.mark.stack("Lightning", "level with bare")
def test_level_with_bare_training_at_a_usual_rate() -> None:
    start, bare, ours = (
        evaluated(model, steps)
        for model, steps in ((Classifier(), 0), (Classifier(wrapped=False, lr=0.1), 90), (Classifier(lr=0.1), 90))
    )
    assert bare < 0.5 * start and start - ours > 0.9 * (start - bare), (start, bare, ours)


def evaluated(model: Classifier, steps: int) -> float:
    if steps:
        fit(model, steps)
    x, y = data().tensors
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(x), y))


@pytest.mark.stack("Lightning", "AMP")
def test_bf16_mixed() -> None:
    bare, low, full = Classifier(wrapped=False, lr=0.1), *(Classifier(lr=0.1, control=False, every=2) for _ in range(2))
    for model in (bare, low):
        fit(model, 6, precision="bf16-mixed")
    fit(full, 6)
    assert torch.equal(low.weights, bare.weights) and not torch.equal(low.weights, full.weights)
    assert low.opt.metrics["probes"] == 3 and not failures(low.rows)
    assert low.rows[0]["stability_ratio"] == pytest.approx(full.rows[0]["stability_ratio"], rel=0.3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_step_that_returns_none_is_no_step(accumulation: int) -> None:
    """Lightning calls `step` all the same, with a closure that runs no backward."""
    skip = (0, 3)
    plain = Classifier(wrapped=False, lr=0.1, skip=skip)
    model = Classifier(lr=0.1, skip=skip, control=False, every=1)
    for m in (plain, model):
        fit(m, 12 // accumulation, accumulate_grad_batches=accumulation)
    assert torch.equal(plain.weights, model.weights)
    assert not failures(model.rows)
    assert model.opt.metrics["step"] == (8 if accumulation == 1 else 6)


@pytest.mark.stack("Lightning", "logs")
def test_logger_writes_the_metrics_of_every_step() -> None:
    found: list[dict[str, float]] = []

    class Read(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            found.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    model = Classifier()
    fit(model, 5, callbacks=[WarmupLogger(), Read()])
    assert [round(values["warmup/step"]) for values in found] == [1, 2, 3, 4, 5]
    assert [values["warmup/scale"] for values in found] == pytest.approx([row["scale"] for row in model.rows], rel=1e-6)
    assert {"warmup/lr", "warmup/stability_ratio", "warmup/sharpness"} <= set(found[-1])


def test_logger_says_when_there_is_nothing_to_log() -> None:
    with pytest.raises(TypeError, match="no AdaptiveWarmup but SGD"):
        fit(Classifier(wrapped=False), 1, callbacks=[WarmupLogger()])
