"""The same workload in a manual FedAvg: one module, one optimizer, client after client."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from modules import classes, module
from turns import Turns

turns = Turns()
torch.manual_seed(0)
net = module(turns.model)
x, y = torch.from_numpy(turns.x), torch.from_numpy(turns.y)
parts = [torch.from_numpy(rows) for rows in turns.parts]
theta = {n: t.clone() for n, t in net.state_dict().items()}

while True:
    net.load_state_dict(theta)
    turns.wait(lambda rows: classes(net, rows))
    total, seen = {n: torch.zeros_like(t) for n, t in theta.items()}, 0
    for client in torch.randperm(len(parts))[: turns.cohort].tolist():
        net.load_state_dict(theta)
        optimizer = torch.optim.SGD(net.parameters(), turns.lr)
        rows = parts[client]
        own_x, own_y = x[rows], y[rows]
        for some in torch.randperm(len(rows)).split(turns.batch):
            optimizer.zero_grad()
            F.cross_entropy(net(own_x[some]), own_y[some]).backward()
            optimizer.step()
        seen += len(rows)
        for name, tensor in net.state_dict().items():
            total[name] += tensor * len(rows)
    theta = {n: t / seen for n, t in total.items()}
