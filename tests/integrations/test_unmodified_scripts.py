"""Training scripts as their authors wrote them: wrapping the optimizer is the only line that differs.

`nanogpt` follows karpathy/nanoGPT's train.py: the model returns (logits, loss), the rate is written into the
groups at every iteration, micro-batches are averaged by hand, and the step goes through a GradScaler.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.helpers import weights
from tests.integrations.helpers import decisions
from warmctl import AdaptiveWarmup, sharpness
from warmctl.record.history import History

ROOT = Path(__file__).parents[2]
Wrap = Callable[[Optimizer, nn.Module], Optimizer]
VOCABULARY, BLOCK, WIDTH = 32, 16, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = (
            nn.Linear(WIDTH, 3 * WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (t.view(rows, length, 4, -1).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(rows, length, width))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """nanoGPT's model at its smallest: tied embedding, learned positions, (logits, loss)."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.h = nn.ModuleList([Block(), Block()])
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight
        for p in self.parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        if targets is None:
            return self.lm_head(self.ln_f(x[:, [-1], :])), None
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float]) -> Optimizer:
        params = list(self.parameters())
        decay, no_decay = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def text_batches(draws: torch.Generator) -> Callable[[], tuple[Tensor, Tensor]]:
    """Of a walk by steps of 0, 1 or 2, which the model can learn."""
    data = torch.randint(3, (4096,), generator=torch.Generator().manual_seed(5)).cumsum(0) % VOCABULARY

    def get_batch() -> tuple[Tensor, Tensor]:
        ix = torch.randint(len(data) - BLOCK, (8,), generator=draws)
        x = torch.stack([data[i : i + BLOCK] for i in ix.tolist()])
        y = torch.stack([data[i + 1 : i + 1 + BLOCK] for i in ix.tolist()])
        return x, y

    return get_batch


def save(checkpoint: Any, model: Any, optimizer: Any, draws: torch.Generator, iter_num: int, batch: Any) -> None:
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draws": draws.get_state()}
    checkpoint.update(copy.deepcopy(states), iter_num=iter_num, batch=batch)


def resume(checkpoint: Any, model: Any, optimizer: Any, draws: torch.Generator) -> int:
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    draws.set_state(checkpoint["draws"])
    return int(checkpoint["iter_num"])


def nanogpt(
    wrap: Wrap,
    *,
    accumulation: int = 2,
    steps: int = 12,
    learning_rate: float = 3e-2,
    clip: float = 1.0,
    outer: Any = None,
    dtype: torch.dtype | None = None,
    saved_at: int = -1,
    checkpoint: Any = None,
) -> Any:
    """train.py. Returns the model, the optimizer, and the rates that the loop saw after each step.

    Under `outer`, DDP, each rank draws its own batches; `checkpoint`: a dict to fill before `saved_at`, or go on from.
    """
    draws = torch.Generator().manual_seed(7 + (0 if outer is None else torch.distributed.get_rank()))
    torch.manual_seed(1337)
    get_batch = text_batches(draws)

    @torch.no_grad()
    def estimate_loss() -> float:
        model.eval()
        losses: list[float] = [model(*get_batch())[1].item() for _ in range(2)]
        model.train()
        return sum(losses) / 2

    rates, evaluations = [], []
    ctx = nullcontext() if dtype is None else torch.amp.autocast("cpu", dtype)
    model: Any = GPT()
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    optimizer = model.configure_optimizers(1e-1, learning_rate, (0.9, 0.95))
    optimizer = wrap(optimizer, model)  # the only line that differs
    model = model if outer is None else outer(model)
    first = resume(checkpoint, model, optimizer, draws) if checkpoint else 0
    X, Y = checkpoint["batch"] if checkpoint else get_batch()
    for iter_num in range(first, steps):
        if iter_num == saved_at:
            save(checkpoint, model, optimizer, draws, iter_num, (X, Y))
        lr = learning_rate * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * iter_num / steps)))
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        if iter_num % 5 == 0:
            evaluations.append(estimate_loss())
        for micro_step in range(accumulation):
            if outer is not None:
                model.require_backward_grad_sync = micro_step == accumulation - 1
            with ctx:
                _logits, loss = model(X, Y)
                loss = loss / accumulation
            X, Y = get_batch()
            scaler.scale(loss).backward()
        if clip != 0.0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        rates.append((lr, [group["lr"] for group in optimizer.param_groups]))
    return model, optimizer, rates, evaluations


