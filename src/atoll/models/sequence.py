"""Sequence models: rows are tokens, or numbers at each position.

Tests: tests/identities/test_models.py, tests/identities/test_shakespeare.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Lstm(nn.Module):
    """An LSTM and a linear head: `[B, T]` token ids or `[B, T, F]` features → `[B, outputs]` at the last position.

    For tokens the model has an embedding of dimension 8 and two LSTM layers of hidden size 256. For features it has
    no embedding and one LSTM layer of hidden size 64.

    Args:
        vocab: the size of the vocabulary; None: the inputs are features.
        width: the number F of features at each position; unused for tokens.
        outputs: the number of outputs at a position.
        every_place: whether to return the outputs at every position, `[B, T, outputs]`.
    Example:
        >>> Lstm(vocab=65, width=1, outputs=65, every_place=True)(torch.zeros(2, 7, dtype=torch.int64)).shape
        torch.Size([2, 7, 65])
    """

    def __init__(self, vocab: int | None, width: int, outputs: int, every_place: bool) -> None:
        super().__init__()
        inputs, hidden, layers = (width, 64, 1) if vocab is None else (8, 256, 2)
        self.embed = nn.Identity() if vocab is None else nn.Embedding(vocab, inputs)
        self.lstm = nn.LSTM(inputs, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, outputs)
        self.every_place = every_place

    def forward(self, x: Tensor) -> Tensor:
        places: Tensor = self.lstm(self.embed(x))[0]
        out: Tensor = self.head(places if self.every_place else places[:, -1])
        return out


class Block(nn.Module):
    """One pre-norm layer of a transformer. It uses plain matrix products, so that it works under vmap.

    x ← x + attention(norm₁(x)) ; x ← x + mlp(norm₂(x))

    Args:
        width: numbers at a position; a multiple of `heads`.
        heads: the number of attention heads.
        causal: whether a position attends only to itself and earlier positions.
    Example:
        >>> Block(width=8, heads=2, causal=True)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attention(self, x: Tensor) -> Tensor:
        """Compute softmax(q kᵀ / √w) v over the positions of each row, `[B, T, width]` → `[B, T, width]`."""
        length, width = x.shape[-2:]
        each = width // self.heads
        split = self.qkv(x).reshape(-1, length, 3, self.heads, each)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) / math.sqrt(each)
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        mixed: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, length, width))
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """Blocks with learned positions: `[B, T]` tokens or `[B, T, F]` numbers → `[B, outputs]` of the mean position.

    Args:
        vocab: the number of tokens, with four blocks of width 128; None for numbers, with two blocks of width 64.
        length: the most positions in a row.
        width: numbers at a position; unused for tokens.
        outputs: length of the last axis.
        every_place: whether to return outputs at every position, `[B, T, outputs]`, with causal attention.
    Example:
        >>> Transformer(None, length=9, width=3, outputs=2, every_place=False)(torch.zeros(4, 9, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(self, vocab: int | None, length: int, width: int, outputs: int, every_place: bool) -> None:
        super().__init__()
        inner, blocks = (64, 2) if vocab is None else (128, 4)
        self.embed = nn.Linear(width, inner) if vocab is None else nn.Embedding(vocab, inner)
        self.place = nn.Parameter(torch.empty(length, inner))
        self.blocks = nn.Sequential(*(Block(inner, 4, causal=every_place) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(inner), nn.Linear(inner, outputs)
        self.every_place = every_place
        # torch initializes embeddings with standard deviation 1, which would dominate the output of the blocks.
        for table in (self.place, *([] if vocab is None else [self.embed.weight])):
            nn.init.normal_(table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        places = self.norm(self.blocks(self.embed(x) + self.place[: x.shape[1]]))
        out: Tensor = self.head(places if self.every_place else places.mean(1))
        return out
