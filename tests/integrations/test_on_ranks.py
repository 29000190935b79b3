"""Real processes: two ranks of on_ranks.py are launched once; each test reads a part of what they found."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launch import launch, needs_gloo
from tests.integrations.on_ranks import LAYOUTS, UNDER_DDP

pytest.importorskip("lion_pytorch")
pytestmark = [needs_gloo, pytest.mark.xdist_group("on_ranks")]  # its fixture is made once
Found = dict[str, list[Any]]


@pytest.fixture(scope="module")
def found() -> Found:
    results: Found = launch("tests.integrations.on_ranks", 2)
    return results


def agreed(ranks: list[Any]) -> Any:
    """What both ranks say, who decided and trained alike, to the last bit."""
    first, second = ranks
    assert repr(first["decisions"]) == repr(second["decisions"]) and first["weights"] == second["weights"]
    assert not first["failures"] and not second["failures"] and first["log"]["warmup/scale"] > 0
    return first


@pytest.mark.stack(
    (
        "nanoGPT's script",
        "torch.compile",
        "two optimizers",
        "other packages' optimizers",
        "timm-style groups",
        "torchtitan-style groups",
    ),
    "several processes",
)
@pytest.mark.parametrize("name", ["nanoGPT's script", *UNDER_DDP])
def test_ranks_agree_under_ddp(found: Found, name: str) -> None:
    assert agreed(found[name])["decisions"]


@pytest.mark.stack(("DDP", "FSDP2", "tensor parallel"), "level with bare")
@pytest.mark.parametrize("name", LAYOUTS)
def test_level_with_bare_training_at_a_usual_rate(found: Found, name: str) -> None:
    start, bare, ours = found[f"{name}: level"][0]
    assert bare < 0.3 * start and start - ours > 0.9 * (start - bare), (start, bare, ours)


@pytest.mark.stack(("DDP", "tensor parallel"), "resume exact")
@pytest.mark.parametrize("name", ["DDP", "tensor parallel"])
def test_resumed_in_mid_warmup_it_goes_on_bit_for_bit(found: Found, name: str) -> None:
    for rank in found[f"{name}: resumed"]:
        whole, again = rank["decisions"]
        assert rank["phase"] == "warmup" and rank["equal"] and len(again) == 4 and again == whole


@pytest.mark.stack(("DDP", "FSDP2", "tensor parallel"), ("accumulation", "logs"))
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_last_micro_batch_of_all_ranks_is_measured(found: Found, name: str) -> None:
    run = agreed(found[f"{name}: accumulated"])
    assert run["sharpness"] == pytest.approx(run["expected"], rel=5e-3)
    assert run["log"]["warmup/step"] == 2 and "warmup/stability_ratio" in run["log"]


@pytest.mark.stack(("DDP", "FSDP2", "tensor parallel"), "AMP")
@pytest.mark.parametrize("name", LAYOUTS)
def test_bfloat16_is_measured(found: Found, name: str) -> None:
    """By autocast, under FSDP2 by its own policy."""
    low, full = (agreed(found[f"{name}: {kind} precision"]) for kind in ("low", "full"))
    assert low["weights"] != full["weights"]
    assert low["ratio"] == pytest.approx(full["ratio"], rel=0.5)
