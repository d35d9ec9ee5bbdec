"""Runs: open a trained one, start a new one, load a hypermodel from the stage before.

A run is opened once, by `open`. What follows (evaluation, inference, robustness, PEFT
initialization) takes the `Run` and never reads its folder again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyper_t5 import hypermodels, pipeline, t5, weights
from hyper_t5 import model as model_lib
from hyper_t5.checkpoints import checkpoint, workdir
from hyper_t5.checkpoints.steps import Step
from hyper_t5.config import t5_config
from hyper_t5.data.vocab import Vocabulary, load_vocab
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL, SYSTEMS
from hyper_t5.model import Model, Tree
from hyper_t5.parallel import distributed, sharding
from hyper_t5.parallel.sharding import Placement
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import Override, read_overrides
from hyper_t5.weights import param_names

BACKBONE_FOLDER = "backbone"  # in the workdir of a run that trained one
COMPUTE_FIELDS = ("dtype", "remat", "dropout_rate", "scan_unroll")  # not a matter of the weights


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A T5: its sizes, parameters and vocabulary.

    Attributes:
      sizes: with the compute settings (dtype, remat, dropout).
      params: layers stacked; numpy arrays, or on the devices of a mesh.
      vocabulary: None where neither folder nor config names one.
      path: the folder it was read from, '' for a new one.
      known_digest: `param_names.digest` of the parameters where it was computed while reading.
    """

    sizes: t5.T5Config
    params: Tree
    vocabulary: Vocabulary | None = None
    path: str = ""
    known_digest: str = ""

    @functools.cached_property
    def digest(self) -> str:
        """`param_names.digest` of the parameters; reads all of them once."""
        return self.known_digest or param_names.digest(self.params)

    @property
    def vocab(self) -> Vocabulary:
        """The vocabulary; UserError where there is none."""
        if self.vocabulary is None:
            raise UserError(
                f"{self.path}: names no vocabulary; convert it with `hyper-t5 convert --to native "
                "--vocab spiece.model`"
            )
        return self.vocabulary

    @property
    def identity(self) -> dict[str, Any] | None:
        """The identity of the vocabulary, as checkpoints and adapters record it."""
        return self.vocabulary.identity() if self.vocabulary else None

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """Backbone metadata that checkpoints and adapters store."""
        return weights.backbone_meta(self.sizes, self.identity, self.params, digest=self.digest)

    def check_matches(self, meta: Mapping[str, Any], location: str, by_digest: bool = True) -> None:
        """Refuse the checkpoint or adapter of another backbone.

        Args:
          meta: the `meta` of its backbone.
          location: the file or folder, for the message.
          by_digest: whether it belongs to these very weights, not to all of this size.

        Raises:
          UserError: another size, vocabulary or other weights.
        """
        digest = self.digest if by_digest else None
        weights.check_compatible(self.sizes, self.identity, meta, digest=digest, path=location)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run.

    Attributes:
      workdir: its folder.
      config: with the overrides of this use.
      model: the static parts.
      backbone: as used by the run; its parameters are those of ``params``.
      params: of all branches.
      step: the checkpointed step; 0 where nothing was trained.
      tasks: the tasks it was trained on, in the order of their numbers.
      checkpoint_digest: of the checkpoint; '' without one.
      train_seconds: the time its training took; None where metrics.jsonl does not say.
    """

    workdir: str
    config: ConfigDict
    model: Model
    backbone: Backbone
    params: Tree
    step: int = 0
    tasks: tuple[str, ...] = ()
    checkpoint_digest: str = ""
    train_seconds: float | None = None

    @functools.cached_property
    def digests(self) -> tuple[str, ...]:
        """Digests of all weights that the run computes with."""
        if self.checkpoint_digest and BACKBONE in self.model.system.trains:
            return (self.checkpoint_digest,)
        return (self.checkpoint_digest, self.backbone.digest)


# ------------------------------------------------------------------------ opening a run


def open(
    folder: str | Path,
    overrides: Any = (),
    on_mesh: bool = False,
    backbone: Backbone | None = None,
    step: Step | None = None,
) -> Run:
    """Open a run for evaluation and use: its config, a checkpoint and its backbone.

    A run that trained nothing is its ``backbone.path`` as it is.

    Args:
      folder: the workdir.
      overrides: of the config.
      on_mesh: place the parameters over all devices as the config's ``mesh`` says, or, where those
        are other devices, over ``data`` alone; otherwise on one device. Every process calls it.
      backbone: the run's frozen backbone where it is loaded already; it is checked.
      step: of the checkpoint; 'best' has the lowest validation loss, None is the newest.

    Raises:
      UserError: no run, a damaged one, or one for another backbone.
    """
    config = workdir.load_config(folder, overrides)
    trains = SYSTEMS[config.system].trains
    placement = _usable_placement(config, overrides) if on_mesh else None
    source = files.as_path(folder) if step is None else checkpoint.step_folder(folder, step)
    number = checkpoint.latest_step(folder) if step is None else int(source.name)
    if on_mesh:
        number = distributed.broadcast("step", number)
    meta = checkpoint.read_meta(source) if number is not None else {}
    if BACKBONE in trains:
        own = _trained_backbone(files.as_path(folder), config, None if number is None else source)
        if backbone is not None:
            backbone.check_matches(own.meta, str(folder))
        backbone = own
    elif backbone is None:
        backbone = load_backbone(config.backbone.path, config, config.backbone.dtype, placement)
    model = model_lib.build_model(config, backbone.sizes, placement)
    params = {BACKBONE: backbone.params}
    if HYPERMODEL in trains and model.hypermodel is not None:
        shapes = model_lib.hypermodel_shapes(model)
        params[HYPERMODEL] = load_hypermodel(source, shapes, backbone, BACKBONE not in trains)
    shardings = None
    if placement:
        axes = model_lib.logical_axes(model)
        shardings = {k: placement.compute_sharding(axes[k], v) for k, v in params.items()}
    params = _device_put(params, shardings)
    return Run(
        workdir=str(folder),
        config=config,
        model=model,
        backbone=dataclasses.replace(backbone, params=params[BACKBONE]),
        params=params,
        step=number or 0,
        tasks=tuple(meta.get("tasks", ())),
        checkpoint_digest=checkpoint.digest(source),
        train_seconds=workdir.training_seconds(folder),
    )


def backbone_override(backbone: str | Path) -> list[Override]:
    """Return the overrides of ``--backbone`` beside a workdir; none where it is ''."""
    return [Override("backbone.path", str(backbone), "--backbone")] if backbone else []


def is_run(folder: str | Path) -> bool:
    """Return whether a folder is a run's: its config names a system, a backbone's sizes."""
    file = files.as_path(folder) / workdir.CONFIG_FILE
    return file.exists() and "system" in files.read_json(file)


def load_hypermodel(
    path: str | Path, shapes: Tree, backbone: Backbone, by_digest: bool = True
) -> Tree:
    """Load the hypermodel of a run, checked leaf by leaf against ``shapes``.

    ``by_digest``: it belongs to the very weights of its backbone, and to no others of that size.
    """
    params, meta = checkpoint.load_subtree(path, "params/hypermodel")
    backbone.check_matches(meta.get("backbone", {}), str(path), by_digest)
    check_hypermodel(params, shapes, str(path))
    return params


def check_hypermodel(params: Tree, shapes: Tree, location: str) -> None:
    """Raise UserError for the first parameter of a hypermodel that has another shape."""
    have, need = _shapes_by_name(params), _shapes_by_name(shapes)
    for name in sorted(have.keys() | need.keys()):
        if have.get(name) != need.get(name):
            raise UserError(
                f"{location}: {name} of its hypermodel is {have.get(name, 'missing')}, this run "
                f"needs {need.get(name, 'none')}; use the same system, reader and adapter sizes"
            )


def _shapes_by_name(tree: Tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v.shape for k, v in leaves}


def _usable_placement(config: ConfigDict, overrides: Any) -> Placement:
    """Return the placement of a run that may have been trained on other devices than these."""
    mesh_overridden = any(o.field.startswith("mesh.") for o in read_overrides(overrides))
    try:
        return sharding.make_placement(config.mesh)
    except UserError:
        if mesh_overridden:
            raise
    mesh = config.mesh.copy_and_resolve_references()
    mesh.update(slices=1, data=-1, model=1)
    return sharding.make_placement(mesh)


def _trained_backbone(
    folder: epath.Path, config: ConfigDict, checkpoint_path: epath.Path | None
) -> Backbone:
    """Return the backbone of a run that trains one: of a checkpoint, else its start."""
    # The exported folder has sizes and vocabulary too: the start may have been deleted by now.
    source = folder if (folder / BACKBONE_FOLDER).is_dir() else config.backbone.path
    if not checkpoint_path:
        return load_backbone(source, config)
    if source:
        start = load_backbone(source, config)
    else:
        start = Backbone(t5_config(config), {}, _config_vocab(config))
    params, meta = checkpoint.load_subtree(checkpoint_path, "params/backbone")
    start.check_matches(meta.get("backbone", {}), str(folder), by_digest=False)
    return Backbone(start.sizes, params, start.vocab, str(folder))


# ------------------------------------------------------------------------ backbones


def load_backbone(
    path: str | Path,
    config: ConfigDict | None = None,
    dtype: str = "float32",
    placement: Placement | None = None,
) -> Backbone:
    """Read a backbone: a native, T5X or Hugging Face folder, or a run that trained one.

    The folder decides the sizes and, where it names one, the vocabulary.

    Args:
      path: the folder.
      config: how to compute (`COMPUTE_FIELDS`), and the vocabulary where the folder names none.
      dtype: of the stored weights, 'float32' or 'bfloat16'.
      placement: the parameters go to the devices, never whole on the host; None: numpy arrays.

    Raises:
      UserError: missing, damaged, no T5, or a vocabulary that is larger than the embedding.
    """
    folder = backbone_folder(path)
    digest = ""
    if placement is None:
        sizes, params, identity = weights.load_backbone(folder, dtype=dtype)
    else:
        assert config is not None
        shardings = functools.partial(_backbone_shardings, config, placement)
        sizes, params, identity, digest = weights.load_sharded(folder, shardings, dtype=dtype)
    compute: Any = config.model if config is not None else dataclasses.asdict(t5.T5Config())
    sizes = dataclasses.replace(sizes, **{k: compute[k] for k in COMPUTE_FIELDS})
    vocab = load_vocab(identity, folder) if identity else None
    if vocab is None and config is not None:
        vocab = _config_vocab(config)
    if vocab is not None and vocab.size > sizes.vocab_size:
        name = (config.data.vocab if config is not None else "") or "of the mixture"
        raise UserError(
            f"{path}: embeds {sizes.vocab_size} ids, but data.vocab {name} has {vocab.size}; "
            "use the backbone's own"
        )
    return Backbone(sizes, params, vocab, str(path), digest)


def backbone_folder(path: str | Path) -> Path:
    """Return the local folder of a backbone.

    Of a run that trained one, it is the exported one; of a run before its last step, or of a step's
    folder, the checkpoint's backbone is exported to this machine's cache. A folder in a bucket is
    copied to this machine's disk.
    """
    if not str(path):
        raise UserError("backbone.path is empty; set it to the backbone's folder")
    folder = Path(path) if files.is_local(path) else files.as_path(path)
    try:
        with files.as_os_error():
            exported = (folder / BACKBONE_FOLDER / "config.json").exists()
            is_step = checkpoint.is_step(folder) and (folder / checkpoint.steps.RECORD).exists()
            has_checkpoint = is_step or (folder / checkpoint.FOLDER).is_dir()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if exported:
        return files.local_copy(folder / BACKBONE_FOLDER)
    if has_checkpoint:
        return _export_checkpoint(files.as_path(folder))
    return files.local_copy(path)


def _export_checkpoint(path: epath.Path) -> Path:
    """Return the folder, in this machine's cache, of the backbone in a run or a step's folder."""
    folder = path.parent.parent if checkpoint.is_step(path) else path
    config = workdir.load_config(folder)
    checkpoint.read_meta(path)  # UserError where it is damaged
    digest = checkpoint.digest(path)
    if BACKBONE not in SYSTEMS[config.system].trains or not digest:
        raise UserError(
            f"{path}: this run exported no backbone; a run that trains one (such as system=concat) "
            "has it in its checkpoints"
        )
    target = files.cache_root() / "backbones" / digest[:32]
    is_missing = not (target / "config.json").exists()
    if any(distributed.gather("backbone/export", is_missing)):  # all read a checkpoint together
        backbone = _trained_backbone(folder, config, path)
        if is_missing:
            print(f"{path}: exporting the checkpoint's backbone to {target}", flush=True)
            try:
                with files.replaced_folder(target, ()) as new:
                    weights.save_native(new, backbone.sizes, backbone.params, backbone.vocab)
            except UserError:
                if not (target / "config.json").exists():  # no other process has exported it
                    raise
    return target


def _backbone_shardings(config: ConfigDict, placement: Placement, sizes: t5.T5Config) -> Tree:
    """Return the shardings of a backbone; where it is trained, those of storage."""
    trained = BACKBONE in SYSTEMS[config.system].trains
    shapes = jax.eval_shape(lambda: t5.init_params(sizes, jax.random.key(0)))
    shardings = placement.storage_sharding if trained else placement.compute_sharding
    return shardings(t5.logical_axes(sizes), shapes)


def _config_vocab(config: ConfigDict) -> Vocabulary:
    return pipeline.mixture_vocab(config.data)


def new_backbone(config: ConfigDict) -> Backbone:
    """Initialize a backbone of ``config.model``'s sizes at random; its vocabulary must fit in."""
    sizes, vocab = t5_config(config), _config_vocab(config)
    if vocab.size > sizes.vocab_size:
        raise UserError(
            f"model.vocab_size={sizes.vocab_size} is too small for the {vocab.size} "
            "ids of data.vocab; raise it"
        )
    # On the host: training from scratch is rare, and such backbones are small.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = jax.jit(functools.partial(t5.init_params, sizes))(jax.random.key(config.seed))
    return Backbone(sizes, jax.tree.map(np.asarray, params), vocab)


