"""The report: one page that loads nothing, read in a real browser; whatever a record holds is text there."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.record.helpers import row
from warmctl.record.about import read_about
from warmctl.record.history import History
from warmctl.record.look import Look, look
from warmctl.record.page import Reported, page
from warmctl.record.parsing import as_json
from warmctl.record.plotting import plot

pytest.importorskip("plotly")
from plotly.offline import get_plotlyjs

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\x1b[2J\u202e<b>bold</b>&amp;\udc80"
LONGEST = 5_000_000


def rows(count: int = 60, **values: Any) -> list[dict[str, Any]]:
    made = [row(step, sharpness=2.5, stability_ratio=0.5, reason="", **values) for step in range(1, count + 1)]
    made[29]["reason"] = "cut from scale 1 to 0.5: the ratio was <1.7>"
    return made


def seen(made: list[dict[str, Any]]) -> Look:
    return Look(History(made), len(made), 0.0)


def figure_of(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="figure">(.*?)</script>', text, re.DOTALL)
    return dict(json.loads(found))


def test_curves_marks_and_verdict_are_there() -> None:
    about = {"optimizer": {"class": "AdamW", "lr": "0.03"}}
    text = page([Reported("run", seen(rows()), about, ["well warmed", "evidence"])], "")
    figure = figure_of(text)
    assert "After 60 steps" not in text and "<p>well warmed</p><p>evidence</p>" in text
    assert "<td>class</td><td>AdamW</td>" in text
    hovers = [trace["hovertemplate"] for trace in figure["data"]]
    assert [trace["text"] for trace in figure["data"] if "text" in trace] == [
        ["cut from scale 1 to 0.5: the ratio was &lt;1.7&gt;"]
    ]
    assert sum("probe at step" in hover for hover in hovers) == 1
    titles = [axis["title"]["text"] for name, axis in figure["layout"].items() if name.startswith("yaxis")]
    assert titles == ["loss", "stability ratio", "learning rate", "end slope"]


def test_columns_beside_the_wrappers_own_have_panels_and_runs_share_axes() -> None:
    made = rows()
    for found in made:
        found |= {"depth": 0.1, "vitals/1/dead": 0.1, "vitals/2/dead": 0.2, "note": "words"}
    text = page([Reported("a", seen(made)), Reported("b", seen(rows(30)))], "")
    figure = figure_of(text)
    layout = figure["layout"]
    titles = {axis["title"]["text"]: name for name, axis in layout.items() if name.startswith("yaxis")}
    assert "depth" in titles and "note" not in titles and layout["showlegend"]
    layers = [t for t in figure["data"] if t["yaxis"] == titles["dead units"].replace("axis", "")]
    assert [set(t["y"]) for t in layers] == [{0.1}, {0.2}] and "vitals/1/dead" in layers[0]["hovertemplate"]


def test_whatever_the_record_holds_is_text() -> None:
    made = rows()
    made[29] |= {"reason": HOSTILE, HOSTILE: 1.0}
    about = {HOSTILE: {HOSTILE: HOSTILE}}
    text = page([Reported(HOSTILE, seen(made), about, [HOSTILE])], "")
    assert not re.search(r"<(img|b)\b(?!ody)", text.replace("<b>&lt;", "")) and text.count("</script>") == 3
    assert all(line.isprintable() for line in text.splitlines())
    text.encode()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e308, -1e308, 5e-324, 10**300, None])
@pytest.mark.parametrize(
    "column", ["loss", "lr", "scheduled_lr", "stability_ratio", "target", "end_slope", "sharpness"]
)
def test_any_number_is_drawn(column: str, value: float | None) -> None:
    made = rows(40)
    for found in made[::2]:
        found[column] = value
    figure_of(page([Reported("run", seen(made))], ""))
    figure_of(page([Reported("run", seen([found | {column: value} for found in made]))], ""))


def test_a_long_record_makes_a_small_page(tmp_path: Path) -> None:
    """Rows with a reason are kept all: half of them here, ten times as long as any."""
    made = [
        as_json(row(i, loss=1.0 / i, reason=f"{'why ' * 100}{i}" if i % 2 else "", end_slope=i / 7))
        for i in range(1, 40_001)
    ]
    (tmp_path / "run.jsonl").write_bytes(b"".join(made))
    found = Reported("run", look(tmp_path / "run.jsonl", kept=2_000))
    assert len(page([found], get_plotlyjs()).encode()) < LONGEST


def test_configuration_and_environment_lie_beside_the_record(tmp_path: Path) -> None:
    History(rows(), about={"optimizer": {"lr": "0.1"}}).to_jsonl(tmp_path / "run.jsonl")
    found = read_about(tmp_path / "run.jsonl")
    assert found["optimizer"] == {"lr": "0.1"} and {"python", "torch", "platform"} <= found["environment"].keys()
    for broken in ("nonsense", "[" * 100_000, "[1]", '{"a": 1}', "\udc80"):
        (tmp_path / "run.about.json").write_text(broken, errors="surrogateescape")
        assert read_about(tmp_path / "run.jsonl") == {}
    assert read_about(tmp_path / "none.jsonl") == {}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """The marks are hovered over and their tooltips read; nothing is asked for, nothing of the record is executed."""
    made = rows()
    made[29]["reason"] = "cut from scale 1 to 0.5: " + HOSTILE
    path = tmp_path / "run.html"
    path.write_text(page([Reported(HOSTILE, seen(made))], get_plotlyjs()), encoding="utf-8")
    tab = browser.new_page(viewport={"width": 1100, "height": 1200})
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    for event in ("console", "pageerror", "dialog"):
        tab.on(event, lambda message: said.append(str(message)))
    tab.goto(path.as_uri())
    tab.wait_for_selector("body[data-drawn]", timeout=60_000)

    def tooltip(symbol: str) -> str:
        tab.mouse.move(5, 5)
        box = tab.locator(symbol).bounding_box()
        tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
        tab.wait_for_selector(".hoverlayer .hovertext", timeout=30_000)
        return str(tab.locator(".hoverlayer .hovertext").first.text_content())

    # loss of each step and smoothed, reasons, ratio, probes, applied and scheduled rate, end slope
    assert tab.locator(".scatterlayer .trace").count() == 8
    words = tooltip(".subplot.xy .scatterlayer .trace:has(.points path) .points path")
    assert "step 30: cut from scale 1 to 0.5: <img src=x onerror=alert(1)>" in words.replace("\xa0", " ")
    words = tooltip(".subplot.xy2 .scatterlayer .trace .points path >> nth=3")
    assert "probe at step 8" in words and "stability ratio 0.5" in words and "sharpness 2.5" in words
    assert asked == [path.as_uri()] and said == []


def test_a_thinned_record_with_a_loss_that_is_missing_is_drawn(tmp_path: Path) -> None:
    losses = np.exp(-np.arange(6_000) / 2e3)
    losses[4_000] = math.nan
    whole = History({"step": step, "loss": loss, "scale": 1.0} for step, loss in enumerate(losses.tolist(), start=1))
    whole.to_jsonl(tmp_path / "run.jsonl")
    found = look(tmp_path / "run.jsonl", kept=1_000)
    assert "loss_mean" in found.history.columns
    assert "run" in page([Reported("run", found)], get_plotlyjs())
    plot({"run": found.history}, path=tmp_path / "run.png")
