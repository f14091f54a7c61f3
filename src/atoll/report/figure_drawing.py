"""The figure of a comparison: one panel for each set of held-out rows, with a line and a band for each group.

Tests: tests/surface/test_figure.py
"""

from __future__ import annotations

from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Line
from atoll.report.chart import SERIES, Axis, Band, Drawing, Mark, Panel, ReferenceLine, Series, suits_log
from atoll.report.figure import AXES, SPREADS, Comparison, Spread
from atoll.runs.format import label, plain, rises

MOST = 2 * SERIES  # lines of one figure: solid and dashed ones of each colour


def figure_drawing(found: Comparison, band: Spread) -> Drawing:
    """The lines of a comparison. Arguments and errors are those of `Comparison.figure`."""
    if band not in SPREADS:
        raise unknown_name("band", band, SPREADS, lambda near: Line(f'band="{near}"', f"--band {near}"))
    if len(found.groups) > MOST:
        raise UsageError(
            f"{len(found.groups)} lines in one figure.",
            f"at most {MOST} lines.",
            "solid and dashed lines of 8 colours differ.",
        )
    colour = {id(g): at for at, g in enumerate(found.groups)}
    panels = []
    sets = list(dict.fromkeys(g.data for g in found.groups))
    for at, data in enumerate(sets):
        groups = [g for g in found.groups if g.data == data]
        marks: list[Mark] = [] if found.target is None else [ReferenceLine(found.target, "soft")]
        for g in groups:
            if (ends := g.band(band)) is not None:
                marks.append(Band(g.x(found.x), *ends, f"s{colour[id(g)] % SERIES}"))
        for g in groups:
            place = colour[id(g)]
            name = plain(g.name, 40) + (f" (n={len(g.curves)})" if len(g.curves) > 1 else "")
            marks.append(Series(g.x(found.x), g.mean, f"s{place % SERIES}", name, dashed=place >= SERIES))
        remark = SPREADS[band] if any(len(g.curves) > 1 for g in groups) else ""
        title = f"held-out rows {at + 1}" if data and len(sets) > 1 else "unknown held-out rows" if not data else ""
        log = rises(found.metric) is False and suits_log(*([v for c in g.curves for v in c.values] for g in groups))
        words, unit = AXES[found.x]
        panels.append(Panel(marks, title, remark, Axis(words, unit), Axis(label(found.metric), log=log), names="top"))
    alt = f"{label(found.metric)} by {found.x}: {', '.join(g.name for g in found.groups)}."
    return Drawing("compare", alt, [panels], len(panels) > 1, 0.7 if len(panels) == 1 else 0.4)
