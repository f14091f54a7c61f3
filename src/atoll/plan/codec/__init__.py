"""What happens to an update on its way."""

from atoll.plan.codec.stage import Chain, Codec, Identity

__all__ = ["Chain", "Codec", "Identity"]
