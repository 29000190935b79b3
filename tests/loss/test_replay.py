"""Evaluating a loss again must leave nothing behind, and must be the same loss."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.problems_closed_form import awkward, batch_norm, tanh_mlp
from warmctl.curvature.operators import HessianOperator
from warmctl.loss import replay
from warmctl.loss.replay import NotReplayable, RandomState, Replay, intercept_backward
from warmctl.vectors import random_like


def noisy_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


def closure_of(model: nn.Module, after_backward: Callable[[], object] = lambda: None) -> Callable[[], Tensor]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))

    def closure() -> Tensor:
        model.zero_grad()
        noise = float(np.random.rand()) + random.random()
        loss = model(x).square().mean() * (1 + noise)
        loss.backward()
        after_backward()
        return loss

    return closure


def replay_of(model: nn.Module) -> Replay:
    return Replay(closure_of(model), list(model.parameters()), module=model)


def streams() -> tuple[object, ...]:
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().tolist(), keys.tolist(), position, random.getstate()


EVALUATIONS: dict[str, Callable[[Replay], object]] = {
    "gradient": lambda replay: replay.gradient(),
    "loss": lambda replay: replay.loss(),
    "value": lambda replay: replay.value(),
    "verify": lambda replay: replay.verify(*replay.gradient()),
    "double backward": lambda replay: HessianOperator(replay, replay.params, "double_backward").matvec(
        random_like(replay.params, 0)
    ),
    "forward over reverse": lambda replay: HessianOperator(replay, replay.params, "forward_over_reverse").matvec(
        random_like(replay.params, 0)
    ),
    "finite difference": lambda replay: HessianOperator(replay, replay.params, "finite_difference").matvec(
        random_like(replay.params, 0)
    ),
}


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_no_trace(evaluate: Callable[[Replay], object]) -> None:
    """Parameters, gradients, buffers and counters, modes, random streams: as before, and the same objects."""
    model = noisy_model()
    model[2].eval()  # one module in another mode than the rest
    model(torch.randn(3, 4))
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i))
    grads, buffers = [p.grad for p in model.parameters()], list(model.buffers())
    state = copy.deepcopy(model.state_dict())
    replay = replay_of(model)
    torch.rand(3), np.random.rand(), random.random()  # the streams have moved on since
    before = streams()

    evaluate(replay)

    assert streams() == before
    for i, (p, grad) in enumerate(zip(model.parameters(), grads, strict=True)):
        assert p.grad is grad
        assert torch.equal(grad, torch.full_like(grad, float(i)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_no_trace_after_an_exception(evaluate: Callable[[Replay], object]) -> None:
    model = noisy_model()
    state = copy.deepcopy(model.state_dict())
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        model.eval()
        raise KeyError("after backward")

    replay = Replay(closure_of(model, fail), list(model.parameters()), module=model)
    before, backward = streams(), torch.autograd.backward
    with pytest.raises(KeyError):
        evaluate(replay)
    assert calls == 1
    assert streams() == before
    assert torch.autograd.backward is backward
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modes_and_grad_mode_that_the_closure_changes_are_put_back() -> None:
    model = noisy_model()
    replay = Replay(closure_of(model, model.eval), list(model.parameters()), module=model)
    with torch.no_grad():
        _, gradient = replay.gradient()
        assert not torch.is_grad_enabled()
    assert any(g.any() for g in gradient)
    assert all(m.training for m in model.modules())


def test_every_evaluation_draws_the_same_mask() -> None:
    model = noisy_model()
    replay = replay_of(model)
    loss, gradient = replay.gradient()
    torch.rand(7), np.random.rand(), random.random()
    again, repeated = replay.gradient()
    assert again == loss == replay.value() == replay.loss().item()
    assert all(torch.equal(a, b) for a, b in zip(gradient, repeated, strict=True))
    replay.verify(loss, gradient)


def test_a_random_state_of_the_past_is_repeated() -> None:
    model = noisy_model()
    closure = closure_of(model)
    past = RandomState()
    loss = closure()
    gradient = [p.grad.clone() for p in model.parameters()]
    _, replayed = Replay(closure, list(model.parameters()), model, random_state=past).gradient()
    assert all(torch.equal(a, b) for a, b in zip(gradient, replayed, strict=True))
    present, _ = Replay(closure, list(model.parameters()), model).gradient()
    assert present != loss.item()


DRAWS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "numpy": np.random.rand,
    "numpy normal": np.random.randn,
    "numpy normals": lambda: np.random.randn(2),
    "numpy, far": lambda: np.random.rand(1000),
    "python": random.random,
    "python normal": lambda: random.gauss(0, 1),
    "python normals": lambda: (random.gauss(0, 1), random.gauss(0, 1)),
    "python, far": lambda: [random.random() for _ in range(1000)],
}


@pytest.fixture(params=[True, False], ids=["as in a fresh process", "after spare normals"])
def generators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's generator is watched by its words at first, and read in full once a spare normal was seen."""
    monkeypatch.setattr(replay._NUMPY, "spares", not request.param)
    monkeypatch.setattr(replay._NUMPY, "last", (None, None))


