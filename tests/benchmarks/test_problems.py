"""The shared training problems: same seed, same run; nothing global touched; one step goes downhill."""

import math
import random
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness.data import Batch, corpus, digits, mnist1d
from benchmarks.harness.problems import PROBLEMS, Problem, half_decades

few_signals = partial(mnist1d, 5000)  # a second's work in place of six
problems = [replace(p, data=few_signals) if p.data is mnist1d else p for p in PROBLEMS.values()]
every_problem = pytest.mark.parametrize("problem", problems, ids=lambda problem: problem.name)


def batches(problem: Problem, seed: int, count: int = 3) -> list[Batch]:
    stream = problem.batches(seed)
    return [next(stream) for _ in range(count)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(torch.equal(s, t) for left, right in zip(a, b, strict=True) for s, t in zip(left, right, strict=True))


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
def test_one_step_at_a_tenth_of_the_tuned_rate_goes_downhill(problem: Problem) -> None:
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
    problem.data()
    streams = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    model = problem.build(0).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loss = problem.evaluate(model)
    assert math.isfinite(loss) and loss == problem.evaluate(model)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(streams[0], torch.get_rng_state())
    assert streams[1:] == (np.random.get_state()[1].tolist(), random.getstate())


@every_problem
def test_chance_is_the_loss_of_the_best_constant(problem: Problem) -> None:
    targets = torch.cat([y.flatten() for _, y in problem.eval_batches()])
    frequencies = targets.bincount(minlength=256).double() / len(targets)
    constant = torch.nn.functional.cross_entropy(frequencies.log().expand(len(targets), 256), targets)
    assert problem.chance() == pytest.approx(constant.item())


@pytest.mark.parametrize("load", [digits, few_signals], ids=["digits", "mnist1d"])
def test_held_out_examples_are_not_trained_on(load: Callable[[], tuple[Batch, Batch]]) -> None:
    (x, y), (x_eval, y_eval) = load()
    assert len(x) == len(y) and len(x_eval) == len(y_eval)
    assert len(x_eval) / (len(x) + len(x_eval)) == pytest.approx(0.2, abs=0.01)
    seen = {row.numpy().tobytes() for row in x}
    assert not any(row.numpy().tobytes() in seen for row in x_eval)


def test_corpus_is_the_text_of_the_standard_library() -> None:
    train, held_out = corpus()
    assert len(held_out) / (len(train) + len(held_out)) == pytest.approx(0.1, abs=0.001)
    text = bytes(train.tolist()).decode(errors="replace")
    assert text.startswith(Path(sysconfig.get_path("stdlib"), "__future__.py").read_text()[:1000])


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
    numpy_state, python_state = np.random.get_state()[1].tolist(), random.getstate()
    mnist1d(100)
    assert numpy_state == np.random.get_state()[1].tolist()
    assert python_state == random.getstate()


def test_a_batch_larger_than_the_data_is_refused() -> None:
    too_large = replace(PROBLEMS["digits"], batch=100_000)
    with pytest.raises(ValueError, match="a batch of 100000"):
        next(too_large.batches(0))
