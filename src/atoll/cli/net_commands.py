"""The commands of a network, such as `serve`, `invite`, `join` and `status`. Loaded when one is called.

With `--json` each command prints one object a line on stdout. Messages for people go to stderr.

Tests: tests/surface/test_network_commands.py, tests/faults/test_rehearsal.py
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.cli.flags import ExperimentFlags, pairs
from atoll.cli.options import GROUPS, Lines, Trust, flag
from atoll.training.setting_texts import RUNNING

if TYPE_CHECKING:
    from atoll.runs.events import Run

Home = Annotated[str, Parameter(group=GROUPS[RUNNING], help="The folder of the server or of the site.")]
NET = "net."


@Parameter(name="*")
@dataclass(frozen=True)
class IdentityFlags:
    """The certificate of an institution, in place of that of the federation."""

    cert: Annotated[str | None, flag(RUNNING, "A certificate of your institution, PEM. With --key and --ca.")] = None
    key: Annotated[str | None, flag(RUNNING, "The key of --cert, PEM, with mode 0600.")] = None
    ca: Annotated[str | None, flag(RUNNING, "The authority of the other side, PEM.")] = None


@Parameter(name="*")
@dataclass(frozen=True)
class PlaceFlags:
    """Where a server listens."""

    listen: Annotated[str | None, flag(RUNNING, "HOST:PORT. Default: that of the last start, else 127.0.0.1:0.")] = None
    name: Annotated[list[str] | None, flag(RUNNING, "A host name of this server for its certificate.")] = None


@Parameter(name="*")
@dataclass(frozen=True)
class ServerFlags:
    """How a server works."""

    min_clients: Annotated[int, flag(RUNNING, "Clients that an open run waits for. Default: 2.")] = 2
    drain: Annotated[float, flag(RUNNING, "Seconds in which clients may leave at the end. Default: 30.")] = 30.0
    window: Annotated[str, flag(RUNNING, "Bytes of large messages in flight. Default: 256 MiB.")] = "256MiB"
    keep_updates: Annotated[bool, Parameter(group=GROUPS[RUNNING], negative="", show_default=False,
        help="Keep all accepted updates on disk, for `atoll verify`.")] = False  # fmt: skip
    insecure: Annotated[bool, Parameter(group=GROUPS[RUNNING], negative="", show_default=False,
        help="No TLS, for a rehearsal on the loopback interface.")] = False  # fmt: skip
    stay: Annotated[bool, Parameter(group=GROUPS[RUNNING], negative="", show_default=False,
        help="Listen after the run, and wait for the next one.")] = False  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True)
class CodeFlags:
    """A site's own code by the names that the run uses."""

    model_as: Annotated[list[str] | None, flag(RUNNING, "NAME=module:function: the site's own model.")] = None
    part: Annotated[list[str] | None, flag(RUNNING, "NAME=module:Class: a part, loss or metric of the site.")] = None


