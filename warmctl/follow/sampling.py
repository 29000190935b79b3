"""A fixed random sample of the entries of many tensors, small enough to keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from warmctl.vectors import local


class Sample:
    """The same at most `size` entries each time, drawn over all tensors together; all of them where there are no more.

    Of a sharded tensor they are entries of this process's part.
    """

    def __init__(self, tensors: Sequence[Tensor], size: int) -> None:
        sizes = [local(t.detach()).numel() for t in tensors]
        total = sum(sizes)
        if total <= size:
            places = torch.arange(total)
        else:
            places = torch.randint(total, (size,), generator=torch.Generator().manual_seed(0)).sort().values
        self.size = len(places)
        self._parts: list[tuple[int, Tensor]] = []
        start = 0
        for index, count in enumerate(sizes):
            inside = places[(places >= start) & (places < start + count)] - start
            if len(inside):
                self._parts.append((index, inside))
            start += count

    @torch.no_grad()
    def take(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """A float32 copy of the entries, on the first tensor's device; zeros for a tensor that is not there."""
        device = next((local(t).device for t in tensors if t is not None), torch.device("cpu"))
        parts = []
        for index, places in self._parts:
            tensor = tensors[index]
            if tensor is None:
                parts.append(torch.zeros(len(places), device=device))
                continue
            part = local(tensor.detach())
            part = part if part.layout == torch.strided else part.to_dense()
            parts.append(torch.take(part, places.to(part.device)).to(device, torch.float32))
        return torch.cat(parts) if parts else torch.zeros(0, device=device)
