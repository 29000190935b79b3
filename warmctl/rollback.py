"""Loading a saved state in full or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from warmctl.state import Saved


@contextmanager
def all_or_nothing(optimizer: Optimizer, parts: Sequence[Saved], owners: Sequence[Any]) -> Iterator[None]:
    """If the inside raises, `optimizer`, `parts` and the attributes of `owners` are again what they were before.

    Nothing is copied but containers: tensors that the inside writes to in place, which torch's optimizers replace, stay
    written.
    """
    members = getattr(optimizer, "members", ())  # of a chain, which has nothing of its own
    attributes = [(thing, dict(vars(thing))) for thing in (optimizer, *members, *owners)]
    containers = [optimizer.state, *optimizer.state.values(), *optimizer.param_groups]
    contents = [(container, dict(container)) for container in containers if isinstance(container, dict)]
    order = list(optimizer.param_groups)
    values = [(part, part.state_values()) for part in parts]
    try:
        yield
    except BaseException:
        for part, before in values:  # the hooks of a captured model come and go with its values
            part.load_state_values(before)
        for thing, held in attributes:
            vars(thing).clear()
            vars(thing).update(held)
        optimizer.param_groups[:] = order
        for container, content in contents:
            container.clear()
            container.update(content)
        raise
