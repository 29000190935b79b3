"""The benchmark `tracks_sharpness`: its truth, its errors, its counts, and that each of its targets can be missed."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.harness.data import Batch
from benchmarks.harness.models import size_of
from benchmarks.harness.oracle import preconditioner
from benchmarks.harness.results import Row
from benchmarks.tracks_sharpness import cold, figure, libraries, nets, truth, warm
from benchmarks.tracks_sharpness.nets import Tracked
from benchmarks.tracks_sharpness.targets import judged
from warmctl import sharpness
from warmctl.stability.estimator import SharpnessEstimator


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def pool() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 5, generator=generator), torch.randint(3, (48,), generator=generator)


TINY = Tracked(lambda: net(), pool, sgd=0.1, adam=1e-2, size=16)


def test_dense_truth_is_the_hessian_of_the_loss() -> None:
    model, batch = net(), pool()
    hessian = truth.dense_hessian(model, batch, chunk=7)
    torch.testing.assert_close(hessian, hessian.T)
    direction = torch.randn(len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ends = []
    for step in (1e-4, -1e-4):
        twin = net().double()
        moved = torch.nn.utils.parameters_to_vector(twin.parameters()) + step * direction
        torch.nn.utils.vector_to_parameters(moved, twin.parameters())
        loss = nets.loss_of(twin, (batch[0].double(), batch[1]))
        ends.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))]))
    torch.testing.assert_close(hessian @ direction, (ends[0] - ends[1]) / 2e-4, rtol=1e-5, atol=1e-8)


def test_dense_truth_agrees_with_sharpness_and_with_the_matrix_free_reference() -> None:
    model, batch = net(), pool()
    top = truth.dense_top_eigenvalue(truth.dense_hessian(model, batch))
    assert sharpness(model, nets.loss_of, batch, tol=1e-4).eigenvalue == pytest.approx(top, rel=1e-5)
    values = torch.linalg.eigvalsh(truth.dense_hessian(model, batch))
    assert truth.reference(model, batch) == pytest.approx(float(values[-1]), rel=1e-6)


def test_the_largest_algebraic_eigenvalue_is_meant() -> None:
    assert truth.dense_top_eigenvalue(torch.diag(torch.tensor([-5.0, 2.0, 1.0, 0.5, -1.0], dtype=torch.float64))) == (
        pytest.approx(2.0)
    )


@pytest.mark.parametrize("steps", [0, 3])
def test_preconditioned_truth_is_on_the_wrappers_own_diagonal(steps: int) -> None:
    model, batch = net(), pool()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, betas=(0.9, 0.99))
    for _ in range(steps):
        optimizer.zero_grad()
        nets.loss_of(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    nets.loss_of(model, batch).backward()
    p = preconditioner(optimizer, [q.grad for q in model.parameters()])
    estimator = SharpnessEstimator(optimizer, "auto", "lanczos", 2)
    root = torch.cat([r.flatten().double() for r in estimator.scaling(list(model.parameters()))[0]])
    edge = 38 * (1 - 0.9 ** (steps + 1))
    torch.testing.assert_close(root**2, 1e-2 / (edge * p), rtol=1e-4, atol=0)
    spectrum = np.linalg.eigvals((truth.dense_hessian(model, batch) / p[:, None]).numpy())
    assert truth.true_sharpness(model, optimizer, batch) == pytest.approx(spectrum.real.max(), rel=1e-6)


@pytest.mark.parametrize(("kind", "data"), list(itertools.product(("SGD", "Adam"), ("one batch", "mini-batches"))))
def test_tracking_with_many_exact_products_meets_the_truth(kind: str, data: str) -> None:
    known = warm.trajectory(TINY, kind, data, 6)
    found = warm.tracked(TINY, kind, data, warm.EXACT, 1, 12, known)
    assert found["probes"] == 5
    assert found["probe p95"] < 1e-3
    wrong = known | {"truth": [1.1 * value for value in known["truth"]]}
    assert warm.tracked(TINY, kind, data, warm.EXACT, 1, 12, wrong)["probe median"] == pytest.approx(
        0.1 / 1.1, rel=0.05
    )


def test_a_wrong_eigenvector_shows_as_an_error() -> None:
    model, batch = net(), pool()
    hessian = truth.dense_hessian(model, batch)
    values, vectors = torch.linalg.eigh(hessian)
    second = float(vectors[:, -2] @ hessian @ vectors[:, -2])
    assert truth.relative_error(second, float(values[-1])) == pytest.approx(1 - float(values[-2] / values[-1]))
    assert truth.relative_error(float("nan"), 2.0) == 1.0


def test_probes_and_their_price_are_counted_between_the_first_and_the_last() -> None:
    known = warm.trajectory(TINY, "SGD", "one batch", 11)
    found = warm.tracked(TINY, "SGD", "one batch", "finite_difference", 5, 3, known)
    assert found["probes"] == 2
    assert found["gradients a probe"] == pytest.approx(3.0)
    assert found["products a step"] == pytest.approx(2 * 3 / 10)


def test_another_trajectory_is_refused() -> None:
    known = warm.trajectory(TINY, "SGD", "one batch", 3)
    with pytest.raises(RuntimeError, match="changed the trajectory"):
        warm.tracked(TINY, "Adam", "one batch", warm.EXACT, 1, 2, known)


TIGHT: dict[str, Row] = {
    "warmctl": {"method": "auto", "tol": 1e-3},
    "PyHessian": {"tol": 1e-5},
    "curvlinops + SciPy": {"ncv": 10, "tol": 1e-4},
    "hessian-eigenthings": {"method": "autograd", "max_iter": 20},
    "nngeom": {"tol": 1e-6},
}


@pytest.mark.parametrize("name", libraries.CALLS)
def test_every_library_finds_the_same_eigenvalue_and_leaves_the_model_alone(name: str) -> None:
    if name not in libraries.installed()[0]:
        pytest.skip(f"{name} is not installed")
    model, batch = net().eval(), pool()
    before = [p.detach().clone() for p in model.parameters()]
    top = truth.dense_top_eigenvalue(truth.dense_hessian(model, batch))
    eigenvalue, products = libraries.call(name, model, batch, 0, TIGHT[name])
    assert eigenvalue == pytest.approx(top, rel=1e-2)
    assert products > 2
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_first_setting_that_reaches_one_percent_for_every_seed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, float]] = []

    def library(model: nn.Module, batch: Batch, seed: int, tol: float) -> tuple[float, int]:
        calls.append((seed, tol))
        return 1 + tol * (0.5 + seed), 3

    monkeypatch.setitem(libraries.CALLS, "warmctl", library)
    monkeypatch.setitem(libraries.LADDERS, "warmctl", [[{"tol": tol} for tol in (0.1, 0.01, 0.003, 0.001)]])
    found = cold.search("warmctl", net(), pool(), 1.0, (0, 1, 2))
    assert found["chosen"]["setting"] == {"tol": 0.003}
    assert calls == [(0, 0.1), (0, 0.01), (1, 0.01), (0, 0.003), (1, 0.003), (2, 0.003)]
    assert cold.search("warmctl", net(), pool(), 2.0, (0,))["chosen"] is None


def rows(
    error: float = 0.01, cost: float = 2.0, ratio: float = 2.5, memory: float = 1.5
) -> tuple[list[Row], list[Row]]:
    tracking: list[Row] = [
        {"data": data, "hvp": warm.PLAIN, "every": every, "products": 2, "probe median": e, "gradients a probe": cost}
        for data, every, e in itertools.product(("one batch", "mini-batches"), warm.CADENCES, (0.001, error))
    ]
    ours: Row = {"problem": "MLP", "library": "warmctl", "times ours": 1.0, "memory times ours": 1.0}
    peers: list[Row] = [
        {"problem": "MLP", "library": "a", "times ours": ratio, "memory times ours": 3.0},
        {"problem": "MLP", "library": "b", "times ours": 9.0, "memory times ours": memory},
        {"problem": "MLP", "library": "not reached"},
    ]
    return tracking, [ours, *peers]


@pytest.mark.parametrize(
    ("change", "missed"),
    [({}, 0), ({"error": 0.03}, 6), ({"cost": 3.0}, 6), ({"ratio": 1.9}, 1), ({"memory": 0.9}, 1)],
)
def test_each_target_can_be_missed(change: dict[str, float], missed: int) -> None:
    found = judged(*rows(**change))
    assert len(found) == 8
    assert sum(not row["met"] for row in found.values()) == missed


def test_to_miss_one_percent_ourselves_is_to_miss_the_cold_targets() -> None:
    tracking, cold = rows()
    cold[0] = {"problem": "MLP", "library": "warmctl"}
    assert sum(not row["met"] for row in judged(tracking, cold).values()) == 2


def test_models_have_the_sizes_that_are_claimed() -> None:
    assert all(size_of(nets.built(model.make)) <= 2000 for model in nets.TRACKED.values())
    assert all(size_of(nets.built(model.make)) >= 1e6 for model in nets.COLD.values())


def test_figure_is_drawn(tmp_path: Any) -> None:
    tracking = [
        {"model": model, "data": "one batch", "hvp": warm.PLAIN, "every": 1, "products": k, "gradients a probe": k}
        | {"held median": 0.1 / k}
        for model, k in itertools.product(nets.TRACKED, warm.PRODUCTS)
    ]
    assert figure.curve(tracking)[1] == (2, pytest.approx(0.05))
    path = tmp_path / "figure.png"
    figure.draw(tracking, {"MLP": [{"library": "warmctl", "setting": {}, "products": [3], "errors": [0.01]}]}, path)
    assert path.stat().st_size > 0
