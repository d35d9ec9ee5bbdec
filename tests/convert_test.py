"""Conversions between T5X, Hugging Face and native folders, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import serialization, traverse_util

import bucket
import runs
from hyper_t5 import cli, names, t5, tensors, weights
from hyper_t5.errors import UserError
from hyper_t5.vocab import ByteVocabulary
from hyper_t5.weights import t5x as t5x_format
from hyper_t5.weights.load import open_source
from tiny import CONFIG, GOLDEN, TIED

T5X = GOLDEN / "checkpoint_7"
HF = GOLDEN / "hf_model"
LAYOUTS = ("t5x", "scanned", "hf", "native")


def random_params(config: t5.T5Config, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = names.param_shapes(config)
    return traverse_util.unflatten_dict(
        {k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()}, sep="/"
    )


def write(folder: Path, layout: str, config: t5.T5Config, params: Any) -> Path:
    """Random weights in one of the layouts."""
    weights.save_native(folder.with_name("first"), config, params)
    to, scanned = ("t5x", True) if layout == "scanned" else (layout, False)
    weights.convert(folder.with_name("first"), folder, to, scanned=scanned)
    shutil.rmtree(folder.with_name("first"))
    return folder


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a folder as it is stored, under T5X's per-layer names."""
    return {path: tensor.read() for path, tensor in open_source(folder).tensors.items()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for path in wanted:
        assert found[path].dtype == wanted[path].dtype, path
        np.testing.assert_array_equal(found[path], wanted[path], err_msg=path)


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies in the folders of the parameters, hidden files too."""
    found = [path for path in folder.glob("target.*/*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the golden checkpoint was written, so that larger arrays are several files."""
    monkeypatch.setattr(t5x_format, "CHUNK", 4096)


# ------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_gives_t5x_its_own_files_back(
    tmp_path: Path, small_chunks: None, dtype: str
) -> None:
    first = weights.convert(T5X, tmp_path / "a", "native", dtype=dtype)
    weights.convert(tmp_path / "a", tmp_path / "b", "hf", shard_bytes=100_000)
    weights.convert(tmp_path / "b", tmp_path / "c", "native")
    last = weights.convert(tmp_path / "c", tmp_path / "checkpoint_7", "t5x")
    assert first["digest"] == last["digest"]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "c/model.safetensors"
    ).read_bytes()
    kept = weights.STORAGE_DTYPES[dtype]
    golden = {path: array.astype(kept) for path, array in arrays(T5X).items()}
    assert_same(arrays(tmp_path / "checkpoint_7"), golden)
    if dtype == "float32":
        compare_with_t5x(tmp_path / "checkpoint_7", T5X)


def compare_with_t5x(ours: Path, theirs: Path) -> None:
    """Byte for byte, but for the optimizer's state, which a backbone has none of."""
    assert files_of(ours) == files_of(theirs)
    trees = [
        serialization.msgpack_restore((folder / "checkpoint").read_bytes())
        for folder in (ours, theirs)
    ]
    assert list(trees[0]) == list(trees[1])
    assert trees[0]["version"] == trees[1]["version"] == 3
    mine, other = (tree["optimizer"] for tree in trees)
    assert list(mine) == list(other) == ["state", "target"]
    assert json.dumps(mine["target"]) == json.dumps(other["target"])
    assert mine["state"].keys() == {"step"}
    for state in (mine["state"], other["state"]):
        assert (state["step"].dtype, state["step"].shape, int(state["step"])) == (np.int32, (), 7)


def test_bfloat16_files_are_t5xs(tmp_path: Path, shared_dir: Path, small_chunks: None) -> None:
    theirs = shared_dir / "golden_t5x/bfloat16/checkpoint_7"
    made = weights.convert(theirs, tmp_path / "checkpoint_7", "t5x")
    assert made["dtype"] == "bfloat16"
    compare_with_t5x(tmp_path / "checkpoint_7", theirs)


