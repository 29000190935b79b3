"""The matrices themselves, in float64, by plain autograd."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.spectral_bound.models import Case


def eigenvalues(case: Case) -> tuple[float, float]:
    """λ_max of the Gauss–Newton matrix and of the Hessian, over the trainable parameters, in the present mode."""
    names, params = zip(*((n, p) for n, p in case.model.named_parameters() if p.requires_grad), strict=True)
    sizes = [p.numel() for p in params]
    x, y = case.batch
    streams, buffers = torch.get_rng_state(), {n: b.clone() for n, b in case.model.named_buffers()}

    def output(flat: Tensor) -> Tensor:
        torch.set_rng_state(streams)
        parts = [part.view_as(p) for part, p in zip(flat.split(sizes), params, strict=True)]
        kept = {name: b.clone() for name, b in buffers.items()}
        return functional_call(case.model, dict(zip(names, parts, strict=True)) | kept, (x,))

    def loss_of(z: Tensor) -> Tensor:
        return case.loss_fn(lambda _: z, (x, y))  # type: ignore[arg-type]

    theta = torch.cat([p.detach().flatten() for p in params])
    z = output(theta).detach()
    jacobian = torch.autograd.functional.jacobian(output, theta).reshape(z.numel(), -1).numpy()
    bend = torch.autograd.functional.hessian(loss_of, z).reshape(z.numel(), z.numel()).numpy()
    with sdpa_kernel(SDPBackend.MATH):  # the others have one derivative only
        hessian = torch.autograd.functional.hessian(lambda t: loss_of(output(t)), theta).numpy()
    torch.set_rng_state(streams)
    return float(np.linalg.eigvalsh(jacobian.T @ bend @ jacobian)[-1]), float(np.linalg.eigvalsh(hessian)[-1])
