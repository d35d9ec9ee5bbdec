"""Use: a task's text to an adapter, and adapters to outputs.

    model = hyper_t5.load("runs/mtf")
    adapter = model.adapt("task.json")
    outputs = model.predict(["a b c", "d e"], adapter)

No TensorFlow here: this starts fast and runs where only JAX is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5 import engine, export, files, model, weights, workdir
from hyper_t5.decoding import Sampling
from hyper_t5.errors import UserError
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL
from hyper_t5.prompts import ENCODINGS, format_conditioning, show_rule
from hyper_t5.t5 import T5Config
from hyper_t5.taskfile import TaskRows, parse_task_file, read_task_file
from hyper_t5.tensors import as_bytes
from hyper_t5.vocab import EOS_ID, Vocabulary, load_vocab

Tree = dict[str, Any]
PathLike = str | Path
OnLong = Literal["truncate", "refuse"]

INPUT_LENGTH = 512  # most ids of an input where no adapter says what it was trained with
TASKS_PER_CALL = 8  # of the hypermodel
CACHE_FORMAT = 1  # raise it where the same task and weights make another adapter than before


# ------------------------------------------------------------------------------- what one holds


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What makes a backbone do one task: a native adapter folder, in memory.

    Attributes:
      adapters: of one task, numpy arrays; empty where the task's text goes in front of each input,
        or where adapters are made of each input.
      meta: what the folder says of itself: backbone, system, instruction, lengths, ``text``.
      hypermodel: what makes adapters of each input, or None.
      name: the folder's or task's.
    """

    adapters: ad.Adapters
    meta: dict[str, Any]
    hypermodel: Tree | None = None
    name: str = ""

    def save(self, folder: PathLike) -> Path:
        """Write it as a native folder; see ``adapters.save``."""
        return ad.save(folder, self.adapters, self.meta, self.hypermodel)


