"""What a forward pass shows: σ before norms, saturated and dead units. Hooks are there only while it is watched."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from warmctl.loss.no_trace import measuring

ROWS = 256
"""Rows of a norm's input that σ is read from."""
SATURATION = 0.97
NORMS = nn.LayerNorm, nn.RMSNorm, nn.GroupNorm


class Activations:
    """Readings of the first training forward pass after `watch`.

    Args:
        model: whose norms, Tanh, Sigmoid and ReLU modules are looked at.
        most: of each kind, evenly over the depth.

    Attributes:
        hidden: whether there are some inside of compiled modules, where hooks do not fire.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self.model = model
        compiled = _compiled(model)
        seen = {kind: {} for kind in ("sigma", "saturated", "dead")}  # type: dict[str, dict[str, nn.Module]]
        self.hidden = False
        for name, module in model.named_modules():
            if (kind := _kind(module)) is None:
                continue
            if module in compiled:
                self.hidden = True
            else:
                seen[kind][name] = module
        self._looked_at = {
            f"vitals/{name}/{kind}": seen[kind][name] for kind in seen for name in spread(list(seen[kind]), most)
        }
        self._handles: list[Any] = []
        self._found: dict[str, Tensor] = {}

    @property
    def columns(self) -> list[str]:
        return list(self._looked_at)

    def watch(self) -> None:
        self.stop()
        for column, module in self._looked_at.items():
            self._handles.append(module.register_forward_hook(_Look(self, column)))

    def stop(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._found = {}

    def take(self) -> dict[str, float]:
        """What was seen, by column; the watch ends."""
        found, values = self._found, []
        if found:
            values = torch.stack([value.double().cpu() for value in found.values()]).tolist()
        self.stop()
        return dict(zip(found, values, strict=True))

    def look(self, column: str, module: nn.Module, args: Any, output: Any) -> None:
        """In the forward pass of a module."""
        if column in self._found or not torch.is_grad_enabled() or measuring(self.model.parameters()):
            return
        value = args[0] if isinstance(module, NORMS) and args else output
        if isinstance(value, Tensor) and value.numel():
            with torch.no_grad():
                self._found[column] = _READ[column.rsplit("/", 1)[1]](module, value.detach())


class _Look:
    """The hook: forwards while its owner lives, and is nothing in a copied, saved or compiled model."""

    def __init__(self, owner: Activations | None, column: str) -> None:
        self.owner, self.column = (lambda: None) if owner is None else weakref.ref(owner), column

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        owner = self.owner()
        if owner is not None:
            owner.look(self.column, module, args, output)

    def __reduce__(self) -> Any:
        return _Look, (None, self.column)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _sigma(module: nn.Module, value: Tensor) -> Tensor:
    if isinstance(module, nn.GroupNorm):
        rows = value.reshape(value.shape[0] * module.num_groups, -1)
    else:
        normalised: Any = module.normalized_shape
        rows = value.reshape(-1, torch.Size(normalised).numel())
    rows = rows[:: -(-len(rows) // ROWS)].float()
    if isinstance(module, nn.RMSNorm):
        return rows.square().mean(-1).sqrt().mean()
    return rows.std(-1, correction=0).mean()


def _saturated(module: nn.Module, value: Tensor) -> Tensor:
    if isinstance(module, nn.Sigmoid):
        return ((value - 0.5).abs() > SATURATION - 0.5).float().mean()
    return (value.abs() > SATURATION).float().mean()


def _dead(module: nn.Module, value: Tensor) -> Tensor:
    """Of images (batch, channel, height, width) a unit is a channel; else it is an entry of the last dimension."""
    unit = 1 if value.ndim >= 4 else value.ndim - 1
    others = [d for d in range(value.ndim) if d != unit]
    alive = value.amax(others) > 0 if others else value > 0
    return 1.0 - alive.float().mean()


_READ = {"sigma": _sigma, "saturated": _saturated, "dead": _dead}


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, NORMS):
        return "sigma"
    if isinstance(module, (nn.Tanh, nn.Sigmoid)):
        return "saturated"
    return "dead" if isinstance(module, (nn.ReLU, nn.ReLU6)) else None


def _compiled(model: nn.Module) -> set[nn.Module]:
    """All modules inside of those that are compiled."""
    tops = [m for m in model.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    return {inside for top in tops for inside in top.modules()}
