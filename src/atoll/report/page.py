"""The report of a run: the page with its data inside, in one HTML file that loads no other file.

Without script, the tables and an SVG of each curve remain. Names of clients, error messages and settings are untrusted
text: every text passes through `html_element`, which escapes every string that it did not build itself.

Tests: tests/surface/test_report.py, tests/surface/test_timeline.py.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from atoll.report.bundle import bundle
from atoll.report.chart import Drawing
from atoll.report.page_data import ClientTable, Page, TextTable, to_json
from atoll.report.run_data import Row, RunData
from atoll.report.svg import svg
from atoll.runs.format import duration, format_number, label, size, spread, whole

if TYPE_CHECKING:
    from atoll.report.clients import Federation

_VOID = {"meta"}
_MOST_ROWS, _MOST_CLIENTS = 200, 500


class Html(str):
    """A string that is already HTML and must not be escaped again."""

    __slots__ = ()


def html_element(element: str, /, *inside: object, **attributes: object) -> Html:
    """Build an HTML element.

    Args:
        element: the name of the element.
        inside: its contents. An element is inserted unchanged, other values are escaped, None is skipped.
        attributes: its attributes. A trailing underscore of a name is dropped (`class_`), others become hyphens.
    Example:
        >>> html_element("p", "a < b ", html_element("b", "&"), class_="x")
        '<p class="x">a &lt; b <b>&amp;</b></p>'
    """
    given = "".join(f' {n.rstrip("_").replace("_", "-")}="{html.escape(str(v))}"' for n, v in attributes.items())
    body = "".join(i if isinstance(i, Html) else html.escape(_visible(i)) for i in inside if i is not None)
    return Html(f"<{element}{given}>" if element in _VOID else f"<{element}{given}>{body}</{element}>")


def _visible(text: object) -> str:
    """A text whose unprintable characters, except line breaks, are dots."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in str(text))


def page(data: Page, record: RunData, drawings: Sequence[Drawing], federation: Federation | None = None) -> str:
    """Build the report of a run as one HTML document.

    Args:
        data: the data of the run, as `/api/runs/NAME` answers them.
        record: the contents of the run folder, for the table of rounds.
        drawings: the charts of `atoll.report.plots`, in their order.
        federation: the summary of the clients' rows, for its measures; None omits them.
    """
    e, made = html_element, bundle()
    head = e(
        "head",
        e("meta", charset="utf-8"),
        e("meta", http_equiv="Content-Security-Policy", content=made.policy(live=False)),
        e("meta", name="viewport", content="width=device-width, initial-scale=1"),
        e("meta", name="color-scheme", content="light dark"),
        e("title", f"{data.title or data.run} – atoll"),
        Html(f"<style>{made.style}</style>"),
    )
    kept = [d for d in drawings if d.wide]
    static = e(
        "main",
        *(part for part in _static(data, record, [d for d in drawings if not d.wide]) if part),
        _gallery(kept, federation),
        id="page",
    )
    text = to_json(data).decode().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    scripts = Html(
        f'<script type="application/json" id="data">{text}</script>'
        f"<script>{made.library}</script><script>{made.script}</script>"
    )
    return f"<!doctype html>\n{e('html', head, e('body', static, scripts), lang='en')}\n"


def _static(data: Page, record: RunData, drawings: Sequence[Drawing]) -> list[Html | None]:
    """The sections that remain without script. The script replaces them."""
    e = html_element
    what = " · ".join(filter(None, (data.data, data.model, data.plan)))
    return [
        e(
            "header",
            e("h1", data.title or data.run, " ", e("span", data.status, class_=f"pill {data.status}")),
            e("p", data.banner, class_="banner") if data.banner else None,
            e("p", what, class_="what"),
            e("p", f"began {data.began.replace('T', ' ')}", class_="quiet") if data.began else None,
            e("p", data.reason, class_="quiet reason") if data.reason else None,
        ),
        _tiles(data),
        _section("Answer", *map(_table, data.answers), *(e("p", text) for text in data.findings)),
        _section("Confusion", _table(data.confusion)),
        _section("Curves", e("div", *(_figure(d) for d in drawings), class_="gallery") if drawings else None),
        _section("Clients", _client_table(data.clients)),
        _section("Waiting times", _table(data.waiting)),
        _section("Failures", _table(data.failures)),
        _section("Rounds", _rounds(record)),
        _section("Formula", e("pre", data.formula) if data.formula else None),
        _section("Notes", e("ul", *(e("li", note) for note in data.notes)) if data.notes else None),
        _section("Files", e("ul", *(e("li", name) for name in data.files)) if data.files else None),
        _section("config.toml", e("pre", data.config) if data.config else None),
        _section("Load, predict, resume", e("pre", "\n".join(data.lines)) if data.lines else None),
    ]


