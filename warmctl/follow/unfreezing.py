"""Thawing a pretrained model stage by stage, each with a warmup of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from warmctl.follow.follower import Levers
from warmctl.follow.kept import whole
from warmctl.numeric import is_count

Stage = nn.Module | Iterable[nn.Module]


class Unfreezing:
    """Trains the first stage, and thaws the next whenever the warmup of the last has ended.

    With k of K stages free the target rate is η (k/K)^gamma. Every thaw begins warmup again: what was thawed was never
    measured. The wrapper has one scale for all groups: where the parameters of earlier stages have groups of their own,
    these keep the rate that they had, until the new scale has come to it, and are only cut with it in proportion:
    what was stable before stays as it was, and to the ratio on record, which is that of the new scale for all, they add
    at most their own of before. In a group that holds old and new parameters all are warmed again.

    >>> head, body = model[-1], model[:-1]
    >>> groups = [{"params": head.parameters()}, {"params": body.parameters()}]
    >>> opt = AdaptiveWarmup(torch.optim.AdamW(groups, lr=1e-2), model).follow(Unfreezing([head, body], every=12))
    >>> train(opt)
    >>> opt.metrics["stage"]
    2

    With None for stages it freezes and thaws nothing itself: it keeps the rates of the groups before the first one that
    somebody else has added or thawed, Lightning's `BackboneFinetuning` for instance.

    By `opt.follow` the later stages are frozen (`requires_grad_(False)`), but for parameters that an earlier one has
    too. What is frozen already when this is built stays so for good: the base under peft's adapters, say. The optimizer
    must hold the parameters of all stages from the beginning.

    Args:
        stages: from the first to be trained, the head, to the last: modules, or lists of them; see `by_depth`. None
            where somebody else thaws.
        gamma: at least 0; 0 is the full rate from the first stage on.
        every: steps from one thaw to the next; None waits for the end of warmup.

    Reading: `stage`, how many are free; with None one more than thaws were seen.

    Raises: TypeError for stages that are no modules, ValueError for none, for one without trainable parameters, and by
    `opt.follow` for one that the optimizer holds no parameter of.
    """

    moves_rate = True

    def __init__(self, stages: Sequence[Stage] | None, gamma: float = 0.5, every: int | None = None) -> None:
        if not 0.0 <= gamma < math.inf:
            raise ValueError(f"gamma must be at least 0, the exponent of the share of free stages, got {gamma!r}")
        if every is not None and not is_count(every):
            raise ValueError(f"every must be None or a number of steps of at least 1, got {every!r}")
        self.gamma, self.every = gamma, every
        self.stages = [] if stages is None else _parameters(stages)
        self._levers: Levers | None = None
        self._free, self._since = 1, 0
        # Of each group: its last rate over the schedule's; what that was before the last thaw, 0 if it was thawed then.
        self._last: list[float] = []
        self._kept: list[float] = []
        self._highest = 0.0  # scale since the last thaw
        self._training: list[int] = []  # how many parameters of each group train

    @classmethod
    def by_depth(cls, model: nn.Module, stages: int, **options: Any) -> Unfreezing:
        """As many stages of about equally many layers, in the order of definition, from the last to the first.

        A layer is a module that owns trainable parameters.
        """
        layers = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
        if not 1 <= stages <= len(layers):
            raise ValueError(f"stages must be in [1, {len(layers)}], the layers of {type(model).__name__}: {stages!r}")
        bounds = [round(i * len(layers) / stages) for i in range(stages + 1)]
        pieces = [_Own(layers[low:high]) for low, high in pairwise(bounds)]
        return cls(pieces[::-1], **options)

    @property
    def free(self) -> int:
        """How many stages are free."""
        return self._free

    def attach(self, levers: Levers) -> None:
        held = {p for group in levers.groups for p in group["params"]}
        for place, stage in enumerate(self.stages):
            if not held & set(stage):
                raise ValueError(
                    f"the optimizer holds no parameter of stage {place + 1} of {len(self.stages)}: build it with the "
                    "parameters of all stages, frozen or not"
                )
        self._levers = levers
        self._freeze()
        self._training = self._count()

    def detach(self) -> None:
        self._free = len(self.stages)
        self._freeze()

    def follow(self, scale: float, rate: float, phase: str) -> None:
        levers = self._levers
        assert levers is not None
        share = self._share
        if not self.stages:
            self._notice()
        self._highest = max(self._highest, scale)
        kept = [*self._kept, *[0.0] * (len(levers.groups) - len(self._kept))]
        factors = [max(before / self._highest, share) if self._highest > 0.0 else share for before in kept]
        for place, factor in enumerate(factors):
            levers.multiply_rate(place, factor)
        self._since, self._last = self._since + 1, [factor * scale for factor in factors]
        ready = phase != "warmup" if self.every is None else self._since >= self.every
        if ready and self._free < len(self.stages):
            self._free, self._since = self._free + 1, 0
            self._freeze()
            self._keep([not self._is_new(group) for group in levers.groups])

    def readings(self) -> dict[str, int]:
        return {"stage": self._free}

    def state_dict(self) -> dict[str, float]:
        groups = 0 if self._levers is None else len(self._levers.groups)
        state = {"free": float(self._free), "since": float(self._since), "highest": self._highest}
        for name, rates in (("last", self._last), ("kept", self._kept)):
            state |= {f"{name} {i}": rates[i] if i < len(rates) else 0.0 for i in range(groups)}
        return state

    def load_state_dict(self, values: dict[str, float]) -> None:
        free, since = whole("free", values["free"]), whole("since", values["since"])
        if self.stages and not 1 <= free <= len(self.stages):
            raise ValueError(f"free is {free} in the state, there are {len(self.stages)} stages")
        for name, value in values.items():
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r} in the state, it must be a number of at least 0")
        self._free, self._since, self._highest = free, since, values["highest"]
        self._last, self._kept = ([v for k, v in values.items() if k.startswith(name)] for name in ("last ", "kept "))
        if self._levers is not None:
            self._freeze()
            self._training = self._count()

    @property
    def _share(self) -> float:
        return float((self._free / len(self.stages)) ** self.gamma) if self.stages else 1.0

    def _count(self) -> list[int]:
        """Parameters that train, of each group."""
        groups = self._levers.groups if self._levers is not None else []
        return [sum(p.requires_grad for p in group["params"]) for group in groups]

    def _notice(self) -> None:
        """Whether somebody has thawed since the last step: the wrapper has begun warmup again then."""
        before, now = self._training, self._count()
        before += [0] * (len(now) - len(before))
        thawed = [place for place, (a, b) in enumerate(zip(before, now, strict=True)) if b > a]
        if thawed:
            self._free += 1
            self._keep([place < thawed[0] for place in range(len(now))])
        self._training = now

    def _keep(self, old: Sequence[bool]) -> None:
        """At a thaw: the rates of old groups, not of those that were thawed."""
        self._kept = [rate if kept else 0.0 for rate, kept in zip(self._last, old, strict=False)]
        self._highest = 0.0

    def _freeze(self) -> None:
        """Every parameter of a later stage, and no other of any stage."""
        free = {p for stage in self.stages[: self._free] for p in stage}
        for p in {p for stage in self.stages for p in stage}:
            p.requires_grad_(p in free)
            if p not in free:
                p.grad = None

    def _is_new(self, group: dict[str, Any]) -> bool:
        """Whether some of its parameters did not train before the last thaw."""
        new = {p for stage in self.stages[self._free - 1 :] for p in stage}
        new -= {p for stage in self.stages[: self._free - 1] for p in stage}
        return any(p in new for p in group["params"])


class _Own(list[nn.Module]):
    """Layers that stand for the parameters that they own themselves, without those of modules inside."""


def _parameters(stages: Any) -> list[list[Tensor]]:
    """The trainable ones of each stage."""
    if isinstance(stages, (nn.Module, str)) or not isinstance(stages, Iterable):
        raise TypeError(
            f"stages must be a list of modules or of lists of modules, the head first, got {type(stages).__name__}; "
            "Unfreezing.by_depth(model, stages=4) makes them"
        )
    found = []
    for place, stage in enumerate(stages, start=1):
        modules = [stage] if isinstance(stage, nn.Module) else list(stage) if isinstance(stage, Iterable) else [stage]
        for module in modules:
            if not isinstance(module, nn.Module):
                raise TypeError(f"stage {place} must hold modules, got {type(module).__name__}")
        params = [p for m in modules for p in m.parameters(recurse=not isinstance(stage, _Own)) if p.requires_grad]
        if not params:
            raise ValueError(f"stage {place} has no trainable parameter: there is nothing in it to thaw")
        found.append(list(dict.fromkeys(params)))
    if not found:
        raise ValueError("stages is empty: give at least the head")
    return found
