"""What is trained on, nothing of it downloaded.

Bytes come from the standard library's own source, images from scikit-learn, signals from mnist1d's generator. The order
of batches depends on their generator alone, and no global random stream is touched.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # inputs, integer targets

CORPUS_BYTES = 2_000_000
EVAL_FRACTION = 0.1


@lru_cache
def corpus() -> tuple[Tensor, Tensor]:
    """(train, eval): source text of the standard library's top-level modules, 2 MB of bytes as int64."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = b"".join(file.read_bytes() for file in sorted(stdlib.glob("*.py")))[:CORPUS_BYTES]
    if len(text) < CORPUS_BYTES // 2:
        raise RuntimeError(f"{stdlib} holds only {len(text)} bytes of source: is this a full Python?")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    cut = int(len(data) * (1 - EVAL_FRACTION))
    return data[:cut], data[cut:]


@lru_cache
def mnist1d(samples: int = 20_000) -> tuple[Batch, Batch]:
    """(train, eval): four fifths and one fifth of the signals [1, 40], ten classes. Takes about six seconds.

    The published 5000 samples are learnt by heart within 2000 steps, which would reward slow training.
    The generator seeds the global streams of numpy and random; they are put back.
    """
    from mnist1d.data import get_dataset_args, make_dataset  # late: imports matplotlib and requests

    args = get_dataset_args()
    args.num_samples = samples
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        data = make_dataset(args)
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    x, y, x_eval, y_eval = (torch.from_numpy(data[key]) for key in ("x", "y", "x_test", "y_test"))
    return (x.float()[:, None], y.long()), (x_eval.float()[:, None], y_eval.long())


@lru_cache
def digits() -> tuple[Batch, Batch]:
    """(train, eval): 1437 and 360 images [1, 8, 8] in [0, 1], ten classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(data.images).float()[order, None] / 16, torch.from_numpy(data.target)[order]
    cut = int(len(y) * 0.8)
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def place(x: Tensor, generator: torch.Generator, size: int, noise: float = 0.2) -> Tensor:
    """Images [B, 1, 8, 8] at random places in a noisy field [B, 1, size, size].

    The bare images are too few and too easy: every schedule would reach a loss of nearly zero.
    """
    batch, _, height, width = x.shape
    top, left = torch.randint(0, size - height + 1, (2, batch, 1, 1), generator=generator)
    field = noise * torch.randn(batch, 1, size, size, generator=generator)
    rows, columns = top + torch.arange(height)[:, None], left + torch.arange(width)
    field[torch.arange(batch)[:, None, None], 0, rows, columns] += x[:, 0]
    return field


def text_batches(data: Tensor, generator: torch.Generator, batch: int, context: int) -> Iterator[Batch]:
    """Windows at random places of the text, and the same windows one byte later: [B, T] each."""
    while True:
        start = torch.randint(0, len(data) - context, (batch, 1), generator=generator)
        window = data[start + torch.arange(context + 1)]
        yield window[:, :-1], window[:, 1:]


def class_batches(data: Batch, generator: torch.Generator, batch: int) -> Iterator[Batch]:
    """Epochs in a new random order each; the incomplete last batch of an epoch is dropped."""
    x, y = data
    if batch > len(y):
        raise ValueError(f"a batch of {batch} from {len(y)} examples")
    while True:
        for rows in torch.randperm(len(y), generator=generator)[: len(y) // batch * batch].split(batch):
            yield x[rows], y[rows]


def placed_batches(data: Batch, generator: torch.Generator, batch: int, size: int = 12) -> Iterator[Batch]:
    """Like `class_batches`, every image at a new place with new noise each time."""
    for x, y in class_batches(data, generator, batch):
        yield place(x, generator, size), y
