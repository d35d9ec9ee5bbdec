"""Environment variables that keep libraries from searching for absent accelerators."""

from __future__ import annotations

import pytest

from hyper_t5.utils import environment


def test_libtpu_is_configured_only_on_machines_without_a_tpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    variables = {"TPU_WORKER_HOSTNAMES": "mine"}
    environment.set_defaults(variables)
    assert variables["TPU_WORKER_HOSTNAMES"] == "mine"
    assert variables["TPU_ACCELERATOR_TYPE"] == "v5p-8"
    monkeypatch.setattr("glob.glob", lambda pattern: [pattern])
    variables = {}
    environment.set_defaults(variables)
    assert variables.keys() == {"TF_CPP_MIN_LOG_LEVEL"}
