"""Plans: abstract programs, advice, and steps that libtpu compiles for absent chips."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from hyper_t5 import cli, model, weights
from hyper_t5 import config as config_lib
from hyper_t5.data.batch import CONCAT, SEPARATE, Layout
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.task_rows import TaskData, TaskRow
from hyper_t5.data.text_corpus import TextSampler
from hyper_t5.experiments import paper_runs, plan_tables
from hyper_t5.parallel import accelerators
from hyper_t5.parallel.accelerators import CHIPS, GIB
from hyper_t5.planning import hlo, plan, plan_report
from hyper_t5.tasks.text import open_chunks
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs
from tests.support.tpu import needs_libtpu

# A quarter of XL's width, which compiles in a third of the time.
SIZES = {"emb_dim": 512, "num_heads": 8, "head_dim": 64, "mlp_dim": 1024, "vocab_size": 8192}


def make_config(**fields: Any) -> ConfigDict:
    """Return a config of HyperT5-LoRA, two layers deep, with short texts."""
    settings: dict[str, Any] = {
        "system": "hyper_lora",
        **{f"model__{k}": v for k, v in SIZES.items()},
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
        "backbone__path": "missing",  # so the sizes are the config's
    }
    return tiny_runs.make_config(**(settings | fields))


def plan_config(topology: str, steps: list[str], folder: Path, **fields: Any) -> dict[str, Any]:
    return plan.plan(make_config(**fields), topology, steps=steps, out=folder)


# ------------------------------------------------------------------------------- without a compiler


@pytest.fixture
def eight_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the devices of a topology by CPUs, for which nothing is compiled."""
    monkeypatch.setattr(plan, "topology_devices", lambda chip, shape, slices: jax.devices()[:8])


@pytest.mark.parametrize(
    ("stage", "layout", "fields"),
    [
        ("mtf", SEPARATE, {}),
        ("mtf", CONCAT, {}),
        ("mtf", CONCAT, {"data__concat_length": 30}),
        ("mtf", SEPARATE, {"data__pack": True}),
        ("hyperpretrain", SEPARATE, {}),
        ("hyperpretrain", CONCAT, {}),
    ],
)
def test_the_batch_of_a_plan_equals_the_real_one(
    stage: str, layout: Layout, fields: dict[str, Any]
) -> None:
    system = "concat" if layout.in_inputs else "hyper_prefix"
    config = tiny_runs.make_config(stage=stage, system=system, backbone__path="missing", **fields)
    vocab = tiny_runs.vocabulary()
    sampler: EpisodeSampler | TextSampler
    if stage == "mtf":
        rows = [TaskRow(str(i), f"ba {i}", ("ke",)) for i in range(4)]
        tasks = [TaskData(f"t{i}", ("ba",), (("ba ke", "ke"),), rows) for i in range(3)]
        sampler = EpisodeSampler(tasks, vocab, config.data, 0, layout)
    else:
        sampler = TextSampler(open_chunks(config.data, vocab, 0), config.data, 0, layout)
    m = model.build_model(config, config_lib.t5_config(config))
    shapes = {k: (x.shape, x.dtype) for k, x in plan.batch_of(config, m).items()}
    assert shapes == {k: (x.shape, x.dtype) for k, x in sampler.batch(0).items()}


@pytest.mark.usefixtures("eight_devices")
def test_bytes_of_the_arguments() -> None:
    target = plan.make_target(make_config(mesh__model=2), "v5p:2x2x2")
    assert target.mesh == {"slice": 1, "data": 4, "model": 2}
    parts = plan.train_program(target).parts
    size = {name: plan.shard_bytes(tree) for name, tree in parts.items()}
    count = {name: model.count_parameters(tree) for name, tree in parts.items()}
    # Trained parameters and Adam's two moments are sharded over both axes, frozen ones over
    # `model`; vectors are replicated.
    assert size["trained"] == pytest.approx(4 * count["trained"] / 8, rel=5e-3)
    assert size["optimizer"] == pytest.approx(8 * count["trained"] / 8, rel=5e-3)
    assert size["frozen weights"] == pytest.approx(2 * count["frozen weights"] / 2, rel=5e-3)
    assert size["batch"] == 4 * count["batch"] // 4


@pytest.mark.usefixtures("eight_devices")
def test_warnings() -> None:
    def warn(**fields: Any) -> list[str]:
        return plan.warnings(plan.make_target(make_config(**fields), "v5p:2x2x2"))

    assert any(
        "6 heads are not a multiple of mesh.model=4" in text
        for text in warn(model__num_heads=6, mesh__model=4)
    )
    odd = warn(mesh__model=8, model__vocab_size=8100)
    assert any("mesh.model=8 does not divide vocab=8100" in text for text in odd)
    [only] = warn(mesh__model=4)
    assert "backbone.path=missing does not exist; sizes are those of config.model" in only


