"""A secure sum: the server learns the sum of the clients' vectors and nothing else about one vector.

    y_u = x_u + PRG(b_u) + Σ_{v > u} PRG(s_uv) - Σ_{v < u} PRG(s_uv)  mod 2^ring;      Σ_u x_u = Σ_u y_u - masks

Pairwise masks cancel in the sum. A client that drops out is removed by its neighbours' shares of its mask key, and the
self mask of each survivor by shares of b_u. On the complete graph the protocol is that of Bonawitz et al. 2017, on a
regular graph that of Bell et al. 2020.

This package has no I/O: `client.SumClient` and `server.SumServer` take messages and return messages. It imports no
torch. The modules are imported one by one, because `params` needs no `cryptography`.

Tests: tests/identities/test_secure.py, tests/attacks/test_evil_server.py.
"""
