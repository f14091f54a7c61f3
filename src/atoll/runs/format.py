"""Format numbers and label metrics, in the same way in the live table, the plots and the report page.

Tests: tests/surface/test_report.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from atoll.compute.metric_names import base_metric, direction

WORDS = {
    "loss": "training loss",
    "held_out_loss": "held-out loss",
    "gradient_norm": "‖g‖",
    "lr": "lr",
    "federated": "federated",
    "local": "local only",
    "local_only": "local only",
}
OF_CLIENTS = {
    "clients": "mean over clients",
    "median": "median client",
    "worst10": "worst tenth of clients",
    "min": "worst client",
    "sd": "sd over clients",
}


def label(name: str) -> str:
    """The label of a column of metrics.jsonl.

    Example:
        >>> label("held_out_loss"), label("top_5"), label("rmse_worst10")
        ('held-out loss', 'top 5', 'rmse, worst tenth of clients')
    """
    base = base_metric(name)
    if base:
        return f"{label(base)}, {OF_CLIENTS[name[len(base) + 1 :]]}"
    return WORDS.get(name, name.replace("_", " "))


def rises(name: str) -> bool | None:
    """Whether a higher value of a metric is better; None if the name is unknown.

    Example:
        >>> rises("accuracy"), rises("held_out_loss"), rises("lr")
        (True, False, None)
    """
    sign = direction(name)
    return None if sign is None else sign > 0


def better(a: float, b: float, rising: bool) -> bool:
    """Whether the metric value `a` is better than `b`; False if either is NaN.

    Args:
        a, b: two values of the same metric.
        rising: whether a higher value is better.
    """
    return a > b if rising else a < b


def format_number(value: float | None) -> str:
    """Format a measured number with four or five significant digits; None becomes a dash.

    Example:
        >>> [format_number(x) for x in (0.95281, 56.31824, 1.5e-9, None, math.nan)]
        ['0.9528', '56.318', '1.500e-09', '–', 'nan']
    """
    if value is None:
        return "–"
    amount = abs(value)
    if amount and math.isfinite(value) and not 1e-3 <= amount < 99_999.5:
        return f"{value:.3e}"
    places = 4 if not amount >= 9.99995 else 3 if amount < 99.9995 else 2 if amount < 999.995 else 1
    return f"{value:.{places}f}"


def whole(value: float) -> str:
    """Format a count with digits in groups of three.

    Example:
        >>> whole(1438)
        '1,438'
    """
    return f"{value:,.0f}"


def size(count: float) -> str:
    """Format a number of bytes with three digits and a decimal unit.

    Example:
        >>> size(999), size(2408), size(1_210_000_000)
        ('999 B', '2.41 kB', '1.21 GB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    places = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{places}f} {unit}"


def duration(seconds: float) -> str:
    """Format a duration, given in seconds, in ms, s, min or h.

    Example:
        >>> duration(0.0042), duration(0.73), duration(42.34), duration(75), duration(7384)
        ('4.2 ms', '0.73 s', '42.3 s', '1:15 min', '2:03 h')
    """
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms" if seconds > 0.00995 else f"{1000 * seconds:.2g} ms"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)}:{int(seconds) % 60:02d} min"
    return f"{int(minutes / 60):,}:{int(minutes) % 60:02d} h"


def plain(text: object, most: int = 200) -> str:
    """Make one printable line of at most `most` characters; each unprintable character becomes a dot.

    Example:
        >>> plain("a\\x1b[31mb\\nc"), plain("x" * 9, 5)
        ('a·[31mb·c', 'xxxx…')
    """
    line = "".join(c if c.isprintable() else "·" for c in str(text))
    return line if len(line) <= most else line[: most - 1] + "…"


def client_name(client: int, names: Sequence[str] | None, most: int = 28) -> str:
    """The name of a client, or `client` and its id if it has no name.

    Example:
        >>> client_name(3, None), client_name(0, ("Cleveland",))
        ('client 3', 'Cleveland')
    """
    if names is not None and 0 <= client < len(names):
        return plain(names[client], most)
    return f"client {client}"


def spread(count: int, most: int) -> list[int]:
    """Choose at most `most` of the numbers 0 … count − 1 at equal distances, including the first and the last.

    Example:
        >>> spread(5, 10), spread(100, 4)
        ([0, 1, 2, 3, 4], [0, 33, 66, 99])
    """
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