@dataclasses.dataclass(frozen=True)
class Options:
    """How outputs are made.

    Attributes:
      batch: most rows that decode at a time.
      max_decode_length: most tokens in an output.
      beam_size: 1 is greedy, or sampling with a temperature.
      sampling: temperature, top_k, top_p, seed; see ``decoding.Sampling``.
      max_input_length: most tokens of an input; 0 is what the adapter was trained with.
      on_long: what becomes of a longer one: its end is cut, as in evaluation, or it is an error.
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
            raise UserError("beam_size and temperature: a beam draws nothing; give one of them")


@dataclasses.dataclass
class Report:
    """What ``Model.answers`` did; it is counted while it runs."""

    work: engine.Work = dataclasses.field(default_factory=engine.Work)
    cut: int = 0  # inputs that were too long


@dataclasses.dataclass(frozen=True)
class Run:
    """What of a run makes adapters."""

    folder: PathLike
    config: ConfigDict
    model: model.Model
    params: Tree
    tasks: Sequence[str]  # that it was trained on


@dataclasses.dataclass(frozen=True)
class Model:
    """A backbone as its folder has it, and the run that it was loaded from, if any."""

    sizes: T5Config
    params: Tree
    vocab: Vocabulary | None
    identity: dict[str, Any] | None  # of the vocabulary
    where: str
    run: Run | None = None

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """What adapters keep of the backbone; once, for its digest is of all weights."""
        return weights.backbone_meta(self.sizes, self.identity, self.params)

    def adapt(self, task: PathLike | Mapping[str, Any] | TaskRows) -> Adapter:
        """The adapter of a task: a file or its content in either form (see ``taskfile``), a task
        that was read, or a native adapter folder, which is loaded.

        Raises:
          UserError: a task that is malformed or too long; a folder made for another backbone; a
            model without a hypermodel.
        """
        if isinstance(task, (str, Path)) and Path(task).is_dir():
            return self.load_adapter(task)
        return self.adapt_all([task])[0]

    def adapt_all(
        self, tasks: Sequence[PathLike | Mapping[str, Any] | TaskRows], cache: PathLike = ""
    ) -> list[Adapter]:
        """The adapters of many tasks, several to a call of the hypermodel.

        ``cache``: a folder in which each is kept, under a digest of all that it is made of, and
        found again.
        """
        return _adapt_all(self, tasks, Path(cache) if cache else None)

    def load_adapter(self, folder: PathLike) -> Adapter:
        """A native folder, if it was made for this backbone."""
        return _checked(self, ad.load(folder), folder)

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
        """The output of every input, in their order.

        Args:
          inputs: texts.
          adapter: of all inputs; or one each, of any tasks: they share batches. None is the
            backbone as it is.
          temperature, top_k, top_p, seed: see ``decoding.Sampling``; greedy without.
          options: fields of ``Options``.

        Warns where inputs were cut.
        """
        if isinstance(inputs, str):
            raise UserError("inputs is one text; give a list of texts")
        adapters: list[Adapter | None]
        if adapter is None or isinstance(adapter, Adapter):
            adapters = [adapter] * len(inputs)
        else:
            adapters = list(adapter)
        if len(adapters) != len(inputs):
            raise UserError(f"{len(inputs)} inputs and {len(adapters)} adapters; give one each")
        given = Options(sampling=Sampling(temperature, top_k, top_p, seed), **options)
        report = Report()
        rows = [(i, *pair) for i, pair in enumerate(zip(inputs, adapters, strict=True))]
        made = dict(self.answers(rows, given, report))
        if report.cut:
            warnings.warn(cut_message(report.cut, len(rows)), stacklevel=2)
        return [made[i] for i in range(len(rows))]

    def answers(
        self,
        rows: Sequence[tuple[int, str, Adapter | None]],
        options: Options,
        report: Report | None = None,
        where: Callable[[int], str] = "input {}".format,
        many: bool = False,
    ) -> Iterator[tuple[int, str]]:
        """(number, output) of every (number, input, adapter), as they are done.

        ``where``: what errors call a row, by its number. ``many``: these are some of many more, for
        which whole batches are worth a compile.
        """
        report = report or Report()
        if (vocab := self.vocab) is None:
            raise UserError(
                f"{self.where}: does not say its vocabulary; give what `hyper-t5 convert --to "
                "native --vocab spiece.model` makes of it"
            )
        encoded = self.encode(rows, options, report, where)
        for part, source, apart in _parts(self, encoded, options.batch):
            tasks = options.batch if apart else len({row.task for row in part})
            size = options.batch if many else len(part)
            found = engine.decode_rows(
                self.sizes,
                self.params,
                part,
                source,
                engine.layout(tasks, size, options.batch),
                steps=options.max_decode_length,
                beam_size=options.beam_size,
                sampling=options.sampling,
                work=report.work,
            )
            for number, ids in found:
                yield number, vocab.decode(ids.tolist())

    def encode(
        self,
        rows: Sequence[tuple[int, str, Adapter | None]],
        options: Options,
        report: Report,
        where: Callable[[int], str] = "input {}".format,
    ) -> list[tuple[int, list[int], Adapter | None]]:
        """The rows with ids for texts: the task's text where it goes in front, the input, EOS."""
        assert self.vocab is not None
        metas = [{} if adapter is None else adapter.meta for _, _, adapter in rows]
        encodings = [ENCODINGS[meta.get("encoding", "labelled")] for meta in metas]
        asked = [e.asked(text) for e, (_, text, _) in zip(encodings, rows, strict=True)]
        made = []
        for (number, _, adapter), ids, meta, encoding in zip(
            rows, self.vocab.encode_batch(asked), metas, encodings, strict=True
        ):
            most = options.max_input_length or meta.get("input_length", INPUT_LENGTH)
            if len(ids) >= most:
                if options.on_long == "refuse":
                    raise UserError(
                        f"{where(number)}: its input is {len(ids)} tokens and EOS, and {most} is "
                        "the most; shorten it, raise --max-input-length, or take --on-long truncate"
                    )
                report.cut += 1
                ids = ids[: most - 1]
            text = meta.get("text", [])
            front = [*text[:-1], *self.vocab.encode(encoding.label)] if len(text) > 1 else []
            made.append((number, [*front, *ids, EOS_ID], adapter))
        return made


def cut_message(cut: int, rows: int) -> str:
    """What is told of inputs that were too long."""
    return (
        f"{cut:,} of {rows:,} inputs were longer than what the adapter was trained with: their "
        "ends were cut; see max_input_length and on_long"
    )


# ------------------------------------------------------------------------------------------- load


