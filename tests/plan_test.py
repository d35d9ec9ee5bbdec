"""The plan: chips and topologies, what is read from a compiled program, and plans of real steps.

Programs are compiled by libtpu for chips that are not there; without libtpu those tests are
skipped.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from ml_collections import ConfigDict

import runs
from hyper_t5 import chips, cli, hlo, model, plan, plan_tables, quiet, weights
from hyper_t5 import config as config_lib
from hyper_t5.chips import CHIPS, GIB
from hyper_t5.episodes import EpisodeSampler
from hyper_t5.errors import UserError
from hyper_t5.taskfile import Row, TaskRows
from hyper_t5.tasks.text import open_chunks
from hyper_t5.text import TextSampler

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="no TPU compiler; pip install libtpu"
)

# -------------------------------------------------------------------------------------------- chips


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
    assert chips.peak_of(kind) == peak


def test_a_pods_bandwidths_agree_with_what_is_published_of_pods() -> None:
    # "All-reduce bandwidth per Pod" over the chips of one: what a chip's links carry.
    for name, pod in {"v4": 1.1e15 / 4096, "v5e": 51.2e12 / 256, "v6e": 102.4e12 / 256}.items():
        chip = CHIPS[name]
        assert chip.links * chip.ici_bandwidth == pytest.approx(pod, rel=0.15)


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
    assert chips.parse_topology(text) == (CHIPS[name], shape)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("v5e:2x2x2", "the nearest is v5e:2x4"),
        ("v5p:3x3x3", "the nearest is v5p:2x4x4"),
        ("v4:4x12x4", "known: 2x2x1, "),
        ("v9:2x2", "chips: v3, v4, v5e, v5p, v6e"),
        ("h100:2x2", "chips: v3, "),
        ("v5p", "such as v5p:"),
        ("v5p-100", "'v5p-1024'"),
    ],
)
def test_a_topology_that_is_none_names_the_nearest(text: str, told: str) -> None:
    with pytest.raises(UserError, match="--topology") as e:
        chips.parse_topology(text)
    assert told in str(e.value)


def test_rings() -> None:
    assert chips.wraps(CHIPS["v5p"], (4, 4, 8)) == (True, True, True)
    assert chips.wraps(CHIPS["v5p"], (2, 4, 4)) == (False, False, False)
    assert chips.wraps(CHIPS["v5e"], (8, 16)) == (False, True)


def test_libtpu_is_only_quietened_where_there_is_no_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"TPU_WORKER_HOSTNAMES": "mine"}
    quiet.libraries(given)
    assert given["TPU_WORKER_HOSTNAMES"] == "mine"
    assert given["TPU_ACCELERATOR_TYPE"] == "v5p-8"
    monkeypatch.setattr("glob.glob", lambda pattern: [pattern])
    given = {}
    quiet.libraries(given)
    assert given.keys() == {"TF_CPP_MIN_LOG_LEVEL"}


# --------------------------------------------------------------------------------- programs as text

LOOP = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%compared (p.0: s32[], p.1: s32[]) -> pred[] {
  %p.0 = s32[] parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %less = pred[] compare(%p.0, %p.1), direction=LT
}

%scatter.all-reduce-scatter (input: bf16[8,128]) -> bf16[4,128] {
  %input = bf16[8,128]{1,0} parameter(0)
  %reduced = bf16[8,128]{1,0} all-reduce(%input), channel_id=4, \
replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = bf16[4,128]{1,0} dynamic-slice(%reduced, %zero, %zero)
}

%start (p.2: bf16[8,32]) -> bf16[8,128] {
  %p.2 = bf16[8,32]{1,0} parameter(0)
  ROOT %gathered = bf16[8,128]{1,0} all-gather(%p.2), channel_id=7, \
replica_groups=[1,4]<=[4], dimensions={1}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
}

%beside (p.3: bf16[8,32]) -> bf16[8,128] {
  %p.3 = bf16[8,32]{1,0} parameter(0)
  ROOT %gathered.1 = bf16[8,128]{1,0} all-gather(%p.3), channel_id=7, \
replica_groups=[1,4]<=[4], dimensions={1}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%body (state: (s32[], bf16[8,32], bf16[3,32,128])) -> (s32[], bf16[8,32], bf16[3,32,128]) {
  %state = (s32[], bf16[8,32]{1,0}, bf16[3,32,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %h = bf16[8,32]{1,0} get-tuple-element(%state), index=1
  %w = bf16[3,32,128]{2,1,0} get-tuple-element(%state), index=2
  %zero.1 = s32[] constant(0)
  %layer = bf16[1,32,128]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%w, %i, %zero.1, %zero.1)
  %matrix = bf16[32,128]{1,0:S(1)} bitcast(%layer)
  %wide = bf16[8,128]{1,0:S(1)} convolution(%h, %matrix), dim_labels=bf_io->bf
  %first = bf16[8,128]{1,0} fusion(%h), kind=kCustom, calls=%start
  %second = bf16[8,128]{1,0} fusion(%h), kind=kCustom, calls=%beside
  %scattered = bf16[4,128]{1,0} fusion(%wide), kind=kCustom, calls=%scatter.all-reduce-scatter
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[8,32]{1,0}, bf16[3,32,128]{2,1,0}) tuple(%next, %h, %w)
}

%condition (state.1: (s32[], bf16[8,32], bf16[3,32,128])) -> pred[] {
  %state.1 = (s32[], bf16[8,32]{1,0}, bf16[3,32,128]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %three = s32[] constant(3)
  ROOT %go = pred[] fusion(%i.1, %three), kind=kLoop, calls=%compared
}

ENTRY %main (h.1: bf16[8,32], w.1: bf16[3,32,128]) -> f32[] {
  %h.1 = bf16[8,32]{1,0} parameter(0)
  %w.1 = bf16[3,32,128]{2,1,0} parameter(1)
  %start.1 = s32[] constant(0)
  %copied = s32[] copy(%start.1)
  %init = (s32[], bf16[8,32]{1,0}, bf16[3,32,128]{2,1,0}) tuple(%copied, %h.1, %w.1)
  %loop = (s32[], bf16[8,32]{1,0}, bf16[3,32,128]{2,1,0}) while(%init), \
condition=%condition, body=%body
  %loss = f32[] constant(0)
  %token = token[] after-all()
  %send = (f32[], u32[], token[]) send(%loss, %token), channel_id=9, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="all-reduce.1",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %total = f32[] all-reduce(%loss), channel_id=8, \
replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, to_apply=%add
}
"""
MESH = {"slice": 1, "data": 2, "model": 2}


