"""A server or a client as a service of systemd: its unit, and the signs of life that the manager expects.

Tests: tests/faults/test_operation.py
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from atoll.base.errors import UsageError
from atoll.base.lines import Line

_STATE = Path("/var/lib")
_STOP_S = 60  # more than the 30 seconds of --drain
_UNIT = """\
# Save this text as /etc/systemd/system/{unit}.service, then:
#   useradd --system --shell /usr/sbin/nologin atoll; chown -R atoll: {home}
#   systemctl daemon-reload; systemctl enable --now {unit}
[Unit]
Description={description}
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
User=atoll
Environment=PYTHONUNBUFFERED=1
ExecStart={command}
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2
WatchdogSec=60
TimeoutStartSec=600
TimeoutStopSec={stop}
StateDirectory={state}
StateDirectoryMode=0700
WorkingDirectory={home}
UMask=0077
LimitCORE=0
LimitNOFILE=65536
CapabilityBoundingSet=
LockPersonality=yes
NoNewPrivileges=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=read-only
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectSystem=strict
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service

[Install]
WantedBy=multi-user.target
"""


def unit(command: str, words: Sequence[str], python: str = sys.executable) -> str:
    """The text of a unit.

    Args:
        command: "serve" or "join".
        words: the further words of the command, with `--home`.
        python: the interpreter of the service.
    Raises:
        UsageError: another command, no home below /var/lib, or a token in the words.
    """
    if command not in ("serve", "join"):
        raise UsageError(
            f"atoll service {command}.", "serve or join.", write="atoll service serve --home /var/lib/atoll"
        )
    home = _home(command, words)
    for word in words:
        if word.startswith("atoll1.") or word == "-":
            raise UsageError(
                "A token in the unit of a service.",
                "a home that is enrolled.",
                "units are public, and a service has no stdin; enrol once by hand.",
                f"atoll join - --home {home} --data site.csv --check",
            )
        if any(not c.isprintable() for c in word):
            raise UsageError(f"The word {word!r} of a service.", "words without line ends and control characters.")
    # In a unit % begins a specifier and $ a variable.
    line = shlex.join([python, "-m", "atoll", command, *words]).replace("%", "%%").replace("$", "$$")
    name = f"atoll-{command}-{home.name}"
    text = "atoll server" if command == "serve" else "atoll client"
    state = home.relative_to(_STATE)
    return _UNIT.format(unit=name, description=text, command=line, home=home, state=state, stop=_STOP_S)


def _home(command: str, words: Sequence[str]) -> Path:
    """The home in the words of a command."""
    given = [b for a, b in pairwise(words) if a == "--home"]
    given += [word.partition("=")[2] for word in words if word.startswith("--home=")]
    home = Path(given[-1]) if given else Path()
    plain = all(c.isalnum() or c in "/-_." for c in str(home)) and ".." not in home.parts
    if not plain or _STATE not in home.parents:
        raise UsageError(
            f"The home {str(home)!r} of a service.",
            f"a folder below {_STATE}, of letters, digits, -, _ and dots.",
            "the service may write to this folder only.",
            Line(shell=f"atoll service {command} --home /var/lib/atoll"),
        )
    return home


def notify(state: str) -> None:
    """Send a state to the manager of services, such as READY=1; without a manager do nothing."""
    place = os.environ.get("NOTIFY_SOCKET", "")
    if not place:
        return
    address = "\0" + place[1:] if place.startswith("@") else place
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(state.encode(), address)


def watchdog_s() -> float | None:
    """The seconds between two signs of life: half the time of the watchdog; None without a watchdog."""
    text, own = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(text) / 2e6 if text.isdigit() and int(text) > 0 and own == str(os.getpid()) else None
