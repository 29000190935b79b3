"""Every random stream that a training step or a loader may draw from, read and put back."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

WITHIN = ("sampler", "batch_sampler", "dataset")
"""Where a loader keeps what draws for it."""


class RandomState:
    """The state of every random stream a training step may draw from: torch on each device, NumPy, Python.

    The streams are the process's, not a thread's: threads that draw from them are not reproducible, wrapped or not.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self.devices = [d for d in dict.fromkeys(devices) if d.type not in ("cpu", "meta")]
        self.cpu = torch.get_rng_state()
        self.device_states = [torch.get_device_module(d).get_rng_state(d) for d in self.devices]
        self.numpy, self.python = _NUMPY.read(), random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.device_states, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        _NUMPY.restore(*self.numpy)
        random.setstate(self.python)


@contextmanager
def stream_put_back(batches: Any) -> Iterator[None]:
    """Generators of a loader and of its samplers stand afterwards where they stood. An iterator's own place is lost."""
    held = {id(g): g for owner in _owners(batches) for g in vars(owner).values()}.values()
    of_torch = [(g, g.get_state()) for g in held if isinstance(g, torch.Generator)]
    of_numpy = [(g.bit_generator, g.bit_generator.state) for g in held if isinstance(g, np.random.Generator)]
    try:
        yield
    finally:
        for generator, state in of_torch:
            generator.set_state(state)
        for bits, numbers in of_numpy:
            bits.state = numbers


def _owners(batches: Any, depth: int = 3) -> Iterator[Any]:
    if depth and hasattr(batches, "__dict__"):
        yield batches
        for name in WITHIN:
            if name in vars(batches):
                yield from _owners(vars(batches)[name], depth - 1)


class _NumpyState:
    """NumPy's global generator. To read its state takes 60 µs: it is read again only once the generator has moved.

    A spare normal is drawn without moving it: once one has been seen, the state is read and set every time.
    """

    def __init__(self) -> None:
        self.spares = False
        self.last: tuple[Any, Any] = None, None

    def read(self) -> tuple[Any, Any]:
        """A mark of where it stands, or None if there is no telling, and the state."""
        mark = None if self.spares else self.mark()
        if mark is None or mark != self.last[0]:
            state: Any = np.random.get_state()
            self.spares = self.spares or bool(state[3])
            found = None if self.spares else mark, state
            self.last = found
            return found
        return self.last

    def restore(self, mark: Any, state: Any) -> None:
        if mark is None or mark != self.mark():
            np.random.set_state(state)

    @staticmethod
    def mark() -> tuple[int, bytes] | None:
        """The generator's 624 words and the position in them."""
        generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if not isinstance(generator, np.random.MT19937):
            return None
        address = generator.ctypes.state_address
        return address, ctypes.string_at(address, 625 * 4)


_NUMPY = _NumpyState()
