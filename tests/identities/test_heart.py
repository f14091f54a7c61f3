"""Heart disease by hospital: published values of logistic regression on four hospitals, with the published split.

Reference: Ogier du Terrail et al., FLamby: Datasets and Benchmarks for Cross-Silo Federated Learning, 2022,
    Fed-Heart-Disease; the values are means over the seeds 42 to 46 of a run of its code.
"""

import pytest
import torch
from heart import heart, heart_model

import atoll
from atoll.plan.aggregate import Mean
from atoll.plan.local import Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.training.evaluation import constant_answer

FEDAVG = Plan(Train(sgd(0.001), steps=100, batch=4, keep=("order",)), Mean())
OWN_CONSTANTS = {"cleveland": 0.538, "hungarian": 0.629, "switzerland": 0.938, "va": 0.778}


def test_sizes_scales_and_constants_are_the_published_ones():
    data = heart()
    assert dict(zip(data.names, data.sizes.tolist(), strict=True)) == {
        "cleveland": 199,
        "hungarian": 172,
        "switzerland": 30,
        "va": 85,
    }
    assert data.held_offsets.diff().tolist() == [104, 89, 16, 45]
    x = data.take(data.client_rows("va"))[0].double()
    assert torch.allclose(x.mean(0), torch.zeros(13).double(), atol=1e-6)
    assert torch.allclose(x.std(0), torch.ones(13).double(), atol=1e-6)
    task = atoll.rounds(heart_model(42), data, FEDAVG, rounds=1).task
    found = {}
    for name in data.names:
        own = data.only(name)
        found[name] = float(constant_answer(task, own, own.held_owner).clients["accuracy"])
    assert found == pytest.approx(OWN_CONSTANTS, abs=5e-4)
    assert sum(found.values()) / 4 == pytest.approx(0.721, abs=5e-4)


def test_a_hospital_with_one_class_keeps_its_code():
    """All train rows of Switzerland are of the second class. With the first code, accuracy would be 1/16."""
    data = heart().only("switzerland")
    assert data.histogram().tolist() == [[0, 30]]
    report = list(atoll.rounds(heart_model(42), data, atoll.recipes.fedavg(lr=1.0, batch=None), rounds=5))[-1]
    assert report.metrics["accuracy_clients"] == 15 / 16


@pytest.mark.slow
def test_fedavg_has_the_published_accuracy():
    data, own, every = heart(), [], []
    for seed in range(42, 47):
        training = atoll.rounds(heart_model(seed), data, FEDAVG, rounds=15, seed=seed, evaluate_every=15)
        own.append(list(training)[-1].metrics["accuracy_clients"])
        every.append(training.evaluation.clients["accuracy"])
    assert sum(own) / 5 == pytest.approx(0.685, abs=0.028)
    assert torch.stack(every).mean(0).tolist() == pytest.approx([0.731, 0.719, 0.650, 0.640], abs=0.028)
