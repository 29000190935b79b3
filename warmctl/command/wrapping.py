"""A script that knows nothing of warmctl gets its first optimizer wrapped. For a process of the script's own only.

While the script runs, `torch.optim.Optimizer.__new__` hands out the wrapper in place of the first optimizer over a
module's parameters, and `loss.backward()` goes through `AdaptiveWarmup.backward`: the two lines that are to be changed
for good.
"""

from __future__ import annotations

import gc
import inspect
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from warmctl.loss.backward import graph_nodes
from warmctl.optimizer import AdaptiveWarmup
from warmctl.proxy import OptimizerProxy

ARGUMENTS = "gradient", "retain_graph", "create_graph", "inputs"
"""Of `Tensor.backward`, in their order."""


@dataclass(frozen=True)
class Place:
    """A line of the script, or of what it uses."""

    path: str
    line: int

    @property
    def text(self) -> str:
        return linecache.getline(self.path, self.line).strip()

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class Wrapping:
    """Wraps the first optimizer that is built over a module's parameters.

    Args:
        record: where its history is written; None: nowhere.
        options: of `AdaptiveWarmup`.

    Attributes:
        opt: the wrapper, once there is one.
        model: the module that it was found to train, and `name`, what the script calls it.
        built, backward: where the optimizer was built, and where the script called `backward` on a loss.
        on_graph: that loss was measured on its live graph; the model itself returned none, and there was no closure.
        refused: why optimizers before it were left alone, in words.
    """

    def __init__(self, record: Path | None, **options: Any) -> None:
        self.record, self.options = record, options
        self.opt: AdaptiveWarmup | None = None
        self.model: nn.Module | None = None
        self.name = "model"
        self.built: Place | None = None
        self.backward: Place | None = None
        self.refused: list[str] = []
        self.on_graph = self._building = self._in_backward = False

    def __enter__(self) -> Wrapping:
        wrapping, self._backward = self, Tensor.backward

        def new(cls: type[Optimizer], *args: Any, **kwargs: Any) -> Any:
            return wrapping._new(cls, args, kwargs)

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            wrapping._run_backward(loss, args, kwargs)

        Optimizer.__new__ = new  # type: ignore[method-assign, assignment]
        Tensor.backward = backward  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        self._building = True  # `__new__` stays and lets everything through: a class does not forget that it had one
        Tensor.backward = self._backward  # type: ignore[method-assign]

    def _new(self, cls: type[Optimizer], args: Any, kwargs: Any) -> Any:
        made = object.__new__(cls)
        copied = not args and not kwargs
        if self.opt is not None or self._building or copied or issubclass(cls, OptimizerProxy):
            return made
        self._building = True
        try:
            made.__init__(*args, **kwargs)  # type: ignore[misc]
            self._wrap(made)
        finally:
            self._building = False
        if self.opt is not None:
            return self.opt  # no instance of `cls`: Python calls no `__init__`
        _skip_init_once(cls, made)
        return made

    def _wrap(self, base: Optimizer) -> None:
        frame = _outside_of_torch()
        place = Place(frame.f_code.co_filename, frame.f_lineno)
        model = owner(base)
        if model is None:
            self.refused.append(f"{place}: {type(base).__name__} holds no module's parameters")
            return
        try:
            opt = AdaptiveWarmup(base, model, **self.options)
        except (TypeError, ValueError) as error:
            self.refused.append(f"{place}: {type(base).__name__}: {error}")
            return
        if self.record is not None:
            opt.history.to_jsonl(self.record)
        self.opt, self.model, self.built = opt, model, place
        known = {**frame.f_globals, **frame.f_locals}
        self.name = next((name for name, value in known.items() if value is model), "model")

    def _run_backward(self, loss: Tensor, args: Any, kwargs: Any) -> None:
        plain: Callable[[], None] = partial(self._backward, loss, *args, **kwargs)
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        elsewhere = given.get("inputs") is not None  # as for adversarial examples
        if self.opt is None or self._in_backward or elsewhere or not self._trains(loss):
            return plain()
        weight = given.get("gradient")
        if self.backward is None:
            frame = _outside_of_torch()
            self.backward = Place(frame.f_code.co_filename, frame.f_lineno)
        if self.opt.phase != "done":
            self.on_graph = not (self.opt.sources.captured.expected or self.opt.sources.in_closure)
        self._in_backward = True
        try:
            if not args and not kwargs:
                self.opt.backward(loss)
            elif self.opt.sources.in_closure:
                plain()
            else:
                self.opt.backward_on_graph(loss if weight is None else (loss * weight).sum(), plain)
        finally:
            self._in_backward = False
        return None

    def _trains(self, loss: Tensor) -> bool:
        """Whether it is a loss of parameters that the wrapper holds; another optimizer's is none of its concern."""
        if self.opt is None or loss.numel() != 1 or not loss.requires_grad:
            return False
        held = {id(p) for p in self.opt.trainable}
        return any(id(getattr(node, "variable", None)) in held for node in graph_nodes([loss]))


def owner(optimizer: Optimizer) -> nn.Module | None:
    """The outermost module that holds all the optimizer's parameters; None if there is none."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    modules = [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]
    owners = [module for module in modules if held and held <= {id(p) for p in _parameters(module)}]
    inner = {id(child) for module in owners for child in module.modules() if child is not module}
    return next((module for module in owners if id(module) not in inner), None)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters()) if "_parameters" in module.__dict__ else []  # one that is being built has none


def _skip_init_once(cls: type[Optimizer], made: Optimizer) -> None:
    """Python is about to call `__init__` on what was built already."""
    own = cls.__dict__.get("__init__")

    def skip(self: Any, *args: Any, **kwargs: Any) -> None:
        if own is None:
            del cls.__init__
        else:
            cls.__init__ = own  # type: ignore[method-assign]
        if self is not made:
            self.__init__(*args, **kwargs)

    cls.__init__ = skip  # type: ignore[method-assign]


def _outside_of_torch() -> FrameType:
    """The nearest frame that is neither torch's nor this package's."""
    here, there = str(Path(__file__).parent), str(Path(torch.__file__).parent)
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith((here, there)) and frame.f_back is not None:
        frame = frame.f_back
    return frame or sys._getframe()
