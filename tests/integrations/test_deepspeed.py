"""Real DeepSpeed on two ranks of gloo. It is no part of `dev`: docs/how-to/distributed.md says how this is run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launch import launch, needs_gloo

pytest.importorskip("deepspeed")
pytestmark = [needs_gloo, pytest.mark.xdist_group("deepspeed")]  # its fixture is made once
FLAT = "flat shards"


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    results: dict[str, list[Any]] = launch("tests.integrations.deepspeed_ranks", 2)
    return results


@pytest.mark.stack("DeepSpeed without ZeRO", ("one line changed", "accumulation", "several processes", "logs"))
@pytest.mark.parametrize("parts", [1, 2])
def test_ranks_agree_and_measure_what_one_process_does(found: dict[str, list[Any]], parts: int) -> None:
    first, second = found[f"trained in {parts}"]
    assert first["decisions"] == second["decisions"] and first["weights"] == second["weights"]
    assert first["probes"] == 6 and not first["failures"] and first["log"]["warmup/step"] == 6
    assert first["sharpness"] == pytest.approx(first["expected"], rel=1e-3)


@pytest.mark.stack("DeepSpeed without ZeRO", "level with bare")
def test_level_with_bare_training_at_a_usual_rate(found: dict[str, list[Any]]) -> None:
    start, bare, ours = found["level"][0]
    assert bare < 0.1 * start and start - ours > 0.9 * (start - bare)


@pytest.mark.stack("DeepSpeed without ZeRO", "resume exact")
def test_its_own_checkpoint_resumes_in_mid_warmup(found: dict[str, list[Any]]) -> None:
    for rank in found["resumed"]:
        whole, again = rank["decisions"]
        assert rank["phase"] == "warmup" and rank["equal"] and len(again) == 6 and again == whole


@pytest.mark.stack(
    "DeepSpeed with ZeRO",
    "every",
    refused="its optimizers hold flat shards of the parameters; stages 1, 2 and 3: use FSDP2",
)
@pytest.mark.stack(
    "DeepSpeed without ZeRO", "AMP", refused="`bf16` gives the optimizer flat copies of the parameters; use DDP"
)
def test_zero_and_low_precision_are_refused(found: dict[str, list[Any]]) -> None:
    """Wrapped before the engine is made, and after; stage 0 in bfloat16 last."""
    for rank in found["refused"]:
        assert len(rank) == 7 and all(FLAT in words and "FSDP2" in words for words in rank)
        assert all("DeepSpeed's DeepSpeedZeroOptimizer" in words for words in rank[3:6])


def test_by_the_plugin_of_accelerate() -> None:
    without, with_zero = launch("tests.integrations.deepspeed_ranks", 1, "accelerate")["accelerate"]
    assert without["engine"] == with_zero["engine"] == "DeepSpeedEngine"
    assert without["probes"] == 4 and not without["said"] and FLAT in with_zero["said"]
