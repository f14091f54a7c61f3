"""The contracts of codec stages and aggregators.

Tests: tests/conformance/test_parts.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from atoll.base.random import Key
from atoll.compute.layout import Layout
from atoll.plan.protocols import Contribution, Ids, Partial, Tensors, Total
from atoll.testing.contract import (
    check_declared,
    check_value,
    conformity,
    in_group,
    known_entropy,
    lanes,
    leading,
    on_meta,
    pure,
    refused,
    require,
    round_info,
    row,
    same,
    same_names,
)

_K = 4


@conformity
def check_stage(part: Any) -> None:
    """Check the contract of a codec stage.

    `encode` and `decode` return one row per client. The message of a client depends neither on the other clients of
    the chunk nor on their number. `per_message` is True if `decode` changes a message, and `per_sum` is True if
    `decode_sum` changes a sum. `decode_sum` is linear. Sums and payload are as declared. Memory and server state keep
    names, shapes and dtypes. Results depend only on the key and the arguments. The stage runs on meta tensors.

    Args:
        part: a stage, as `atoll.plan.protocols.Stage` declares it.
    Raises:
        Nonconformity: the stage breaks the contract.
    Example:
        >>> from atoll.plan.codec import Identity
        >>> check_stage(Identity() >> Identity())
    """
    check_value(part)
    for dtype in (torch.float32, torch.float64):
        _check_stage(part, Layout.of(nn.Linear(6, 9), dtype))
    _check_meta(part, Layout.of(nn.Linear(6, 9)))


def _check_stage(part: Any, layout: Layout) -> None:
    subject, d, part = repr(part), layout.d, part.bind(layout, 9)
    first, shared = part.memory(layout), part.server(layout)
    key, ids = _key(), torch.tensor([5, 0, 11, 3])
    x = Key(7).fold("x").normal(_K * d, layout.dtype).reshape(_K, d) * torch.tensor([[1e-6], [1.0], [0.0], [1e6]])
    x = x.to(layout.dtype)
    memory = lanes(first, _K)
    payload, side, sums, after = pure(f"{subject}.encode", part.encode, x, memory, shared, key.of(ids))
    leading(f"{subject}: payload", {"x": payload}, _K)
    leading(f"{subject}: side tensors", side, _K)
    leading(f"{subject}: sums", sums, _K)
    same_names(f"{subject}.encode: memory", first, after, (_K,))
    opened = pure(f"{subject}.decode", part.decode, payload, side)
    require(
        opened.dim() == 2 and len(opened) == _K and opened.is_floating_point() and bool(opened.isfinite().all()),
        f"{subject}.decode gave {opened.dtype} {list(opened.shape)}, finite: {bool(opened.isfinite().all())}.",
        f"finite floats [{_K}, …]; the updates are of sizes up to 10⁶.",
        "the server adds decoded messages.",
    )
    declared = dict(part.declare(layout))
    if payload.dtype != layout.dtype:  # a packed payload holds codes, and no stage can follow
        declared.pop("update")
    check_declared(f"{subject}.encode", declared, {"update": payload} if "update" in declared else {}, sums)
    for k in range(_K):
        single = part.encode(x[k : k + 1], row(memory, k), shared, key.of(ids[k : k + 1]))
        require(
            same(single, row((payload, side, sums, after), k))
            and same(part.decode(single[0], single[1]), row(opened, k)),
            f"{subject} encodes or decodes client {int(ids[k])} differently with {_K - 1} other clients in the batch.",
            "the same bits.",
            "the number of clients that are computed together must change no bit.",
        )
    _check_decode(part, opened, payload, key, d)
    _check_settle(part, d, sums, shared)


def _key() -> Key:
    """The key of a codec in a round with known entropy."""
    return Key(7, (), None, known_entropy().secret).fold("round", 0, "codec")


def _check_decode(part: Any, opened: Tensor, payload: Tensor, key: Key, d: int) -> None:
    subject = repr(part)
    total = opened.to(torch.float64).sum(0)
    decoded = pure(f"{subject}.decode_sum", part.decode_sum, total, key)
    require(
        decoded.shape == (d,) and decoded.is_floating_point(),
        f"{subject}.decode_sum gave {decoded.dtype} {list(decoded.shape)} for updates of length {d}.",
        f"floats [{d}].",
        "the sum of updates is an update.",
    )
    require(
        part.per_message or same(opened, payload),
        f"{subject} declares per_message = False, and decode changes a message.",
        "per_message = True.",
        "a >> b is checked by these flags: a stage with per_sum may not follow one with per_message.",
    )
    require(
        part.per_sum or same(decoded, total),
        f"{subject} declares per_sum = False, and decode_sum changes a sum.",
        "per_sum = True.",
        "a >> b and the aggregator are checked by these flags.",
    )
    single = torch.stack([part.decode_sum(t, key) for t in opened.to(torch.float64)]).sum(0)
    require(
        _close(decoded, single),
        f"{subject} decodes a sum differently from the sum of the decoded vectors.",
        "a linear decode: decode_sum(a + b) = decode_sum(a) + decode_sum(b).",
        "it is called once, on the sum of a round.",
    )


def _check_settle(part: Any, d: int, sums: Tensors, shared: Tensors) -> None:
    subject = repr(part)
    added = {n: t.to(torch.float64).reshape(_K, -1).sum(0) for n, t in sums.items()}
    one = torch.ones((), dtype=torch.int64)
    total = Total({"update": torch.ones(d, dtype=torch.float64)}, added, one * 9, one * _K, {})
    settled, after = pure(f"{subject}.server_update", _updated(part), total, shared)
    same_names(f"{subject}.server_update: server", shared, after)
    same_names(f"{subject}.server_update: means", total.means, settled.means)


def _updated(part: Any) -> Callable[[Total, Tensors], tuple[Total, Tensors]]:
    """Call `server_update` with the same known entropy each time."""
    return lambda total, server: part.server_update(total, server, round_info(), Key(7).fold("settle"))


def _check_meta(part: Any, layout: Layout) -> None:
    subject, part = repr(part), part.bind(layout, 9)
    first, shared = _meta(part.memory(layout)), _meta(part.server(layout))
    key = _key()
    x, ids = torch.empty(_K, layout.d, device="meta"), torch.empty(_K, dtype=torch.int64, device="meta")
    payload, side, _, _ = on_meta(f"{subject}.encode", part.encode, x, lanes(first, _K), shared, key.of(ids))
    decoded = on_meta(f"{subject}.decode", part.decode, payload, side)
    on_meta(f"{subject}.decode_sum", part.decode_sum, decoded.sum(0), key)


def _meta(tensors: Tensors) -> dict[str, Tensor]:
    return {n: t.to("meta") for n, t in tensors.items()}


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether a equals b up to rounding, relative to the largest number."""
    return bool((a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-30))


