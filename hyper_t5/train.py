"""Training, either stage: a pure step and the loop around it.

Frozen is structural: ``loss(trained, frozen, batch, rng)`` is differentiated by its first argument
only, so frozen weights have no gradient, no optimizer state, and no place in the checkpoint.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from hyper_t5 import (
    adapters,
    checkpoint,
    cost,
    data,
    distributed,
    files,
    guard,
    losses,
    metrics,
    model,
    optim,
    sharding,
    tuning,
    watch,
    weights,
    workdir,
)
from hyper_t5.errors import PreemptedError, UserError
from hyper_t5.hypermodels import BACKBONE
from hyper_t5.model import Model, Tree

Array = jax.Array
State = dict[str, Any]  # {"params", "opt_state", "step", "guard"}: all that a checkpoint holds


def loss_sums(
    m: Model,
    trained: Tree,
    frozen: Tree,
    batch: Tree,
    rng: Array | None,
    z_loss: float = 1e-4,
    label_smoothing: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """(summed loss, sums and counts) of a batch; see ``losses.token_loss``.

    Beside those: ``emitted``, for how many tasks there are adapters (or rows, where each row's
    are its own), and ``adapter_norm``, the sum of their norms.
    """
    logits, emitted = m.forward({**frozen, **trained}, batch, rng)
    rows = {k: v.reshape(-1, v.shape[-1]) for k, v in batch.items() if k.startswith("target")}
    targets, segments = rows["targets"], rows.get("target_segments")
    sums = losses.token_loss(logits, targets, targets > 0, z_loss, label_smoothing, segments)
    if emitted is not None:
        norms = jax.lax.stop_gradient(adapters.norms(emitted))
        sums |= {"adapter_norm": jnp.sum(norms), "emitted": jnp.float32(emitted.num_tasks)}
    return sums["loss"], sums


def make_step(
    m: Model,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    placed: Any = None,
) -> jax.stages.Wrapped:
    """The jitted training step: (state, frozen, batch, key) -> (state, metrics as sums).

    ``placed`` are the shardings of the state (``place_state``), which it has after a step as
    before; the sums are whole on every device.
    """
    parts = config.train.microbatches
    use_dropout = m.sizes.dropout_rate > 0

    def gradient(trained: Tree, frozen: Tree, batch: Tree, rng: Array) -> tuple[Tree, Tree]:
        def loss(trained: Tree) -> tuple[Array, Tree]:
            return loss_sums(
                m,
                trained,
                frozen,
                batch,
                rng if use_dropout else None,
                config.train.z_loss,
                config.train.label_smoothing,
            )

        grads, sums = jax.grad(loss, has_aux=True)(trained)
        if placed is not None:  # reduced and scattered in one: nobody needs them whole
            grads = jax.lax.with_sharding_constraint(grads, placed["params"])
        return grads, sums

    def step(state: State, frozen: Tree, batch: Tree, key: Array) -> tuple[State, Tree]:
        rng, number = jax.random.fold_in(key, state["step"]), state["step"] + 1
        params = _gathered(m, state["params"])
        if parts == 1:
            grads, sums = gradient(params, frozen, batch, rng)
        else:
            split = jax.tree.map(functools.partial(_split, m, parts), batch)

            def add(total: Any, part: tuple[Tree, Array]) -> tuple[Any, None]:
                made = gradient(params, frozen, *part)
                return jax.tree.map(jnp.add, total, made), None

            first = (jax.tree.map(lambda x: x[0], split), jax.random.fold_in(rng, 0))
            shapes = jax.eval_shape(lambda p: gradient(params, frozen, *p), first)
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(parts))
            (grads, sums), _ = jax.lax.scan(add, zero, (split, rngs))
        # Gradients of the sum; the mean is taken once, over the tokens of the whole batch.
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["tokens"], 1.0), grads)
        sums["grad_norm"] = optax.tree.norm(grads)
        good, seen = guard.guard(
            config, state["guard"], sums["loss"], sums["tokens"], sums["grad_norm"], number
        )
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        made = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
        # A bad step leaves everything as it was, at no cost: the choice is part of the update.
        kept = {
            k: jax.tree.map(functools.partial(jnp.where, good), made[k], state[k]) for k in made
        }
        # Held for good, so that the host finds the state from before the bad step.
        held = ~good & (config.train.on_bad_step == "stop")
        sums |= {"bad_step": seen["bad_step"], "skipped": seen["skipped"]}
        return {**kept, "step": jnp.where(held, state["step"], number), "guard": seen}, sums

    if m.placement is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(placed, m.placement.whole))


def _gathered(m: Model, params: Tree) -> Tree:
    """Trained parameters as a step computes with them: no longer cut over `data`."""
    if m.placement is None:
        return params
    axes = model.logical_axes(m)
    where = {k: m.placement.computed(axes[k], v) for k, v in params.items()}
    return jax.lax.with_sharding_constraint(params, where)


def _split(m: Model, parts: int, x: Array) -> Array:
    """[T, ...] -> [parts, T / parts, ...]; each device's tasks are cut, and none moves."""
    x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    if m.placement is None:
        return x
    return jax.lax.with_sharding_constraint(x, m.placement.microbatches)