def bare(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    return optimizer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nanogpt_monitored_is_bitwise_the_bare_run(accumulation: int) -> None:
    plain, *_, evaluations = nanogpt(bare, accumulation=accumulation)
    model, opt, _, monitored = nanogpt(
        lambda o, m: AdaptiveWarmup(o, m, control=False, every=2), accumulation=accumulation
    )
    assert torch.equal(weights(plain), weights(model))
    assert monitored == evaluations  # the data stream and the evaluation mode were not disturbed either
    assert opt.metrics["probes"] >= 6
    assert not [row["reason"] for row in opt.history if "failed" in row["reason"]]


@pytest.mark.stack("nanoGPT's script", ("one line changed", "logs"))
def test_nanogpt_controlled() -> None:
    """The loop's own rate is scaled inside `step` and only there, and control shows in the weights."""
    plain, *_ = nanogpt(bare, learning_rate=0.3)
    model, opt, rates, _ = nanogpt(AdaptiveWarmup, learning_rate=0.3)
    assert all(lr == seen for lr, groups in rates for seen in groups)
    rows = list(opt.history)
    assert len(rows) == 12
    assert [row["scheduled_lr"] for row in rows] == [lr for lr, _ in rates]
    assert all(row["lr"] == pytest.approx(row["scale"] * row["scheduled_lr"]) for row in rows)
    assert min(row["scale"] for row in rows) < 0.5
    assert not torch.equal(weights(plain), weights(model))
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert all(math.isfinite(value) for value in opt.scalars().values())


@pytest.mark.stack("nanoGPT's script", "level with bare")
def test_nanogpt_level_with_bare_training_at_a_usual_rate() -> None:
    settings: dict[str, Any] = {"steps": 121, "learning_rate": 3e-3, "accumulation": 1}
    *_, plain = nanogpt(bare, **settings)
    *_, ours = nanogpt(AdaptiveWarmup, **settings)
    assert plain[-1] < 0.5 * plain[0] and plain[0] - ours[-1] > 0.9 * (plain[0] - plain[-1]), (plain, ours)


@pytest.mark.stack("nanoGPT's script", "resume exact")
def test_nanogpt_resumed_in_mid_warmup() -> None:
    checkpoint: dict[str, Any] = {}

    def wrap(optimizer: Optimizer, model: nn.Module) -> Optimizer:
        return AdaptiveWarmup(optimizer, model, every=3)

    whole, opt, *_ = nanogpt(wrap, learning_rate=0.3, saved_at=5, checkpoint=checkpoint)
    again, resumed, *_ = nanogpt(wrap, learning_rate=0.3, checkpoint=checkpoint)
    assert opt.history[4]["phase"] == "warmup" and len(resumed.history) == 7
    assert decisions(list(resumed.history)) == decisions(list(opt.history))[5:]
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.stack("nanoGPT's script", "AMP")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nanogpt_in_low_precision(dtype: torch.dtype) -> None:
    """With float16 its GradScaler is on. Adam divides by gradients that are rounded: the ratio is another."""
    plain, *_ = nanogpt(bare, dtype=dtype, steps=8)
    model, opt, *_ = nanogpt(lambda o, m: AdaptiveWarmup(o, m, control=False, every=2), dtype=dtype, steps=8)
    _, full, *_ = nanogpt(lambda o, m: AdaptiveWarmup(o, m, control=False, every=2), steps=8)
    assert torch.equal(weights(plain), weights(model)) and opt.metrics["probes"] >= 3
    assert not [row["reason"] for row in opt.history if "failed" in row["reason"]]
    assert 1 / 4 < opt.metrics["stability_ratio"] / full.metrics["stability_ratio"] < 4


@pytest.mark.stack("nanoGPT's script", "accumulation")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_nanogpt_measures_the_loss_it_trains_on(accumulation: int) -> None:
    """λ of the first probe is that of the last micro-batch, not divided by their number."""
    batches: list[tuple[Tensor, Tensor]] = []

    class Recorded(torch.optim.SGD):
        pass

    def wrap(optimizer: Optimizer, model: nn.Module) -> Optimizer:
        model.register_forward_pre_hook(lambda m, args: batches.append(args) if torch.is_grad_enabled() else None)
        base = torch.optim.SGD(model.parameters(), lr=1e-4)
        return AdaptiveWarmup(base, model, every=1, probe_steps=16)

    _, opt, *_ = nanogpt(wrap, accumulation=accumulation, steps=1, clip=0.01)
    torch.manual_seed(1337)
    x, y = batches[accumulation - 1]
    truth = sharpness(GPT(), lambda m, b: m(*b)[1], (x, y), tol=1e-2)
    assert opt.metrics["sharpness"] == pytest.approx(truth.eigenvalue, rel=0.02)


def classifier(wrap: Wrap, *, steps: int = 30, clip: float = 0.0, penalty: float = 0.0) -> Any:
    """The loop of most tutorials, with a model that returns its own loss and a scheduler."""
    torch.manual_seed(0)
    x = torch.randn(64, 10)
    y = (x[:, 0] > 0).long()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2)
            )

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = Net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for step in range(steps):
        rows = torch.arange(16) + 16 * (step % 4)
        optimizer.zero_grad()
        loss = model(x[rows], labels=y[rows])["loss"]
        if penalty:
            loss = loss + penalty * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
    return model, optimizer


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_tutorial_loop_monitored_is_bitwise_the_bare_run(clip: float) -> None:
    """Dropout and batch norm: neither random streams nor running statistics notice the probes."""
    plain, base = classifier(bare, clip=clip)
    model, opt = classifier(lambda o, m: AdaptiveWarmup(o, m, control=False, every=3), clip=clip)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    assert opt.param_groups[0]["lr"] == base.param_groups[0]["lr"]
    assert opt.metrics["probes"] == 10
    assert not [row["reason"] for row in opt.history if "failed" in row["reason"]]


