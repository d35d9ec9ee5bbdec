"""Accelerators: peaks by device kind, topologies and rings."""

from __future__ import annotations

import pytest

from hyper_t5.parallel import accelerators
from hyper_t5.parallel.accelerators import CHIPS
from hyper_t5.utils.errors import UserError


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v3", 61.5e12),  # a core
        ("TPU v4", 275e12),
        ("TPU v4 lite", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(kind: str, peak: float | None) -> None:
    assert accelerators.peak_of(kind) == peak


def test_link_bandwidths_agree_with_those_of_pods() -> None:
    # "All-reduce bandwidth per Pod" divided by its chips is what the links of a chip carry.
    for name, pod in {"v4": 1.1e15 / 4096, "v5e": 51.2e12 / 256, "v6e": 102.4e12 / 256}.items():
        chip = CHIPS[name]
        assert 2 * len(chip.host) * chip.ici_bandwidth == pytest.approx(pod, rel=0.15)


@pytest.mark.parametrize(
    ("text", "name", "shape"),
    [
        ("v5p:4x4x4", "v5p", (4, 4, 4)),
        ("v5p-128", "v5p", (4, 4, 4)),  # an accelerator type counts cores
        ("v5litepod-16", "v5e", (4, 4)),  # or chips
        ("v4:4x4x12", "v4", (4, 4, 12)),  # any number of cubes
        ("v3-8", "v3", (2, 2)),
    ],
)
def test_topologies(text: str, name: str, shape: tuple[int, ...]) -> None:
    assert accelerators.parse_topology(text) == (CHIPS[name], shape)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e:2x2x2", "known: 1x1, 2x2, 2x4"),
        ("v5p:3x3x3", "known: 2x2x1, "),
        ("v4:4x12x4", "known: 2x2x1, "),
        ("v9:2x2", "chips: v3, v4, v5e, v5p, v6e"),
        ("h100:2x2", "chips: v3, "),
        ("v5p", "such as v5p:4x4x4 or v5p-"),
        ("v5p-100", "or v5p-1024;"),
    ],
)
def test_an_unknown_topology_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match="--topology") as e:
        accelerators.parse_topology(text)
    assert message in str(e.value)


def test_rings() -> None:
    assert accelerators.wraps(CHIPS["v5p"], (4, 4, 8)) == (True, True, True)
    assert accelerators.wraps(CHIPS["v5p"], (2, 4, 4)) == (False, False, False)
    assert accelerators.wraps(CHIPS["v5e"], (8, 16)) == (False, True)
