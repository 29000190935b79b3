"""The Python in README and pages is run as it stands, top to bottom, in the names that are prepared here."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from warmctl import AdaptiveWarmup, EigenResult

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)")
STEPS = 24
Names = dict[str, Any]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[int, str]]:
    """Each block with the line that it begins at."""
    text = page.read_text()
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]


WITH_CODE = [page for page in PAGES if blocks(page)]


# What a reader's script is taken to have defined -----------------------------------------------------------


class Lossy(nn.Module):
    """Returns its own loss, as nanoGPT's model does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return logits, nn.functional.cross_entropy(logits, y)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loader() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 16, 6, generator=generator)
    return list(zip(x, x[:, :, :3].argmax(-1), strict=True))


def script() -> Names:
    torch.manual_seed(0)
    data = loader()
    return {
        "model": mlp(),
        "lossy": Lossy(),
        "criterion": nn.CrossEntropyLoss(),
        "loader": data,
        "batch": data[0],
        "steps": STEPS,
        "rows": (rows := []),
        "log": rows.append,
    }


def halves() -> Names:
    data = loader()
    return {"new_model": mlp, "first_half": data[: STEPS // 2], "second_half": data[STEPS // 2 :]}


def hugging_face() -> Names:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    text = torch.tensor(list(Path(__file__).read_bytes()[: 128 * 16])) % 64
    data = [{"input_ids": row, "labels": row} for row in text.view(-1, 16)]
    return {"model": transformers.GPT2LMHeadModel(config), "data": data}


def lightning() -> Names:
    pytest.importorskip("lightning")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return {"quiet": {**quiet, "enable_checkpointing": False}, "loader": data_loader()}


def accelerate() -> Names:
    pytest.importorskip("accelerate")
    return {"loader": data_loader()}


def data_loader() -> torch.utils.data.DataLoader[Any]:
    x, y = map(torch.cat, zip(*loader(), strict=True))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)


def recorded() -> Names:
    """A run that somebody has recorded: run.jsonl in the present folder."""
    names = script()
    opt = AdaptiveWarmup(torch.optim.SGD(names["model"].parameters(), lr=30.0), names["model"])
    opt.history.to_jsonl("run.jsonl")
    for x, y in names["loader"]:
        opt.zero_grad()
        opt.backward(names["criterion"](names["model"](x), y))
        opt.step()
    return {}


def logged() -> Names:
    """Beside that a log of no wrapper: metrics.csv."""
    lines = [f"{step},{2.3 - 0.02 * step},{0.01 * min(step, 5)}" for step in range(1, STEPS + 1)]
    Path("metrics.csv").write_text("\n".join(["step,train_loss,learning_rate", *lines]) + "\n")
    return recorded()


PREPARED: dict[str, Callable[[], Names]] = {
    "docs/after.md": logged,
    "docs/how-to/accelerate.md": accelerate,
    "docs/how-to/accumulation.md": lambda: {"groups_of_four": [loader()[i : i + 4] for i in range(0, STEPS, 4)]},
    "docs/how-to/distributed.md": lambda: {"sharded": mlp()},
    "docs/how-to/failed-run.md": recorded,
    "docs/how-to/fine-tuning.md": halves,
    "docs/how-to/hugging-face.md": hugging_face,
    "docs/how-to/lightning.md": lightning,
    "docs/how-to/resume.md": halves,
}


@pytest.fixture(autouse=True)
def _one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, and as torchrun would start a single rank."""
    monkeypatch.chdir(tmp_path)
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in {**ranks, "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    if "accelerate" in os.sys.modules:  # type: ignore[attr-defined]
        from accelerate.state import AcceleratorState, GradientState  # type: ignore[import-untyped]

        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def run(page: Path) -> list[tuple[int, Names]]:
    """The names after each block, with the block's line. A probe that fails is an error."""
    names = script()
    names.update(PREPARED.get(page_name(page), dict)())
    seen = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="warmctl")
        for line, block in blocks(page):
            code = compile("\n" * line + block, str(page), "exec")
            exec(code, names)
            seen.append((line, dict(names)))
    return seen


def the_loop_trains(seen: list[tuple[int, Names]]) -> None:
    names = seen[0][1]
    assert [row["step"] for row in names["rows"]] == list(range(1, STEPS + 1))
    assert names["rows"][0]["probes"] == 1 and names["rows"][0]["phase"] == "warmup"
    fresh = script()
    x, y = map(torch.cat, zip(*fresh["loader"], strict=True))
    with torch.no_grad():
        before, after = (names["criterion"](model(x), y) for model in (fresh["model"], names["model"]))
    assert after < before


def the_first_figure_shows_what_the_page_says(seen: list[tuple[int, Names]]) -> None:
    assert Path("run.png").read_bytes().startswith(b"\x89PNG")
    bare, adaptive = (list(seen[-1][1][name].history) for name in ("bare", "adaptive"))
    chance = math.log(10)
    assert bare[-1]["loss"] > 0.95 * chance and adaptive[-1]["loss"] < 0.5 * chance
    assert adaptive[-1]["phase"] != "warmup"


BESIDES = {"README.md": the_loop_trains, "docs/start.md": the_first_figure_shows_what_the_page_says}
"""What must be true after a page's code, beside what `test_the_code_…` asks of all."""


def inside(value: Any) -> list[AdaptiveWarmup]:
    """The wrapper that a name is, or holds: a prepared optimizer, a trainer."""
    held = getattr(value, "optimizers", [])
    several = [value, getattr(value, "optimizer", None), *(held if isinstance(held, list) else [])]
    return [opt for opt in several if isinstance(opt, AdaptiveWarmup)]


@pytest.mark.stack("plain PyTorch", "one line changed")
@pytest.mark.stack("HF Trainer", "one line changed")
@pytest.mark.stack("Lightning", "one line changed")
@pytest.mark.stack("Accelerate", "one line changed")
@pytest.mark.parametrize("page", WITH_CODE, ids=page_name)
def test_the_code_of_a_page_runs_and_what_it_wraps_is_measured(page: Path) -> None:
    wrapped: dict[int, AdaptiveWarmup] = {}
    seen = run(page)
    for _, names in seen:
        wrapped |= {id(opt): opt for value in names.values() for opt in inside(value)}
        if (result := names.get("result")) is not None:
            assert isinstance(result, EigenResult) and result.converged and result.eigenvalue > 0.0
    assert bool(wrapped) == ("AdaptiveWarmup(" in page.read_text())
    for opt in wrapped.values():
        metrics = opt.metrics
        assert metrics["probes"] >= 1 and math.isfinite(metrics["stability_ratio"]), metrics
        assert not [row["reason"] for row in opt.history if "failed" in row["reason"]]
    if besides := BESIDES.get(page_name(page)):
        besides(seen)


def test_every_page_with_code_is_prepared_under_its_own_name() -> None:
    assert PREPARED.keys() | BESIDES.keys() <= set(map(page_name, WITH_CODE))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    """Those of the pages are held by the strict build of the site."""
    targets = LINK.findall(page.read_text())
    assert targets and not [target for target in targets if not (page.parent / target).exists()]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