def _section(title: str, *inside: Html | None) -> Html | None:
    there = [i for i in inside if i]
    return html_element("section", html_element("h2", title), *there) if there else None


def _tiles(data: Page) -> Html:
    sums, rounds = data.sums, data.rounds
    chief = data.best.get(data.chief)
    pairs = [("rounds", whole(rounds) + (f" of {whole(data.total)}" if data.total else ""))]
    if chief is not None:
        pairs.insert(0, (f"best {label(data.chief)}", f"{format_number(chief[0])} in round {whole(chief[1])}"))
    forms = (
        ("bytes_up", "bytes up", size),
        ("bytes_down", "bytes down", size),
        ("seconds", "time in rounds", duration),
    )
    pairs += [(words, form(v)) for name, words, form in forms if (v := sums.get(name)) is not None]
    pairs += [("simulated clock", duration(v))] if (v := sums.get("clock")) is not None else []
    pairs += [(f"{name} contributions", whole(v)) for name in ("lost", "late") if (v := sums.get(name))]
    pairs += [("ε", format_number(v))] if (v := data.privacy.get("epsilon")) is not None else []
    e = html_element
    return e("dl", *(e("div", e("dt", name), e("dd", value)) for name, value in pairs), class_="tiles")


def _table(table: TextTable | None) -> Html | None:
    return None if table is None else _scroll(table.caption, table.cells)


def _scroll(caption: str, cells: Sequence[Sequence[str]]) -> Html:
    """A table with a caption, heads of columns and heads of rows."""
    e = html_element
    heads = [e("th", h, scope="col") if h else e("td") for h in cells[0]]
    rows = (e("tr", e("th", row[0], scope="row"), *(e("td", c) for c in row[1:])) for row in cells[1:])
    return e("div", e("table", e("caption", caption), e("thead", e("tr", *heads)), e("tbody", *rows)), class_="scroll")


def _client_table(table: ClientTable) -> Html | None:
    if not table.ids:
        return None
    forms = {"bytes": size, "count": whole, "seconds": duration, "number": format_number}
    rows = [["client", *(c.label for c in table.columns)]]
    for at, name in enumerate(table.names[:_MOST_CLIENTS]):
        cells = [c.absent or ("–" if (v := c.values[at]) is None else forms[c.unit](v)) for c in table.columns]
        rows.append([name, *cells])
    omitted = table.omitted + max(0, len(table.names) - _MOST_CLIENTS)
    more = f" {whole(omitted)} more clients are not listed." if omitted else ""
    return _scroll(f"clients, with their last values.{more}", rows)


def _rounds(record: RunData) -> Html | None:
    """The first, the best and the last round, and rounds at equal distances between them."""
    if not record.rows:
        return None
    chosen = {*spread(len(record.rows), _MOST_ROWS)}
    best = record.best(record.judged)
    chosen |= {at for at, row in enumerate(record.rows) if row is best}
    names = [n for n in record.columns if n not in ("lr",) or len(set(record.series(n)[1].tolist())) > 1]
    rows = [["round", *map(label, names), "clients", "failed", "up", "down", "time"]]
    for at in sorted(chosen):
        row = record.rows[at]
        mark = " (best)" if row is best else ""
        rows.append([f"{row['round']}{mark}", *(_cell(row, n, format_number) for n in names), *_counts(row)])
    part = f"{whole(len(chosen))} of " if len(chosen) < len(record.rows) else ""
    return _scroll(f"{part}{whole(len(record.rows))} rounds; metrics.csv has all columns.", rows)


def _counts(row: Row) -> list[str]:
    clients = f"{_cell(row, 'arrived', whole)}/{_cell(row, 'cohort', whole)}"
    forms = (("failed", whole), ("bytes_up", size), ("bytes_down", size), ("seconds", duration))
    return [clients, *(_cell(row, name, form) for name, form in forms)]


def _cell(row: Row, name: str, form: object) -> str:
    value = row.get(name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return str(form(value)) if number and callable(form) else "–"


def _figure(drawing: Drawing) -> Html:
    picture = Html(svg(drawing, 0 if drawing.wide else 340, style=False))
    if not drawing.wide:
        return html_element("figure", picture, class_="half")
    # On a phone it scrolls, so that a key must reach it.
    return html_element("figure", picture, class_="wide", tabindex=0, aria_label=drawing.name)


def _gallery(drawings: Sequence[Drawing], federation: Federation | None) -> Html | None:
    """The charts that the script does not draw. It moves them to their place."""
    e = html_element
    parts = [_figure(d) for d in drawings]
    if federation is not None:
        measures = "; ".join(f"{name} {value}" for name, value in federation.measures.items())
        parts.append(e("p", f"{measures}. {federation.omitted}".strip(), class_="quiet"))
    return (
        e("section", e("h2", "Rows, flights and losses of clients"), e("div", *parts, class_="gallery"), class_="kept")
        if parts
        else None
    )