def load(path: PathLike, dtype: str = "float32") -> Model:
    """A run's folder, which can adapt too, or a backbone's: native, T5X or Hugging Face.

    ``dtype``: of a backbone's weights; a run says its own.
    """
    folder = files.as_path(path)
    if files.is_local(folder) and not folder.exists():
        raise UserError(f"{path}: does not exist; give a run's folder, or a backbone's")
    if _is_run(folder):
        return load_run(path)
    there = model.backbone_folder(path)
    sizes, params, identity = weights.load_backbone(there, dtype=dtype)
    plain = T5Config()  # how to compute is no business of the folder's
    sizes = dataclasses.replace(sizes, dtype=plain.dtype, remat=plain.remat)
    vocab = load_vocab(identity, there) if identity else None
    params = jax.tree.map(jnp.asarray, params)
    return Model(sizes, params, vocab, identity, str(path))


def load_run(path: PathLike) -> Model:
    """A run's backbone, and what it trained to make adapters for it."""
    config, m, backbone, params = model.load_run(path)
    run = Run(path, config, m, params, model.tasks_of(path))
    identity = backbone.vocab.identity()
    return Model(backbone.sizes, params[BACKBONE], backbone.vocab, identity, str(path), run)


def _is_run(folder: Any) -> bool:
    """Whether a folder is a run's: its config says a system. A backbone's says sizes."""
    file = folder / workdir.CONFIG_FILE
    return file.exists() and "system" in files.read_json(file)


def load_with(backbone: PathLike, adapters: Sequence[PathLike]) -> tuple[Model, list[Adapter]]:
    """A backbone, stored as it was when the adapters were made for it, and the adapters."""
    found = [ad.load(folder) for folder in adapters]
    dtype = found[0][1].get("backbone", {}).get("dtype", "float32") if found else "float32"
    loaded = load(model.backbone_folder(backbone), dtype)
    return loaded, [_checked(loaded, x, folder) for x, folder in zip(found, adapters, strict=True)]


def _checked(
    base: Model, found: tuple[ad.Adapters, Tree, Tree | None], folder: PathLike
) -> Adapter:
    """What a native folder holds, if it was made for this backbone."""
    made, where = Adapter(*found, Path(folder).name), str(folder)
    weights.check_compatible(
        base.sizes,
        base.identity,
        made.meta.get("backbone", {}),
        digest=base.meta["digest"],
        where=where,
    )
    ad.check(made.adapters, base.sizes, where)
    _check_meta(made, base.sizes, where)
    if made.hypermodel is not None:
        wanted = model.shapes_of_hypermodel(_model_of(made, base.sizes))
        model.check_hypermodel(made.hypermodel, wanted, where)
    return made


def _check_meta(adapter: Adapter, sizes: T5Config, where: str) -> None:
    """UserError where what a folder says of the use of its adapter cannot be."""
    meta = adapter.meta
    text, length = meta.get("text", []), meta.get("input_length", INPUT_LENGTH)
    number = meta.get("task_number", 0)
    fits = {
        "encoding": meta.get("encoding", "labelled") in tuple(ENCODINGS),
        "input_length": type(length) is int and length > 0,
        "task_number": type(number) is int and number >= 0,
        "text": isinstance(text, list)
        and all(type(i) is int and 0 <= i < sizes.vocab_size for i in text),
    }
    if wrong := [field for field, good in fits.items() if not good]:
        raise UserError(
            f"{where}/{ad.SPEC_FILE}: meta.{wrong[0]} is {str(meta[wrong[0]])[:40]!r}, which "
            "cannot be; make the adapter again"
        )


def _model_of(adapter: Adapter, sizes: T5Config) -> model.Model:
    """What makes adapters of each input with ``adapter.hypermodel``."""
    config = config_lib.from_json(json.dumps(adapter.meta.get("config")), adapter.name)
    return model.build(config, sizes)


