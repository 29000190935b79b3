"""Real loggers of a real run; what they have written is read back."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import batch_of, closure_for, mlp
from warmctl import AdaptiveWarmup
from warmctl.integrations import scalars

STEPS = 6
Written = dict[str, dict[int, float]]


def run(log: Callable[[AdaptiveWarmup], None]) -> Written:
    """A run that is logged at every step: what should be found, by name and step."""
    torch.manual_seed(0)
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.AdamW(model.parameters(), lr=0.1), model, every=2)
    expected: Written = {}
    for step in range(1, STEPS + 1):
        opt.step(closure_for(opt, model, batch_of(step)))
        for name, value in scalars(opt).items():
            expected.setdefault(name, {})[step] = value
        log(opt)
    assert expected["warmup/step"] == {step: step for step in range(1, STEPS + 1)}
    assert {"warmup/scale", "warmup/lr", "warmup/phase", "warmup/stability_ratio", "warmup/overhead"} <= set(expected)
    return expected


def check(found: Written, expected: Written, rel: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=rel), name


def by_name(rows: Iterable[tuple[int, dict[str, Any]]]) -> Written:
    found: Written = {}
    for step, row in rows:
        for name, value in row.items():
            if name.startswith("warmup/") and isinstance(value, (int, float)):
                found.setdefault(name, {})[step] = float(value)
    return found


def test_scalars_are_finite_floats() -> None:
    def log(opt: AdaptiveWarmup) -> None:
        assert all(type(value) is float and math.isfinite(value) for value in scalars(opt).values())
        json.dumps(scalars(opt), allow_nan=False)

    run(log)


@pytest.mark.stack("plain PyTorch", "logs")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from warmctl.integrations.tensorboard import log

    with SummaryWriter(str(tmp_path)) as writer:  # type: ignore[no-untyped-call]
        expected = run(lambda opt: log(writer, opt))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    found = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags["scalars"]}
    check(found, expected, rel=1e-6)  # it keeps float32
    assert "warmup/reason/text_summary" in tags["tensors"]


def leveldb_records(data: bytes, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """Of a log in LevelDB's format, in which W&B keeps offline runs, after its own seven bytes."""
    at, whole = header, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


@pytest.mark.stack("plain PyTorch", "logs")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    from warmctl.integrations.wandb import log

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(project="warmup", dir=str(tmp_path)) as logged:

        def both(opt: AdaptiveWarmup) -> None:
            log(logged, opt)
            logged.log({"loss": 1.0})

        expected = run(both)
    wandb.teardown()  # its writer is a process of its own, which ends only now: the file is whole
    (path,) = tmp_path.rglob("*.wandb")
    rows = []
    for data in leveldb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert len(rows) == STEPS
    check(by_name((int(row["warmup/step"]), row) for row in rows), expected)
    assert all(row["loss"] == 1.0 for row in rows) and any(row.get("warmup/reason") for row in rows)


@pytest.mark.stack("plain PyTorch", "logs")
@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file://{}/mlruns"])
def test_mlflow(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    if store.startswith("sqlite"):
        pytest.importorskip("sqlalchemy")
        pytest.importorskip("alembic")
    from warmctl.integrations.mlflow import log

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(store.format(tmp_path))
    with mlflow.start_run() as active:
        expected = run(log)
    client = mlflow.MlflowClient()
    names = client.get_run(active.info.run_id).data.metrics
    found = {n: {m.step: m.value for m in client.get_metric_history(active.info.run_id, n)} for n in names}
    check(found, expected)
    assert client.get_run(active.info.run_id).data.tags["warmup.reason"].startswith("step ")


@pytest.mark.stack("plain PyTorch", "logs")
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    import sqlite3

    from warmctl.integrations.trackio import log

    trackio.init(project="warmup", name="run")
    expected = run(log)
    trackio.finish()
    (path,) = tmp_path.rglob("warmup*.db")
    with sqlite3.connect(path) as database:
        rows = [(step, json.loads(metrics)) for step, metrics in database.execute("SELECT step, metrics FROM metrics")]
    check(by_name(rows), expected)


@pytest.mark.stack("Lightning", "logs")
def test_csv_logger_of_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(str(tmp_path))

    def log(opt: AdaptiveWarmup) -> None:
        logger.log_metrics(scalars(opt), opt.metrics["step"])

    expected = run(log)
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    check(by_name((int(r["step"]), {k: float(v) for k, v in r.items() if v}) for r in rows), expected)
