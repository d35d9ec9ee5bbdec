"""Runs small enough to be trained inside a test: backbones, tasks, configs, their files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from hyper_t5 import cli, runs, t5, weights
from hyper_t5 import config as config_lib
from hyper_t5.checkpoints import checkpoint, workdir
from hyper_t5.data.vocab import Vocabulary, load_vocab
from hyper_t5.tasks import MIXTURES
from hyper_t5.tasks.synthetic import VOCAB_FILE
from hyper_t5.tools import quickstart
from hyper_t5.training import loop
from hyper_t5.weights import param_names

# H*K is not D, and the stacks differ in depth, so that a swapped axis is an error.
SIZES = t5.T5Config(
    vocab_size=816,
    emb_dim=16,
    num_heads=2,
    head_dim=12,
    mlp_dim=24,
    num_encoder_layers=2,
    num_decoder_layers=3,
)
TASKS = ("task1_copy", "task2_swap", "task3_last")
HELD_OUT = ("task4_first", "task5_double")


# Each differs in one choice from a system that every run of the tests has.
_VARIANTS = {
    "hyper_prefix_plus",
    "hyper_lora_plus",
    "text_to_lora",
    "shared_prefix",
    "shared_bottleneck",
    "task_lora",
    "task_prefix",
}


def marked(systems: Iterable[str]) -> list[Any]:
    """Return pytest parameters of systems; variants are marked slow."""
    return [
        pytest.param(system, marks=pytest.mark.slow if system in _VARIANTS else ())
        for system in systems
    ]


def replace(**fields: Any) -> t5.T5Config:
    """Return SIZES with other fields."""
    return dataclasses.replace(SIZES, **fields)


def vocabulary() -> Vocabulary:
    """Load the embedded suite's vocabulary without sentinels: 800 ids, one per word."""
    return load_vocab(str(VOCAB_FILE), extra_ids=0)


def save_backbone(folder: Path, seed: int = 0, sizes: t5.T5Config = SIZES) -> Path:
    """Save a native folder with random weights and the embedded suite's vocabulary."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in param_names.param_shapes(sizes).items():
        scale = shape[-2] ** -0.5 if path.endswith("/kernel") else 1.0
        flat[path] = (scale * rng.normal(size=shape)).astype(np.float32)
    weights.save_native(folder, sizes, traverse_util.unflatten_dict(flat, sep="/"), vocabulary())
    return folder


def sni_task(name: str, rows: int = 6) -> dict[str, Any]:
    """Return the content of a Super-NaturalInstructions task file."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(f"{letters[i]} {letters[-1 - i]}", letters[i]) for i in range(rows + 2)]
    instances = [{"id": f"{name}-{i}", "input": x, "output": [y]} for i, (x, y) in enumerate(pairs)]
    return {
        "Definition": [f"{name.partition('_')[2]} the letters."],
        "Categories": [f"Kind of {name}"],
        "Positive Examples": [{"input": x, "output": y, "explanation": ""} for x, y in pairs[:2]],
        "Instances": instances[2:],
    }


def save_sni(folder: Path, rows: int = 6) -> Path:
    """Save an official-looking folder: TASKS to train on, HELD_OUT to test on."""
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    for split, tasks in {"train": TASKS, "test": HELD_OUT}.items():
        for name in tasks:
            text = json.dumps(sni_task(name, rows), indent=1)
            (folder / "tasks" / f"{name}.json").write_text(text)
        listing = folder / "splits" / "default" / f"{split}_tasks.txt"
        listing.write_text("\n".join(tasks) + "\n")
    return folder


