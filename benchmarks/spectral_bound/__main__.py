"""The command: every model once, as a table."""

from __future__ import annotations

import torch

from benchmarks.harness.results import table
from benchmarks.spectral_bound.dense import eigenvalues
from benchmarks.spectral_bound.models import MODELS, case
from warmctl.planning.spectral import spectral_bound

COLUMNS = {"model": "{}", "Gauss–Newton": "{:.3g}", "Hessian": "{:.3g}", "bound": "{:.3g}", "times": "{:.1f}"}


def main() -> None:
    """Print bound, eigenvalues, and how many times the Gauss–Newton eigenvalue the bound is."""
    torch.set_num_threads(1)
    rows = []
    for name in MODELS:
        built = case(name)
        bound, reason = spectral_bound(built.model, built.loss_fn, built.batch, list(built.model.parameters()))
        assert bound is not None, reason
        gauss_newton, hessian = eigenvalues(built)
        values = (name, gauss_newton, hessian, bound, bound / gauss_newton)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    table("λ_max and its bound, at initialisation", rows, COLUMNS)


if __name__ == "__main__":
    main()
