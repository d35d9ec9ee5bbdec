"""Environment variables that silence accelerator warnings of JAX and TensorFlow."""

from __future__ import annotations

import glob
import os
from collections.abc import MutableMapping


def set_defaults(env: MutableMapping[str, str] | None = None) -> None:
    """Set the variables that are unset; call it before JAX or TensorFlow is imported.

    TensorFlow only reads data here, and would log its search for a GPU. libtpu, if it is installed
    on a machine without TPUs, looks up the names of its workers when JAX or ``plan`` loads it; the
    two TPU variables replace this lookup and have no other effect. A TPU machine needs neither.

    Args:
      env: the environment to change; ``os.environ`` by default.
    """
    env = os.environ if env is None else env
    env.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return
    env.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    env.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
