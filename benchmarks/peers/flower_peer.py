"""The same workload in Flower: its simulation on Ray, one core per client, with the message API."""

from __future__ import annotations

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import sys

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from modules import classes, module
from turns import Turns, workload

FOLDER = sys.argv[1]
client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train one client for one epoch."""
    torch.set_num_threads(1)
    work = workload(FOLDER)
    net = module(work.model)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    rows = work.parts[int(context.node_config["partition-id"])]
    x, y = torch.from_numpy(work.x[rows]), torch.from_numpy(work.y[rows])
    optimizer = torch.optim.SGD(net.parameters(), work.lr)
    for some in torch.randperm(len(rows)).split(work.batch):
        optimizer.zero_grad()
        F.cross_entropy(net(x[some]), y[some]).backward()
        optimizer.step()
    content = RecordDict(
        {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(rows)})}
    )
    return Message(content=content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run rounds as the benchmark requests them."""
    turns = Turns()
    torch.manual_seed(0)
    net = module(turns.model)

    class Waiting(FedAvg):
        """FedAvg that waits for its turn between two rounds."""

        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            net.load_state_dict(arrays.to_torch_state_dict())
            turns.wait(lambda rows: classes(net, rows))
            return arrays, metrics

    count = len(turns.parts)
    strategy = Waiting(fraction_train=turns.cohort / count, fraction_evaluate=0.0, min_available_nodes=count)
    turns.wait(lambda rows: classes(net, rows))
    strategy.start(grid=grid, initial_arrays=ArrayRecord(net.state_dict()), num_rounds=turns.rounds + 1)


run_simulation(
    server,
    client,
    num_supernodes=len(workload(FOLDER).parts),
    backend_config={
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"address": "local", "num_cpus": os.cpu_count()},
    },
)
