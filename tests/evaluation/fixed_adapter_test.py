"""Adapter folders as systems: same predictions as the run that generated them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5 import cli, model, runs
from hyper_t5.evaluation import fixed_adapter
from hyper_t5.export import native as native_folder
from hyper_t5.inference import predictor
from tests.support import tiny_runs
from tests.support.evaluations import read_predictions

LORA = ("enc_self.query", "dec_cross.value", "dec_mlp.wo")


@pytest.fixture(scope="module")
def run(sni: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with one LoRA for all tasks."""
    config = tiny_runs.make_config(
        backbone__path=str(backbone),
        data__sni_dir=str(sni),
        system="shared_lora",
        adapter__lora_targets=LORA,
        data__input_length=12,
    )
    return tiny_runs.untrained_run(config, tmp_path_factory.mktemp("run") / "shared")


@pytest.fixture(scope="module")
def native(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the adapter of the run as a native folder."""
    adapter = predictor.load(run).adapt({"instruction": "copy the letters.", "examples": []})
    return adapter.save(tmp_path_factory.mktemp("adapter") / "native")


def predictions(out: Path) -> list[tuple[str, str]]:
    return [(row["id"], row["prediction"]) for row in read_predictions(out)]


def evaluate(*argv: Any) -> None:
    assert cli.main(["evaluate", *map(str, argv)]) == 0


def test_a_folder_predicts_as_its_run(
    run: Path,
    native: Path,
    backbone: Path,
    sni: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate("--workdir", run, "--out", tmp_path / "run")
    argv = ["export", f"--adapter={native}", f"--backbone={backbone}", "--format=peft"]
    assert cli.main([*argv, f"--out={tmp_path / 'peft'}"]) == 0
    data = [f"--gin.data.sni_dir={sni}", "--mixture=sni", "--gin.eval.max_decode_length=4"]
    data += ["--gin.data.input_length=12", "--gin.data.hyper_length=40", "--gin.eval.shots=1"]
    sizes = [leaf.size for leaf in jax.tree.leaves(native_folder.load(native)[0])]
    for folder in (native, tmp_path / "peft"):
        out = tmp_path / f"of {folder.name}"
        capsys.readouterr()
        evaluate("--adapter", folder, "--backbone", backbone, "--out", out, *data)
        assert predictions(out) == predictions(tmp_path / "run")
        report = json.loads((out / "metrics.json").read_text())
        assert (report["system"], report["adapter"]) == ("adapter", str(folder))
        assert report["generated_parameters"] == sum(sizes)
        assert "\nadapter  test   2" in capsys.readouterr().out
    bare = tmp_path / "bare"
    config = tiny_runs.make_config(
        backbone__path=str(backbone), data__sni_dir=str(sni), system="none"
    )
    tiny_runs.workdir.write_or_check_config(tmp_path / "none", config)
    evaluate("--workdir", tmp_path / "none", "--out", bare)
    assert predictions(bare) != predictions(tmp_path / "run")


@pytest.mark.parametrize("system", ["hint", "hyper_prefix"])
def test_adapters_of_every_kind_are_emitted_unchanged(system: str, backbone: Path) -> None:
    """Covers masked prefixes, masked memory and bottlenecks."""
    fields: dict[str, Any] = {"adapter__bottleneck_sizes": (3,)}
    if system == "hint":
        fields |= {"adapter__prefix_sites": ad.ATTENTION_SITES}
        fields["adapter__position_bias"] = "zero"
    config = tiny_runs.make_config(backbone__path=str(backbone), system=system, **fields)
    m, base, trained, frozen = runs.init_run(config)
    ids = np.array([[5, 6, 7, 0, 0, 0]], np.int32)
    expected = model.generate_adapters(m, {**trained, **frozen}, ids, np.zeros(1, np.int32))
    assert expected is not None
    fixed, own = fixed_adapter.as_model(jax.device_get(expected), base)
    params = {"backbone": base.params, "hypermodel": own}
    again = model.generate_adapters(
        fixed, params, np.zeros((2, 4), np.int32), np.zeros(2, np.int32)
    )
    assert again is not None
    assert again.spec == expected.spec
    for leaf, repeated in zip(jax.tree.leaves(expected), jax.tree.leaves(again), strict=True):
        assert (repeated.shape[1], repeated.dtype) == (2, leaf.dtype)
        np.testing.assert_array_equal(repeated[:, :1], leaf)
        np.testing.assert_array_equal(repeated[:, 1:], leaf)
    assert any(leaf.dtype == bool for leaf in jax.tree.leaves(again))


def test_unusable_folders_are_refused(
    native: Path,
    backbone: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def error(*argv: Any) -> str:
        return tiny_runs.fails(capsys, "evaluate", *map(str, argv))

    out = ["--out", tmp_path / "out"]
    assert "one of the arguments --workdir --adapter is required" in error(*out)
    assert "--adapter and --backbone belong together" in error("--adapter", native, *out)
    both = ["--adapter", native, "--backbone", backbone]
    assert "not allowed with argument" in error(*both, *out, "--workdir", run)
    assert "--adapter needs --out" in error(*both)
    adapters, meta, _ = native_folder.load(native)
    native_folder.save(tmp_path / "two", ad.take(adapters, np.zeros(2, int)), meta)
    native_folder.save(tmp_path / "text", adapters, meta | {"text": [5, 1]})
    several = error("--adapter", tmp_path / "two", "--backbone", backbone, *out)
    assert f"{tmp_path / 'two'}: holds adapters of 2 tasks" in several
    text = error("--adapter", tmp_path / "text", "--backbone", backbone, *out)
    assert "holds more than adapters" in text
    other = tiny_runs.save_backbone(tmp_path / "other", 1)
    assert "other weights" in error("--adapter", native, "--backbone", other, *out)
    assert not (tmp_path / "out").exists()
