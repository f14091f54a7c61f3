"""The commands, as typed functions. They import slow modules in their bodies, so that `atoll --help` is fast.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Group, Parameter

from atoll import __version__
from atoll.base.errors import UsageError
from atoll.base.lines import quoted
from atoll.cli import look
from atoll.cli.options import GROUPS, Client, ClientOptions, Json, Out, Quiet, Track, Trust, flag, switch, trackers
from atoll.training.setting_texts import DATA, OUTPUT, RUNNING

TRAIN, INSPECT, NETWORK, HELP = (Group.create_ordered(name) for name in ("Train", "Look", "Network", "Help"))
EXAMPLES = """
    atoll run --baselines
    atoll run --data flats.csv --target price --model linear
    atoll run --recipe "fedadam(lr=0.1, cohort=10)" --seeds 5
    atoll resume latest --rounds 200
"""
SOURCES = """
Every setting can also be given in a TOML file (atoll run experiment.toml),
in atoll.toml, in [tool.atoll] of pyproject.toml, and in the environment:
--held-out 0.1 is ATOLL_HELD_OUT=0.1, and --data is ATOLL_DATASET, because
ATOLL_DATA is the folder of data files. Order of precedence: flags, --set,
environment, file.

    atoll run --baselines
    atoll run --split "Pathological(2)" --recipe "fedavg(lr=0.1, cohort=10)"
    atoll run --data flats.csv --target price --by city --model linear
    atoll run experiment.toml --set "plan.optimizer=adam(0.01)" --seeds 5
