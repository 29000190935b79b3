"""Claim 6: detectors that say it all at every place of a grid, and such that propose places first, then look again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, grid_sample, smooth_l1_loss

from benchmarks.tasks.data import digits

FIELD, STRIDE, DIGIT, MOST, CLASSES = 24, 4, 8, 3, 10
CELLS, PROPOSALS, WIDTH = FIELD // STRIDE, 6, 16
NEAR = DIGIT / 3
"""Of two squares as large as a digit, their centres so far apart along one side: half of their union is shared."""
NOTHING = CLASSES


class Found(NamedTuple):
    """Per picture, with as many rows as may be found: scores [B, N], classes [B, N], centres in pixels [B, N, 2]."""

    scores: Tensor
    classes: Tensor
    centres: Tensor


def fields(generator: torch.Generator, batch: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """(pictures [B, 1, 24, 24], digits in them [B, 3, 3]: class or −1, row and column of the centre), noisy.

    One to three digits, each in a half of its own of the field's height or width, so that none lies on another.
    """
    images, labels = digits(held_out)
    x = 0.3 * torch.randn(batch, 1, FIELD, FIELD, generator=generator)
    truth = torch.full((batch, MOST, 3), -1.0)
    counts = torch.randint(1, MOST + 1, (batch,), generator=generator)
    half = FIELD // 2
    for i in range(batch):
        quarters = torch.randperm(4, generator=generator)[: int(counts[i])]
        for slot, quarter in enumerate(quarters.tolist()):
            which = int(torch.randint(0, len(labels), (1,), generator=generator))
            off = torch.randint(0, half - DIGIT + 1, (2,), generator=generator)
            top, left = int(off[0]) + half * (quarter // 2), int(off[1]) + half * (quarter % 2)
            x[i, 0, top : top + DIGIT, left : left + DIGIT] += images[which, 0]
            truth[i, slot] = torch.tensor([float(labels[which]), top + DIGIT / 2, left + DIGIT / 2])
    return x, truth


def on_grid(truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each cell [B, 36]: whether a digit's centre is in it, its class, and where in the cell, [B, 36, 2] in ±½."""
    batch = len(truth)
    there, classes = torch.zeros(batch, CELLS**2), torch.zeros(batch, CELLS**2, dtype=torch.long)
    offsets = torch.zeros(batch, CELLS**2, 2)
    picture, slot = (truth[:, :, 0] >= 0).nonzero(as_tuple=True)
    found = truth[picture, slot]
    place = found[:, 1:] / STRIDE
    cell = place.floor().clamp(max=CELLS - 1)
    at = (cell[:, 0] * CELLS + cell[:, 1]).long()
    there[picture, at], classes[picture, at] = 1.0, found[:, 0].long()
    offsets[picture, at] = place - cell - 0.5
    return there, classes, offsets


def cell_centres() -> Tensor:
    """Row and column in pixels of each cell's centre: [36, 2]."""
    places = (torch.arange(CELLS) + 0.5) * STRIDE
    return torch.cartesian_prod(places, places)


def backbone() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, 2, 1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(WIDTH, 2 * WIDTH, 3, 1, 1), nn.ReLU(),
    )  # fmt: skip


class SingleStage(nn.Module):
    """Presence, class and place of a digit at every cell, most of which hold none."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = backbone(), nn.Conv2d(2 * WIDTH, 1 + CLASSES + 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.head(self.features(x)).flatten(2).transpose(1, 2)
        return out[..., 0], out[..., 1 : 1 + CLASSES], out[..., 1 + CLASSES :]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Summed over cells and divided by the digits there are, as single-stage detectors do."""
        x, truth = batch
        there, classes, offsets = on_grid(truth)
        presence, logits, shift = self(x)
        count, at = there.sum(), there > 0
        return (
            binary_cross_entropy_with_logits(presence, there, reduction="sum")
            + cross_entropy(logits[at], classes[at], reduction="sum")
            + smooth_l1_loss(shift[at], offsets[at], reduction="sum")
        ) / count

    def detect(self, x: Tensor) -> Found:
        presence, logits, shift = self(x)
        sure, classes = logits.softmax(-1).max(-1)
        return Found(presence.sigmoid() * sure, classes, cell_centres() + STRIDE * shift)