def place_state(m: Model, optimizer: optax.GradientTransformation, params: Tree) -> Any:
    """The shardings of a training state, from (the shapes of) the trained parameters."""
    placement = m.placement
    assert placement is not None
    placed = model.placements(m)
    where = {branch: placed[branch] for branch in params}
    opt_shapes = jax.eval_shape(optimizer.init, params)
    return {
        "params": where,
        "opt_state": sharding.of_state(opt_shapes, params, where, placement),
        "step": placement.whole,
        "guard": jax.tree.map(lambda _: placement.whole, jax.eval_shape(guard.start)),
    }


def start_state(
    optimizer: optax.GradientTransformation, trained: Tree, placed: Any = None
) -> State:
    """The state at step 0; ``placed`` as from ``place_state``, None on one device."""
    init = jax.jit(optimizer.init, out_shardings=placed and placed["opt_state"])
    state: State = {
        "params": trained,
        "opt_state": init(trained),
        "step": jnp.zeros((), jnp.int32),
        "guard": guard.start(),
    }
    return sharding.put(state, placed) if placed else state


def train(config: ConfigDict, folder: str | Path, profile: bool = False) -> dict[str, float]:
    """Run one stage to ``train.steps``, resuming from the workdir's newest checkpoint.

    Every process of a run calls it. ``profile``: trace a few steps (``watch.Profile``). Returns the
    last metrics. Raises UserError for what the user can mend, FloatingPointError when the loss is
    no longer finite (nothing non-finite is saved), PreemptedError when the machine is taken away
    and the run is saved.
    """
    folder = files.as_path(folder)
    # ------------------------------------------------------------ model, data, optimizer, state
    placement = sharding.make_placement(config.mesh)
    sharding.check_batch(config.data.tasks_per_batch, config.train.microbatches, placement)
    m, backbone, trained, frozen = model.start(config, placement)
    if not m.choice.trains:
        raise UserError(
            f"system={config.system} has nothing to train; evaluate it with "
            "`hyper-t5 evaluate`, or choose another system"
        )
    # Hosts may see a new folder at different times; one of them decides.
    resumes = distributed.agree("resume", checkpoint.latest_step(folder)) is not None
    if config.peft.init and not resumes:
        trained = tuning.start(config, m, backbone, trained)
    optimizer = optim.make_optimizer(config.optimizer, config.train.steps)
    placed = place_state(m, optimizer, trained)
    state = start_state(optimizer, trained, placed)
    meta = model.meta_of(config, backbone)
    if resumes:
        state = _resume(folder, state, backbone, m)
    first = int(state["step"])
    distributed.say(
        f"{config.stage}: system {config.system}, trains {model.count(trained):,} parameters, "
        f"{model.count(frozen):,} are frozen; steps {first} to {config.train.steps} on "
        f"{sharding.describe(placement)}"
    )
    for name, size in placement.uneven(model.logical_axes(m), model.shapes_of(m)).items():
        distributed.say(
            f"warning: mesh.model={config.mesh.model} does not divide {name}={size}, which is "
            "whole on every device; expect more traffic"
        )
    if first >= config.train.steps:
        _keep_backbone(folder, m, backbone, state["params"])
        return {}
    sampler = data.make_sampler(config, backbone.vocab, m.choice.layout)
    if sampler.names:
        tuning.check_slots(m, len(sampler.names))
        meta["tasks"] = list(sampler.names)
    step: Any = make_step(m, optimizer, config, placed)
    key, share = jax.random.key(config.seed), sharding.share_of(placement)

    # --------------------------------------------------------------------------------- the loop
    batches = data.train_batches(sampler, first, share)
    last: dict[str, float] = {}
    waiting: list[tuple[int, dict[str, Array]]] = []  # sums of steps that no line has told yet
    sums: dict[str, Array] = {}
    with (
        _Reporter(config, folder, first) as reporter,
        checkpoint.Checkpointer(folder, config.train.keep, config.train.keep_period) as saver,
        watch.Profile(folder, first, profile and distributed.is_first()) as tracing,
    ):
        for index in range(first, config.train.steps):
            with tracing.step(index, sums):
                with reporter.times.part("data", ahead=sums):
                    mine = next(batches)
                batch = sharding.put_batch(mine, placement)
                if index == first:
                    reporter.know_flops(m, batch)
                    step = step.lower(state, frozen, batch, key).compile()
                    # Hosts compile at different speeds; gloo waits half a minute for the others.
                    distributed.barrier("compiled")
                state, sums = step(state, frozen, batch, key)
            reporter.count(mine, share[1])
            # Sums are fetched only when a line is due, so that the device never waits for the host.
            waiting.append((index + 1, sums))
            taken = distributed.preempted(index + 1)
            save = taken or index + 1 == config.train.steps
            save = save or (index + 1) % config.train.save_every == 0
            if save or (index + 1) % config.train.log_every == 0:
                fetched = [(number, jax.device_get(made)) for number, made in waiting]
                waiting.clear()
                last = reporter.write(index + 1, fetched, sampler.stats)
                _stop_at_bad_step(config, folder, fetched, sampler, share, state, meta)
            with reporter.times.part("save"):
                saver.poll()
                if save:
                    if not _is_finite(state):
                        raise _not_finite("a parameter or a moment is not finite", index + 1)
                    saver.save(index + 1, state, meta)
            if taken:
                saver.wait()
                raise PreemptedError(f"preempted; saved at step {index + 1} in {folder}")
    _keep_backbone(folder, m, backbone, state["params"])
    return last


