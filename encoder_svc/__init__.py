"""encoder-svc: Qwen-VL vision encoders as a gRPC service of their own.

An LM process imports :mod:`encoder_svc.client`; an operator runs ``encoder-svc serve``.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
