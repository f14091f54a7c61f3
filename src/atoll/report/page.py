"""The report of a run as one HTML file that loads no other file and runs no script.

Names of clients, error messages and settings are untrusted text. Every text therefore passes through `tag`, which
escapes every string that `tag` did not build itself.

Tests: tests/surface/test_report.py, tests/surface/test_timeline.py.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from atoll.compute.metric_names import PERSONAL
from atoll.data.clients import Clients
from atoll.report.clients import Federation
from atoll.report.run_data import Row, RunData
from atoll.runs.format import client_name, duration, format_number, label, plain, rises, size, spread, whole
from atoll.runs.summary import ROWS, all_row_cells, findings, judged, own_row_cells

_VOID = {"meta", "img", "source", "br"}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MOST_ROWS, _MOST_LOST = 400, 50


class Html(str):
    """A string that is already HTML and must not be escaped again."""

    __slots__ = ()


@dataclass(frozen=True)
class Picture:
    """A drawn chart: file name, alt text, whether it is as wide as the page, PNG bytes for light and dark pages."""

    name: str
    alt_text: str
    wide: bool
    light: bytes
    dark: bytes


def tag(element: str, /, *inside: object, **attributes: object) -> Html:
    """Build an HTML element.

    Args:
        element: the name of the element.
        inside: its contents. An element is inserted unchanged, other values are escaped, None is skipped.
        attributes: its attributes. A trailing underscore of a name is dropped (`class_`), others become hyphens.
    Example:
        >>> tag("p", "a < b ", tag("b", "&"), class_="x")
        '<p class="x">a &lt; b <b>&amp;</b></p>'
    """
    given = "".join(f' {n.rstrip("_").replace("_", "-")}="{html.escape(str(v))}"' for n, v in attributes.items())
    body = "".join(i if isinstance(i, Html) else html.escape(str(i)) for i in inside if i is not None)
    return Html(f"<{element}{given}>" if element in _VOID else f"<{element}{given}>{body}</{element}>")


def page(record: RunData, federation: Federation | None, data: Clients | None, pictures: Sequence[Picture]) -> str:
    """Build the report of a run as one HTML document.

    Args:
        record: the contents of the run folder.
        federation: the summary of the clients' rows; None omits it.
        data: the clients, for their names and sizes; None omits both.
        pictures: the charts of `atoll.report.plots`, in their order.
    """
    names = None if data is None else data.names
    by_name = {p.name: p for p in pictures}
    ours = [by_name.pop(n) for n in ("clients", "sizes", "client_bytes", "client_loss") if n in by_name]
    parts = (
        _head(record, data),
        _summary(record),
        _section("Comparison with baselines", _comparison(record)),
        _section("Confusion", _confusion(record)),
        _section("Algorithm", _formula(record)),
        _section("Training", _gallery(by_name.values())),
        _section("Clients", _federation(federation), _traffic(record), _gallery(ours)),
        _section("Rounds", _rounds(record)),
        _section("Lost contributions", _lost(record, names)),
        _section("Notes", _notes(record)),
        _section("Settings and environment", _settings(record)),
        tag("footer", f"Made by atoll {record.environment.get('atoll', '')} from the files in this folder."),
    )
    style = files("atoll.report").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{record.name} – atoll"),
        Html(f"<style>{style}</style>"),
    )
    body = tag("body", tag("main", *parts))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _section(title: str, *inside: Html | None) -> Html | None:
    there = [i for i in inside if i]
    return tag("section", tag("h2", title), *there) if there else None


def _head(record: RunData, data: Clients | None) -> Html:
    events = record.events
    name = data.name if data is not None else record.config.get("data", "")
    model = record.config.get("model", "")
    what = [plain(v, 60) for v in (name, model) if v]
    if data is not None:
        what += [f"{whole(len(data.order))} rows", f"{whole(data.count)} client{'' if data.count == 1 else 's'}"]
        what += [f"{whole(len(data.held_out))} rows held out"] if data.held_out is not None else ["no held-out rows"]
    kind = events.status if events.status in ("done", "failed", "interrupted") else "unfinished"
    when = events.began.replace("T", " ")
    return tag(
        "header",
        tag("p", "atoll · run", class_="eyebrow"),
        tag("h1", record.name, " ", tag("span", events.status or kind, class_=f"pill {kind}")),
        tag("p", " · ".join(what), class_="what"),
        tag("p", when, class_="quiet") if when else None,
        tag("p", events.reason[:2000], class_="quiet reason") if events.reason else None,
    )


def _summary(record: RunData) -> Html:
    tiles: list[tuple[str, str, str]] = []
    for name in dict.fromkeys(
        (f"{record.judged}_clients", record.judged, *record.metrics[:3], "held_out_loss", "loss")
    ):
        if name in record.columns:
            best = record.best(name)
            detail = f"best {format_number(best[name])}, round {best['round']}" if best is not None else ""
            tiles.append((label(name), format_number(record.last(name)), detail))
    asked = record.config.get("rounds")
    seconds, rounds = record.total("seconds"), len(record.rows)
    of = f"of at most {whole(asked)}" if isinstance(asked, int) and asked > rounds else ""
    up, down = record.total("bytes_up"), record.total("bytes_down")
    lost = sum(e.count for e in record.events.lost.values())
    tiles += [
        ("rounds", whole(rounds), of),
        ("time in rounds", duration(seconds), f"{duration(seconds / rounds)} per round" if rounds else ""),
        *_clock(record),
        ("bytes up", size(up), f"{size(up / rounds)} per round" if rounds else ""),
        ("bytes down", size(down), f"{size(down / rounds)} per round" if rounds else ""),
        *_lateness(record),
        ("contributions lost", whole(lost), f"of {whole(record.total('cohort'))}"),
    ]
    return tag(
        "dl",
        *(
            tag("div", tag("dt", label), tag("dd", value), tag("dd", detail or "\u00a0", class_="quiet"))
            for label, value, detail in tiles
        ),
        class_="tiles",
    )


def _clock(record: RunData) -> list[tuple[str, str, str]]:
    last, rounds = record.last("clock"), len(record.rows)
    return [] if last is None else [("virtual time", duration(last), f"{duration(last / rounds)} per round")]


def _lateness(record: RunData) -> list[tuple[str, str, str]]:
    """Build tiles for staleness, the number of model versions kept for flights in progress, and late contributions."""
    tiles = []
    late = record.events.tally.staleness
    if late:
        mean = sum(s * n for s, n in late.items()) / sum(late.values())
        tiles.append(("staleness", f"{mean:.2f}", f"rounds on average; maximum {whole(max(late))}"))
    kept = record.series("versions")[1]
    if len(kept):
        tiles.append(("model versions kept", whole(kept.max()), f"maximum; {kept.mean():.1f} on average"))
    missed = record.total("late")
    if missed:
        tiles.append(("late contributions", whole(missed), f"of {whole(record.total('cohort'))}"))
    return tiles


def _traffic(record: RunData) -> Html | None:
    """Build tiles for the bytes that a client sent and received in the whole run: median, smallest and largest."""
    tally = record.events.tally
    pairs = []
    for words, of in (("bytes up, per client", tally.up), ("bytes down, per client", tally.down)):
        if of:
            middle = size(sorted(of.values())[len(of) // 2])
            pairs.append((words, middle, f"{size(min(of.values()))} to {size(max(of.values()))}"))
    if not pairs:
        return None
    counted = "" if tally.rounds == tally.of else f", in {whole(tally.rounds)} of {whole(tally.of)} rounds"
    detail = f"Median over the {whole(len(tally.up))} clients whose contributions arrived{counted}."
    tiles = (tag("div", tag("dt", n), tag("dd", v), tag("dd", detail_, class_="quiet")) for n, v, detail_ in pairs)
    return Html(tag("dl", *tiles, class_="tiles small") + tag("p", detail, class_="quiet"))


def _comparison(record: RunData) -> Html | None:
    """Compare the run with constants and trained baselines: on the clients' own rows, if there are any, then on all."""
    table, chief = record.compared, record.judged.removeprefix(PERSONAL)
    if len(table) < 2:
        reason = record.events.baselines.get("skipped", {}).get("reason")
        return tag("p", f"Not compared: {plain(reason, 300)}", class_="quiet") if reason else None
    names = judged(record.columns)
    order = [chief, *(n for n in names if n != chief)]
    of_clients = f"{chief}_clients"
    own, parts = own_row_cells(table, chief), []
    if own:
        parts.append(tag("h3", f"{label(chief).capitalize()} of clients, each on its own held-out rows"))
        parts.append(_grid(own, {ROWS[n]: row.get(of_clients) for n, row in table.items()}, of_clients))
        parts.append(tag("h3", "All held-out rows"))
    values = {} if own else {ROWS[n]: row.get(chief) for n, row in table.items()}
    parts.append(_grid(all_row_cells(table, order, order), values, chief))
    parts += [tag("p", text) for text in findings(table, chief)]
    return Html("".join((*parts, tag("p", _training_of(record), class_="quiet"))))


