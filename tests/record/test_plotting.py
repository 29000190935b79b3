"""The figure, looked at through matplotlib's own objects, and saved without a display."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import same_color  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.legend import Legend  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

from warmctl.record.curves import thin  # noqa: E402
from warmctl.record.history import History  # noqa: E402
from warmctl.record.plotting import plot  # noqa: E402
from warmctl.record.style import COLOURS  # noqa: E402

REASON = "the landscape carries no more"


def run(last: int = 60, end: int | None = 25, target: float | None = 0.5, **values: Any) -> History:
    """A controlled run: scale and ratio rise during warmup, the schedule decays, a probe every fifth step."""
    record = History()
    for step in range(1, last + 1):
        warm = end is None or step < end
        scale = min(1.0, step / (end or last))
        scheduled = 0.1 * 0.5 * (1 + math.cos(math.pi * step / last))
        row = {
            "step": step,
            "phase": "warmup" if warm else "guard",
            "scale": scale,
            "lr": scale * scheduled,
            "scheduled_lr": scheduled,
            "loss": 1 + math.exp(-step / 30),
            "stability_ratio": None if step < 3 else 0.4 * scale,
            "target": target,
            "probed": step % 5 == 0,
            "reason": f"warmup ended: {REASON}" if step == end else "",
        }
        record.append({**row, **values})
    return record


def baseline(losses: list[float] | None = None) -> list[dict[str, Any]]:
    losses = losses or [2 - 0.02 * step for step in range(40)]
    return [{"step": i, "loss": loss, "lr": 0.1 * min(1, i / 10)} for i, loss in enumerate(losses, start=1)]


def lines(figure: Figure, panel: int, kind: str) -> list[Line2D]:
    return [line for line in figure.axes[panel].lines if line.get_gid() == kind]


def only(figure: Figure, panel: int, kind: str) -> Line2D:
    (line,) = lines(figure, panel, kind)
    return line


def x(line: Line2D) -> Any:
    return np.asarray(line.get_xdata(), dtype=float)


def y(line: Line2D) -> Any:
    return np.asarray(line.get_ydata(), dtype=float)


def words(figure: Figure, panel: int) -> list[str]:
    axis = figure.axes[panel]
    legends = [artist for artist in axis.get_children() if isinstance(artist, Legend)]
    return [text.get_text() for text in (*axis.texts, *(text for legend in legends for text in legend.get_texts()))]


# One run


def test_three_panels_over_shared_steps() -> None:
    figure = plot(type("Wrapper", (), {"history": run()}))  # type: ignore[arg-type]
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "stability ratio", "learning rate"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "step"]
    assert len({axis.get_xlim() for axis in figure.axes}) == 1
    assert [axis.get_yscale() for axis in figure.axes[1:]] == ["log", "log"]


def test_stability_panel_shows_edge_target_and_probes() -> None:
    record = run(target=0.4)
    figure = plot(record)
    assert set(y(only(figure, 1, "edge"))) == {1.0}
    assert set(y(only(figure, 1, "target"))) == {0.4}
    assert {"edge", "target 0.4", "probe"} <= set(words(figure, 1))
    low, top = figure.axes[1].get_ylim()
    assert low < 0.4 < 1 < top
    probes = only(figure, 1, "probes")
    assert list(x(probes)) == [row["step"] for row in record if row["probed"]]
    assert list(y(probes)) == [row["stability_ratio"] for row in record if row["probed"]]
    ratio = y(only(figure, 1, "ratio"))
    assert np.isnan(ratio[:2]).all()
    assert list(ratio[2:]) == record["stability_ratio"][2:]


def test_rate_panel_shows_applied_and_scheduled() -> None:
    record = run()
    figure = plot(record)
    assert list(y(only(figure, 2, "applied"))) == record["lr"]
    assert list(y(only(figure, 2, "scheduled"))) == record["scheduled_lr"]
    assert only(figure, 2, "applied").get_linestyle() == "-"
    assert only(figure, 2, "scheduled").get_linestyle() == "--"
    assert {"applied", "scheduled"} <= set(words(figure, 2))


@pytest.mark.parametrize(("end", "xscale"), [(3, "linear"), (25, "log"), (55, "linear"), (55, "log")])
def test_the_end_of_warmup_is_a_line_with_step_and_reason(end: int, xscale: Any) -> None:
    figure = plot(run(end=end), xscale=xscale)
    for panel in range(3):
        assert set(x(only(figure, panel, "end"))) == {end}
    (note,) = figure.axes[0].texts
    assert note.get_text().replace("\n", " ") == f"warmup ended at step {end}: {REASON}"
    figure.draw_without_rendering()
    box = note.get_window_extent()
    assert box.x0 > 0
    assert box.x1 < figure.bbox.x1
    assert box.y0 >= figure.axes[0].get_window_extent().y1  # over the panel, not over the curves


def test_a_run_still_in_warmup_has_no_such_line() -> None:
    figure = plot(run(end=None))
    assert [lines(figure, panel, "end") for panel in range(3)] == [[], [], []]
    assert words(figure, 0) == []


def test_a_long_reason_stays_on_the_figure() -> None:
    record = run(end=30)
    record.append({**record[-1], "step": 61})
    long = History({**row, "reason": "many words " * 40 if row["step"] == 30 else ""} for row in record)
    figure = plot(long)
    figure.draw_without_rendering()
    box = figure.axes[0].texts[0].get_window_extent()
    assert box.x0 > 0
    assert box.x1 < figure.bbox.x1


# Loss


def test_short_runs_are_drawn_as_they_are_and_long_ones_smoothed_over_the_raw() -> None:
    short = plot(run(last=60))
    assert list(y(only(short, 0, "loss"))) == run(last=60)["loss"]
    assert lines(short, 0, "raw") == []

    noise = np.random.default_rng(0).normal(size=2000)
    losses = np.linspace(5, 3, 2000) + 0.3 * noise
    figure = plot(baseline(list(losses)))
    assert np.array_equal(y(only(figure, 0, "raw")), losses)
    smooth = y(only(figure, 0, "loss"))
    error = smooth - np.linspace(5, 3, 2000)
    assert error[50:].std() < 0.1
    assert np.diff(smooth[50:]).std() < 0.2 * np.diff(losses).std()


def test_smoothing_does_not_hide_a_steep_start() -> None:
    losses = [3 + 8 * math.exp(-step / 30) for step in range(3000)]
    smooth = y(only(plot(baseline(losses)), 0, "loss"))
    assert smooth[0] == pytest.approx(losses[0])
    assert smooth[20] == pytest.approx(losses[20], rel=0.05)


def test_a_wide_range_of_losses_is_logarithmic() -> None:
    assert plot(baseline([2 * 0.9**step for step in range(60)])).axes[0].get_yscale() == "log"
    assert plot(baseline([2 - 3 * step / 60 for step in range(60)])).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("after", [[math.nan] * 3, [math.inf] * 3, [1e3, 1e9, math.nan], [1e3, 1e9, 1e12]])
def test_a_diverged_run_ends_in_a_cross_and_does_not_squeeze_the_others(after: list[float]) -> None:
    good, bad = baseline(), baseline([2.0, 1.9, 1.8, *after])
    figure = plot({"good": good, "bad": bad})
    cross = only(figure, 0, "diverged")
    assert 3 <= x(cross)[0] <= 4
    assert same_color(cross.get_color(), COLOURS[1])
    low, top = figure.axes[0].get_ylim()
    assert low < min(row["loss"] for row in good)
    assert max(row["loss"] for row in good) < top < 4
    figure.draw_without_rendering()


def test_a_spike_that_heals_is_no_divergence() -> None:
    figure = plot(baseline([2.0, 1.9, 50.0, math.nan, 1.7, 1.6]))
    assert lines(figure, 0, "diverged") == []
    assert figure.axes[0].get_ylim()[1] > 50


# Baselines, gaps, odd values


def test_a_baseline_without_stability_ratio() -> None:
    figure = plot(baseline())
    assert "no stability ratio recorded" in words(figure, 1)
    assert set(y(only(figure, 1, "edge"))) == {1.0}
    assert lines(figure, 1, "target") == []
    assert lines(figure, 2, "scheduled") == []
    assert words(figure, 2) == []
    assert len(only(figure, 2, "applied").get_xdata()) == 40  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1}],
        [{"step": 0}, {"step": 1, "loss": math.nan, "lr": 0.0}],
        [{"step": 5, "loss": 1.0, "lr": 0.1, "stability_ratio": 0.5, "target": 1.0, "probed": True}],
        [{"step": i, "loss": -1.0, "lr": 0.0, "stability_ratio": -2.0, "target": 0.5} for i in range(9)],
        [{"step": i, "loss": 0.0, "lr": 1e-30, "stability_ratio": 1e12 * i, "target": 0.95} for i in range(9)],
        [{"step": i, "loss": math.inf, "lr": math.nan, "stability_ratio": math.inf} for i in range(9)],
    ],
)
def test_degenerate_runs_are_drawn(rows: list[dict[str, Any]]) -> None:
    xscale: Any = "log" if rows[0]["step"] == 0 else "linear"  # a step 0 is what a logarithm trips over
    plot(rows, xscale=xscale).draw_without_rendering()


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="nothing to draw: the history has no rows"):
        plot(History())
    with pytest.raises(ValueError, match="nothing to draw: b has no rows"):
        plot({"a": run(), "b": []})
    with pytest.raises(ValueError, match="nothing to draw: no runs"):
        plot({})


def test_a_million_steps_are_thinned_to_what_can_be_seen() -> None:
    steps = np.arange(300_000, dtype=float)
    values = np.sin(steps / 1e4)
    values[123_456], values[200_001], values[50_000:60_000] = 9.0, -9.0, np.nan
    seen_x, seen_y = thin(steps, values)
    assert len(seen_x) < 30_000
    assert (np.nanmax(seen_y), np.nanmin(seen_y)) == (9.0, -9.0)
    assert {0, 1, 2, 299_999} <= set(seen_x)
    assert np.isnan(seen_y[(seen_x >= 50_100) & (seen_x < 59_900)]).all()
    assert np.array_equal(seen_y, values[seen_x.astype(int)], equal_nan=True)


# Several runs


def test_several_runs_share_the_panels() -> None:
    figure = plot({"warmctl": run(end=25), "later": run(end=40), "linear": baseline()})
    assert [len(lines(figure, 0, "loss")), len(lines(figure, 2, "applied"))] == [3, 3]
    for line, colour in zip(lines(figure, 0, "loss"), COLOURS, strict=False):
        assert same_color(line.get_color(), colour)
    ends = lines(figure, 1, "end")
    assert [set(x(line)) for line in ends] == [{25.0}, {40.0}]
    assert [same_color(line.get_color(), COLOURS[i]) for i, line in enumerate(ends)] == [True, True]
    said = words(figure, 2)
    assert said[:3] == ["warmctl", "later", "linear"]
    assert said[3:6] == [f"warmup ended at step 25: {REASON}", f"warmup ended at step 40: {REASON}", ""]
    figure.draw_without_rendering()
    legend = next(artist for artist in figure.axes[2].artists if isinstance(artist, Legend)).get_window_extent()
    assert figure.bbox.y0 < legend.y0 < legend.y1 < figure.axes[2].xaxis.label.get_window_extent().y0
    assert figure.bbox.x0 < legend.x0 < legend.x1 < figure.bbox.x1


def test_runs_of_different_length_and_target() -> None:
    figure = plot({"a": run(last=60, target=0.5), "b": run(last=30, target=0.8)})
    assert [set(y(line)) for line in lines(figure, 1, "target")] == [{0.5}, {0.8}]
    assert "target 0.5, 0.8" in words(figure, 1)
    assert figure.axes[0].get_xlim()[1] > 60


def test_many_runs_keep_their_colours_apart() -> None:
    figure = plot({str(i): run(last=20, end=None) for i in range(12)})
    assert len({line.get_color() for line in lines(figure, 0, "loss")}) == 12


def test_every_source_draws_the_same(tmp_path: Path) -> None:
    record = run()
    record.to_jsonl(tmp_path / "run.jsonl")
    expected = y(only(plot(record), 1, "ratio"))
    for source in (list(record), iter(record), tmp_path / "run.jsonl", str(tmp_path / "run.jsonl")):
        assert np.array_equal(y(only(plot(source), 1, "ratio")), expected, equal_nan=True)
    named = plot({"my run": record})
    assert named.get_suptitle() == "my run"


# Gauges


def test_gauges_have_panels_where_they_were_read() -> None:
    record = History(
        {**row, "representation_change": 0.3 if row["step"] < 5 else 0.05, "end_slope": 0.2 - 0.02 * row["step"]}
        for row in run(end=25)
    )
    figure = plot(record)
    names = ["loss", "stability ratio", "representation change", "end slope", "learning rate"]
    assert [axis.get_ylabel() for axis in figure.axes] == names
    for panel, column in ((2, "representation_change"), (3, "end_slope")):
        curve = y(only(figure, panel, column))
        assert list(curve[:24]) == record[column][:24]
        assert np.isnan(curve[24:]).all()  # carried on after warmup, not read
        assert set(x(only(figure, panel, "end"))) == {25}
    (band,) = (patch for patch in figure.axes[2].patches if patch.get_gid() == "healthy")
    assert (band.get_extents().y0, band.get_extents().y1) == pytest.approx(
        tuple(figure.axes[2].transData.transform([(0, 0.04), (0, 0.15)])[:, 1])
    )
    assert words(figure, 2) == ["healthy"]
    assert set(y(only(figure, 3, "zero"))) == {0.0}
    low, top = figure.axes[3].get_ylim()
    assert low < -0.3 < 0.2 < top


def test_one_gauge_alone_and_axes_of_ones_own() -> None:
    record = run(end_slope=0.1, representation_change=math.nan)
    names = ["loss", "stability ratio", "end slope", "learning rate"]
    assert [axis.get_ylabel() for axis in plot(record).axes] == names
    assert len(plot(record, axes=Figure().subplots(3)).axes) == 3


def test_vital_signs_have_a_panel_a_kind_and_a_line_a_layer() -> None:
    """Sampled rows alone have them; what was never finite has no panel."""
    record = History(run(last=20, end=None, **{"vitals/relu/dead": math.nan}))
    for row in list(record)[::5]:
        step = row["step"]
        layers = {f"vitals/net.{i}/gradient": 10.0 ** -(i + step / 10) for i in range(3)}
        record.append({**row, "step": 20 + step, **layers, "vitals/act/saturated": 0.0, "vitals/clipped": step > 9})
    figure = plot(record)
    names = ["loss", "stability ratio", "learning rate", "saturated units", "gradient norm"]
    assert [axis.get_ylabel() for axis in figure.axes] == names
    gradients = [only(figure, 4, f"vitals/net.{i}/gradient") for i in range(3)]
    for i, line in enumerate(gradients):
        assert list(x(line)) == [21, 26, 31, 36]
        assert y(line) == pytest.approx([10.0 ** -(i + step / 10) for step in (1, 6, 11, 16)])
    assert len({line.get_color() for line in gradients}) == 3 and list(x(only(figure, 4, "clipped"))) == [31, 36]
    assert words(figure, 4) == ["net.0", "net.2", "clipped"] and words(figure, 3) == ["act"]
    two = plot({"a": record, "b": run()})
    assert {line.get_color() for line in lines(two, 4, "vitals/net.1/gradient")} == {COLOURS[0]}


# Saving, backends, axes of one's own


@pytest.mark.parametrize("name", ["run.png", "run.pdf", "run.svg"])
def test_saves_by_suffix(tmp_path: Path, name: str) -> None:
    plot(run(), path=tmp_path / name)
    begin = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[Path(name).suffix]
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_draws_without_pyplot_and_shows_in_a_notebook() -> None:
    figure = plot(run())
    assert type(figure.canvas) is FigureCanvasAgg
    assert figure.canvas.manager is None
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(figure)).axes[0].get_ylabel() == "loss"


def test_leaves_backend_and_settings_alone(tmp_path: Path) -> None:
    """A process of its own: another test may have imported pyplot."""
    package = Path(__file__).parents[2] / "warmctl"
    code = f"""
import sys, types
sys.modules["warmctl"] = package = types.ModuleType("warmctl")
package.__path__ = [{str(package)!r}]
from warmctl.record.plotting import plot
assert "matplotlib" not in sys.modules
import matplotlib
settings = lambda: {{k: v for k in matplotlib.rcParams if k != "backend" for v in [matplotlib.rcParams[k]]}}
before = settings()  # without "backend": looking that up would choose one
plot([{{"step": 1, "loss": 1.0}}, {{"step": 2, "loss": 0.5}}], path={str(tmp_path / "run.png")!r})
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams._get_backend_or_none() is None
assert settings() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_axes_of_ones_own() -> None:
    figure = Figure()
    axes = figure.subplots(3, 2)
    assert plot(run(), axes=axes[:, 1]) is figure
    assert len(axes[1, 1].lines) > 0
    assert len(axes[1, 0].lines) == 0
    part: Any = figure.subfigures(1, 1)
    assert plot(run(), axes=part.subplots(3)) is figure
    with pytest.raises(ValueError, match="three axes, got 2"):
        plot(run(), axes=axes[:2, 0])


def test_without_matplotlib_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "warmctl\[plot\]"'):
        plot(run())
