"""Published peak specifications of TPUs (FLOP/s, memory, links, slice shapes) and GPUs (FLOP/s).

Numbers are per chip, in FLOP/s, bytes and bytes/s; 1 GB is 1e9 and 1 GiB is 2**30 bytes. A TPU v3
chip is two JAX devices, one per core, each with half of every number; any other chip is one device.
Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import math

from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specifications of one kind of TPU chip."""

    name: str
    bf16_flops: float  # dense bfloat16 products, accumulated in float32
    limit: int  # bytes of HBM that the compiler grants a program on one JAX device
    hbm_bandwidth: float
    ici_bandwidth: float  # one link in one direction; a chip has two links per dimension
    dcn_bandwidth: float  # a chip's share of its host's network, in one direction
    kinds: tuple[str, ...]  # of jax.Device.device_kind
    config: str  # libtpu's name of the core configuration
    host: tuple[int, ...]  # chips of one host, by dimension
    max_chips: int  # in one slice
    slice_prefix: str  # of accelerator types, as in v5litepod-16
    shapes: tuple[str, ...]  # common slices, smallest first
    slice_unit: int = 1  # of the number in accelerator types: 1 chips, 2 cores
    devices: int = 1  # JAX devices per chip

    @property
    def flops_per_device(self) -> float:
        """Peak bf16 FLOP/s of one JAX device."""
        return self.bf16_flops / self.devices


_SMALL_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_POD_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# Sources, read in November 2026:
# [v3] [v4] [v5e] [v5p] [v6e]  https://cloud.google.com/tpu/docs/v3 and so on: "System
#   architecture", and "Configurations" for shapes. ICI is published per chip, over all links and
#   both directions (v5e 400, v5p 1200, v6e 800 GB/s); here it is divided by twice the links.
# [ISCA]  Jouppi et al. 2023, arXiv:2304.01433, table 4: TPU v3 has 4 links of 70 GB/s, v4 6 of 50.
# [book]  https://jax-ml.github.io/scaling-book/tpus/, "TPU specs": DCN of v3 and v4. It measures
#   about 10 % less than published on each link.
# limit: the number in "exceeds available HBM" of libtpu 0.0.42.1.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v3",
            bf16_flops=123e12,  # [v3]
            hbm_bandwidth=900e9,  # [v3]
            ici_bandwidth=70e9,  # [ISCA]
            dcn_bandwidth=6.25e9,  # [book]
            kinds=("TPU v3",),
            devices=2,
            limit=int(15.48 * GIB),
            config="default",
            host=(2, 2),
            max_chips=1024,
            slice_prefix="v3",
            slice_unit=2,
            shapes=("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"),  # [v3]
        ),
        Chip(
            "v4",
            bf16_flops=275e12,  # [v4]
            hbm_bandwidth=1200e9,  # [v4]
            ici_bandwidth=50e9,  # [ISCA]
            dcn_bandwidth=6.25e9,  # [book]
            kinds=("TPU v4",),
            limit=int(30.75 * GIB),
            config="megacore",
            host=(2, 2, 1),
            max_chips=4096,
            slice_prefix="v4",
            slice_unit=2,
            shapes=(*_SMALL_3D, "8x16x16", "16x16x16"),  # [v4]
        ),
        Chip(
            "v5e",
            bf16_flops=197e12,  # [v5e]
            hbm_bandwidth=819e9,  # [v5e], [v6e]
            ici_bandwidth=50e9,  # [v5e]
            dcn_bandwidth=3.125e9,  # [v5e]: 6.4 Tbps for a pod of 256
            kinds=("TPU v5 lite", "TPU v5e"),
            limit=int(15.75 * GIB),
            config="default",
            host=(2, 2),
            max_chips=256,
            slice_prefix="v5litepod",
            shapes=_POD_2D,  # [v5e]
        ),
        Chip(
            "v5p",
            bf16_flops=459e12,  # [v5p]
            hbm_bandwidth=2765e9,  # [v5p]
            ici_bandwidth=100e9,  # [v5p]
            dcn_bandwidth=6.25e9,  # [v5p]: 50 Gbps
            kinds=("TPU v5p", "TPU v5"),
            limit=int(95.74 * GIB),
            config="megacore",
            host=(2, 2, 1),
            max_chips=6144,
            slice_prefix="v5p",
            slice_unit=2,
            shapes=(*_SMALL_3D, "8x16x16", "16x16x16", "16x16x24"),  # [v5p]
        ),
        Chip(
            "v6e",
            bf16_flops=918e12,  # [v6e]
            hbm_bandwidth=1640e9,  # [v6e]
            ici_bandwidth=100e9,  # [v6e]
            dcn_bandwidth=12.5e9,  # [v6e]: 25.6 Tbps for a pod of 256
            kinds=("TPU v6 lite", "TPU v6e"),
            limit=int(31.25 * GIB),
            config="default",
            host=(2, 2),
            max_chips=256,
            slice_prefix="v6e",
            shapes=_POD_2D,  # [v6e]
        ),
    )
}