def test_advice_starts_with_the_largest_saving() -> None:
    config = make_config(data__tasks_per_batch=16, backbone__dtype="float32")
    report = {"remat": "minimal", "mesh": {"slice": 1, "data": 8, "model": 1}}

    def advise(peak: float, frozen: float, trained: float, optimizer: float) -> list[str]:
        arguments = {"frozen weights": frozen, "trained": trained, "optimizer": optimizer}
        arguments = {name: size * GIB for name, size in arguments.items()}
        memory = {"arguments": arguments, "peak": peak * GIB, "limit": 16 * GIB}
        return plan_report.advice(config, report, {"memory": memory}, num_heads=32)

    def fields(*sizes: float) -> list[str]:
        return [text.partition("=")[0] for text in advise(*sizes)]

    assert fields(100, 2, 1, 2)[:2] == ["model.remat", "train.microbatches"]
    # Eight devices with two tasks each allow two microbatches, not the eight that would fit.
    assert "train.microbatches=2 " in advise(100, 2, 1, 2)[1]
    assert fields(44, 40, 1, 2)[:2] == ["mesh.model", "backbone.dtype"]
    assert fields(62, 1, 20, 40)[0] == "optimizer.name"


@pytest.mark.parametrize("kind", ["native", "hf"])
def test_sizes_are_read_from_the_backbones_folder(tmp_path: Path, kind: str) -> None:
    folder = tiny_runs.save_backbone(tmp_path / "native")
    if kind == "hf":
        weights.save_hf(tmp_path / "hf", *weights.load_backbone(folder)[:2])
        folder = tmp_path / "hf"
    for file in folder.glob("*.safetensors"):
        file.unlink()
    config = make_config(backbone__path=str(folder), model__remat="full")
    sizes = plan.backbone_sizes(config)
    assert (sizes.emb_dim, sizes.num_decoder_layers) == (tiny_runs.SIZES.emb_dim, 3)
    assert (sizes.dtype, sizes.remat) == ("bfloat16", "full")


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
        ("RESOURCE_EXHAUSTED: no numbers", 0, 0),
    ],
)
def test_the_compilers_memory_error(text: str, needed: float, available: float) -> None:
    sizes = [size / GIB for size in plan.parse_exhausted(text)]
    assert sizes == pytest.approx([needed, available])


def test_a_missing_compiler_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    with pytest.raises(UserError, match=r"pip install 'hyper_t5\[plan\]'"):
        plan.topology_devices(CHIPS["v5e"], (2, 2))


