"""Keeps libraries from warning of accelerators that a machine does not have. Imports no JAX."""

from __future__ import annotations

import glob
import os
from collections.abc import MutableMapping


def libraries(environment: MutableMapping[str, str] | None = None) -> None:
    """To be called before JAX or TensorFlow is imported; what is set already is left alone.

    TensorFlow, which only reads data here, would report on its search for a GPU. libtpu, where it
    is installed on a machine without TPUs, looks for the names of its workers when it is loaded, by
    JAX or by ``plan``: the two set here are what it looks for; they decide nothing else there. A
    machine with TPUs is left alone.
    """
    environment = os.environ if environment is None else environment
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return
    environment.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    environment.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
