"""Where encoders run, and who decides which attention backend they run on."""

from encoder_svc.platforms.backends import BackendSpec, Fit, Implementation
from encoder_svc.platforms.facts import Facts
from encoder_svc.platforms.interface import Platform, platform_for_device, resolve_device
from encoder_svc.platforms.selection import Rejection, Rule, Selection

__all__ = [
    "BackendSpec",
    "Facts",
    "Fit",
    "Implementation",
    "Platform",
    "Rejection",
    "Rule",
    "Selection",
    "platform_for_device",
    "resolve_device",
]
