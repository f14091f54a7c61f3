"""The reasons for which a participant of a secure sum ends a session.

Tests: tests/attacks/test_evil_server.py
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from atoll.base.errors import RunError

Reason: TypeAlias = Literal[
    # A client refuses a message of the server. The numbers are the rows E1 to E23 of the evil-server table.
    "own_entry",  # E1 own entry absent, twice or altered
    "cohort",  # E2 cohort below the floor or above the cap
    "threshold",  # E3 threshold below the local floor
    "duplicate",  # E4 duplicate key or identity
    "signature",  # E5 bad signature, or an identity that is unknown, expired or revoked
    "key",  # E6 key of wrong length or low order
    "replayed",  # E7 round and attempt are not higher than the last ones
    "version",  # E8 model or settings differ from the client's own
    "graph",  # E9 graph differs from the recomputed one
    "overflow",  # E10 the sum could leave the ring, or the ring is unknown
    "box",  # E11 a box does not open
    "boxes",  # E12 box missing, doubled or from outside the cohort
    "few_shared",  # E13 fewer clients shared than the threshold
    "survivors",  # E14 survivors are not a part of the clients that shared
    "dropped",  # E15 the client is listed as dropped
    "few_survivors",  # E16 fewer survivors than the threshold
    "confirmations",  # E17 fewer confirmations than the threshold, or other sets were signed
    "both_shares",  # E18 both kinds of share are asked for one client
    "second_unmask",  # E19 a second, different unmask request
    "not_neighbour",  # E20 a confirmation of a client that holds no share
    "second_upload",  # E21 a second upload with other content
    "message",  # E22 message out of order, unknown or of a wrong length
    "privacy",  # E23 noise below the local floor
    # A server ends a session.
    "few",  # fewer clients than the threshold at a step
    "shares",  # a secret could not be rebuilt
    "mask_residue",  # the masks did not cancel
]
REASONS: tuple[Reason, ...] = get_args(Reason)


class SessionError(RunError):
    """A session of a secure sum ended; the participant has wiped its secrets and sends nothing further.

    Args:
        reason: one of `REASONS`.
        given, required, why: as in `AtollError`. No text contains a key, a share or a word of a vector.
    """

    def __init__(self, reason: Reason, given: str, required: str = "", why: str = "") -> None:
        self.reason: Reason = reason
        super().__init__(given, required, why)