@pytest.mark.usefixtures("generators")
@pytest.mark.parametrize("between", DRAWS)
@pytest.mark.parametrize("before", DRAWS)
def test_whatever_was_drawn_is_drawn_again(before: str, between: str) -> None:
    """Reading the state is skipped where the generator has not moved; a spare normal hides in one that has not."""
    np.random.seed(3)
    random.seed(3)
    for _ in range(3):
        DRAWS[before]()
        state = RandomState()
        first = np.random.randn(3).tolist(), random.gauss(0, 1), random.random()
        state.restore()
        DRAWS[between]()
        inner = RandomState()
        DRAWS[before]()
        inner.restore()
        state.restore()
        assert (np.random.randn(3).tolist(), random.gauss(0, 1), random.random()) == first


@pytest.mark.usefixtures("generators")
def test_numpys_state_is_read_again_only_where_the_generator_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.seed(3)
    monkeypatch.setattr(replay._NUMPY, "spares", False)
    first = RandomState().numpy[1]
    assert RandomState().numpy[1] is first
    np.random.rand()
    assert RandomState().numpy[1] is not first


@pytest.mark.parametrize("kind", ["norm", "value", "by hand"])
def test_clipping_in_the_closure_does_not_change_the_gradient(kind: str) -> None:
    problem = tanh_mlp()

    def clip() -> None:
        if kind == "norm":
            torch.nn.utils.clip_grad_norm_(problem.params, 1e-6)
        elif kind == "value":
            torch.nn.utils.clip_grad_value_(problem.params, 1e-9)  # fails where every gradient is None
        else:
            for p in problem.params:
                p.grad.clamp_(-1e-9, 1e-9)

    plain = Replay.of_loss(problem.loss, problem.params).gradient()[1]

    def closure() -> Tensor:
        for p in problem.params:
            p.grad = None
        loss = problem.loss()
        loss.backward()
        clip()
        return loss

    replay = Replay(closure, problem.params)
    clipped = replay.gradient()[1]
    assert all(torch.equal(a, b) for a, b in zip(plain, clipped, strict=True))
    on_graph = torch.autograd.grad(replay.loss(), problem.params)
    for a, b in zip(plain, on_graph, strict=True):
        torch.testing.assert_close(a, b)
    assert all(p.grad is None for p in problem.params)
    assert replay.value() == pytest.approx(problem.loss().item())


def test_several_backward_passes_add_up() -> None:
    """Gradient accumulation in the closure: equal parts, with and without weights."""
    problem = tanh_mlp()
    x, y = problem.batch

    def closure() -> Tensor:
        total = torch.zeros(())
        for rows in (slice(0, 24), slice(24, 48)):
            loss = F.cross_entropy(problem.model(x[rows]), y[rows])
            loss.backward(torch.tensor(0.5))
            total += loss.detach() / 2
        return total

    replay = Replay(closure, problem.params)
    whole_loss, whole = Replay.of_loss(problem.loss, problem.params).gradient()
    loss, gradient = replay.gradient()
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for a, b in zip(whole, gradient, strict=True):
        torch.testing.assert_close(a, b)
    assert replay.loss().item() == pytest.approx(whole_loss, rel=1e-6)
    vector = random_like(problem.params, 0)
    one = HessianOperator(problem.loss, problem.params, "double_backward").matvec(vector)
    two = HessianOperator(replay, problem.params, "double_backward").matvec(vector)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_backward_of_several_outputs_at_once() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))

    def closure() -> Tensor:
        torch.autograd.backward([w[0] ** 2, w**3], [torch.tensor(2.0), torch.tensor([0.0, 1.0])])
        return w.sum()

    replay = Replay(closure, [w])
    torch.testing.assert_close(replay.gradient()[1][0], torch.tensor([4.0, 12.0]))
    torch.testing.assert_close(torch.autograd.grad(replay.loss(), [w])[0], torch.tensor([4.0, 12.0]))


