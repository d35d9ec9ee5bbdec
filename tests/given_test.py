"""Adapter folders as systems: they answer as what they were made by, on every mixture alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import runs
from hyper_t5 import adapters as ad
from hyper_t5 import cli, given, model, serve

LORA = ("enc_self.query", "dec_cross.value", "dec_mlp.wo")


@pytest.fixture(scope="module")
def sni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_sni(tmp_path_factory.mktemp("sni") / "official")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_backbone(tmp_path_factory.mktemp("backbone") / "t5")


@pytest.fixture(scope="module")
def run(sni: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has the same LoRA for all tasks."""
    config = runs.make_config(
        backbone__path=str(backbone),
        data__sni_dir=str(sni),
        system="shared_lora",
        adapter__lora_targets=LORA,
        data__input_length=12,
    )
    return runs.untrained_run(config, tmp_path_factory.mktemp("run") / "shared")


@pytest.fixture(scope="module")
def native(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its adapter, as a native folder."""
    made = serve.load(run).adapt({"instruction": "copy the letters.", "examples": []})
    return made.save(tmp_path_factory.mktemp("adapter") / "native")


def answers(out: Path) -> list[tuple[str, str]]:
    lines = (out / "predictions.jsonl").read_text().splitlines()
    return [(row["id"], row["prediction"]) for row in map(json.loads, lines)]


def evaluate(*argv: Any) -> None:
    assert cli.main(["evaluate", *map(str, argv)]) == 0


def test_a_folder_answers_as_the_run_that_it_is_of(
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
    sizes = [leaf.size for leaf in jax.tree.leaves(ad.load(native)[0])]
    for folder in (native, tmp_path / "peft"):
        out = tmp_path / f"of {folder.name}"
        capsys.readouterr()
        evaluate("--adapter", folder, "--backbone", backbone, "--out", out, *data)
        assert answers(out) == answers(tmp_path / "run")
        report = json.loads((out / "metrics.json").read_text())
        assert (report["system"], report["adapter"]) == ("adapter", str(folder))
        assert report["generated_parameters"] == sum(sizes)
        said = capsys.readouterr().out
        assert "\nadapter  test   2" in said
    bare = tmp_path / "bare"
    config = runs.make_config(backbone__path=str(backbone), data__sni_dir=str(sni), system="none")
    runs.workdir.check_resume(tmp_path / "none", config)
    evaluate("--workdir", tmp_path / "none", "--out", bare)
    assert answers(bare) != answers(tmp_path / "run")


@pytest.mark.parametrize("system", ["hint", "hyper_prefix"])
def test_any_adapters_come_out_as_they_are(system: str, backbone: Path) -> None:
    """Prefixes with masks, memory with its own, bottlenecks."""
    fields: dict[str, Any] = {"adapter__bottleneck_sizes": (3,)}
    if system == "hint":
        fields |= {"adapter__prefix_sites": ad.ATTENTION_SITES}
        fields["adapter__position_bias"] = "zero"
    config = runs.make_config(backbone__path=str(backbone), system=system, **fields)
    m, base, trained, frozen = model.start(config)
    ids = np.array([[5, 6, 7, 0, 0, 0]], np.int32)
    made = model.generate(m, {**trained, **frozen}, ids, np.zeros(1, np.int32))
    assert made is not None
    as_given, own = given.as_system(jax.device_get(made), base)
    params = {"backbone": base.params, "hypermodel": own}
    again = model.generate(as_given, params, np.zeros((2, 4), np.int32), np.zeros(2, np.int32))
    assert again is not None
    assert again.spec == made.spec
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(again), strict=True):
        assert (other.shape[1], other.dtype) == (2, one.dtype)
        np.testing.assert_array_equal(other[:, :1], one)
        np.testing.assert_array_equal(other[:, 1:], one)
    assert any(leaf.dtype == bool for leaf in jax.tree.leaves(again))


def test_folders_that_cannot_be_evaluated(
    native: Path,
    backbone: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*argv: Any) -> str:
        return runs.fails(capsys, "evaluate", *map(str, argv))

    out = ["--out", tmp_path / "out"]
    assert "give --workdir, or --adapter with its --backbone" in said(*out)
    assert "give --workdir, or --adapter with" in said("--adapter", native, *out)
    both = ["--adapter", native, "--backbone", backbone]
    assert "give --workdir, or --adapter with" in said(*both, *out, "--workdir", run)
    assert "--adapter needs --out" in said(*both)
    found, meta, _ = ad.load(native)
    ad.save(tmp_path / "two", ad.take(found, np.zeros(2, int)), meta)
    ad.save(tmp_path / "text", found, meta | {"text": [5, 1]})
    several = said("--adapter", tmp_path / "two", "--backbone", backbone, *out)
    assert f"{tmp_path / 'two'}: holds adapters of 2 tasks" in several
    text = said("--adapter", tmp_path / "text", "--backbone", backbone, *out)
    assert "is no adapter alone" in text
    other = runs.save_backbone(tmp_path / "other", 1)
    assert "other weights" in said("--adapter", native, "--backbone", other, *out)
    assert not (tmp_path / "out").exists()
