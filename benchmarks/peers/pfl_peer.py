"""The same workload in pfl-research: its PyTorch adapter and its simulated backend, in one process."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from modules import classes, module
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn
from turns import Turns

turns = Turns()
torch.manual_seed(0)
x, y = torch.from_numpy(turns.x), torch.from_numpy(turns.y)
parts = [torch.from_numpy(rows) for rows in turns.parts]


class Judged(nn.Module):
    """A module with the loss and the metrics that pfl requires."""

    def __init__(self) -> None:
        super().__init__()
        self.net = module(turns.model)

    def forward(self, rows):
        return self.net(rows)

    def loss(self, rows, labels, eval=False):
        return F.cross_entropy(self(rows), labels)

    @torch.no_grad()
    def metrics(self, rows, labels, eval=True):
        return {"loss": Weighted(0.0, len(labels))}


class Turn(TrainingProcessCallback):
    """Wait for the next turn between two rounds."""

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        turns.wait(lambda rows: classes(judged, rows))
        return False, Metrics()


judged = Judged()
server = torch.optim.SGD(judged.parameters(), 1.0)
model = PyTorchModel(model=judged, local_optimizer_create=torch.optim.SGD, central_optimizer=server)


def client(number):
    return PyTorchTensorDataset(tensors=[x[parts[number]], y[parts[number]]], user_id=str(number))


users = FederatedDataset(client, get_user_sampler("minimize_reuse", list(range(len(parts)))))
turns.wait(lambda rows: classes(judged, rows))
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=turns.rounds + 1,
        evaluation_frequency=10**9,
        train_cohort_size=turns.cohort,
        val_cohort_size=0,
    ),
    backend=SimulatedBackend(training_data=users, val_data=None, postprocessors=[]),
    model=model,
    model_train_params=NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=turns.lr, local_batch_size=turns.batch
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=1000),
    callbacks=[Turn()],
)
