"""A server and clients over TLS: messages, identities, the database and the coordinator.

    wire          messages between server and client, as bytes
    identity      the certificate authority, tokens, enrolment and renewal
    store         `federation.db`: identities, rounds, accepted work, audit chain
    coordinator   presence, leases, receipts and quotas, without sockets and clocks

Only `training` and `cli` import this package, and only when a network is used. Its extra is `atoll[net]`.

Tests: tests/faults/test_wire.py
"""
