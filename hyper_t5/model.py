"""A backbone, a system, and their parameters put together: what every stage and tool runs.

One direction: conditioning ids -> hypermodel -> adapters -> T5. Shapes: T tasks, G examples a task,
Lh, Li, Lt lengths, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import checkpoint, files, hypermodels, names, sharding, t5, weights, workdir
from hyper_t5.adapters import Adapters
from hyper_t5.config import t5_config
from hyper_t5.decoding import decode
from hyper_t5.errors import UserError
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL, SYSTEMS, System
from hyper_t5.overrides import read_overrides
from hyper_t5.sharding import Placement
from hyper_t5.vocab import Vocabulary, load_vocab

Array = jax.Array
Tree = dict[str, Any]

BACKBONE_FOLDER = "backbone"  # in the workdir of a run that trained one


@dataclasses.dataclass(frozen=True)
class Model:
    """Static parts only, so that it can be a static argument of jit.

    Parameters are passed along: ``{"backbone": ..., "hypermodel": ...}``, the latter where the
    system has any of its own. ``placement``: how they lie on a mesh; None: on one device.
    """

    sizes: t5.T5Config
    system: str
    hypermodel: nn.Module | None
    placement: Placement | None = None

    @property
    def choice(self) -> System:
        """What the registry says of the system."""
        return SYSTEMS[self.system]

    @property
    def task_slots(self) -> int:
        """For how many tasks, by number, it has adapters of their own; 0 where by none."""
        return getattr(self.hypermodel, "task_slots", 0)

    def adapters(
        self, params: Tree, ids: Array, tasks: Array, rng: Array | None = None
    ) -> Adapters | None:
        """ids [T, L] and numbers [T] of tasks -> adapters of T tasks; None if none are emitted."""
        if self.hypermodel is None:
            return None
        made = self.hypermodel.apply(
            {"params": {**params.get(HYPERMODEL, {}), BACKBONE: params[BACKBONE]}},
            ids,
            tasks,
            rng is None,
            rngs=None if rng is None else {"dropout": rng},
        )
        return self.placement.adapters(made) if self.placement else made

    def logits(self, params: Tree, batch: Tree, rng: Array | None = None) -> Array:
        """Teacher-forced float32 logits [T*G, Lt, V]; see ``forward``."""
        return self.forward(params, batch, rng)[0]

    def forward(
        self, params: Tree, batch: Tree, rng: Array | None = None
    ) -> tuple[Array, Adapters | None]:
        """(teacher-forced float32 logits [T*G, Lt, V], the adapters that were emitted for them).

        The hypermodel runs once a task. ``batch`` is as ``episodes.EpisodeSampler`` makes it,
        packed or not.

        Where it reads the inputs it runs once a row, and leaves the backbone nothing to encode.
        """
        keys = (None, None) if rng is None else jax.random.split(rng)
        of_rows = batch.keys() - {"hyper_inputs", "tasks"}
        rows = {k: batch[k].reshape(-1, batch[k].shape[-1]) for k in of_rows}
        ids, tasks = batch["hyper_inputs"], batch["tasks"]
        if self.choice.reads == "input":
            ids, tasks = rows["inputs"], jnp.repeat(tasks, len(rows["inputs"]) // len(tasks))
            rows["inputs"] = ids[:, :0]
        emitted = self.adapters(params, ids, tasks, keys[0])
        logits = t5.T5(self.sizes).apply(
            {"params": params[BACKBONE]},
            rows.pop("inputs"),
            rows.pop("targets"),
            emitted,
            **rows,  # segments and positions of packed ones
            deterministic=rng is None,
            rngs=None if rng is None else {"dropout": keys[1]},
        )
        return logits, emitted


@functools.lru_cache(maxsize=8)
def logical_axes(m: Model) -> Tree:
    """{branch: tree} of the logical axis names of every parameter, `layers` first where stacked.

    Traced once a model; as `shapes_of`, not to be changed.

    Raises:
        TypeError: a parameter without names.
    """
    axes: Tree = {BACKBONE: t5.logical_axes(m.sizes)}
    if m.hypermodel is not None:
        axes[HYPERMODEL] = hypermodels.logical_axes(m.hypermodel)
    return axes


@functools.lru_cache(maxsize=8)
def shapes_of(m: Model, dtype: str = "float32") -> Tree:
    """{branch: tree} of the shapes that parameters have; ``dtype`` is that of a frozen backbone."""
    shapes: Tree = {BACKBONE: jax.eval_shape(lambda: t5.init_params(m.sizes, jax.random.key(0)))}
    if BACKBONE not in m.choice.trains:
        shapes[BACKBONE] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes[BACKBONE]
        )
    if m.hypermodel is not None:
        shapes[HYPERMODEL] = shapes_of_hypermodel(m)
    return shapes


@functools.partial(jax.jit, static_argnames="model")
def generate(model: Model, params: Tree, ids: Array, tasks: Array) -> Adapters | None:
    """Adapters of ids [T, L] and task numbers [T], compiled once a shape."""
    return model.adapters(params, ids, tasks)


def respond(
    model: Model,
    params: Tree,
    adapters: Adapters | None,
    rows: Array,
    tasks: Array,
    **how: Any,
) -> Array:
    """Generated ids [B, S] of rows [B, Li], with ``how`` as ``decoding.decode`` takes it.

    ``adapters`` are those of the rows' tasks; a system that reads the inputs makes its own, once,
    for all steps.
    """
    adapters, rows = read_rows(model, params, adapters, rows, tasks)
    return decode(model.sizes, params[BACKBONE], rows, adapters, **how)[0]


def read_rows(
    model: Model, params: Tree, adapters: Adapters | None, rows: Array, tasks: Array
) -> tuple[Adapters | None, Array]:
    """(adapters, what the backbone is to encode) of rows [B, Li] of the tasks [B].

    A system that reads the inputs makes the rows' own adapters, and leaves nothing to encode.
    """
    if model.choice.reads != "input":
        return adapters, rows
    return generate(model, params, rows, tasks), rows[:, :0]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone as loaded from ``backbone.path``."""

    sizes: t5.T5Config
    params: Tree
    vocab: Vocabulary
    known_digest: str = ""  # of params, where they came with it

    @property
    def digest(self) -> str:
        """``names.digest`` of the parameters."""
        return self.known_digest or names.digest(self.params)