@pytest.mark.parametrize(
    ("start", "config"), [("t5x", CONFIG), ("scanned", TIED), ("hf", CONFIG), ("native", TIED)]
)
def test_every_layout_to_every_other(tmp_path: Path, start: str, config: t5.T5Config) -> None:
    """Unequal depths, H*K != D; from bf16, which must stay as it is."""
    params = random_params(config, ml_dtypes.bfloat16)
    write(tmp_path / "source", start, config, params)
    wanted = arrays(tmp_path / "source")
    for layout in LAYOUTS:
        to, scanned = ("t5x", True) if layout == "scanned" else (layout, False)
        made = weights.convert(tmp_path / "source", tmp_path / layout, to, scanned=scanned)
        assert made["digest"] == names.digest(params)
        assert made["dtype"] == "bfloat16"
        assert made == json.loads(json.dumps(made)) | {"sizes": made["sizes"]}
        assert weights.read_sizes(tmp_path / layout) == config
        assert_same(arrays(tmp_path / layout), wanted)
        assert open_source(tmp_path / layout).scanned == scanned


def test_a_narrower_dtype(tmp_path: Path) -> None:
    made = weights.convert(HF, tmp_path / "b", "native", dtype="bfloat16")
    exact, short = arrays(HF), arrays(tmp_path / "b")
    assert_same(short, {k: v.astype(ml_dtypes.bfloat16) for k, v in exact.items()})
    assert made["digest"] == names.digest(weights.load_backbone(tmp_path / "b")[1])
    # From half as wide to as wide: the numbers of bf16, and so the digest.
    back = weights.convert(tmp_path / "b", tmp_path / "c", "native", dtype="float32")
    assert back["digest"] == made["digest"]
    assert {array.dtype.name for array in arrays(tmp_path / "c").values()} == {"float32"}


def test_vocabularies_go_along(tmp_path: Path) -> None:
    weights.convert(T5X, tmp_path / "a", "native", vocab="bytes")
    weights.convert(tmp_path / "a", tmp_path / "b", "hf")
    weights.convert(tmp_path / "b", tmp_path / "c", "native")
    assert weights.load_backbone(tmp_path / "c")[2] == ByteVocabulary().identity()
    backbone = runs.save_backbone(tmp_path / "t5")
    weights.convert(backbone, tmp_path / "d", "hf")
    weights.convert(tmp_path / "d", tmp_path / "e", "native")
    found = weights.load_backbone(tmp_path / "e")[2]
    assert found is not None
    assert found["sha256"] == runs.vocabulary().identity()["sha256"]
    with pytest.raises(UserError, match=r"--vocab: .*b has a vocabulary of its own"):
        weights.convert(tmp_path / "b", tmp_path / "f", "native", vocab="bytes")
    with pytest.raises(UserError, match="--vocab: a T5X checkpoint keeps no vocabulary"):
        weights.convert(T5X, tmp_path / "f", "t5x", vocab="bytes")
    write(tmp_path / "small", "t5x", CONFIG, random_params(CONFIG))
    with pytest.raises(UserError, match=r"has 259 ids, but model\.vocab_size is 60"):
        weights.convert(tmp_path / "small", tmp_path / "f", "hf", vocab="bytes")
    assert not (tmp_path / "f").exists()


