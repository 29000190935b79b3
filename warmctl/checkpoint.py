"""The wrapper's state inside the optimizer's own state dict, in a form that every checkpoint format carries.

torch.distributed.checkpoint keeps only `state` and `param_groups`. So the numbers travel as one float64 tensor in the
first group, and each vector (the eigenvector, the average of the parameters) as one more entry beside each parameter's
moments. Vectors are there even before they are known (zeros): a sharded checkpoint is read into the structure that a
fresh wrapper announces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from warmctl.state import Counts, Saved
from warmctl.warning import warn

NUMBERS, VECTOR, AVERAGE = "warmctl", "warmctl_vector", "warmctl_average"
FORMAT = 5.0
LAYOUT = "param_groups", "state"
LOADED_BEFORE = (
    "warmctl: the optimizer had loaded the state of an AdaptiveWarmup when it was wrapped, and warmup begins anew. To "
    "go on where it was, wrap first, then call load_state_dict() of the wrapper"
)

Parts = list[Tensor | None]


class SavedVector(Protocol):
    """What keeps a parameter-shaped vector that is saved."""

    @property
    def has_vector(self) -> bool:
        """Whether it is known."""
        ...

    def vector_of(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """This process's part of it by parameter; zeros where it is not known."""
        ...

    def load_vector(self, parts: Parts, params: list[Tensor]) -> None:
        """Continue from what was saved, with gaps where nothing was. Called when the numbers have been loaded."""
        ...


class SavedState:
    """The wrapper's numbers and vectors inside the state of the optimizer that it wraps.

    Numbers and vectors are announced in the live state too, for formats that read there what to restore.

    Args:
        parts: all that is saved beside the vectors, always in one order.
        vectors: what keeps them, by the name beside the moments.

    Attributes:
        stepped: the optimizer has made a step: its own state is set up, and vectors may stand beside it.
    """

    def __init__(
        self, optimizer: Optimizer, parts: Callable[[], Sequence[Saved]], vectors: Mapping[str, SavedVector]
    ) -> None:
        self.optimizer, self.parts, self.vectors = optimizer, parts, vectors
        self.stepped = False
        self._announced: list[Tensor] = []

    def announce_numbers(self) -> None:
        """Put the numbers into the live first group."""
        self.optimizer.param_groups[0][NUMBERS] = self._numbers()

    def begin(self) -> None:
        """Announce the numbers, and warn where the optimizer comes with those of a warmup under way, which are lost."""
        found, before = self.optimizer.param_groups[0].get(NUMBERS), 1
        for part in self.parts():
            if isinstance(part, Counts):
                break
            before += len(part.state_values())
        numbers = found.tolist() if isinstance(found, Tensor) and found.dim() == 1 and found.numel() > before else [0.0]
        if numbers[0] == FORMAT and numbers[before] > 0.0:
            warn(LOADED_BEFORE)
        self.announce_numbers()

    def _values(self) -> list[float]:
        return [value for part in self.parts() for value in part.state_values()]

    def _numbers(self) -> Tensor:
        return torch.tensor([FORMAT, *self._values()], dtype=torch.float64)

    def withdraw(self) -> None:
        """Take the vectors out of the live state again: the optimizer is about to use it."""
        for p in self._announced:
            entry = self.optimizer.state.get(p, {})
            for name in self.vectors.keys() & entry.keys():
                del entry[name]
            if not entry:
                self.optimizer.state.pop(p, None)
        self._announced = []

    def state_dict(self, params: list[Tensor]) -> dict[str, Any]:
        """A copy of the wrapped optimizer's state dict with the wrapper's numbers and vectors in it.

        The vectors go beside the moments that are there. Alone in its entry one would break a bare optimizer that
        loads the state dict: most take an entry that is not empty for one that they have set up. Zeros need not
        travel with an optimizer without state.

        Args:
            params: the trainable ones.
        """
        saved = self.optimizer.state_dict()
        groups = [dict(group) for group in saved["param_groups"]]
        groups[0][NUMBERS] = self._numbers()
        state = dict(saved["state"])
        beside = self._vectors_by_parameter(params)
        known = any(keeper.has_vector for keeper in self.vectors.values())
        in_entries_of_its_own = not saved["state"] and (known or isinstance(self.optimizer, SGD))  # SGD bears it
        for index, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            if p in beside and (index in saved["state"] or in_entries_of_its_own):
                state[index] = {**state.get(index, {}), **beside[p]}
        if self.stepped:
            self._announce_vectors(beside)
        return {**saved, "state": state, "param_groups": groups}

    def _vectors_by_parameter(self, params: list[Tensor]) -> dict[Tensor, dict[str, Any]]:
        found = {name: keeper.vector_of(params) for name, keeper in self.vectors.items()}
        return {p: {name: _like(p, vector[p]) for name, vector in found.items()} for p in params}

    def _announce_vectors(self, beside: dict[Tensor, dict[str, Any]]) -> None:
        """Put the vectors beside the live moments until the next step (torch.distributed.checkpoint with
        flatten_optimizer_state_dict=True reads names there). Only after a first step, and not alone.
        """
        state = self.optimizer.state
        stateless = not any(state.values())
        self._announced = [p for p in beside if stateless or state.get(p)]
        for p in self._announced:
            state[p].update(beside[p])

    def load_state_dict(self, state_dict: dict[str, Any]) -> bool:
        """Load the optimizer's part, numbers and vectors. False if a bare optimizer saved the state.

        Raises: ValueError if the wrapper's part does not fit or is not possible; the base checks its own.
        """
        bare, numbers, vectors = unpack(state_dict, self.vectors)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        _check_groups(len(bare["param_groups"]), len(self.optimizer.param_groups))
        _check_number(numbers, len(self._values()))
        pairs = [] if numbers is None else self._split(numbers)
        for part, values in pairs:
            part.check_state_values(values)
        self.optimizer.load_state_dict(bare)
        for part, values in pairs:
            part.load_state_values(values)  # which may thaw parameters
        trainable = [p for p in params if p.requires_grad]
        for name, keeper in self.vectors.items():
            parts = [part for part, p in zip(vectors[name], params, strict=False) if p.requires_grad]
            _check_fits(name, parts, trainable)
            if numbers is not None:
                keeper.load_vector(parts, trainable)
        return numbers is not None

    def _split(self, numbers: list[float]) -> list[tuple[Saved, list[float]]]:
        """Each part with its own of them."""
        pairs = []
        for part in self.parts():
            size = len(part.state_values())
            pairs.append((part, numbers[:size]))
            numbers = numbers[size:]
        return pairs


