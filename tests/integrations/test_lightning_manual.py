"""Real lightning.Trainer with manual optimization: the ways that measure, and the one that cannot, which is said."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.helpers import assert_same, weights
from tests.integrations.helpers import Resumable, decisions, failures, saved_at
from warmctl import AdaptiveWarmup

pl = pytest.importorskip("lightning.pytorch")

from warmctl.integrations.lightning import WarmupLogger  # noqa: E402

LOGGED = "step(), with WarmupLogger"
WAYS = ["step(closure)", "observe(batch)", "backward(loss)", LOGGED]
pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*LeafSpec", "ignore:.*isinstance")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Manual(pl.LightningModule):  # type: ignore[misc,name-defined]
    """`way`: how a step is made; "step()" is the one of Lightning's documentation."""

    def __init__(self, way: str, *, wrapped: bool = True, lr: float = 0.1, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.way, self.wrapped, self.lr, self.options = way, wrapped, lr, options
        self.opt: Any = None

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        base = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        self.opt = base
        if self.wrapped:
            options = {"loss_fn": Manual.loss} if "observe" in self.way else {}
            self.opt = AdaptiveWarmup(base, self, **options, **self.options)
        return self.opt

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        opt: Any = self.optimizers()  # type: ignore[no-untyped-call]

        def closure() -> Tensor:
            opt.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)  # type: ignore[no-untyped-call]
            return loss

        if self.way == "step(closure)" and self.wrapped:
            opt.step(closure)
            return
        if self.way == "backward(loss)" and self.wrapped:
            opt.zero_grad()
            opt.backward(self.loss(batch))
        else:
            closure()
        if self.way == "observe(batch)" and self.wrapped:
            opt.observe(batch)
        opt.step()


def fit(model: Any, steps: int, *callbacks: Any, resume: Path | None = None) -> list[str]:
    """What warmctl said meanwhile."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, 6, generator=generator)
    data = TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 1).long())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[
                *callbacks,
                *([WarmupLogger()] if getattr(model, "way", LOGGED) == LOGGED and model.wrapped else []),
            ],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, Resumable(data, batch_size=8), ckpt_path=resume, weights_only=True if resume else None)
    return [str(w.message) for w in said if "warmctl" in str(w.message)]


@pytest.mark.parametrize("way", WAYS)
def test_measured_and_controlled(way: str) -> None:
    model = Manual(way, lr=30.0)
    assert not fit(model, 30)
    rows = list(model.opt.history)
    assert len(rows) == model.opt.metrics["step"] == 30 and model.opt.metrics["probes"] >= 2
    assert not failures(rows) and 0.0 < rows[-1]["scale"] < 1.0
    assert model.opt.param_groups[0]["lr"] == 30.0


@pytest.mark.parametrize("way", [*WAYS, "step()"])
def test_monitored_it_is_the_training_without_the_wrapper(way: str) -> None:
    model, bare = Manual(way, control=False, every=1), Manual(way, wrapped=False)
    for m in (model, bare):
        fit(m, 12)
    assert_same(weights(model.net), weights(bare.net))
    assert (model.opt.metrics["probes"] > 0) == (way != "step()")


@pytest.mark.stack("Lightning", "resume exact")
@pytest.mark.parametrize("way", [WAYS[0], LOGGED])
def test_checkpoint_and_resume_in_mid_warmup_and_mid_epoch(way: str, tmp_path: Path) -> None:
    whole, resumed = (Manual(way, lr=30.0, every=2) for _ in range(2))
    fit(whole, 12, saved_at(4, tmp_path / "mid.ckpt"))
    rows = list(whole.opt.history)
    assert rows[3]["phase"] == "warmup" and any(row["probed"] for row in rows[4:])
    with torch.no_grad():
        next(resumed.parameters()).zero_()
    fit(resumed, 12, resume=tmp_path / "mid.ckpt")
    assert_same(weights(resumed), weights(whole))
    assert decisions(list(resumed.opt.history)) == decisions(rows)[4:] and len(rows) == 12


def test_plain_steps_cannot_be_measured_and_that_is_said_once() -> None:
    model = Manual("step()", lr=30.0)
    (message,) = fit(model, 120)
    assert "calls no backward" in message and "Lightning's manual optimization" in message
    assert "opt.step(closure)" in message and "opt.observe(batch)" in message and "0.01 of the schedule" in message
    assert model.opt.metrics["probes"] == 0 and model.opt.metrics["scale"] == pytest.approx(0.01)


def test_plain_steps_before_fifty_of_them_say_nothing() -> None:
    assert not fit(Manual("step()"), 49)


class Gan(pl.LightningModule):  # type: ignore[misc,name-defined]
    """Two optimizers by turns, as in Lightning's documentation; the generator's loss goes through both nets."""

    def __init__(self, toggled: bool, *, wrapped: bool = True, lr: float = 0.05, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.toggled, self.wrapped, self.lr, self.options = toggled, wrapped, lr, options
        self.both: list[Any] = []

    def configure_optimizers(self) -> Any:
        self.both = [torch.optim.Adam(net.parameters(), self.lr) for net in (self.generator, self.critic)]
        if self.wrapped:
            self.both = [AdaptiveWarmup(base, self, **self.options) for base in self.both]
        return self.both, []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real = batch[0]
        for index, opt in enumerate(self.optimizers()):  # type: ignore[arg-type, no-untyped-call]
            if self.toggled:
                self.toggle_optimizer(opt)  # type: ignore[no-untyped-call]
            fake = self.generator(torch.randn(len(real), 3))
            if index == 0:
                loss = F.softplus(-self.critic(fake)).mean()
            else:
                loss = F.softplus(self.critic(fake.detach())).mean() + F.softplus(-self.critic(real)).mean()
            opt.zero_grad()
            self.manual_backward(loss)  # type: ignore[no-untyped-call]
            opt.step()
            if self.toggled:
                self.untoggle_optimizer(opt)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("toggled", [True, False])
def test_a_gan_with_two_optimizers(toggled: bool) -> None:
    """Each measured on its own loss, and monitored the training is that without the wrappers."""
    model, bare = Gan(toggled, control=False, every=1), Gan(toggled, wrapped=False)
    for m in (model, bare):
        torch.manual_seed(1)
        assert not fit(m, 12)  # of both together
    assert_same(weights(model), weights(bare))
    for opt in model.both:
        assert opt.metrics["step"] == 6 and opt.metrics["probes"] >= 3 and not failures(list(opt.history))
    controlled = Gan(toggled, lr=3.0)
    assert not fit(controlled, 40)
    assert all(0.0 < opt.metrics["scale"] < 0.5 and opt.metrics["probes"] >= 2 for opt in controlled.both)


def test_a_gan_of_which_one_optimizer_is_wrapped() -> None:
    class OneWrapped(Gan):
        def configure_optimizers(self) -> Any:
            bare = torch.optim.Adam(self.critic.parameters(), self.lr)
            self.both = [AdaptiveWarmup(torch.optim.Adam(self.generator.parameters(), self.lr), self, every=1)]
            return [*self.both, bare], []

    model = OneWrapped(toggled=False)
    assert not fit(model, 12)
    assert len(model.both[0].history) == 6 and model.both[0].metrics["probes"] > 0
