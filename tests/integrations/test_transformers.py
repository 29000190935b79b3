"""Real Hugging Face Trainer on the CPU, with models built from a config: nothing is downloaded.

The Trainer is told nothing: the wrapper comes in by `optimizers=`, the loss is captured from the
model, and a step is what the Trainer calls one after accumulation and clipping.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import weights
from tests.integrations.helpers import Rows, decisions, failures
from warmctl import AdaptiveWarmup, sharpness

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from warmctl.integrations.transformers import WarmupTrainerMixin, log_warmup  # noqa: E402

VOCABULARY, LENGTH, BATCH = 64, 16, 4


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config)  # dropout .1 in three places


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=LENGTH,
        )
    )


MODELS = {"gpt2": gpt2, "llama": llama}


def data() -> list[dict[str, Tensor]]:
    """Bytes of this file, in order, as rows of tokens."""
    text = torch.tensor(list(Path(__file__).read_bytes()[: 128 * LENGTH])) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in text.view(-1, LENGTH)]


class Run:
    """A script that trains `model` for some steps into `folder`."""

    def __init__(
        self,
        model: str,
        folder: Path,
        *,
        wrapped: bool = True,
        steps: int = 8,
        lr: float = 3e-2,
        **options: Any,
    ) -> None:
        arguments = options.pop("arguments", {})
        torch.manual_seed(0)
        self.model = MODELS[model]()
        base = torch.optim.AdamW(self.model.parameters(), lr=lr)
        if options.pop("compiled", False):
            self.model = torch.compile(self.model, backend="aot_eager")  # type: ignore[assignment]
        own_schedule = options.pop("own_schedule", True)
        self.opt: Any = AdaptiveWarmup(base, self.model, **options) if wrapped else base
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, T_max=40) if own_schedule else None
        settings: dict[str, Any] = {
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 2,
            "seed": 5,
        }
        self.trainer = Trainer(
            model=self.model,
            args=TrainingArguments(**{**settings, **arguments}),
            train_dataset=data(),
            optimizers=(self.opt, schedule),  # type: ignore[arg-type]
        )

    def train(self, **options: Any) -> Run:
        self.trainer.train(**options)
        return self

    @property
    def rows(self) -> Rows:
        return list(self.opt.history)

    @property
    def weights(self) -> Tensor:
        return weights(self.model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_monitor_leaves_no_trace(model: str, accumulation: int, tmp_path: Path) -> None:
    arguments = {"gradient_accumulation_steps": accumulation}
    plain = Run(model, tmp_path, wrapped=False, arguments=arguments).train()
    monitored = Run(model, tmp_path, control=False, every=2, arguments=arguments).train()
    assert torch.equal(plain.weights, monitored.weights)
    assert not failures(monitored.rows)
    assert monitored.opt.metrics["step"] == 8
    assert monitored.opt.metrics["probes"] == 4
    logs = [
        [{k: row[k] for k in ("loss", "grad_norm") if k in row} for row in r.trainer.state.log_history]
        for r in (plain, monitored)
    ]
    assert logs[0] == logs[1]


def test_the_schedule_of_the_trainer(tmp_path: Path) -> None:
    """`optimizers=(opt, None)`: the decay that the arguments name, from the wrapped optimizer's own rate."""
    arguments = {"lr_scheduler_type": "cosine", "learning_rate": 1.0}
    rows = Run("gpt2", tmp_path, own_schedule=False, lr=0.03, arguments=arguments).train().rows
    expected = [0.03 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert [row["scheduled_lr"] for row in rows] == pytest.approx(expected)
    assert rows[-1]["probes"] > 1 and not failures(rows)


@pytest.mark.stack("torch.compile", "one line changed")
def test_a_compiled_model(tmp_path: Path) -> None:
    run = Run("gpt2", tmp_path, compiled=True, steps=3, arguments={"remove_unused_columns": False}).train()
    assert run.opt.metrics["probes"] > 1 and not failures(run.rows)


@pytest.mark.stack("HF Trainer", "AMP")
def test_bf16(tmp_path: Path) -> None:
    bare, low, full = (
        Run("gpt2", tmp_path, steps=4, arguments={"bf16": bf16}, **options).train()
        for bf16, options in (
            (True, {"wrapped": False}),
            (True, {"control": False, "every": 2}),
            (False, {"control": False, "every": 2}),
        )
    )
    assert torch.equal(low.weights, bare.weights) and not torch.equal(low.weights, full.weights)
    assert low.opt.metrics["probes"] == 2 and not failures(low.rows)
    ratio = low.rows[0]["stability_ratio"] / full.rows[0]["stability_ratio"]
    assert 0.1 < ratio < 10  # Adam divides by gradients that bfloat16 rounds


@pytest.mark.stack("HF Trainer", "accumulation")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_first_probe_measures_the_whole_unclipped_loss(accumulation: int, tmp_path: Path) -> None:
    """The model divides by the items of all micro-batches: its loss is not the whole loss."""
    batches: list[dict[str, Any]] = []
    run = Run(
        "llama",
        tmp_path,
        steps=1,
        every=100,
        probe_steps=20,
        arguments={"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.01},
    )
    base = torch.optim.SGD(run.model.parameters(), lr=1e-6)
    run.opt = run.trainer.optimizer = AdaptiveWarmup(base, run.model, every=100, probe_steps=20)
    run.trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(run.opt, lambda step: 1.0)
    handle = run.model.register_forward_pre_hook(lambda m, a, kw: batches.append(kw), with_kwargs=True)
    run.train()
    handle.remove()
    torch.manual_seed(0)
    truth = llama()
    last = batches[accumulation - 1]["input_ids"]
    expected = sharpness(truth, lambda m, b: m(input_ids=b, labels=b).loss, last, tol=1e-2).eigenvalue
    assert run.rows[0]["sharpness"] == pytest.approx(expected, rel=0.05)


def test_control_counts_steps_and_leaves_the_schedule_alone(tmp_path: Path) -> None:
    arguments = {"gradient_accumulation_steps": 2}
    plain = Run("gpt2", tmp_path, wrapped=False, lr=0.3, arguments=arguments).train()
    run = Run("gpt2", tmp_path, lr=0.3, arguments=arguments).train()
    assert run.opt.metrics["step"] == len(run.rows) == 8
    assert run.opt.param_groups[0]["lr"] == plain.opt.param_groups[0]["lr"]
    assert min(row["scale"] for row in run.rows) < 1.0
    assert not torch.equal(run.weights, plain.weights)
    assert not failures(run.rows)


@pytest.mark.stack("HF Trainer", "resume exact")
@pytest.mark.parametrize("model", MODELS)
def test_save_and_resume_in_mid_warmup(model: str, tmp_path: Path) -> None:
    """The Trainer reads optimizer.pt back with weights_only=True."""
    saving = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}
    options: dict[str, Any] = {"lr": 0.3, "every": 3}
    whole = Run(model, tmp_path / "whole", arguments=saving, **options).train()
    assert whole.rows[3]["phase"] == "warmup"
    resumed = Run(model, tmp_path / "resumed", arguments=saving, **options)
    with torch.no_grad():
        for p in resumed.model.parameters():
            p.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert decisions(resumed.rows) == decisions(whole.rows)[4:]
    assert len(resumed.rows) == 4 and any(row["probed"] for row in resumed.rows)
    assert torch.equal(resumed.weights, whole.weights)


@pytest.mark.stack("HF Trainer", "logs")
def test_metrics_in_the_trainers_log(tmp_path: Path) -> None:
    """Reporters, which the Trainer puts before every other callback, see them too."""
    reported: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.append(dict(logs))

    run = Run("gpt2", tmp_path, lr=0.3)
    run.trainer.callback_handler.callbacks.insert(0, Reporter())
    log_warmup(run.trainer)
    run.train()
    scales = [row["scale"] for row in run.rows][1::2]
    assert [row["warmup/scale"] for row in run.trainer.state.log_history if "loss" in row] == scales
    assert [row["warmup/scale"] for row in reported if "loss" in row] == scales
    assert {"warmup/step", "warmup/lr", "warmup/stability_ratio", "warmup/sharpness"} <= set(reported[0])


def test_a_trainer_whose_create_optimizer_takes_no_model(tmp_path: Path) -> None:
    """As that of transformers 4, and many a subclass's own."""

    class Older(Trainer):
        def create_optimizer(self) -> Any:
            return super().create_optimizer()

    class Warmed(WarmupTrainerMixin, Older):
        pass

    trainer = Warmed(gpt2(), TrainingArguments(str(tmp_path), report_to=[]), train_dataset=[])
    assert isinstance(trainer.create_optimizer(), AdaptiveWarmup)


def test_logging_without_the_wrapper_says_so(tmp_path: Path) -> None:
    run = Run("gpt2", tmp_path, wrapped=False)
    log_warmup(run.trainer)
    with pytest.raises(TypeError, match="no AdaptiveWarmup but AdamW"):
        run.train()
    assert run.trainer.state.global_step == 0


def test_a_mixin_that_comes_too_late_says_so() -> None:
    with pytest.raises(TypeError, match=r"class Late\(WarmupTrainerMixin, ...\)"):

        class Late(Trainer, WarmupTrainerMixin):
            pass