@conformity
def check_aggregator(part: Any) -> None:
    """Check the contract of an aggregator.

    `fold` and `merge` are associative and commutative: they give the same bits for every order and grouping of
    contributions with numbers between 10⁻¹² and 10¹⁹ in size. `zero()` is an empty sum, and no other call changes
    it. `tensors()` of a partial gives plain tensors by name, `of` rebuilds the partial from them, and `reduce`
    adds the partials of a group of processes. A rule with `linear = True` is linear in the updates. An empty round is
    legal. Of each counter the largest is kept.

    Args:
        part: an aggregator: `zero`, `fold`, `merge`, `total`, `finalize`, and the flag `linear`.
    Raises:
        Nonconformity: the aggregator breaks the contract.
    Example:
        >>> from atoll.plan.aggregate import Mean
        >>> check_aggregator(Mean())
    """
    check_value(part)
    for dtype in (torch.float32, torch.float64):
        _check_order(part, dtype)
    _check_empty(part)
    if part.linear:
        _check_linear(part)


def _contribution(rows: Tensor) -> Contribution:
    """A contribution of K clients with the updates `rows`."""
    k, key = len(rows), Key(7).fold("others")
    return Contribution(
        {"update": rows, "buffers": key.fold("buffers").normal(k * 3, rows.dtype).reshape(k, 3)},
        {"loss": key.fold("loss").uniform(k, rows.dtype), "rows": torch.arange(1, k + 1)},
        torch.arange(1, k + 1) * 3,
        {"counter": torch.arange(k)},
        {},
    )


def _starts(contribution: Contribution) -> Ids:
    """The start of each row. The weight of a row determines its client."""
    client = contribution.weight // 3 - 1
    return Ids(client, torch.zeros_like(client))


def _of(contribution: Contribution, index: slice | Tensor) -> Contribution:
    tables = (contribution.means, contribution.sums, contribution.counters, contribution.per_client)
    means, sums, largest, facts = ({n: t[index] for n, t in table.items()} for table in tables)
    return Contribution(means, sums, contribution.weight[index], largest, facts)


def _result(part: Any, partial: Any) -> tuple[Total, Total]:
    """The total of a partial and the finalized total, in a round of all seven clients."""
    total = part.total(partial)
    return total, part.finalize(total, round_info())