def test_a_closure_without_backward_is_refused() -> None:
    problem = tanh_mlp()
    replay = Replay(problem.loss, problem.params)
    for evaluate in (replay.gradient, replay.loss):
        with pytest.raises(ValueError, match=r"did not call backward\(\)"):
            evaluate()


def test_a_loss_that_depends_on_nothing_has_a_zero_gradient() -> None:
    w = nn.Parameter(torch.ones(3))
    for loss in (lambda: torch.tensor(2.0), lambda: torch.ones(1, requires_grad=True).sum()):
        value, gradient = Replay.of_loss(loss, [w]).gradient()
        assert value in (1.0, 2.0)
        assert torch.equal(gradient[0], torch.zeros(3))


def iterator() -> Callable[[], Tensor]:
    batches = iter(torch.randn(50, 8, 5))

    def forward() -> Tensor:
        return next(batches)

    return forward


def unseeded() -> Callable[[], Tensor]:
    generator = torch.Generator()
    generator.seed()
    return lambda: torch.randn(8, 5, generator=generator)


@pytest.mark.parametrize("make", [iterator, unseeded])
def test_a_closure_that_draws_new_data_is_noticed(make: Callable[[], Callable[[], Tensor]]) -> None:
    torch.manual_seed(0)
    model, draw = nn.Linear(5, 1), make()
    replay = Replay.of_loss(lambda: model(draw()).square().mean(), list(model.parameters()))
    with pytest.raises(NotReplayable, match="draws new data or keeps state"):
        replay.verify(*replay.gradient())


def test_a_gradient_that_drifts_is_noticed_though_the_loss_does_not() -> None:
    w, calls = nn.Parameter(torch.ones(2)), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return (w * calls - (w * calls).detach()).sum()

    replay = Replay.of_loss(loss, [w])
    with pytest.raises(NotReplayable, match="keeps state"):
        replay.verify(*replay.gradient())


def test_sparse_gradients_come_dense_and_unused_ones_zero() -> None:
    problem = awkward()
    model = problem.model
    _, gradient = Replay.of_loss(problem.loss, problem.params, module=model).gradient()
    problem.loss().backward()
    for p, g in zip(problem.params, gradient, strict=True):
        assert g.layout == torch.strided and g.shape == p.shape and g.dtype == p.dtype
        expected = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        torch.testing.assert_close(g, expected)


