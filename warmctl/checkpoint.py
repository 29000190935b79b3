"""The wrapper's state inside the optimizer's own state dict, in a form that every checkpoint format carries.

torch.distributed.checkpoint keeps only `state` and `param_groups`. So the numbers travel as one float64 tensor in the
first group and the eigenvector as one more entry beside each parameter's moments. The latter is there even before the
first probe (zeros): a sharded checkpoint is read into the structure that a fresh wrapper announces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from warmctl.state import Saved

NUMBERS, VECTOR = "warmctl", "warmctl_vector"
FORMAT = 2.0


class SavedState:
    """The wrapper's numbers and eigenvector inside the state of the optimizer that it wraps.

    Numbers and vector are announced in the live state too, for formats that read there what to restore.

    Args:
        parts: all that is saved beside the eigenvector, always in one order.

    Attributes:
        stepped: the optimizer has made a step: its own state is set up, and the vector may stand beside it.
    """

    def __init__(self, optimizer: Optimizer, parts: Callable[[], Sequence[Saved]]) -> None:
        self.optimizer, self.parts = optimizer, parts
        self.stepped = False
        self._announced: list[Tensor] = []

    def announce_numbers(self) -> None:
        """Put the numbers into the live first group."""
        self.optimizer.param_groups[0][NUMBERS] = self._numbers()

    def _values(self) -> list[float]:
        return [value for part in self.parts() for value in part.state_values()]

    def _numbers(self) -> Tensor:
        return torch.tensor([FORMAT, *self._values()], dtype=torch.float64)

    def withdraw(self) -> None:
        """Take the vector out of the live state again: the optimizer is about to use it."""
        for p in self._announced:
            if VECTOR in self.optimizer.state.get(p, ()):
                del self.optimizer.state[p][VECTOR]
                if not self.optimizer.state[p]:
                    del self.optimizer.state[p]
        self._announced = []

    def state_dict(self, vector: dict[Tensor, Tensor], measured: bool) -> dict[str, Any]:
        """A copy of the wrapped optimizer's state dict with the wrapper's numbers and vector in it.

        The vector goes beside the moments that are there. Alone in its entry it would break a bare optimizer that
        loads the state dict: most take an entry that is not empty for one that they have set up.

        Args:
            vector: this process's part of the eigenvector, by trainable parameter.
            measured: there is one; the zeros before the first probe need not travel with an optimizer without state.
        """
        saved = self.optimizer.state_dict()
        groups = [dict(group) for group in saved["param_groups"]]
        groups[0][NUMBERS] = self._numbers()
        state = dict(saved["state"])
        in_entries_of_its_own = not saved["state"] and (measured or isinstance(self.optimizer, SGD))  # SGD bears it
        for index, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            if p in vector and (index in saved["state"] or in_entries_of_its_own):
                state[index] = {**state.get(index, {}), VECTOR: _like(p, vector[p])}
        if self.stepped:
            self._announce_vector(vector)
        return {**saved, "state": state, "param_groups": groups}

    def _announce_vector(self, vector: dict[Tensor, Tensor]) -> None:
        """Put the vector beside the live moments until the next step (torch.distributed.checkpoint with
        flatten_optimizer_state_dict=True reads names there). Only after a first step, and not alone.
        """
        state = self.optimizer.state
        stateless = not any(state.values())
        self._announced = [p for p in vector if stateless or state.get(p)]
        for p in self._announced:
            state[p][VECTOR] = _like(p, vector[p])

    def load_state_dict(self, state_dict: dict[str, Any]) -> list[Tensor | None] | None:
        """Load the optimizer's part and the numbers. Returns the vector; None if a bare optimizer saved the state.

        Raises: ValueError if the wrapper's part does not fit, before anything is loaded; the base checks its own.
        """
        bare, numbers, vector = unpack(state_dict)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        trainable = [v for v, p in zip(vector, params, strict=False) if p.requires_grad]
        _check_fits(numbers, len(self._values()), trainable, [p for p in params if p.requires_grad])
        self.optimizer.load_state_dict(bare)
        if numbers is None:
            return None
        for part in self.parts():
            size = len(part.state_values())
            part.load_state_values(numbers[:size])
            numbers = numbers[size:]
        return trainable


def _check_fits(
    numbers: list[float] | None, expected: int, vector: Sequence[Tensor | None], params: Sequence[Tensor]
) -> None:
    if numbers is not None and len(numbers) != expected:
        raise ValueError(
            f"the checkpoint's warmctl state has {len(numbers)} numbers, not {expected}: its format is that of another "
            "version. Load it there, or load a bare optimizer's state dict to begin warmup again"
        )
    for index, (part, p) in enumerate(zip(vector, params, strict=False)):
        if part is not None and part.shape != p.shape:
            raise ValueError(
                f"trainable parameter {index} has shape {tuple(p.shape)}, but {tuple(part.shape)} in the checkpoint: "
                "the parameter groups must be built as they were when it was saved"
            )


def unpack(state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[float] | None, list[Tensor | None]]:
    """The wrapped optimizer's state dict, the numbers, and the vector in the order of the parameters.

    The numbers are None if the state dict was saved by a bare optimizer.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    numbers = groups[0].get(NUMBERS) if groups else None
    for group in groups:
        group.pop(NUMBERS, None)
    state, vectors = {}, {}
    for key, entry in state_dict["state"].items():
        if isinstance(entry, dict) and VECTOR in entry:
            vectors[key] = entry[VECTOR]
            entry = {name: value for name, value in entry.items() if name != VECTOR}
            if not entry:
                continue
        state[key] = entry
    values = None if numbers is None else [float(v) for v in numbers]
    if values is not None and values[0] != FORMAT:
        raise ValueError(f"this checkpoint has warmctl's state in format {values[0]:g}; this version reads {FORMAT:g}")
    order = [vectors.get(key) for group in groups for key in group["params"]]
    return {**state_dict, "state": state, "param_groups": groups}, values and values[1:], order


def _like(param: Any, part: Tensor) -> Tensor:
    """`part` as a DTensor where the parameter is one, so that it is saved and resharded like it."""
    if not hasattr(param, "_local_tensor"):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, param.device_mesh, param.placements, shape=param.shape, stride=param.stride(), run_check=False
    )
