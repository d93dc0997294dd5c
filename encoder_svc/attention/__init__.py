"""The one attention layer of every encoder, and its backends."""

from encoder_svc.attention.base import AttentionBackend, PackedSequences
from encoder_svc.attention.layer import MMEncoderAttention

__all__ = ["AttentionBackend", "MMEncoderAttention", "PackedSequences"]
