"""``python -m hyper_t5`` is the command ``hyper-t5``."""

from __future__ import annotations

import sys

from hyper_t5.cli import main

sys.exit(main())
