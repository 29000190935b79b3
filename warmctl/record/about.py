"""What a run was made with: configuration and environment, beside its record as `RUN.about.json`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

About: TypeAlias = "dict[str, dict[str, str]]"

PACKAGES = ("warmctl", "torch", "numpy", "scipy", "transformers", "accelerate", "lightning", "trl", "peft")
LARGEST = 1 << 20
"""Bytes of a file that is read."""


def configuration(optimizer: Any, model: Any, **options: Any) -> About:
    """Optimizer, model and these options of the wrapper in words. Costs nothing: no value of a parameter is read."""
    params = list(model.parameters())
    about = {
        "model": {
            "class": type(model).__name__,
            "parameters": str(sum(p.numel() for p in params)),
            "on": ", ".join(sorted({f"{p.device.type} {p.dtype}" for p in params})),
        },
        "optimizer": {"class": type(optimizer).__name__},
        "AdaptiveWarmup": {name: str(value) for name, value in options.items()},
    }
    several = len(optimizer.param_groups) > 1
    for index, group in enumerate(optimizer.param_groups):
        settings = {name: value for name, value in group.items() if name != "params" and value is not None}
        about["optimizer"] |= {f"{name}, group {index}" if several else name: str(v) for name, v in settings.items()}
    return about


def environment() -> dict[str, str]:
    """Of this process: Python, the machine, versions of packages."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "processors": str(os.cpu_count())}
    found["ranks"] = os.environ.get("WORLD_SIZE", "1")
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def beside(record: Path) -> Path:
    """The file that belongs to a record."""
    return record.with_suffix(".about.json")


def write_about(record: Path, about: Mapping[str, Mapping[str, str]]) -> None:
    text = json.dumps({**about, "environment": environment()}, indent=1)
    beside(record).write_text(text + "\n")


def read_about(record: Path) -> About:
    """What is known of a record's run; empty if there is no such file, or it holds something else."""
    path = beside(record)
    try:
        if path.stat().st_size > LARGEST:
            return {}
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    parts = found.items() if isinstance(found, dict) else ()
    return {
        part: {name: str(value) for name, value in values.items() if not isinstance(value, (dict, list))}
        for part, values in parts
        if isinstance(values, dict)
    }
