"""The measured stability ratio against the dense matrix in float64; what a probe costs and keeps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness.problems import PROBLEMS
from tests.helpers import batch_of, closure_for, loss_fn, mlp, noisy_net, train
from tests.problems_closed_form import dense_hessian
from warmctl import AdaptiveWarmup
from warmctl.stability.estimator import INCOHERENT, LARGEST_SLACK, _step_slack
from warmctl.stability.update_rules import update_rule

Loss = Callable[[nn.Module, Any], Tensor]


def exact_scaling(opt: torch.optim.Optimizer, params: list[Tensor], gradient: list[Tensor]) -> np.ndarray:
    """D = η / (τ P) of the coming step, for SGD and the Adam family; shares no code with the package."""
    parts = []
    for group in opt.param_groups:
        for p in group["params"]:
            if not p.requires_grad:
                continue
            g = gradient[[id(q) for q in params].index(id(p))].double()
            rate, state = float(group["lr"]), opt.state.get(p, {})
            if "betas" not in group:
                edge = 2 * (1 + group["momentum"])
                d = torch.full_like(g, rate / edge)
            else:
                beta1, beta2 = group["betas"]
                t = float(state.get("step", 0)) + 1
                shrink = rate * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
                g = -g if group["maximize"] else g
                if not group["decoupled_weight_decay"]:
                    g = g + group["weight_decay"] * p.detach().double()
                v = beta2 * state.get("exp_avg_sq", torch.zeros_like(p)).double() + (1 - beta2) * g * g
                root = (v / (1 - beta2**t)).sqrt() + group["eps"]
                edge = (2 - shrink) * (1 + beta1) / (1 - beta1) * (1 - beta1**t)
                d = rate / edge / root
            if p.grad is None and not float(gradient[[id(q) for q in params].index(id(p))].abs().sum()):
                d = torch.zeros_like(d)
            parts.append(d.flatten())
    return torch.cat(parts).numpy()


def exact_ratio(opt: torch.optim.Optimizer, model: nn.Module, loss: Loss, batch: Any) -> float:
    """λ_max(D^½ (±H + c) D^½) of the coming step; needs parameters in the order of the optimizer."""
    held = [p for group in opt.param_groups for p in group["params"] if p.requires_grad]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in held] == [id(p) for p in trainable]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    value = loss(model, batch)
    gradient = torch.autograd.grad(value, held, allow_unused=True, materialize_grads=True)
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    d = exact_scaling(opt, held, [g.to_dense() for g in gradient])
    h = dense_hessian(model, loss, batch)
    sign = -1.0 if opt.param_groups[0].get("maximize") else 1.0
    decay = [
        0.0 if group.get("decoupled_weight_decay") else group.get("weight_decay", 0.0)
        for group in opt.param_groups
        for p in group["params"]
        for _ in range(p.numel())
        if p.requires_grad
    ]
    return float(np.linalg.eigvalsh(np.sqrt(d)[:, None] * (sign * h + np.diag(decay)) * np.sqrt(d)).max())


def measured(opt: AdaptiveWarmup) -> float:
    assert opt.last is not None and not opt.last.reason, opt.last
    return opt.last.ratio / opt.last.share  # of this very step


def monitor(base: torch.optim.Optimizer, model: nn.Module, steps: int, **options: Any) -> AdaptiveWarmup:
    return AdaptiveWarmup(base, model, control=False, every=1, probe_steps=steps, **options)


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
    opt = monitor(base, model, 30, hvp=hvp)
    expected = exact_ratio(base, model, loss_fn, batch)
    opt.step(closure_for(opt, model, batch))
    assert measured(opt) == pytest.approx(expected, rel=2e-3)
    assert opt.last is not None
    assert opt.metrics["stability_ratio"] == pytest.approx(opt.last.ratio)
    curvature = opt.metrics["threshold"] / base.param_groups[0]["lr"] * opt.last.ratio
    assert opt.metrics["sharpness"] == pytest.approx(curvature)


def test_float32_is_accurate_enough() -> None:
    model = mlp()
    base = torch.optim.Adam(model.parameters(), 1e-2)
    train(base, model, range(5))
    opt = monitor(base, model, 40)
    expected = exact_ratio(base, model, loss_fn, batch_of(9))
    opt.step(closure_for(opt, model, batch_of(9)))
    assert measured(opt) == pytest.approx(expected, rel=1e-2)


def test_batch_norm_is_measured_in_train_mode() -> None:
    model = noisy_net().double()
    model[3] = nn.Identity()
    base = torch.optim.SGD(model.parameters(), 0.1)
    batch = [t.double() for t in batch_of(0)]
    opt = monitor(base, model, 30)
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
    opt = monitor(base, model, 30)
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
    opt = monitor(base, model, 6, hvp=hvp)
    for step in range(12):
        generator = torch.Generator().manual_seed(step % 2)
        batch = torch.randint(10, (40,), generator=generator), torch.randint(3, (40,), generator=generator)
        expected = exact_ratio(base, model, words_loss, batch)
        opt.zero_grad()

        def closure(batch: Any = batch) -> Tensor:
            opt.zero_grad()
            loss = words_loss(model, batch)
            loss.backward()
            return loss

        opt.step(closure)
        assert measured(opt) <= expected * 1.02
        assert measured(opt) >= expected * 0.5 or step < 4
    assert measured(opt) == pytest.approx(expected, rel=0.1)


def test_sparse_gradients() -> None:
    model = Words(sparse=True).double()
    base = torch.optim.SGD(model.parameters(), 0.5)
    batch = torch.arange(40) % 10, torch.arange(40) % 3
    opt = monitor(base, model, 30)
    expected = exact_ratio(base, model, words_loss, batch)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = words_loss(model, batch)
        loss.backward()
        return loss

    opt.step(closure)
    assert measured(opt) == pytest.approx(expected, rel=2e-3)
    assert model.embedding.weight.grad is not None and model.embedding.weight.grad.is_sparse


@pytest.mark.parametrize("estimator, steps, probes", [("lanczos", 1, 60), ("lanczos", 2, 12), ("power", 1, 60)])
def test_warm_start_converges_on_a_fixed_batch(estimator: str, steps: int, probes: int) -> None:
    model = mlp().double()
    base = torch.optim.SGD(model.parameters(), 1e-9)
    batch = [t.double() for t in batch_of(0)]
    opt = monitor(base, model, steps, estimator=estimator)
    expected = exact_ratio(base, model, loss_fn, batch)
    found = []
    for _ in range(probes):
        opt.step(closure_for(opt, model, batch))
        found.append(measured(opt))
    assert max(found) <= expected * 1.001
    assert found[-1] == pytest.approx(expected, rel=2e-2)
    assert found[-1] > found[0]


# Cost: two products a probe, four in the first -------------------------------------------------------------


class CountedModel(nn.Module):
    """Counts the forward passes that are followed by a backward pass through it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gradients = mlp(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.gradients += torch.is_grad_enabled()
        return self.body(x)


class OwnLoss(CountedModel):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": F.mse_loss(super().forward(x), y)}


def probe_costs(opt: AdaptiveWarmup, model: CountedModel, step: Callable[[Any], None]) -> list[float]:
    """Gradient evaluations spent on the probe of each step, by the metrics; they are those really made."""
    costs, before = [], 0.0
    for index in range(3):
        model.gradients = 0
        step(batch_of(index))
        total = opt.metrics["overhead"] * (index + 1)
        assert model.gradients - 1 == pytest.approx(total - before)
        costs.append(round(total - before, 6))
        before = total
        assert opt.metrics["hvps"] == 2 * (index + 2) and opt.metrics["probes"] == index + 1
    return costs


def counted(model: CountedModel, **options: Any) -> AdaptiveWarmup:
    base = torch.optim.SGD(model.parameters(), 0.1)
    return monitor(base, model, 2, hvp="finite_difference", **options)


def test_rmsprops_edge_is_where_its_step_points_along_the_top_eigenvector() -> None:
    """λ, and a share (λ/ρ)² for the quotient ρ along the step: both from the dense Hessian of the batch."""
    model = mlp().double()
    batch = tuple(t.double() for t in batch_of(0, 64))
    base = torch.optim.RMSprop(model.parameters(), 1e-3)
    opt = AdaptiveWarmup(base, model, control=False, every=1, hvp="double_backward")
    for _ in range(40):
        opt.step(closure_for(opt, model, batch))
    params = list(model.parameters())
    gradient = torch.autograd.grad(loss_fn(model, batch), params)
    squares = [0.99 * base.state[p]["square_avg"] + 0.01 * g * g for p, g in zip(params, gradient, strict=True)]
    d = torch.cat([1e-3 / 2 / (v.sqrt() + 1e-8) for v in map(torch.ravel, squares)]).numpy()
    a = np.sqrt(d)[:, None] * dense_hessian(model, loss_fn, batch) * np.sqrt(d)
    u = np.sqrt(d) * np.concatenate([g.numpy().ravel() for g in gradient])
    along = u @ a @ u / (u @ u)
    opt.step(closure_for(opt, model, batch))
    found = opt.last
    assert found is not None and found.noisy
    expected = min((found.ratio / along) ** 2, LARGEST_SLACK) if along > 0 else LARGEST_SLACK
    assert found.share == pytest.approx(max(expected, 1.0), rel=1e-6)
    assert found.ratio == pytest.approx(np.linalg.eigvalsh(a).max(), rel=0.05)


@pytest.mark.parametrize(
    "eigenvalue, along, slack",
    [(4.0, 4.0, 1.0), (4.0, 2.0, 4.0), (4.0, 0.4, LARGEST_SLACK), (4.0, 0.0, LARGEST_SLACK), (4.0, -1.0, LARGEST_SLACK),
     (0.0, -1.0, 1.0), (-2.0, -3.0, 1.0), (2.0, 4.0, 1.0)],
)  # fmt: skip
def test_slack_of_a_self_limiting_rule(eigenvalue: float, along: float, slack: float) -> None:
    """(λ/ρ)²: none where step and eigenvector are one, bounded, and none without positive curvature."""
    assert _step_slack(eigenvalue, along) == pytest.approx(slack)


@pytest.mark.parametrize(
    "make, limited",
    [
        (lambda p: torch.optim.RMSprop(p, 0.1), True),
        (lambda p: torch.optim.Adagrad(p, 0.1), True),
        (lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9), False),
        (lambda p: torch.optim.Adam(p, 0.1), False),
        (lambda p: torch.optim.SGD(p, 0.1), False),
    ],
)
def test_only_adaptive_rules_without_momentum_limit_themselves(make: Any, limited: bool) -> None:
    model, batch = mlp(), batch_of(32)
    opt = AdaptiveWarmup(make(model.parameters()), model, control=False, every=1)
    for _ in range(2):
        opt.step(closure_for(opt, model, batch))
    rule = update_rule(opt.base)
    assert rule is not None and rule.self_limiting(opt.param_groups[0]) == limited
    assert opt.last is not None and opt.last.noisy == limited
    assert 0 < INCOHERENT < 1


