"""``python -m encoder_svc.server.devices LINK IMAGES EMBEDDINGS``: descriptors that the parent passes on."""

import sys

from encoder_svc.server.devices.process import run_device

if __name__ == "__main__":
    raise SystemExit(run_device(*map(int, sys.argv[1:])))
