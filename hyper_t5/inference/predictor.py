"""Predictor: from a task's text to an adapter, and from inputs with adapters to outputs.

    predictor = hyper_t5.load("runs/mtf")
    adapter = predictor.adapt("task.json")
    outputs = predictor.predict(["a b c", "d e"], adapter)

TensorFlow is not needed: this starts fast and runs where only JAX is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5 import export, runs
from hyper_t5 import model as model_lib
from hyper_t5.data.task_rows import TaskData, parse_task_file, read_task_file
from hyper_t5.data.templates import TEMPLATES, conditioning_rule, format_conditioning
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.export import native
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL
from hyper_t5.inference import engine
from hyper_t5.inference.generate import iterate_adapters
from hyper_t5.runs import Backbone, Run
from hyper_t5.t5 import T5Config
from hyper_t5.t5.decoding import Sampling
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.paths import expand

Tree = dict[str, Any]
PathLike = str | Path
Task = PathLike | Mapping[str, Any] | TaskData
OnLong = Literal["truncate", "refuse"]

INPUT_LENGTH = 512  # the longest input, in ids, of an adapter that records none


# ------------------------------------------------------------------------------- types


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Adapter of one task: a native adapter folder, in memory.

    Attributes:
      adapters: of one task, numpy arrays; empty where the conditioning precedes each input, or
        where adapters are generated from each input.
      meta: the record of the folder: backbone, system, instruction, lengths, and ``text``, the ids
        that precede each input.
      hypermodel: parameters that generate adapters from each input, or None.
      name: of the folder or task.
    """

    adapters: ad.Adapters
    meta: dict[str, Any]
    hypermodel: Tree | None = None
    name: str = ""

    def save(self, folder: PathLike) -> Path:
        """Write a native adapter folder; see `export.native.save`."""
        return native.save(folder, self.adapters, self.meta, self.hypermodel)


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How outputs are generated.

    Attributes:
      batch: the largest number of rows that decode at a time.
      max_decode_length: the largest number of tokens of an output.
      beam_size: 1 is greedy, or sampling with a temperature.
      sampling: temperature, top_k, top_p, seed; see `t5.decoding.Sampling`.
      max_input_length: the largest number of tokens of an input; 0 is the adapter's own.
      on_long: cut the end of a longer input, as in evaluation, or refuse it.
    """

    batch: int = 32
    max_decode_length: int = 128
    beam_size: int = 1
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    max_input_length: int = 0
    on_long: OnLong = "truncate"

    def __post_init__(self) -> None:
        for name in ("batch", "max_decode_length", "beam_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.on_long not in ("truncate", "refuse"):
            raise UserError(f"on_long is {self.on_long!r}; it is 'truncate' or 'refuse'")
        if self.beam_size > 1 and self.sampling.temperature:
            raise UserError("beam_size and temperature: a beam samples nothing; use one of them")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class PredictRow(NamedTuple):
    """One input: the number its output is returned under, its text and its adapter."""

    number: int
    text: str
    adapter: Adapter | None


@dataclasses.dataclass
class PredictStats:
    """Counts of `Predictor.predict_rows`, updated while it runs."""

    decode: engine.DecodeStats = dataclasses.field(default_factory=engine.DecodeStats)
    truncated: int = 0  # inputs that were too long


# ------------------------------------------------------------------------------- the predictor


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A backbone, and the run that generates adapters for it, if any."""

    backbone: Backbone
    run: Run | None = None

    def adapt(self, task: Task) -> Adapter:
        """Return the adapter of a task.

        Args:
          task: a task file or its content in either form (`data.task_rows`), a task that was read,
            or a native adapter folder, which is loaded.

        Raises:
          UserError: a task that is malformed or too long; a folder made for another backbone; a
            backbone without a run.
        """
        if isinstance(task, (str, Path)) and Path(task).is_dir():
            return self.load_adapter(task)
        return self.adapt_all([task])[0]

    def adapt_all(self, tasks: Sequence[Task], log: Callable[[str], None] = _log) -> list[Adapter]:
        """Return the adapters of many tasks, several per call of the hypermodel.

        Args:
          tasks: as `adapt` takes them, without folders.
          log: receives a line per task: how many examples the hypermodel reads; default: stderr.
        """
        run = self.run
        if run is None:
            raise UserError(
                f"{self.backbone.path}: is a backbone, and a hypermodel generates adapters: load "
                "the workdir of a run, or use a native adapter folder"
            )
        return list(_generate(run, [_condition(run, task, log) for task in tasks]))

    def load_adapter(self, folder: PathLike) -> Adapter:
        """Return a native adapter folder that was made for this backbone."""
        return _check_adapter(self.backbone, _read_adapter(folder), folder)

    def predict(
        self,
        inputs: Sequence[str],
        adapter: Adapter | Sequence[Adapter | None] | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> list[str]:
        """Return the output of every input, in order. Warns where inputs were truncated.

        Args:
          inputs: texts.
          adapter: of all inputs; or one for each, of any tasks, which share batches. None is the
            backbone alone.
          temperature: of sampling; 0 is greedy.
          top_k: as `t5.decoding.Sampling`.
          top_p: as `t5.decoding.Sampling`.
          seed: as `t5.decoding.Sampling`.
          **options: other fields of `GenerationConfig`.
        """
        if isinstance(inputs, str):
            raise UserError("inputs is one text; use a list of texts")
        single = adapter is None or isinstance(adapter, Adapter)
        adapters: Any = [adapter] * len(inputs) if single else adapter
        if len(adapters) != len(inputs):
            raise UserError(f"{len(inputs)} inputs and {len(adapters)} adapters; use one each")
        config = GenerationConfig(sampling=Sampling(temperature, top_k, top_p, seed), **options)
        stats = PredictStats()
        rows = [PredictRow(i, *x) for i, x in enumerate(zip(inputs, adapters, strict=True))]
        outputs = dict(self.predict_rows(rows, config, stats))
        if stats.truncated:
            warnings.warn(truncation_message(stats.truncated, len(rows)), stacklevel=2)
        return [outputs[i] for i in range(len(rows))]

    def predict_rows(
        self,
        rows: Sequence[PredictRow],
        config: GenerationConfig,
        stats: PredictStats | None = None,
        location: Callable[[int], str] = "input {}".format,
        many: bool = False,
    ) -> Iterator[tuple[int, str]]:
        """Yield (number, output) of every row, in the order in which they end.

        Args:
          rows: inputs with their adapters.
          config: how to generate.
          stats: updated while this runs.
          location: the name of a row in errors, by its number.
          many: these rows are some of many more, for which full batches are worth a compile.
        """
        stats = stats or PredictStats()
        ids = self.encode(rows, config, stats, location)
        for group in _group_by_spec(self.backbone, rows, ids, config.batch):
            tasks = config.batch if group.any_slot else len({row.task for row in group.rows})
            size = config.batch if many else len(group.rows)
            outputs = engine.decode_rows(
                self.backbone.sizes,
                self.backbone.params,
                group.rows,
                group.source,
                engine.choose_layout(tasks, size, config.batch),
                steps=config.max_decode_length,
                beam_size=config.beam_size,
                sampling=config.sampling,
                stats=stats.decode,
            )
            for number, output in outputs:
                yield number, self.backbone.vocab.decode(output.tolist())

    def encode(
        self,
        rows: Sequence[PredictRow],
        config: GenerationConfig,
        stats: PredictStats,
        location: Callable[[int], str] = "input {}".format,
    ) -> list[list[int]]:
        """Return the ids of each row: conditioning where it precedes the input, the input, EOS."""
        vocab = self.backbone.vocab
        metas = [{} if row.adapter is None else row.adapter.meta for row in rows]
        templates = [TEMPLATES[meta.get("encoding", "labelled")] for meta in metas]
        texts = [t.query(row.text) for t, row in zip(templates, rows, strict=True)]
        encoded = []
        for row, ids, meta, template in zip(
            rows, vocab.encode_batch(texts), metas, templates, strict=True
        ):
            longest = config.max_input_length or meta.get("input_length", INPUT_LENGTH)
            if len(ids) >= longest:
                if config.on_long == "refuse":
                    raise UserError(
                        f"{location(row.number)}: its input has {len(ids)} tokens and EOS, more "
                        f"than {longest}; shorten it, raise --max-input-length, or use --on-long "
                        "truncate"
                    )
                stats.truncated += 1
                ids = ids[: longest - 1]
            text = meta.get("text", [])
            prefix = [*text[:-1], *vocab.encode(template.label)] if len(text) > 1 else []
            encoded.append([*prefix, *ids, EOS_ID])
        return encoded


def truncation_message(truncated: int, rows: int) -> str:
    """Return the warning about inputs that were too long."""
    return (
        f"{truncated:,} of {rows:,} inputs were longer than the adapter's training inputs and were "
        "truncated; see max_input_length and on_long"
    )


# ------------------------------------------------------------------------------- loading


def load(path: PathLike, dtype: str = "float32", overrides: Sequence[str] = ()) -> Predictor:
    """Load a run, which can adapt too, or a backbone: native, T5X or Hugging Face.

    Args:
      path: the folder, or hf://ORGANIZATION/NAME.
      dtype: of a backbone's weights; a run records its own.
      overrides: of a run's config, such as "data.chunks=8" to adapt to many examples.
    """
    path = expand(str(path))
    if runs.is_run(path):
        run = runs.open(path, overrides)
        return Predictor(run.backbone, run)
    if overrides:
        raise UserError(f"{path}: a backbone has no config; remove {overrides[0]}")
    backbone = runs.load_backbone(path, dtype=dtype)
    return Predictor(
        dataclasses.replace(backbone, params=jax.tree.map(jnp.asarray, backbone.params))
    )


def load_with(backbone: PathLike, folders: Sequence[PathLike]) -> tuple[Predictor, list[Adapter]]:
    """Load a backbone, in the dtype its adapters were made for, and native adapter folders."""
    adapters = [_read_adapter(folder) for folder in folders]
    dtype = adapters[0].meta.get("backbone", {}).get("dtype", "float32") if adapters else "float32"
    predictor = load(runs.backbone_folder(backbone), dtype)
    pairs = zip(adapters, folders, strict=True)
    return predictor, [_check_adapter(predictor.backbone, *pair) for pair in pairs]


def _read_adapter(folder: PathLike) -> Adapter:
    return Adapter(*native.load(folder), Path(folder).resolve().name)


def _check_adapter(backbone: Backbone, adapter: Adapter, folder: PathLike) -> Adapter:
    """Return the adapter if it was made for this backbone and its folder is consistent."""
    path = str(folder)
    backbone.check_matches(adapter.meta.get("backbone", {}), path)
    ad.check(adapter.adapters, backbone.sizes, path)
    _check_meta(adapter.meta, backbone.sizes, path)
    if adapter.hypermodel is not None:
        shapes = model_lib.hypermodel_shapes(_input_conditioned_model(adapter, backbone.sizes))
        runs.check_hypermodel(adapter.hypermodel, shapes, path)
    return adapter


def _check_meta(meta: Mapping[str, Any], sizes: T5Config, path: str) -> None:
    """Raise UserError where a folder's record has an invalid value."""

    def is_count(value: Any, least: int) -> bool:
        return type(value) is int and value >= least

    text = meta.get("text", [])
    valid = {
        "encoding": meta.get("encoding", "labelled") in tuple(TEMPLATES),
        "input_length": is_count(meta.get("input_length", INPUT_LENGTH), 1),
        "task_number": is_count(meta.get("task_number", 0), 0),
        "text": isinstance(text, list)
        and all(is_count(i, 0) and i < sizes.vocab_size for i in text),
    }
    if invalid := [field for field, is_valid in valid.items() if not is_valid]:
        raise UserError(
            f"{path}/{native.SPEC_FILE}: meta.{invalid[0]} is {str(meta[invalid[0]])[:40]!r}, "
            "which is invalid; generate the adapter again"
        )


def _input_conditioned_model(adapter: Adapter, sizes: T5Config) -> model_lib.Model:
    """Return the model that generates adapters of each input with ``adapter.hypermodel``."""
    config = config_lib.from_adapter(adapter.meta.get("config"), adapter.name)
    return model_lib.build_model(config, sizes)


# ------------------------------------------------------------------------------- adapt


class _Conditioning(NamedTuple):
    """A task as the hypermodel reads it: ids [L], its number, and the record of its adapter."""

    name: str
    ids: np.ndarray
    task_number: int
    meta: dict[str, Any]


def _condition(run: Run, task: Task, log: Callable[[str], None]) -> _Conditioning:
    """Encode a task by the rule of training: the instruction, and as many examples as fit."""
    c = run.config.data
    if isinstance(task, TaskData):
        name = location = task.name
        instruction, examples = task.instruction, list(task.examples)
    elif isinstance(task, Mapping):
        name, location = str(task.get("name", "task")), "the task"
        instruction, examples = parse_task_file(task, name, location)
    else:
        name, location = Path(task).stem, str(task)
        instruction, examples = read_task_file(task)
    system = run.model.system
    rule = conditioning_rule(c, system.layout)
    shown = examples[: rule.most * c.chunks]
    text = instruction if rule.instruction else ""
    ids, dropped, _ = format_conditioning(
        text, shown, run.backbone.vocab, c, location, system.layout
    )
    counts = f"{len(shown) - dropped} of {len(examples)} examples shown, {dropped} dropped (length)"
    log(f"{name}: {counts}")
    meta = {
        "backbone": run.backbone.meta,
        "system": run.config.system,
        "instruction": instruction,
        "examples_shown": len(shown) - dropped,
        "input_length": c.input_length,
        "encoding": c.template,
    }
    number = model_lib.task_number(run.model, name, run.tasks)
    if system.layout.in_inputs:
        meta["text"] = [int(i) for i in ids]
    if system.conditioned_on == "input":
        meta |= {"config": run.config.to_dict(), "task_number": number}
    return _Conditioning(name, ids, number, meta)


def _generate(run: Run, conditionings: Sequence[_Conditioning]) -> Iterator[Adapter]:
    if not run.model.emits_per_task:
        hypermodel = None
        if run.model.system.conditioned_on == "input":
            hypermodel = jax.device_get(run.params[HYPERMODEL])
        for c in conditionings:
            empty = ad.Adapters({}, ad.AdapterSpec())
            yield Adapter(empty, c.meta, hypermodel, c.name)
        return
    length = run.model.system.layout.hyper_length(run.config.data)
    ids = np.zeros((len(conditionings), length), np.int32)
    for i, c in enumerate(conditionings):
        ids[i, : len(c.ids)] = c.ids
    numbers = [c.task_number for c in conditionings]
    generated = iterate_adapters(run.model, run.params, list(ids), numbers)
    for c, adapters in zip(conditionings, generated, strict=True):
        yield Adapter(adapters, c.meta, None, c.name)


def adapt(
    run: Run,
    task: PathLike,
    out: PathLike,
    format: str = "native",
    base_model: str = "",
    dtype: str = "",
) -> Path:
    """Generate the adapter of a task file and write it as a folder; return the folder.

    Args:
      run: an open run.
      task: a task file.
      out: the folder to write.
      format: 'native' or 'peft'.
      base_model: with 'peft', the name or path of the base model.
      dtype: as `export.export`.
    """
    lines: list[str] = []
    [adapter] = Predictor(run.backbone, run).adapt_all([task], log=lines.append)
    folder = _save_adapter(run, adapter, out, format, base_model, dtype)
    _log(lines[0])  # after an error could have been the only line
    return folder


def _save_adapter(
    run: Run, adapter: Adapter, out: PathLike, format: str, base_model: str, dtype: str
) -> Path:
    if format == "peft":
        export.check_no_text(adapter.meta, f"system={run.config.system}")
        sizes, path = run.model.sizes, run.backbone.path
        return export.save_peft(out, adapter.adapters, sizes, adapter.meta, path, base_model, dtype)
    adapters = ad.astype(adapter.adapters, dtype) if dtype else adapter.adapters
    return native.save(out, adapters, adapter.meta, adapter.hypermodel)


# ------------------------------------------------------------------------------- batches


class _Group(NamedTuple):
    """Rows that can share a batch.

    Attributes:
      rows: their tasks number the adapters of ``source``.
      source: where their adapters come from.
      any_slot: a row may take any slot of a batch, so that each has adapters of its own.
    """

    rows: list[engine.DecodeRow]
    source: engine.Source
    any_slot: bool


def _group_by_spec(
    backbone: Backbone, rows: Sequence[PredictRow], ids: Sequence[list[int]], batch: int
) -> Iterator[_Group]:
    """Group rows of one AdapterSpec, or of one folder that generates adapters of each input."""
    # Adapters this light may be copied for every row.
    light = model_lib.count_parameters(backbone.params) / (4 * batch)
    groups: dict[Any, list[tuple[PredictRow, list[int]]]] = {}
    for row, row_ids in zip(rows, ids, strict=True):
        groups.setdefault(_batch_key(row.adapter), []).append((row, row_ids))
    for members in groups.values():
        first = members[0][0].adapter
        tasks, any_slot = [0] * len(members), False
        if first is not None and first.hypermodel is not None:
            tasks, any_slot = list(range(len(members))), True
            source = _input_conditioned_source(backbone, first)
        elif first is None or not first.adapters.tree:
            source = _no_adapters
        else:
            adapters = {id(row.adapter): row.adapter.adapters for row, _ in members if row.adapter}
            keys = {key: i for i, key in enumerate(adapters)}
            tasks = [keys[id(row.adapter)] for row, _ in members]
            source = _stacked_source(list(adapters.values()))
            is_light = model_lib.count_parameters(first.adapters.tree) <= light
            any_slot = len(adapters) > 1 and is_light
        decode_rows = [
            engine.DecodeRow(row.number, task, row_ids)
            for task, (row, row_ids) in zip(tasks, members, strict=True)
        ]
        yield _Group(decode_rows, source, any_slot)


def _batch_key(adapter: Adapter | None) -> Any:
    """Return a key that is equal for adapters that can share a batch."""
    if adapter is not None and adapter.hypermodel is not None:
        return id(adapter)
    if adapter is None or not adapter.adapters.tree:
        return None
    leaves, structure = jax.tree.flatten(adapter.adapters)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _no_adapters(ids: jax.Array, tasks: tuple[int, ...]) -> tuple[None, jax.Array]:
    return None, ids


def _stacked_source(adapters: Sequence[ad.Adapters]) -> engine.Source:
    """Return a source of stacked task adapters; the last stacks are cached, often the next too."""

    @functools.lru_cache(maxsize=2)
    def stack(tasks: tuple[int, ...]) -> ad.Adapters:
        trees = [adapters[task].tree for task in tasks]
        tree = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *trees)
        return ad.Adapters(jax.device_put(tree), adapters[0].spec)

    return lambda ids, tasks: (stack(tasks), ids)


def _input_conditioned_source(backbone: Backbone, adapter: Adapter) -> engine.Source:
    """Return a source that generates adapters from each input, which also encodes it."""
    m = _input_conditioned_model(adapter, backbone.sizes)
    params = {BACKBONE: backbone.params, HYPERMODEL: jax.device_put(adapter.hypermodel)}

    def generate(ids: jax.Array, tasks: tuple[int, ...]) -> tuple[ad.Adapters | None, jax.Array]:
        numbers = jnp.full(len(ids), adapter.meta["task_number"], jnp.int32)
        return model_lib.generate_adapters(m, params, ids, numbers), ids[:, :0]

    return generate
