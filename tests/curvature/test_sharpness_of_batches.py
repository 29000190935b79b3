"""`sharpness` over several batches: weighted by their rows, one graph at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.problems_closed_form import Problem, classification, dense_hessian, oracle, softmax_regression, tanh_mlp
from warmctl.curvature.sharpness import sharpness


def thirds(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    """The batch in three very unequal parts."""
    x, y = problem.batch
    cuts = (0, 3, 11, len(x))
    return [(x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts)]


def several(parts: list[tuple[Tensor, Tensor]]) -> dict[str, Callable[[], Any]]:
    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(parts)

    return {
        "list of tuples": lambda: parts,
        "list of lists": lambda: [list(part) for part in parts],
        "generator": lambda: (part for part in parts),
        "iterator": lambda: iter(parts),
        "iterable": Loader,
        "list of dicts": lambda: [{"name": "rows", "x": x, "y": y} for x, y in parts],
    }


def any_classification(model: nn.Module, batch: Any) -> Tensor:
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("kind", several([]).keys())
@pytest.mark.parametrize("method", ["auto", "finite_difference"])
def test_unequal_batches_are_weighted_by_their_rows(kind: str, method: str) -> None:
    problem = tanh_mlp()
    parts = thirds(problem)
    whole = np.linalg.eigvalsh(oracle(problem))[-1]
    unweighted = np.linalg.eigvalsh(sum(dense_hessian(problem.model, classification, part) for part in parts) / 3)[-1]
    assert abs(unweighted / whole - 1) > 0.05  # an unweighted mean would be noticed
    result = sharpness(problem.model, any_classification, several(parts)[kind](), method=method)
    assert result.eigenvalue == pytest.approx(whole, rel=1e-3)


def test_batches_of_the_forms_that_are_one_batch() -> None:
    problem = softmax_regression()
    x, y = problem.batch
    top = np.linalg.eigvalsh(oracle(problem))[-1]
    fixed = {"x": x, "y": y}
    for batch in ((x, y), [x, y], fixed, ((x, {"mask": None}), y), [(x,), y]):

        def loss_fn(model: nn.Module, got: Any, batch: Any = batch) -> Tensor:
            assert got is batch  # handed over as it is
            return F.cross_entropy(model(x), y)

        assert sharpness(problem.model, loss_fn, batch).eigenvalue == pytest.approx(top, rel=1e-3)
    assert sharpness(problem.model, lambda m, b: F.cross_entropy(m(b), y), x).eigenvalue == pytest.approx(top, rel=1e-3)


def test_only_one_graph_is_alive_at_a_time() -> None:
    problem = tanh_mlp()
    alive: list[Any] = []
    most = 0

    class Tracked(torch.autograd.Function):
        """The identity; its node lives as long as the graph."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.mark = Mark()
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Mark:
        def __init__(self) -> None:
            nonlocal most
            alive.append(None)
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.pop()

    for method in ("double_backward", "finite_difference"):
        sharpness(
            problem.model,
            lambda m, b: Tracked.apply(classification(m, b)),
            thirds(problem) * 2,
            method=method,
        )
        assert most == 1
        assert not alive


def test_each_product_goes_over_every_batch_once() -> None:
    problem = tanh_mlp()
    seen: list[int] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(len(batch[0]))
        return classification(model, batch)

    result = sharpness(problem.model, loss_fn, thirds(problem))
    assert seen == [3, 8, 37] * (1 + result.hvps)  # once for the gradient
    seen.clear()
    result = sharpness(problem.model, loss_fn, thirds(problem), method="finite_difference")
    assert seen == [3, 8, 37] + [3, 3, 8, 8, 37, 37] * result.hvps


def test_fallback_over_several_batches_is_tried_once() -> None:
    torch.manual_seed(0)
    bag, tokens, target = nn.EmbeddingBag(6, 3), torch.randint(6, (12, 2)), torch.randint(3, (12,))
    calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(batch[0]), batch[1])

    parts = [(tokens[:4], target[:4]), (tokens[4:], target[4:])]
    result = sharpness(bag, loss_fn, parts)
    assert calls == 2 + 1 + 4 * result.hvps  # gradients, one product that fails, central differences
    one = sharpness(bag, loss_fn, (tokens, target))
    assert result.eigenvalue == pytest.approx(one.eigenvalue, rel=1e-3)
