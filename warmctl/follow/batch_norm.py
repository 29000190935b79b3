"""The momentum of batch norm's running averages, by how far the weights move."""

from __future__ import annotations

from torch import Tensor, nn

from warmctl.follow.follower import Levers
from warmctl.follow.kept import Kept, Place, whole


class BatchNormMomentum:
    """m_t = max(1/t, m · max(s_t, low/m)): the averages look back over a stretch in which the weights moved little.

    While the rate is low they average over a longer past, but never over more than there is: 1/t is the plain mean of
    all t batches so far, in place of the zeros and ones that the averages begin with. At full scale it is the layer's
    own m. Forward passes come before the decision about their step, so that of step t is made by s_{t-1}.

    In training mode the averages are not read: what moves is only what evaluation sees. The momentum stays where it was
    put between steps. A momentum of None, the mean of all batches, is left alone.

    >>> model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    >>> opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=0.1), model).follow(BatchNormMomentum(model))
    >>> train(opt)
    >>> model[1].momentum == opt.metrics["batch_norm_momentum"]
    True

    Args:
        model: its layers that keep running averages are taken as they are now.
        low: least momentum while the scale is low; a layer's own, where that is less.

    Reading: `batch_norm_momentum` of the first layer.

    Raises: TypeError unless given a module, ValueError for a model without such layers, for a compiled one, which
    would compile anew for each value, and for a `low` outside (0, 1].
    """

    def __init__(self, model: nn.Module, low: float = 0.01) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not 0.0 < low <= 1.0:
            raise ValueError(f"low must be in (0, 1], the least momentum of the running averages, got {low!r}")
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
            raise ValueError(
                "model is compiled: it would be compiled anew at every step, for a momentum that is a constant there"
            )
        self.low = low
        self.layers = [m for m in model.modules() if _averages(m)]
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} has no layer that keeps running averages with a momentum (BatchNorm1d, "
                "BatchNorm2d, …): there is nothing for BatchNormMomentum to follow"
            )
        counts = [getattr(m, "num_batches_tracked", None) for m in self.layers]
        self._seen = max((int(count) for count in counts if isinstance(count, Tensor)), default=0)
        self._kept = Kept("momentum", len(self.layers))

    def attach(self, levers: Levers) -> None:
        self._move(levers.scale)

    def detach(self) -> None:
        self._kept.put_back(self._places())

    def follow(self, scale: float, rate: float, phase: str) -> None:
        self._seen += 1
        self._move(scale)

    def readings(self) -> dict[str, float]:
        return {"batch_norm_momentum": float(self._places()[0].value)}

    def state_dict(self) -> dict[str, float]:
        return {"seen": float(self._seen), **self._kept.state_dict()}

    def load_state_dict(self, values: dict[str, float]) -> None:
        self._kept.load_state_dict(values, self._places())
        self._seen = whole("seen", values["seen"])

    def _move(self, scale: float) -> None:
        coming = self._seen + 1
        self._kept.move(
            self._places(), lambda own: max(1.0 / coming, own if scale == 1.0 else max(own * scale, min(own, self.low)))
        )

    def _places(self) -> list[Place]:
        return [Place(layer, "momentum") for layer in self.layers]


def _averages(module: nn.Module) -> bool:
    """Duck-typed: synchronised batch norms, and those of libraries, are no subclasses of one class."""
    kept = isinstance(getattr(module, "running_mean", None), Tensor)
    return kept and isinstance(module.__dict__.get("momentum"), float)
