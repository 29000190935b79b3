"""One loss evaluated by all ranks at once, such that none waits for what another will never send.

`DistributedDataParallel` is passed by: the module inside computes, and what is averaged is averaged by
`warmctl.distributed`, once every rank has it. Where collectives cannot be left out of the forward pass (FSDP2,
synchronised batch norm), all ranks meet before each. What fails between two collectives of one backward pass cannot be
made good: the others are inside the second, as in training.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel

from warmctl import distributed
from warmctl.vectors import local


class Ranks:
    """Args: model: of the wrapper: the module inside DDP, or DDP, or one that holds either."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._replicas: list[weakref.ref[DistributedDataParallel]] | None = None

    def __reduce__(self) -> Any:
        return Ranks, (self.model,)

    def together(self, params: Sequence[Tensor]) -> AbstractContextManager[None]:
        """See `distributed.transaction`."""
        return distributed.transaction(local(params[0]).device)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """One evaluation of the loss, which runs here and in no collective but where all ranks have met before it."""
        if distributed.world_size() == 1:
            yield
            return
        distributed.begin_evaluation()
        sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
        with ExitStack() as stack:
            for replica in self._found_replicas():
                stack.enter_context(_bare(replica))
            for module in self.model.modules():
                if isinstance(module, (sharded, nn.SyncBatchNorm)):
                    stack.callback(module.register_forward_pre_hook(_meet, prepend=True).remove)
            complete = False
            try:
                yield
                complete = torch.is_grad_enabled()
            finally:
                if not complete:
                    _end_iteration(self.model, sharded)

    def _found_replicas(self) -> list[DistributedDataParallel]:
        """Every DDP module that a parameter of the model is in; a closure may call one that holds the model."""
        known = None if self._replicas is None else [replica() for replica in self._replicas]
        if known is None or None in known:
            params = {id(p) for p in self.model.parameters()}
            modules = [thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)]  # 20 ms
            known = [m for m in modules if any(id(p) in params for p in m.parameters())]
            self._replicas = [weakref.ref(replica) for replica in known if replica is not None]
        return [replica for replica in known if replica is not None]


def _end_iteration(model: nn.Module, sharded: Any) -> None:
    """What the end of a backward pass does in FSDP2: all weights are sharded again, and the next pass begins anew.

    Without it the root, which keeps its weights between the passes, would go on with those of this evaluation.
    """
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, sharded) and module not in inside:
            inside.update(module.modules())
            fsdp: Any = module
            if hasattr(fsdp, "reset_iter_state"):
                fsdp.reset_iter_state()
            else:  # torch before 2.13
                fsdp._get_fsdp_state()._root_post_backward_final_callback()


@_disable_dynamo
def _meet(module: nn.Module, args: Any) -> None:
    distributed.meet("forward")


@contextmanager
def _bare(replica: DistributedDataParallel) -> Iterator[None]:
    """Calls of `replica` go to the module inside."""
    own = vars(replica)
    before = own.get("forward")
    own["forward"] = partial(_forward, replica)
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _forward(replica: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
    if replica.device_ids:
        from torch.distributed.utils import _to_kwargs

        device = torch.device(replica.device_type, replica.device_ids[0])
        (args, *_), (kwargs, *_) = _to_kwargs(args, kwargs, device, False)
    return replica.module(*args, **kwargs)
