"""Validation while training: loss and headline metric on a fixed sample of rows.

The rows are held out of training tasks (`pipeline.hold_out`), or those of ``train.eval_split``.
They are the same at each validation, under the same conditioning, so that every validation after
the first runs compiled programs. Loss is the mean over target tokens, EOS included, of the negative
log-probability, without label smoothing and z-loss; where a row has several references, of its
first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hyper_t5 import model as model_lib
from hyper_t5 import pipeline
from hyper_t5.evaluation import aggregation, evaluate
from hyper_t5.evaluation.evaluate import EvalRequest
from hyper_t5.evaluation.rank_classification import RowScores, rank_task
from hyper_t5.model import Tree
from hyper_t5.parallel import sharding
from hyper_t5.runs import Backbone, Run

HELD_OUT_ROWS = "validation"  # the split's name where rows of training tasks are held out


class Validator:
    """Validation of one training run, every ``train.eval_every`` steps; nothing where that is 0.

    Raises:
      UserError: as `pipeline.validation_tasks` and `evaluate.build_requests`.
    """

    def __init__(
        self,
        config: ConfigDict,
        m: model_lib.Model,
        backbone: Backbone,
        frozen: Tree,
        sampler: pipeline.Sampler,
        best_loss: float = math.inf,
    ) -> None:
        self._every, self._best = config.train.eval_every, best_loss
        self._requests: list[EvalRequest] = []
        self._keep_best = config.train.keep_best
        self._run = Run("", _eval_config(config), m, backbone, frozen, tasks=tuple(sampler.names))
        if self._every:
            split = config.train.eval_split or HELD_OUT_ROWS
            mixture = (config.train.eval_split and config.eval.mixture) or config.data.mixture
            tasks = pipeline.validation_tasks(config, sampler, backbone.vocab)
            self._requests = evaluate.build_requests(self._run, {split: (mixture, tasks)})

    def at(self, step: int, trained: Tree) -> tuple[dict[str, float], bool]:
        """Return the scores after a step, and whether to keep it as the best; {} where none is due.

        Every process of a run calls it.
        """
        if not self._every or step % self._every:
            return {}, False
        scores = validate(self._run, self._requests, trained)
        is_best = self._keep_best and scores["loss"] < self._best
        if is_best:
            self._best = scores["loss"]
        return scores, is_best


def validate(run: Run, requests: Sequence[EvalRequest], trained: Tree) -> dict[str, float]:
    """Return ``loss`` and the benchmark's headline metric, a mean over tasks.

    Args:
      run: with the frozen parameters.
      requests: the rows of each task, all of one split.
      trained: the trained parameters, as they are stored between steps.
    """
    if run.model.placement:
        axes = model_lib.logical_axes(run.model)
        shardings = {
            k: run.model.placement.compute_sharding(axes[k], v) for k, v in trained.items()
        }
        trained = sharding.device_put(trained, shardings)
    run = dataclasses.replace(run, params={**run.params, **trained})
    rows: list[dict[str, Any]] = []
    scores: list[RowScores] = []
    for request, adapters, number in zip(
        requests,
        evaluate.task_adapters(run, requests),
        evaluate.task_numbers(run, requests),
        strict=True,
    ):
        outputs = evaluate.predict_rows(run, request, adapters, number)
        records = evaluate.row_records(request)
        rows += [record | output for record, output in zip(records, outputs, strict=True)]
        first = tuple((references[0],) for references in request.task.references)
        task = dataclasses.replace(request.task, options=first)
        scores += rank_task(run, task, adapters, number)
    [split] = evaluate.score(run.config, requests, rows)[0]["splits"].values()
    metric = aggregation.headline(split)
    by_task = [task_scores[metric] for task_scores in split["per_task"].values()]
    loss = -sum(s.log_probs[0] for s in scores) / sum(s.tokens[0] for s in scores)
    return {"loss": loss, metric: float(np.mean(by_task))}


def _eval_config(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.eval.max_rows_per_task = config.eval.batch = config.train.eval_rows
    return config