def load_backbone(
    path: str | Path,
    config: ConfigDict,
    dtype: str = "float32",
    placement: Placement | None = None,
) -> Backbone:
    """Read ``path`` (native, T5X or Hugging Face folder, or the workdir of a run that trained it).

    The folder decides sizes and, where it has one, vocabulary; ``config.model`` only how to compute
    (dtype, remat, dropout). With a placement its parameters are on the devices, never whole on the
    host; without one they are numpy's.
    """
    path = backbone_folder(path)
    digest = ""
    if placement is None:
        sizes, params, identity = weights.load_backbone(path, dtype=dtype)
    else:
        where = functools.partial(_where_backbone, config, placement)
        sizes, params, identity, digest = weights.load_sharded(path, where, dtype=dtype)
    how = {k: config.model[k] for k in ("dtype", "remat", "dropout_rate", "scan_unroll")}
    vocab = load_vocab(identity, path) if identity else _config_vocab(config)
    if vocab.size > sizes.vocab_size:
        raise UserError(
            f"{path}: embeds {sizes.vocab_size} ids, but data.vocab "
            f"{config.data.vocab or 'of the mixture'} has {vocab.size}; give its own"
        )
    return Backbone(dataclasses.replace(sizes, **how), params, vocab, digest)


def _where_backbone(config: ConfigDict, placement: Placement, sizes: t5.T5Config) -> Tree:
    """The shardings of a backbone of these sizes: as stored where it is trained."""
    stored = BACKBONE in SYSTEMS[config.system].trains
    shapes = jax.eval_shape(lambda: t5.init_params(sizes, jax.random.key(0)))
    way = placement.stored if stored else placement.computed
    return way(t5.logical_axes(sizes), shapes)


def backbone_folder(path: str | Path) -> Path:
    """``path``, or, where that is the workdir of a run that trained a backbone, the one it left.

    A copy on this machine's disk where it lies in a bucket.
    """
    if not str(path):
        raise UserError("backbone.path is empty; give the backbone's folder")
    there = Path(path) if files.is_local(path) else files.as_path(path)
    try:
        with files.as_os_error():
            left = (there / BACKBONE_FOLDER / "config.json").exists()
            running = (there / checkpoint.FOLDER).is_dir()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if left:
        return files.local_copy(there / BACKBONE_FOLDER)
    if running:
        raise UserError(
            f"{path}: a run that has left no backbone; one that trains it (such as system=concat) "
            "leaves it when it has made all its steps"
        )
    return files.local_copy(path)


def _config_vocab(config: ConfigDict) -> Vocabulary:
    from hyper_t5.data import mixture_vocab

    return mixture_vocab(config.data)