def test_a_small_penalty_beside_the_models_loss_does_not_spoil_the_difference() -> None:
    """`.grad` is then not the gradient of the captured loss: a finite difference from it is far off."""
    _, opt = classifier(lambda o, m: AdaptiveWarmup(o, m, control=False, every=1), penalty=1e-3)
    _, reference = classifier(lambda o, m: AdaptiveWarmup(o, m, control=False, every=1), penalty=1e-9)
    found, expected = (next(iter(list(o.history)[1:]))["sharpness"] for o in (opt, reference))
    assert found == pytest.approx(expected, rel=0.1)


# Of TRL's wheel, by `warmctl run` ------------------------------------------------------------------------------

IN_TURN = """
import sys
from warmctl.__main__ import main

options = sys.argv[1:]
for name in ("sft", "dpo", "reward"):
    places = ["--dataset_name", f"data_{name}", "--output_dir", f"out_{name}"]
    sys.argv = ["warmctl", "run", "-m", f"trl.scripts.{name}", *options, *places]
    try:
        main()
    except SystemExit as done:
        assert not done.code, done.code
"""
OPTIONS = (
    "--use_cpu --model_name_or_path tiny --attn_implementation eager --max_steps 6 --per_device_train_batch_size 4 "
    "--max_length 32 --bf16 False --report_to none --learning_rate 1e-2 --gradient_checkpointing False "
    "--eval_strategy no --save_strategy no"
)
PREFERENCE = {"chosen": "the quick brown fox", "rejected": "a lazy dog"}
ROWS = {"sft": {"text": "the quick brown fox jumps"}, "dpo": {"prompt": "what ", **PREFERENCE}, "reward": PREFERENCE}


def tiny_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {chr(32 + index): index for index in range(95)} | {"<unk>": 95, "<eos>": 96}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": 96, "eos_token_id": 96, "pad_token_id": 96}
    GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2, **ends)).save_pretrained(
        folder
    )


@pytest.mark.slow
def test_scripts_of_trls_wheel(tmp_path: Path) -> None:
    """Slow: imports TRL, and trains by three of its scripts. Two of Accelerate's are in tests/command.

    Their losses are made outside of the model, and are measured on the graph: one has a second derivative, two are
    functions of TRL's own that have none, which is said.
    """
    pytest.importorskip("trl")
    tiny_model(tmp_path / "tiny")
    for name, row in ROWS.items():
        (tmp_path / f"data_{name}").mkdir()
        lines = [json.dumps({key: f"{words} {index}" for key, words in row.items()}) for index in range(32)]
        (tmp_path / f"data_{name}" / "train.jsonl").write_text("\n".join(lines))
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, *OPTIONS.split()],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ROWS:
        history = list(History.from_jsonl(tmp_path / f"{name}.jsonl"))
        failed = [row["reason"] for row in history if "failed" in str(row["reason"])]
        assert len(history) == 6 and int(str(history[-1]["probes"])) >= 2
        if name == "reward":
            assert not failed
        else:
            assert failed and all("cannot be differentiated twice" in str(reason) for reason in failed)
    assert done.stderr.count("warmctl: wrapped AdamW over GPT2") == done.stderr.count("WarmupTrainerMixin") == 3