def serve(
    experiment: str | None = None,
    /,
    *,
    home: Home,
    flags: ExperimentFlags = ExperimentFlags(),
    place: PlaceFlags = PlaceFlags(),
    identity: IdentityFlags = IdentityFlags(),
    server: ServerFlags = ServerFlags(),
    schema: Annotated[str | None, flag(RUNNING, "An input.json, if this server has no rows. Not with --data.")] = None,
    log: Annotated[Literal["text", "json"], flag(RUNNING, "The form of the log on stderr. Default: text.")] = "text",
    trust: Trust = False,
    as_json: Lines = False,
) -> int:
    """Serve a run to clients on other machines. Without settings: continue the unfinished run of the home.

    --metrics 127.0.0.1:9464 serves /metrics to Prometheus, without values of models or rows.

    Parameters
    ----------
    experiment
        A TOML file with settings.
    """
    from atoll.net.spec import Server, check_extra

    check_extra()
    from atoll.net.identity import Files

    net, address, own = _split(flags)
    if schema is not None and getattr(own, "data", None) is not None:
        raise UsageError(
            "--schema with --data.",
            "one of them.",
            "--schema is for a server without rows; --input reads the rows of --data by an input.json.",
            Line(shell=f"--input {schema}"),
        )
    given = schema is not None or experiment is not None or any(value is not None for value in vars(own).values())
    _refuse_wildcard(place.listen)
    spec = Server(
        home,
        place.listen,
        tuple(place.name or ()),
        min_clients=server.min_clients,
        schema=schema,
        window=_size(server.window),
        drain=server.drain,
        files=Files.read(identity.cert, identity.key, identity.ca),
        keep_updates=server.keep_updates,
        insecure=server.insecure,
        **_net_settings(net),
    )
    from atoll.net.loop import collect_rarely
    from atoll.training.serve import serve_run
    from atoll.training.stay import hand_over, serve_runs

    collect_rarely()
    notify = Printer(as_json, ("listening", "round"), log == "json")
    it = own.experiment(experiment, trust) if given else None
    if it is not None and hand_over(it, spec):
        print("The server that stays at this home takes the run.", file=sys.stderr)
        return 0
    show = partial(_show_run, as_json)
    if server.stay:
        return serve_runs(it, spec, show, notify=notify, trust=trust, metrics=address)
    run, terminated = serve_run(it, spec, show, notify=notify, trust=trust, metrics=address)
    return 0 if terminated or run.status == "done" else 130


def _show_run(as_json: bool, run: Run) -> None:
    """Print the end of a run."""
    from atoll.cli import output

    if as_json:
        output.print_json(output.outcome(run))
        sys.stdout.flush()
    else:
        print(run.summary())


class Printer:
    """Prints events: as JSON objects on stdout, and as lines on stderr. An equal line for people is printed once.

    Args:
        as_json: whether stdout gets JSON objects.
        kinds: the events that stdout gets; None: all.
        log: whether stderr gets one JSON object for each event; else it gets lines for people.
    """

    def __init__(self, as_json: bool, kinds: tuple[str, ...] | None = None, log: bool = False) -> None:
        self._as_json, self._kinds, self._log, self._last = as_json, kinds, log, ""
        self._place: dict[str, Any] = dict.fromkeys(("run", "round", "client", "work"))

    def __call__(self, facts: Mapping[str, Any]) -> None:
        from atoll.cli import output

        printed = self._as_json and (self._kinds is None or facts["event"] in self._kinds)
        if printed:
            output.print_json(dict(facts))
            sys.stdout.flush()
        if self._log:
            self._place |= {n: facts[n] for n in ("run", "round") if n in facts}
            row = {"time": time.time(), **self._place, **facts}
            print(json.dumps(row, default=str), file=sys.stderr, flush=True)  # ASCII: no control character is printed
        elif not printed and facts["event"] != "stages":
            words = " ".join(f"{n}={_shown(v)}" for n, v in facts.items() if n != "event")
            line = f"{facts['event']:<12} {words}"
            if line != self._last:  # a site tries a server that does not answer again and again
                print(line, file=sys.stderr, flush=True)
            self._last = line


def _shown(value: Any) -> str:
    from atoll.net.wire import escaped

    return escaped(f"{value:.6g}" if isinstance(value, float) else str(value))


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise UsageError(f"net.share = {text}.", "true or false.", write=Line(shell="--set net.share=false"))
    return text == "true"


_OF_SERVER = ("absent_s", "lease_s", "work_s", "max_rows", "step_s", "keys_s", "share")
_KINDS: Mapping[str, Any] = {"max_rows": int, "share": _switch}