def test_a_loop_counts_as_often_as_it_runs() -> None:
    totals = hlo.totals(hlo.parse(LOOP), slices=2)
    assert totals.unknown_loops == 0
    assert totals.flops == 3 * 2 * 8 * 32 * 128
    found = hlo.by_axes(totals.collectives, MESH)
    # The gathering is written down twice and is one; it starts from a fourth of 8 x 128.
    row = 2 * 8 * 128
    assert found["data+model"]["all-gather"] == {
        "payload": 3 * row,
        "count": 3 * 8 * 128,
        "sent": 3 * row * 3 / 4,
        "runs": 3,
    }
    # An all-reduce that keeps a slice is a reduce-scatter.
    assert found["data"]["reduce-scatter"]["payload"] == 3 * row
    assert found["data"]["reduce-scatter"]["sent"] == 3 * row / 2
    assert found["data"]["all-reduce"] == {"payload": 4, "count": 1, "sent": 4, "runs": 1}
    assert found["dcn"]["all-reduce"]["payload"] == 4
    assert found.keys() == {"data", "data+model", "dcn"}


def test_a_slice_is_what_is_read_of_a_stack() -> None:
    text = LOOP.replace("%first = ", "%unused = s32[] constant(0)\n  %first = ")
    layer = 2 * 32 * 128
    by_op = {
        op.name: hlo._hbm_bytes(hlo.parse(text), computation, op)
        for computation in hlo.parse(text).computations.values()
        for op in computation.ops.values()
    }
    assert by_op["layer"] == layer  # read; what is made lies on the chip
    assert by_op["wide"] == 2 * 8 * 32  # h, from HBM; the matrix and the result are on the chip
    assert by_op["loop"] == by_op["w"] == 0


def test_a_loop_that_xla_has_unrolled_turns_less_often() -> None:
    text = LOOP.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")
    assert hlo.totals(hlo.parse(text)).flops == 2 * 2 * 8 * 32 * 128  # 0, 2


def test_a_loop_of_unknown_length_is_told() -> None:
    text = LOOP.replace("%three = s32[] constant(3)", "%three = s32[] custom-call()")
    totals = hlo.totals(hlo.parse(text))
    assert totals.unknown_loops == 1
    assert totals.flops == 2 * 8 * 32 * 128