def _grid(cells: Sequence[Sequence[str]], values: Mapping[str, float | None], name: str) -> Html:
    """A table, with a bar for each row if there are values: its length is the value of a metric."""
    known = [abs(v) for v in values.values() if v is not None and v == v]
    rising = rises(name)
    most = 1.0 if rising and known and max(known) <= 1 else max(known, default=1.0) or 1.0
    note = "" if rising is None else ", higher is better" if rising else ", lower is better"
    heads = [tag("th", h, class_="n" if h else "") for h in cells[0]]
    head = tag("tr", *heads, tag("th", f"{label(name)}{note}") if values else None)
    rows = []
    for title, *row in cells[1:]:
        value = values.get(title)
        part = 0.0 if value is None or value != value else min(1.0, abs(value) / most)
        bar = tag("div", class_=f"bar {'ours' if title == 'federated' else ''}", style=f"width:{100 * part:.1f}%")
        row = [tag("td", c, class_="n") for c in row]
        rows.append(tag("tr", tag("th", title, scope="row"), *row, tag("td", bar, class_="bars") if values else None))
    return _scroll(tag("thead", head), tag("tbody", *rows))


def _training_of(record: RunData) -> str:
    """Describe how the baselines were made."""
    text = "Brackets: 95 % intervals, which assume independent rows. "
    text += "Constant: the class shares, or the mean, of the train rows."
    if record.baseline("pooled", "samples") is None:
        return text
    text += " All trainings use the same model, learning rate and number of samples. Pooled: one training on all rows. "
    some, of = record.baseline("local", "clients"), record.baseline("local", "population")
    whose = f"{whole(some)} of {whole(of)} clients" if some and of and some < of else "each client"
    text += f"Local only: {whose} trains on its own rows; over all held-out rows, the mean over the models of clients."
    for kind in ("pooled", "local"):
        if (diverged := record.baseline(kind, "diverged")) is not None:
            text += f" {label(kind).capitalize()} diverged ({whole(diverged)})."
    return text


