"""The texts of the files of a new project. `$name` stands for a value.

Tests: tests/surface/test_new.py
"""

from __future__ import annotations

README = """# $name

$about
The settings are in experiment.toml. `atoll run --help` lists all.

    atoll run experiment.toml --smoke     # try every stage once
    atoll run experiment.toml             # train; the result is a folder in runs/
    atoll show latest                     # the curves, the best values, the failures
    $module_line
    pytest                                # the test of this folder
"""

TEST = '''"""The experiment trains, and all metrics are finite."""

import math
from pathlib import Path

import atoll


def test_the_experiment_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    experiment = atoll.Experiment.read("experiment.toml").override(rounds=2, out=str(tmp_path))
    run = experiment.train(report=False)
    assert (run.status, run.rounds) == ("done", 2)
    assert all(math.isfinite(value) for value in run.metrics.values())
'''

STUDY = '''"""Train the experiment of this folder, and print its result."""

import atoll


def main() -> None:
    run = atoll.Experiment.read("experiment.toml").train()
    print(run.summary())


if __name__ == "__main__":
    main()
'''

NET = '''"""The model of the experiment. `model = "my_model:net"` in experiment.toml names this function."""

import math

from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, 64)
        self.last = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x.flatten(1)).relu())


def net(features: tuple[int, ...], outputs: int) -> nn.Module:
    """features: the shape of a row; outputs: the number of classes, or of numbers to predict."""
    return Net(math.prod(features), outputs)
'''

TRANSFORMER = '''"""A BERT with random weights. `model = "my_model:net"` in experiment.toml names its function.

It needs transformers: pip install "atoll[hf]". Each feature of a row is a token, as in FT-Transformer (Gorishniy et
al., 2021). For text, tokenize a `datasets.Dataset` and read it with `atoll.data.hf`.
"""

import math

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

WIDTH = 32


class Net(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        sizes = {"vocab_size": 1, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(max_position_embeddings=inputs, intermediate_size=2 * WIDTH, **sizes, **dropout)
        self.scale = nn.Parameter(torch.randn(inputs, WIDTH) / math.sqrt(WIDTH))
        self.bert = BertModel(config, add_pooling_layer=False)
        self.last = nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1)[:, :, None] * self.scale
        return self.last(self.bert(inputs_embeds=tokens).last_hidden_state.mean(1))


def net(features: tuple[int, ...], outputs: int) -> nn.Module:
    """features: the shape of a row; outputs: the number of classes, or of numbers to predict."""
    return Net(math.prod(features), outputs)
'''

LOOP = '''"""The training loop of a client. `Custom(my_loop:train)` in experiment.toml names this function."""

import torch
from torch import nn

from atoll.plan.local import Context, Loader


def train(model: nn.Module, loader: Loader, ctx: Context) -> dict[str, float]:
    """Train the model in place. Return metrics; each is averaged over the clients by their rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=ctx.lr, momentum=0.9)
    total = 0.0
    for x, y in loader:
        optimizer.zero_grad()
        loss = difference(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * len(x)
    return {"loss": total / loader.rows}


def difference(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean loss: squared differences for numbers, cross entropy for classes."""
    if y.is_floating_point():
        return nn.functional.mse_loss(output.reshape(y.shape), y)
    return nn.functional.cross_entropy(output, y)
'''

ESTIMATOR = '''"""Fit a pipeline whose last step trains by federated learning, and print its score."""

from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline

from atoll.sklearn import FederatedClassifier


def fit() -> tuple[Pipeline, float]:
    """The fitted pipeline, and its score on rows that it has not seen."""
    X, y = load_breast_cancer(return_X_y=True)
    train_X, test_X, train_y, test_y = train_test_split(X, y, test_size=0.2, random_state=0)
    pipeline = make_pipeline(FederatedClassifier(clients=10, rounds=20))
    pipeline.fit(train_X, train_y)
    return pipeline, pipeline.score(test_X, test_y)


if __name__ == "__main__":
    print(fit()[1])
'''

TABLE_ESTIMATOR = '''"""Fit a pipeline whose last step trains by federated learning, and print its score."""

import pandas
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder

from atoll.sklearn import $estimator

DATA = $data
TARGET = $target


def fit() -> tuple[Pipeline, float]:
    """The fitted pipeline, and its score on rows that it has not seen."""
    table = pandas.$reader(DATA$separator)
    y = table.pop(TARGET)
    train_X, test_X, train_y, test_y = train_test_split(table, y, test_size=0.2, random_state=0)
    levels = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    columns = make_column_transformer(
        (levels, make_column_selector(dtype_exclude="number")), remainder=SimpleImputer()
    )
    pipeline = make_pipeline(columns, $estimator(clients=10, rounds=20))
    pipeline.fit(train_X, train_y)
    return pipeline, pipeline.score(test_X, test_y)


if __name__ == "__main__":
    print(fit()[1])
'''
