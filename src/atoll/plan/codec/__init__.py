"""Codecs: compression of the update on its way to the server, and of the model on its way to the clients.

Tests: tests/identities/test_codecs.py, tests/identities/test_codec_algebra.py
"""

from atoll.plan.codec.eden import Eden
from atoll.plan.codec.entropy import Entropy
from atoll.plan.codec.feedback import EF21, ErrorFeedback
from atoll.plan.codec.lowrank import LowRank
from atoll.plan.codec.privacy import AdaptiveClip, Clip, Noise
from atoll.plan.codec.quantize import Cast, Quantize, Sign
from atoll.plan.codec.rotate import Rotate
from atoll.plan.codec.sparse import RandomK, TopK
from atoll.plan.codec.stage import Chain, Codec, Identity
from atoll.plan.form import MessageError

CODECS = (
    *(Identity, Cast, Quantize, Rotate, Eden, TopK, RandomK, Sign, LowRank, Entropy, ErrorFeedback, EF21),
    *(Clip, AdaptiveClip, Noise),
)
__all__ = [
    "CODECS",
    "EF21",
    "AdaptiveClip",
    "Cast",
    "Chain",
    "Clip",
    "Codec",
    "Eden",
    "Entropy",
    "ErrorFeedback",
    "Identity",
    "LowRank",
    "MessageError",
    "Noise",
    "Quantize",
    "RandomK",
    "Rotate",
    "Sign",
    "TopK",
]