def _formula(record: RunData) -> Html | None:
    formula = record.formula
    if not formula:
        return None
    numerics = record.environment.get("numerics", "")
    backend = tag("p", "Compute backend: ", tag("b", plain(numerics)), ".") if numerics else ""
    return Html(tag("pre", formula, class_="formula") + backend)


def _gallery(pictures: Iterable[Picture]) -> Html | None:
    figures = [tag("figure", _picture(p), class_="wide" if p.wide else "half") for p in pictures]
    return tag("div", *figures, class_="gallery") if figures else None


def _picture(picture: Picture) -> Html:
    width, height = (int.from_bytes(picture.light[at : at + 4], "big") for at in (16, 20))
    light, dark = (f"data:image/png;base64,{base64.b64encode(p).decode()}" for p in (picture.light, picture.dark))
    return tag(
        "picture",
        tag("source", media="(prefers-color-scheme: dark)", srcset=dark),
        tag("img", src=light, alt=picture.alt_text, width=width // 2, height=height // 2),
    )


def _federation(federation: Federation | None) -> Html | None:
    if federation is None:
        return None
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in federation.measures.items()]
    meaning = (
        (
            "Label divergence: the mean Jensen–Shannon divergence between the labels of a client and of all clients, "
            "0 if all clients have the same label distribution. "
        )
        if "label divergence" in federation.measures
        else ""
    ) + "Size Gini: 0 if all clients have the same number of rows. Effective clients: (Σ n)² / Σ n²."
    omitted = tag("p", federation.omitted, class_="quiet") if federation.omitted else ""
    return Html(tag("dl", *pairs, class_="tiles small") + tag("p", meaning, class_="quiet") + omitted)


def _confusion(record: RunData) -> Html | None:
    """The held-out rows of each class, by predicted class."""
    if record.confusion is None:
        return None
    heads, *rows = record.confusion.cells()
    head = tag("tr", *(tag("th", h, class_="n" if i else "") for i, h in enumerate(heads)))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", n, class_="n") for n in row[1:])) for row in rows]
    note = tag("p", "Rows: the class of the held-out rows. Columns: the predicted class.", class_="quiet")
    return Html(note + _scroll(tag("thead", head), tag("tbody", *body)))


