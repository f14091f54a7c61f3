"""A session of a secure sum in one process: real clients and a server, and messages that can get lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.secure.client import Floors, SumClient
from atoll.secure.messages import SumMessage
from atoll.secure.params import Agreement
from atoll.secure.server import SecureSum, SumServer

STAGES = ("shares", "masked", "unmask", "stays")  # the message before which a client drops out


def agreement(words: int = 8, **changes: object) -> Agreement:
    base = Agreement(
        run=bytes(16), round=3, attempt=0, model=bytes(32), config=bytes(range(32)),
        vectors=(("update", words), ("loss", 1)), ring=32, bound=1 << 12, largest_weight=100, largest_cohort=1000,
        hybrid=False,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


@dataclass
class Group:
    """Clients with identity keys and plain vectors.

    `Group(5, agreement())` has five clients. `clients[i]` is made at the first use, so a test can replace its settings.
    """

    n: int
    agreed: Agreement
    floors: Floors = field(default_factory=lambda: Floors(cohort=3))
    least: int = 3
    neighbours: int | None = None
    threshold: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.identities = [Ed25519PrivateKey.generate() for _ in range(self.n)]
        self.fingerprints = sorted(sha256(bytes([self.seed % 256, i % 256, i // 256])).digest() for i in range(self.n))
        self.public = {
            fingerprint: key.public_key().public_bytes_raw()
            for fingerprint, key in zip(self.fingerprints, self.identities, strict=True)
        }
        draw = np.random.default_rng(self.seed)
        dtype = np.dtype(f"<u{self.agreed.ring // 8}")
        self.weights = draw.integers(1, self.agreed.largest_weight + 1, self.n)
        self.plain = [
            {name: draw.integers(0, 1 << self.agreed.ring, size, dtype=dtype) for name, size in self.agreed.vectors}
            for _ in range(self.n)
        ]
        self.clients = [self.client(i) for i in range(self.n)]
        self.server = SumServer(self.agreed, self.public.get, self.least, self.neighbours, self.threshold)
        self.transcript: list[SumMessage] = []

    def client(self, i: int, **changes: object) -> SumClient:
        agreed = replace(self.agreed, **changes)  # type: ignore[arg-type]
        return SumClient(agreed, self.identities[i], self.fingerprints[i], self.public.get, self.floors)

    def up(self, i: int, message: SumMessage | None) -> None:
        if message is not None:
            self.transcript.append(message)
            self.server.receive(self.fingerprints[i], message)

    def down(
        self, messages: Mapping[bytes, SumMessage], present: Callable[[int], bool] = lambda i: True
    ) -> dict[int, SumMessage | None]:
        """Give each present client its message; the answers by client."""
        answers = {}
        for i, fingerprint in enumerate(self.fingerprints):
            if fingerprint in messages and present(i):
                self.transcript.append(messages[fingerprint])
                answers[i] = self.clients[i].receive(messages[fingerprint])
        return answers

    def advertise(self) -> dict[bytes, SumMessage]:
        for i, client in enumerate(self.clients):
            self.up(i, client.advertise())
        return self.server.close()

    def until_masked(self, lost: Mapping[int, str]) -> None:
        """Run up to message 4; `lost` names the stage before which a client drops out."""
        for i, answer in self.down(self.advertise()).items():
            if lost.get(i) != "shares":
                self.up(i, answer)
        for i in self.down(self.server.close(), lambda i: lost.get(i) != "shares"):
            if lost.get(i) not in ("shares", "masked"):
                self.up(i, self.clients[i].mask(self.plain[i], int(self.weights[i])))

    def run(self, lost: Mapping[int, str] | None = None) -> SecureSum:
        """Run the whole session."""
        lost = lost or {}
        self.until_masked(lost)
        stays = {i for i in range(self.n) if lost.get(i, "stays") == "stays"}
        for i, answer in self.down(self.server.close(), lambda i: i in stays).items():
            self.up(i, answer)
        for i, answer in self.down(self.server.close()).items():
            self.up(i, answer)
        return self.server.result()

    def expected(self, survivors: list[int]) -> dict[str, np.ndarray]:
        """The sum of the plain words of some clients, modulo 2^ring, by NumPy."""
        return {
            name: np.sum([self.plain[i][name] for i in survivors], axis=0, dtype=self.plain[0][name].dtype)
            for name, _ in self.agreed.vectors
        }