def test_planning_imports_no_tensorflow() -> None:
    code = (
        "import sys, hyper_t5.planning.plan; "
        "sys.exit(', '.join({'tensorflow', 'seqio', 'torch'} & sys.modules.keys()) or None)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ------------------------------------------------------------------------------ with the compiler


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Plan a training step of HyperT5-Prefix on eight v5p chips, data 4 and model 2."""
    folder = tmp_path_factory.mktemp("plan")
    lengths = {"data__hyper_length": 64, "data__input_length": 64, "data__target_length": 16}
    system = {"system": "hyper_prefix", "adapter__prefix_sites": ("enc_self",), "mesh__model": 2}
    return plan_config("v5p:2x2x2", ["train"], folder, **lengths, **system) | {"folder": folder}


@needs_libtpu
def test_a_plan_of_a_training_step(report: dict[str, Any]) -> None:
    costs = report["programs"]["train"]
    written = json.loads((report["folder"] / "plan.json").read_text())
    assert written["programs"]["train"] == costs
    assert report["devices"] == report["chips"] == 8
    memory = costs["memory"]
    assert costs["fits"]
    assert sum(memory["arguments"].values()) == pytest.approx(memory["laid_out"], rel=0.02)
    assert memory["laid_out"] < memory["peak"] < memory["limit"]
    # Products are evenly sharded; remat at "minimal" recomputes little.
    assert costs["model_flops"] <= costs["flops"] < 1.25 * costs["model_flops"]
    assert costs["unknown_loops"] == 0
    times = costs["seconds"]
    assert times["compute"] == costs["flops"] / 459e12
    assert costs["step_seconds"] == max(times.values()) == times[costs["binds"]]
    assert 0 < costs["utilisation"] < 1
    text = gzip.decompress((report["folder"] / "train.hlo.gz").read_bytes()).decode()
    assert hlo.totals(hlo.parse(text)).flops == costs["flops"]


@needs_libtpu
def test_only_gradients_of_trained_parameters_are_reduced(report: dict[str, Any]) -> None:
    over_data = report["programs"]["train"]["collectives"]["data"]
    trained = report["parameters"]["trained"] / report["mesh"]["model"]
    frozen = report["parameters"]["frozen"] / report["mesh"]["model"]
    assert frozen > trained
    embedding = SIZES["vocab_size"] * SIZES["emb_dim"] / report["mesh"]["model"]
    reduced = sum(over_data.get(k, {"count": 0})["count"] for k in ("reduce-scatter", "all-reduce"))
    # The gradient of an embedding is gathered by rows, one per token, if these are fewer.
    rows = over_data.get("all-to-all", {"count": 0})["count"]
    assert reduced == pytest.approx(trained - embedding * (rows > 0), rel=0.02)
    assert rows <= embedding


@needs_libtpu
def test_documents_show_a_plan(report: dict[str, Any]) -> None:
    cells = plan_tables._cells("prefix", report, report["programs"]["train"])
    assert cells[:4] == ["prefix", "8 v5p", "4x2", "8"]
    summary = paper_runs.summarize(report | {"config": "configs/mtf.py"})
    costs = report["programs"]["train"]
    assert summary["arguments"] == sum(costs["memory"]["arguments"].values())
    assert summary["step_seconds"] == costs["step_seconds"]
    assert paper_runs._needs(summary, steps=3600)[4] == f"{costs['step_seconds']:.2g}"


@pytest.mark.slow
@needs_libtpu
def test_plans_of_decoding_and_generation(tmp_path: Path) -> None:
    report = plan_config("v5e:2x2", ["evaluate", "generate"], tmp_path, mesh__model=2)
    evaluated, generated = (report["programs"][step] for step in ("evaluate", "generate"))
    for costs in (evaluated, generated):
        # All weights are in memory, whichever of them a program reads.
        assert costs["memory"]["peak"] > sum(costs["memory"]["arguments"].values())
        assert costs["fits"]
        assert costs["unknown_loops"] == 0
        assert costs["memory"]["peak"] < costs["memory"]["limit"] == 15.75 * GIB
        weights_ = costs["memory"]["arguments"]["weights"]
        assert weights_ >= 2 * report["parameters"]["frozen"] / 2  # sharded over `model` alone
    # A further step of decoding multiplies the decoder's two layers and the logits.
    longer = plan_config(
        "v5e:2x2", ["evaluate"], tmp_path, mesh__model=2, eval__max_decode_length=16
    )
    more = longer["programs"]["evaluate"]["flops"] - evaluated["flops"]
    d, wide, joined = SIZES["emb_dim"], SIZES["mlp_dim"], SIZES["num_heads"] * SIZES["head_dim"]
    decoder = 2 * (6 * d * joined + 3 * d * wide) + d * SIZES["vocab_size"]
    rows = 8 / 2
    assert more / (16 - 4) == pytest.approx(2 * rows * decoder / 2, rel=0.05)
    assert not any("reduce-scatter" in kinds for kinds in evaluated["collectives"].values())


@needs_libtpu
def test_a_step_that_does_not_fit_is_one_line_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {f"model__{k}": getattr(tiny_runs.SIZES, k) for k in SIZES}
    fields |= {"model__remat": "none", "data__tasks_per_batch": 512}
    fields |= {"data__examples_per_task": 32, "data__input_length": 512}
    with pytest.raises(UserError, match=r"train does not fit: it needs .* GiB .* try --gin\.") as e:
        plan_config("v5e:2x2", ["train"], tmp_path, **fields)
    assert "\n" not in str(e.value)
    assert "v5e:2x2 has 15.75 GiB" in str(e.value)
    memory = json.loads((tmp_path / "plan.json").read_text())["programs"]["train"]["memory"]
    assert memory["peak"] > memory["limit"]
    assert "  try --gin.model.remat=full" in capsys.readouterr().out


@pytest.mark.soak
@needs_libtpu
def test_a_published_config_at_full_depth(tmp_path: Path) -> None:
    config = config_lib.load(
        "configs/mtf.py:system=hyper_lora,size=xl", ["data.tasks_per_batch=16", "mesh.model=4"]
    )
    costs = plan.plan(config, "v5p:2x2x2", steps=["train"], out=tmp_path)["programs"]["train"]
    assert costs["fits"]
    assert costs["unknown_loops"] == 0
    assert costs["model_flops"] <= costs["flops"] < 1.25 * costs["model_flops"]
    assert sum(costs["memory"]["arguments"].values()) == pytest.approx(
        costs["memory"]["laid_out"], rel=0.02
    )


@needs_libtpu
def test_devices_of_every_kind_of_chip() -> None:
    for chip in CHIPS.values():
        for shape in (chip.shapes[0], chip.shapes[2]):
            sides = accelerators.sides_of(shape)
            devices = plan.topology_devices(chip, sides)
            assert len(devices) == math.prod(sides) * chip.devices
            assert devices[0].device_kind in chip.kinds
    assert len(plan.topology_devices(CHIPS["v5e"], (2, 2), slices=2)) == 8


@needs_libtpu
def test_invalid_arguments_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--config", "configs/mtf.py:size=small", "--out", str(tmp_path)]
    for arguments, message in (
        (["--topology", "v5e:3x3"], "v5e has no slice of 3x3; known: 1x1, "),
        (["--topology", "v5e:2x2", "--steps", "trian"], "'train'"),
        (
            ["--topology", "v5e:2x2", "--gin.data.tasks_per_batch=6"],
            "data.tasks_per_batch=6 cannot be split into",
        ),
        (
            ["--topology", "v5e:2x2", "--gin.mesh.data=3", "--gin.mesh.model=3"],
            "mesh.slices, mesh.data, mesh.model = 1, 3, 3",
        ),
    ):
        assert cli.main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
