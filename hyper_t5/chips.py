"""What one accelerator chip can do by its maker's word: operations, memory, links, slice shapes.

Numbers are per chip, in FLOP/s, bytes and bytes/s, where 1 GB is 1e9 and 1 GiB is 2**30 bytes. A
TPU v3 chip is two JAX devices, one a core, that have half of each number; every other chip here is
one device. No JAX is imported.
"""

from __future__ import annotations

import dataclasses
import math

from hyper_t5.errors import UserError
from hyper_t5.overrides import choose, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. ``shapes`` are the slices that are rented most, smallest first."""

    name: str
    bf16_flops: float  # dense products of bfloat16, summed in float32
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float  # of one link in one direction; of an NVLink for a GPU
    links: int  # of one chip: two a dimension of a torus
    dcn_bandwidth: float  # one chip's share of its host's network, in one direction; 0 = not told
    kinds: tuple[str, ...]  # jax.Device.device_kind begins with one of these
    devices: int = 1  # JAX devices in one chip
    hbm_usable: int = 0  # what the compiler lets a program have; 0 = not known
    config: str = ""  # libtpu's name for how the cores of a chip are used
    host: tuple[int, ...] = ()  # chips of one host, by dimension
    most: int = 0  # chips in the largest slice
    slice_prefix: str = ""  # of an accelerator type, as in v5litepod-16
    slice_unit: int = 1  # what an accelerator type counts: 1 chips, 2 cores
    shapes: tuple[str, ...] = ()

    @property
    def dimensions(self) -> int:
        """Of the torus that its links make: 2 or 3; 0 for a GPU."""
        return self.shapes[0].count("x") + 1 if self.shapes else 0

    @property
    def flops_per_device(self) -> float:
        """bf16 FLOP/s of one JAX device."""
        return self.bf16_flops / self.devices

    @property
    def limit(self) -> int:
        """Bytes of HBM that a program on one JAX device may use."""
        return self.hbm_usable or self.hbm_bytes // self.devices


_SMALL_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_POD_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# Sources, read in November 2026:
# [v3] [v4] [v5e] [v5p] [v6e]  https://cloud.google.com/tpu/docs/v3 and so on, "System architecture"
#   and, for shapes, "Configurations". They give ICI per chip, both directions of all links added:
#   v5e 400, v5p 1200, v6e 800 GB/s, here divided by twice the links.
# [ISCA]  Jouppi et al. 2023, arXiv:2304.01433, table 4: TPU v3 has 4 links of 70 GB/s, v4 6 of 50.
# [book]  https://jax-ml.github.io/scaling-book/tpus/, "TPU specs": DCN of v3 and v4, which the
#   documentation does not give by chip. It measures about 10 % less of each link than is published.
# hbm_usable: "exceeds available HBM" of libtpu 0.0.42.1, asked for more than there is.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v3",
            bf16_flops=123e12,  # [v3]
            hbm_bytes=32 * GIB,  # [v3]
            hbm_bandwidth=900e9,  # [v3]
            ici_bandwidth=70e9,  # [ISCA]
            links=4,  # [ISCA]
            dcn_bandwidth=6.25e9,  # [book]
            kinds=("TPU v3",),
            devices=2,
            hbm_usable=int(15.48 * GIB),
            config="default",
            host=(2, 2),
            most=1024,
            slice_prefix="v3",
            slice_unit=2,
            shapes=("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"),  # [v3]
        ),
        Chip(
            "v4",
            bf16_flops=275e12,  # [v4]
            hbm_bytes=32 * GIB,  # [v4]
            hbm_bandwidth=1200e9,  # [v4]
            ici_bandwidth=50e9,  # [ISCA]
            links=6,  # [ISCA]
            dcn_bandwidth=6.25e9,  # [book]
            kinds=("TPU v4",),
            hbm_usable=int(30.75 * GIB),
            config="megacore",
            host=(2, 2, 1),
            most=4096,
            slice_prefix="v4",
            slice_unit=2,
            shapes=(*_SMALL_3D, "8x16x16", "16x16x16"),  # [v4]
        ),
        Chip(
            "v5e",
            bf16_flops=197e12,  # [v5e]
            hbm_bytes=16 * GIB,  # [v5e]
            hbm_bandwidth=819e9,  # [v5e], [v6e]
            ici_bandwidth=50e9,  # [v5e]
            links=4,  # [v5e]
            dcn_bandwidth=3.125e9,  # [v5e]: 6.4 Tbps for a pod of 256
            kinds=("TPU v5 lite", "TPU v5e"),
            hbm_usable=int(15.75 * GIB),
            config="default",
            host=(2, 2),
            most=256,
            slice_prefix="v5litepod",
            shapes=_POD_2D,  # [v5e]
        ),
        Chip(
            "v5p",
            bf16_flops=459e12,  # [v5p]
            hbm_bytes=95 * GIB,  # [v5p]
            hbm_bandwidth=2765e9,  # [v5p]
            ici_bandwidth=100e9,  # [v5p]
            links=6,
            dcn_bandwidth=6.25e9,  # [v5p]: 50 Gbps
            kinds=("TPU v5p", "TPU v5"),
            hbm_usable=int(95.74 * GIB),
            config="megacore",
            host=(2, 2, 1),
            most=6144,
            slice_prefix="v5p",
            slice_unit=2,
            shapes=(*_SMALL_3D, "8x16x16", "16x16x16", "16x16x24"),  # [v5p]
        ),
        Chip(
            "v6e",
            bf16_flops=918e12,  # [v6e]
            hbm_bytes=32 * GIB,  # [v6e]
            hbm_bandwidth=1640e9,  # [v6e]
            ici_bandwidth=100e9,  # [v6e]
            links=4,  # [v6e]
            dcn_bandwidth=12.5e9,  # [v6e]: 25.6 Tbps for a pod of 256
            kinds=("TPU v6 lite", "TPU v6e"),
            hbm_usable=int(31.25 * GIB),
            config="default",
            host=(2, 2),
            most=256,
            slice_prefix="v6e",
            shapes=_POD_2D,  # [v6e]
        ),
        # NVIDIA's data sheets, SXM modules, without sparsity (they print it with, twice as much).
        # https://www.nvidia.com/en-us/data-center/a100/ : NVLink 600 GB/s in both directions.
        Chip("a100-40gb", 312e12, 40 * 10**9, 1555e9, 25e9, 12, 0, ("NVIDIA A100-SXM4-40GB",)),
        Chip(
            "a100-80gb",
            312e12,
            80 * 10**9,
            2039e9,
            25e9,
            12,
            0,
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB", "NVIDIA A100"),
        ),
        # https://www.nvidia.com/en-us/data-center/h100/ and h200/ : NVLink 900 GB/s.
        Chip("h100-pcie", 756e12, 80 * 10**9, 2000e9, 25e9, 12, 0, ("NVIDIA H100 PCIe",)),
        Chip("h100", 989e12, 80 * 10**9, 3350e9, 25e9, 18, 0, ("NVIDIA H100",)),
        Chip("h200", 989e12, 141 * 10**9, 4800e9, 25e9, 18, 0, ("NVIDIA H200",)),
    )
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.shapes)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a ``jax.Device.device_kind`` such as "TPU v5 lite"; None where it is not here."""
    for chip in CHIPS.values():
        if device_kind in chip.kinds:
            return chip
    # Only GPU names go on behind what is here: a "TPU v4 lite" is no v4.
    gpus = [c for c in CHIPS.values() if not c.shapes and device_kind.startswith(c.kinds)]
    return gpus[0] if gpus else None


