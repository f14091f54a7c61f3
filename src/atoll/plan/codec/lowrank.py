"""Low-rank compression: each matrix of the update is sent as a product of two thin matrices.

Tests: tests/identities/test_codecs_memory.py, tests/rates/test_codec_theory.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute.layout import Layout
from atoll.plan.codec import grid
from atoll.plan.codec.stage import Codec, Encoded, flat_layout
from atoll.plan.form import Field, Form
from atoll.plan.protocols import RoundInfo, Tensors, Total


class Piece(NamedTuple):
    """One tensor of the model: its start in θ and its shape m × n. n = 0 means that it is sent uncompressed."""

    start: int
    m: int
    n: int

    @property
    def size(self) -> int:
        return self.m * max(1, self.n)


def matrices(layout: Layout, rank: int) -> list[Piece]:
    """The tensors of θ. One of two or more axes is a matrix if its two factors are smaller than the matrix."""
    out, start = [], 0
    for entry in layout.segment("params"):
        m, n = (entry.shape[0], prod(entry.shape[1:])) if len(entry.shape) > 1 else (entry.size, 0)
        low_rank = n and rank * (m + n) < m * n
        out.append(Piece(start, m if low_rank else entry.size, n if low_rank else 0))
        start += entry.size
    return out


def orthonormal(p: Tensor) -> Tensor:
    """Columns `[m, r]` orthonormalised from left to right, by two passes; a linearly dependent column becomes 0."""
    columns: list[Tensor] = []
    for column in p.unbind(-1):
        before = grid.ordered_sum(column * column)
        for _ in range(2):
            for other in columns:
                column = column - other * grid.ordered_sum(other * column)
        after = grid.ordered_sum(column * column)
        independent = after > 1e-10 * before
        length = torch.where(independent, after, torch.ones_like(after)).sqrt()
        columns.append(torch.where(independent, column / length, torch.zeros_like(column)))
    return torch.stack(columns, -1)


@dataclass(frozen=True, repr=False)
class LowRank(Codec):
    """Sends two thin factors of each matrix instead of the matrix. Vectors are sent uncompressed.

    P = orth(M Q),   Q' = Mᵀ P,   M̂ = P Q'ᵀ: the projection of M onto r directions;   Q from the last round's mean

    Each round makes one step of the power method from the result of the last round. On a constant matrix the error
    tends to the energy of the singular values after the r-th. The codec is a contraction; use it as
    `ErrorFeedback(LowRank(2))`. A kernel of more than two axes is read as a matrix: its first axis by all others. A
    matrix is sent uncompressed if this is shorter.

    Message: for each tensor in the model's order P, m × r, then Q', n × r, or the tensor itself, in the run's dtype.

    Server state: `q`, the start of the next power step. It is sent to clients with θ.

    Args:
        rank: r, the number of columns of the two factors, ≥ 1.
    Raises:
        UsageError: the rank is not an integer ≥ 1.
    Example:
        >>> layout = Layout.of(torch.nn.Linear(50, 40))
        >>> LowRank(2).nbytes(layout) / (4 * layout.d)
        0.10784313725490197

    Reference: Vogels, Karimireddy and Jaggi, PowerSGD, 2019.
    """

    per_message = True
    needs_model_coordinates = True

    rank: int = field(metadata={"example": 4})

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise UsageError(
                f"LowRank({self.rank!r}).", "a rank ≥ 1, a whole number.", "the rank counts directions.", "LowRank(2)"
            )

    def _length(self, layout: Layout) -> int:
        return sum(self.rank * (p.m + p.n) if p.n else p.m for p in matrices(layout, self.rank))

    def output_layout(self, layout: Layout) -> Layout:
        return flat_layout(self._length(layout), layout.dtype)

    def form(self, layout: Layout) -> Form:
        return Form({}, Field(layout.dtype, self._length(layout)))

    def server(self, layout: Layout) -> Tensors:
        length = sum(p.n for p in matrices(layout, self.rank)) * self.rank
        return {"q": Key(0).fold("LowRank", self.rank).normal(length, layout.dtype)}

    def _starts(self, q: Tensor) -> list[Tensor]:
        lengths = [p.n * self.rank for p in matrices(self.layout, self.rank)]
        return [part.view(-1, self.rank) for part in q.split(lengths)]

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        cut = list(zip(matrices(self.layout, self.rank), self._starts(shared["q"]), strict=True))
        rows = []
        for lane in x:  # one by one, since a batched product may add in another order than a single product
            out = []
            for piece, q in cut:
                whole = lane[piece.start : piece.start + piece.size]
                if piece.n:
                    matrix = whole.view(piece.m, piece.n)
                    p = orthonormal(matrix @ q)
                    out += [p.flatten(), (matrix.T @ p).flatten()]
                else:
                    out.append(whole)
            rows.append(torch.cat(out))
        return torch.stack(rows), {}, {}, memory

    def decode(self, x: Tensor, side: Tensors) -> Tensor:
        out = x.new_empty(len(x), self.layout.d)
        for lane, target in zip(x, out, strict=True):
            start = 0
            for piece in matrices(self.layout, self.rank):
                into = target[piece.start : piece.start + piece.size]
                length = self.rank * (piece.m + piece.n) if piece.n else piece.m
                sent = lane[start : start + length]
                if piece.n:
                    p, q = (t.view(-1, self.rank) for t in sent.split((self.rank * piece.m, self.rank * piece.n)))
                    torch.mm(p, q.T, out=into.view(piece.m, piece.n))
                else:
                    into.copy_(sent)
                start += length
        return out

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        update = total.means.get("update")
        if update is None:
            return total, server
        after = []
        for piece, q in zip(matrices(self.layout, self.rank), self._starts(server["q"]), strict=True):
            if piece.n:
                matrix = update[piece.start : piece.start + piece.size].view(piece.m, piece.n)
                new = orthonormal(matrix.T @ orthonormal(matrix @ q.to(matrix.dtype))).to(q.dtype)
                # A direction in which the update is 0 keeps its start.
                after.append(torch.where((new == 0).all(0), q, new).flatten())
        return total, {"q": torch.cat(after) if after else server["q"]}