def _split(flags: ExperimentFlags) -> tuple[dict[str, str], str | None, ExperimentFlags]:
    """The settings of the server, `--set net.NAME=VALUE`, the address for Prometheus, and the flags without them.

    `--metrics` takes names of metrics and one address, `HOST:PORT`.
    """
    given, named = list(flags.settings or []), list(getattr(flags, "metrics", None) or [])
    net = [text for text in given if text.strip().startswith(NET)]
    rest = [text for text in given if text not in net]
    addresses = [text for text in named if text.rpartition(":")[2].isdigit()]
    if len(addresses) > 1:
        write = Line(shell=f"--metrics {addresses[0]}")
        raise UsageError(f"--metrics with {len(addresses)} addresses.", "one address.", write=write)
    names = [text for text in named if text not in addresses]
    make: Any = ExperimentFlags
    own = make(**{**vars(flags), "settings": rest or None, "metrics": names or None})
    return pairs(net), addresses[0] if addresses else None, own


def _net_settings(given: Mapping[str, str]) -> dict[str, Any]:
    known: dict[str, Any] = {name: _KINDS.get(name, float) for name in _OF_SERVER}
    out: dict[str, Any] = {}
    for key, text in given.items():
        name = key.removeprefix(NET)
        if name not in known:
            raise UsageError(f"--set {key}={text}.", f"one of {', '.join(NET + n for n in known)}.")
        try:
            out[name] = known[name](text)
        except ValueError:
            raise UsageError(f"--set {key}={text}.", "a number.", write=Line(shell=f"--set {key}=60")) from None
    return out


def _size(text: str) -> int:
    """A size in bytes, such as 256MiB.

    Example:
        >>> _size("1MiB"), _size("4096")
        (1048576, 4096)
    """
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "": 1}
    number = text.rstrip("KMGiB")
    if not number.isdigit() or text[len(number) :] not in units:
        raise UsageError(
            f"--window {text}.", "a number of bytes, with KiB, MiB or GiB.", write=Line(shell="--window 256MiB")
        )
    return int(number) * units[text[len(number) :]]


def _refuse_wildcard(listen: str | None) -> None:
    if listen is not None and not listen.rpartition(":")[2].isdigit():
        raise UsageError(f"--listen {listen}.", "HOST:PORT.", write=Line(shell="--listen 0.0.0.0:4433"))


def invite(
    *names: str,
    home: Home,
    address: Annotated[str | None, flag(RUNNING, "HOST:PORT for sites. Default: the one listened on.")] = None,
    san: Annotated[str | None, flag(RUNNING, "Alternative name under your own authority: DNS:site.example.")] = None,
    days: Annotated[float, flag(RUNNING, "Days until the token expires. Default: 7.")] = 7.0,
    relay: Annotated[
        int | None, flag(RUNNING, "The tokens are for `atoll relay`, with at most N clients each.")
    ] = None,
    as_json: Lines = False,
) -> int:
    """Print a token for each client, one a line. A token is valid once; give it to the site in private.

    Parameters
    ----------
    names
        Names of clients: a-z, 0-9 and -.
    """
    from atoll.cli import output
    from atoll.net.home import ServerHome
    from atoll.net.spec import check_extra

    check_extra()
    if not names:
        raise UsageError("No name.", "the name of each client.", write=f"atoll invite site-1 --home {home}")
    at = ServerHome.open(Path(home), serve=False)
    try:
        for name in names:
            token = at.invite(name, address, san, days, relay)
            if as_json:
                expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(token.expires))
                output.print_json({"name": name, "token": token.text(), "expires": expires})
            else:
                print(token.text())
    finally:
        at.close()
    return 0