# ------------------------------------------------------------------------------------------ adapt


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A task as the hypermodel reads it: ids [L], its number, and the meta of what it makes."""

    name: str
    ids: np.ndarray
    number: int
    meta: dict[str, Any]


def _adapt_all(base: Model, tasks: Sequence[Any], cache: Path | None) -> list[Adapter]:
    if (run := base.run) is None:
        raise UserError(
            f"{base.where}: is a backbone, and a hypermodel makes adapters: load the folder of a "
            "run, or give a native adapter folder"
        )
    shown = [_show(base, run, task) for task in tasks]
    places: list[Path | None] = [None] * len(shown)
    made: list[Adapter | None] = [None] * len(shown)
    if cache is not None and run.model.hypermodel and run.model.choice.reads == "task":
        key = _run_digest(base, run)
        places = [cache / _digest([key, one.ids.tolist(), one.number])[:32] for one in shown]
        made = [_cached(base, *pair) for pair in zip(shown, places, strict=True)]
    missing = [i for i, adapter in enumerate(made) if adapter is None]
    for first in range(0, len(missing), TASKS_PER_CALL):
        now = missing[first : first + TASKS_PER_CALL]
        for i, adapter in zip(now, _generate(run, [shown[i] for i in now]), strict=True):
            made[i] = adapter
            if (place := places[i]) is not None:
                try:
                    adapter.save(place)
                except UserError as error:  # what was made is good without it
                    print(f"adapt: not kept: {error}", flush=True)
    return [adapter for adapter in made if adapter is not None]


def _show(base: Model, run: Run, task: Any) -> _Shown:
    """By the rule of training (``prompts.show_rule``): the instruction, and as many examples as fit
    its length.
    """
    c, name, where = run.config.data, "task", "the task"
    if isinstance(task, TaskRows):
        name = where = task.name
        instruction, examples = task.instruction, list(task.examples)
    elif isinstance(task, Mapping):
        name = str(task.get("name", name))
        instruction, examples = parse_task_file(task, name, where)
    else:
        name, where = Path(task).stem, str(task)
        instruction, examples = read_task_file(task)
    layout = run.model.choice.layout
    rule = show_rule(c, layout == "concat")
    shown = examples[: rule.most]
    asked = instruction if rule.instruction else ""
    assert base.vocab is not None
    ids, dropped, _ = format_conditioning(asked, shown, base.vocab, c, where=where, layout=layout)
    meta = {
        "backbone": base.meta,
        "system": run.config.system,
        "instruction": instruction,
        "examples_shown": len(shown) - dropped,
        "input_length": c.input_length,
        "encoding": c.encoding,
    }
    number = model.task_number(run.model, name, run.tasks)
    if layout == "concat":  # this text goes in front of each input
        meta["text"] = [int(i) for i in ids]
    if run.model.choice.reads == "input":
        meta |= {"config": run.config.to_dict(), "task_number": number}
    return _Shown(name, ids, number, meta)


def _generate(run: Run, shown: Sequence[_Shown]) -> list[Adapter]:
    """The adapters of a few tasks by one call, of one of a few shapes."""
    none = ad.Adapters({}, ad.AdapterSpec())
    if run.model.choice.reads == "input":
        hyper = jax.device_get(run.params[HYPERMODEL])
        return [Adapter(none, one.meta, hyper, one.name) for one in shown]
    if run.model.hypermodel is None:
        return [Adapter(none, one.meta, None, one.name) for one in shown]
    calls = 1 << (len(shown) - 1).bit_length()
    ids = np.zeros((calls, run.config.data.hyper_length), np.int32)
    numbers = np.zeros(calls, np.int32)
    for i, one in enumerate([*shown, *[shown[0]] * (calls - len(shown))]):
        ids[i, : len(one.ids)], numbers[i] = one.ids, one.number
    made = model.generate(run.model, run.params, jnp.asarray(ids), jnp.asarray(numbers))
    assert made is not None
    tree = jax.device_get(made.tree)
    return [
        Adapter(
            ad.Adapters(jax.tree.map(lambda x, i=i: x[:, i : i + 1], tree), made.spec),
            one.meta,
            None,
            one.name,
        )
        for i, one in enumerate(shown)
    ]


def _run_digest(base: Model, run: Run) -> str:
    """Of all that adapters are made of beside the task: weights, sizes, kinds, words."""
    config = run.config.to_dict()
    parts = {k: config[k] for k in ("system", "adapter", "hypermodel")}
    parts |= {"own": config.get(run.config.system), "dtype": run.model.sizes.dtype}
    made = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.params.get(HYPERMODEL, {})):
        made.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n".encode())
        made.update(as_bytes(np.asarray(leaf)).data)
    return _digest([CACHE_FORMAT, parts, base.meta, made.hexdigest()])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _cached(base: Model, shown: _Shown, place: Path | None) -> Adapter | None:
    """What was made of the task before; None where it was not, or what is there is damaged."""
    if place is None or not place.exists():
        return None
    try:
        found = base.load_adapter(place)
    except UserError as error:
        print(f"adapt: {error}; made again", flush=True)
        return None
    # The name and the text are not in the digest where they are not in what is read.
    return dataclasses.replace(found, name=shown.name, meta=shown.meta)


def adapt(
    workdir: PathLike,
    task: PathLike,
    out: PathLike,
    format: str = "native",
    base_model: str = "",
    dtype: str = "",
) -> Path:
    """Read a task file, generate its adapter, write it as a ``native`` or ``peft`` folder.

    ``dtype`` as of ``export.export``. Returns the folder.
    """
    base = load_run(workdir)
    assert base.run is not None
    made = base.adapt_all([task])[0]
    if format == "peft":
        export.refuse_text(made.meta, f"system={base.run.config.system}")
        name, asked = base_model or base.run.config.backbone.path, export.asked(made.meta)
        kind = dtype or "float32"
        return export.export_peft(out, made.adapters, base.sizes, name, 0, kind, asked)
    adapters = ad.astype(made.adapters, dtype) if dtype else made.adapters
    return ad.save(out, adapters, made.meta, made.hypermodel)


# ---------------------------------------------------------------------------------------- predict


def _parts(
    base: Model, rows: Iterable[tuple[int, list[int], Adapter | None]], batch: int
) -> Iterator[tuple[list[engine.Row], engine.Source, bool]]:
    """Rows that can share a batch, where their adapters come from, and whether each has its own.

    Rows of one AdapterSpec; or of one folder that makes adapters of each input.
    """
    light = model.count(base.params) / (4 * batch)  # an adapter that may be there for every row
    parts: dict[Any, list[tuple[int, list[int], Adapter | None]]] = {}
    for row in rows:
        parts.setdefault(_kind(row[2]), []).append(row)
    for members in parts.values():
        first = members[0][2]
        if first is None or not first.adapters.tree:
            if first is not None and first.hypermodel is not None:
                made = [engine.Row(number, i, ids) for i, (number, ids, _) in enumerate(members)]
                yield made, _of_inputs(base, first), True
            else:
                yield [engine.Row(number, 0, ids) for number, ids, _ in members], _nothing, False
            continue
        tasks: dict[int, int] = {}
        adapters: list[ad.Adapters] = []
        part = []
        for number, ids, adapter in members:
            assert adapter is not None
            if id(adapter) not in tasks:
                tasks[id(adapter)] = len(adapters)
                adapters.append(adapter.adapters)
            part.append(engine.Row(number, tasks[id(adapter)], ids))
        apart = len(adapters) > 1 and model.count(adapters[0].tree) <= light
        yield part, _stacked(adapters), apart


def _kind(adapter: Adapter | None) -> Any:
    """Equal for what can be in one batch."""
    if adapter is not None and adapter.hypermodel is not None:
        return id(adapter)
    if adapter is None or not adapter.adapters.tree:
        return None
    leaves, structure = jax.tree.flatten(adapter.adapters)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _nothing(ids: jax.Array, tasks: tuple[int, ...]) -> tuple[None, jax.Array]:
    """The backbone as it is."""
    return None, ids


def _stacked(many: Sequence[ad.Adapters]) -> engine.Source:
    """Of tasks that have theirs; what was put together last is kept, for it is often the next."""

    @functools.lru_cache(maxsize=2)
    def stack(tasks: tuple[int, ...]) -> ad.Adapters:
        trees = [many[task].tree for task in tasks]
        tree = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *trees)
        return ad.Adapters(jax.device_put(tree), many[0].spec)

    return lambda ids, tasks: (stack(tasks), ids)


def _of_inputs(base: Model, adapter: Adapter) -> engine.Source:
    """Made of each input, which is then encoded."""
    m = _model_of(adapter, base.sizes)
    params = {BACKBONE: base.params, HYPERMODEL: jax.device_put(adapter.hypermodel)}

    def make(ids: jax.Array, tasks: tuple[int, ...]) -> tuple[ad.Adapters | None, jax.Array]:
        numbers = jnp.full(len(ids), adapter.meta["task_number"], jnp.int32)
        return model.generate(m, params, ids, numbers), ids[:, :0]

    return make