def make_config(**fields: Any) -> ConfigDict:
    """Make a valid config of a tiny run; a field's dot is written as two underscores."""
    config = config_lib.defaults()
    settings: dict[str, Any] = {
        "data__mixture": "sni",
        "data__vocab": str(VOCAB_FILE),
        "data__extra_ids": 0,
        "data__text": "synthetic",
        "data__hyper_length": 40,
        "data__input_length": 16,
        "data__target_length": 8,
        "data__chunk_length": 32,
        "data__tasks_per_batch": 2,
        "data__examples_per_task": 2,
        "adapter__lora_rank": 2,
        "adapter__prefix_length": 3,
        "mesh__data": 1,
        "train__steps": 4,
        "train__log_every": 2,
        "train__save_every": 2,
        "train__keep": 10,
        "optimizer__learning_rate": 1e-2,
        "eval__max_decode_length": 4,
        "eval__batch": 8,
        "eval__shots": 1,
    }
    for field in ("emb_dim", "num_heads", "head_dim", "mlp_dim", "vocab_size"):
        settings[f"model__{field}"] = getattr(SIZES, field)
    for field in ("num_encoder_layers", "num_decoder_layers"):
        settings[f"model__{field}"] = getattr(SIZES, field)
    for field, value in (settings | fields).items():
        section, _, name = field.rpartition("__")
        (config[section] if section else config)[name] = value
    config_lib.validate(config)
    return config


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Run a command that must fail; return its one line on stderr."""
    capsys.readouterr()
    assert cli.main(argv) == code
    err = capsys.readouterr().err
    assert err.startswith("hyper-t5: error: ")
    assert err.count("\n") == 1
    return err


def run(config: ConfigDict, folder: Path) -> dict[str, float]:
    """Train, as the command does, in this process."""
    with workdir.lock(folder):
        workdir.write_or_check_config(folder, config)
        return loop.train(config, folder)


def command(config: ConfigDict, folder: Path, *more: str) -> list[str]:
    """Return the arguments of ``hyper-t5 train`` for this config and workdir."""
    file = folder.with_name(f"{folder.name}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(config_lib.to_json(config))
    code = "from pathlib import Path\nfrom hyper_t5 import config\n\n\ndef get_config(arg=None):\n"
    code += f"    return config.from_json(Path({str(file)!r}).read_text())\n"
    file.with_suffix(".py").write_text(code)
    return ["train", "--config", str(file.with_suffix(".py")), "--workdir", str(folder), *more]


def part_of(run: Path, folder: Path, step: int) -> Path:
    """Copy a workdir as if the run had been killed just after a checkpoint."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "backbone"))
    shutil.copytree(run / "checkpoints" / str(step), folder / "checkpoints" / str(step))
    return folder


def untrained_run(config: ConfigDict, folder: Path, seed: int = 0, noise: float = 0.1) -> Path:
    """Write a workdir as if trained: initial parameters plus random ``noise``."""
    workdir.write_or_check_config(folder, config)
    _, backbone, trained, _ = runs.init_run(config)
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(lambda x: x + noise * rng.normal(size=x.shape).astype(x.dtype), trained)
    checkpoint.save(folder, 1, {"params": noisy}, runs.checkpoint_meta(config, backbone))
    return folder


QUICKSTART = """
from hyper_t5.configs import quickstart

def get_config(arg=None):
    config = quickstart.get_config(arg)
    config.train.steps = config.train.log_every = config.train.save_every = 2
    config.data.tasks_per_batch = config.data.examples_per_task = 2
    config.mesh.data = 1
    config.adapter.lora_targets = ("enc_self.value", "dec_cross.query", "dec_mlp.wo")
    config.eval.max_rows_per_task = config.eval.batch = 2
    return config
"""


def quickstart_steps(folder: Path, patch: pytest.MonkeyPatch, seeds: Sequence[int] = (0,)) -> Any:
    """``hyper-t5 quickstart`` with two steps a stage and two rows a task; return its result."""
    file = folder.with_name(f"{folder.name}_config.py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(QUICKSTART)
    patch.setattr(quickstart, "CONFIG", str(file))
    return quickstart.main(folder, seeds)


def leaves(folder: Path, step: int) -> dict[str, Any]:
    """Read name -> shape, dtype and checksum of a checkpoint's leaves."""
    record = json.loads((folder / "checkpoints" / str(step) / "COMMITTED.json").read_text())
    return record["record"]["leaves"]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    """Compute path -> digest of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content, indent=1))


def register(mixture: str, data_config: ConfigDict, split: str, vocab: Vocabulary) -> str:
    """Register a dataset's split with SeqIO; return the Mixture's name."""
    from hyper_t5.tasks import seqio_tasks

    tasks = MIXTURES[mixture].load_rows(data_config, split, vocab)
    return seqio_tasks.register(tasks, data_config, split, vocab)
