"""FSDP2: a transformer sharded over two processes by `fully_shard`, on the CPU by gloo.

    torchrun --nproc-per-node 2 examples/fsdp2.py       (python examples/fsdp2.py is one process)

Shard first, then build the optimizer and wrap it. Curvature is measured by finite differences of the sharded gradient;
every process takes the same decision. Data are the standard library's source. The peak rate is far too high: bare, the
model learns how frequent each byte is (2.93 on the text held out) and no more. `control=False` only measures: that
run is AdamW's own, bit for bit.
"""

import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from warmctl import AdaptiveWarmup

PEAK_RATE, STEPS, BATCH, LENGTH, WIDTH = 0.1, 80, 16, 64, 64

text = b"".join(file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))[:1_000_000]
data = torch.tensor(list(text))
held_out = data[-100 * (LENGTH + 1) :].view(100, LENGTH + 1)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(block, 2)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes [B, T] to logits [B·T, 256]."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        hidden = self.tokens(tokens) + self.positions(torch.arange(LENGTH))
        return self.head(self.body(hidden, mask, is_causal=True).flatten(0, 1))


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def run(control: bool) -> tuple[float, float]:
    """Loss on held-out text, before and after training."""
    torch.manual_seed(0)
    model = Transformer()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.body.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE)
    optimizer = AdaptiveWarmup(optimizer, model, control=control)  # the only new line
    if dist.get_rank() == 0:
        optimizer.history.to_jsonl(f"fsdp2_{'adaptive' if control else 'bare'}.jsonl")
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def loss_on(windows: Tensor) -> Tensor:
        return F.cross_entropy(model(windows[:, :-1]), windows[:, 1:].flatten())

    @torch.no_grad()
    def evaluate() -> float:
        return loss_on(held_out).item()

    start = evaluate()
    torch.manual_seed(1 + dist.get_rank())  # from here on each process has data of its own
    for step in range(STEPS):
        starts = torch.randint(len(data) - held_out.numel() - LENGTH, (BATCH // dist.get_world_size(), 1))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_on(data[starts + torch.arange(LENGTH + 1)])
            loss.backward()
            return loss

        optimizer.step(closure)
        decay.step()
        if step % 30 == 29:
            now, loss = optimizer.metrics, evaluate()
            say(f"step {step + 1:3}  loss {loss:.3f}  scale {now['scale']:.3f}  ratio {now['stability_ratio']:.2f}")
    return start, evaluate()


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        print("one process; for two: torchrun --nproc-per-node 2 examples/fsdp2.py")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    say(f"bare AdamW, peak rate {PEAK_RATE}")
    start, bare = run(control=False)
    say("the same with AdaptiveWarmup")
    _, adaptive = run(control=True)
    assert adaptive < bare < start
    say(f"held-out loss: {start:.3f} at the start, {bare:.3f} with bare AdamW, {adaptive:.3f} with AdaptiveWarmup")
    dist.destroy_process_group()
