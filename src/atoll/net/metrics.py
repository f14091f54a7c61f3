"""The metrics of a server for Prometheus, on a listener of its own that only this machine reaches.

They contain times, bytes, counts and codes, and no value of a model or of a row.

Tests: tests/faults/test_operation.py
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from atoll.base.errors import UsageError
from atoll.base.lines import Line

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Measured(Protocol):
    """The state that the metrics read when they are fetched."""

    @property
    def present(self) -> frozenset[int]: ...
    @property
    def lag(self) -> float: ...
    def lease_ages(self) -> tuple[float, ...]: ...


class Metrics:
    """Counts the events of a server, and serves them as text at `/metrics`.

    Args:
        address: `host:port` on the loopback interface; port 0 takes a free one.
    Raises:
        UsageError: the address is not one of the loopback interface, or it is in use.
    """

    def __init__(self, address: str) -> None:
        host, port = loopback(address)
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._rounds = Counter("atoll_rounds", "Committed rounds.", registry=registry)
        self._bytes = Counter("atoll_bytes", "Bytes of models and messages.", ["direction"], registry=registry)
        self._failures = Counter("atoll_failures", "Faults and refusals of clients.", ["code"], registry=registry)
        self._lost = Counter("atoll_lost_contributions", "Contributions that a round lost.", registry=registry)
        self._stages = Histogram(
            "atoll_stage_seconds", "Seconds of a round by stage.", ["stage"], registry=registry, buckets=_SECONDS
        )
        self._present = Gauge("atoll_present_clients", "Clients with an open channel.", registry=registry)
        self._lag = Gauge("atoll_loop_lag_seconds", "Delay of the event loop at its last timer.", registry=registry)
        self._leases = Gauge("atoll_leases", "Open leases.", registry=registry)
        self._age = Gauge("atoll_lease_age_seconds", "Age of the oldest lease without a sign.", registry=registry)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise UsageError(
                f"The metrics cannot listen on {address}: {error.strerror or error}.",
                "a free port of this machine.",
                write=Line(shell="--metrics 127.0.0.1:0"),
            ) from error
        self.address = f"{host}:{self._server.server_port}"

    def watch(self, net: Measured) -> None:
        """Read presence, leases and the lag of the loop from a server whenever the metrics are fetched."""
        self._present.set_function(lambda: len(net.present))
        self._lag.set_function(lambda: net.lag)
        self._leases.set_function(lambda: len(net.lease_ages()))
        self._age.set_function(lambda: max(net.lease_ages(), default=0.0))

    def event(self, facts: Mapping[str, Any]) -> None:
        """Count an event of the server."""
        match facts:
            case {"event": "round", "bytes_up": up, "bytes_down": down, "failed": failed}:
                self._rounds.inc()
                self._bytes.labels("up").inc(up)
                self._bytes.labels("down").inc(down)
                self._lost.inc(failed)
            case {"event": "stages"}:
                for stage, seconds in facts.items():
                    if stage != "event":
                        self._stages.labels(stage).observe(seconds)
            case {"event": "noted" | "refused" | "lost", "code": code}:
                self._failures.labels(code).inc()

    def close(self) -> None:
        """End the listener."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def loopback(address: str) -> tuple[str, int]:
    """The host and the port of an address of the loopback interface.

    Raises:
        UsageError: it is another address.
    Example:
        >>> loopback("127.0.0.1:9464")
        ('127.0.0.1', 9464)
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local or not port.isdigit() or int(port) > 65535:
        raise UsageError(
            f"--metrics {address}.",
            "an address of the loopback interface, as HOST:PORT.",
            "the metrics need no certificate, so only this machine may read them.",
            Line(shell="--metrics 127.0.0.1:9464"),
        )
    return host, int(port)
