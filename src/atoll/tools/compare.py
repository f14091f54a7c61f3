"""Two runs side by side: what was set otherwise, what came out, and where their numbers part.

atoll compare A B
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from atoll import runs
from atoll.errors import UsageError
from atoll.loss import METRICS
from atoll.plan.stop import direction

PLAIN = ("gradient_norm", "lr")  # told, but neither end of them is the better one


@dataclass(frozen=True)
class Line:
    """One quantity of both runs.

    Args:
        name: what it is called.
        a, b: its value in each; None where a run has none.
        best: "a", "b", or "" where they are equal, one is missing, or neither is better.
    """

    name: str
    a: Any
    b: Any
    best: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        a, b: names of the folders.
        settings: of config.toml, those that differ.
        metrics: the last value of each.
        totals: rounds, bytes, seconds, failures.
        through: the last round up to which every fingerprint is the same; −1 where the first one differs, None where
            there is none to compare.
        parted: whether a round that both have differs.
        tensors: of the final models, those that differ, by name, a layer's weight first: name and largest |a − b|, or
            why they cannot be compared.
        models: whether both final models are there.
    """

    a: str
    b: str
    settings: tuple[Line, ...]
    metrics: tuple[Line, ...]
    totals: tuple[Line, ...]
    through: int | None
    parted: bool
    tensors: tuple[tuple[str, float | str], ...]
    models: bool

    @property
    def verdict(self) -> str:
        """Where the runs part, in one sentence: `identical through round 37, first differs in fc1.weight`."""
        if self.through is None:
            head = "no round to compare"
        elif self.through < 0:
            head = "different from round 0 on"
        elif self.parted:
            head = f"identical through round {self.through}"
        else:
            head = f"identical in all {self.through + 1} rounds that both have"
        if not self.tensors:
            return f"{head}; the final models are {'equal to the bit' if self.models else 'not both there'}"
        name, gap = self.tensors[0]
        told = gap if isinstance(gap, str) else f"by up to {gap:.3g}"
        more = f", as {len(self.tensors)} tensors do" if len(self.tensors) > 1 else ""
        then = (
            "; the final models are of other rounds, and the" if self.through is not None and not self.parted else ","
        )
        return f"{head}{then} first differs in {name} ({told}{more})"

    def text(self) -> str:
        """What there is to say, line by line; * marks the better one."""
        blocks = [[("", self.a, self.b)]]
        for title, lines in (
            ("settings that differ", self.settings),
            ("metrics", self.metrics),
            ("cost", self.totals),
        ):
            if lines:
                blocks.append([(title, "", ""), *((f"  {x.name}", _shown(x.a), _shown(x.b)) for x in lines)])
        marks = {f"  {x.name}": x.best for x in (*self.metrics, *self.totals)}
        cells = [cell for block in blocks for cell in block]
        wide, left = max(len(c[0]) for c in cells), max(len(c[1]) for c in cells)
        out = []
        for name, a, b in cells:
            mark = marks.get(name, "")
            row = f"{name:<{wide}}  {a:>{left}}{'*' if mark == 'a' else ' '}  {b}{' *' if mark == 'b' else ''}"
            out.append(row.rstrip())
        return "\n".join([*out, "", self.verdict])


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Set two runs side by side. Both folders are only read.

    Args:
        a, b: the runs' folders; they may be of different data, models, lengths.
    Raises:
        UsageError: one of them is not the folder of a run.
    """
    one, other = Path(a).resolve(), Path(b).resolve()
    mine, theirs = _config(one), _config(other)
    rows = [runs.read_rows(folder / "metrics.jsonl") for folder in (one, other)]
    keys = [k for k in dict.fromkeys((*mine, *theirs)) if mine.get(k) != theirs.get(k)]
    through, parted = _through(*rows)
    tensors, models = _tensors(one, other)
    return Comparison(
        one.name,
        other.name,
        tuple(Line(k, mine.get(k), theirs.get(k)) for k in keys),
        _metrics(*rows),
        _totals(*rows),
        through,
        parted,
        tensors,
        models,
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(_flat(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))))
    except OSError:
        raise UsageError(
            f"{folder} is not the folder of a run.", "a folder that holds a config.toml.", write="atoll runs"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{folder / 'config.toml'} is malformed: {error}.", "TOML.", write="atoll runs") from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        out += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return out


def _metrics(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[Line, ...]:
    last: list[dict[str, Any]] = [{}, {}]
    for into, rows in zip(last, (a, b), strict=True):
        for row in rows:
            into |= {n: v for n, v in row.items() if n not in runs.COUNTS and v is not None}
    mine, theirs = last
    return tuple(
        Line(n, mine.get(n), theirs.get(n), _best(n, mine.get(n), theirs.get(n)))
        for n in dict.fromkeys((*mine, *theirs))
    )


def _best(name: str, a: Any, b: Any) -> str:
    """Which of two values is the better one, by the metric's own direction."""
    known = METRICS.get(name)
    sign = (1 if known.higher_is_better else -1) if known else direction(name)
    numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (a, b))
    if sign is None or name in PLAIN or not numbers or a == b:
        return ""
    return "a" if (a > b) == (sign > 0) else "b"


def _totals(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[Line, ...]:
    out = [Line("rounds", len(a), len(b))]
    for name, word in (
        ("bytes_up", "bytes up"),
        ("bytes_down", "bytes down"),
        ("seconds", "seconds"),
        ("failed", "failures"),
    ):
        mine, theirs = (sum(row.get(name) or 0 for row in rows) for rows in (a, b))
        # Fewer rounds cost less: only runs of one length compete.
        best = "" if mine == theirs or len(a) != len(b) else "a" if mine < theirs else "b"
        out.append(Line(word, round(mine, 3), round(theirs, 3), best))
    return tuple(out)


def _through(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[int | None, bool]:
    """The last round up to which all fingerprints agree, and whether one after it differs."""
    mine, theirs = ({row.get("round"): row.get("fingerprint") for row in rows} for rows in (a, b))
    common = sorted(t for t in mine.keys() & theirs.keys() if isinstance(t, int) and mine[t] and theirs[t])
    last = -1 if common else None
    for t in common:
        if mine[t] != theirs[t]:
            return last, True
        last = t
    return last, False


def _tensors(a: Path, b: Path) -> tuple[tuple[tuple[str, float | str], ...], bool]:
    """The tensors of the final models that differ, and whether both models are there."""
    files = [folder / "model.safetensors" for folder in (a, b)]
    if not all(file.is_file() for file in files):
        return (), False
    out: list[tuple[str, float | str]] = []
    try:
        with safe_open(files[0], "pt") as mine, safe_open(files[1], "pt") as theirs:
            names, others = set(mine.keys()), set(theirs.keys())
            for name in sorted(names | others, key=_weight_first):
                if name not in others or name not in names:
                    out.append((name, f"only in {a.name if name in names else b.name}"))
                    continue
                x, y = mine.get_tensor(name), theirs.get_tensor(name)
                if x.shape != y.shape or x.dtype != y.dtype:
                    out.append((name, f"{x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}"))
                elif not torch.equal(x, y):
                    out.append((name, float((x.double() - y.double()).abs().max())))
    except (SafetensorError, OSError):
        return (), False
    return tuple(out), True


def _weight_first(name: str) -> tuple[str, bool, str]:
    layer, _, leaf = name.rpartition(".")
    return layer, leaf != "weight", leaf


def _shown(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.6g}"
    return str(value)
