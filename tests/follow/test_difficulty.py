"""Difficulty by its formula, alignment by numpy, and the sampler that sorts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD
from torch.utils.data import DataLoader

from tests.follow.helpers import AFTER, WARMUP, drive, parameter
from warmctl import Difficulty, EasyFirst

STEPS = [*WARMUP, *AFTER]


class WithMethod:
    def set_difficulty(self, difficulty: float) -> None:
        self.now = difficulty


class WithAttribute:
    difficulty = 1.0

    @property
    def now(self) -> float:
        return self.difficulty


class Function(WithMethod):
    __call__ = WithMethod.set_difficulty
    set_difficulty = None  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [WithMethod, WithAttribute, Function])
def test_the_difficulty_is_the_formula_in_warmup_and_one_after_it(kind: Any) -> None:
    sampler = kind()
    seen = drive(SGD([parameter()], lr=0.1), Difficulty(sampler, easiest=0.2), STEPS, look=lambda: sampler.now)
    expected = [0.2 + 0.8 * scale if phase == "warmup" else 1.0 for scale, phase in STEPS]
    assert seen == pytest.approx(expected, rel=1e-15)


def test_alignment_is_the_correlation_of_rate_and_difficulty() -> None:
    generator = np.random.default_rng(0)
    follower = Difficulty(lambda _: None)
    told = []
    for _ in range(200):
        scale, phase = generator.random(), "warmup" if generator.random() < 0.7 else "guard"
        rate = 1e-4 * scale * (1 + generator.random())
        follower.follow(scale, rate, phase)
        told.append((rate, follower.difficulty))
    rates, difficulties = zip(*told, strict=True)
    assert follower.alignment == pytest.approx(np.corrcoef(rates, difficulties)[0, 1], rel=1e-10)
    assert follower.readings()["alignment"] == follower.alignment


def test_nothing_is_aligned_with_a_constant() -> None:
    follower = Difficulty(lambda _: None)
    assert math.isnan(follower.alignment)
    for _ in range(3):
        follower.follow(0.5, 1.0, "warmup")
    assert math.isnan(follower.alignment)


def test_the_sampler_draws_the_easiest_and_all_of_them_alike() -> None:
    sampler = EasyFirst(torch.arange(100.0, 0.0, -1.0), seed=3)  # the last is the easiest
    sampler.difficulty = 0.25
    drawn = Counter(sampler)
    assert set(drawn) == set(range(75, 100)) and set(drawn.values()) == {4} and len(sampler) == 100
    sampler.difficulty = 0.0
    assert set(sampler) == {99}


def test_at_full_difficulty_an_epoch_is_a_permutation_and_each_epoch_another() -> None:
    sampler = EasyFirst(range(50))
    epochs = [list(sampler) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] == list(EasyFirst(range(50))) != list(EasyFirst(range(50), seed=9))


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("batches", [1, 7, 10, 13, 30])
def test_a_loader_goes_on_where_it_was_saved(batches: int, size: int) -> None:
    """In the middle of an epoch, at its end, in the next; the difficulty moving all the time."""

    def stream(sampler: EasyFirst, step: int) -> Any:
        loader = DataLoader(list(range(50)), batch_size=size, sampler=sampler)  # type: ignore[arg-type]
        while True:
            epoch = iter(loader)
            while True:
                sampler.difficulty = min(1.0, step / 25)
                if (batch := next(epoch, None)) is None:
                    break
                yield batch.tolist()
                step += 1

    unbroken, fresh = EasyFirst(range(50)), EasyFirst(range(50))
    running = stream(unbroken, 0)
    list(itertools.islice(running, batches))
    fresh.load_state_dict(unbroken.state_dict())
    assert list(itertools.islice(stream(fresh, batches), 30)) == list(itertools.islice(running, 30))


def test_an_epoch_that_was_saved_at_its_end_is_not_followed_by_an_empty_one() -> None:
    sampler = EasyFirst(range(50))
    sampler.load_state_dict({"epoch": 0, "drawn": 50})
    assert sorted(sampler) == list(range(50))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="list has neither"):
        Difficulty([1, 2])
    for easiest in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="easiest must be in"):
            Difficulty(print, easiest=easiest)
    for scores in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="scores must be finite"):
            EasyFirst(scores)
    with pytest.raises(ValueError, match="drawn 70 of an epoch, the data have 50"):
        EasyFirst(range(50)).load_state_dict({"epoch": 0, "drawn": 70})