# bf16 FLOP/s by a prefix of jax.Device.device_kind, from NVIDIA's data sheets: SXM modules unless
# named PCIe, without sparsity (half of the headline numbers).
GPU_PEAKS = {
    "NVIDIA A100": 312e12,  # https://www.nvidia.com/en-us/data-center/a100/
    "NVIDIA H100 PCIe": 756e12,  # https://www.nvidia.com/en-us/data-center/h100/
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,  # https://www.nvidia.com/en-us/data-center/h200/
}


def peak_of(device_kind: str) -> float | None:
    """Return the peak bf16 FLOP/s of one JAX device of this kind; None if unknown."""
    peaks = {kind: chip.flops_per_device for chip in CHIPS.values() for kind in chip.kinds}
    gpus = (peak for prefix, peak in GPU_PEAKS.items() if device_kind.startswith(prefix))
    return peaks.get(device_kind) or next(gpus, None)


def sides_of(shape: str) -> tuple[int, ...]:
    """Parse ``4x4x8`` to (4, 4, 8), with 0 for what is not a number."""
    return tuple(int(side) if side.isdecimal() else 0 for side in shape.split("x"))


TOPOLOGIES = {
    f"{chip.slice_prefix}-{math.prod(sides_of(shape)) * chip.slice_unit}": f"{chip.name}:{shape}"
    for chip in CHIPS.values()
    for shape in chip.shapes
}  # by accelerator type


def parse_topology(text: str) -> tuple[Chip, tuple[int, ...]]:
    """Parse ``v5p:4x4x4``, or an accelerator type such as v5p-128: (chip, chips by dimension).

    Raises:
      UserError: the chip or the shape of its slice is unknown.
    """
    name, _, shape = TOPOLOGIES.get(text, text).partition(":")
    if name not in CHIPS or not shape:
        raise UserError(
            f"--topology {text}: give a chip and the shape of its slice, or an accelerator type, "
            f"such as v5p:4x4x4 or {nearest(text, [*TOPOLOGIES])}; chips: {', '.join(CHIPS)}"
        )
    chip = CHIPS[name]
    if shape not in chip.shapes and not _is_cubes(chip, shape):
        raise UserError(
            f"--topology {text}: {name} has no slice of {shape}; known: {', '.join(chip.shapes)}"
        )
    return chip, sides_of(shape)


def _is_cubes(chip: Chip, shape: str) -> bool:
    """Return whether a shape is composed of 4 x 4 x 4 cubes, as any slice of a 3D pod can be."""
    sides = sides_of(shape)
    fits = len(sides) == len(chip.host) == 3 and 0 < math.prod(sides) <= chip.max_chips
    return fits and not any(s % 4 for s in sides) and list(sides) == sorted(sides)


def wraps(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Return for each dimension whether its links form a ring, which doubles its bandwidth.

    3D pods connect cubes of 4 x 4 x 4 to a torus [v4, v5p]; v5e and v6e only a side of 16 [book];
    v3 a side of 32.
    """
    if len(shape) == 3:
        return tuple(not any(s % 4 for s in shape) for _ in shape)
    return tuple(side == (32 if chip.name == "v3" else 16) for side in shape)
