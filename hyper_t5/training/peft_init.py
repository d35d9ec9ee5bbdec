"""PEFT initialization: the adapters that stage 'peft' starts from, before gradients tune them.

Three starts. Random is `hypermodels.learned`'s, as PEFT has it. The others are named by
``peft.init``: the workdir of a run, whose system generates each task's adapters (a hypermodel from
the task's text; one shared by all tasks, or one tuned before, as it is), or a native adapter
folder. Phang et al. (2022, HyperTuning) claim that the generated start is the better one;
docs/results.md has its learning curves.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5 import model as model_lib
from hyper_t5 import pipeline, runs
from hyper_t5.checkpoints import workdir
from hyper_t5.data import eval_tasks
from hyper_t5.data.eval_tasks import EvalTask
from hyper_t5.export import native
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL, SYSTEMS
from hyper_t5.hypermodels.learned import KINDS, leaf_name
from hyper_t5.inference.generate import iterate_adapters
from hyper_t5.model import Model, Tree
from hyper_t5.parallel import sharding
from hyper_t5.runs import Backbone, Run
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError


def init_adapters(config: ConfigDict, m: Model, backbone: Backbone, trained: Tree) -> Tree:
    """Return ``trained`` with the adapters of ``peft.init``, those of the run's tasks in order.

    A slot beyond the tasks keeps its random start. Every process of a run computes the same.

    Raises:
      UserError: ``peft.init`` was made for another backbone, has another spec, is of other tasks,
        or of no kind that can be tuned; or there are more tasks than slots.
    """
    adapters = load_adapters(config.peft.init, config, backbone)
    check_slots(m, adapters.num_tasks)
    _check_spec(config.peft.init, m, adapters)
    params = dict(trained[HYPERMODEL])
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters.tree):
        name = leaf_name(path)
        values = sharding.fetch(params[name]).copy()
        values[:, : adapters.num_tasks] = np.asarray(leaf, values.dtype)
        params[name] = sharding.device_put(values, params[name].sharding)
    return {**trained, HYPERMODEL: params}


def check_slots(m: Model, tasks: int) -> None:
    """Raise UserError where a system with adapters for each task has fewer slots than tasks."""
    if m.task_slots and m.task_slots < tasks:
        raise UserError(
            f"adapter.task_slots={m.task_slots}, but there are {tasks} tasks to keep adapters for; "
            f"set it to {tasks}"
        )


def _check_spec(init: str, m: Model, adapters: ad.Adapters) -> None:
    assert m.hypermodel is not None
    for kind in (*KINDS, "memory"):
        theirs, ours = getattr(adapters.spec, kind), getattr(m.hypermodel.spec, kind)
        if theirs != ours:
            raise UserError(
                f"peft.init={init}: {_difference(kind, theirs, ours)}; take sizes and kind from "
                f"there, with --config configs/peft.py:init={init}"
            )
    masked = any(leaf.dtype == bool for leaf in jax.tree.leaves(adapters.tree))
    if masked and not m.hypermodel.masked:
        raise UserError(
            f"peft.init={init}: its prefixes have masked slots; set adapter.prefix_mask=True, or "
            f"use --config configs/peft.py:init={init}"
        )


def _difference(kind: str, theirs: Any, ours: Any) -> str:
    if not (dataclasses.is_dataclass(theirs) and dataclasses.is_dataclass(ours)):
        has = f"has {kind}" if theirs else f"has no {kind}"
        return f"it {has}, and this run {'tunes' if ours else 'tunes no'} {kind}"
    fields = [f.name for f in dataclasses.fields(theirs)]
    name = next(n for n in fields if getattr(theirs, n) != getattr(ours, n))
    return f"its {kind} has {name}={getattr(theirs, name)}, this run {getattr(ours, name)}"


# ------------------------------------------------------------------------ loading adapters


def load_adapters(init: str, config: ConfigDict, backbone: Backbone) -> ad.Adapters:
    """Return adapters [N, T, ...] of the T tasks that this config tunes, in order, on the host.

    A folder's single adapter is every task's; one of several tasks is taken in this order.
    """
    if (files.as_path(init) / native.SPEC_FILE).exists():
        return _from_folder(init, config, backbone)
    if (files.as_path(init) / workdir.CONFIG_FILE).exists():
        return _from_run(init, config, backbone)
    raise UserError(f"peft.{_neither(init)}")


def _neither(init: str) -> str:
    return (
        f"init={init}: neither the workdir of a run nor a native adapter folder; convert a PEFT "
        "folder with `hyper-t5 export --format native`"
    )


def _from_folder(init: str, config: ConfigDict, backbone: Backbone) -> ad.Adapters:
    adapters, meta, hypermodel = native.load(files.local_copy(init))
    if hypermodel is not None:
        raise UserError(f"peft.init={init}: generates adapters for each input; none can be tuned")
    backbone.check_matches(meta.get("backbone", {}), f"peft.init={init}")
    ad.check(adapters, backbone.sizes, init)
    tasks = len(pipeline.load_peft_tasks(config, backbone.vocab))
    if adapters.num_tasks == tasks:
        return adapters
    if adapters.num_tasks > 1:
        raise UserError(
            f"peft.init={init}: holds adapters of {adapters.num_tasks} tasks, and this run tunes "
            f"{tasks}; use one of as many, or of one task"
        )
    return ad.take(adapters, np.zeros(tasks, int))


def _from_run(init: str, config: ConfigDict, backbone: Backbone) -> ad.Adapters:
    source = runs.open(init, backbone=backbone)
    if not source.model.emits_per_task:
        raise UserError(f"peft.init={init}: system={source.config.system} emits no task adapters")
    tasks = _conditionings(config, source)
    numbers = [model_lib.task_number(source.model, task.name, source.tasks) for task in tasks]
    ids = [task.hyper_ids for task in tasks]
    return ad.concatenate(list(iterate_adapters(source.model, source.params, ids, numbers)))


def _conditionings(config: ConfigDict, source: Run) -> list[EvalTask]:
    """Return the tuned tasks as the source run reads them in its own evaluation.

    The evaluated rows are this config's, so that none of them is shown to the source.
    """
    reader = source.config.copy_and_resolve_references()
    reader.eval.update(config.eval)
    vocab, layout = source.backbone.vocab, source.model.system.layout
    tasks: list[EvalTask] = []
    for split, mixture in pipeline.eval_splits(config).items():
        rows = pipeline.load_eval_tasks(config, mixture, split, vocab)
        tasks += eval_tasks.build_eval_tasks(rows, vocab, reader, layout)
    return tasks


# ------------------------------------------------------------------------ a config for tuning


def config_for(init: str) -> tuple[ConfigDict, str]:
    """Return (a config that tunes ``init``, its origin: 'generated', 'shared' or 'tuned').

    Of a run: its backbone, lengths, template and mixture, with the sizes of its adapters. Of an
    adapter folder: its sizes and input settings; the backbone must still be set.

    Raises:
      UserError: neither of them, or nothing of one kind that can be tuned.
    """
    folder = files.as_path(init)
    origin = "generated"
    if (folder / native.SPEC_FILE).exists():
        adapters, meta, _ = native.load(files.local_copy(init))
        config, system = config_lib.defaults(), SYSTEMS.get(str(meta.get("system")))
        config.data.input_length = int(meta.get("input_length", config.data.input_length))
        config.data.template = str(meta.get("encoding", config.data.template))
        config.backbone.dtype = str(meta.get("backbone", {}).get("dtype", "float32"))
    elif (folder / workdir.CONFIG_FILE).exists():
        config = workdir.load_config(init)
        adapters, system = _emitted_shapes(init, config), SYSTEMS[config.system]
        if BACKBONE in system.trains:
            config.backbone.path = str(init)
    else:
        raise UserError(_neither(init))
    if system is not None:
        origin = {"shared": "shared", "per_task": "tuned"}.get(system.kind, origin)
    _adopt(config, init, adapters)
    config.stage, config.peft.init = "peft", str(init)
    config.hypermodel.path = ""  # of the source run, if it had one
    return config, origin


def _emitted_shapes(init: str, config: ConfigDict) -> ad.Adapters:
    """Return the adapters that a run emits for a task, as shapes."""
    m = model_lib.build_model(config, config_lib.t5_config(config))
    if not m.emits_per_task:
        raise UserError(f"init={init}: system={config.system} emits no task adapters")
    length = m.system.layout.hyper_length(config.data)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = model_lib.param_shapes(m)
    return jax.eval_shape(functools.partial(model_lib.generate_adapters, m), params, ids, number)


def _adopt(config: ConfigDict, init: str, adapters: ad.Adapters) -> None:
    """Set ``system`` and ``adapter`` to tune adapters of this spec."""
    a, spec = config.adapter, adapters.spec
    kinds = [kind for kind in KINDS if getattr(spec, kind)]
    if len(kinds) != 1 or spec.memory:
        has = " and ".join([*kinds, *["memory"] * bool(spec.memory)]) or "nothing"
        raise UserError(f"init={init}: emits {has}; what can be tuned is one of {', '.join(KINDS)}")
    config.system = f"task_{kinds[0]}"
    if lora := spec.lora:
        if lora.rank_pattern or lora.alpha_pattern:
            raise UserError(
                f"init={init}: its LoRA has a rank_pattern or alpha_pattern, which cannot be tuned"
            )
        a.lora_rank, a.lora_alpha = lora.rank, float(lora.alpha)
        a.lora_bias, a.lora_targets = lora.bias, lora.targets
    if prefix := spec.prefix:
        a.prefix_length, a.prefix_sites = prefix.length, prefix.sites
        a.position_bias = prefix.position_bias
        a.prefix_mask = any(leaf.dtype == bool for leaf in jax.tree.leaves(adapters.tree))
    if bottleneck := spec.bottleneck:
        a.bottleneck_sites, a.bottleneck_sizes = bottleneck.sites, bottleneck.sizes
        a.bottleneck_activation, a.bottleneck_input = bottleneck.activation, bottleneck.input
