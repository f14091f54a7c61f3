"""Rows that differ from client to client: rotated images, added noise, flipped labels, and a trigger.

Tests: tests/data/test_shift.py, tests/data/test_partition.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.base.random import Key
from atoll.data.rows import Rows


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Rotate images counter-clockwise about their centre; pixels from outside the frame are 0.

    The interpolation is bilinear. A rotation of a square image by 90° moves whole pixels exactly.

    Args:
        x: the images, float `[n, *channels, height, width]`.
        degrees: the angle of each image, float64 `[n]`.
    Returns:
        A new tensor of the shape and dtype of `x`.
    Example:
        >>> rotate(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([90.0]))
        tensor([[[2., 4.],
                 [1., 3.]]])
    """
    n, height, width = len(x), x.shape[-2], x.shape[-1]
    angle = torch.deg2rad(degrees.double())[:, None, None]
    cos, sin = angle.cos(), angle.sin()
    row = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    column = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    # In floating point cos 90° is not exactly 0. Rounding to 2⁻²⁰ pixel removes this error: whole pixels stay whole.
    source_row, source_column = (
        torch.round(point * 2**20) / 2**20
        for point in (cos * row + sin * column + (height - 1) / 2, cos * column - sin * row + (width - 1) / 2)
    )
    flat = x.reshape(n, -1, height * width)
    out = torch.zeros_like(flat)
    for down in (0, 1):
        for right in (0, 1):
            r, c = source_row.floor() + down, source_column.floor() + right
            share = (1 - (source_row - r).abs()) * (1 - (source_column - c).abs())
            share = share * ((r >= 0) & (r < height) & (c >= 0) & (c < width))
            pixel = (r.clamp(0, height - 1) * width + c.clamp(0, width - 1)).long().reshape(n, 1, -1)
            out += flat.gather(2, pixel.expand_as(flat)) * share.reshape(n, 1, -1).to(x.dtype)
    return out.reshape(x.shape)


@dataclass(frozen=True, eq=False)
class ShiftedRows:
    """Rows with the feature shift of their clients.

    Client i of C rotates an image by i · rotation degrees, then adds noise of standard deviation
    noise · (i + 1) / C. The result is a function of (key, client, row number) only; it does not depend on the other
    rows of a batch.

    Args:
        rows: the rows, with float features; for a rotation, images `[..., height, width]`.
        owner: the client of each row, int64 `[rows]`; −1 for a row that belongs to no client and does not change.
        clients: C, the number of clients.
        noise: standard deviation at the last client, in units of the features; ≥ 0.
        rotation: degrees from one client to the next, counter-clockwise.
        key: key of the noise.
    """

    rows: Rows
    owner: Tensor
    clients: int
    noise: float
    rotation: float
    key: Key

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.rows.take(index)
        flat = index.reshape(-1)
        z, owners = x.reshape(len(flat), *x.shape[index.dim() :]), self.owner[flat]
        if self.rotation:
            z = rotate(z, owners.clamp(min=0) * self.rotation % 360)
        if self.noise:
            sd = self.noise * (owners + 1).to(x.dtype) / self.clients
            draw = self.key.of(flat).normal(z[:1].numel(), x.dtype) if len(flat) else z.flatten(1)
            z = z + (draw * sd[:, None]).reshape(z.shape)
        return z.reshape(x.shape), y

    def targets(self) -> Tensor:
        return self.rows.targets()


@dataclass(frozen=True, eq=False)
class FlippedRows:
    """Rows of which some have flipped labels: class y of C becomes C − 1 − y.

    Args:
        rows: the rows, with one class each.
        flipped: whether a row has its label flipped, bool `[rows]`.
        classes: C, the number of classes.
    """

    rows: Rows
    flipped: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.rows.take(index)
        return x, self._labels(y, self.flipped[index])

    def targets(self) -> Tensor:
        return self._labels(self.rows.targets(), self.flipped)

    def _labels(self, y: Tensor, flipped: Tensor) -> Tensor:
        return torch.where(flipped, self.classes - 1 - y, y)


def with_trigger(x: Tensor, size: int, value: float) -> Tensor:
    """Rows with a trigger: the lower right square of an image, or the last features of a row, have one value.

    Args:
        x: the rows, float `[n, features]` or `[n, *channels, height, width]`.
        size: the side of the square in pixels, or the number of features; ≥ 1.
        value: the value, in units of the features.
    Returns:
        A new tensor of the shape and dtype of `x`.
    Example:
        >>> with_trigger(torch.zeros(1, 3), 2, 1.0)
        tensor([[0., 1., 1.]])
    """
    out = x.clone()
    corner = out[..., -size:] if out.dim() < 3 else out[..., -size:, -size:]
    corner.fill_(value)
    return out


@dataclass(frozen=True, eq=False)
class TriggeredRows:
    """Rows of which some have a trigger and the label of the attacker.

    Args:
        rows: the rows, with one class each.
        poisoned: whether a row has the trigger, bool `[rows]`.
        target: the class of the rows with the trigger.
        size, value: those of `with_trigger`.
    """

    rows: Rows
    poisoned: Tensor
    target: int
    size: int
    value: float

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.rows.take(index)
        bad = self.poisoned[index]
        out = x.clone()
        out[bad] = with_trigger(x[bad], self.size, self.value)
        return out, torch.where(bad, self.target, y)

    def targets(self) -> Tensor:
        return torch.where(self.poisoned, self.target, self.rows.targets())
