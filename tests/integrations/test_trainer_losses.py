"""Real Hugging Face Trainers that make their loss outside of the model, by the mixin: each way, and peft and TRL."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import weights
from tests.integrations.helpers import failures
from tests.integrations.test_transformers import BATCH, LENGTH, VOCABULARY, data, gpt2, llama
from warmctl import AdaptiveWarmup, sharpness

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")

from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from warmctl.integrations import unwrap
from warmctl.integrations.transformers import WarmupTrainerMixin, log_warmup

SMOOTHING, DAMPING = 0.2, 0.05


class WarmupTrainer(WarmupTrainerMixin, Trainer):
    pass


class Damped(Trainer):
    """Adds a term to the model's loss, and counts."""

    calls = 0
    sizes: dict[str, list[float]]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        size = outputs.logits.logsumexp(-1).square().mean() / self.current_gradient_accumulation_steps
        self.calls += 1
        self.__dict__.setdefault("sizes", {"train": []})["train"].append(float(size.detach()))
        loss = outputs.loss + DAMPING * size
        return (loss, outputs) if return_outputs else loss


class WarmupDamped(WarmupTrainerMixin, Damped):
    pass


def focal(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's own, over all tokens of the step."""
    chances = outputs["logits"][:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None])
    return -((1 - chances.exp()) * chances).sum() / num_items_in_batch


def bert() -> nn.Module:
    """Masks nothing: it learns to copy."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
        )
    )


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": BATCH,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 2,
        "seed": 5,
        "learning_rate": 3e-2,
    }
    return TrainingArguments(**{**settings, **more})


def build(folder: Path, cls: type[Trainer] = WarmupTrainer, model: Any = gpt2, **options: Any) -> Any:
    more = options.pop("arguments", {})
    torch.manual_seed(0)
    return cls(model(), arguments(folder, **more), train_dataset=data(), **options)


def smoothed(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=SMOOTHING)


def damped(model: nn.Module, ids: Tensor) -> Tensor:
    outputs = model(input_ids=ids, labels=ids)
    loss: Tensor = outputs.loss + DAMPING * outputs.logits.logsumexp(-1).square().mean()
    return loss


WAYS: dict[str, tuple[type[Trainer], dict[str, Any], Any]] = {
    "label_smoothing_factor": (WarmupTrainer, {"arguments": {"label_smoothing_factor": SMOOTHING}}, smoothed),
    "compute_loss_func": (
        WarmupTrainer,
        {"compute_loss_func": focal},
        lambda model, ids: focal(model(input_ids=ids), ids, ids[:, 1:].numel()),
    ),
    "compute_loss of a subclass": (WarmupDamped, {}, damped),
}


@pytest.mark.parametrize("way", WAYS)
def test_first_probe_measures_the_loss_that_is_trained_on(way: str, tmp_path: Path) -> None:
    """Of both micro-batches, in proportion to the last; the optimizer is named by its class."""
    cls, options, loss = WAYS[way]
    more = {"max_steps": 1, "gradient_accumulation_steps": 2, **options.get("arguments", {})}
    trainer = build(
        tmp_path,
        cls,
        llama,
        **{**options, "arguments": more},
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-6}),
        warmup={"every": 100, "probe_steps": 20},
    )
    batches: list[Tensor] = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"]), with_kwargs=True
    )
    trainer.train()
    opt = unwrap(trainer.optimizer)
    assert type(opt.base) is torch.optim.SGD
    torch.manual_seed(0)
    expected = sharpness(llama(), loss, batches[1], tol=1e-2).eigenvalue
    assert opt.history[0]["sharpness"] == pytest.approx(expected, rel=0.05)


def test_monitor_leaves_no_trace_in_model_and_trainer(tmp_path: Path) -> None:
    """With dropout, accumulation, and numbers that `compute_loss` keeps."""
    more = {"gradient_accumulation_steps": 2}
    plain = build(tmp_path, Damped, arguments=more)
    plain.train()
    monitored = build(tmp_path, WarmupDamped, arguments=more, warmup={"control": False, "every": 2})
    monitored.train()
    opt = unwrap(monitored.optimizer)
    assert opt.metrics["probes"] == 4 and not failures(list(opt.history))
    assert torch.equal(weights(plain.model), weights(monitored.model))
    assert monitored.calls == plain.calls == 16 and monitored.sizes == plain.sizes


def test_the_applied_rate_beside_the_schedules_in_one_log(tmp_path: Path) -> None:
    trainer = build(tmp_path, arguments={"learning_rate": 0.3})
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    scheduled, applied, scale = ([row[k] for row in rows] for k in ("learning_rate", "warmup/lr", "warmup/scale"))
    assert applied == pytest.approx([s * rate for s, rate in zip(scale, scheduled, strict=True)])
    assert max(scale) < 1.0 and len(rows) == 4


@pytest.mark.parametrize("mixin", [True, False])
def test_a_warmup_that_is_left_in_is_said_once(mixin: bool, tmp_path: Path) -> None:
    def said(**more: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            if mixin:
                trainer = build(tmp_path, arguments={"max_steps": 2, **more})
            else:
                model = gpt2()
                opt = AdaptiveWarmup(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
                settings = arguments(tmp_path, max_steps=2, **more)
                trainer = Trainer(model, settings, train_dataset=data(), optimizers=(opt, None))  # type: ignore[arg-type]
                log_warmup(trainer)
            trainer.train()
            trainer.train()
        return [str(w.message) for w in found if "warmctl" in str(w.message)]

    (message,) = said(warmup_steps=1)
    assert "warmup_steps=1" in message and "Leave warmup_steps out" in message
    assert not said()


def test_lora_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"])
    trainer = build(tmp_path, model=lambda: peft.get_peft_model(gpt2(), config), warmup={"every": 2})
    trainer.train()
    opt = unwrap(trainer.optimizer)
    assert len(opt.all_params) == 4 and opt.metrics["probes"] == 4 and not failures(list(opt.history))


def test_trl_supervised_fine_tuning(tmp_path: Path) -> None:
    """SFTTrainer makes its loss itself; the tokens that it counts are those of training alone."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models

    rows = [row["input_ids"].tolist() for row in data()]
    vocabulary = {chr(index): index for index in range(VOCABULARY)} | {"<unk>": VOCABULARY}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), eos_token="0", pad_token="0"
    )

    class WarmupSFTTrainer(WarmupTrainerMixin, trl.SFTTrainer):  # type: ignore[misc,name-defined]
        pass

    settings = trl.SFTConfig(**arguments(tmp_path).to_dict() | {"bf16": False, "max_length": LENGTH})
    trainer = WarmupSFTTrainer(
        gpt2(),
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        warmup={"every": 2},
    )
    trainer.train()
    opt = unwrap(trainer.optimizer)
    assert opt.metrics["probes"] == 4 and not failures(list(opt.history))
    assert trainer.state.log_history[-2]["num_tokens"] == 8 * BATCH * LENGTH


@pytest.mark.stack("HF Trainer", "level with bare")
@pytest.mark.parametrize("model", [gpt2, bert])
def test_level_with_bare_training_at_a_usual_rate(model: Any, tmp_path: Path) -> None:
    """Within a tenth of what bare training wins: the first steps are smaller."""
    losses = []
    for cls in (Trainer, WarmupTrainer):
        trainer = build(tmp_path, cls, model, arguments={"learning_rate": 2e-3, "max_steps": 100})
        start = trainer.evaluate(data())["eval_loss"]
        trainer.train()
        losses.append(trainer.evaluate(data())["eval_loss"])
    assert losses[1] - losses[0] < 0.1 * (start - losses[0])
