"""λ_max from cold by warmctl and by other libraries: their calls, the cheapest setting at equal error, time, memory."""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.costs_what_it_says import interleaved, relative
from benchmarks.harness.problems import GPT, PROBLEMS, Batch, mlp, small_conv
from benchmarks.harness.results import median
from warmctl import sharpness

Row = dict[str, Any]
CROSS_ENTROPY = nn.CrossEntropyLoss()
ERROR, LIMIT = 0.01, 100


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = CROSS_ENTROPY(net(batch[0]), batch[1])
    return loss


def flat(net: nn.Module) -> nn.Module:
    """Logits [B, T, C] as [B·T, C], as all libraries take them."""
    return nn.Sequential(net, nn.Flatten(0, -2))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return flat(make())


def relative_error(found: float, truth: float) -> float:
    """|found − truth| / |truth|; a failed measurement is 100 % off."""
    return abs(found - truth) / abs(truth) if np.isfinite(found) else 1.0


@dataclass(frozen=True)
class Cold:
    """A model of a million parameters and how it has been trained before it is measured."""

    make: Callable[[], nn.Module]
    problem: str
    batch: int
    rule: Callable[..., Optimizer]

    def trained(self, steps: int) -> tuple[nn.Module, Batch]:
        """The net after `steps` training steps, in eval mode, and the batch to measure on."""
        problem = PROBLEMS[self.problem]
        stream = problem.stream(problem.data()[0], torch.Generator().manual_seed(0), self.batch)
        net = built(self.make)
        optimizer = self.rule(net.parameters())
        for _ in range(steps):
            x, y = next(stream)
            optimizer.zero_grad()
            loss_of(net, (x, y.flatten())).backward()
            optimizer.step()
        x, y = next(stream)
        net.zero_grad(set_to_none=True)
        return net.eval(), (x, y.flatten())


COLD = {
    "MLP": Cold(partial(mlp, 640, 4), "mlp", 256, partial(SGD, lr=0.1, momentum=0.9)),
    "convolutional": Cold(partial(small_conv, 235), "digits", 64, partial(SGD, lr=0.03, momentum=0.9)),
    "GPT": Cold(partial(GPT, 144, 4), "gpt", 8, partial(AdamW, lr=1e-3)),
}

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


def reference(net: nn.Module, batch: Batch) -> float:
    """The largest eigenvalue in float64 to 1e-6, by products of its own."""
    twin = copy.deepcopy(net).double()
    params = list(twin.parameters())
    sizes = [p.numel() for p in params]
    x, y = batch
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_of(twin, (x.double() if x.is_floating_point() else x, y))
        gradient = torch.autograd.grad(loss, params, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        parts = [v.view_as(p) for v, p in zip(torch.from_numpy(vector).flatten().split(sizes), params, strict=True)]
        image = torch.autograd.grad(gradient, params, parts, retain_graph=True)
        return torch.cat([part.flatten() for part in image]).numpy()

    operator = LinearOperator((sum(sizes),) * 2, matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(sum(sizes))
    top = eigsh(operator, k=1, which="LA", tol=1e-6, v0=start, return_eigenvectors=False)
    return float(top[0])


def tried(name: str, net: nn.Module, batch: Batch, truth: float, setting: Setting, seeds: Sequence[int]) -> Row:
    """Errors, products and seconds of one setting, seed by seed until one is off by more than ERROR."""
    row: Row = {"setting": dict(setting), "errors": [], "products": [], "seconds": []}
    for seed in seeds:
        start = time.perf_counter()
        eigenvalue, products = call(name, net, batch, seed, setting)
        row["seconds"].append(time.perf_counter() - start)
        row["errors"].append(relative_error(eigenvalue, truth))
        row["products"].append(products)
        if row["errors"][-1] > ERROR:
            break
    row["reached"] = max(row["errors"]) <= ERROR
    return row


def search(name: str, net: nn.Module, batch: Batch, truth: float, seeds: Sequence[int]) -> Row:
    """Climb each ladder to the first setting that reaches ERROR for all seeds, and keep the fastest of these.

    A ladder is left where a setting has taken LIMIT products.
    """
    rows, best = [], None
    for ladder in LADDERS[name]:
        for setting in ladder:
            rows.append(tried(name, net, batch, truth, setting, seeds))
            if rows[-1]["reached"]:
                if best is None or sum(rows[-1]["seconds"]) < sum(best["seconds"]):
                    best = rows[-1]
                break
            if max(rows[-1]["products"]) >= LIMIT:
                break
    return {"tried": rows, "chosen": best}


def compared(net: nn.Module, batch: Batch, chosen: dict[str, Row], seeds: Sequence[int], rounds: int) -> dict[str, Row]:
    """Seconds of each library at its setting and of a gradient, in turn; each round another seed."""

    def gradient() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            torch.autograd.grad(loss_of(net, batch), list(net.parameters()))

    calls: dict[str, Callable[[], Any]] = {"gradient": gradient}
    for name, row in chosen.items():
        turn = itertools.cycle(seeds)
        calls[name] = lambda name=name, row=row, turn=turn: call(name, net, batch, next(turn), row["setting"])
    times = interleaved(calls, rounds)
    return {
        name: {
            "setting": " ".join(f"{key}={value}" for key, value in row["setting"].items()),
            "error %": 100 * max(row["errors"]),
            "products": float(np.mean(row["products"])),
            "seconds": median(times[name]),
            "gradients": relative(times, name, "gradient"),
            "times ours": relative(times, name, "warmctl"),
        }
        for name, row in chosen.items()
    }


# -- memory -----------------------------------------------------------------------------------------------


def peak_memory(name: str, net: nn.Module, batch: Batch, setting: Setting) -> float:
    """MiB that a call adds at its peak to what a process holds after a gradient; nan where the system cannot say."""
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    prompt = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is freed is given back
    with mock.patch.dict(os.environ, prompt), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, name, net, batch, setting, torch.get_num_threads()).result()


def _peak(name: str, net: nn.Module, batch: Batch, setting: Setting, threads: int) -> float:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tiny = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    if name != "gradient":  # imports and caches of the library
        call(name, tiny, (torch.randn(8, 4), torch.randint(3, (8,))), 0, setting)
    for _ in range(2):
        with sdpa_kernel(SDPBackend.MATH):
            torch.autograd.grad(loss_of(net, batch), list(net.parameters()))
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    if name == "gradient":
        with sdpa_kernel(SDPBackend.MATH):
            torch.autograd.grad(loss_of(net, batch), list(net.parameters()))
    else:
        call(name, net, batch, 0, setting)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])