def _check_order(part: Any, dtype: torch.dtype, k: int = 7, d: int = 40) -> None:
    subject, key = repr(part), Key(7).fold("aggregate")
    sizes = 10.0 ** (31 * key.fold("size").uniform(k * d) - 12).reshape(k, d)
    given = _contribution((key.fold("rows").normal(k * d).reshape(k, d) * sizes).to(dtype))
    whole = pure(f"{subject}.fold", lambda c: _result(part, part.fold(part.zero(), c, _starts(c))), given)
    _check_total(subject, *whole, k, d)
    one = [_of(given, slice(i, i + 1)) for i in range(k)]

    def fold(*contributions: Contribution) -> Any:
        partial = part.zero()
        for contribution in contributions:
            partial = part.fold(partial, contribution, _starts(contribution))
        return partial

    kinds = {type(part.zero()).__name__, type(fold(*one)).__name__}
    require(
        isinstance(part.zero(), Partial) and len(kinds) == 1,
        f"{subject} has partials of the types {', '.join(sorted(kinds))}.",
        "one type with tensors(), of(tensors) and reduce(group), as atoll.plan.protocols.Partial declares them.",
        "workers send partials to another process, and ranks reduce theirs.",
    )

    def wired(partial: Any) -> Any:
        """The partial after it was sent to another process."""
        tensors = refused(f"{subject}: tensors()", lambda: partial.tensors())
        leaves = all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items())
        require(
            leaves,
            f"{subject} has a partial of {tensors!r}.",
            "tensors by name.",
            "partials are sent to other processes.",
        )
        return type(partial).of({n: t.clone() for n, t in tensors.items()})

    def reduced(*partials: Any) -> Any:
        """The partial that every process of a group has after `reduce`."""
        return in_group([partial.reduce for partial in partials])[-1]

    ways = {
        "one by one, backwards": lambda: fold(*reversed(one)),
        "in three partials": lambda: part.merge(part.merge(fold(*one[:2]), fold(*one[2:5])), fold(*one[5:])),
        "the same three, from the other end": lambda: part.merge(
            fold(*one[5:]), part.merge(fold(*one[2:5]), fold(*one[:2]))
        ),
        "shuffled": lambda: fold(_of(given, torch.tensor([3, 0, 6, 1, 5, 2, 4]))),
        "with zero before": lambda: part.merge(part.zero(), fold(given)),
        "with zero after": lambda: part.merge(fold(given), part.zero()),
        "reduced over processes": lambda: reduced(fold(*one[:4]), part.zero(), fold(*one[4:])),
        "over the wire": lambda: part.merge(wired(fold(*one[:4])), wired(fold(*one[4:]))),
    }
    for how, way in ways.items():
        require(
            same(_result(part, refused(f"{subject}, {how}", way)), whole),
            f"{subject} gave another result in {dtype} when the contributions came {how}.",
            "the same bits for every order and grouping.",
            "neither the number of workers nor their speed may change the model.",
        )


def _check_total(subject: str, total: Total, mean: Total, k: int, d: int) -> None:
    update = mean.means.get("update")
    require(
        update is not None and update.shape == (d,) and update.is_floating_point(),
        f"{subject}.finalize gave the update {update!r}.",
        f"floats [{d}].",
        "the optimizer moves θ along it.",
    )
    require(
        int(total.arrived) == k and same(total.counters.get("counter"), torch.tensor(k - 1)),
        f"{subject} counted {int(total.arrived)} of {k} contributions, largest counter {total.counters}.",
        "each contribution counted once, and of each counter the largest.",
        "the report states the number that arrived, and the counters of the model become the largest ones.",
    )
    require(
        total.sums.keys() == {"loss", "rows"} and abs(float(total.sums["rows"].sum()) - k * (k + 1) / 2) < 1e-6,
        f"{subject} gave the sums {total.sums}.",
        "Σ over clients of every sum, unchanged.",
        "metrics are sums divided by the number of rows that they cover.",
    )


def _check_empty(part: Any) -> None:
    refused(f"{part!r} with no contribution", lambda: part.finalize(part.total(part.zero()), round_info()))


def _check_linear(part: Any, k: int = 7, d: int = 40) -> None:
    a, b = (Key(7).fold("linear", i).normal(k * d).reshape(k, d) for i in range(2))

    def rule(rows: Tensor) -> Tensor:
        given = _contribution(rows)
        update: Tensor = _result(part, part.fold(part.zero(), given, _starts(given)))[1].means["update"]
        return update

    require(
        _close(rule(a + 3.0 * b), rule(a) + 3.0 * rule(b)),
        f"{part!r} declares linear = True, and rule(a + 3b) ≠ rule(a) + 3·rule(b).",
        "linear = False.",
        "with a linear rule the server decodes only the sum.",
    )
