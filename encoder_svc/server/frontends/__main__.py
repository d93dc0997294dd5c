"""``python -m encoder_svc.server.frontends LINK EMBEDDINGS IMAGES DOOR``: descriptors that the parent passes on."""

import sys

from encoder_svc.server.frontends.process import run_front_end

if __name__ == "__main__":
    raise SystemExit(run_front_end(*map(int, sys.argv[1:])))
