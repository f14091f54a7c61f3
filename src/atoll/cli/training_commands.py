"""The commands that read an experiment: `run`, `lr` and `plan`. They are loaded when one of them is called.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from atoll.cli.flags import ExperimentFlags
from atoll.cli.options import GROUPS, Json, Quiet, Trust, switch
from atoll.errors import UsageError
from atoll.training.setting_texts import RUNNING


def run(
    experiment: str | None = None,
    /,
    *,
    flags: ExperimentFlags = ExperimentFlags(),
    seeds: Annotated[int, switch(RUNNING, "Train with so many seeds, and tell mean ± sd.", "ATOLL_SEEDS")] = 1,
    smoke: Annotated[bool, switch(RUNNING, "Try every stage once, in a temporary folder.", "ATOLL_SMOKE")] = False,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Train, and write the run down. Without arguments: federated averaging of the digits over 100 clients.

    Parameters
    ----------
    experiment
        A TOML file with settings; [tool.atoll] where it is a pyproject.toml.
    """
    from atoll.cli import work

    it = flags.experiment(experiment, trust)
    look = work.Look(as_json, quiet)
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}.", "at least one.", write="--seeds 5")
    if smoke:
        return work.smoke(it, look)
    return work.train(it, look) if seeds == 1 else work.several(it, seeds, look)


def lr(
    experiment: str | None = None,
    /,
    *,
    which: Annotated[
        Literal["local", "server"], Parameter(group=GROUPS[RUNNING], help="Whose: the clients', or the server's.")
    ] = "local",
    flags: ExperimentFlags = ExperimentFlags(),
    trust: Trust = False,
    as_json: Json = False,
) -> int:
    """Find a learning rate by a range test, draw it, and suggest one. Takes the flags of run.

    Parameters
    ----------
    experiment
        A TOML file with settings.
    """
    from atoll.cli import words
    from atoll.tools.lr import find

    it = flags.experiment(experiment, trust)
    finding = find(it, which, Path(it.out))
    if as_json:
        words.tell({"which": which, "suggestion": finding.suggestion, "plot": str(finding.plot)})
    else:
        print(finding.text())
    return 0


def plan(
    experiment: str | None = None,
    /,
    *,
    flags: ExperimentFlags = ExperimentFlags(),
    trust: Trust = False,
    as_json: Json = False,
) -> int:
    """Predict bytes, time on the fleet's clock and memory, and what would make a round shorter. Takes the flags of run.

    Parameters
    ----------
    experiment
        A TOML file with settings.
    """
    from atoll.cli import words
    from atoll.tools.forecast import forecast

    foreseen = forecast(flags.experiment(experiment, trust))
    if as_json:
        words.tell(foreseen.told())
    else:
        print(foreseen.text())
    return 0
