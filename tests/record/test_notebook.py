"""A history shows itself."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from tests.record.helpers import history, row
from warmctl.record.history import History


def test_curves_last_row_and_reasons() -> None:
    page = ElementTree.fromstring(f"<page>{history(last=9)._repr_html_()}</page>".replace("<br>", "<br/>"))
    assert page.findtext("p") == "History, 9 rows, steps 1 to 9"
    assert len(page.findall(".//polyline")) == 3
    assert page.findtext(".//li") == "5: warmup ended: full rate, as scheduled"
    heads, values = ([cell.text for cell in page.findall(f".//{kind}")] for kind in ("th", "td"))
    assert dict(zip(heads, values, strict=True))["phase"] == "guard"


def test_no_rows_and_hostile_rows() -> None:
    assert History()._repr_html_() == "<p>History, no rows</p>"
    text = History([row(1, reason="<script>\x1b</script>", phase="<b>")])._repr_html_()
    assert "<script" not in text and "<b>" not in text and r"&lt;script&gt;\x1b" in text


@pytest.mark.parametrize("value", [None, math.nan, math.inf, 1e308, -1e308, 5e-324])
def test_any_number(value: float | None) -> None:
    made = [row(step, loss=value if step % 2 else 1.0, lr=value) for step in range(1, 5)]
    assert "nan" not in History(made)._repr_html_().split("<table>")[0].split("points=")[-1]
