"""The workload and the turn-taking of all framework scripts. This module needs only NumPy.

    python SCRIPT.py FOLDER IN OUT

FOLDER contains the workload; IN and OUT are file descriptors. A script writes `ready`, and reads the request to make a
round, to evaluate its model, or to end.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Workload:
    """The data and the settings of a benchmark.

    `x` float32 `[n, 1, 28, 28]` in [0, 1], `y` int64 `[n]`, `held_x`, `held_y`; `parts`, each client's rows; and
    `model`, `cohort`, `batch`, `lr`, `rounds`, `numerics`.
    """

    def __init__(self, folder: str) -> None:
        work = json.loads((Path(folder) / "work.json").read_text())
        self.model, self.cohort, self.batch, self.lr = (work[n] for n in ("model", "cohort", "batch", "lr"))
        self.rounds, self.numerics = work["rounds"], work["numerics"]
        arrays = np.load(Path(folder) / "data.npz")
        self.x, self.held_x = (arrays[n].astype(np.float32)[:, None] / 255 for n in ("x", "held_x"))
        self.y, self.held_y = arrays["y"].astype(np.int64), arrays["held_y"].astype(np.int64)
        self.parts = np.split(arrays["order"], arrays["offsets"][1:-1])


@functools.cache
def workload(folder: str) -> Workload:
    """Read the workload; a process reads it once."""
    return Workload(folder)


class Turns(Workload):
    """The workload, and the connection of one framework's script to the benchmark."""

    def __init__(self) -> None:
        folder, requests, answers = sys.argv[1:4]
        self._requests, self._answers = os.fdopen(int(requests)), os.fdopen(int(answers), "w")
        super().__init__(folder)

    def wait(self, predict: Callable[[np.ndarray], np.ndarray]) -> None:
        """Report that a round is done, and wait for the next request; end the process if there is none.

        Args:
            predict: maps rows to classes with the current model.
        """
        self._say("ready")
        while (line := self._requests.readline().strip()) == "judge":
            self._say(str(float((np.asarray(predict(self.held_x)) == self.held_y).mean())))
        if line != "go":
            os._exit(0)

    def _say(self, text: str) -> None:
        self._answers.write(text + "\n")
        self._answers.flush()
