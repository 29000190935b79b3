"""Several optimizers on one model as one: Muon for its matrices, say, and AdamW for the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from warmctl.proxy import HOOKS

State = dict[str, Any]


class ChainedOptimizer(Optimizer):
    """Steps each of its members in turn. Groups and state are the members' own, which may be used beside it.

    `state_dict` has the layout of one optimizer with all the groups. A closure is evaluated once, for all.

    Raises: ValueError without members, or for a parameter in two of them.
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self.members = list(members)
        held = [id(p) for group in self.param_groups for p in group["params"]]
        if not held:
            raise ValueError("the list of optimizers is empty: give at least one")
        if len(set(held)) < len(held):
            raise ValueError("a parameter is in two of the optimizers: give each parameter to one of them")
        self._prepare()

    def _prepare(self) -> None:
        self._states = _States(self.members)
        for name in HOOKS:
            setattr(self, name, OrderedDict())
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> MutableMapping[Tensor, State]:  # type: ignore[override]
        return self._states

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.members[0].defaults

    def member_of(self, group: Any) -> Optimizer:
        """The one that this parameter group belongs to."""
        return next(member for member in self.members if any(own is group for own in member.param_groups))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            member.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=set_to_none)

    def train(self) -> None:
        """Forwarded for schedule-free members; nothing for others."""
        for member in self.members:
            getattr(member, "train", lambda: None)()

    def eval(self) -> None:
        """Forwarded for schedule-free members; nothing for others."""
        for member in self.members:
            getattr(member, "eval", lambda: None)()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises: ValueError, it is not known for which member it is."""
        raise ValueError("add_param_group: add the group to one of the optimizers in the list, not to all of them")

    def state_dict(self) -> dict[str, Any]:
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for member in self.members:
            saved = member.state_dict()
            first = sum(len(group["params"]) for group in groups)
            state |= {first + index: entry for index, entry in saved["state"].items()}
            groups += [{**group, "params": [first + i for i in group["params"]]} for group in saved["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = list(state_dict["param_groups"])
        wanted = len(self.param_groups)
        if len(groups) != wanted:
            raise ValueError(f"the state dict has {len(groups)} parameter groups, the chained optimizers {wanted}")
        for member in self.members:
            own, groups = groups[: len(member.param_groups)], groups[len(member.param_groups) :]
            keys = [key for group in own for key in group["params"]]
            state = {key: state_dict["state"][key] for key in keys if key in state_dict["state"]}
            member.load_state_dict({"state": state, "param_groups": own})

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.members = state["members"]
        self._prepare()

    def __repr__(self) -> str:
        return f"ChainedOptimizer({', '.join(type(member).__name__ for member in self.members)})"


class _States(MutableMapping[Tensor, State]):
    """The members' states as one: a parameter's entry is in that of the member that holds it."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self.members = members
        self.owners: dict[Any, Optimizer] = {}

    def _of(self, p: Any) -> Any:
        """The state that the entry of this parameter is in, or would be."""
        if p not in self.owners:  # at first, or a group was added
            self.owners = {p: m for m in self.members for group in m.param_groups for p in group["params"]}
        return self.owners[p].state if p in self.owners else {}

    def __getitem__(self, p: Tensor) -> State:
        entry: State = self._of(p)[p]
        return entry

    def __setitem__(self, p: Tensor, entry: State) -> None:
        self._of(p)[p] = entry

    def __delitem__(self, p: Tensor) -> None:
        del self._of(p)[p]

    def __contains__(self, p: object) -> bool:
        return p in self._of(p)

    def __iter__(self) -> Iterator[Tensor]:
        return iter([p for member in self.members for p in member.state])

    def __len__(self) -> int:
        return sum(len(member.state) for member in self.members)

    def get(self, p: Tensor, default: Any = None) -> Any:
        """Without the empty entry that looking a key up would leave in a member's state; so is `pop`."""
        return self._of(p).get(p, default)

    def pop(self, p: Tensor, *default: Any) -> Any:
        return self._of(p).pop(p, *default)