def _rounds(record: RunData) -> Html | None:
    if not record.rows:
        return None
    places = [(0, "first"), (len(record.rows) - 1, "last")]
    best = record.best(record.judged)
    if best is not None:
        places.append((next(i for i, row in enumerate(record.rows) if row is best), "best"))
    chosen = {i: ", ".join(label for at, label in places if at == i) for i, _ in places}
    brief = [_round(record, record.rows[i], chosen[i]) for i in sorted(chosen)]
    shown = spread(len(record.rows), _MOST_ROWS)
    every = [_round(record, record.rows[i], chosen.get(i, "")) for i in shown]
    few = f"{whole(len(shown))} of " if len(shown) < len(record.rows) else "all "
    detail = (
        "metrics.csv contains all rounds." if len(shown) < len(record.rows) else "The same rows are in metrics.csv."
    )
    return Html(
        _scroll(tag("thead", _round_head(record)), tag("tbody", *brief))
        + tag(
            "details",
            tag("summary", f"{few}{whole(len(record.rows))} round{'' if len(record.rows) == 1 else 's'}"),
            tag("p", detail, class_="quiet"),
            _scroll(tag("thead", _round_head(record)), tag("tbody", *every)),
        )
    )


def _round_head(record: RunData) -> Html:
    more = [name for name, _ in _more(record)]
    heads = ["", "round", *map(label, record.columns), "clients", "failed", *more, "up", "down", "time", "fingerprint"]
    return tag("tr", *(tag("th", h, class_="n" if h else "") for h in heads))


def _more(record: RunData) -> list[tuple[str, Callable[[Any], str]]]:
    """The columns that only some runs have, each with its format."""
    shown = (("late", str), ("flying", str), ("staleness", lambda v: f"{v:.2f}"), ("clock", duration))
    return [(name, show) for name, show in shown if len(record.series(name)[0])]


def _round(record: RunData, row: Row, label: str) -> Html:
    def cell(name: str, show: Any) -> str:
        value = row.get(name)
        return show(value) if isinstance(value, (int, float)) else "–"

    cells = [
        cell("round", str),
        *(cell(n, format_number) for n in record.columns),
        f"{cell('arrived', str)}/{cell('cohort', str)}",
        cell("failed", str),
        *(cell(name, show) for name, show in _more(record)),
        cell("bytes_up", size),
        cell("bytes_down", size),
        cell("seconds", duration),
    ]
    print_ = tag("td", tag("code", plain(row.get("fingerprint", ""), 12)), class_="n")
    marked = "best" if "best" in label else ""
    return tag("tr", tag("th", label, scope="row"), *(tag("td", c, class_="n") for c in cells), print_, class_=marked)


def _scroll(*inside: Html) -> Html:
    return tag("div", tag("table", *inside), class_="scroll")


def _lost(record: RunData, names: Sequence[str] | None) -> Html | None:
    lost = sorted(record.events.lost.items(), key=lambda pair: (-pair[1].count, pair[0]))
    if not lost:
        return None
    rows = []
    for client, those in lost[:_MOST_LOST]:
        (stage, cause), _ = those.causes.most_common(1)[0]
        who = client_name(client, names)
        cell = (whole(those.count), str(those.last), plain(stage, 40))
        cells = [tag("td", t, class_="n" if at < 2 else "") for at, t in enumerate(cell)]
        rows.append(tag("tr", tag("th", who, scope="row"), *cells, tag("td", plain(cause, 300), class_="cause")))
    heads = (("client", ""), ("lost", "n"), ("last round", "n"), ("stage", ""), ("most frequent cause", ""))
    head = tag("tr", *(tag("th", h, class_=c) for h, c in heads))
    rest = len(lost) - len(rows)
    more = tag("p", f"events.jsonl lists {whole(rest)} more clients.", class_="quiet") if rest else ""
    return Html(_scroll(tag("thead", head), tag("tbody", *rows)) + more)


def _notes(record: RunData) -> Html | None:
    notes = [tag("li", plain(note, 500)) for note in record.events.notes[:50]]
    return tag("ul", *notes) if notes else None


def _settings(record: RunData) -> Html | None:
    there = record.environment.items()
    pairs = [tag("div", tag("dt", plain(n)), tag("dd", plain(v, 300))) for n, v in there if n not in ("plan", "why")]
    config = tag("details", tag("summary", "config.toml"), tag("pre", record.config_text)) if record.config_text else ""
    return Html(tag("dl", *pairs, class_="pairs") + config) if pairs or config else None
