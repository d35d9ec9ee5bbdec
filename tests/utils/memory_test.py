"""Peak memory of a process."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from hyper_t5.utils import memory


def test_peak_memory_is_that_of_this_process() -> None:
    """The peak of a child does not start at that of its parent."""
    array = np.ones(40_000_000)  # 320 MB
    assert memory.peak_memory_mb() > 320
    code = "from hyper_t5.utils import memory; print(memory.peak_memory_mb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert 0 < float(done.stdout) < 320
    del array
