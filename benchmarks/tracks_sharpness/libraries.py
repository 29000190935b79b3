"""How each library is asked for λ_max, and the settings that are tried."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.data import Batch
from benchmarks.tracks_sharpness.nets import CROSS_ENTROPY, loss_of
from warmctl import sharpness

LIMIT = 100
"""Products, from which on a setting is too dear."""
Setting = Mapping[str, Any]
Answer = tuple[float, int]  # eigenvalue, Hessian-vector products


class Counted:
    """Counts its calls."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.calls = call, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.call(*args, **kwargs)


def by_warmctl(net: nn.Module, batch: Batch, seed: int, method: str, tol: float) -> Answer:
    found = sharpness(net, loss_of, batch, method=method, tol=tol, seed=seed)
    return found.eigenvalue, found.hvps


def by_pyhessian(net: nn.Module, batch: Batch, seed: int, tol: float) -> Answer:
    """With `data`, which keeps the graph; `dataloader` would build it for each product."""
    module = importlib.import_module("pyhessian.hessian")
    product = Counted(module.hessian_vector_product)
    torch.manual_seed(seed)
    with mock.patch.object(module, "hessian_vector_product", product):
        values, _ = module.hessian(net, CROSS_ENTROPY, data=batch, cuda=False).eigenvalues(LIMIT, tol, top_n=1)
    net.zero_grad(set_to_none=True)  # it leaves gradients, whose graphs would never be freed
    return float(values[0]), product.calls


def by_curvlinops(net: nn.Module, batch: Batch, seed: int, ncv: int, tol: float) -> Answer:
    """Without its check of determinism, which takes products of its own."""
    from curvlinops import HessianLinearOperator

    hessian = HessianLinearOperator(net, CROSS_ENTROPY, list(net.parameters()), [batch], check_deterministic=False)
    operator = hessian.to_scipy()
    product = Counted(operator.matvec)
    start = np.random.default_rng(seed).standard_normal(operator.shape[0]).astype(operator.dtype)
    counted = LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)
    values, _ = eigsh(counted, k=1, which="LA", tol=tol, ncv=ncv, v0=start)
    return float(values[0]), product.calls


def by_eigenthings(net: nn.Module, batch: Batch, seed: int, method: str, max_iter: int) -> Answer:
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    operator: Any = HessianOperator(net, [batch], supervised_loss(CROSS_ENTROPY), method=method)
    operator.matvec = Counted(operator.matvec)
    found = lanczos(operator, k=1, max_iter=max_iter, which="LA", seed=seed)
    return float(found.eigenvalues[0]), operator.matvec.calls


def by_nngeom(net: nn.Module, batch: Batch, seed: int, tol: float) -> Answer:
    from nngeom import Model, power_iteration

    model: Any = Model(net, loss_fn=loss_of)
    model.hvp = Counted(model.hvp)
    found = power_iteration(model, batch, k=1, iters=LIMIT // 2, tol=tol, seed=seed)
    return float(found.top_eigenvalue), model.hvp.calls


TOLERANCES = [{"tol": tol} for tol in (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)]
STEPS = (3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40)
LADDERS: dict[str, list[list[Setting]]] = {  # of settings, the loosest first; several where there are several ways
    "warmctl": [[{"method": m, **t} for t in TOLERANCES] for m in ("auto", "finite_difference")],
    "PyHessian": [TOLERANCES],
    "curvlinops + SciPy": [[{"ncv": ncv, "tol": t} for t in (0.3, 0.1, 0.03, 0.01, 1e-3)] for ncv in (5, 10)],
    "hessian-eigenthings": [
        [{"method": method, "max_iter": steps} for steps in STEPS] for method in ("autograd", "finite_difference")
    ],
    "nngeom": [TOLERANCES],
}
CALLS: dict[str, Callable[..., Answer]] = {
    "warmctl": by_warmctl,
    "PyHessian": by_pyhessian,
    "curvlinops + SciPy": by_curvlinops,
    "hessian-eigenthings": by_eigenthings,
    "nngeom": by_nngeom,
}
MODULES = {
    "PyHessian": "pyhessian",
    "curvlinops + SciPy": "curvlinops",
    "hessian-eigenthings": "hessian_eigenthings",
    "nngeom": "nngeom",
}


def installed() -> tuple[list[str], dict[str, str]]:
    """Libraries that can be imported, warmctl first; and why the others cannot."""
    there, missing = ["warmctl"], {}
    for name, module in MODULES.items():
        try:
            importlib.import_module(module)
            there.append(name)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return there, missing


def call(name: str, net: nn.Module, batch: Batch, seed: int, setting: Setting) -> Answer:
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CALLS[name](net, batch, seed, **setting)