def new_backbone(config: ConfigDict) -> Backbone:
    """A randomly initialised backbone of ``config.model``'s sizes; its vocabulary must fit in."""
    sizes, vocab = t5_config(config), _config_vocab(config)
    if vocab.size > sizes.vocab_size:
        raise UserError(
            f"model.vocab_size={sizes.vocab_size} is too small for the {vocab.size} "
            "ids of data.vocab; raise it"
        )
    # On the host: a backbone is trained from nothing rarely, and is small where it is.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = jax.jit(functools.partial(t5.init_params, sizes))(jax.random.key(config.seed))
    return Backbone(sizes, jax.tree.map(np.asarray, params), vocab)


def build(config: ConfigDict, sizes: t5.T5Config, placement: Placement | None = None) -> Model:
    """The static parts of ``config.system`` on a backbone of these sizes."""
    make = SYSTEMS[config.system].build
    return Model(sizes, config.system, make(config, sizes) if make else None, placement)


def start(
    config: ConfigDict, placement: Placement | None = None
) -> tuple[Model, Backbone, Tree, Tree]:
    """(model, backbone, trained parameters, frozen parameters) at step 0 of a run.

    The hypermodel starts from ``hypermodel.path`` if given (another run's hand-over), else from the
    backbone's weights, else at random. With a placement what is trained lies as it is stored.
    """
    # Weights that are trained are kept in float32: bfloat16 would lose small updates.
    trains = SYSTEMS[config.system].trains
    backbone = (
        load_backbone(
            config.backbone.path,
            config,
            "float32" if BACKBONE in trains else config.backbone.dtype,
            placement,
        )
        if config.backbone.path
        else new_backbone(config)
    )
    model = build(config, backbone.sizes, placement)
    if config.hypermodel.path and HYPERMODEL not in trains:
        raise UserError(
            f"hypermodel.path: system={config.system} trains no hypermodel; set it to ''"
        )
    where = placements(model) if placement else None
    params = {BACKBONE: _put(backbone.params, where and where[BACKBONE])}
    if model.hypermodel is not None:
        params[HYPERMODEL] = _start_hypermodel(config, model, backbone, where and where[HYPERMODEL])
    if not all(params[branch] for branch in trains):
        raise UserError(f"system={config.system} as configured has nothing to train; take none")
    frozen = {k: v for k, v in params.items() if k not in trains}
    return model, backbone, {k: params[k] for k in trains}, frozen


def placements(m: Model) -> Tree:
    """{branch: tree} of the shardings of all parameters: of trained ones as they are stored."""
    assert m.placement is not None
    axes, shapes = logical_axes(m), shapes_of(m)
    ways = {True: m.placement.stored, False: m.placement.computed}
    return {b: ways[b in m.choice.trains](axes[b], shapes[b]) for b in shapes}


def _put(params: Tree, where: Tree | None) -> Tree:
    return sharding.put(params, where) if where else jax.tree.map(jnp.asarray, params)


def _start_hypermodel(config: ConfigDict, m: Model, backbone: Backbone, where: Tree | None) -> Tree:
    assert m.hypermodel is not None
    if config.hypermodel.path:
        frozen = BACKBONE not in m.choice.trains
        found = hand_over(config.hypermodel.path, shapes_of_hypermodel(m), backbone, frozen)
        return _put(found, where)
    copied = backbone.params if config.hypermodel.init == "backbone" else None
    key = jax.random.key(config.seed)
    return hypermodels.init_params(m.hypermodel, key, copied, where)


def hand_over(path: str | Path, wanted: Tree, backbone: Backbone, frozen: bool = True) -> Tree:
    """The hypermodel of another run, checked leaf by leaf against the wanted shapes.

    ``frozen``: it belongs to the very weights of its backbone, and to no others of that size.
    """
    found, meta = checkpoint.load_subtree(path, "params/hypermodel")
    weights.check_compatible(
        backbone.sizes,
        backbone.vocab.identity(),
        meta.get("backbone", {}),
        digest=backbone.digest if frozen else None,
        where=str(path),
    )
    check_hypermodel(found, wanted, str(path))
    return found


def shapes_of_hypermodel(m: Model) -> Tree:
    """The shapes that its parameters have."""
    init = functools.partial(hypermodels.init_params, m.hypermodel)
    return jax.eval_shape(init, jax.random.key(0))


