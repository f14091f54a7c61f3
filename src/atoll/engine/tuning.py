"""How many clients side by side, and on how many threads: tried while a training runs, since neither changes a bit.

A climb: the setting that is best so far, and those beside it, each timed over some rounds. One that is clearly quicker
becomes the best, and those beside it are tried next; when none is, the climb is over and costs nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ROUNDS = 3  # that a setting is timed over; the quickest counts, since others only ever take time away
_CLEARLY = 1.03  # times as quick: less may be noise, and is not worth a move
_FURTHEST = 8.0  # times what the model's size says, either way


class Setting(NamedTuple):
    """The size of a chunk, in parts of what the model's size says, and threads."""

    chunk: float
    threads: int


_USUAL = Setting(1.0, 1)


@dataclass
class Tuning:
    """A climb from one setting to the quickest beside it.

    Example:
        >>> climb = Tuning()
        >>> for _ in range(20):  # a machine for which twice the chunk is best
        ...     now = climb.setting(Setting(1.0, 1))
        ...     climb.heard(rows=100, seconds={1.0: 2.0, 2.0: 1.0}.get(now.chunk, 3.0))
        >>> climb.best, climb.over
        (Setting(chunk=2.0, threads=1), True)
    """

    best: Setting = _USUAL
    _now: Setting | None = None
    _threads: Sequence[int] = ()
    _rates: dict[Setting, list[float]] = field(default_factory=dict)
    _warm: bool = False

    def setting(self, first: Setting, threads: Sequence[int] = ()) -> Setting:
        """What the next round is to be run by.

        Args:
            first: where the climb begins.
            threads: other numbers of threads that may be tried.
        """
        if self._now is None:
            self.best = self._now = first
            self._threads = threads
        return self._now

    @property
    def over(self) -> bool:
        """Whether every setting beside the best has been tried."""
        return self._rate(self.best) is not None and self._untried() is None

    def heard(self, rows: int, seconds: float) -> None:
        """A round of so many rows, by the setting that was told, took so long."""
        if self._now is None or self.over or rows == 0:
            return
        if not self._warm:  # of the first one much is spent on what is done once
            self._warm = True
            return
        self._rates.setdefault(self._now, []).append(rows / max(seconds, 1e-9))
        rate, best = self._rate(self._now), self._rate(self.best)
        if rate is None:
            return
        if best is not None and rate > _CLEARLY * best:
            self.best = self._now
        self._now = self._untried() or self.best

    def _rate(self, setting: Setting) -> float | None:
        """Rows a second; None where it has not been timed over enough rounds."""
        rates = self._rates.get(setting, ())
        return max(rates) if len(rates) >= ROUNDS else None

    def _untried(self) -> Setting | None:
        chunk, threads = self.best
        beside = [Setting(chunk, other) for other in self._threads if other != threads]
        beside += [Setting(size, threads) for size in (chunk * 2, chunk / 2) if 1 / _FURTHEST <= size <= _FURTHEST]
        return next((setting for setting in beside if self._rate(setting) is None), None)