class TwoStage(nn.Module):
    """Proposes cells by presence and place, then looks at what lies round each: class or nothing, and place again."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.propose = backbone(), nn.Conv2d(2 * WIDTH, 3, 1)
        self.head = nn.Sequential(nn.Linear(2 * WIDTH * 9, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, CLASSES + 1 + 2))

    def proposals(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features(x)
        out = self.propose(features).flatten(2).transpose(1, 2)
        return features, out[..., 0], out[..., 1:]

    def look(self, features: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and shifts in pixels for centres [B, N, 2], from 3 × 3 features round each."""
        around = torch.tensor([-1.0, 0.0, 1.0]) * STRIDE
        points = centres[:, :, None] + torch.cartesian_prod(around, around)
        grid = (2 * points / FIELD - 1).flip(-1)  # grid_sample has x before y
        seen = grid_sample(features, grid, align_corners=False).permute(0, 2, 3, 1).flatten(2)
        out = self.head(seen)
        return out[..., : CLASSES + 1], STRIDE * out[..., CLASSES + 1 :]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of the proposals as above; of the second look as a mean over what it looked at, truth among it."""
        x, truth = batch
        there, _, offsets = on_grid(truth)
        features, presence, shift = self.proposals(x)
        at, count = there > 0, there.sum()
        first = binary_cross_entropy_with_logits(presence, there, reduction="sum") / count
        first = first + smooth_l1_loss(shift[at], offsets[at], reduction="sum") / count
        with torch.no_grad():
            best = self.chosen(presence, shift)[1]
            centres = torch.cat([best, truth[:, :, 1:].clamp(min=0.0)], 1)
        apart = (centres[:, :, None] - truth[:, None, :, 1:]).abs().amax(-1)
        apart = apart.masked_fill(truth[:, None, :, 0] < 0, torch.inf)
        nearest, which = apart.min(-1)
        hit = nearest < NEAR
        mine = truth.gather(1, which[..., None].expand(-1, -1, 3))
        classes = torch.where(hit, mine[..., 0].long(), NOTHING)
        logits, moved = self.look(features, centres)
        second = cross_entropy(logits.flatten(0, 1), classes.flatten())
        return first + second + smooth_l1_loss(moved[hit] / STRIDE, (mine[..., 1:] - centres)[hit] / STRIDE)

    def chosen(self, presence: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The cells that a digit is most likely in: their scores, and the centres that they propose."""
        scores, cells = presence.sigmoid().topk(PROPOSALS, dim=1)
        centres = cell_centres() + STRIDE * shift
        return scores, centres.gather(1, cells[..., None].expand(-1, -1, 2)).clamp(0, FIELD)

    def detect(self, x: Tensor) -> Found:
        features, presence, shift = self.proposals(x)
        scores, centres = self.chosen(presence, shift)
        logits, moved = self.look(features, centres)
        sure, classes = logits.softmax(-1)[..., :CLASSES].max(-1)
        return Found(scores * sure, classes, centres + moved)


def average_precision(found: Found, truth: Tensor) -> float:
    """Area under precision over recall, all classes together: hits have the class and half of the union.

    A digit is hit once, by the surest detection near it; further ones are false alarms.
    """
    apart = (found.centres[:, :, None] - truth[:, None, :, 1:]).abs()
    shared = ((DIGIT - apart).clamp(min=0) / DIGIT).prod(-1)
    overlap = shared / (2 - shared)
    fits = (overlap >= 0.5) & (found.classes[..., None] == truth[:, None, :, 0]) & (truth[:, None, :, 0] >= 0)
    taken = torch.zeros(truth.shape[:2], dtype=torch.bool)
    hits = []
    for flat in found.scores.flatten().argsort(descending=True, stable=True).tolist():
        picture, place = divmod(flat, found.scores.shape[1])
        free = fits[picture, place] & ~taken[picture]
        hits.append(bool(free.any()))
        if hits[-1]:
            taken[picture, int(free.float().argmax())] = True
    hit = torch.tensor(hits, dtype=torch.float64)
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    precision = precision.flip(0).cummax(0).values.flip(0)
    return float((precision * hit).sum() / (truth[:, :, 0] >= 0).sum())
