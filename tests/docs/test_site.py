"""The site builds without a warning, and everything public is in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import warmctl

pytestmark = pytest.mark.xdist_group("site")  # its fixture is made once

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parents[2]
PUBLIC = list(warmctl._HOME)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: warnings that are not shown are not counted by --strict either.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    reference = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    assert "AdaptiveWarmup" in PUBLIC
    assert not [name for name in PUBLIC if f'id="warmctl.{name}"' not in reference]


def test_figures_sources_and_notebooks_outside_of_docs_are_in_it(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert 'src="benchmarks/results/replaces_tuned_warmup.png"' in home
    assert (site / "benchmarks/results/replaces_tuned_warmup.png").stat().st_size > 10_000
    assert (site / "notebooks/quickstart.html").read_text().count("data:image/png") == 1
    assert "AdaptiveWarmup" in (site / "examples/plain_loop.html").read_text()


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """Links lead out; scripts, styles and images do not."""
    for page in site.rglob("*.html"):
        for tag in ("<script src=", "<img ", '<link rel="stylesheet"'):
            for part in page.read_text().split(tag)[1:]:
                assert "http" not in part.split(">")[0].split("data:")[0], page
