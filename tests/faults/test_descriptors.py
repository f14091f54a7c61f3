"""A server without free descriptors ends no run: connections beyond its limit are closed before their handshake."""

import contextlib
import resource
import socket

import pytest
from network import Federation, eventually
from test_rehearsal import flags


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_flood_of_silent_connections_harms_no_client(tmp_path):
    settings = {"model": "mlp", "recipe": "fedavg(lr=0.1, batch=50)", "rounds": 200, "numerics": "fused"}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Federation(tmp_path, *flags(**settings, clients=1), clients=1) as it, contextlib.ExitStack() as flood:
        resource.setrlimit(resource.RLIMIT_NOFILE, (140, hard))
        try:
            host, _, port = it.serve().rpartition(":")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        it.invite()
        it.join(0)
        it.server.after_round(1)
        for _ in range(400):
            link = flood.enter_context(socket.create_connection((host, int(port))))
            link.settimeout(0.1)
        assert eventually(lambda: it.server.process.poll() is not None or it.server.lines[-1].get("round", 0) > 190, 60)
        assert it.server.code() == 0, it.server.stderr()[-3000:]
        assert it.clients[0].code() == 0
