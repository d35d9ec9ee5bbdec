"""Shared by all tests: a CPU of eight devices, a cache of compiled code, the reference data."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import processes, reference_data

ROOT = Path(__file__).resolve().parent.parent


def _compile_cache() -> Path:
    """Return the folder for compiled code, which XLA specializes for a kind of processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(f"{platform.machine()}{platform.processor()}{flags}".encode())
    return ROOT / ".cache" / "jax" / kind.hexdigest()[:12]


# Before the first import of JAX, and in the environment so that subprocesses get it too.
_defaults = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": processes.cpu_flags(8),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(_compile_cache()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "MPLBACKEND": "agg",
}
if importlib.util.find_spec("filelock"):
    # With a size limit JAX takes a lock for each access, and our workers share the folder.
    _defaults["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2 * 2**30)
for _name, _value in _defaults.items():
    os.environ.setdefault(_name, _value)
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # No time limits, so that a busy machine fails no test.
    _slow = [HealthCheck.too_slow]
    settings.register_profile("hyper_t5", deadline=None, suppress_health_check=_slow)
    settings.load_profile("hyper_t5")
# An entry without a time of last use, left by a process that was killed or had no limit, makes
# every later write fail. An empty one counts as the oldest.
for _entry in _compile_cache().glob("*-cache"):
    _entry.with_name(_entry.name.removesuffix("cache") + "atime").touch()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Return the root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return the folder of reference data: HYPER_T5_SHARED, or `shared` beside the root."""
    return reference_data.find(os.environ.get("HYPER_T5_SHARED"), ROOT.parent / "shared")


@pytest.fixture(scope="session")
def real_data(shared_dir: Path) -> Callable[[str], Path]:
    """Unpack a set of the reference data ("sni", "p3", "metaicl", "text"), once per checkout."""

    def unpack(name: str) -> Path:
        [archive] = (shared_dir / "data").glob(f"{name}.tar*")
        kept = ROOT / ".cache" / "data" / f"{name}-{archive.stat().st_mtime_ns}"
        if not kept.is_dir():
            part = kept.with_name(f"{kept.name}.{os.getpid()}")
            with tarfile.open(archive) as file:
                file.extractall(part, filter="data")
            try:
                part.rename(kept)
            except OSError:  # another worker was first
                shutil.rmtree(part)
        [folder] = kept.iterdir()
        return folder

    return unpack