def test_what_the_program_says_of_a_loop_is_believed() -> None:
    told = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    assert hlo.totals(hlo.parse(LOOP.replace("body=%body", told))).flops == 5 * 2 * 8 * 32 * 128


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
    found = hlo.replica_groups(f", channel_id=1, replica_groups={text}, use_global_device_ids=true")
    assert found.tolist() == groups


def test_groups_in_an_unknown_form_are_no_guess() -> None:
    with pytest.raises(ValueError, match="cannot read replica_groups="):
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
        # Batches of a product are a window's places: 7 products of [4, 5] and [5, 6].
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


def test_flops_of_real_programs_are_those_of_their_products() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (jax.numpy.tanh(h @ w), None), x, w)[0]

    x, w = jax.numpy.ones((8, 16)), jax.numpy.ones((5, 16, 16))
    text = jax.jit(jax.grad(lambda w: f(x, w).sum())).lower(w).compile().as_text() or ""
    assert hlo.totals(hlo.parse(text)).flops == 5 * 3 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    ("text", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (131.32G) exceeds available HBM (15.75G).",
            131.32,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.",
            17.5,
            15.75,
        ),
    ],
)
def test_what_the_compiler_needs_is_read(text: str, needed: float, available: float) -> None:
    found = [size / GIB for size in plan.read_exhausted(text)]
    assert found == pytest.approx([needed, available])


# ------------------------------------------------------------------------- configs and shapes alone

XL = {"emb_dim": 2048, "num_heads": 32, "head_dim": 64, "mlp_dim": 5120, "vocab_size": 32128}


def make_config(**fields: Any) -> ConfigDict:
    """HyperT5-LoRA at XL's width, two layers deep, with short texts."""
    settings: dict[str, Any] = {
        "system": "hyper_lora",
        **{f"model__{k}": v for k, v in XL.items()},
        "model__num_encoder_layers": 2,
        "model__num_decoder_layers": 2,
        "model__dtype": "bfloat16",
        "model__remat": "minimal",
        "backbone__dtype": "bfloat16",
        "adapter__lora_targets": ("enc_self.query", "dec_cross.value"),
        "data__tasks_per_batch": 8,
        "data__examples_per_task": 1,
        "data__hyper_length": 128,
        "data__input_length": 128,
        "data__target_length": 32,
        "mesh__data": -1,
        "backbone__path": "not_there",  # so the sizes are the config's
    }
    return runs.make_config(**(settings | fields))


@pytest.fixture
def eight_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs in the place of a topology's devices: nothing can be compiled for TPUs, or needs to."""
    monkeypatch.setattr(plan, "devices_of", lambda chip, shape, slices: jax.devices()[:8])


@pytest.mark.parametrize(
    ("stage", "layout", "fields"),
    [
        ("mtf", "apart", {}),
        ("mtf", "concat", {}),
        ("mtf", "concat", {"data__concat_length": 30}),
        ("mtf", "apart", {"data__pack": True}),
        ("hyperpretrain", "apart", {}),
        ("hyperpretrain", "concat", {}),
    ],
)
def test_a_plans_batch_is_as_large_as_the_real_one(
    stage: str, layout: str, fields: dict[str, Any]
) -> None:
    system = {"apart": "hyper_prefix", "concat": "concat"}[layout]
    config = runs.make_config(stage=stage, system=system, backbone__path="not_there", **fields)
    vocab = runs.vocabulary()
    sampler: EpisodeSampler | TextSampler
    if stage == "mtf":
        rows = [Row(str(i), f"ba {i}", ("ke",)) for i in range(4)]
        tasks = [TaskRows(f"t{i}", ("ba",), (("ba ke", "ke"),), rows) for i in range(3)]
        sampler = EpisodeSampler(tasks, vocab, config.data, 0, layout)
    else:
        sampler = TextSampler(open_chunks(config.data, vocab, 0), config.data, 0, layout)
    m = model.build(config, config_lib.t5_config(config))
    found = {k: (x.shape, x.dtype) for k, x in plan.batch_of(config, m).items()}
    assert found == {k: (x.shape, x.dtype) for k, x in sampler.batch(0).items()}


