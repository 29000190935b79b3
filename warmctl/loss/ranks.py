"""One loss evaluated by all ranks at once, such that none waits for what another will never send.

`DistributedDataParallel` is passed by: the module inside computes, and what is averaged is averaged by
`warmctl.distributed`, once every rank has it. Where collectives cannot be left out (FSDP2, synchronised batch norm),
all ranks meet before each, in the forward and in the backward pass. What fails between two collectives of the user's
own cannot be made good: the others are inside the second, as in training.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from warmctl import distributed
from warmctl.vectors import local

UNEVEN = (
    "AdaptiveWarmup cannot be used inside DDP's join(): in warmup, and while it guards, every rank takes part in each "
    'step. Give every rank as many batches (drop_last=True, or a DistributedSampler), or let warmup end (after="hold" '
    'or "release") before ranks may run out of batches'
)


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
                if isinstance(module, sharded) and _has_collectives_to_meet_in(module):
                    stack.enter_context(_meet_in_collectives(module))
                elif isinstance(module, (sharded, nn.SyncBatchNorm)):
                    for handle in _meet_around(module):
                        stack.callback(handle.remove)
            complete = False
            try:
                yield
                complete = torch.is_grad_enabled()
            finally:
                if not complete:
                    _end_iteration(self.model, sharded)

    def check_even(self) -> None:
        """Raise RuntimeError inside DDP's `join()`, which answers no collectives but DDP's for a rank that is done."""
        if distributed.world_size() > 1 and any(replica._join_config.enable for replica in self._found_replicas()):
            raise RuntimeError(UNEVEN)

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


COLLECTIVES = ("_all_gather_comm", "gather"), ("_reduce_scatter_comm", "reduce")


class _Met:
    """A collective of FSDP2's that all ranks begin at once, once each has the memory for it."""

    def __init__(self, own: Any, meet: Callable[[], None]) -> None:
        self.own, self.meet = own, meet

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = self.own.allocate(*args, **kwargs)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.meet()
        return self.own(*args, **kwargs)


def _has_collectives_to_meet_in(module: Any) -> bool:
    """Not so in torch before 2.9, nor where `replicate` has made copies rather than shards."""
    groups = getattr(module._get_fsdp_state(), "_fsdp_param_groups", ())
    return all(hasattr(group, "_all_gather_comm") and hasattr(group.mesh_info, "shard_mesh_size") for group in groups)


@contextmanager
def _meet_in_collectives(module: Any) -> Iterator[None]:
    """All ranks meet when the module gathers its weights, and when it reduces their gradients."""
    groups = module._get_fsdp_state()._fsdp_param_groups
    before = [(vars(group), name, vars(group)[name], place) for group in groups for name, place in COLLECTIVES]
    try:
        for own, name, collective, place in before:
            own[name] = _Met(collective, distributed.meeting(place))
        yield
    finally:
        for own, name, collective, _ in before:
            own[name] = collective


def _meet_around(module: nn.Module) -> list[RemovableHandle]:
    """All ranks meet before the module gathers its weights, in both passes, and before it reduces their gradients.

    FSDP2 gathers in a hook before the module, and in one on its outputs; it reduces in the backward of a node that such
    a hook puts before the module, or at the end of the pass where no input has a gradient.
    """
    gather, reduce, end = map(distributed.meeting, ("gather", "reduce", "end"))
    queued = False

    def at_end() -> None:
        nonlocal queued
        queued = False
        end()

    def at_output(gradient: Tensor) -> None:
        nonlocal queued
        gather()
        if not queued:  # before FSDP2's own
            queued = True
            torch.autograd.Variable._execution_engine.queue_callback(at_end)

    @_disable_dynamo
    def before(module: nn.Module, args: Any) -> None:
        gather()

    @_disable_dynamo
    def inside(module: nn.Module, args: Any, kwargs: Any) -> None:
        for node in {t.grad_fn for t in _tensors((args, kwargs)) if t.grad_fn is not None}:
            node.register_prehook(lambda gradients: reduce())

    @_disable_dynamo
    def after(module: nn.Module, args: Any, output: Any) -> None:
        for t in _tensors(output):
            if t.requires_grad:
                t.register_hook(at_output)  # type: ignore[no-untyped-call]

    return [
        module.register_forward_pre_hook(before, prepend=True),
        module.register_forward_pre_hook(inside, with_kwargs=True),
        module.register_forward_hook(after, prepend=True),
    ]


def _tensors(structure: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor)]


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
