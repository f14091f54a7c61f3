"""Summarize the rows and labels of all clients for a plot of bounded size, for 3 clients or 10⁶.

The plot puts similar clients next to each other. It shows at most `MOST_DRAWN` clients, at equal distances in this
order. Labels are counted for at most `MOST_COUNTED` clients, at equal distances in the order by size. The summary
states its omissions.

Tests: tests/surface/test_report.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atoll.data.clients import Clients
from atoll.data.measure import effective_clients, size_gini
from atoll.runs.format import client_name, format_number, plain, spread, whole

FEW = 12
MOST_DRAWN = 100
MOST_COUNTED = 2000
MOST_CLASSES = 30
_CHEAP = 5_000_000
_BINS = 10


@dataclass(frozen=True)
class Federation:
    """A summary of the rows and labels of the clients.

    Args:
        ids: the ids of the D clients that the plot shows, in the order of the plot. D is at most `MOST_DRAWN`.
        labels: the names of the clients in `ids`, for the axis of the plot.
        sizes: the number of rows of each client in `ids`, int64 `[D]`.
        shares: the share of each client's rows that falls into each class, float64 `[D, classes]`; each row sums to 1.
            Targets that are numbers are divided into tenths, which replace the classes. None if the targets have more
            than one dimension.
        classes: the names of the columns of `shares`.
        of: "class" if the columns are classes, "target" if they are tenths of the targets, "" if `shares` is None.
        every: the number of rows of each client of the population, ascending, int64. A larger population than
            `MOST_COUNTED` is represented by `MOST_COUNTED` of its clients.
        count: the number of clients of the population.
        measures: the measures of imbalance: each name, with its value as text.
        omitted: sentences that state which clients and classes the plot does not show; "" if it shows all.
    """

    ids: tuple[int, ...]
    labels: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    shares: npt.NDArray[np.float64] | None
    classes: tuple[str, ...]
    of: str
    every: npt.NDArray[np.int64]
    count: int
    measures: dict[str, str]
    omitted: str


def summarize(data: Clients) -> Federation:
    """Measure the imbalance of the clients and choose the clients that the plot shows."""
    sizes = data.sizes
    by_size = torch.argsort(sizes, descending=True, stable=True)
    few = data.count <= MOST_COUNTED or (len(data.order) <= _CHEAP and data.count * _width(data) <= _CHEAP)
    ids = torch.arange(data.count) if few else by_size[torch.tensor(spread(data.count, MOST_COUNTED))]
    table, classes, of = _table(data if few else data.only(ids))
    omitted = [] if few else [f"The labels of {whole(len(ids))} of the {whole(data.count)} clients are counted."]
    measures = {} if table is None or of != "class" else {"label divergence": _divergence(data, few, ids)}
    measures |= {
        "size Gini": format_number(size_gini(sizes)),
        "effective clients": f"{effective_clients(sizes):,.1f} of {whole(data.count)}",
        "rows per client": _range(sizes),
    }
    order = _order(table, of, sizes[ids])
    if len(order) > MOST_DRAWN:
        order = order[torch.tensor(spread(len(order), MOST_DRAWN))]
        omitted.append(f"{len(order)} of the {whole(data.count)} clients are drawn, at equal distances in this order.")
    drawn = ids[order]
    shares = None
    if table is not None:
        table, classes, folded = _folded(table, classes)
        omitted += folded
        picked = table[order].double()
        shares = (picked / picked.sum(1, keepdim=True).clamp(min=1)).numpy()
    return Federation(
        tuple(drawn.tolist()),
        tuple(client_name(i, data.names) if data.names else str(i) for i in drawn.tolist()),
        sizes[drawn].numpy(),
        shares,
        classes,
        of,
        sizes[by_size.flip(0)[torch.tensor(spread(data.count, MOST_COUNTED))]].numpy(),
        data.count,
        measures,
        " ".join(omitted),
    )


def _width(data: Clients) -> int:
    return len(data.classes) if data.classes is not None else _BINS


def _divergence(data: Clients, few: bool, ids: Tensor) -> str:
    value = (data if few else data.only(ids)).imbalance()["label_divergence"]
    return f"{value:.3f} bits, at most 1"


def _range(sizes: Tensor) -> str:
    low, middle, high = int(sizes.min()), int(sizes.median()), int(sizes.max())
    return whole(low) if low == high else f"{whole(low)} to {whole(high)}, median {whole(middle)}"


def _table(data: Clients) -> tuple[Tensor | None, tuple[str, ...], str]:
    """Count the rows of each client by class, or by tenth of the targets if they are numbers."""
    if data.classes is not None:
        return data.histogram(), tuple(plain(c, 20) for c in data.classes), "class"
    y = data.rows.targets()[data.order]
    if y.dim() != 1 or not len(y):
        return None, (), ""
    values = y.double()
    sample = values[torch.tensor(spread(len(values), 100_000))]
    edges = torch.quantile(sample, torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)[1:-1]).unique()
    bins = len(edges) + 1
    client = torch.arange(data.count).repeat_interleave(data.sizes)
    cell = client * bins + torch.bucketize(values, edges)
    table = cell.bincount(minlength=data.count * bins).reshape(data.count, bins)
    marks = [f"{e:.4g}" for e in edges.tolist()]
    names = [f"≤ {marks[0]}", *(f"to {m}" for m in marks[1:]), f"> {marks[-1]}"]
    return table, tuple(names), "target"


def _order(table: Tensor | None, of: str, sizes: Tensor) -> Tensor:
    """The drawing order: by id up to `FEW` clients, else by most overrepresented class, mean target or size."""
    if len(sizes) <= FEW:
        return torch.arange(len(sizes))
    if table is None:
        return torch.argsort(sizes, descending=True, stable=True)
    counts = table.double()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    if of == "target":
        return torch.argsort(share @ torch.arange(table.shape[1], dtype=torch.float64), stable=True)
    most, richest = (share / share.mean(0).clamp(min=1e-12)).max(1)
    by_most = torch.argsort(most, descending=True, stable=True)
    return by_most[torch.argsort(richest[by_most], stable=True)]


def _folded(table: Tensor, classes: tuple[str, ...]) -> tuple[Tensor, tuple[str, ...], list[str]]:
    """Merge all but the largest classes into one column if there are more than `MOST_CLASSES`."""
    if len(classes) <= MOST_CLASSES:
        return table, classes, []
    order = torch.argsort(table.sum(0), descending=True, stable=True)
    kept, rest = order[: MOST_CLASSES - 1].sort().values, order[MOST_CLASSES - 1 :]
    folded = torch.cat((table[:, kept], table[:, rest].sum(1, keepdim=True)), 1)
    names = (*(classes[i] for i in kept.tolist()), f"{len(rest)} others")
    return folded, names, [f"The {len(kept)} classes with the most rows are drawn. The others share one column."]