@pytest.mark.usefixtures("eight_devices")
def test_bytes_of_each_part_are_those_of_its_numbers() -> None:
    target = plan.make_target(make_config(mesh__model=2), "v5p:2x2x2")
    assert target.mesh == {"slice": 1, "data": 4, "model": 2}
    parts = plan.train_program(target).parts
    counts = {name: model.count(tree) for name, tree in parts.items()}
    # What is trained is cut by both axes, Adam's two moments too; the frozen rest by `model`. All
    # but vectors are: a little is left.
    assert plan.shard_bytes(parts["trained"]) == pytest.approx(4 * counts["trained"] / 8, rel=2e-3)
    assert plan.shard_bytes(parts["optimizer"]) == pytest.approx(
        8 * counts["trained"] / 8, rel=2e-3
    )
    frozen = plan.shard_bytes(parts["frozen weights"])
    assert frozen == pytest.approx(2 * counts["frozen weights"] / 2, rel=2e-3)
    assert plan.shard_bytes(parts["batch"]) == 4 * counts["batch"] // 4


@pytest.mark.usefixtures("eight_devices")
def test_heads_that_are_not_cut_are_warned_of() -> None:
    six = {"model__num_heads": 6, "model__head_dim": 64, "model__emb_dim": 512}
    told = plan.warnings(plan.make_target(make_config(**six, mesh__model=4), "v5p:2x2x2"))
    assert any("6 heads are not a multiple of mesh.model=4" in text for text in told)
    odd = plan.make_target(make_config(mesh__model=8, model__vocab_size=32100), "v5p:2x2x2")
    assert any("mesh.model=8 does not divide vocab=32100" in text for text in plan.warnings(odd))
    [only] = plan.warnings(plan.make_target(make_config(mesh__model=4), "v5p:2x2x2"))
    assert "backbone.path=not_there is not there: the sizes are those of config.model" in only


@pytest.mark.usefixtures("eight_devices")
def test_advice_begins_with_what_saves_most() -> None:
    def advised(peak: float, **parts: float) -> list[str]:
        memory = {"arguments": parts, "peak": peak * GIB, "limit": 16 * GIB}
        return [text.partition("=")[0] for text in plan.advice(target, {"memory": memory})]

    target = plan.make_target(
        make_config(data__tasks_per_batch=16, backbone__dtype="float32"), "v5p:2x2x2"
    )
    parts = {"frozen weights": 2 * GIB, "trained": 1 * GIB, "optimizer": 2 * GIB}
    activations = advised(100, **parts)
    assert activations[:2] == ["model.remat", "train.microbatches"]
    # Eight devices and two tasks each: into two parts, and not the eight that would be wanted.
    memory = {"arguments": parts, "peak": 100 * GIB, "limit": 16 * GIB}
    assert "train.microbatches=2 " in plan.advice(target, {"memory": memory})[1]
    parts = {"frozen weights": 40 * GIB, "trained": 1 * GIB, "optimizer": 2 * GIB}
    assert advised(44, **parts)[:2] == ["mesh.model", "backbone.dtype"]
    parts = {"frozen weights": 1 * GIB, "trained": 20 * GIB, "optimizer": 40 * GIB}
    assert advised(62, **parts)[0] == "optimizer.name"


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("kind", ["native", "hf"])
def test_sizes_come_from_the_backbones_folder_without_its_weights(
    tmp_path: Path, kind: str
) -> None:
    folder = runs.save_backbone(tmp_path / "native")
    if kind == "hf":
        weights.save_hf(tmp_path / "hf", *weights.load_backbone(folder)[:2])
        folder = tmp_path / "hf"
    for file in folder.glob("*.safetensors"):
        file.unlink()
    config = make_config(backbone__path=str(folder), model__remat="full")
    sizes = plan.backbone_sizes(config)
    assert (sizes.emb_dim, sizes.num_decoder_layers) == (runs.SIZES.emb_dim, 3)
    assert (sizes.dtype, sizes.remat) == ("bfloat16", "full")


def test_without_a_compiler_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    with pytest.raises(UserError, match=r"pip install 'hyper_t5\[plan\]'"):
        plan.devices_of(CHIPS["v5e"], (2, 2))


