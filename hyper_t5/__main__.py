"""Entry point of ``python -m hyper_t5``, the same as the ``hyper-t5`` command."""

from __future__ import annotations

import sys

from hyper_t5.cli import main

sys.exit(main())
