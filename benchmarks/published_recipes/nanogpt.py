"""nanoGPT on a CPU: README, "I only have a macbook", over config/train_shakespeare_char.py and train.py's defaults."""

from __future__ import annotations

import sysconfig
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.harness.data import Batch, text_batches
from benchmarks.published_recipes.recipe import Recipe, cosine_to_a_tenth

CONTEXT, BATCH = 64, 12
LAYERS, HEADS, WIDTH = 4, 4, 128
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.99), 0.1, 1.0
EVAL_BATCH = 64  # windows; the whole held-out text is read once

STANDARD_LIBRARY = (
    "argparse", "calendar", "codecs", "configparser", "contextlib", "dataclasses", "difflib", "doctest", "enum",
    "inspect", "ipaddress", "mailbox", "optparse", "pickle", "shutil", "smtplib", "subprocess", "tarfile",
)  # fmt: skip
"""Modules whose source is the text where none is given: as long as Tiny Shakespeare, in one alphabet."""


def nanogpt(text: Path | None = None) -> Recipe:
    """The recipe on a text, Tiny Shakespeare in the publication; its name has the file's."""
    return Recipe(
        name=f"nanogpt/{text.stem if text else 'standard-library'}",
        lr=1e-3,
        steps=2000,
        warmup=100,
        stated=1.88,
        score="loss",
        model=lambda: GPT(int(torch.cat(split(text)).max()) + 1),
        rule=optimizer,
        stream=lambda generator: text_batches(split(text)[0], generator, BATCH, CONTEXT),
        held_out=partial(windows, text),
        decay=cosine_to_a_tenth,
        clip=CLIP,
    )


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.attention = Attention(width, heads)
        self.rise, self.fall = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fall(F.gelu(self.rise(self.norm2(x))))


class GPT(nn.Module):
    """Characters [B, T] to logits [B, T, symbols]: pre-LN, no biases, no dropout, head and embedding tied."""

    def __init__(self, symbols: int, layers: int = LAYERS, heads: int = HEADS, width: int = WIDTH) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(symbols, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        into_residual = {module for block in self.blocks for module in (block.attention.out, block.fall)}
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if module in into_residual else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return F.linear(self.norm(self.blocks(hidden)), self.tokens.weight)


def optimizer(model: nn.Module, lr: float) -> Optimizer:
    """AdamW; matrices and embeddings decay, the scales of layer norm do not."""
    matrices, others = ([p for p in model.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr, betas=BETAS)


@lru_cache
def split(text: Path | None) -> tuple[Tensor, Tensor]:
    """(train, held out): the first nine tenths and the last, each character its place among those that occur."""
    if text is None:
        folder = Path(sysconfig.get_path("stdlib"))
        words = "".join((folder / f"{module}.py").read_text("utf-8") for module in STANDARD_LIBRARY)
    else:
        words = text.read_text("utf-8")
    place = {character: i for i, character in enumerate(sorted(set(words)))}
    symbols = torch.tensor([place[character] for character in words])
    cut = int(len(words) * 0.9)
    if len(words) - cut <= CONTEXT * EVAL_BATCH:
        raise ValueError(f"{text} has {len(words)} characters; a tenth of it has to hold {EVAL_BATCH} windows")
    return symbols[:cut], symbols[cut:]


@lru_cache
def windows(text: Path | None) -> list[Batch]:
    """Successive windows of the held-out text, up to its last whole batch; nanoGPT draws them, which adds noise."""
    data = split(text)[1]
    count = (len(data) - 1) // CONTEXT // EVAL_BATCH * EVAL_BATCH
    x, y = (data[i : i + count * CONTEXT].view(-1, EVAL_BATCH, CONTEXT) for i in (0, 1))
    return list(zip(x, y, strict=True))
