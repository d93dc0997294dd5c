"""From bytes to patches: limits, decode, orientation and colour, resize, patchify."""
