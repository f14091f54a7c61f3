"""Cost of a secure sum: masking beside the bare keystream, and unmasking beside the work that cannot be avoided.

    python benchmarks/secure_sum.py [--clients 500] [--words 100000]

One thread. All figures are process times of one run, by turns; ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

sys.path.insert(0, str(Path(__file__).parents[1]))

from atoll.secure import keys
from atoll.secure.client import Floors
from atoll.secure.masks import masked
from atoll.secure.params import Topology, safe_topology
from tests.secure_session import Group, agreement


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def keystream(streams: int, size: int) -> None:
    """The bare keystreams of that many keys, in one buffer that stays in the cache."""
    block = 1 << 18
    zeros, out = bytes(block), bytearray(block)
    for _ in range(streams):
        stream = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        for first in range(0, size, block):
            length = min(block, size - first)
            stream.update_into(memoryview(zeros)[:length], memoryview(out)[:length])


def masking(words: int = 1_000_000, streams: int = 20, rounds: int = 9) -> dict[str, float]:
    """Time of masking, divided by the time of the bare keystream."""
    vector = np.zeros(words, dtype=np.uint32)
    mask_keys, signs = [os.urandom(32) for _ in range(streams)], [1, -1] * (streams // 2)
    bare, full = [], []
    for _ in range(rounds):
        bare.append(seconds(lambda: keystream(streams, vector.nbytes)))
        full.append(seconds(lambda: masked(vector, mask_keys, signs)))
    return {"share of the keystream's speed": statistics.median(bare) / statistics.median(full)}


class AnyShape(Floors):
    """The clients of a benchmark accept every shape."""

    def check(self, shape: Topology) -> None:
        pass


def unmasking(clients: int, words: int, neighbours: int | None, threshold: int | None) -> dict[str, float]:
    """Time of the server's last step, divided by its keystreams and key exchanges alone; one client in ten is lost."""
    agreed = agreement(words, vectors=(("update", words),))
    group = Group(clients, agreed, AnyShape(cohort=3), neighbours=neighbours, threshold=threshold)
    lost = {i: "masked" for i in range(0, clients, 10)}
    group.until_masked(lost)
    for i, answer in group.down(group.server.close()).items():
        group.up(i, answer)
    for i, answer in group.down(group.server.close()).items():
        group.up(i, answer)
    session = group.server._session
    if session is None:
        raise RuntimeError("The session ended early.")
    dropped = [i for i in session.boxes if i not in session.survivors]
    pairs = sum(other in session.survivors for i in dropped for other in session.around[i - 1])
    exchange, public = X25519PrivateKey.generate(), X25519PrivateKey.generate().public_key().public_bytes_raw()

    def unavoidable() -> None:
        for _ in range(pairs):
            keys.exchange(exchange, public)
        keystream(pairs + len(session.survivors), 4 * words)

    bare = seconds(unavoidable)
    full = seconds(group.server.result)
    return {"seconds": full, "ratio to the unavoidable work": full / bare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--words", type=int, default=100_000)
    given = parser.parse_args()
    regular = safe_topology(given.clients)
    rows = {
        "masking 10^6 words, 20 neighbours": masking(),
        "unmasking, complete graph": unmasking(given.clients, given.words, given.clients - 1, None),
        f"unmasking, {regular.neighbours} neighbours": unmasking(
            given.clients, given.words, regular.neighbours, regular.threshold
        ),
    }
    for name, row in rows.items():
        print(name, json.dumps({key: round(value, 3) for key, value in row.items()}))


if __name__ == "__main__":
    main()
