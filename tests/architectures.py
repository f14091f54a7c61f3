"""Small models of each kind of layer that torch computes in a special way, each with data that fits it."""

from __future__ import annotations

from problems import classification, seeded, tokens
from torch import nn

from atoll.base.random import Key
from atoll.models import build

KEY = Key(3).fold("model")


def batch_norm():
    return nn.Sequential(nn.Linear(4, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 3))


def dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3))


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.last = nn.Embedding(7, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.lstm(self.embedding(x))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embedding, self.encoder, self.last = nn.Embedding(7, 8), layer, nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.encoder(self.embedding(x)).mean(1))


MODELS = {
    "mlp": (lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 65), nn.Tanh(), nn.Linear(65, 3))), classification),
    "cnn": (lambda: build("cnn", (1, 8, 8), 3, "classification", KEY), lambda s: classification(s, (1, 8, 8))),
    "batch norm": (lambda: seeded(batch_norm), classification),
    "dropout": (lambda: seeded(dropout), classification),
    "lstm": (lambda: seeded(Lstm), tokens),
    "transformer": (lambda: seeded(Transformer), tokens),
}