"""

app = App(
    name="atoll",
    help="Gradient descent, distributed and federated learning as one formula.",
    help_epilogue=EXAMPLES,
    help_format="plaintext",
    version=__version__,
    version_flags=["--version", "-V"],
    group_commands=HELP,
    suppress_keyboard_interrupt=False,
)
app.command(
    "atoll.cli.completion:install",
    name="--install-completion",
    help="Make the shell complete atoll's commands and flags.",
)
for name, help in (
    ("serve", "Serve a run to clients on other machines. Without settings: continue the unfinished run of the home."),
    ("invite", "Print a token for each client, one a line."),
    ("join", "Take part in a federation."),
    ("relay", "Serve clients, and send a server one sum over them."),
    ("status", "Show the clients and the open round of a server, or the state of a site."),
    ("verify", "Check the audit chain and all committed rounds of a server."),
    ("approve", "Approve the plan that waits at a site whose policy asks."),
    ("revoke", "End the certificates and invitations of a client."),
    ("service", "Print a unit of systemd that runs serve or join."),
):
    where = "join_command" if name == "join" else name
    app.command(f"atoll.cli.net_commands:{where}", name=name, group=NETWORK, help=help, help_epilogue="")
for order, (name, epilogue, help) in enumerate(
    (
        (
            "run",
            SOURCES,
            "Train, and record the run. Without arguments: federated averaging on digits with 100 clients.",
        ),
        ("lr", "", "Run a learning-rate range test, draw it, and suggest a rate. Takes the flags of run."),
        ("attack", "", "Train with each rule under each simulated attack. Takes the flags of run."),
        ("sweep", "", "Train with several values of settings, and choose the best. Takes the flags of run."),
        (
            "plan",
            "",
            "Predict bytes, time on the fleet's clock and memory, and suggest changes that shorten a round. Takes the "
            "flags of run.",
        ),
    )
):
    # Given by name: cyclopts imports the module, which builds the flags, only if one of these commands is called.
    where = f"atoll.cli.training_commands:{'sweep_command' if name == 'sweep' else name}"
    app.command(where, name=name, group=TRAIN, sort_key=min(order, 1) * 2, help=help, help_epilogue=epilogue)


def _command(group: Group, order: int, name: str | None = None) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command of this module by name: cyclopts reads its signature only if it is called."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        text = cleandoc(function.__doc__ or "").partition("\n\nParameters\n")[0]
        path = f"{__name__}:{function.__name__}"
        app.command(path, name=name or function.__name__, group=group, sort_key=order, help=text, help_epilogue="")
        return function

    return register


@_command(TRAIN, 1)
def resume(
    run: str,
    /,
    *,
    rounds: Annotated[int | None, flag(RUNNING, "Total number of rounds, at least those that are done.")] = None,
    more: Annotated[int | None, flag(RUNNING, "Number of rounds beyond those that are done.")] = None,
    any_version: Annotated[
        bool, switch(RUNNING, "Resume a run that other versions wrote.", "ATOLL_ANY_VERSION")
    ] = False,
    trust: Trust = False,
    track: Track = None,
    as_json: Json = False,
    quiet: Quiet = False,
    out: Out = None,
) -> int:
    """Resume a run from its last checkpoint. The result has the same bits as that of a run without a stop.

    Parameters
    ----------
    run
        Its name, a prefix or suffix of it, its path, or latest.
    """
    from atoll import runs as folders
    from atoll.cli.run import Look, run_training
    from atoll.runs.next_line import called, program_call, program_of, started_by_program
    from atoll.training.experiment import Experiment

    path = look.find(run, out)
    _refuse_served(path)
    total = folders.rounds_to_run(path, rounds, more)
    if (program := program_of(path)) is not None:
        given: dict[str, int] = {
            name: value for name, value in (("rounds", rounds), ("more", more)) if value is not None
        }
        raise started_by_program(path, program_call(program, **given, resume=called(path)))
    it = Experiment.read(path, trust=trust).override(rounds=total)
    return run_training(it, Look(as_json, quiet, trackers=trackers(track)), resume=path, any_version=any_version)


@_command(INSPECT, 3)
def runs(*, out: Out = None, as_json: Json = False) -> int:
    """List the runs, oldest first."""
    return look.print_runs(out=out, as_json=as_json)


@_command(INSPECT, 4, "track")
def track_command(
    run: str,
    /,
    *,
    to: Annotated[str, flag(OUTPUT, "The tracker: mlflow, tensorboard or wandb.")],
    out: Out = None,
) -> int:
    """Send a run that has ended to a tracker.

    Parameters
    ----------
    run
        Its name, a prefix or suffix of it, its path, or latest.
    """
    from atoll.track.tracking import send_run, tracker

    send_run(look.find(run, out), tracker(to))
    return 0


@_command(INSPECT, 4)
def show(
    run: str,
    /,
    *,
    why: Annotated[
        bool,
        Parameter(
            group=GROUPS[OUTPUT],
            help="Print the compute backend of the run, and the reason for it.",
            negative="",
            show_default=False,
        ),
    ] = False,
    follow: Annotated[bool, switch(OUTPUT, "Print each round when it is written.", "ATOLL_FOLLOW")] = False,
    out: Out = None,
    as_json: Json = False,
) -> int:
    """Show a run: its formula, a selection of its rounds, its best values, its failures and its files.

    Parameters
    ----------
    run
        Its name, a prefix or suffix of it, its path, or latest.
    """
    return look.print_run(run, why=why, follow=follow, out=out, as_json=as_json)


@_command(INSPECT, 4)
def ui(
    run: str | None = None,
    /,
    *,
    out: Out = None,
    port: Annotated[int, flag(RUNNING, "The port. Default: 0, a free one.")] = 0,
    host: Annotated[str, flag(RUNNING, "The address to listen on. Default: 127.0.0.1.")] = "127.0.0.1",
    no_open: Annotated[bool, switch(OUTPUT, "Open no browser.", "ATOLL_NO_OPEN")] = False,
    insecure: Annotated[
        bool, switch(RUNNING, "Listen beyond this machine, without encryption.", "ATOLL_INSECURE")
    ] = False,
    as_json: Json = False,
) -> int:
    """Serve the page of all runs, or of one: curves, clients and failures, live.

    Parameters
    ----------
    run
        The run that the page opens first.
    """
    from atoll.cli.ui import serve_page

    path = None if run is None else look.find(run, out)
    parent, name = (look.parent_of(out), "") if path is None else (path.parent, path.name)
    return serve_page(parent, name, host, port, insecure=insecure, browser=not no_open, as_json=as_json)


@_command(INSPECT, 4, "tag")
def tag_run(
    run: str,
    /,
    *,
    title: Annotated[str | None, flag(OUTPUT, "The title. Default: unchanged.")] = None,
    add: Annotated[list[str] | None, flag(OUTPUT, "A tag to add. May be repeated.")] = None,
    remove: Annotated[list[str] | None, flag(OUTPUT, "A tag to remove. May be repeated.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> int:
    """Give a run a title and tags. They change no fingerprint.

    Parameters
    ----------
    run
        Its name, a prefix or suffix of it, its path, or latest.
    """
    from atoll.cli import output
    from atoll.runs.format import plain
    from atoll.runs.labels import Labels

    path = look.find(run, out)
    labels = Labels.read(path).changed(title, add or (), remove or ())
    labels.write(path)
    if as_json:
        output.print_json({"run": path.name, "title": labels.title, "tags": labels.tags})
    else:
        print(plain(f"{path.name}   {labels.title or 'no title'}   {', '.join(labels.tags) or 'no tags'}", 2000))
    return 0


@_command(INSPECT, 5)
def compare(
    *run: str,
    metric: Annotated[str | None, flag(OUTPUT, "A column of metrics.jsonl. Default: the selection metric.")] = None,
    x: Annotated[
        Literal["round", "bytes", "seconds", "clock"] | None, flag(OUTPUT, "The horizontal axis. Default: round.")
    ] = None,
    group: Annotated[
        str | None, flag(OUTPUT, "One line for each value of this setting. Default: runs that differ only in the seed.")
    ] = None,
    band: Annotated[
        Literal["sd", "range", "ci"] | None, flag(OUTPUT, "The band over the runs of a line. Default: sd.")
    ] = None,
    target: Annotated[
        float | None,
        flag(OUTPUT, "Compare the costs at this value of the metric. Default: the best value that both runs reach."),
    ] = None,
    to: Annotated[
        Path | None,
        flag(OUTPUT, "The SVG, PNG or PDF file to write. Default for two runs: compare-A-B.svg in their parent."),
    ] = None,
    table: Annotated[Path | None, flag(OUTPUT, "The CSV, TeX or Markdown file to write.")] = None,
    width: Annotated[float, flag(OUTPUT, "Width of the figure in inches. Default: 3.3.")] = 3.3,
    out: Out = None,
    as_json: Json = False,
) -> int:
    """Compare runs. Runs that differ only in the seed form one line: mean, band over seeds.

    Two runs without further flags: settings, metrics, bytes and time, and the first tensor that differs.

    Parameters
    ----------
    run
        Names, prefixes, paths, globs such as "2026-*", and folders of run folders.
    """
    return look.print_comparison(
        *run,
        metric=metric,
        x=x,
        group=group,
        band=band,
        target=target,
        to=to,
        table=table,
        width=width,
        out=out,
        as_json=as_json,
    )


@_command(INSPECT, 6)
def replay(
    run: str,
    /,
    *,
    round: Annotated[int, Parameter(group=GROUPS[RUNNING], help="Number of the round, from 0.")],
    client: Annotated[str, Parameter(group=GROUPS[RUNNING], help="Number of the client, from 0, or its name.")],
    nth: Annotated[int, flag(RUNNING, "Number of the contribution, from 0, if several arrived. Default: 0.")] = 0,
    trust: Trust = False,
    out: Out = None,
) -> int:
    """Repeat the computation of one client in one round, and print its contribution.

    Parameters
    ----------
    run
        A run.
    """
    from atoll.tools.replay import replay as replayed

    number = int(client) if client.removeprefix("-").isdecimal() else client
    print(replayed(look.find(run, out), round, number, trust, None, nth).text())
    return 0


@_command(TRAIN, 3, "predict")
def predict_rows(
    run: str,
    data: Path,
    /,
    *,
    to: Annotated[Path | None, flag(OUTPUT, "The file to write, .csv or .parquet. Default: CSV on stdout.")] = None,
    proba: Annotated[bool, switch(OUTPUT, "Add the probability of each class.", "ATOLL_PROBA")] = False,
    best: Annotated[bool, switch(RUNNING, "Use the best model instead of the last.", "ATOLL_BEST")] = False,
    clients: ClientOptions = ClientOptions(),
    as_: Annotated[str, flag(OUTPUT, "The name of the added column. Default: prediction.", "--as")] = "prediction",
    overwrite: Annotated[bool, switch(OUTPUT, "Replace an existing file.", "ATOLL_OVERWRITE")] = False,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    out: Out = None,
) -> int:
    """Predict each row of a file with the model of a run. Columns are matched by name.

    If the file has the target, the loss and the metrics are printed to stderr, over all rows and by client.

    Parameters
    ----------
    run
        Its name, a prefix or suffix of it, its path, or latest.
    data
        A CSV, Parquet or Excel file, or a folder with x.npy.
    """
    from atoll.cli.predict import Request, predict_file
    from atoll.training.experiment import predictor

    path = look.find(run, out)
    request = Request(path, data, to, proba, clients.by, as_, as_json, quiet, overwrite)
    return predict_file(predictor(path, best=best, trust=trust, client=clients.client), request)


@_command(INSPECT, 7)
def export(
    run: str,
    /,
    *,
    dtype: Annotated[
        Literal["float32", "bf16", "int8"], Parameter(group=GROUPS[RUNNING], help="Format of the numbers.")
    ] = "float32",
    format: Annotated[
        Literal["safetensors", "pt2", "onnx"],
        Parameter(group=GROUPS[RUNNING], help="safetensors: numbers; pt2 or onnx: a graph from rows to predictions."),
    ] = "safetensors",
    to: Annotated[Path | None, flag(OUTPUT, "The file to write. Default: in the run's folder.")] = None,
    client: Client = None,
    trust: Trust = False,
    out: Out = None,
) -> int:
    """Write the model of a run as a smaller file, and print the loss of accuracy; or as a graph with its input.

    Parameters
    ----------
    run
        A run.
    """
    from atoll.tools.export import export as exported

    if format != "safetensors":
        from atoll.tools.graph import export_graph

        if dtype != "float32":
            raise UsageError(f"--format {format} --dtype {dtype}.", "float32.", "the graph computes as the run did.")
        print(export_graph(look.find(run, out), to, trust, format, client))
        return 0
    print(exported(look.find(run, out), dtype, to, trust, client=client).text())
    return 0


@_command(INSPECT, 7)
def stats(
    data: str,
    /,
    *,
    by: Annotated[str | None, flag(OUTPUT, "The column that names the client of a row. Default: one client.")] = None,
    as_json: Json = False,
) -> int:
    """Describe the rows of all clients from sums: counts, means, quantiles, correlations, classes by client.

    Parameters
    ----------
    data
        The name of a data set, or the path of a table.
    """
    from atoll.cli import output
    from atoll.data import load as load_data
    from atoll.tools.stats import describe
    from atoll.training.known_names import check_data

    check_data(data)
    found = describe(load_data(data) if by is None else load_data(data, by=by))
    if as_json:
        output.print_json(found.values())
    else:
        print(found.text())
    return 0


@_command(TRAIN, 4, "new")
def start_project(
    name: Path,
    /,
    *,
    template: Annotated[
        str, flag(OUTPUT, "tabular, torch, own-loop, transformers or sklearn. Default: tabular.")
    ] = "tabular",
    data: Annotated[Path | None, flag(DATA, "A CSV, Parquet or Excel file. Default: a data set by name.")] = None,
    target: Annotated[str | None, flag(DATA, "The column to predict. Default: proposed from the header.")] = None,
) -> int:
    """Write a project in a new folder: experiment.toml, a module, a README and a test.

    Parameters
    ----------
    name
        The folder.
    """
    from atoll.tools.new import new_project

    for path in new_project(name, template, data, target):
        print(path)
    print(f"Write: cd {quoted(str(name))} && atoll run experiment.toml", file=sys.stderr)
    return 0


@_command(HELP, 8)
def doctor() -> int:
    """Check this machine and this installation, and print a fix for each problem."""
    from atoll.cli import output
    from atoll.tools.doctor import examine

    checks = examine()
    print(output.format_checks(checks))
    return 0 if all(check.ok for check in checks) else 1


def _refuse_served(run: Path) -> None:
    """Refuse to resume a run in the home of a server or of a site."""
    from atoll.cli.show import home_of

    home, kind = home_of(run)
    if kind == "server":
        raise UsageError(
            f"{run.name} is a run of the server in {home}.",
            "the command that serves it.",
            "the clients have the rows, and the database of the server has the rounds.",
            f"atoll serve --home {quoted(str(home))}",
        )
    if kind == "site":
        raise UsageError(
            f"{run.name} is a run in which the site in {home} took part.",
            "the command that takes part in a run.",
            "the server has the rounds of the run.",
            f"atoll join --home {quoted(str(home))} --data my.csv",
        )


def parsed_command(words: Sequence[str]) -> int:
    """Parse the words of one command, run it, and return its exit code."""
    try:
        code = app(list(words), exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        from atoll.cli.mistakes import usage_error

        raise usage_error(error, app) from error
    return code if isinstance(code, int) else 0