def test_cost_of_a_closure_one_more_at_the_first_probe() -> None:
    model = CountedModel()
    opt = counted(model)
    assert probe_costs(opt, model, lambda b: opt.step(closure_for(opt, model, b))) == [5, 2, 2]


def test_cost_of_a_touched_gradient_one_more() -> None:
    model = CountedModel()
    opt = counted(model)

    def step(batch: Any) -> None:
        def closure() -> Tensor:
            loss = closure_for(opt, model, batch)()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            return loss

        opt.step(closure)

    assert probe_costs(opt, model, step) == [6, 3, 3]


def test_cost_of_an_observed_batch_one_more() -> None:
    model = CountedModel()
    opt = counted(model, loss_fn=loss_fn)

    def step(batch: Any) -> None:
        closure_for(opt, model, batch)()
        opt.observe(batch)
        opt.step()

    assert probe_costs(opt, model, step) == [5, 3, 3]


@pytest.mark.parametrize("clipped, expected", [(False, [5, 2, 2]), (True, [5, 3, 3])])
def test_cost_of_a_captured_loss(clipped: bool, expected: list[float]) -> None:
    model = OwnLoss()
    opt = counted(model)

    def step(batch: Any) -> None:
        opt.zero_grad()
        model(*batch)["loss"].backward()
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        opt.step()

    assert probe_costs(opt, model, step) == expected