def relay(
    token: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *,
    home: Home,
    place: PlaceFlags = PlaceFlags(),
    code: CodeFlags = CodeFlags(),
    drain: Annotated[float, flag(RUNNING, "Seconds in which clients may leave at the end. Default: 30.")] = 30.0,
    window: Annotated[str, flag(RUNNING, "Bytes of large messages in flight. Default: 256 MiB.")] = "256MiB",
    insecure: Annotated[bool, Parameter(group=GROUPS[RUNNING], negative="", show_default=False,
        help="No TLS for its clients, for a rehearsal on the loopback interface.")] = False,
    once: Annotated[bool, Parameter(group=GROUPS[RUNNING], negative="", show_default=False,
        help="End with the run.")] = False,
    as_json: Lines = False,
) -> int:  # fmt: skip
    """Serve clients, and send a server one sum over them. `atoll invite NAME --home HOME` makes their tokens.

    Parameters
    ----------
    token
        The token of `atoll invite --relay` at the server, the first time; - reads it from stdin.
    """
    from atoll.net.spec import Server, check_extra

    check_extra()
    from atoll.net.join import run_relay

    _refuse_wildcard(place.listen)
    return run_relay(
        _token(token, "relay"),
        Server(
            home,
            place.listen,
            tuple(place.name or ()),
            window=_size(window),
            drain=drain,
            insecure=insecure,
        ),
        own=_mapped("--model-as", code.model_as) | _mapped("--part", code.part),
        once=once,
        notify=Printer(as_json),
    )


def _token(text: str | None, command: str) -> str | None:
    """The token on the command line, or on stdin."""
    if text is not None and text[:1] == "-" != text:
        required = "a token, - for a token on stdin, or an option of the command."
        raise UsageError(f"Unknown option: {text}.", required, write=f"atoll {command} --help")
    return sys.stdin.readline().strip() if text == "-" else text


def join_command(
    token: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *,
    home: Home,
    data: Annotated[str, flag(RUNNING, "The rows of this site: a table, a folder of arrays, or my_site.py:function.")],
    by: Annotated[str | None, flag(RUNNING, "The column of clients, if the run scales each client by itself.")] = None,
    seat: Annotated[bool, Parameter(group=GROUPS[RUNNING], negative="", show_default=False,
        help="Rehearsal: hold this client's part of the run's split of a known data set.")] = False,
    device: Annotated[str, flag(RUNNING, "cpu, cuda, cuda:1 or auto. Default: cpu.")] = "cpu",
    code: CodeFlags = CodeFlags(),
    identity: IdentityFlags = IdentityFlags(),
    once: Annotated[bool, Parameter(group=GROUPS[RUNNING], negative="", show_default=False,
        help="End with the run.")] = False,
    policy: Annotated[str | None, flag(RUNNING, "A TOML file with the limits of this site. It is never sent.")] = None,
    check: Annotated[bool, Parameter(group=GROUPS[RUNNING], negative="", show_default=False,
        help="Check the data, the policy and the connection, and compute one gradient. Send nothing of it.")] = False,
    as_json: Lines = False,
) -> int:  # fmt: skip
    """Take part in a federation. The token is needed only the first time; - reads it from stdin.

    Parameters
    ----------
    token
        The token of `atoll invite`.
    """
    from atoll.net.spec import check_extra

    check_extra()
    from atoll.net.identity import Files
    from atoll.net.join import join_federation
    from atoll.net.loop import collect_rarely
    from atoll.net.policy import Policy

    collect_rarely()
    text = _token(token, "join")
    own = _mapped("--model-as", code.model_as) | _mapped("--part", code.part)
    limits = Policy() if policy is None else Policy.read(Path(policy))
    return join_federation(
        text,
        Path(home),
        data,
        seat=seat,
        by=by,
        device=device,
        own=own,
        once=once,
        policy=limits,
        check=check,
        files=Files.read(identity.cert, identity.key, identity.ca),
        notify=Printer(as_json),
    )


def _mapped(flag: str, texts: list[str] | None) -> dict[str, Any]:
    """The site's own code by name, from NAME=module:function."""
    from atoll import models

    out = {}
    for text in texts or ():
        name, equals, where = text.partition("=")
        if not equals or ":" not in where:
            line = f"{flag} {name or 'net'}=my_site:{name or 'net'}"
            raise UsageError(f"{flag} {text}.", "NAME=module:function.", write=Line(shell=line))
        out[name] = models.factory(where)
    return out


