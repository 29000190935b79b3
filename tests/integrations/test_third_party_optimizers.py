"""Optimizers from other packages: each is trained, saved and resumed, and has its row in the docs."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.integrations.third_party import ALONG, PAGE, RULE, TRIED, Tried, written
from warmctl import AdaptiveWarmup

SAVED_AT, RESUMED = 15, 25
BEHIND = 0.1
"""Part of what the bare optimizer takes off the loss that the wrapped one may lack at the end."""

_generator = torch.Generator().manual_seed(1)
X = torch.randn(2048, 16, generator=_generator)
Y = (X @ torch.randn(16, 8, generator=_generator)).argmax(-1)


def net() -> nn.Sequential:
    """Matrices only, for Muon; one large enough for states in few bits."""
    torch.manual_seed(0)
    layers = nn.Linear(16, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 8, False)
    return nn.Sequential(*layers)


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(X), Y))


def train(tried: Tried, model: nn.Module, opt: Any, steps: Iterable[int]) -> None:
    for step in steps:
        rows = torch.randint(len(X), (64,), generator=torch.Generator().manual_seed(step))

        def closure(rows: Tensor = rows) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(X[rows]), Y[rows])
            loss.backward()
            return loss

        if tried.calls_first:
            closure()
        opt.step(closure)


def evaluated(model: nn.Module, opt: Any) -> float:
    getattr(opt, "eval", lambda: None)()
    return loss_of(model)


def wrap(tried: Tried) -> tuple[nn.Module, AdaptiveWarmup]:
    model = net()
    return model, AdaptiveWarmup(tried.make(model.parameters()), model)


@pytest.mark.stack("other packages' optimizers", "one line changed")
@pytest.mark.stack("other packages' optimizers", "level with bare")
@pytest.mark.stack("other packages' optimizers", "resume exact")
@pytest.mark.parametrize("tried", [tried for tried in TRIED if not tried.refused], ids=lambda tried: tried.where)
def test_an_optimizer_trains_as_bare_and_resumes(tried: Tried) -> None:
    pytest.importorskip(tried.package)
    with tried.around(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="warmctl")  # a probe that fails
        bare = net()
        optimizer = tried.make(bare.parameters())
        train(tried, bare, optimizer, range(tried.steps))
        model, opt = wrap(tried)
        assert (RULE if opt.meter.rule else ALONG) == tried.measured
        train(tried, model, opt, range(SAVED_AT))
        file = io.BytesIO()
        torch.save((model.state_dict(), opt.state_dict()), file)
        train(tried, model, opt, range(SAVED_AT, RESUMED))
        unbroken = [p.detach().clone() for p in model.parameters()]
        train(tried, model, opt, range(RESUMED, tried.steps))
        assert not [row["reason"] for row in opt.history if "failed" in row["reason"]]
        assert opt.metrics["probes"] > 1 and opt.phase != "warmup"
        start, reached, ours = loss_of(net()), evaluated(bare, optimizer), evaluated(model, opt)
        assert reached < 0.5 * start, "the rate is a sane one"
        assert start - ours > (1 - BEHIND) * (start - reached), (start, reached, ours)

        again, resumed = wrap(tried)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        again.load_state_dict(weights)
        resumed.load_state_dict(state)
        train(tried, again, resumed, range(SAVED_AT, RESUMED))
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), unbroken, strict=True))


@pytest.mark.parametrize("tried", [tried for tried in TRIED if tried.refused], ids=lambda tried: tried.where)
def test_one_that_is_refused_is_told_why_and_takes_the_wrapper(tried: Tried) -> None:
    pytest.importorskip(tried.package)
    with pytest.raises(TypeError, match=tried.refused):
        wrap(tried)
    model = net()
    assert tried.inside is not None
    inner = AdaptiveWarmup(tried.inside(model.parameters()), model)
    from pytorch_optimizer import Lookahead  # type: ignore[import-untyped]

    start = loss_of(model)
    train(tried, model, Lookahead(inner), range(tried.steps))
    assert inner.metrics["step"] == tried.steps and inner.phase != "warmup" and loss_of(model) < 0.5 * start


def test_the_page_has_the_table() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "run python -m tests.integrations.third_party"
