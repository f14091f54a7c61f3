"""Autotuning of the chunk size and the number of threads during training. Neither changes a bit of the result.

The method is hill climbing. The best setting so far and its neighbours are each timed over some rounds. A neighbour
that is clearly faster becomes the best, and its neighbours are timed next. If no neighbour is faster, the search ends
and has no further cost.

Tests: tests/rates/test_tuning.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from atoll.compute import limits


class Trial(NamedTuple):
    """The chunk size, as a multiple of the size chosen for the model, and the number of threads."""

    chunk: float
    threads: int


_USUAL = Trial(1.0, 1)


@dataclass
class Tuning:
    """Hill climbing from a first setting to a local optimum of speed.

    Example:
        >>> climb = Tuning()
        >>> for _ in range(20):  # a machine for which twice the chunk is best
        ...     now = climb.setting(Trial(1.0, 1))
        ...     climb.record(rows=100, seconds={1.0: 2.0, 2.0: 1.0}.get(now.chunk, 3.0))
        >>> climb.best, climb.converged
        (Trial(chunk=2.0, threads=1), True)
    """

    best: Trial = _USUAL
    _now: Trial | None = None
    _threads: Sequence[int] = ()
    _rates: dict[Trial, list[float]] = field(default_factory=dict)
    _warm: bool = False

    def setting(self, first: Trial, threads: Sequence[int] = ()) -> Trial:
        """The setting for the next round.

        Args:
            first: the start of the search.
            threads: other numbers of threads to try.
        """
        if self._now is None:
            self.best = self._now = first
            self._threads = threads
        return self._now

    @property
    def converged(self) -> bool:
        """Whether the best setting and all its neighbours have been timed."""
        return self._rate(self.best) is not None and self._untried() is None

    def record(self, rows: int, seconds: float) -> None:
        """Record the time of a round with the current setting.

        Args:
            rows: the rows that the round processed.
            seconds: its duration.
        """
        if self._now is None or self.converged or rows == 0:
            return
        if not self._warm:  # the first round includes one-time costs
            self._warm = True
            return
        self._rates.setdefault(self._now, []).append(rows / max(seconds, 1e-9))
        rate, best = self._rate(self._now), self._rate(self.best)
        if rate is None:
            return
        if best is not None and rate > limits.FASTER_RATIO * best:
            self.best = self._now
        self._now = self._untried() or self.best

    def _rate(self, setting: Trial) -> float | None:
        """Rows per second; None before the setting was timed for `limits.TUNED_ROUNDS` rounds."""
        rates = self._rates.get(setting, ())
        return max(rates) if len(rates) >= limits.TUNED_ROUNDS else None

    def _untried(self) -> Trial | None:
        chunk, threads = self.best
        beside = [Trial(chunk, other) for other in self._threads if other != threads]
        far = limits.FURTHEST_CHUNK
        beside += [Trial(size, threads) for size in (chunk * 2, chunk / 2) if 1 / far <= size <= far]
        return next((setting for setting in beside if self._rate(setting) is None), None)
