"""Which requests the page answers: a token or its cookie, a known host, and headers that keep a browser inside.

Tests: tests/surface/test_ui.py
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Mapping

from atoll.base.errors import UsageError
from atoll.base.lines import Line

HEADERS = {
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether a host name or address belongs to this machine only.

    Example:
        >>> is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
        (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def refuse_open_host(host: str, insecure: bool) -> None:
    """Refuse an address that other machines reach: the page has no encryption.

    Raises:
        UsageError: the host is beyond loopback, and `insecure` is not set.
    """
    if not insecure and not is_loopback(host):
        raise UsageError(
            f"--host {host}.",
            "an address of this machine only.",
            "the page has no encryption: each machine on the way reads the token and the values. "
            "On the other machine write: ssh -L 8000:127.0.0.1:8000 USER@THIS-MACHINE",
            Line(shell="atoll ui --port 8000 --no-open"),
        )


def host_of(header: str) -> str:
    """The host of a `Host` header, without its port.

    Example:
        >>> host_of("localhost:81"), host_of("[::1]:81"), host_of("evil.example")
        ('localhost', '::1', 'evil.example')
    """
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def names_host(host: str, own: str) -> bool:
    """Whether a `Host` header names this server: a loopback name or the host of the server, with any port.

    A server on all addresses of the machine, 0.0.0.0 or ::, also answers to each address and to the name of the
    machine. A page of another site cannot use these: a request under the name of that site has this name in its header.

    Args:
        host: the `Host` header.
        own: the host that the server listens on.
    Example:
        >>> names_host("192.168.1.2:81", "0.0.0.0"), names_host("evil.example:81", "0.0.0.0")
        (True, False)
    """
    name, own = host_of(host), own.strip("[]").lower()
    if is_loopback(name) or name == own:
        return True
    if own not in ("0.0.0.0", "::"):
        return False
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        machine = socket.gethostname().lower()
        return name in (machine, f"{machine}.local", socket.getfqdn().lower())


def allowed(host: str, own: str, token: str, given: str, cookies: Mapping[str, str], cookie: str) -> bool:
    """Whether a request may be answered: its host is known, and it has the token or the cookie.

    Args:
        host: the `Host` header.
        own: the host that the server listens on.
        token: the secret of the server.
        given: the token in the URL; empty: there is none.
        cookies: the cookies of the request.
        cookie: the name of the cookie of this server.
    """
    if not names_host(host, own):
        return False
    secrets = [
        hmac.compare_digest(each.encode("utf-8", "replace"), token.encode())
        for each in (given, cookies.get(cookie, ""))
    ]
    return any(secrets)