def test_gradients_of_other_leaves_are_not_accumulated_into() -> None:
    """Parameters outside the optimizer, and inputs that require grad."""
    problem = tanh_mlp()
    x = problem.batch[0].clone().requires_grad_()
    others = [x, *problem.params[2:]]
    others[1].grad = kept = torch.ones_like(others[1])
    replay = Replay.of_loss(lambda: F.cross_entropy(problem.model(x), problem.batch[1]), problem.params[:2])
    for _ in range(2):
        replay.gradient()
    assert others[1].grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert all(other.grad is None for other in [others[0], *others[2:]])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_segments(reentrant: bool) -> None:
    """The nested backward of a reentrant checkpoint is part of the outer one; recomputing leaves no trace."""
    problem = batch_norm()
    x, y = problem.batch
    x.requires_grad_()  # reentrant checkpoints need an input that requires grad
    counter = problem.model[1].num_batches_tracked

    def loss() -> Tensor:
        return F.cross_entropy(checkpoint(problem.model, x, use_reentrant=reentrant), y)

    replay = Replay.of_loss(loss, problem.params, module=problem.model)
    plain = Replay.of_loss(problem.loss, problem.params, module=problem.model).gradient()[1]
    for a, b in zip(replay.gradient()[1], plain, strict=True):
        torch.testing.assert_close(a, b)
    operator = HessianOperator(replay, problem.params)
    operator.matvec(random_like(operator.template, 0))
    assert counter.item() == 0
    assert x.grad is None


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_that_are_views_of_ddp_buckets(one_process: None) -> None:
    """DDP writes every backward pass into the memory of the gradients that are already there."""
    problem = tanh_mlp()
    x, y = problem.batch
    model = nn.parallel.DistributedDataParallel(problem.model, gradient_as_bucket_view=True)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    for _ in range(2):  # buckets are laid out anew after the first pass
        model.zero_grad()
        loss().backward()
    grads = [p.grad for p in problem.params]
    values = [g.clone() for g in grads]
    assert any(g._is_view() for g in grads)

    replay = Replay.of_loss(loss, problem.params, module=model)
    _, gradient = replay.gradient()
    taken = [g.clone() for g in gradient]
    operator = HessianOperator(replay, problem.params, "finite_difference", gradient=gradient)
    product = operator.matvec(random_like(operator.template, 0))

    exact = HessianOperator(problem.loss, problem.params, "double_backward").matvec(random_like(operator.template, 0))
    for a, b in zip(product, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    assert all(torch.equal(a, b) for a, b in zip(gradient, taken, strict=True))
    for p, grad, value in zip(problem.params, grads, values, strict=True):
        assert p.grad is grad and torch.equal(grad, value)


def test_the_average_over_ranks_reaches_gradients_and_exact_products() -> None:
    problem = tanh_mlp()

    def halve(vector: list[Tensor]) -> None:
        torch._foreach_mul_(vector, 0.5)

    whole = Replay.of_loss(problem.loss, problem.params)
    half = Replay.of_loss(problem.loss, problem.params, reduce=halve)
    for a, b in zip(whole.gradient()[1], half.gradient()[1], strict=True):
        assert torch.equal(a / 2, b)
    vector = random_like(problem.params, 0)
    for method in ("double_backward", "forward_over_reverse", "finite_difference"):
        one = HessianOperator(whole, problem.params, method).matvec(vector)
        two = HessianOperator(half, problem.params, method).matvec(vector)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a / 2, b, rtol=1e-4, atol=1e-6)


def test_an_outer_autocast_neither_hides_the_step_nor_keeps_it() -> None:
    """Autocast keeps bfloat16 copies of the parameters: displaced ones must not be missed, nor leak out."""
    problem = tanh_mlp()
    x, y = problem.batch
    vector = random_like(problem.params, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = problem.model(x)
        replay = Replay.of_loss(lambda: F.cross_entropy(problem.model(x).float(), y), problem.params)
        gradient = replay.gradient()[1]
        problem.model(x)  # casts, and keeps, the parameters where they are
        operator = HessianOperator(replay, problem.params, "finite_difference", gradient=gradient)
        product = operator.matvec(vector)
        assert any(p.any() for p in product)
        assert torch.equal(problem.model(x), before)


def test_precision_is_that_of_the_forward_pass() -> None:
    problem = tanh_mlp()
    x, y = problem.batch

    def mixed() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(problem.model(x), y)

    plain, cast = Replay.of_loss(problem.loss, problem.params), Replay.of_loss(mixed, problem.params)
    assert plain.precision == cast.precision == torch.finfo(torch.float32).eps
    plain.gradient(), cast.gradient()
    assert plain.precision == torch.finfo(torch.float32).eps
    assert cast.precision == torch.finfo(torch.bfloat16).eps


def test_only_the_outermost_backward_is_intercepted() -> None:
    seen: list[Tensor] = []

    def handler(original: Callable[..., None], tensors: Tensor, *args: object, **kwargs: object) -> None:
        seen.append(tensors)
        torch.autograd.backward(tensors * 1, retain_graph=True)  # nested: goes through
        original(tensors, *args, **kwargs)

    w = nn.Parameter(torch.tensor(3.0))
    original = torch.autograd.backward
    with intercept_backward(handler):
        w.square().backward(retain_graph=True)
    assert len(seen) == 1
    assert w.grad.item() == 12.0
    assert torch.autograd.backward is original