def check_hypermodel(found: Tree, wanted: Tree, where: str) -> None:
    """UserError naming the first of a hypermodel's parameters that is not as wanted."""
    have, need = _shapes(found), _shapes(wanted)
    for name in sorted(have.keys() | need.keys()):
        if have.get(name) != need.get(name):
            raise UserError(
                f"{where}: {name} of its hypermodel is {have.get(name, 'not there')}, this run "
                f"needs {need.get(name, 'none')}; give the same system, reader and adapter sizes"
            )


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v.shape for k, v in leaves}


def meta_of(config: ConfigDict, backbone: Backbone) -> dict[str, Any]:
    """What a checkpoint says of itself: config, and which backbone it belongs to."""
    identity = backbone.vocab.identity()
    made = weights.backbone_meta(
        backbone.sizes, identity, backbone.params, digest=backbone.known_digest
    )
    return {"config": config.to_dict(), "backbone": made}


def load_run(
    folder: str | Path, overrides: Any = (), on_mesh: bool = False
) -> tuple[ConfigDict, Model, Backbone, Tree]:
    """A run for evaluation and use: (config, model, backbone, all parameters).

    A run that trained nothing is its ``backbone.path`` as it is. ``on_mesh``: over all devices, as
    the config's ``mesh`` says; otherwise on one.
    """
    config = workdir.load_config(folder, overrides)
    trains = SYSTEMS[config.system].trains
    placement = _placement_to_use(config, overrides) if on_mesh else None
    if BACKBONE in trains:
        backbone = _trained_backbone(files.as_path(folder), config)
    else:
        backbone = load_backbone(config.backbone.path, config, config.backbone.dtype, placement)
    model = build(config, backbone.sizes, placement)
    params = {BACKBONE: backbone.params}
    if HYPERMODEL in trains and model.hypermodel is not None:
        wanted = shapes_of_hypermodel(model)
        params[HYPERMODEL] = hand_over(folder, wanted, backbone, BACKBONE not in trains)
    axes = logical_axes(model) if placement else {}
    where = {k: placement.computed(axes[k], v) for k, v in params.items()} if placement else None
    return config, model, backbone, _put(params, where)


def _placement_to_use(config: ConfigDict, overrides: Any) -> Placement:
    """Of a run that may have been trained on other machines than these."""
    given = any(o.field.startswith("mesh.") for o in read_overrides(overrides))
    try:
        return sharding.make_placement(config.mesh)
    except UserError:
        if given:
            raise
    mesh = config.mesh.copy_and_resolve_references()
    mesh.update(slices=1, data=-1, model=1)
    return sharding.make_placement(mesh)


def _trained_backbone(folder: epath.Path, config: ConfigDict) -> Backbone:
    """Of a run that trains one: as in its newest checkpoint, also when it has not ended yet; else
    as it left it, or as it would start.
    """
    # What it left says its sizes and vocabulary too: where it started from may be gone by now.
    source = folder if (folder / BACKBONE_FOLDER).is_dir() else config.backbone.path
    if checkpoint.latest_step(folder) is None:
        return load_backbone(source, config)
    if source:
        start = load_backbone(source, config)
    else:
        start = Backbone(t5_config(config), {}, _config_vocab(config))
    params, meta = checkpoint.load_subtree(folder, "params/backbone")
    made = meta.get("backbone", {})
    weights.check_compatible(start.sizes, start.vocab.identity(), made, where=str(folder))
    return dataclasses.replace(start, params=params)


def tasks_of(folder: str | Path) -> list[str]:
    """The names of the tasks that a run was trained on, in the order of their numbers."""
    if checkpoint.latest_step(folder) is None:
        return []
    return list(checkpoint.read_meta(folder).get("tasks", []))


def task_number(m: Model, name: str, trained_on: Sequence[str]) -> int:
    """Which adapters are a task's, where each has its own; 0 where they do not."""
    if not m.task_slots:
        return 0
    if name not in trained_on:
        raise UserError(
            f"task {name}: {m.system} has adapters for each task that it was trained on, and this "
            f"is none of those {len(trained_on)}; train with stage=peft and the same eval.split"
        )
    return list(trained_on).index(name)


def step_of(folder: str | Path) -> int:
    """The newest checkpointed step of a run; 0 where nothing was trained."""
    return checkpoint.latest_step(folder) or 0


def trained_parameters(m: Model, params: Tree) -> int:
    """How many parameters the system trains."""
    return count({branch: params[branch] for branch in m.choice.trains})


def count(tree: Tree) -> int:
    """Numbers in a parameter tree."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
