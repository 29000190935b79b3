"""A report of runs as one page of HTML that loads nothing: curves, verdicts, figures, configuration, environment."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from warmctl.record.about import About
from warmctl.record.chart import chart
from warmctl.record.history import warmup_end
from warmctl.record.look import Look
from warmctl.record.panels import NamedRun
from warmctl.record.shown import shown
from warmctl.record.style import colours
from warmctl.record.summary import sentence, summarise

LONGEST = 2_000
"""Characters of one cell."""
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;margin:2rem auto;max-width:1100px;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .5rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.verdict{border-left:4px solid var(--run);padding:.2rem 0 .2rem .8rem;margin:.6rem 0;overflow-wrap:anywhere}
.verdict p{margin:.2rem 0}.small{color:#666;font-size:.85rem}
table{border-collapse:collapse;font-size:.9rem;max-width:100%}
th,td{text-align:left;padding:.15rem 1.2rem .15rem 0;vertical-align:top;overflow-wrap:anywhere}
th{font-weight:600}tr.part th{padding-top:.8rem}#chart{min-height:300px}
"""
SCRIPT = """
(async nonce => {
  const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
  const unzipped = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const library = document.createElement("script");
  library.nonce = nonce;
  library.textContent = await new Response(unzipped).text();
  document.head.appendChild(library);
  const figure = JSON.parse(document.getElementById("figure").textContent);
  document.getElementById("chart").textContent = "";
  await Plotly.newPlot("chart", figure.data, figure.layout, figure.config);
  document.body.dataset.drawn = "yes";
})(document.currentScript.nonce).catch(error => {
  document.getElementById("chart").textContent = "The curves need a browser of 2023 or later. " + error;
});
"""


@dataclass(frozen=True)
class Reported:
    """A run as it is reported."""

    name: str
    look: Look
    about: About = field(default_factory=dict)
    diagnosis: Sequence[str] = ()
    """Verdict, evidence, advice, if there is a diagnosis: a paragraph each."""


def page(runs: Sequence[Reported], library: str) -> str:
    """The page, of at most 5 MB. Whatever the records hold is text there.

    Args:
        library: plotly's own JavaScript; it is packed into the page.
    """
    palette = colours(len(runs))
    drawn = [_named(run, colour) for run, colour in zip(runs, palette, strict=True)]
    figure = json.dumps(chart(drawn), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    packed = base64.b64encode(gzip.compress(library.encode(), 9, mtime=0)).decode()
    nonce = hashlib.sha256(figure.encode()).hexdigest()[:32]
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    title = ", ".join(run.name for run in runs)
    verdicts = "".join(_verdict(run, colour) for run, colour in zip(runs, palette, strict=True))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{_text(title)}</title><style>{STYLE}</style></head><body>
<h1>{_text(title)}</h1>
{verdicts}
<p class="small">Drag to zoom, double-click to zoom out. Diamonds are decisions and failed probes, a star the end of
warmup, dots probes: hover over them. The solid line of the second panel is the edge of stability.</p>
<div id="chart">The curves are being drawn.</div>
<h2>Configuration and environment</h2>
{_table(runs)}
<script type="application/json" id="figure">{figure}</script>
<script type="text/plain" id="plotly">{packed}</script>
<script nonce="{nonce}">{SCRIPT}</script>
</body></html>
"""


def _named(run: Reported, colour: str) -> NamedRun:
    history = run.look.history
    return NamedRun(run.name, colour, history, np.array(history["step"], np.float64), warmup_end(history), 3.0)


def _verdict(run: Reported, colour: str) -> str:
    said = [sentence(summarise(run.look.history, run.look.over_edge)), *run.diagnosis]
    paragraphs = "".join(f"<p>{_text(words)}</p>" for words in said)
    rows, kept = run.look.rows, len(run.look.history)
    thinned = f'<p class="small">{rows} rows, of which {kept} were read in full.</p>' if kept < rows else ""
    return f'<div class="verdict" style="--run:{colour}"><p><b>{_text(run.name)}</b></p>{paragraphs}{thinned}</div>'


def _table(runs: Sequence[Reported]) -> str:
    """What each run was made with: a column a run."""
    parts: dict[str, dict[str, None]] = {}
    for run in runs:
        for part, values in run.about.items():
            parts.setdefault(part, {}).update(dict.fromkeys(values))
    if not parts:
        return '<p class="small">Not recorded: no RUN.about.json lies beside the record.</p>'
    head = "".join(f"<th>{_text(run.name)}</th>" for run in runs)
    rows = [f"<tr><th></th>{head}</tr>"] if len(runs) > 1 else []
    for part, names in parts.items():
        rows.append(f'<tr class="part"><th colspan="{len(runs) + 1}">{_text(part)}</th></tr>')
        for name in names:
            cells = "".join(f"<td>{_text(run.about.get(part, {}).get(name, ''))}</td>" for run in runs)
            rows.append(f"<tr><td>{_text(name)}</td>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _text(words: object) -> str:
    short = str(words)
    return html.escape(shown(short if len(short) <= LONGEST else short[:LONGEST] + "…"))