def _check_groups(saved: int, present: int) -> None:
    if saved != present:
        raise ValueError(
            f"the state dict has {saved} parameter groups and the optimizer {present}: different numbers, they must be "
            "built as they were when it was saved"
        )


def _check_number(numbers: list[float] | None, expected: int) -> None:
    if numbers is not None and len(numbers) != expected:
        raise ValueError(
            f"the checkpoint's warmctl state has {len(numbers)} numbers, not {expected}: it was saved with other "
            "followers (opt.follow), which must be there, in the same order, before it is loaded; or its format is "
            "that of another version: load it there, or load a bare optimizer's state dict to begin warmup again"
        )


def _check_fits(name: str, vector: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
    for index, (part, p) in enumerate(zip(vector, params, strict=False)):
        if part is None:
            continue
        if not isinstance(part, Tensor) or not part.is_floating_point():
            raise ValueError(f"{name} of trainable parameter {index} is no tensor of floats in the checkpoint")
        if part.shape != p.shape:
            raise ValueError(
                f"trainable parameter {index} has shape {tuple(p.shape)}, but {tuple(part.shape)} in the checkpoint: "
                "the parameter groups must be built as they were when it was saved"
            )


def unpack(
    state_dict: dict[str, Any], names: Iterable[str]
) -> tuple[dict[str, Any], list[float] | None, dict[str, Parts]]:
    """The wrapped optimizer's state dict, the numbers, and the vectors of these names in the order of the parameters.

    The numbers are None if the state dict was saved by a bare optimizer.
    """
    _check_layout(state_dict)
    groups = [dict(group) for group in state_dict["param_groups"]]
    values = _read(groups[0][NUMBERS]) if groups and NUMBERS in groups[0] else None
    for group in groups:
        group.pop(NUMBERS, None)
    state: dict[Any, Any] = {}
    found: dict[str, dict[Any, Tensor]] = {name: {} for name in names}
    for key, entry in state_dict["state"].items():
        if isinstance(entry, dict) and found.keys() & entry.keys():
            for name in found.keys() & entry.keys():
                found[name][key] = entry[name]
            entry = {name: value for name, value in entry.items() if name not in found}
            if not entry:
                continue
        state[key] = entry
    keys = [key for group in groups for key in group["params"]]
    vectors = {name: [parts.get(key) for key in keys] for name, parts in found.items()}
    return {**state_dict, "state": state, "param_groups": groups}, values, vectors


def _check_layout(state_dict: Any) -> None:
    """Raise ValueError unless this has the layout of torch's state dicts, with a rate in every group."""
    groups, state = (state_dict.get(name) if isinstance(state_dict, Mapping) else None for name in LAYOUT)
    if not isinstance(groups, (list, tuple)) or not isinstance(state, Mapping):
        raise ValueError("the state dict must hold 'param_groups', a list, and 'state', a dict, as torch's do")
    for index, group in enumerate(groups):
        keys = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(keys, (list, tuple)) or not all(isinstance(key, (int, str)) for key in keys):
            raise ValueError(f"params of group {index} of the state dict must be a list of numbers or names")
        rate = group.get("lr")
        if isinstance(rate, (bool, str)) or not 0.0 <= _number(rate) < math.inf:
            raise ValueError(f"lr of group {index} is {rate!r} in the state dict, it must be a number of at least 0")


def _number(value: Any) -> float:
    """It as a float; nan if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def _read(numbers: Any) -> list[float]:
    """The wrapper's numbers without that of their format, which must be ours."""
    if not isinstance(numbers, Tensor) or numbers.dim() != 1 or not len(numbers) or numbers.is_complex():
        raise ValueError(f"{NUMBERS} in the state dict must be a tensor of numbers, got {type(numbers).__name__}")
    version, *values = (float(value) for value in numbers.tolist())
    if version != FORMAT:
        raise ValueError(
            f"this checkpoint has warmctl's state in format {version:g}; this version reads {FORMAT:g}. To load the "
            f'optimizer\'s own state alone and begin warmup again, first del state_dict["param_groups"][0]["{NUMBERS}"]'
        )
    return values


def _like(param: Any, part: Tensor) -> Tensor:
    """`part` as a DTensor where the parameter is one, so that it is saved and resharded like it."""
    if not hasattr(param, "_local_tensor"):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, param.device_mesh, param.placements, shape=param.shape, stride=param.stride(), run_check=False
    )
