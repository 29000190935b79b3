"""Loss, gradient norm and end slope of a step: of the global batch, whatever the number of ranks."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.launch import launch, needs_gloo
from tests.distributed.regression import batch, build
from tests.stability.ranks import LATER, SAVED_AT, STEPS, controlled, decisions, rule, train
from tests.stability.snapshots import Snapshots
from warmctl.stability.signals import StepSignals

pytestmark = pytest.mark.xdist_group("signals")  # its fixture is made once

Rows = list[list[float]]


@pytest.fixture(scope="module")
def alone() -> Rows:
    """Loss, norm and end slope of each step on the whole batch, by definition, in one process without the wrapper."""
    model, snapshots, rows = build(), Snapshots(), []
    base = rule(model)
    for step in range(LATER):
        base.zero_grad()
        loss: Tensor = model(*batch(step))["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        rows.append([loss.item(), norm.item(), snapshots.end_slope(model.parameters())])
        base.step()
    return rows


@pytest.fixture(scope="module")
def decided_alone() -> Rows:
    """Of one process with the wrapper, on the whole batch."""
    model = build()
    opt = controlled(model)
    train(model, opt, range(LATER), batch)
    return decisions(opt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


def on_ranks(count: int, what: str, *folders: Path) -> list[Any]:
    """What each rank returned."""
    found: list[Any] = launch("tests.stability.ranks", count, what, *map(str, folders))
    return found


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Rows]]:
    return on_ranks(2, "save", folder / "2")


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Rows]]:
    return on_ranks(4, "save", folder / "4")


def assert_close(found: Rows, expected: Rows) -> None:
    assert len(found) == len(expected)
    for row, truth in zip(found, expected, strict=True):
        assert row == pytest.approx(truth, rel=1e-9, abs=1e-9, nan_ok=True)


@needs_gloo
@pytest.mark.parametrize("name", ["ddp", "fsdp", "hybrid"])
@pytest.mark.parametrize("count", ["two", "four"])
def test_several_ranks_see_what_one_process_sees(
    request: pytest.FixtureRequest, alone: Rows, count: str, name: str
) -> None:
    found = request.getfixturevalue(count)
    assert all(repr(rank[name]) == repr(found[0][name]) for rank in found)  # to the last bit; nan is nan
    assert_close(found[0][name], alone[:STEPS])
    assert math.isnan(found[0][name][0][2]) and math.isfinite(found[0][name][1][2])


@needs_gloo
@pytest.mark.parametrize(("count", "saved"), [(2, "4"), (4, "42")])
def test_what_was_saved_goes_on_on_more_and_on_fewer_ranks(
    request: pytest.FixtureRequest, alone: Rows, decided_alone: Rows, folder: Path, count: int, saved: str
) -> None:
    """To rounding; bit for bit on as many."""
    before = {"2": request.getfixturevalue("two"), "4": request.getfixturevalue("four")}
    ranks = on_ranks(count, "load", *(folder / name for name in saved))
    for name in saved:
        found = [rank[name] for rank in ranks]
        assert_close(found[0]["later"], alone[SAVED_AT:])
        assert_same_decisions(found, decided_alone[SAVED_AT:])
        if name == str(count):
            assert found[0]["later"] == before[name][0]["later"]
            assert found[0]["decided"] == before[name][0]["decided"][SAVED_AT:]


def assert_same_decisions(found: list[dict[str, Rows]], expected: Rows) -> None:
    """But for the ratio: a probe begins with random signs that each rank draws for its own shards."""
    assert all(repr(rank["decided"]) == repr(found[0]["decided"]) for rank in found)
    assert len(found[0]["decided"]) == len(expected)
    for row, truth in zip(found[0]["decided"], expected, strict=True):
        assert row[:3] == pytest.approx(truth[:3], rel=1e-5) and row[3] == pytest.approx(truth[3], rel=0.05)


@needs_gloo
@pytest.mark.parametrize("count", ["two", "four"])
def test_several_ranks_decide_as_one_process(request: pytest.FixtureRequest, decided_alone: Rows, count: str) -> None:
    assert_same_decisions(request.getfixturevalue(count), decided_alone)
    scales = [row[0] for row in decided_alone]
    assert max(new / old for old, new in pairwise(scales)) > 1.9 and scales[-1] < 1.9 * scales[-2]  # both laws decide


def with_gradient(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """And its gradient as one vector."""
    torch.manual_seed(0)
    model = nn.Linear(40, 30).to(dtype)
    model(torch.randn(8, 40).to(dtype)).square().mean().backward()
    return model, torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_the_norm_is_exact_in_any_precision(dtype: torch.dtype, precision: float) -> None:
    model, gradient = with_gradient(dtype)
    found = StepSignals().read(torch.tensor(0.25), list(model.parameters()))
    assert (found.loss, found.finite) == (0.25, True)
    assert found.norm == pytest.approx(gradient.norm().item(), rel=precision)


def test_a_sparse_gradient_counts_as_the_dense_one_does() -> None:
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model, rows = nn.Embedding(6, 3, sparse=sparse), []
        base, signals = torch.optim.SGD(model.parameters(), 0.1), StepSignals()
        for words in ([1, 1, 2], [2, 3, 3], [1, 2, 3]):
            base.zero_grad()
            model(torch.tensor(words)).square().sum().backward()
            rows.append(list(signals.read(None, list(model.parameters())))[1:])
            base.step()
        found.append(rows)
    assert found[0][1][1] != 0.0
    for sparse_row, dense_row in zip(*found, strict=True):
        assert sparse_row == pytest.approx(dense_row, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("loss", "factor", "finite"),
    [(None, 1.0, True), (1.0, 1.0, True), (math.nan, 1.0, False), (1.0, math.inf, False), (None, math.nan, False)],
)
def test_finite_as_far_as_it_is_known(loss: float | None, factor: float, finite: bool) -> None:
    model, _ = with_gradient()
    model.weight.grad.mul_(factor)
    found = StepSignals().read(None if loss is None else torch.tensor(loss), list(model.parameters()))
    assert found.finite is finite


def test_numbers_that_are_under_way_travel_with_copies_and_states() -> None:
    signals, fresh, sent = StepSignals(), StepSignals(), [0.5, 4.0, 3.0, 9.0, 2.5, 1.0]
    signals._send(torch.tensor(sent, dtype=torch.float64))
    fresh.load_state_values(signals.state_values())
    for other in (signals, fresh, copy.deepcopy(signals)):
        assert other.delayed == sent and not other._nothing_sent
