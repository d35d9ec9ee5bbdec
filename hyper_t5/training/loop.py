"""The training loop of every stage: resume, steps, metrics, checkpoints, preemption."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyper_t5 import flops, model, pipeline, runs
from hyper_t5.checkpoints import checkpoint, workdir
from hyper_t5.data import batch as batch_lib
from hyper_t5.data.batch import Batch
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.hypermodels import BACKBONE
from hyper_t5.model import Model, Tree
from hyper_t5.parallel import distributed, sharding
from hyper_t5.runs import Backbone
from hyper_t5.training import metrics, optim, peft_init, profiling, replay
from hyper_t5.training import step as step_lib
from hyper_t5.training.step import State
from hyper_t5.training.validation import Validator
from hyper_t5.utils import files
from hyper_t5.utils.errors import PreemptedError, UserError

Array = jax.Array
Sums = dict[str, Any]  # the sums and counts of one step


class _Training(NamedTuple):
    """State of the training loop."""

    config: ConfigDict
    folder: epath.Path
    model: Model
    backbone: Backbone
    frozen: Tree
    state: State
    step: Any  # the jitted training step
    meta: dict[str, Any]  # of checkpoints
    first: int  # the step to start from


def train(config: ConfigDict, folder: str | Path, profile: bool = False) -> dict[str, float]:
    """Train to ``train.steps``, resuming from the workdir's newest checkpoint.

    Every process of a run calls it.

    Args:
      config: of the run, validated.
      folder: the workdir.
      profile: trace a few steps (`profiling.Profile`).

    Returns:
      The last metrics.

    Raises:
      UserError: invalid config or data.
      FloatingPointError: the loss is not finite; nothing non-finite is saved.
      PreemptedError: preempted, and the run is saved.
    """
    run = _set_up(config, files.as_path(folder))
    if run.first >= config.train.steps:
        runs.export_backbone(run.folder, run.model, run.backbone, run.state["params"])
        return {}
    sampler = pipeline.make_sampler(config, run.backbone.vocab, run.model.system.layout)
    if sampler.names:
        peft_init.check_slots(run.model, len(sampler.names))
        run.meta["tasks"] = list(sampler.names)
    if isinstance(sampler, EpisodeSampler):
        run.meta["data"] = pipeline.data_digest(sampler.tasks)
        if run.first:
            _check_data(run)
    state, last = _run_steps(run, sampler, profile)
    runs.export_backbone(run.folder, run.model, run.backbone, state["params"])
    return last


def _check_data(run: _Training) -> None:
    """Raise UserError where a resumed run has other tasks or rows than its checkpoint."""
    stored = checkpoint.read_meta(run.folder)
    if stored.get("data", run.meta["data"]) != run.meta["data"]:
        c = run.config.data
        raise UserError(
            f"{run.folder}: the {len(run.meta['tasks'])} tasks of data.mixture={c.mixture} are not "
            "the tasks and rows that the run was trained on; restore the paths of its data, or use "
            "another --workdir"
        )


def _set_up(config: ConfigDict, folder: epath.Path) -> _Training:
    """Build the model, the optimizer and the state; restore the newest checkpoint if any."""
    placement = sharding.make_placement(config.mesh)
    sharding.check_batch(config.data.tasks_per_batch, config.train.microbatches, placement)
    m, backbone, trained, frozen = runs.init_run(config, placement)
    if not m.system.trains:
        raise UserError(
            f"system={config.system} has nothing to train; evaluate it with "
            "`hyper-t5 evaluate`, or choose another system"
        )
    # Processes may see a new folder at different times; one of them decides.
    resumes = distributed.broadcast("resume", checkpoint.latest_step(folder)) is not None
    if config.peft.init and not resumes:
        trained = peft_init.init_adapters(config, m, backbone, trained)
    optimizer = optim.make_optimizer(config.optimizer, config.train.steps)
    shardings = step_lib.state_shardings(m, optimizer, trained)
    state = step_lib.init_state(optimizer, trained, shardings)
    if resumes:
        by_digest = BACKBONE not in m.system.trains
        stored = checkpoint.read_meta(folder).get("backbone", {})
        backbone.check_matches(stored, f"checkpoint in {folder}", by_digest)
        state, _ = checkpoint.restore(folder, None, state)
    first = int(state["step"])
    steps = f"steps {first} to {config.train.steps}"
    if first > config.train.steps:
        steps = f"done at step {first}, so train.steps={config.train.steps} changes nothing"
    distributed.log(
        f"{config.stage}: system {config.system}, {model.count_parameters(trained):,} trained and "
        f"{model.count_parameters(frozen):,} frozen parameters; {steps} on "
        f"{sharding.describe_mesh(placement)}"
    )
    for name, size in placement.indivisible_axes(
        model.logical_axes(m), model.param_shapes(m)
    ).items():
        distributed.log(
            f"warning: mesh.model={config.mesh.model} does not divide {name}={size}, which is "
            "replicated; expect more traffic"
        )
    meta = runs.checkpoint_meta(config, backbone)
    step = step_lib.make_step(m, optimizer, config, shardings)
    return _Training(config, folder, m, backbone, frozen, state, step, meta, first)


def _run_steps(
    run: _Training, sampler: pipeline.Sampler, profile: bool
) -> tuple[State, dict[str, float]]:
    """Run the loop; return the state after it and the last metrics."""
    config, placement, state, step = run.config, run.model.placement, run.state, run.step
    assert placement is not None
    key, share = jax.random.key(config.seed), sharding.batch_share(placement)
    batches = pipeline.train_batches(sampler, run.first, share)
    best = distributed.broadcast("best", checkpoint.best_step(run.folder))
    validator = Validator(
        config, run.model, run.backbone, run.frozen, sampler, best[1] if best else math.inf
    )
    last: dict[str, float] = {}
    unlogged: list[tuple[int, Sums]] = []  # sums on the devices
    previous: Sums = {}
    sums: Sums = {}
    with (
        contextlib.ExitStack() as stack,
        _Reporter(config, run.folder, run.first) as reporter,
        _checkpointer(run) as saver,
        profiling.Profile(run.folder, run.first, profile and distributed.is_primary()) as profiler,
    ):
        for index in range(run.first, config.train.steps):
            with profiler.step(index, sums):
                with reporter.timer.part("data", ahead=sums):
                    local_batch = next(batches)
                batch = sharding.device_put_batch(local_batch, placement)
                if index == run.first:
                    reporter.count_flops(run.model, batch)
                    step = step.lower(state, run.frozen, batch, key).compile()
                    # Processes compile at different speeds; gloo waits half a minute for others.
                    distributed.barrier("compiled")
                    # From here on, SIGTERM saves a checkpoint; before, it ends the process.
                    stack.enter_context(distributed.catch_sigterm())
                # No more than two steps are in flight, so that SIGTERM is answered within two.
                jax.block_until_ready(previous)
                previous, (state, sums) = sums, step(state, run.frozen, batch, key)
            reporter.count(local_batch, share[1])
            # Sums are fetched only when a line is due, so that the device never waits for the host.
            unlogged.append((index + 1, sums))
            preempted = distributed.preempted(index + 1)
            save = preempted or index + 1 == config.train.steps
            save = save or (index + 1) % config.train.save_every == 0
            if save or (index + 1) % config.train.log_every == 0:
                fetched = [(number, jax.device_get(values)) for number, values in unlogged]
                unlogged.clear()
                last = reporter.write(index + 1, fetched, sampler.stats)
                _stop_at_bad_step(run, fetched, sampler, share, state)
            with reporter.timer.part("validate"):
                scores, is_best = validator.at(index + 1, state["params"])
                reporter.write_validation(index + 1, scores)
            with reporter.timer.part("save"):
                saver.poll()
                if save or is_best:
                    if not _is_finite(state):
                        raise _not_finite("a parameter or a moment is not finite", index + 1)
                    validated = {"validation": scores} if scores else {}
                    saver.save(index + 1, state, run.meta | validated)
            if preempted:
                saver.wait()
                raise PreemptedError(f"preempted; saved at step {index + 1} in {run.folder}")
    return state, last


def _checkpointer(run: _Training) -> checkpoint.Checkpointer:
    c = run.config.train
    return checkpoint.Checkpointer(run.folder, c.keep, c.keep_period, c.keep_best)


class _Reporter:
    """Progress lines, metrics.jsonl and TensorBoard, on process 0."""

    def __init__(self, config: ConfigDict, folder: epath.Path, first: int) -> None:
        self._config, self._flops, self._skipped = config, 0.0, 0
        self._rate = optim.schedule(config.optimizer, config.train.steps)
        self._start = time.monotonic()
        self._writer = metrics.Writer(folder, first) if distributed.is_primary() else None
        self._progress = metrics.Progress(config.train.steps, utilisation=self._utilisation)
        self.timer = profiling.StepTimer()

    def count_flops(self, m: Model, batch: Tree) -> None:
        """Count the model FLOPs of a step, where the peak of the devices is known."""
        if self._writer is not None and profiling.utilisation(1.0, 1.0) is not None:
            self._flops = flops.train_flops(m, self._config, batch, step_lib.loss_sums)

    def _utilisation(self, seconds: float) -> float | None:
        return profiling.utilisation(self._flops, seconds) if self._flops else None

    def count(self, local_batch: Batch, processes: int) -> None:
        """Count a started step; other processes' batches are taken to hold as much as this one."""
        self._progress.count(
            batch_lib.example_count(local_batch) * processes,
            batch_lib.real_tokens(local_batch) * processes,
        )
        self.timer.step()

    def write(
        self, step: int, fetched: list[tuple[int, Sums]], stats: Counter[str]
    ) -> dict[str, float]:
        """Write the means over the steps since the last line, and return them."""
        values = _means([sums for _, sums in fetched])
        if self._writer is None:
            return values
        times = self.timer.report()
        line = {k: values[k] for k in ("loss", "accuracy", "exact")}
        values |= self._progress.report(step, line, times)
        if values["skipped"] > self._skipped:
            bad = int(fetched[-1][1]["bad_step"])
            print(f"updates skipped so far: {values['skipped']:.0f}, the last at step {bad}")
            self._skipped = int(values["skipped"])
        values |= profiling.device_memory()
        values["learning_rate"] = float(self._rate(step - 1))
        values["seconds"] = time.monotonic() - self._start
        # A copy: the thread that makes batches counts in it.
        self._writer.write(step, values | {f"data/{k}": v for k, v in dict(stats).items()})
        return values

    def write_validation(self, step: int, scores: dict[str, float]) -> None:
        """Write and print the scores of a validation."""
        if self._writer is not None and scores:
            self._writer.write(step, {f"validation/{k}": v for k, v in scores.items()})
            line = "  ".join(f"{k} {v:.4g}" for k, v in scores.items())
            print(f"step {step}: validation {line}", flush=True)

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.__exit__(*error)


