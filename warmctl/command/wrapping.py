"""A script that knows nothing of warmctl gets its first optimizer wrapped. For a process of the script's own only.

While the script runs, `torch.optim.Optimizer.__new__` hands out the wrapper in place of the first optimizer over a
module's parameters, and `loss.backward()` goes through `AdaptiveWarmup.backward`: the two lines that are to be changed
for good.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from warmctl.command.place import Place, name_in
from warmctl.loss.backward import graph_nodes
from warmctl.optimizer import AdaptiveWarmup
from warmctl.proxy import OptimizerProxy

ARGUMENTS = "gradient", "retain_graph", "create_graph", "inputs"
"""Of `Tensor.backward`, in their order."""


class Wrapping:
    """Wraps the first optimizer that is built over a module's parameters, and steps aside for a script that does so.

    Args:
        record: where its history is written; None: nowhere.
        options: of `AdaptiveWarmup`.

    Attributes:
        opt: the wrapper, once there is one.
        name: what the script calls it where it calls `backward`; "" if it has no name there.
        model: the module that it was found to train, and `model_name`, what the script calls it.
        built, backward: where the optimizer was built, and where the script called `backward` on a loss.
        aside: where the script wrapped that optimizer itself: `opt` is its own wrapper then, and only has the record.
        on_graph: that loss was measured on its live graph; the model itself returned none, and there was no closure.
        refused: why optimizers before it were left alone, in words.
        bare: by identity, optimizers after it that nobody has wrapped, in words.
    """

    def __init__(self, record: Path | None, **options: Any) -> None:
        self.record, self.options = record, options
        self.opt: AdaptiveWarmup | None = None
        self.model: nn.Module | None = None
        self.name, self.model_name = "", "model"
        self.built: Place | None = None
        self.backward: Place | None = None
        self.aside: Place | None = None
        self.refused: list[str] = []
        self.bare: dict[int, str] = {}
        self.on_graph = self._building = self._in_backward = False

    def __enter__(self) -> Wrapping:
        wrapping, self._backward, self._init = self, Tensor.backward, AdaptiveWarmup.__init__

        def new(cls: type[Optimizer], *args: Any, **kwargs: Any) -> Any:
            return wrapping._new(cls, args, kwargs)

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            wrapping._run_backward(loss, args, kwargs)

        def init(opt: AdaptiveWarmup, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            wrapping._wrap_by_script(opt, optimizer, args, kwargs)

        Optimizer.__new__ = new  # type: ignore[method-assign, assignment]
        Tensor.backward = backward  # type: ignore[method-assign, assignment]
        AdaptiveWarmup.__init__ = init  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        self._building = True  # `__new__` stays and lets everything through: a class does not forget that it had one
        Tensor.backward = self._backward  # type: ignore[method-assign]
        AdaptiveWarmup.__init__ = self._init  # type: ignore[method-assign]

    def _new(self, cls: type[Optimizer], args: Any, kwargs: Any) -> Any:
        made = object.__new__(cls)
        copied = not args and not kwargs
        if self._building or copied or issubclass(cls, OptimizerProxy):
            return made
        ours, self._building = self.opt, True
        try:
            made.__init__(*args, **kwargs)  # type: ignore[misc]
            place = Place.of(_outside_of_torch())
            if ours is None:
                self._wrap(made, place)
            elif getattr(made, "param_groups", None) is not ours.param_groups:  # Accelerate's are
                self.bare[id(made)] = f"{place}: {cls.__name__}"
        finally:
            self._building = False
        if ours is None and self.opt is not None:
            return self.opt  # no instance of `cls`: Python calls no `__init__`
        _skip_init_once(cls, made)
        return made

    def _wrap(self, base: Optimizer, place: Place) -> None:
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
        self.model_name = name_in(_outside_of_torch(), model) or "model"

    def _wrap_by_script(self, opt: AdaptiveWarmup, optimizer: Any, args: Any, kwargs: Any) -> None:
        """`AdaptiveWarmup.__init__`. Of an optimizer that was wrapped here it takes the one inside, and takes over."""
        if self._building:
            return self._init(opt, optimizer, *args, **kwargs)
        members = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        ours = self.opt if self.aside is None and any(member is self.opt for member in members) else None
        plain = [ours.base if ours is not None and member is ours else member for member in members]
        self._building = True
        try:
            self._init(opt, plain if isinstance(optimizer, (list, tuple)) else plain[0], *args, **kwargs)
        finally:
            self._building = False
        for member in members:
            self.bare.pop(id(member), None)
        if ours is not None:
            self.opt, self.model, self.aside = opt, opt.model, Place.of(_outside_of_torch())
            _become_plain(ours)
            if self.record is not None:
                opt.history.to_jsonl(self.record)
        return None

    def _run_backward(self, loss: Tensor, args: Any, kwargs: Any) -> None:
        plain: Callable[[], None] = partial(self._backward, loss, *args, **kwargs)
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        elsewhere = given.get("inputs") is not None  # as for adversarial examples
        if self.opt is None or self.aside or self._in_backward or elsewhere or not self._trains(loss):
            return plain()
        weight = given.get("gradient")
        if self.backward is None:
            frame = _outside_of_torch()
            self.backward, self.name = Place.of(frame), name_in(frame, self.opt)
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


def _become_plain(opt: AdaptiveWarmup) -> None:
    """Leave a proxy that only hands on, for whoever holds it: nothing is heard, measured or written any more."""
    base = opt.base
    opt.history.close()
    opt.sources.captured.capture.remove()
    opt.sources.watch.follow([])
    vars(opt).clear()
    opt.__class__ = OptimizerProxy  # type: ignore[assignment]
    opt.base = base


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
