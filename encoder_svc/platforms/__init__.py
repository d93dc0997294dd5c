"""Where encoders run, and who decides which attention backend they run on."""

from encoder_svc.platforms.interface import Platform, Selection, platform_for_device

__all__ = ["Platform", "Selection", "platform_for_device"]