def peak_of(device_kind: str) -> float | None:
    """Published bf16 FLOP/s of one JAX device of this kind; None where it is not known."""
    chip = chip_of(device_kind)
    return chip.flops_per_device if chip else None


def parse_topology(text: str) -> tuple[Chip, tuple[int, ...]]:
    """``v5p:4x4x4``, or an accelerator type such as v5p-128 -> (chip, chips by dimension).

    Raises:
        UserError: no such chip, or not a shape of its slices; names the nearest.
    """
    shapes = {f"{c.name}:{s}" for c in CHIPS.values() for s in c.shapes}
    name, colon, shape = text.partition(":")
    if not colon and (found := _accelerator_type(text)):
        name, _, shape = found.partition(":")
    if name not in TPUS or not shape:
        example = nearest(text, sorted(shapes))
        raise UserError(
            f"--topology {text}: give a chip and the shape of its slice, such as {example}; "
            f"chips: {', '.join(TPUS)}"
        )
    chip = CHIPS[name]
    if shape not in chip.shapes and not _is_cubes(chip, shape):
        raise UserError(
            f"--topology {text}: {name} has no slice of {shape}, the nearest is "
            f"{name}:{_nearest_shape(shape, chip.shapes)}; known: {', '.join(chip.shapes)}"
        )
    return chip, sides_of(shape)


def sides_of(shape: str) -> tuple[int, ...]:
    """``4x4x8`` -> (4, 4, 8); what is no number counts as 0."""
    return tuple(int(side) if side.isdecimal() else 0 for side in shape.split("x"))


def _nearest_shape(shape: str, known: tuple[str, ...]) -> str:
    """That of about as many chips, where the shape says how many."""
    chips = math.prod(sides_of(shape))
    if not chips:
        return nearest(shape, known)
    return min(known, key=lambda other: abs(math.log(math.prod(sides_of(other)) / chips)))


def _accelerator_type(text: str) -> str:
    """``v5p-128`` -> "v5p:4x4x4", the shape that such a slice has where none is asked for."""
    for chip in CHIPS.values():
        prefix, _, count = text.rpartition("-")
        if chip.shapes and prefix == chip.slice_prefix and count.isdecimal():
            by_size = {math.prod(sides_of(s)) * chip.slice_unit: s for s in chip.shapes}
            known = {f"{prefix}-{size}": shape for size, shape in by_size.items()}
            return f"{chip.name}:{known[choose('--topology', text, known)]}"
    return ""


def _is_cubes(chip: Chip, shape: str) -> bool:
    """Whether a shape is of whole cubes of 4 x 4 x 4, which 3D pods give in any number."""
    sides = sides_of(shape)
    fits = len(sides) == chip.dimensions == 3 and 0 < math.prod(sides) <= chip.most
    return fits and not any(s % 4 for s in sides) and list(sides) == sorted(sides)


def wraps(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Of each dimension, whether its ends are linked to a ring: what doubles its bandwidth.

    3D pods wire whole cubes of 4 x 4 x 4 to a torus [v4, v5p]; v5e and v6e only a full side of 16
    [book]; v3 a full side of 32.
    """
    if chip.dimensions == 3:
        return tuple(not any(s % 4 for s in shape) for _ in shape)
    return tuple(side == (32 if chip.name == "v3" else 16) for side in shape)
