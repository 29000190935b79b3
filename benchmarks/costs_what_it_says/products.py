"""Part 1: Hessian-vector products by each method, in gradient evaluations by time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.costs_what_it_says.training import Make, build
from benchmarks.harness.data import Batch
from benchmarks.harness.models import size_of
from benchmarks.harness.problems import cross_entropy
from benchmarks.harness.results import Row, median
from benchmarks.harness.timing import interleaved, relative
from warmctl.curvature.operators import HessianOperator


def products(make: Make, batch: Batch, rounds: int, methods: int = 4) -> Row:
    """Products by each method, in gradient evaluations by time."""
    model = build(make)
    params = list(model.parameters())

    def loss() -> Tensor:
        return cross_entropy(model, batch)

    def gradient() -> None:
        model.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]

    gradient()
    present = [p.grad.clone() for p in params if p.grad is not None]
    vector = [torch.randn_like(p) for p in params]
    forward_difference = HessianOperator(loss, params, "finite_difference", gradient=present)
    kept = HessianOperator(loss, params, "double_backward")
    forward_over_reverse = HessianOperator(loss, params, "forward_over_reverse")

    def graph_and_product() -> None:
        with HessianOperator(loss, params, "double_backward") as operator:
            operator.matvec(vector)

    calls: dict[str, Callable[[], Any]] = {
        "gradient": gradient,
        "forward difference": lambda: forward_difference.matvec(vector),
        "double backward": lambda: kept.matvec(vector),
        "graph and product": graph_and_product,
        "forward over reverse": lambda: forward_over_reverse.matvec(vector),
    }
    times = interleaved(dict(list(calls.items())[: methods + 1]), rounds)
    row: Row = {"parameters": size_of(model), "gradient ms": 1e3 * median(times["gradient"])}
    row.update({name: relative(times, name, "gradient") for name in times if name != "gradient"})
    if "graph and product" in row:
        row["graph building"] = row.pop("graph and product") - row["double backward"]
    return row