def test_planning_imports_no_tensorflow() -> None:
    code = (
        "import sys, hyper_t5.plan; "
        "sys.exit(', '.join({'tensorflow', 'seqio', 'torch'} & sys.modules.keys()) or None)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ------------------------------------------------------------------------- compiled for real chips


def planned(topology: str, steps: list[str], folder: Path, **fields: Any) -> dict[str, Any]:
    return plan.plan(make_config(**fields), topology, steps=steps, out=folder)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training step of HyperT5-Prefix on eight v5p chips, data 4 and model 2."""
    folder = tmp_path_factory.mktemp("plan")
    small = {"data__hyper_length": 64, "data__input_length": 64, "data__target_length": 16}
    system = {"system": "hyper_prefix", "adapter__prefix_sites": ("enc_self",), "mesh__model": 2}
    return planned("v5p:2x2x2", ["train"], folder, **small, **system) | {"folder": folder}


@needs_libtpu
def test_a_training_step_is_planned(report: dict[str, Any]) -> None:
    found = report["programs"]["train"]
    written = json.loads((report["folder"] / "plan.json").read_text())
    assert written["programs"]["train"] == found
    assert report["devices"] == report["chips"] == 8
    memory = found["memory"]
    assert found["fits"]
    assert sum(memory["arguments"].values()) == pytest.approx(memory["laid_out"], rel=0.02)
    assert memory["laid_out"] < memory["peak"] < memory["limit"]
    # All that is multiplied is cut evenly, but for what remat makes again: little at "minimal".
    assert found["model_flops"] <= found["flops"] < 1.25 * found["model_flops"]
    assert found["unknown_loops"] == 0
    times = found["seconds"]
    assert times["compute"] == found["flops"] / 459e12
    assert found["step_seconds"] == max(times.values()) == times[found["binds"]]
    assert 0 < found["utilisation"] < 1


@needs_libtpu
def test_gradients_are_reduced_of_what_is_trained_alone(report: dict[str, Any]) -> None:
    over_data = report["programs"]["train"]["collectives"]["data"]
    trained = report["parameters"]["trained"] / report["mesh"]["model"]
    frozen = report["parameters"]["frozen"] / report["mesh"]["model"]
    assert frozen > trained
    embedding = XL["vocab_size"] * XL["emb_dim"] / report["mesh"]["model"]
    reduced = sum(over_data.get(k, {"count": 0})["count"] for k in ("reduce-scatter", "all-reduce"))
    # The gradient of an embedding is gathered by rows, one a token, where these are fewer.
    rows = over_data.get("all-to-all", {"count": 0})["count"]
    assert reduced == pytest.approx(trained - embedding * (rows > 0), rel=0.02)
    assert rows <= embedding


@needs_libtpu
def test_the_compiled_program_is_kept_for_a_second_look(report: dict[str, Any]) -> None:
    text = gzip.decompress((report["folder"] / "train.hlo.gz").read_bytes()).decode()
    assert hlo.totals(hlo.parse(text)).flops == report["programs"]["train"]["flops"]


@pytest.mark.slow
@needs_libtpu
def test_decoding_and_generating_are_planned(tmp_path: Path) -> None:
    report = planned("v5e:2x2", ["evaluate", "generate"], tmp_path, mesh__model=2)
    evaluated, generated = (report["programs"][step] for step in ("evaluate", "generate"))
    for found in (evaluated, generated):
        # All weights lie there, whichever of them a program reads.
        assert found["memory"]["peak"] > sum(found["memory"]["arguments"].values())
        assert found["fits"]
        assert found["unknown_loops"] == 0
        assert found["memory"]["peak"] < found["memory"]["limit"] == 15.75 * GIB
        weights_ = found["memory"]["arguments"]["weights"]
        assert weights_ >= 2 * report["parameters"]["frozen"] / 2  # whole over data, cut by model
    # What each further step of decoding multiplies: the decoder, two layers, and the logits.
    longer = planned("v5e:2x2", ["evaluate"], tmp_path, mesh__model=2, eval__max_decode_length=16)
    more = longer["programs"]["evaluate"]["flops"] - evaluated["flops"]
    d, wide = XL["emb_dim"], XL["mlp_dim"]
    decoder = 2 * (4 * d * d + 2 * d * d + 3 * d * wide) + d * XL["vocab_size"]
    rows = 8 / 2
    assert more / (16 - 4) == pytest.approx(2 * rows * decoder / 2, rel=0.05)
    assert not any("reduce-scatter" in kinds for kinds in evaluated["collectives"].values())


@needs_libtpu
def test_what_does_not_fit_is_one_line_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {k: getattr(runs.SIZES, k) for k in XL}
    with pytest.raises(UserError, match=r"train does not fit: it needs .* GiB .* try --gin\.") as e:
        planned(
            "v5e:2x2",
            ["train"],
            tmp_path,
            **{f"model__{k}": v for k, v in small.items()},
            model__remat="none",
            data__tasks_per_batch=512,
            data__examples_per_task=32,
            data__input_length=512,
        )
    assert "\n" not in str(e.value)
    assert "v5e:2x2 has 15.75 GiB" in str(e.value)
    memory = json.loads((tmp_path / "plan.json").read_text())["programs"]["train"]["memory"]
    assert memory["peak"] > memory["limit"]
    assert "  try --gin.model.remat=full" in capsys.readouterr().out


@needs_libtpu
def test_cubes_are_compiled_for_as_rings() -> None:
    # Without its rings a cube gathers by adding up arrays of zeros: twice the bytes, and more.
    devices = plan.devices_of(CHIPS["v5p"], (4, 4, 4))
    mesh = jax.sharding.Mesh(mesh_utils.create_device_mesh((64,), devices), ("data",))
    cut, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    x = jax.ShapeDtypeStruct((2048, 1024), np.float32, sharding=cut)
    text = jax.jit(lambda x: x, out_shardings=whole).lower(x).compile().as_text() or ""
    found = hlo.by_axes(hlo.totals(hlo.parse(text)).collectives, {"data": 64})
    assert found["data"].keys() == {"all-gather"}
    assert found["data"]["all-gather"]["sent"] == 4 * 2048 * 1024 * 63 / 64


def test_every_plan_of_the_document_can_be_made() -> None:
    for row in plan_tables._rows():
        config = config_lib.load(row.config, row.overrides)
        config_lib.validate(config, needs_backbone=False)
        _, shape = chips.parse_topology(row.topology)
        parts = math.prod(shape) // config.mesh.model
        assert config.data.tasks_per_batch % (parts * config.train.microbatches) == 0, row.name


@needs_libtpu
def test_the_documents_tables_are_made_of_plans(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora_xl_v5p_8").mkdir()
    shutil.copy(report["folder"] / "plan.json", tmp_path / "lora_xl_v5p_8")
    assert plan_tables.main(["--out", str(tmp_path), "--only"]) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert found["lora_xl_v5p_8"]["programs"] == report["programs"]
    assert (tmp_path / "scaling.png").stat().st_size > 0
    head, _, row, _ = capsys.readouterr().out.splitlines()
    assert head.count("|") == row.count("|")
    assert row.startswith("| lora_xl_v5p_8 | 8 v5p | 4x2 | 8 |")


@pytest.mark.soak
@needs_libtpu
def test_a_published_config_at_full_depth(tmp_path: Path) -> None:
    config = config_lib.load(
        "configs/mtf.py:system=hyper_lora,size=xl", ["data.tasks_per_batch=16", "mesh.model=4"]
    )
    found = plan.plan(config, "v5p:2x2x2", steps=["train"], out=tmp_path)["programs"]["train"]
    assert found["fits"]
    assert found["unknown_loops"] == 0
    assert found["model_flops"] <= found["flops"] < 1.25 * found["model_flops"]
    assert sum(found["memory"]["arguments"].values()) == pytest.approx(
        found["memory"]["laid_out"], rel=0.02
    )


@needs_libtpu
def test_devices_of_every_kind_of_chip() -> None:
    for name in chips.TPUS:
        chip = CHIPS[name]
        for shape in (chip.shapes[0], chip.shapes[2]):
            sides = chips.sides_of(shape)
            devices = plan.devices_of(chip, sides)
            assert len(devices) == math.prod(sides) * chip.devices
            assert chips.chip_of(devices[0].device_kind) == chip
    assert len(plan.devices_of(CHIPS["v5e"], (2, 2), slices=2)) == 8


@needs_libtpu
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "--config", "configs/mtf.py:size=small", "--out", str(tmp_path)]
    assert cli.main([*given, "--topology", "v5e:3x3"]) == 2
    assert "the nearest is v5e:" in capsys.readouterr().err
    assert cli.main([*given, "--topology", "v5e:2x2", "--steps", "trian"]) == 2
    assert "'train'" in capsys.readouterr().err
    batch = ["--gin.data.tasks_per_batch=6"]
    assert cli.main([*given, "--topology", "v5e:2x2", *batch]) == 2
    assert "data.tasks_per_batch=6 cannot be cut over" in capsys.readouterr().err
    mesh = ["--gin.mesh.data=3", "--gin.mesh.model=3"]
    assert cli.main([*given, "--topology", "v5e:2x2", *mesh]) == 2
    assert "mesh.slices, mesh.data, mesh.model = 1, 3, 3" in capsys.readouterr().err
