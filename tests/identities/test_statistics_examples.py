"""The examples of federated statistics give the results of the joined rows."""

import importlib.util
from pathlib import Path

import torch

import atoll

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wine(clients):
    return atoll.data.load("wine").split(clients=clients, by=atoll.data.Dirichlet(0.5))


def test_principal_components_are_those_of_the_joined_rows():
    data = wine(5)
    share, vectors = example("pca").components(data)
    x = data.take(data.order)[0].double()
    x = (x - x.mean(0)) / x.std(0)
    values, wanted = torch.linalg.svd(x)[1:]
    torch.testing.assert_close(share, values.square() / values.square().sum(), rtol=1e-6, atol=1e-9)
    assert float(((vectors * wanted).sum(1).abs() - 1).abs().max()) < 1e-6


def test_clusters_are_those_of_the_joined_rows():
    data = wine(4)
    x = data.take(data.order)[0].double()
    start = x[[0, 60, 120]]
    found = example("kmeans").clusters(data, start, 4)
    for _ in range(4):
        nearest = torch.cdist(x, start).argmin(1)
        start = torch.stack([x[nearest == c].mean(0) for c in range(3)])
    torch.testing.assert_close(found, start, rtol=1e-12, atol=1e-12)
    far = torch.cat([x[:2], torch.full_like(x[:1], 1e6)])  # a cluster without rows keeps its centre
    assert torch.equal(example("kmeans").clusters(data, far, 1)[2], far[2])
