"""Cost analysis of HLO text: loops, FLOPs, HBM bytes and collectives."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from hyper_t5.parallel.accelerators import CHIPS
from hyper_t5.planning import hlo, plan
from tests.support.tpu import needs_libtpu

LOOP = Path(__file__).with_name("loop.hlo").read_text(encoding="utf-8")
MESH = {"slice": 1, "data": 2, "model": 2}
PRODUCT = 2 * 8 * 32 * 128


def flops(old: str = "", new: str = "") -> float:
    """Count the FLOPs of LOOP with one piece of its text replaced."""
    assert old in LOOP
    return hlo.totals(hlo.parse(LOOP.replace(old, new) if old else LOOP)).flops


def test_a_loop_body_counts_once_per_iteration() -> None:
    totals = hlo.totals(hlo.parse(LOOP), slices=2)
    assert totals.unknown_loops == 0
    assert totals.flops == 3 * PRODUCT
    axes = hlo.by_axes(totals.collectives, MESH)
    # The all-gather appears in two fusions and counts once; each device has a fourth of 8 x 128.
    row = 2 * 8 * 128
    assert axes["data+model"]["all-gather"] == {
        "payload": 3 * row,
        "count": 3 * 8 * 128,
        "sent": 3 * row * 3 / 4,
        "runs": 3,
    }
    # An all-reduce that keeps a slice is a reduce-scatter.
    assert axes["data"]["reduce-scatter"]["payload"] == 3 * row
    assert axes["data"]["reduce-scatter"]["sent"] == 3 * row / 2
    assert axes["data"]["all-reduce"] == {"payload": 4, "count": 1, "sent": 4, "runs": 1}
    assert axes["dcn"]["all-reduce"]["payload"] == 4
    assert axes.keys() == {"data", "data+model", "dcn"}


def test_hbm_bytes_are_those_of_slices_and_without_on_chip_memory() -> None:
    module = hlo.parse(LOOP).module
    by_op = {op.name: hlo._hbm_bytes(op) for c in module.values() for op in c.ops.values()}
    assert by_op["layer"] == 2 * 32 * 128  # the slice of the stack; the result is on the chip
    assert by_op["wide"] == 2 * 8 * 32  # h; the matrix and the result are on the chip
    assert by_op["scattered"] == 2 * 4 * 128  # the fusion reads from the chip and writes to HBM
    assert by_op["loop"] == by_op["w"] == 0


def test_trip_counts() -> None:
    assert flops("%one = s32[] constant(1)", "%one = s32[] constant(2)") == 2 * PRODUCT  # unrolled
    assert flops("direction=LT", "direction=LE") == 4 * PRODUCT
    known = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    assert flops("body=%body", known) == 5 * PRODUCT
    unknown = LOOP.replace("%three = s32[] constant(3)", "%three = s32[] custom-call()")
    totals = hlo.totals(hlo.parse(unknown))
    assert (totals.unknown_loops, totals.flops) == (1, PRODUCT)


def test_called_computations_count() -> None:
    """A conditional counts all branches, a call its computation."""
    text = """\
%product (a: f32[4,5]) -> f32[4,4] {
  %a = f32[4,5]{1,0} parameter(0)
  %b = f32[5,4]{1,0} constant({...})
  ROOT %y = f32[4,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a.1: f32[4,5], p: pred[]) -> f32[4,4] {
  %a.1 = f32[4,5]{1,0} parameter(0)
  %p = pred[] parameter(1)
  %z = f32[4,4]{1,0} call(%a.1), to_apply=%product
  %c = f32[4,4]{1,0} conditional(%p, %a.1, %a.1), true_computation=%product, \
false_computation=%product
  ROOT %d = f32[4,4]{1,0} conditional(%p, %a.1, %a.1), \
branch_computations={%product, %product}
}
"""
    assert hlo.totals(hlo.parse(text)).flops == 5 * 2 * 4 * 5 * 4
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule empty")


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_of_devices(text: str, groups: list[list[int]]) -> None:
    attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true"
    assert hlo.replica_groups(attributes).tolist() == groups


def test_unknown_notations_of_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot parse replica_groups="):
        hlo.replica_groups("replica_groups=<new form>")


def test_axes_of_groups() -> None:
    mesh = {"slice": 1, "data": 2, "model": 4}
    assert hlo.axes_of(np.array([[0, 1], [2, 3]]), mesh) == "model"
    assert hlo.axes_of(np.array([[0, 4]]), mesh) == "data"
    assert hlo.axes_of(np.array([[0, 5]]), mesh) == "data+model"
    assert hlo.axes_of(np.array([[3]]), mesh) == "none"


@pytest.mark.parametrize(
    ("op", "flops"),
    [
        (
            "f32[4,6]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            4 * 5 * 6,
        ),
        # A batch of 7 products of [4, 5] and [5, 6], as a window.
        (
            "f32[7,4,6]{2,1,0} convolution(%c, %d), window={size=7 stride=6 pad=0_0 lhs_dilate=7}, "
            "dim_labels=0bf_0io->0bf",
            7 * 4 * 5 * 6,
        ),
    ],
)
def test_flops_of_a_product(op: str, flops: int) -> None:
    text = f"""\
ENTRY %main (a: f32[4,5], b: f32[5,6], c: f32[7,4,5], d: f32[7,5,6]) -> f32[4,6] {{
  %a = f32[4,5]{{1,0}} parameter(0)
  %b = f32[5,6]{{1,0}} parameter(1)
  %c = f32[7,4,5]{{2,1,0}} parameter(2)
  %d = f32[7,5,6]{{2,1,0}} parameter(3)
  ROOT %y = {op}
}}
"""
    assert hlo.totals(hlo.parse(text)).flops == 2 * flops


def test_flops_of_a_real_program() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (jax.numpy.tanh(h @ w), None), x, w)[0]

    x, w = jax.numpy.ones((8, 16)), jax.numpy.ones((5, 16, 16))
    text = jax.jit(jax.grad(lambda w: f(x, w).sum())).lower(w).compile().as_text() or ""
    assert hlo.totals(hlo.parse(text)).flops == 5 * 3 * 2 * 8 * 16 * 16


@needs_libtpu
def test_cubes_compile_with_rings() -> None:
    # Without rings a cube would gather by adding arrays of zeros: more than twice the bytes.
    devices = plan.topology_devices(CHIPS["v5p"], (4, 4, 4))
    mesh = jax.sharding.Mesh(mesh_utils.create_device_mesh((64,), devices), ("data",))
    sharded, replicated = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    x = jax.ShapeDtypeStruct((2048, 1024), np.float32, sharding=sharded)
    text = jax.jit(lambda x: x, out_shardings=replicated).lower(x).compile().as_text() or ""
    axes = hlo.by_axes(hlo.totals(hlo.parse(text)).collectives, {"data": 64})
    assert axes["data"].keys() == {"all-gather"}
    assert axes["data"]["all-gather"]["sent"] == 4 * 2048 * 1024 * 63 / 64
