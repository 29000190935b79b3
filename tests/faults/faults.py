"""What goes wrong in a probe, and where: in the forward passes of a step, or at one operation of its probes."""

from __future__ import annotations

import ast
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import warmctl


class Unspeakable(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("no words")


class Keyworded(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, *, what: int) -> None:
        self.what = what


ERRORS: dict[str, Callable[[], Exception]] = {
    "RuntimeError": lambda: RuntimeError("shape mismatch"),
    "KeyError": lambda: KeyError("mask"),
    "AssertionError": lambda: AssertionError("bad"),
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("out of memory"),
    "MemoryError": MemoryError,
    "StopIteration": StopIteration,
    "no words": Unspeakable,
    "keyworded": lambda: Keyworded(what=1),
    "RecursionError": RecursionError,
    "NotImplementedError": NotImplementedError,
    "UserWarning": lambda: UserWarning("raised"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf8", b"\xff", 0, 1, "invalid start byte"),
    "AttributeError": lambda: AttributeError("missing"),
    "TypeError": lambda: TypeError("wrong"),
}
INTERRUPTS: dict[str, Callable[[], BaseException]] = {
    kind.__name__: kind for kind in (KeyboardInterrupt, SystemExit, GeneratorExit)
}
FACTORS = {"nan": math.nan, "inf": math.inf, "zero": 0.0}


def raises(error: Callable[[], BaseException]) -> Callable[[nn.Module, Tensor], Tensor]:
    def fault(model: nn.Module, out: Tensor) -> Tensor:
        raise error()

    return fault


def times(factor: float) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, out: out * factor


def adds_a_buffer(model: nn.Module, out: Tensor) -> Tensor:
    model.register_buffer("added", torch.ones(3))
    return out


def changes_the_mode(model: nn.Module, out: Tensor) -> Tensor:
    model.eval()
    return out


def draws(model: nn.Module, out: Tensor) -> Tensor:
    torch.rand(3), np.random.rand(), random.random()
    return out


def warns(model: nn.Module, out: Tensor) -> Tensor:
    warnings.warn("in a probe", UserWarning, stacklevel=1)
    return out


WORTHLESS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    **{name: raises(error) for name, error in list(ERRORS.items())[:7]},
    **{name: times(factor) for name, factor in FACTORS.items()},
    "warning as error": warns,
}
"""Those after which a probe says nothing, and has failed."""
IN_FORWARD = WORTHLESS | {
    "a buffer added": adds_a_buffer,
    "mode changed": changes_the_mode,
    "random numbers drawn": draws,
}


@dataclass(frozen=True)
class InForward:
    """The loss that the model returns goes wrong from the given evaluation of a step on; 0 is the step's own."""

    what: str
    evaluation: int
    fired = None

    @contextmanager
    def armed(self, model: nn.Module, opt: Any) -> Iterator[InForward]:
        seen = 0

        def spoil(module: nn.Module, args: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal seen
            at, seen = seen, seen + 1
            return output if at < self.evaluation else {"loss": IN_FORWARD[self.what](model, output["loss"])}

        handle = model.register_forward_hook(spoil, prepend=True)
        try:
            yield self
        finally:
            handle.remove()


@dataclass(frozen=True)
class AtOperation:
    """One operation of a step's probes raises, or returns a wrong value: the one of this number, or the next that can.

    Those that put things back (in a `finally` of warmctl) have to succeed. A value can be wrong where it is the model's
    or a derivative's; the vectors that warmctl makes of these are its own affair.
    """

    what: str
    number: int

    @contextmanager
    def armed(self, model: nn.Module, opt: Any) -> Iterator[_Operations]:
        operations, prober = _Operations(self), opt.meter.prober
        on_graph = prober.on_graph

        def on_live_graph(*args: Any) -> Any:
            with operations:
                return on_graph(*args)

        prober.around, prober.on_graph = lambda: operations, on_live_graph
        try:
            yield operations
        finally:
            prober.around = nullcontext
            del prober.on_graph


class _Operations(TorchDispatchMode):
    """Attributes: fired: the operation that went wrong, once one has."""

    def __init__(self, fault: AtOperation) -> None:
        super().__init__()
        self.what, self.left, self.fired = fault.what, fault.number, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        found = None
        if self.left < 0 and not self.fired and not _putting_back(sys._getframe(1)):
            error = {**ERRORS, **INTERRUPTS}.get(self.what)
            if error:
                self.fired = str(func)
                raise error()
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and _spoilable(func, found) and not _own(sys._getframe(1)):
                self.fired = str(func)
                return found * FACTORS[self.what]
        return func(*args, **(kwargs or {})) if found is None else found


def _spoilable(func: Any, found: Tensor) -> bool:
    """Whether this is a number of its own, not one that was written in place, nor a view."""
    writes = func._schema.is_mutable or any(returned.alias_info for returned in func._schema.returns)
    return (found.is_floating_point() or found.is_complex()) and not writes


WARMCTL = str(Path(warmctl.__file__).parent)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame:
        yield frame
        frame = frame.f_back


def _putting_back(frame: FrameType) -> bool:
    return any(
        f.f_lineno in _finally(f.f_code.co_filename) for f in _frames(frame) if f.f_code.co_filename.startswith(WARMCTL)
    )


@cache
def _finally(path: str) -> frozenset[int]:
    """Lines of a file in the `finally` of something."""
    tries = [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.Try)]
    return frozenset(
        n for node in tries for last in node.finalbody for n in range(last.lineno, (last.end_lineno or 0) + 1)
    )


def _own(frame: FrameType) -> bool:
    """Whether warmctl itself asked for this operation: not the model, nor a derivative."""
    for f in _frames(frame):
        path = f.f_code.co_filename
        if "/torch/autograd/" in path:
            return False
        if "/torch/" not in path:
            return path.startswith(WARMCTL)
    return False
