"""nanoGPT's training loop: the rate written by hand, gradient accumulation, a GradScaler, clipping.

    python examples/nanogpt_style.py

The model returns (logits, loss); the wrapper finds the loss there, and the loop stays as it is but for
`warmup_iters = 0`. Data are the standard library's source. The peak rate is far too high: the bare run
is stuck near 3 nats a byte for most of its steps, with AdaptiveWarmup it goes on learning. `control=False` only
measures: that run is AdamW's own, bit for bit.
"""

import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from warmctl import AdaptiveWarmup

batch_size, block_size, n_layer, n_head, n_embd = 8, 64, 2, 4, 64
learning_rate, min_lr, warmup_iters, max_iters = 1e-1, 1e-2, 0, 200
gradient_accumulation_steps, grad_clip, eval_interval = 2, 1.0, 40

text = b"".join(file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))[:1_000_000]
data = torch.tensor(list(text))
splits = {"train": data[:900_000], "val": data[900_000:]}


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, n_embd), nn.Embedding(block_size, n_embd)
        block = nn.TransformerEncoderLayer(n_embd, n_head, 4 * n_embd, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.h = nn.TransformerEncoder(block, n_layer, nn.LayerNorm(n_embd), enable_nested_tensor=False)
        self.lm_head = nn.Linear(n_embd, 256, bias=False)
        for p in self.parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets):
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
        logits = self.lm_head(self.h(self.wte(idx) + self.wpe.weight, mask, is_causal=True))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def get_batch(split):
    start = torch.randint(len(splits[split]) - block_size, (batch_size, 1))
    window = splits[split][start + torch.arange(block_size + 1)]
    return window[:, :-1], window[:, 1:]


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    return min_lr + 0.5 * (1 + math.cos(math.pi * it / max_iters)) * (learning_rate - min_lr)


@torch.no_grad()
def estimate_loss(model):
    return sum(model(*get_batch("val"))[1].item() for _ in range(20)) / 20


def train(control):
    torch.manual_seed(1337)
    model, losses = GPT(), []
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = AdaptiveWarmup(optimizer, model, control=control)  # the only new line
    optimizer.history.to_jsonl(f"nanogpt_style_{'adaptive' if control else 'bare'}.jsonl")
    X, Y = get_batch("train")
    for iter_num in range(max_iters + 1):
        for param_group in optimizer.param_groups:
            param_group["lr"] = get_lr(iter_num)
        if iter_num % eval_interval == 0:
            losses.append(estimate_loss(model))
            m = optimizer.metrics
            print(f"iter {iter_num:3}: val loss {losses[-1]:.3f}, {m['phase']}, scale {m['scale']:.3f}", end="")
            print(f", ratio {m['stability_ratio']:.2f}")
        for _ in range(gradient_accumulation_steps):
            _, loss = model(X, Y)
            X, Y = get_batch("train")
            scaler.scale(loss / gradient_accumulation_steps).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return losses[0], losses[-1]


if __name__ == "__main__":
    print(f"bare AdamW, peak rate {learning_rate}")
    start, bare = train(control=False)
    print("the same with AdaptiveWarmup")
    _, adaptive = train(control=True)
    assert adaptive < bare < start
    print(f"val loss: {start:.3f} at the start, {bare:.3f} with bare AdamW, {adaptive:.3f} with AdaptiveWarmup")