# ------------------------------------------------------------------------ starting a run


def init_run(
    config: ConfigDict, placement: Placement | None = None
) -> tuple[Model, Backbone, Tree, Tree]:
    """Return (model, backbone, trained parameters, frozen parameters) at step 0 of a run.

    The hypermodel starts from ``hypermodel.path`` (another run's), else from the backbone's
    weights, else at random. With a placement trained parameters lie as they are stored.
    """
    # Trained weights are kept in float32: bfloat16 would lose small updates.
    system = SYSTEMS[config.system]
    if config.backbone.path:
        dtype = "float32" if BACKBONE in system.trains else config.backbone.dtype
        backbone = load_backbone(config.backbone.path, config, dtype, placement)
    else:
        backbone = new_backbone(config)
    model = model_lib.build_model(config, backbone.sizes, placement)
    if config.hypermodel.path and HYPERMODEL not in system.trains:
        raise UserError(
            f"hypermodel.path: system={config.system} trains no hypermodel; set it to ''"
        )
    shardings = model_lib.param_shardings(model) if placement else {}
    params = {BACKBONE: _device_put(backbone.params, shardings.get(BACKBONE))}
    if model.hypermodel is not None:
        params[HYPERMODEL] = _init_hypermodel(config, model, backbone, shardings.get(HYPERMODEL))
    if not all(params[branch] for branch in system.trains):
        raise UserError(
            f"system={config.system} as configured has nothing to train; use system=none"
        )
    frozen = {k: v for k, v in params.items() if k not in system.trains}
    return model, backbone, {k: params[k] for k in system.trains}, frozen