class _Reporter:
    """What a run says of itself: lines of progress, metrics.jsonl and TensorBoard, on process 0."""

    def __init__(self, config: ConfigDict, folder: epath.Path, first: int) -> None:
        self._config, self._flops, self._skipped = config, 0.0, 0
        self._rate = optim.schedule(config.optimizer, config.train.steps)
        self._began = time.monotonic()
        self._writer = metrics.Writer(folder, first) if distributed.is_first() else None
        self._progress = metrics.Progress(config.train.steps, utilisation=self._utilisation)
        self.times = watch.Times()

    def know_flops(self, m: Model, batch: Tree) -> None:
        """Count the model FLOPs of a step, where the peak of the devices is known."""
        if self._writer is not None and watch.utilisation(1.0, 1.0) is not None:
            self._flops = cost.train_flops(m, self._config, batch, loss_sums)

    def _utilisation(self, seconds: float) -> float | None:
        return watch.utilisation(self._flops, seconds) if self._flops else None

    def count(self, mine: data.Batch, shares: int) -> None:
        """A step was started on this share; the others are taken to hold as much."""
        self._progress.count(data.examples_of(mine) * shares, data.real_tokens(mine) * shares)
        self.times.step()

    def write(
        self, step: int, fetched: list[tuple[int, dict[str, Any]]], stats: Counter[str]
    ) -> dict[str, float]:
        """The means over the steps since the last line."""
        values = _mean_of([made for _, made in fetched])
        if self._writer is None:
            return values
        spent = self.times.report()
        line = {k: values[k] for k in ("loss", "accuracy", "exact")}
        values |= self._progress.report(step, line, spent)
        if values["skipped"] > self._skipped:
            bad = int(fetched[-1][1]["bad_step"])
            print(f"updates skipped so far: {values['skipped']:.0f}, the last at step {bad}")
            self._skipped = int(values["skipped"])
        values |= watch.device_memory()
        values["learning_rate"] = float(self._rate(step - 1))
        values["seconds"] = time.monotonic() - self._began
        # A copy: the thread that makes batches counts in it.
        self._writer.write(step, values | {f"data/{k}": v for k, v in dict(stats).items()})
        return values

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.__exit__(*error)


