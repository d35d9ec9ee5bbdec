"""Stage ``peft``: what the adapters of each task start from before gradients tune them.

Three starts. Random is `hypermodels.learned`'s, as PEFT has it. The others are where
``peft.init`` points: the workdir of a run, whose system makes each task's adapters (a hypermodel
from the task's text; one shared by all tasks, or one tuned before, as it is), or a native adapter
folder. Phang et al. (2022, HyperTuning) claim that the generated start is the better one;
`learning_curves` measures it.
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
from hyper_t5 import data, files, model, names, sharding, weights, workdir
from hyper_t5.errors import UserError
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL
from hyper_t5.hypermodels.learned import leaf_name
from hyper_t5.judged import EvalTask
from hyper_t5.model import Backbone, Model, Tree

TASKS_AT_ONCE = 16  # that a hypermodel reads together
KINDS = ("lora", "prefix", "bottleneck")  # as systems are called: task_lora, shared_lora


# ------------------------------------------------------------------------------------- the start


def start(config: ConfigDict, m: Model, backbone: Backbone, trained: Tree) -> Tree:
    """``trained`` with the adapters of ``peft.init`` in it, those of the run's tasks in order.

    A slot beyond the tasks stays as it was. Every process of a run makes the same.

    Raises:
        UserError: what is there was made for another backbone, has another spec, is of other
            tasks, or of no kind that can be tuned; or there are more tasks than slots.
    """
    found = adapters_of(config.peft.init, config, backbone)
    check_slots(m, found.num_tasks)
    _check_spec(config.peft.init, m, found)
    params = dict(trained[HYPERMODEL])
    for path, leaf in jax.tree_util.tree_leaves_with_path(found.tree):
        name = leaf_name(path)
        made = sharding.fetch(params[name]).copy()
        made[:, : found.num_tasks] = np.asarray(leaf, made.dtype)
        params[name] = sharding.put(made, params[name].sharding)
    return {**trained, HYPERMODEL: params}


def check_slots(m: Model, tasks: int) -> None:
    """UserError where a system with adapters for each task has no room for so many."""
    if m.task_slots and m.task_slots < tasks:
        raise UserError(
            f"adapter.task_slots={m.task_slots}, but there are {tasks} tasks to keep adapters for; "
            f"set it to {tasks}"
        )


def _check_spec(init: str, m: Model, found: ad.Adapters) -> None:
    assert m.hypermodel is not None
    have, need = found.spec, m.hypermodel.spec
    for kind in (*KINDS, "memory"):
        one, other = getattr(have, kind), getattr(need, kind)
        if one != other:
            raise UserError(
                f"peft.init={init}: {_difference(kind, one, other)}; take sizes and kind from "
                f"there, with --config configs/peft.py:init={init}"
            )
    masked = any(leaf.dtype == bool for leaf in jax.tree.leaves(found.tree))
    if masked and not m.hypermodel.masked:
        raise UserError(
            f"peft.init={init}: its prefixes leave slots out; set adapter.prefix_mask=True, or "
            f"take --config configs/peft.py:init={init}"
        )


def _difference(kind: str, one: Any, other: Any) -> str:
    if not (dataclasses.is_dataclass(one) and dataclasses.is_dataclass(other)):
        has, needs = ("has" if x else "has no" for x in (one, other))
        return f"{has} {kind}, and this run {needs.replace('has', 'tunes')} such"
    fields = [f.name for f in dataclasses.fields(one)]
    name = next(n for n in fields if getattr(one, n) != getattr(other, n))
    return f"its {kind} has {name}={getattr(one, name)}, this run {getattr(other, name)}"


# ------------------------------------------------------------------- adapters of what is there


def adapters_of(init: str, config: ConfigDict, backbone: Backbone) -> ad.Adapters:
    """Adapters [N, T, ...] of the T tasks that this config tunes, in their order; on the host.

    A folder's single adapter is every task's; one of several tasks is taken in this order.
    """
    folder = files.as_path(init)
    if (folder / ad.SPEC_FILE).exists():
        return _of_folder(init, config, backbone)
    if (folder / workdir.CONFIG_FILE).exists():
        return _of_run(init, config, backbone)
    raise UserError(f"peft.{_neither(init)}")


def _neither(init: str) -> str:
    return (
        f"init={init}: neither the workdir of a run nor a native adapter folder; of PEFT's "
        "`hyper-t5 export --format native` makes one"
    )


def _of_folder(init: str, config: ConfigDict, backbone: Backbone) -> ad.Adapters:
    found, meta, hypermodel = ad.load(files.local_copy(init))
    if hypermodel is not None:
        raise UserError(f"peft.init={init}: makes adapters anew for each input; none can be tuned")
    _check_backbone(init, backbone, meta.get("backbone", {}))
    ad.check(found, backbone.sizes, init)
    tasks = len(data.load_peft_tasks(config, backbone.vocab))
    if found.num_tasks == tasks:
        return found
    if found.num_tasks > 1:
        raise UserError(
            f"peft.init={init}: holds adapters of {found.num_tasks} tasks, and this run tunes "
            f"{tasks}; give one of as many, or of one task"
        )
    return ad.take(found, np.zeros(tasks, int))


def _of_run(init: str, config: ConfigDict, backbone: Backbone) -> ad.Adapters:
    run = workdir.load_config(init)
    made_by = model.build(run, backbone.sizes)
    if made_by.hypermodel is None or made_by.choice.reads != "task":
        raise UserError(f"peft.init={init}: system={run.system} makes no adapters of a task")
    if BACKBONE in made_by.choice.trains:
        own = model.load_backbone(init, run)
        meta = weights.backbone_meta(own.sizes, own.vocab.identity(), own.params)
        _check_backbone(init, backbone, meta)
    params = {BACKBONE: backbone.params}
    if HYPERMODEL in made_by.choice.trains:
        wanted, frozen = model.shapes_of_hypermodel(made_by), BACKBONE not in made_by.choice.trains
        params[HYPERMODEL] = model.hand_over(init, wanted, backbone, frozen)
    tasks, trained_on = _texts(config, run, made_by, backbone), model.tasks_of(init)
    numbers = [model.task_number(made_by, task.name, trained_on) for task in tasks]
    made = []
    for first in range(0, len(tasks), TASKS_AT_ONCE):
        part = slice(first, first + TASKS_AT_ONCE)
        ids = np.stack([task.hyper_ids for task in tasks[part]])
        some = model.generate(made_by, params, jnp.asarray(ids), jnp.asarray(numbers[part]))
        assert some is not None
        made.append(jax.device_get(some))
    return ad.concatenate(made)


def _texts(
    config: ConfigDict, run: ConfigDict, made_by: Model, backbone: Backbone
) -> list[EvalTask]:
    """The tuned tasks as the run reads them: as its own evaluation would, at this one's rows.

    So nothing that is judged is shown to it.
    """
    reads = run.copy_and_resolve_references()
    reads.eval.update(config.eval)
    tasks: list[EvalTask] = []
    for split, mixture in data.splits_of(config).items():
        judged = data.load_judged(config, mixture, split, backbone.vocab)
        tasks += data.eval_episodes(judged, backbone.vocab, reads, made_by.choice.layout)
    return tasks


def _check_backbone(init: str, backbone: Backbone, made_for: dict[str, Any]) -> None:
    weights.check_compatible(
        backbone.sizes,
        backbone.vocab.identity(),
        made_for,
        digest=names.digest(backbone.params),
        where=f"peft.init={init}",
    )


# ------------------------------------------------------------------------ a config to tune by


def settings_of(init: str) -> tuple[ConfigDict, str]:
    """(a config that tunes what is there, what it is: 'generated', 'shared' or 'tuned').

    Of a run: its backbone, lengths, text and mixture, with the sizes of what it emits. Of an
    adapter folder: its sizes, and what it says of inputs; the backbone is still to be given.

    Raises:
        UserError: there is neither, or it is nothing of one kind that can be tuned.
    """
    folder = files.as_path(init)
    if (folder / ad.SPEC_FILE).exists():
        found, meta, _ = ad.load(files.local_copy(init))
        config, system = config_lib.defaults(), str(meta.get("system", ""))
        config.data.input_length = int(meta.get("input_length", config.data.input_length))
        config.data.encoding = str(meta.get("encoding", config.data.encoding))
        config.backbone.dtype = str(meta.get("backbone", {}).get("dtype", "float32"))
    elif (folder / workdir.CONFIG_FILE).exists():
        config = workdir.load_config(init)
        found, system = _emitted(init, config), config.system
        if BACKBONE in model.SYSTEMS[system].trains:
            config.backbone.path = str(init)
    else:
        raise UserError(_neither(init))
    _adopt(config, init, found)
    config.stage, config.peft.init = "peft", str(init)
    config.hypermodel.path = ""  # of the run that made them, if it had one
    kinds = {"shared": "shared", "task": "tuned"}
    return config, kinds.get(system.partition("_")[0], "generated")


def _emitted(init: str, config: ConfigDict) -> ad.Adapters:
    """What a run makes of a task, as shapes."""
    m = model.build(config, config_lib.t5_config(config))
    if m.hypermodel is None or m.choice.reads != "task":
        raise UserError(f"init={init}: system={config.system} makes no adapters of a task")
    ids = jax.ShapeDtypeStruct((1, config.data.hyper_length), jnp.int32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = model.shapes_of(m)
    return jax.eval_shape(functools.partial(model.generate, m), params, ids, number)


def _adopt(config: ConfigDict, init: str, found: ad.Adapters) -> None:
    """Sets ``system`` and ``adapter`` to tune what was found."""
    a, spec = config.adapter, found.spec
    kinds = [kind for kind in KINDS if getattr(spec, kind)]
    if len(kinds) != 1 or spec.memory:
        has = " and ".join([*kinds, *["memory"] * bool(spec.memory)]) or "nothing"
        raise UserError(f"init={init}: emits {has}; what can be tuned is one of {', '.join(KINDS)}")
    config.system = f"task_{kinds[0]}"
    if lora := spec.lora:
        if lora.rank_pattern or lora.alpha_pattern:
            raise UserError(
                f"init={init}: its LoRA has another rank or alpha in some places, and what is "
                "tuned has one of each"
            )
        a.lora_rank, a.lora_alpha = lora.rank, float(lora.alpha)
        a.lora_bias, a.lora_targets = lora.bias, lora.targets
    if prefix := spec.prefix:
        a.prefix_length, a.prefix_sites = prefix.length, prefix.sites
        a.position_bias = prefix.position_bias
        a.prefix_mask = any(leaf.dtype == bool for leaf in jax.tree.leaves(found.tree))
    if wide := spec.bottleneck:
        a.bottleneck_sites, a.bottleneck_sizes = wide.sites, wide.sizes
        a.bottleneck_activation, a.bottleneck_input = wide.activation, wide.input