def test_auto_pays_for_its_comparison_once() -> None:
    model = mlp()
    opt = monitor(torch.optim.SGD(model.parameters(), 0.1), model, 2)
    rows = train(opt, model, range(4))
    spent = [row["overhead"] * (i + 1) for i, row in enumerate(rows)]
    assert spent[0] > 4
    assert np.diff(spent) == pytest.approx([2, 2, 2])


def test_a_failed_probe_is_paid_for() -> None:
    class Failing(CountedModel):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if self.gradients == 3:
                raise RuntimeError("too much")
            return out

    model = Failing()
    opt = counted(model)
    with pytest.warns(RuntimeWarning, match="too much"):
        opt.step(closure_for(opt, model, batch_of(0)))
    assert opt.metrics["overhead"] == 2


# Memory ----------------------------------------------------------------------------------------------------


class LargeTensors(TorchDispatchMode):
    """The largest number of tensors of at least `size` elements alive at once, of those made inside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.peak = size, 0
        self.old: set[int] = set()
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.made += [weakref.ref(t) for t in tensors if t.numel() >= self.size]
        self.peak = max(self.peak, self.alive())
        return out

    def alive(self) -> int:
        self.made = [ref for ref in self.made if ref() is not None]
        return len({ref().untyped_storage().data_ptr() for ref in self.made} - self.old)  # type: ignore[union-attr]


def one_large_matrix() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 400, bias=False), nn.Tanh(), nn.Linear(400, 3, bias=False))


def peak_of_a_step(opt: torch.optim.Optimizer, model: nn.Module, clipped: bool, first: bool = False) -> LargeTensors:
    def closure(index: int) -> Tensor:
        loss = closure_for(opt, model, batch_of(index, size=2))()
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        return loss

    if not first:
        opt.step(lambda: closure(0))
    opt.zero_grad()
    gc.collect()
    tensors = LargeTensors(3 * 400)
    states = [v for state in opt.state.values() for v in state.values() if isinstance(v, Tensor)]
    tensors.old = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *states]}
    with tensors:
        opt.step(lambda: closure(1))
    return tensors


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("clipped", [False, True])
def test_memory_of_a_probe(make: Any, steps: int, clipped: bool) -> None:
    """At most `probe_steps` + 3 parameter-sized vectors beyond training; one is two large tensors here."""
    plain, model = one_large_matrix(), one_large_matrix()
    bare = peak_of_a_step(make(plain.parameters(), 0.1), plain, clipped)
    opt = monitor(make(model.parameters(), 0.1), model, steps, hvp="finite_difference")
    wrapped = peak_of_a_step(opt, model, clipped)
    assert measured(opt) and opt.counts.probes == 2
    assert (wrapped.peak - bare.peak) / 2 <= steps + 3
    assert wrapped.alive() == bare.alive() + 2  # the eigenvector


@pytest.mark.parametrize("steps", [2, 5])
def test_memory_of_the_first_probe(steps: int) -> None:
    """At most 2 `probe_steps` + 3: it makes twice as many products, and Lanczos keeps a vector for each."""
    plain, model = one_large_matrix(), one_large_matrix()
    bare = peak_of_a_step(torch.optim.SGD(plain.parameters(), 0.1), plain, False, first=True)
    opt = monitor(torch.optim.SGD(model.parameters(), 0.1), model, steps, hvp="finite_difference")
    wrapped = peak_of_a_step(opt, model, False, first=True)
    assert opt.counts.probes == 1
    assert steps + 3 < (wrapped.peak - bare.peak) / 2 <= 2 * steps + 3


def test_kinks_do_not_make_a_probe_dearer_in_full_precision() -> None:
    """At this initialisation a finite difference across the kinks is 2.3 times the exact quotient away from it."""
    problem = PROBLEMS["cnn"]
    model = problem.build(2)
    opt = AdaptiveWarmup(problem.optimizer(model.parameters(), problem.tuned_lr), model)
    batch = next(problem.batches(2))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.estimator.method == "finite_difference"
    assert opt.metrics["overhead"] == 1 + 1 + 4  # can it be repeated, in which precision, four products from cold


@pytest.mark.parametrize("hvp", ["finite_difference", "double_backward"])
@pytest.mark.parametrize("source", ["closure", "backward"])
def test_no_graph_and_no_vector_survives_a_probe(hvp: str, source: str) -> None:
    model = mlp()
    opt = monitor(torch.optim.SGD(model.parameters(), 0.1), model, 2, hvp=hvp)
    graphs: list[weakref.ref[Any]] = []

    class Marker:
        def __call__(self, gradient: Tensor) -> None:
            pass

    def mark(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            marker = Marker()
            out.register_hook(marker)  # lives as long as the graph
            graphs.append(weakref.ref(marker))

    model.register_forward_hook(mark)
    for index in range(3):
        if source == "closure":
            opt.step(closure_for(opt, model, batch_of(index)))
        else:
            opt.zero_grad()
            opt.backward(loss_fn(model, batch_of(index)))
            opt.step()
    gc.collect()
    assert len(graphs) >= 3 and measured(opt)
    assert not any(ref() is not None for ref in graphs)
    assert opt.estimator.vector is not None and not any(v.requires_grad for v in opt.estimator.vector)