def _stop_at_bad_step(
    config: ConfigDict,
    folder: epath.Path,
    fetched: list[tuple[int, dict[str, Any]]],
    sampler: data.Sampler,
    share: tuple[int, int],
    state: State,
    meta: dict[str, Any],
) -> None:
    """FloatingPointError where a step was bad, once all that it was made of is saved for replay."""
    bad = int(fetched[-1][1]["bad_step"])
    if config.train.on_bad_step == "skip" or bad < 0:
        return
    sums = dict(fetched)[bad]
    loss, norm = float(sums["loss"] / max(sums["tokens"], 1.0)), float(sums["grad_norm"])
    numbers = {"loss": loss, "grad_norm": norm}
    found = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
    reason = found[0] if found else f"loss is {loss:.4g}, over train.spike times its running mean"
    batch = sampler.batch(bad - 1, *share)
    mine = [sampler.names[i] for i in batch["tasks"]] if sampler.names else []
    parts = dict(distributed.gather("replay", [share[0], mine]))
    tasks = [name for _, part in sorted(parts.items()) for name in part]

    def save_state(place: epath.Path) -> None:
        # A workdir like any other: training in it makes the bad step again.
        workdir.check_resume(place, config)
        unset = jnp.full_like(state["guard"]["bad_step"], -1)
        before = {**state, "guard": {**state["guard"], "bad_step": unset}}
        checkpoint.save(place, int(state["step"]), before, meta)

    record = watch.Replay(bad, reason, config.seed, tasks, loss, norm, config.to_dict(), batch)
    saved = watch.save_replay(folder, record, save_state, *share)
    raise _not_finite(reason, bad, tasks, saved)


def _mean_of(sums: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps since the last line, from their sums on the host."""
    total = {k: float(np.sum([s[k] for s in sums], dtype=np.float64)) for k in sums[0]}
    tokens, rows = max(total["tokens"], 1.0), max(total["rows"], 1.0)
    return {
        "loss": total["loss"] / tokens,
        "z_loss": total["z_loss"] / tokens,
        "accuracy": total["correct"] / tokens,
        "exact": total["exact"] / rows,
        "grad_norm": total["grad_norm"] / len(sums),
        "skipped": float(sums[-1]["skipped"]),
        **(
            {"adapter_norm": total["adapter_norm"] / total["emitted"]} if "emitted" in total else {}
        ),
    }


@jax.jit
def _is_finite(state: State) -> Array:
    """Whether all of a state is; a finite loss says nothing of the update made from it."""
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _not_finite(
    what: str, step: int, tasks: Sequence[str] = (), saved: epath.Path | None = None
) -> FloatingPointError:
    names = sorted(set(tasks))
    where = f" on {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}" if names else ""
    replay = f"; what it was made of is in {saved}" if saved else ""
    return FloatingPointError(
        f"{what} at step {step}{where}{replay}; the checkpoints before it are good: lower "
        "optimizer.learning_rate, set optimizer.clip_norm or train.on_bad_step=skip, and start "
        "again"
    )


def _resume(folder: epath.Path, state: State, backbone: model.Backbone, m: Model) -> State:
    meta = checkpoint.read_meta(folder)
    digest = backbone.digest if BACKBONE not in m.choice.trains else None
    weights.check_compatible(
        backbone.sizes,
        backbone.vocab.identity(),
        meta.get("backbone", {}),
        digest=digest,
        where=f"checkpoint in {folder}",
    )
    state, _ = checkpoint.restore(folder, None, state)
    return state


def _keep_backbone(folder: epath.Path, m: Model, backbone: model.Backbone, trained: Tree) -> None:
    """A run that trained a backbone leaves it as a folder that ``backbone.path`` can name."""
    if BACKBONE in m.choice.trains:
        params = sharding.fetch(trained[BACKBONE])
        if distributed.is_first():
            where = folder / model.BACKBONE_FOLDER
            weights.save_native(where, backbone.sizes, params, backbone.vocab)
        distributed.barrier("backbone")
