"""Native adapter folders: exact round trips, and refusal of damaged folders."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5.adapters import Adapters, AdapterSpec, LoraSpec
from hyper_t5.export import native
from hyper_t5.export.native import SPEC_FILE, TENSOR_FILE
from hyper_t5.utils.errors import UserError
from tests.support.tiny_model import (
    CONFIG,
    EVERYTHING,
    GOLDEN,
    LORA,
    PREFIX,
    map_leaves,
    random_adapters,
    with_mask,
)

pytestmark = pytest.mark.smoke

META = {"task": "é", "numbers": [1, 2.5]}
PATTERN = AdapterSpec(
    lora=ad.lora_spec(
        {"enc_self.query": 2, "dec_cross.out": 5}, {"enc_self.query": 3.0, "dec_cross.out": 8.0}
    )
)


def example() -> Adapters:
    return with_mask(random_adapters(EVERYTHING["zero"], 2), 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return native.save(tmp_path / "adapter", example(), META)


def assert_equal(actual: Adapters, expected: Adapters) -> None:
    assert actual.spec == expected.spec
    assert hash(actual.spec) == hash(expected.spec)
    jax.tree.map(np.testing.assert_array_equal, actual.tree, expected.tree)
    dtypes = jax.tree.map(lambda x, y: x.dtype == y.dtype, actual.tree, expected.tree)
    assert all(jax.tree.leaves(dtypes))


def test_a_folder_of_an_earlier_version() -> None:
    """Every kind, a mask, bfloat16 and a hypermodel, saved before this module existed."""
    adapters, meta, hypermodel = native.load(GOLDEN / "adapter", CONFIG)
    assert meta == {"encoding": "labelled", "task": "é"}
    assert adapters.spec == AdapterSpec(
        ad.lora_spec(
            {"enc_self.query": 1, "dec_cross.out": 2},
            {"enc_self.query": 2.0, "dec_cross.out": 2.0},
            bias=True,
        ),
        ad.PrefixSpec(("dec_self",), 2, "zero"),
        ad.BottleneckSpec(("dec_mlp",), (2,), "relu", "raw"),
        memory=2,
    )
    assert adapters.tree["enc_self"]["query"]["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(adapters.tree["memory"]["mask"], [[[True, False]]])
    assert hypermodel is not None
    np.testing.assert_array_equal(hypermodel["reader"]["queries"], np.ones((2, 3), np.float32))
    expected = "a236d74dffdbea3da288692a5962a49019520f984541052cde36718765f37152"
    assert native.digest(adapters) == expected


def test_round_trip_is_exact(folder: Path, tmp_path: Path) -> None:
    adapters, meta, hypermodel = native.load(folder)
    assert_equal(adapters, example())
    assert meta == META
    assert hypermodel is None
    assert {file.name for file in folder.iterdir()} == {SPEC_FILE, TENSOR_FILE}
    linked = tmp_path / "snapshot"  # download caches consist of symbolic links
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    assert_equal(native.load(linked)[0], example())

    for spec in (LORA, PREFIX, PATTERN, AdapterSpec()):
        expected = random_adapters(spec, 1)
        native.save(folder, expected, {})  # replaces the earlier adapter
        assert_equal(native.load(folder, CONFIG)[0], expected)
    assert {path.name for path in folder.parent.iterdir()} == {"adapter", "snapshot"}


def test_transposed_and_bfloat16_leaves(tmp_path: Path) -> None:
    leaf = np.asarray(jax.random.normal(jax.random.key(0), (2, 1, 2, 16), jnp.bfloat16))
    query = {"a": leaf.swapaxes(2, 3), "b": leaf}
    spec = AdapterSpec(lora=LoraSpec(("enc_self.query",), 2, 1.0))
    adapters = Adapters({"enc_self": {"query": query}}, spec)
    assert_equal(native.load(native.save(tmp_path / "a", adapters, {}))[0], adapters)


def test_save_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds notes.txt"):
        native.save(tmp_path, random_adapters(LORA, 1), {})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_save_keeps_the_earlier_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native.files, "write_json", disk_full)
    with pytest.raises(UserError, match="No space left"):
        native.save(folder, random_adapters(LORA, 1), {})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_nothing_is_read_before_the_shapes_are_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.safetensors_io.Tensor, "read", lambda self: pytest.fail("read"))
    with pytest.raises(UserError, match=r"needs \(\d, 2, 24, 2\)"):
        native.load(folder, dataclasses.replace(CONFIG, emb_dim=24))


def edit_spec(**changes: Any) -> Callable[[Path], None]:
    """Return a function that sets fields of the spec, `PART__FIELD`."""

    def edit(folder: Path) -> None:
        header = json.loads((folder / SPEC_FILE).read_text())
        for name, value in changes.items():
            part, field = name.split("__")
            header["spec"][part][field] = value
        (folder / SPEC_FILE).write_text(json.dumps(header))

    return edit


def write_spec(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / SPEC_FILE).write_text(text)


def swap_tensors(folder: Path) -> None:
    other = map_leaves(example(), lambda _, x: x if x.dtype == bool else x * 2)
    native.save(folder.with_name("other"), other, {})
    (folder.with_name("other") / TENSOR_FILE).replace(folder / TENSOR_FILE)


def save_nan(folder: Path) -> None:
    nan = map_leaves(example(), lambda _, x: x if x.dtype == bool else x * np.nan)
    native.save(folder, nan, {})


def replace_by_pipe(folder: Path) -> None:
    (folder / TENSOR_FILE).unlink()
    os.mkfifo(folder / TENSOR_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / SPEC_FILE).unlink(), rf"{SPEC_FILE}: no such file.*hyper-t5 adapt"),
        (lambda f: (f / TENSOR_FILE).unlink(), rf"{TENSOR_FILE}: does not exist"),
        (lambda f: os.truncate(f / TENSOR_FILE, 9000), rf"{TENSOR_FILE}: is truncated"),
        (lambda f: os.truncate(f / SPEC_FILE, 900), rf"{SPEC_FILE}, line \d+: .*valid JSON"),
        (write_spec("[1, 2]"), rf"{SPEC_FILE}: .* JSON object"),
        (write_spec('{"format": "peft"}'), rf"{SPEC_FILE}: is not an adapter spec .*format"),
        (edit_spec(lora__rnak=3), "is not an adapter spec .*rnak"),
        (edit_spec(lora__rank=-1), "a rank is not positive"),
        (edit_spec(lora__rank="2"), "is not an adapter spec"),
        (edit_spec(prefix__sites=["../../etc"]), r"site '../../etc' is not one of enc_self"),
        (edit_spec(bottleneck__activation="__import__"), "'__import__' is not one of gelu"),
        (edit_spec(lora__rank=3), r"dec_cross/key/a is \(3, 2, 16, 2\).* needs \(3, 2, 16, 3\)"),
        (edit_spec(lora__bias=False), r"key/bias is \(3, 2, 12\).* needs no such tensor"),
        (swap_tensors, rf"{TENSOR_FILE}: does not match the digest in {SPEC_FILE}"),
        (save_nan, rf"{TENSOR_FILE}: .* has non-finite values"),
        (replace_by_pipe, rf"{TENSOR_FILE}: is no regular file"),
    ],
)
def test_a_damaged_folder_is_refused(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        native.load(folder, CONFIG)
    assert "\n" not in str(error.value)
