"""A stream of batches that is drawn from, and stands afterwards where it stood."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

WITHIN = ("sampler", "batch_sampler", "dataset")
"""Where a loader keeps what draws for it."""


def endless(batches: Iterable[Any], wanted: int) -> Iterator[Any]:
    """Batches without end: begun again where they run out, as epochs are.

    Raises: ValueError where there are none, or where an iterator, which cannot be begun again, ends early.
    """
    seen = 0
    while True:
        before = seen
        for batch in batches:
            seen += 1
            yield batch
        if seen == before:
            held = f"ended after {seen}" if seen else "are empty"
            raise ValueError(
                f"batches {held}, and {wanted} are needed: give a DataLoader or a list, which can be begun again, "
                "or fewer steps"
            )


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