def _means(sums: list[Sums]) -> dict[str, float]:
    """Return the means over steps, from their sums on the host."""
    total = {k: float(np.sum([s[k] for s in sums], dtype=np.float64)) for k in sums[0]}
    tokens, rows = max(total["tokens"], 1.0), max(total["rows"], 1.0)
    means = {
        "loss": total["loss"] / tokens,
        "z_loss": total["z_loss"] / tokens,
        "accuracy": total["correct"] / tokens,
        "exact": total["exact"] / rows,
        "grad_norm": total["grad_norm"] / len(sums),
        "skipped": float(sums[-1]["skipped"]),
    }
    if "emitted" in total:
        means["adapter_norm"] = total["adapter_norm"] / total["emitted"]
    return means


# ------------------------------------------------------------------------ bad steps


def _stop_at_bad_step(
    run: _Training,
    fetched: list[tuple[int, Sums]],
    sampler: pipeline.Sampler,
    share: tuple[int, int],
    state: State,
) -> None:
    """Raise FloatingPointError where a step was bad, once its batch and state are saved."""
    bad = int(fetched[-1][1]["bad_step"])
    if run.config.train.on_bad_step == "skip" or bad < 0:
        return
    sums = dict(fetched)[bad]
    loss, norm = float(sums["loss"] / max(sums["tokens"], 1.0)), float(sums["grad_norm"])
    numbers = {"loss": loss, "grad_norm": norm}
    reasons = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
    reason = reasons[0] if reasons else f"loss is {loss:.4g}, over train.spike times its mean"
    batch = sampler.batch(bad - 1, *share)
    local_tasks = [sampler.names[i] for i in batch["tasks"]] if sampler.names else []
    by_process = dict(distributed.gather("replay", [share[0], local_tasks]))
    tasks = [name for _, part in sorted(by_process.items()) for name in part]

    def save_state(folder: epath.Path) -> None:
        # A workdir like any other: training in it repeats the bad step.
        workdir.write_or_check_config(folder, run.config)
        unset = jnp.full_like(state["guard"]["bad_step"], -1)
        before = {**state, "guard": {**state["guard"], "bad_step": unset}}
        checkpoint.save(folder, int(state["step"]), before, run.meta)

    record = replay.Replay(
        bad, reason, run.config.seed, tasks, loss, norm, run.config.to_dict(), batch
    )
    saved = replay.save_replay(run.folder, record, save_state, *share)
    raise _not_finite(reason, bad, tasks, saved)


@jax.jit
def _is_finite(state: State) -> Array:
    """Return whether all of a state is finite; a finite loss does not imply a finite update."""
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _not_finite(
    reason: str, step: int, tasks: Sequence[str] = (), saved: epath.Path | None = None
) -> FloatingPointError:
    names = sorted(set(tasks))
    on = f" on {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}" if names else ""
    files_note = f"; its batch and state are in {saved}" if saved else ""
    return FloatingPointError(
        f"{reason} at step {step}{on}{files_note}; the checkpoints before it are good: lower "
        "optimizer.learning_rate, set optimizer.clip_norm or train.on_bad_step=skip, and run the "
        "command again"
    )
