"""Operators on the closed-form problems."""

from __future__ import annotations

import numpy as np

from tests.problems_closed_form import Problem, flat
from warmctl.curvature.operators import HessianOperator
from warmctl.loss.replay import Replay
from warmctl.vectors import random_like


def replay(problem: Problem) -> Replay:
    return Replay.of_loss(problem.loss, problem.params, module=problem.model)


def products(operator: HessianOperator, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Random vectors and their products, as columns."""
    vectors = [random_like(operator.template, seed) for seed in range(count)]
    return np.stack([flat(v) for v in vectors], 1), np.stack([flat(operator.matvec(v)) for v in vectors], 1)
