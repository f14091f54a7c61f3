"""The commands that read an experiment: `run`, `lr` and `plan`. They are loaded when one of them is called.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.cli.flags import ExperimentFlags
from atoll.cli.options import GROUPS, Json, Quiet, Track, Trust, flag, switch, trackers
from atoll.training.setting_texts import OUTPUT, RUNNING


def run(
    experiment: str | None = None,
    /,
    *,
    flags: ExperimentFlags = ExperimentFlags(),
    seeds: Annotated[int, switch(RUNNING, "Number of seeds. With several, mean ± sd is printed.", "ATOLL_SEEDS")] = 1,
    smoke: Annotated[bool, switch(RUNNING, "Try each stage once, in a temporary folder.", "ATOLL_SMOKE")] = False,
    title: Annotated[str | None, flag(OUTPUT, "A title of the run, for the page and for lists.")] = None,
    tag: Annotated[list[str] | None, flag(OUTPUT, "A tag of the run. May be repeated.")] = None,
    track: Track = None,
    ui: Annotated[bool, switch(OUTPUT, "Serve the page while the run goes on.", "ATOLL_UI")] = False,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Train, and record the run. Without arguments: federated averaging on digits with 100 clients.

    Parameters
    ----------
    experiment
        A TOML file with settings; of a pyproject.toml, the section [tool.atoll].
    """
    from atoll.cli import run

    it = flags.checked(experiment, trust)
    look = run.Look(as_json, quiet, title, tuple(tag or ()), trackers(track))
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}.", "at least one.", write=Line(shell="--seeds 5"))
    if smoke:
        return run.smoke(it, look)
    from atoll.cli.ui import page_process

    with page_process(it.out) if ui and run.prints(it) else contextlib.nullcontext():
        return run.run_training(it, look) if seeds == 1 else run.several(it, seeds, look)


def lr(
    experiment: str | None = None,
    /,
    *,
    which: Annotated[
        Literal["local", "server"],
        Parameter(group=GROUPS[RUNNING], help="The learning rate of the clients (local) or of the server."),
    ] = "local",
    flags: ExperimentFlags = ExperimentFlags(),
    trust: Trust = False,
    as_json: Json = False,
) -> int:
    """Run a learning-rate range test, draw it, and suggest a rate. Takes the flags of run.

    Parameters
    ----------
    experiment
        A TOML file with settings.
    """
    from atoll.cli import output
    from atoll.tools.lr import find_rate

    it = flags.checked(experiment, trust)
    finding = find_rate(it, which, Path(it.out))
    if as_json:
        output.print_json({"which": which, "suggestion": finding.suggestion, "plot": str(finding.plot)})
    else:
        print(finding.text())
    return 0


def attack(
    experiment: str | None = None,
    /,
    *,
    rule: Annotated[list[str] | None, flag(RUNNING, "An aggregator, such as Median(). May be repeated.")] = None,
    attack: Annotated[list[str] | None, flag(RUNNING, "An attack, such as ALIE(). May be repeated.")] = None,
    shares: Annotated[str, flag(RUNNING, "Shares of attackers, with commas.")] = "0,0.1,0.2,0.3",
    seeds: Annotated[int, switch(RUNNING, "Number of seeds.", "ATOLL_SEEDS")] = 1,
    flags: ExperimentFlags = ExperimentFlags(),
    trust: Trust = False,
    as_json: Json = False,
) -> int:
    """Train with each rule under each simulated attack, and draw accuracy against the share of attackers.

    Parameters
    ----------
    experiment
        A TOML file with settings.
    """
    from dataclasses import asdict

    from atoll.cli import output
    from atoll.tools import attack as tool

    try:
        levels = [float(share) for share in shares.split(",")]
    except ValueError:
        write = Line(shell="atoll attack --shares 0,0.1,0.2,0.3")
        raise UsageError(f"--shares {shares}.", "numbers with commas between them.", write=write) from None
    it = flags.checked(experiment, trust)
    found = tool.try_attacks(it, rule or tool.RULES, attack or tool.ATTACKS, levels, seeds, Path(it.out))
    if as_json:
        output.print_json({"rows": [asdict(row) for row in found.rows]})
    else:
        print(found.text())
    return 0


def sweep_command(
    experiment: str | None = None,
    /,
    *,
    over: Annotated[
        list[str] | None,
        flag(RUNNING, "KEY=VALUES: [a, b], log(low, high), linear(low, high) or int(low, high). May be repeated."),
    ] = None,
    trials: Annotated[int, switch(RUNNING, "Number of proposals; a grid of lists has its own.", "ATOLL_TRIALS")] = 20,
    seeds: Annotated[int, switch(RUNNING, "Number of seeds of each trial.", "ATOLL_SEEDS")] = 1,
    metric: Annotated[str | None, flag(RUNNING, "The metric that chooses. Default: the first of the task.")] = None,
    confirm: Annotated[int, switch(RUNNING, "Train the best with this number of new seeds.", "ATOLL_CONFIRM")] = 0,
    jobs: Annotated[int, switch(RUNNING, "Number of trainings at a time.", "ATOLL_JOBS")] = 1,
    flags: ExperimentFlags = ExperimentFlags(),
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Train with several values of settings, and choose the best. The same command continues an unfinished sweep.

    Parameters
    ----------
    experiment
        A TOML file with settings.
    """
    import sys

    from atoll.cli import output
    from atoll.tools import sweep as tool

    values = {}
    for text in over or ():
        key, equals, given = text.partition("=")
        if not equals:
            raise UsageError(f"--over {text}.", "KEY=VALUES.", write=Line(shell=f'--over "{tool.EXAMPLE}"'))
        values[key.strip()] = given.strip()
    it = flags.checked(experiment, trust)

    def note(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    found = tool.sweep(
        it,
        values,
        trials=trials,
        seeds=seeds,
        metric=metric,
        confirm=confirm,
        jobs=jobs,
        name=Path(experiment).stem if experiment else None,
        note=note,
    )
    if as_json:
        output.print_json(found.values())
    else:
        print(found.text())
    return 0 if found.finished else 130


def plan(
    experiment: str | None = None,
    /,
    *,
    flags: ExperimentFlags = ExperimentFlags(),
    trust: Trust = False,
    as_json: Json = False,
) -> int:
    """Predict the bytes, simulated time and memory of a training, and suggest changes that shorten a round.

    The setting `fleet` describes the simulated speed of the clients and of their links.

    Parameters
    ----------
    experiment
        A TOML file with settings.
    """
    from atoll.cli import output
    from atoll.tools.forecast import forecast

    prediction = forecast(flags.checked(experiment, trust))
    if as_json:
        output.print_json(prediction.values())
    else:
        print(prediction.text())
    return 0
