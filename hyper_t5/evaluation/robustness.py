"""Robustness to perturbed conditioning: whether a run reads its task's text.

Every perturbation of `perturbations.PERTURBATIONS` and every number of shown examples is evaluated
as `hyper-t5 evaluate` does, over the same rows, and compared task by task with the unperturbed
condition. A model that is as good with another task's text ignores its conditioning.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyper_t5 import runs
from hyper_t5.checkpoints.steps import Step
from hyper_t5.data.templates import ConditioningRule, conditioning_rule
from hyper_t5.evaluation import evaluate, tables
from hyper_t5.evaluation.perturbations import PERTURBATIONS, Perturbation, identity, split_pools
from hyper_t5.evaluation.report_io import name_runs
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.parallel import distributed
from hyper_t5.runs import Run
from hyper_t5.scoring import bootstrap
from hyper_t5.tasks import benchmark_of
from hyper_t5.utils import files, plots
from hyper_t5.utils.errors import UserError

SHOTS = (0, 1, 2, 4, 8, 16)
EXAMPLES_SHOWN = 2  # for perturbed examples, where a config shows none
UNPERTURBED = "unchanged"


class Condition(NamedTuple):
    """A perturbation with a number of shown examples, and the condition it is compared with."""

    name: str
    perturbation: Perturbation
    shots: int
    base: str


class ConditionResult(NamedTuple):
    """The quality of each task (by 'split/task'), all predictions, and the mean examples shown."""

    quality: dict[str, float]
    predictions: list[str]
    shown: float


def robustness(
    workdirs: Sequence[str | Path],
    out: str | Path,
    overrides: Any = (),
    shots: Sequence[int] = SHOTS,
    metric: str = "",
    seed: int = 0,
    step: Step | None = None,
) -> dict[str, Any]:
    """Evaluate runs under perturbed conditioning; print tables and write OUT/robustness.json, .png.

    Predictions are cached in OUT/prediction_cache until all is complete, so that it is resumable.

    Args:
      workdirs: of the runs, opened one at a time.
      out: the folder to write.
      overrides: of the configs.
      shots: numbers of shown examples.
      metric: of tasks, the same for all; '' is each benchmark's headline metric.
      seed: of the perturbations.
      step: of the checkpoints; None is each run's newest.

    Returns:
      The content of robustness.json, on process 0; {} on the others.
    """
    reports, folder = [], files.as_path(out)
    cache = folder / "prediction_cache"
    for number, workdir in enumerate(workdirs):
        run = runs.open(workdir, overrides, on_mesh=True, step=step)
        results = evaluate_conditions(run, cache / str(number), shots, metric, seed)
        reports.append({"system": run.config.system, "workdir": run.workdir, **report(results)})
    if not distributed.is_primary():
        return {}
    content = {
        "seed": seed,
        "shots": list(shots),
        "metric": metric or "headline",
        "runs": reports,
    }
    for entry in reports:
        table = tables.aligned(tables.robustness_table(entry))
        print("\n".join(["", entry["workdir"], table, *entry["verdicts"]]))
    files.write_json(folder / "robustness.json", content)
    plot = plots.robustness(name_runs(reports), folder / "robustness.png")
    print(f"\n{folder / 'robustness.json'}\n{plot}")
    with files.as_os_error():
        cache.rmtree()
    return content


def conditions(config: ConfigDict, shots: Sequence[int]) -> list[Condition]:
    """Return all conditions, each after the one it is compared with."""
    rule, usual, nothing = _rule(config), _shots(config), Perturbation(identity, "nothing")
    fewest = 0 if rule.instruction else 1
    with_examples = usual or EXAMPLES_SHOWN
    counts = sorted({*(n for n in shots if n >= fewest), with_examples} - {usual})
    result = [Condition(UNPERTURBED, nothing, usual, UNPERTURBED)]
    result += [Condition(shots_name(n), nothing, n, UNPERTURBED) for n in counts]
    for name, perturbation in PERTURBATIONS.items():
        if perturbation.of == "instruction" and not rule.instruction:
            continue
        if perturbation.of == "examples" and with_examples != usual:
            base = shots_name(with_examples)
            result.append(Condition(name, perturbation, with_examples, base))
        else:
            result.append(Condition(name, perturbation, usual, UNPERTURBED))
    return result


def shots_name(shots: int) -> str:
    """Return the name of the condition with a number of examples."""
    return f"{shots} example{'' if shots == 1 else 's'}"


def _rule(config: ConfigDict) -> ConditioningRule:
    return conditioning_rule(config.data, SYSTEMS[config.system].layout)


def _shots(config: ConfigDict) -> int:
    """Return the number of examples that an evaluation shows."""
    return _rule(config).most if config.data.variant else int(config.eval.shots)


def _with_shots(config: ConfigDict, shots: int) -> ConfigDict:
    """Return the config of the same evaluation with another number of examples."""
    copy = config.copy_and_resolve_references()
    copy.eval.shots = shots
    if config.data.variant:
        parts = ["def"] if _rule(config).instruction else []
        parts += [f"pos_{shots}"] if shots else []
        copy.data.variant = "_".join(parts)
    return copy


def evaluate_conditions(
    run: Run,
    folder: epath.Path,
    shots: Sequence[int] = SHOTS,
    metric: str = "",
    seed: int = 0,
) -> dict[Condition, ConditionResult]:
    """Evaluate every condition; conditions that read the same are evaluated once.

    Args:
      run: an open run.
      folder: of the prediction caches, FOLDER/NUMBER for each condition.
      shots: as `robustness`.
      metric: as `robustness`.
      seed: as `robustness`.

    Returns:
      The results, on process 0; {} on the others.
    """
    digests: dict[Condition, str] = {}
    results: dict[str, ConditionResult] = {}
    splits = {
        split: (mixture, split_pools(tasks, run.config.eval.max_rows_per_task))
        for split, (mixture, tasks) in evaluate.load_splits(run).items()
    }
    for number, condition in enumerate(conditions(run.config, shots)):
        distributed.log(f"\n== {condition.name}")
        variant = dataclasses.replace(run, config=_with_shots(run.config, condition.shots))
        perturbed = {
            split: (mixture, condition.perturbation.apply(tasks, seed))
            for split, (mixture, tasks) in splits.items()
        }
        requests = evaluate.build_requests(variant, perturbed)
        digest = _requests_digest(requests)
        if digest not in digests.values():
            cache = evaluate.open_cache(variant, requests, folder / str(number))
            evaluate.predict(variant, requests, cache)
            if distributed.is_primary():  # the only process with all rows
                scored = evaluate.score(variant.config, requests, cache.rows())
                results[digest] = _result(*scored, metric)
        digests[condition] = digest
    return {c: results[digest] for c, digest in digests.items() if digest in results}


def _requests_digest(requests: Sequence[evaluate.EvalRequest]) -> str:
    """Return a digest of all that the model reads."""
    sha = hashlib.sha256()
    for request in requests:
        task = request.task
        for part in (task.name.encode(), task.hyper_ids.tobytes(), task.inputs.tobytes()):
            sha.update(part)
    return sha.hexdigest()


def _result(
    report: dict[str, Any], predictions: Sequence[dict[str, Any]], metric: str
) -> ConditionResult:
    quality, examples = {}, []
    mixtures = {row["split"]: row["mixture"] for row in predictions}
    for split, split_report in report["splits"].items():
        name = metric or benchmark_of(mixtures[split]).headline
        for task, scores in split_report["per_task"].items():
            if name not in scores:
                numbers = [key for key, value in scores.items() if isinstance(value, float)]
                raise UserError(f"--metric: task {task} has no {name}; it has {', '.join(numbers)}")
            quality[f"{split}/{task}"] = float(scores[name])
            examples.append(scores["examples_shown"])
    texts = [row["prediction"] for row in predictions]
    return ConditionResult(quality, texts, float(np.mean(examples)))


def report(results: dict[Condition, ConditionResult]) -> dict[str, Any]:
    """Return the report of a run: each condition beside its base, and the verdicts.

    Each condition has ``quality``, the mean over tasks; ``shown``, the mean number of examples; the
    ``difference`` to ``base`` with its paired ``interval`` over tasks; ``same_predictions``, the
    percentage of rows with the same prediction.
    """
    by_name = {condition.name: result for condition, result in results.items()}
    lines = {}
    for condition, result in results.items():
        base = by_name[condition.base]
        tasks, difference, interval = bootstrap.difference(_parts(result), _parts(base))
        pairs = zip(result.predictions, base.predictions, strict=True)
        lines[condition.name] = {
            "shots": condition.shots,
            "changed": condition.perturbation.of,
            "base": condition.base,
            "tasks": tasks,
            "shown": result.shown,
            "quality": bootstrap.ratio(_parts(result)),
            "difference": difference,
            "interval": interval,
            "same_predictions": 100 * float(np.mean([a == b for a, b in pairs])),
            "per_task": result.quality,
        }
    return {"conditions": lines, "verdicts": tables.verdicts(lines)}


def _parts(result: ConditionResult) -> bootstrap.UnitSums:
    return {task: (quality, 1.0) for task, quality in result.quality.items()}
