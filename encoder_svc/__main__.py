"""``python -m encoder_svc`` is the ``encoder-svc`` command."""

import sys

from encoder_svc.cli import main

sys.exit(main())
