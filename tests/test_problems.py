"""The shared training problems: same seed, same run; nothing global touched; one step goes downhill."""

import math
import random

import numpy as np
import pytest
import torch

from benchmarks.problems import PROBLEMS, Batch, Problem, corpus, digits, half_decades, mnist1d

every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def batches(problem: Problem, seed: int, count: int = 3) -> list[Batch]:
    stream = problem.batches(seed)
    return [next(stream) for _ in range(count)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(
        torch.equal(s, t) for left, right in zip(a, b, strict=True) for s, t in zip(left, right, strict=True)
    )


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters())


@every_problem
def test_weights_and_batches_depend_on_the_seed_alone(problem: Problem) -> None:
    first, data = weights(problem.build(3)), batches(problem, 3)
    torch.rand(5)
    assert torch.equal(first, weights(problem.build(3)))
    assert same(data, batches(problem, 3))
    assert not torch.equal(first, weights(problem.build(4)))
    assert not same(data, batches(problem, 4))


@every_problem
def test_global_random_streams_are_left_alone(problem: Problem) -> None:
    for loader in (corpus, digits, mnist1d):
        loader()
    torch_state, numpy_state, python_state = (
        torch.get_rng_state(),
        np.random.get_state()[1],
        random.getstate(),
    )
    model = problem.build(0)
    batches(problem, 0)
    problem.evaluate(model)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    assert python_state == random.getstate()


@every_problem
def test_one_step_at_the_tuned_rate_s_tenth_goes_downhill(problem: Problem) -> None:
    model, (batch,) = problem.build(0), batches(problem, 0, 1)
    optimizer = problem.optimizer(model.parameters(), problem.tuned_lr / 10)
    before = problem.loss(model, batch)
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    after = problem.loss(model, batch)
    assert after.item() < before.item()


@every_problem
def test_evaluation_is_finite_repeatable_and_leaves_no_trace(problem: Problem) -> None:
    model = problem.build(0).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loss = problem.evaluate(model)
    assert math.isfinite(loss) and loss == problem.evaluate(model)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@every_problem
def test_chance_is_the_loss_of_the_best_constant(problem: Problem) -> None:
    targets = torch.cat([y.flatten() for _, y in problem.eval_batches()])
    frequencies = targets.bincount(minlength=256).double() / len(targets)
    constant = torch.nn.functional.cross_entropy(frequencies.log().expand(len(targets), 256), targets)
    assert problem.chance() == pytest.approx(constant.item())


@every_problem
def test_held_out_data_is_not_trained_on(problem: Problem) -> None:
    (x, *_), (held_out, *_) = problem.data()
    if x.ndim > 1:
        seen = {row.numpy().tobytes() for row in x}
        assert not any(row.numpy().tobytes() in seen for row in held_out)
    else:
        assert len(held_out) == pytest.approx(len(x) / 9, rel=0.01)


@every_problem
def test_rates_span_three_decades_round_the_tuned_one(problem: Problem) -> None:
    assert problem.lrs[-1] / problem.lrs[0] == pytest.approx(1000)
    assert problem.tuned_lr in problem.lrs
    assert problem.lrs[0] < problem.tuned_lr < problem.demo_lr <= problem.lrs[-1]


def test_half_decades() -> None:
    assert half_decades(3e-3, 4) == (3e-3, 1e-2, 3e-2, 1e-1)


def test_half_of_the_problems_are_kept_for_the_test() -> None:
    splits = [problem.split for problem in PROBLEMS.values()]
    assert splits.count("development") == splits.count("test") == len(splits) / 2


def test_signals_are_made_without_touching_the_global_streams() -> None:
    mnist1d.cache_clear()
    numpy_state, python_state = np.random.get_state()[1], random.getstate()
    mnist1d()
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    assert python_state == random.getstate()