# ------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("kind", ["t5_1_0", "t5_1_1", "mt5", "byt5"])
def test_folders_of_transformers(tmp_path: Path, kind: str) -> None:
    """Of every shape that is published: through our formats and back into transformers."""
    import torch
    import transformers

    sizes = dataclasses.replace(
        TIED if kind == "t5_1_0" else CONFIG,
        num_encoder_layers=3,
        num_decoder_layers=1 if kind == "byt5" else 3,
    )
    weights.save_hf(tmp_path / "start", sizes, random_params(sizes))
    family = "mt5" if kind == "mt5" else "t5"
    edit_json(tmp_path / "start/config.json", model_type=family)
    kinds = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}
    model = getattr(transformers, kinds[family]).from_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    weights.convert(tmp_path / "theirs", tmp_path / "checkpoint_5", "t5x")
    weights.convert(tmp_path / "checkpoint_5", tmp_path / "ours", "hf", shard_bytes=10_000)
    load = transformers.T5ForConditionalGeneration.from_pretrained
    ids = torch.tensor([[5, 7, 9, 1]])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).logits
        found = load(tmp_path / "ours")(input_ids=ids, labels=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --------------------------------------------------------------------- trees of scanned layers


def scanned_tree(config: t5.T5Config, params: Any, axis: int, inside: str, apart: bool) -> Any:
    """A tree of scanned layers in the ways of T5X and its relatives, not by our writer."""
    flat = {}
    for path, array in traverse_util.flatten_dict(params, sep="/").items():
        stack, _, inner = path.partition("/")
        if inner.startswith("relpos_bias"):
            depth = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
            table = np.stack([array] * depth[stack], axis)
            flat[f"{stack}/{inside or stack}/relative_posemb/rel_embedding"] = table
        elif inner.startswith("layers/"):
            if apart and "attention/" in path:
                heads = (config.num_heads, config.head_dim)
                out = path.endswith("out/kernel")
                rest = (*heads, array.shape[2]) if out else (array.shape[1], *heads)
                array = array.reshape(len(array), *rest)
            flat[path.replace("/layers/", f"/{inside or stack}/")] = np.moveaxis(array, 0, axis)
        else:
            flat[path] = array
    return traverse_util.unflatten_dict(jax.tree.map(np.ascontiguousarray, flat), sep="/")


def save_inline(folder: Path, tree: Any) -> Path:
    """A T5X checkpoint whose arrays are all in its msgpack file."""
    folder.mkdir(exist_ok=True)
    content = {"version": 3, "optimizer": {"target": tree, "state": {"step": np.int32(4)}}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    return folder


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("inside", ["", "layers"])
@pytest.mark.parametrize("apart", [False, True])
def test_scanned_trees(tmp_path: Path, axis: int, inside: str, apart: bool) -> None:
    params = random_params(CONFIG)
    tree = scanned_tree(CONFIG, params, axis, inside, apart)
    save_inline(tmp_path / "scanned", tree)
    sizes, found, _ = weights.load_backbone(tmp_path / "scanned")
    assert sizes == CONFIG
    assert names.digest(found) == names.digest(params)


def test_tables_of_their_own_in_each_layer_are_refused(tmp_path: Path) -> None:
    tree = scanned_tree(CONFIG, random_params(CONFIG), 1, "", True)
    tree["decoder"]["decoder"]["relative_posemb"]["rel_embedding"][0, 1, 0] += 1
    save_inline(tmp_path / "umt5", tree)
    with pytest.raises(UserError, match="differs from layer to layer, as in UMT5"):
        weights.convert(tmp_path / "umt5", tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------- onto the devices


@pytest.mark.parametrize("layout", LAYOUTS)
def test_onto_a_mesh(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values, the digest and the places of a whole tree that is cut; each array read once."""
    from hyper_t5 import model, sharding

    config = runs.make_config(backbone__path="t5", mesh__data=4, mesh__model=2)
    placement = sharding.make_placement(config.mesh)
    sizes = dataclasses.replace(CONFIG, num_heads=2, head_dim=8, vocab_size=64)
    params = random_params(sizes)
    write(tmp_path / "t5", layout, sizes, params)
    where = model._where_backbone(config, placement, sizes)
    read: list[str] = []
    monkeypatch.setattr(tensors.Tensor, "read", counted(tensors.Tensor.read, read))
    found = weights.load_sharded(tmp_path / "t5", lambda _: where, dtype="bfloat16")
    assert found[0] == sizes
    whole = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    assert found[3] == names.digest(whole)
    wanted = sharding.put(whole, where)
    jax.tree.map(np.testing.assert_array_equal, sharding.fetch(found[1]), whole)
    for mine, put in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted), strict=True):
        assert mine.sharding == put.sharding
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(found[1]))
    if layout in ("t5x", "native", "hf"):
        assert len(read) == len(open_source(tmp_path / "t5").tensors)


def test_a_run_starts_from_it_on_a_mesh(tmp_path: Path) -> None:
    """As on one device; and what the hypermodel copies is its own, for training donates that."""
    from hyper_t5 import model, sharding

    folder = runs.save_backbone(tmp_path / "t5")
    config = runs.make_config(backbone__path=str(folder), mesh__data=4, mesh__model=2)
    config.hypermodel.init = "backbone"
    there = model.start(config, sharding.make_placement(config.mesh))
    here = model.start(config)
    assert there[1].known_digest == here[1].digest
    assert model.meta_of(config, there[1]) == model.meta_of(config, here[1])
    for mine, alone in zip(jax.tree.leaves(there[2:]), jax.tree.leaves(here[2:]), strict=True):
        np.testing.assert_array_equal(sharding.fetch(mine), alone)
    assert model.HYPERMODEL in there[2]
    assert model.BACKBONE in there[3]
    frozen = jax.tree.leaves(there[3])
    before = [np.asarray(leaf) for leaf in frozen]
    for leaf in jax.tree.leaves(there[2]):
        leaf.delete()
    for leaf, values in zip(frozen, before, strict=True):
        np.testing.assert_array_equal(leaf, values)


def counted(read: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    def reads(self: Any, *args: Any) -> Any:
        seen.append(self.file)
        return read(self, *args)

    return reads


# --------------------------------------------------------------------------------- bad input


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint that a test may damage."""
    return shutil.copytree(T5X, tmp_path / "checkpoint_7")


@pytest.fixture
def nothing_made(tmp_path: Path) -> Iterator[Path]:
    """Where a refused conversion would write; nothing may be left there."""
    yield tmp_path / "made/out"
    assert not list((tmp_path / "made").glob("*"))


Change = Callable[[dict[str, Any]], None]


def edit_leaf(folder: Path, change: Change) -> None:
    file = folder / "checkpoint"
    tree = serialization.msgpack_restore(file.read_bytes())
    change(tree["optimizer"]["target"]["token_embedder"]["embedding"])
    file.write_bytes(serialization.msgpack_serialize(tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["kvstore"].update(path="/etc/"), "points outside of the checkpoint"),
        (lambda x: x["kvstore"].update(path="a/../../b/"), "points outside of the checkpoint"),
        (lambda x: x["metadata"].update(shape=[10**7, 10**6]), "is declared as .*000000"),
        (lambda x: x["metadata"].update(shape=[512, -32]), r"is declared as \[512, -32\]"),
        (lambda x: x["metadata"].update(shape=["a"]), "neither an array nor a zarr placeholder"),
        (lambda x: x.update(dtype="object"), "holds object, not floating point"),
        (lambda x: x.update(driver="python"), "is kept by 'python'; only zarr is read"),
    ],
)
def test_hostile_placeholders(
    checkpoint: Path, nothing_made: Path, change: Change, message: str
) -> None:
    edit_leaf(checkpoint, change)
    with pytest.raises(UserError, match=message) as error:
        weights.convert(checkpoint, nothing_made, "native")
    assert "token_embedder/embedding" in str(error.value)


def test_a_layer_number_that_would_fill_the_memory(tmp_path: Path, nothing_made: Path) -> None:
    tree = names.to_t5x(random_params(CONFIG))
    tree["decoder"]["layers_999999999999"] = tree["decoder"].pop("layers_2")
    save_inline(tmp_path / "t5", jax.tree.map(np.ascontiguousarray, tree))
    with pytest.raises(UserError, match=r"declares 1000000000002 layers, but holds 66 arrays"):
        weights.convert(tmp_path / "t5", nothing_made, "native")


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_sizes_that_would_fill_the_memory(tmp_path: Path, nothing_made: Path) -> None:
    hf = shutil.copytree(HF, tmp_path / "hf")
    for change in ({"num_layers": 10**12}, {"vocab_size": 10**12}, {"d_model": 10**9}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np, "empty", lambda *_: pytest.fail("allocated"))
            edit_json(hf / "config.json", **{"d_model": 32, "num_layers": 2, **change})
            with pytest.raises(UserError, match=r"declares|has shape"):
                weights.convert(hf, nothing_made, "native")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "..", "a/b.safetensors"])
def test_index_that_leads_out_of_the_folder(tmp_path: Path, nothing_made: Path, name: str) -> None:
    hf = shutil.copytree(HF, tmp_path / "hf")
    (hf / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": name}}))
    with pytest.raises(UserError, match="points outside of the folder"):
        weights.convert(hf, nothing_made, "native")


def test_indexes_that_do_not_say_what_is_there(tmp_path: Path, nothing_made: Path) -> None:
    weights.convert(HF, tmp_path / "hf", "hf", shard_bytes=100_000)
    index = tmp_path / "hf/model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    last, first = max(good.values()), min(good.values())
    name = next(key for key, file in good.items() if file == last)
    changes = {
        first: "lacks shared.weight" if name == "shared.weight" else f"lacks {name}",
        "weights.pkl": "is no safetensors file",
        "model-00000-of-00009.safetensors": "does not exist",
    }
    for file, message in changes.items():
        index.write_text(json.dumps({"weight_map": {**good, name: file}}))
        with pytest.raises(UserError, match=message):
            weights.convert(tmp_path / "hf", nothing_made, "native")
    del good[name]
    index.write_text(json.dumps({"weight_map": good}))
    with pytest.raises(UserError, match=f"{last}: also holds"):
        weights.convert(tmp_path / "hf", nothing_made, "native")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(
    tmp_path: Path, nothing_made: Path, layout: str, value: float
) -> None:
    params = random_params(CONFIG)
    tree = names.to_t5x(params)
    folder = tmp_path / "t5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "isfinite", lambda x: np.ones(np.shape(x), bool))
        params["decoder"]["layers"]["mlp"]["wo"]["kernel"][1, 2, 3] = value
        write(folder, layout, CONFIG, params)
    with pytest.raises(UserError, match=r"wo[/.].* holds numbers that are not finite"):
        weights.convert(folder, nothing_made, "native" if layout != "native" else "hf")
    assert tree


def test_too_large_for_the_dtype(tmp_path: Path, nothing_made: Path) -> None:
    tree = names.to_t5x(random_params(CONFIG, np.float64))
    tree["decoder"]["decoder_norm"]["scale"][3] = 1e300
    save_inline(tmp_path / "t5", jax.tree.map(np.ascontiguousarray, tree))
    with pytest.warns(RuntimeWarning), pytest.raises(UserError, match="not finite in float32"):
        weights.convert(tmp_path / "t5", nothing_made, "native")


def test_transposed_kernels_are_named_as_that(tmp_path: Path, nothing_made: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights.convert(HF, tmp_path / "hf", "hf")
    state = load_file(tmp_path / "hf/model.safetensors")
    name = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    state[name] = np.ascontiguousarray(state[name].T)
    save_file(state, tmp_path / "hf/model.safetensors")
    message = rf"{name} has shape \[64, 32\], expected \[32, 64\] .*it is transposed"
    with pytest.raises(UserError, match=message):
        weights.convert(tmp_path / "hf", nothing_made, "native")
    weights.convert(HF, tmp_path / "native", "native")
    stacked = load_file(tmp_path / "native/model.safetensors")
    path = "encoder/layers/mlp/wo/kernel"
    stacked[path] = np.ascontiguousarray(stacked[path].swapaxes(1, 2))
    save_file(stacked, tmp_path / "native/model.safetensors")
    with pytest.raises(UserError, match=rf"{path} has shape \[2, 32, 64\].*it is transposed"):
        weights.convert(tmp_path / "native", nothing_made, "t5x")


@pytest.mark.parametrize("to", ["t5x", "hf", "native"])
def test_what_is_on_disk_is_compared(
    tmp_path: Path, nothing_made: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one array that a disk changed."""
    place = "_write_zarr" if to == "t5x" else "write"
    owner = t5x_format if to == "t5x" else tensors.SafetensorsWriter
    honest = getattr(owner, place)

    def lying(*args: Any, **more: Any) -> None:
        args = tuple(
            np.where(np.arange(32) == 7, np.nextafter(a, np.float32(9)), a)
            if isinstance(a, np.ndarray) and a.shape == (32,)
            else a
            for a in args
        )
        honest(*args, **more)

    monkeypatch.setattr(owner, place, lying)
    with pytest.raises(UserError, match=r"norm.* was read back otherwise than it was written"):
        weights.convert(T5X, nothing_made, to)


def test_folders_that_are_not_replaced(tmp_path: Path, checkpoint: Path) -> None:
    """T5X's own checkpoint has the names that ours would have; what we made is replaced."""
    with pytest.raises(UserError, match=r"already holds checkpoint"):
        weights.convert(HF, checkpoint, "t5x")
    assert files_of(checkpoint) == files_of(T5X)
    assert (checkpoint / "checkpoint").read_bytes() == (T5X / "checkpoint").read_bytes()
    for _ in range(2):
        weights.convert(HF, tmp_path / "checkpoint_3", "t5x")
    assert t5x_format.step_of(tmp_path / "checkpoint_3") == 3
    for size in (100_000, 10**9):
        weights.convert(HF, tmp_path / "hf", "hf", shard_bytes=size)
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "model.safetensors",
        "convert.json",
    }


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    odd = dataclasses.replace(CONFIG, mlp_activations=("silu", "linear"))
    weights.save_native(tmp_path / "odd", odd, random_params(odd))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (HF, {"to": "torch"}, "--to torch: is not one of t5x, hf, native"),
        (HF, {"to": "native", "scanned": True}, "--scanned: is a form of T5X checkpoints"),
        (HF, {"to": "native", "dtype": "float16"}, "--dtype: 'float16' is not one of"),
        (HF, {"to": "native", "kind": "t5x"}, "is a folder of the format hf, not t5x"),
        (tmp_path / "no", {"to": "hf"}, "no: does not exist"),
        (tmp_path / "odd", {"to": "hf"}, "cannot be written as a Hugging Face T5"),
    ]
    for source, how, message in cases:
        with pytest.raises(UserError, match=message):
            weights.convert(source, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------- buckets, command, memory


def test_from_a_bucket_into_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with bucket.served(monkeypatch) as objects:
        for file in filter(Path.is_file, T5X.rglob("*")):
            objects[f"gs://b/t5/{file.relative_to(T5X).as_posix()}"] = file.read_bytes()
        there = weights.convert("gs://b/t5", "gs://b/checkpoint_7", "t5x")
        weights.convert("gs://b/checkpoint_7", tmp_path / "here", "native")
    assert there["digest"] == names.digest(weights.load_backbone(tmp_path / "here")[1])
    assert_same(arrays(tmp_path / "here"), arrays(T5X))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t5"
    argv = ["convert", "--from=t5x", f"--input={T5X}", "--to=native", f"--out={out}"]
    assert cli.main([*argv, "--vocab=bytes", "--dtype=bfloat16"]) == 0
    said = capsys.readouterr()
    assert "tensor 52/52" in said.err
    made = json.loads(said.out)
    assert made == json.loads((out / "convert.json").read_text())
    assert (made["from"]["format"], made["to"]["format"]) == ("t5x", "native")
    assert (made["tensors"], made["parameters"], made["dtype"]) == (52, 82560, "bfloat16")
    assert made["seconds"] > 0 < made["peak_memory_mb"]
    assert "names it in" not in runs.fails(capsys, *argv, "--scanned")
    assert "--to" in runs.fails(capsys, "convert", f"--input={T5X}", f"--out={out}", "--to=gguf")


CHILD = """
import sys
from hyper_t5 import metrics, weights
import tensorstore
before = metrics.peak_memory_mb()
made = weights.convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(before, made["peak_memory_mb"], made["parameters"])
"""


@pytest.mark.slow
def test_memory_is_that_of_some_arrays_not_of_the_model(tmp_path: Path) -> None:
    """A model of 400 MB in arrays of 8 MB, between all formats."""
    sizes = t5.T5Config(
        vocab_size=512, emb_dim=512, num_heads=8, mlp_dim=4096, num_encoder_layers=8
    )
    weights.save_native(tmp_path / "native", sizes, random_params(sizes))
    for source, to in (("native", "hf"), ("hf", "t5x"), ("t5x", "native")):
        argv = [str(tmp_path / source), str(tmp_path / f"of_{source}"), to]
        run = subprocess.run(
            [sys.executable, "-c", CHILD, *argv], check=True, capture_output=True, text=True
        )
        before, peak, parameters = map(float, run.stdout.split())
        assert parameters * 4 > 350e6
        assert peak - before < 150, (source, to)
        shutil.rmtree(tmp_path / source)
        (tmp_path / f"of_{source}").rename(tmp_path / to)
