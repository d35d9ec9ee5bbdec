"""Host memory of this process."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "")
    if match:  # Linux; getrusage would include the parent's peak before exec
        return int(match[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