def approve(*, home: Home, as_json: Lines = False) -> int:
    """Approve the plan that waits at a site whose policy has ask = true."""
    from atoll.cli import output
    from atoll.net.policy import approve_plan

    found = approve_plan(Path(home))
    if as_json:
        output.print_json(found)
    else:
        print(f"Approved for {found['run']}: {found['plan']}")
    return 0


def revoke(name: str, /, *, home: Home, as_json: Lines = False) -> int:
    """End the certificates and open invitations of a client. A running server notices it at its next frame.

    Parameters
    ----------
    name
        The name of the client.
    """
    from atoll.cli import output
    from atoll.net.spec import check_extra

    check_extra()
    at = _existing(home)
    try:
        client = at.database.revoke(name)
    finally:
        at.close()
    if as_json:
        output.print_json({"name": name, "client": client, "state": "revoked"})
    else:
        print(f"Client {client} ({name}) is revoked.")
    return 0


def _existing(home: str) -> Any:
    """The home of a server that exists."""
    from atoll.net.home import ServerHome

    if not (Path(home) / "federation.db").exists():
        raise UsageError(
            f"The folder {home} has no federation.db.", "the home of a server.", write=f"atoll serve --home {home}"
        )
    return ServerHome.open(Path(home), serve=False)


def verify(*, home: Home, as_json: Lines = False) -> int:
    """Check the audit chain, the digests and the weights of all committed rounds. Exit 0 only if all checks pass.

    A run of `atoll serve --keep-updates` is computed again from its updates.
    """
    from atoll.cli import output
    from atoll.net.spec import check_extra

    check_extra()
    at = _existing(home)
    try:
        faults = at.verify()
        run = at.database.get("run")
    finally:
        at.close()
    again: dict[str, int] = {}
    if (Path(home) / "updates").is_dir():
        from atoll.training.audit import recomputed

        for name, rounds, wrong in recomputed(Path(home)):
            again[name] = rounds
            faults += wrong
    if as_json:
        output.print_json({"ok": not faults, "faults": faults, "run": run, "recomputed": again})
    else:
        print("\n".join([*(f"{n}: {k} rounds computed again." for n, k in again.items()), *faults]))
        print("Some checks failed." if faults else "All checks passed.")
    return 1 if faults else 0


def service(
    command: str,
    /,
    *words: Annotated[str, Parameter(allow_leading_hyphen=True)],
) -> int:
    """Print a unit of systemd that runs `atoll serve` or `atoll join` with these words, and limits its rights.

    Parameters
    ----------
    command
        serve or join.
    words
        The further words of the command, with --home /var/lib/NAME.
    """
    from atoll.net.systemd import unit

    print(unit(command, words), end="")
    return 0


def status(*, home: Home, as_json: Lines = False) -> int:
    """Show the clients and the open round of a server, or the connection and the ledger of a site."""
    from atoll.cli import output
    from atoll.net.spec import check_extra

    check_extra()
    path = Path(home)
    if (path / "site.json").exists():
        from atoll.net.join import site_status

        facts = site_status(path)
    else:
        at = _existing(home)
        try:
            facts = at.status()
        finally:
            at.close()
    if as_json:
        output.print_json(facts)
    else:
        print(_table(facts))
    return 0


def _table(facts: Mapping[str, Any]) -> str:
    from atoll.runs.summary import grid

    lines = [f"{n:<12}{_dated(n, v)}" for n, v in facts.items() if not isinstance(v, (list, dict))]
    for name, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            columns = list(value[0])
            rows = [columns, *([_dated(c, row.get(c)) for c in columns] for row in value)]
            lines += ["", name, *grid(rows)]
        elif isinstance(value, (list, dict)):
            lines.append(f"{name:<12}{json.dumps(value)}")
    return "\n".join(lines)


def _dated(name: str, value: Any) -> str:
    """A cell of a table for people: the moments of a status are seconds since 1970."""
    if name in ("time", "seen") and isinstance(value, float):
        return datetime.fromtimestamp(value, UTC).isoformat(sep=" ", timespec="seconds")
    return _shown(value)
