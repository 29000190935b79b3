"""Models of many kinds, an update of their parameters, and how far it moves their outputs: all of them, looked at."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warmctl.loss.replay import Replay
from warmctl.stability.representation import RepresentationChange

Loss = Callable[[], Tensor]


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def replay_of(model: nn.Module, loss: Loss) -> Replay:
    return Replay.of_loss(loss, trainable(model), module=model)


@torch.no_grad()
def shake(model: nn.Module, size: float = 0.1, seed: int = 5) -> None:
    """An update: every trainable parameter moves by `size` of its norm, those at zero by `size` an entry."""
    generator = torch.Generator().manual_seed(seed)
    for p in trainable(model):
        noise = torch.randn(p.shape, generator=generator).to(p)
        p += noise * size * (p.norm() / noise.norm() if p.any() else 1.0)


def measured(model: nn.Module, loss: Loss, update: Callable[[], None] | None = None) -> float:
    replay, change = replay_of(model, loss), RepresentationChange(model)
    change.before(replay)
    (update or (lambda: shake(model)))()
    return change.after(replay)


def whole_outputs(layers: list[nn.Module], loss: Loss) -> list[Tensor]:
    """What these modules return on the batch, all of it, in the order of the calls."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        first = first.data if isinstance(first, nn.utils.rnn.PackedSequence) else first
        outputs.append(first.detach().double().clone())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    loss()
    for handle in handles:
        handle.remove()
    return outputs


def exact(model: nn.Module, layers: list[nn.Module], loss: Loss, update: Callable[[], None] | None = None) -> float:
    """The median over these layers, on a copy of the streams; leaves the parameters moved."""
    streams, buffers = torch.get_rng_state(), {k: v.clone() for k, v in model.named_buffers()}

    def look() -> list[Tensor]:
        torch.set_rng_state(streams)
        for name, buffer in model.named_buffers():
            buffer.data.copy_(buffers[name])
        return whole_outputs(layers, loss)

    old = look()
    (update or (lambda: shake(model)))()
    new = look()
    return statistics.median(float((b - a).norm() / a.norm()) for a, b in zip(old, new, strict=True))


class OwnParameters(nn.Module):
    """A norm and an attention written by hand: parameters of their own and functional kernels."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.qkv = nn.Parameter(torch.randn(width, 3 * width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.rms_norm(x, x.shape[-1:]) * self.scale @ self.qkv).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class LoRA(nn.Module):
    """As peft's: a frozen base layer and two small matrices in ModuleDicts, the second zero at first."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Any:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Recurrent(nn.Module):
    """A fused recurrence, a cell a position, and a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell, self.packed = nn.LSTM(6, 5, batch_first=True), nn.GRUCell(5, 4), nn.RNN(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x)
        state = torch.zeros(len(x), 4)
        for position in range(hidden.shape[1]):
            state = self.cell(hidden[:, position], state)
        sequence = nn.utils.rnn.pack_padded_sequence(hidden, [hidden.shape[1]] * len(x), batch_first=True)
        out, _ = self.packed(sequence)
        return state.square().mean() + out.data.square().mean()


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(self.embedding(x))))


def conv_net() -> nn.Sequential:
    """A ReLU in place behind a layer, a dropout, a batch norm and a channels-last image."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.GroupNorm(2, 8),
        nn.Conv2d(8, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def squared(model: nn.Module, x: Tensor) -> Loss:
    return lambda: model(x).square().mean()


def image(size: int = 2) -> Tensor:
    return torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def sequence() -> Tensor:
    return torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))


def children(*kinds: type[nn.Module]) -> Callable[[nn.Module], list[nn.Module]]:
    return lambda model: [m for m in model.modules() if isinstance(m, kinds)]
