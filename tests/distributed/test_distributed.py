"""Real processes: two ranks of worker.py are launched once; each test reads one check."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launch import launch, needs_gloo

Ranks = list[dict[str, Any]]
pytestmark = [needs_gloo, pytest.mark.xdist_group("distributed")]  # its fixture is made once


@pytest.fixture(scope="module")
def results() -> dict[str, Ranks]:
    found: dict[str, Ranks] = launch("tests.distributed.layouts", 2)  # and with it those of worker.py
    return found


def ranks(results: dict[str, Ranks], name: str) -> Ranks:
    """What each rank returned; fails with the traceback of one that did not."""
    for found in results[name]:
        assert "error" not in found, found["error"]
    return results[name]


TRAINED = [
    "ddp_inner_closure",
    "ddp_inner_captured",
    "ddp_outer_closure",
    "ddp_outer_captured",
    "ddp_bucket_view_unused",
    "ddp_bucket_view_unused_captured",
    "ddp_backward",
    "ddp_no_sync",
    "fsdp_closure",
    "fsdp_captured",
]


@pytest.mark.stack("DDP", "several processes")
@pytest.mark.stack("FSDP2", "several processes")
@pytest.mark.parametrize("name", TRAINED)
def test_ranks_with_different_data_agree(results: dict[str, Ranks], name: str) -> None:
    """Identical decisions at every step, and identical weights at the end, to the last bit."""
    first, second = ranks(results, name)
    assert first["decisions"] == second["decisions"]
    assert first["weights"] == second["weights"]
    assert len(first["decisions"]) == 6
    assert min(scale for scale, *_ in first["decisions"]) < 1.0  # there was something to agree on
    assert not first["failures"] and not second["failures"]


@pytest.mark.parametrize("name", TRAINED)
def test_measures_what_one_process_measures_on_the_whole_batch(results: dict[str, Ranks], name: str) -> None:
    for found in ranks(results, name):
        assert found["sharpness"] == pytest.approx(found["expected"], rel=1e-3)


def test_sharded_parameters_use_finite_differences(results: dict[str, Ranks]) -> None:
    for name in ("fsdp_closure", "fsdp_captured"):
        assert [found["method"] for found in ranks(results, name)] == ["finite_difference"] * 2


def test_sharded_and_replicated_training_are_the_same(results: dict[str, Ranks]) -> None:
    """FSDP2 and DDP train the same model on the same rows: equal but for the order of sums."""
    sharded, replicated = (ranks(results, name)[0] for name in ("fsdp_closure", "ddp_inner_closure"))
    assert sharded["weights"] == pytest.approx(replicated["weights"], abs=1e-6)


@pytest.mark.parametrize("name", ["monitor_ddp", "monitor_fsdp"])
def test_monitor_leaves_no_trace(results: dict[str, Ranks], name: str) -> None:
    for found in ranks(results, name):
        assert found["equal"] and found["probes"] == 6 and not found["failures"]


@pytest.mark.stack("FSDP2", "resume exact")
def test_distributed_checkpoint_resumes_in_mid_warmup_bit_for_bit(results: dict[str, Ranks]) -> None:
    for found in ranks(results, "fsdp_checkpoint"):
        assert found["at_save"] == found["at_load"]
        assert found["at_save"][0] == "warmup"
        whole, resumed = found["decisions"]
        assert len(resumed) == 6 and resumed == whole
        assert found["equal"]
        assert found["probed"] > 0 and not found["failures"]


def test_a_probe_that_fails_on_one_rank_fails_on_both(results: dict[str, Ranks]) -> None:
    first, second = ranks(results, "failure_on_one_rank")
    assert first["after"] == second["after"] <= first["before"]
    assert "another rank" in first["reason"]


def test_a_loss_that_is_not_finite_on_one_rank_is_a_failure_on_both(results: dict[str, Ranks]) -> None:
    """And not a deadlock: neither rank goes into a collective of a probe alone."""
    first, second = ranks(results, "nan_on_one_rank")
    assert first["decisions"] == second["decisions"]
    assert not first["probed"] and not second["probed"]


def test_a_rank_may_run_out_of_batches_after_warmup_alone(results: dict[str, Ranks]) -> None:
    """Before, all are told so at the first step, instead of waiting for each other."""
    for found in ranks(results, "join_in_warmup"):
        assert "as many batches" in found["said"] and found["equal"]
    first, second = ranks(results, "join_after_warmup")
    assert first["phase"] == second["phase"] == "done" and (first["steps"], second["steps"]) == (5, 6)
    assert first["weights"] == second["weights"]


def test_fsdp2_by_backward_is_measured_along_the_update(results: dict[str, Ranks]) -> None:
    """It stayed at 1 %: double backward does not go through sharded modules."""
    first, second = ranks(results, "fsdp_backward")
    assert first["scales"] == second["scales"] and first["probes"] > 5 and not first["failures"]
    assert 0.02 <= max(first["scales"]) < 0.5  # at a rate that is far too high
    assert sum(first["losses"][-4:]) / 4 < 0.3 * first["losses"][0]


@pytest.mark.parametrize("name", ["ddp_uneven_captured", "ddp_uneven_backward"])
def test_ranks_with_different_numbers_of_micro_batches_agree(results: dict[str, Ranks], name: str) -> None:
    """Where one had fewer than at the step before, or earned its probes sooner, it left the others waiting."""
    first, second = ranks(results, name)
    assert first["decisions"] == second["decisions"] and first["weights"] == second["weights"]
    assert first["probes"] >= 3 and not first["failures"] and not second["failures"]


@pytest.mark.stack("FSDP1", "every", refused="it holds flat shards of the parameters: use FSDP2 or DDP")
def test_fsdp1_is_refused_whichever_comes_first(results: dict[str, Ranks]) -> None:
    for found in ranks(results, "fsdp1"):
        assert len(found["said"]) == 3
        assert all("FSDP1" in words and "FSDP2" in words and "DDP" in words for words in found["said"])


@pytest.mark.stack("tensor parallel", ("one line changed", "several processes"))
def test_tensor_parallel_layers_are_measured_as_one_process_does(results: dict[str, Ranks]) -> None:
    first, second = ranks(results, "tensor_parallel")
    assert first["decisions"] == second["decisions"] and first["weights"] == second["weights"]
    assert first["probes"] == 6 and not first["failures"]
    assert first["sharpness"] == pytest.approx(first["expected"], rel=1e-5)
