"""What torch computes with, where that is a setting of the process: threads that measure at once share it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


class Switch:
    """The first thread that comes in sets it, the last puts it back.

    Each for itself would put back what another has set, for good.
    """

    def __init__(self, *settings: Callable[[], AbstractContextManager[Any]]) -> None:
        self.settings = settings
        self.lock, self.inside, self.stack = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                with ExitStack() as stack:
                    for setting in self.settings:
                        stack.enter_context(setting())
                    self.stack = stack.pop_all()
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.stack.close()


def _eager() -> AbstractContextManager[Any]:
    if "torch._dynamo" not in sys.modules:  # nothing is compiled then, and importing it takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def _no_mkldnn() -> Iterator[None]:
    mkldnn: Any = torch.backends.mkldnn  # its `flags` sets, and warns of, TF32 as well
    before = mkldnn.enabled
    mkldnn.enabled = False
    try:
        yield
    finally:
        mkldnn.enabled = before


@contextmanager
def _no_fastpath() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


EAGER = Switch(_eager)
"""Compiled modules run as they were written."""
MATH = Switch(lambda: sdpa_kernel(SDPBackend.MATH), lambda: torch.backends.cudnn.flags(enabled=False))
"""Attention and recurrences by kernels that can be differentiated twice."""
NO_MKLDNN = Switch(_no_mkldnn)
"""Its recurrences have no forward derivative."""
NO_FASTPATH = Switch(_no_fastpath)
"""The fused kernel of `nn.MultiheadAttention` and of transformer layers has none."""
