"""The measured stability ratio against the dense matrix in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from tests.helpers import batch_of, closure_for, closure_of, loss_fn, mlp, monitor, noisy_net, train
from tests.stability.dense import exact_ratio, measured
from warmctl import AdaptiveWarmup


def two_groups(model: nn.Sequential, **options: Any) -> torch.optim.Optimizer:
    first, second = list(model[0].parameters()), list(model[2].parameters())
    return torch.optim.Adam(
        [{"params": first, "lr": 1e-2}, {"params": second, "lr": 1e-3, "betas": (0.5, 0.9)}], **options
    )


OPTIMIZERS: dict[str, Callable[[nn.Sequential], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.3),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    "SGD with coupled decay": lambda m: torch.optim.SGD(m.parameters(), 0.3, weight_decay=0.5),
    "SGD maximising": lambda m: torch.optim.SGD(m.parameters(), 0.1, maximize=True, weight_decay=0.1),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), 1e-2),
    "Adam with coupled decay": lambda m: torch.optim.Adam(m.parameters(), 1e-2, weight_decay=0.1),
    "AdamW with strong decay": lambda m: torch.optim.AdamW(m.parameters(), 0.05, weight_decay=8.0),
    "Adam maximising": lambda m: torch.optim.Adam(m.parameters(), 1e-3, maximize=True),
    "two groups": two_groups,
}


@pytest.mark.parametrize(
    "name, trained, hvp",
    [(name, 7, "finite_difference") for name in OPTIMIZERS]
    + [(name, 0, "finite_difference") for name in ("momentum", "Adam", "two groups")]
    + [(name, 3, "double_backward") for name in ("SGD maximising", "AdamW with strong decay")],
)
def test_the_ratio_is_that_of_the_dense_matrix(name: str, trained: int, hvp: str) -> None:
    model = mlp().double()
    base = OPTIMIZERS[name](model)
    batch = [t.double() for t in batch_of(3)]
    for _ in range(trained):
        base.step(closure_for(base, model, batch))
    opt = monitor(model, base, probe_steps=30, hvp=hvp)
    expected = exact_ratio(base, model, loss_fn, batch)
    opt.step(closure_for(opt, model, batch))
    assert measured(opt) == pytest.approx(expected, rel=2e-3)
    assert opt.meter.last is not None
    assert opt.metrics["stability_ratio"] == pytest.approx(opt.meter.last.ratio)
    curvature = opt.metrics["threshold"] / base.param_groups[0]["lr"] * opt.meter.last.ratio
    assert opt.metrics["sharpness"] == pytest.approx(curvature)


def test_float32_is_accurate_enough() -> None:
    model = mlp()
    base = torch.optim.Adam(model.parameters(), 1e-2)
    train(base, model, range(5))
    opt = monitor(model, base, probe_steps=40)
    expected = exact_ratio(base, model, loss_fn, batch_of(9))
    opt.step(closure_for(opt, model, batch_of(9)))
    assert measured(opt) == pytest.approx(expected, rel=1e-2)


def test_batch_norm_is_measured_in_train_mode() -> None:
    model = noisy_net().double()
    model[3] = nn.Identity()
    base = torch.optim.SGD(model.parameters(), 0.1)
    batch = [t.double() for t in batch_of(0)]
    opt = monitor(model, base, probe_steps=30)
    expected = exact_ratio(base, model, loss_fn, batch)
    opt.step(closure_for(opt, model, batch))
    assert measured(opt) == pytest.approx(expected, rel=5e-3)
    assert int(model[1].num_batches_tracked) == 1


def test_frozen_and_unused_parameters_do_not_count() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unused = mlp(), nn.Linear(4, 4)
            self.body[0].weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Partial().double()
    base = torch.optim.Adam(model.parameters(), 1e-2)
    batch = [t.double() for t in batch_of(1)]
    frozen = model.body[0].weight.detach().clone()
    opt = monitor(model, base, probe_steps=30)
    expected = exact_ratio(base, model, loss_fn, batch)
    opt.step(closure_for(opt, model, batch))
    assert measured(opt) == pytest.approx(expected, rel=2e-3)
    assert torch.equal(model.body[0].weight, frozen)
    assert model.unused.weight.grad is None and not base.state.get(model.unused.weight)


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(50, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


def words_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("hvp", ["finite_difference", "double_backward"])
def test_embedding_rows_never_seen_do_not_spoil_the_difference(hvp: str) -> None:
    """Under Adam P is ε there and D is 1e8 times that of other rows."""
    model = Words(sparse=False)
    base = torch.optim.Adam(model.parameters(), 1e-2)
    opt = monitor(model, base, probe_steps=6, hvp=hvp)
    for step in range(12):
        generator = torch.Generator().manual_seed(step % 2)
        batch = torch.randint(10, (40,), generator=generator), torch.randint(3, (40,), generator=generator)
        expected = exact_ratio(base, model, words_loss, batch)
        opt.zero_grad()
        opt.step(closure_for(opt, model, batch, words_loss))
        assert measured(opt) <= expected * 1.02
        assert measured(opt) >= expected * 0.5 or step < 4
    assert measured(opt) == pytest.approx(expected, rel=0.1)


def test_sparse_gradients() -> None:
    model = Words(sparse=True).double()
    base = torch.optim.SGD(model.parameters(), 0.5)
    batch = torch.arange(40) % 10, torch.arange(40) % 3
    opt = monitor(model, base, probe_steps=30)
    expected = exact_ratio(base, model, words_loss, batch)
    opt.step(closure_for(opt, model, batch, words_loss))
    assert measured(opt) == pytest.approx(expected, rel=2e-3)
    assert model.embedding.weight.grad is not None and model.embedding.weight.grad.is_sparse


@pytest.mark.parametrize("estimator, steps, probes", [("lanczos", 1, 60), ("lanczos", 2, 12), ("power", 1, 60)])
def test_warm_start_converges_on_a_fixed_batch(estimator: str, steps: int, probes: int) -> None:
    model = mlp().double()
    base = torch.optim.SGD(model.parameters(), 1e-9)
    batch = [t.double() for t in batch_of(0)]
    opt = monitor(model, base, probe_steps=steps, estimator=estimator)
    expected = exact_ratio(base, model, loss_fn, batch)
    found = []
    for _ in range(probes):
        opt.step(closure_for(opt, model, batch))
        found.append(measured(opt))
    assert max(found) <= expected * 1.001
    assert found[-1] == pytest.approx(expected, rel=2e-2)
    assert found[-1] > found[0]


def test_bfloat16_entries_below_its_rounding_of_the_largest_count() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = mlp().to(dtype)
        opt = AdaptiveWarmup(AdamW(model.parameters(), 1e-3), model, control=False)
        x, y = batch_of(0)
        x = (x * torch.logspace(0, -3, x.shape[1])).to(dtype)  # gradients over three decades
        opt.step(closure_for(opt, model, (x, y.to(dtype))))
        found[dtype] = opt.metrics["stability_ratio"]
    assert found[torch.bfloat16] > 0.5 * found[torch.float32]


def test_adam_without_eps_and_an_entry_without_gradient() -> None:
    model = nn.Linear(4, 1, bias=False)
    opt = AdaptiveWarmup(torch.optim.Adam(model.parameters(), 0.1, eps=0.0), model, control=False)
    x = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    closure = closure_of(opt, lambda: (model(x) - 1.0).square().sum())
    closure()
    root = opt.meter.estimator.scaling([model.weight])[0][0]
    assert torch.isfinite(root).all() and root[0, 3] == 0.0
