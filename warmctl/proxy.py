"""What makes an object a `torch.optim.Optimizer` round another one. It knows nothing of warmup.

Schedulers, `GradScaler`, Accelerate, Lightning and the Trainer ask for an `Optimizer`; `torch.save`, `copy` and
`torch.distributed.checkpoint` take it apart. The proxy is one without a copy of anything: groups, state, defaults and
hooks are the base's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from warmctl.vectors import local

HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""What torch keeps an optimizer's hooks in."""


class OptimizerProxy(Optimizer):
    """An optimizer that hands everything on to `base`, bit for bit.

    It does not call Optimizer's own constructor, which would make groups and hooks of its own.
    """

    transient: tuple[str, ...] = ("step", "grad_scale", "found_inf")
    """Attributes that copies and pickles leave out; "step" is a scheduler's patch on the instance, bound to the
    original."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # as engines do that shard parameters themselves
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    @property
    def all_params(self) -> list[Tensor]:
        """Group by group."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def trainable(self) -> list[Tensor]:
        """Those of them that require a gradient now."""
        return [p for p in self.all_params if p.requires_grad]

    @property
    def has_gradient(self) -> bool:
        """Whether a trainable parameter has one now."""
        return any(p.grad is not None for group in self.param_groups for p in group["params"] if p.requires_grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch."""
        self.base.add_param_group(param_group)

    def train(self) -> None:
        """Forwarded for schedule-free optimizers; nothing for others."""
        getattr(self.base, "train", lambda: None)()

    def eval(self) -> None:
        """Forwarded for schedule-free optimizers; nothing for others."""
        getattr(self.base, "eval", lambda: None)()

    def step(self, closure: Any = None) -> Any:
        """One step of the base."""
        self._lend_scaler()
        try:
            return self.base.step() if closure is None else self.base.step(closure)
        finally:
            self._take_back_scaler()

    step.hooked = True  # type: ignore[attr-defined]  # step hooks fire in the base, once

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        """What the proxy does not define is the base's own: `d` of Prodigy, `first_step` of SAM. To be read only.

        Private names stay apart, which copy, pickle, schedulers and scalers ask for and set on each.
        """
        base = self.__dict__.get("base")  # not there yet while a copy is being made
        if base is None or name.startswith("_") or name in self.transient:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(base, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self.transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    # torch.amp.GradScaler leaves `grad_scale` and `found_inf` on the optimizer that it is given. For one step they are
    # lent to the base; who measures has the gradients unscaled first, in place of the base's fused kernel. They go with
    # the step: an error in it keeps the scaler from deleting them, which would multiply the next scale by this one.

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(getattr(self.base, "_step_supports_amp_scaling", False))

    def _lend_scaler(self, unscale: bool = False) -> bool:
        """Hand its numbers on to the base for one step. True if the base will skip that step."""
        found_inf = self.__dict__.get("found_inf")
        if found_inf is None:
            return False
        self.base.grad_scale, self.base.found_inf = self.__dict__.get("grad_scale"), found_inf  # type: ignore[attr-defined]
        skipped = float(found_inf) != 0.0
        if unscale and not skipped:
            self._unscale()
        return skipped

    def _unscale(self) -> None:
        scale: Any = self.base.__dict__.get("grad_scale")
        grads = [local(p.grad) for p in self.all_params if p.grad is not None]
        if scale is not None and grads:
            torch._foreach_div_(grads, scale.to(grads[0].device))
            self.base.grad_scale = None  # type: ignore[attr-defined]

    def _take_back_scaler(self) -> None:
        for name in ("grad_scale", "found_inf"):
            self.base.__dict__.pop(name, None)
            self.__dict__.pop(name, None)

    def __delattr__(self, name: str) -> None:
        if name not in ("grad_scale", "found_inf"):
            super().__delattr__(name)


def _of_base(name: str) -> property:
    return property(lambda self: getattr(self.base, name))


# Registered once, on whichever of the two, and fired once.
for _name in HOOKS:
    setattr(OptimizerProxy, _name, _of_base(_name))
