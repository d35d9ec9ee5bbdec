"""The TPU compiler as a requirement of tests."""

from __future__ import annotations

import importlib.util

import pytest

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="no TPU compiler; pip install libtpu"
)
