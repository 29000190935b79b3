"""Memory of a call at its peak, in a process of its own."""

from __future__ import annotations

import gc
import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.data import Batch
from benchmarks.tracks_sharpness.libraries import Setting, call
from benchmarks.tracks_sharpness.nets import loss_of


def peak_memory(name: str, net: nn.Module, batch: Batch, setting: Setting) -> float:
    """MiB that a call adds at its peak to what a process holds after a gradient; nan where the system cannot say."""
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    prompt = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is freed is given back
    with mock.patch.dict(os.environ, prompt), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, name, net, batch, setting, torch.get_num_threads()).result()


def _peak(name: str, net: nn.Module, batch: Batch, setting: Setting, threads: int) -> float:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tiny = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    if name != "gradient":  # imports and caches of the library
        call(name, tiny, (torch.randn(8, 4), torch.randint(3, (8,))), 0, setting)
    for _ in range(2):
        with sdpa_kernel(SDPBackend.MATH):
            torch.autograd.grad(loss_of(net, batch), list(net.parameters()))
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    if name == "gradient":
        with sdpa_kernel(SDPBackend.MATH):
            torch.autograd.grad(loss_of(net, batch), list(net.parameters()))
    else:
        call(name, net, batch, 0, setting)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])
