"""A secure sum: the server learns the sum of the clients' vectors and nothing else about one vector.

    y_u = x_u + PRG(b_u) + Σ_{v > u} PRG(s_uv) - Σ_{v < u} PRG(s_uv)  mod 2^ring;      Σ_u x_u = Σ_u y_u - masks

Pairwise masks cancel in the sum. A client that drops out is removed by its neighbours' shares of its mask key, and the
self mask of each survivor by shares of b_u. On the complete graph the protocol is that of Bonawitz et al. 2017, on a
regular graph that of Bell et al. 2020.

This package has no I/O: `SumClient` and `SumServer` take messages and return messages. It imports no torch.

Tests: tests/identities/test_secure.py, tests/attacks/test_evil_server.py.
"""

from atoll.secure.client import Floors, SumClient
from atoll.secure.graph import neighbours
from atoll.secure.masks import masked
from atoll.secure.messages import SumMessage
from atoll.secure.params import Agreement, Topology, safe_topology
from atoll.secure.refusals import REASONS, Reason, SessionError
from atoll.secure.server import SumServer

__all__ = [
    "REASONS",
    "Agreement",
    "Floors",
    "Reason",
    "SessionError",
    "SumClient",
    "SumMessage",
    "SumServer",
    "Topology",
    "masked",
    "neighbours",
    "safe_topology",
]