def _init_hypermodel(
    config: ConfigDict, model: Model, backbone: Backbone, shardings: Tree | None
) -> Tree:
    assert model.hypermodel is not None
    if config.hypermodel.path:
        shapes = model_lib.hypermodel_shapes(model)
        by_digest = BACKBONE not in model.system.trains
        params = load_hypermodel(config.hypermodel.path, shapes, backbone, by_digest)
        return _device_put(params, shardings)
    source = backbone.params if config.hypermodel.init == "backbone" else None
    key = jax.random.key(config.seed)
    return hypermodels.init_params(model.hypermodel, key, source, shardings)


def checkpoint_meta(config: ConfigDict, backbone: Backbone) -> dict[str, Any]:
    """Return what a checkpoint records: its config and the backbone it belongs to."""
    return {"config": config.to_dict(), "backbone": backbone.meta}


def export_backbone(folder: epath.Path, model: Model, backbone: Backbone, trained: Tree) -> None:
    """Write the backbone that a run trained as a folder that ``backbone.path`` can name."""
    if BACKBONE not in model.system.trains:
        return
    params = sharding.fetch(trained[BACKBONE])
    if distributed.is_primary():
        weights.save_native(folder / BACKBONE_FOLDER, backbone.sizes, params, backbone.vocab)
    distributed.barrier("backbone")


def _device_put(params: Tree, shardings: Tree | None) -> Tree:
    if shardings:
        return sharding.device_put(params, shardings)
    return jax.tree.map(jnp.asarray, params)
