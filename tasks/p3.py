"""P3 (Sanh et al. 2022, T0), from the SeqIO cache on the Hugging Face hub (bigscience/P3).

A task is a dataset with one prompt template, under its P3 name. T0's tasks in the folder form two
mixtures:

t0_train            all templates of T0's training datasets. Rates follow t-zero's
    t0/seqio_tasks/tasks.py: the number of examples; for a dataset with more than 500,000, each
    template has 500,000 / number of templates. Both numbers are those of the folder.
t0_eval_score_eval  ``<task>_score_eval`` of T0's held-out datasets, for rank classification:
    templates of the dataset's original task, by t-zero's rule. A row has its choices as
    ``options``, in order.

Text is ``inputs_pretokenized`` and ``targets_pretokenized``, encoded with our own vocabulary.

The hypermodel is conditioned on the prompt with its fields masked, from the file
``data.p3_prompts`` (`p3_prompts.read_prompts`), as in HINT (Ivison et al. 2023), or on examples of
the same template alone, as in HyperTuning (Phang et al. 2023). Examples are drawn from a task's own
rows, of held-out tasks too: the folder has no training rows of those (`data.eval_tasks`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etils import epath

from hyper_t5.data.batch import CONCAT
from hyper_t5.data.templates import conditioning_rule
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.tasks.dataset import TaskSet
from hyper_t5.tasks.p3_prompts import SCORE_EVAL, find_prompt, read_prompts
from hyper_t5.tasks.p3_records import (
    HELD_OUT,
    CachedTask,
    IncompleteTask,
    Policy,
    open_task,
    read_eval_task,
    read_train_task,
)
from hyper_t5.utils.errors import UserError

SPLITS = ("train", "validation")
MIXTURE_NAMES = {"train": "t0_train", "validation": "t0_eval_score_eval"}
MAX_EXAMPLES = 500_000  # of a dataset in the mixture, all its templates together

# Datasets as P3's task names begin, from t-zero's t0/datasets.csv: those of T0 (do_train and
# do_eval are BASE), not of T0+ and T0++.
TRAIN_DATASETS = (
    *("glue_mrpc", "glue_qqp", "paws_labeled_final", "kilt_tasks_hotpotqa", "wiki_qa"),
    *("adversarial_qa_dbidaf", "adversarial_qa_dbert", "adversarial_qa_droberta"),
    *("duorc_SelfRC", "duorc_ParaphraseRC", "ropes", "quoref", "cos_e_v1.11", "cosmos_qa"),
    *("dream", "qasc", "quail", "quarel", "quartz", "sciq", "social_i_qa", "wiki_hop_original"),
    *("wiqa", "amazon_polarity", "app_reviews", "imdb", "rotten_tomatoes", "yelp_review_full"),
    *("common_gen", "wiki_bio", "cnn_dailymail_3.0.0", "gigaword", "multi_news", "samsum"),
    *("xsum", "ag_news", "dbpedia_14", "trec"),
)
EVAL_DATASETS = (
    *("super_glue_wsc.fixed", "winogrande_winogrande_xl", "super_glue_cb", "super_glue_rte"),
    *("anli", "super_glue_copa", "story_cloze_2016", "hellaswag", "super_glue_wic"),
)
# Templates of held-out datasets that are not of the dataset's original task (promptsource's
# `original_task`); T0 does not evaluate on them.
NOT_ORIGINAL_TASK = (
    *("hellaswag_Open_ended_completion", "hellaswag_how_ends", "story_cloze_2016_Generate_Ending"),
    "hellaswag_Appropriate_continuation_Yes_or_No",
    "hellaswag_Reversed_appropriate_continuation_Yes_or_No",
    "winogrande_winogrande_xl_True_or_False",
)
# Counts among its dataset's templates but is in no mixture of t-zero: its cache is broken.
EXCLUDED_TASK = "gigaword_summarize_"
READERS = {"train": read_train_task, "validation": read_eval_task}


def load_rows(data_config: Any, split: str, vocab: Vocabulary) -> TaskSet:
    """Load T0's tasks of a split of ``data.p3_dir``.

    A row limit (``data.max_instances_per_task``) limits the rate too.

    Raises:
      UserError: no such folder or split, an incomplete task, or no prompts where ``data.variant``
        or ``data.use_instruction`` requires instructions.
    """
    del vocab
    c = data_config
    policy = Policy(c.on_bad_row, c.empty_targets, c.on_missing_task, c.cache_dir)
    prompts = _read_required_prompts(c)
    tasks, templates = find_tasks(c.p3_dir, split, policy.on_missing_task == "skip")
    instructions = dict.fromkeys(tasks, "")
    if prompts is not None:
        instructions = _match_prompts(prompts, tasks, c.p3_prompts, policy)
        tasks = {name: tasks[name] for name in instructions}
    readers = {
        name: functools.partial(READERS[split], task, policy, dataset_of(name), instructions[name])
        for name, task in tasks.items()
    }
    rates = None
    if split not in HELD_OUT:
        rates = train_rates({name: task.examples for name, task in tasks.items()}, templates)
        if limit := c.max_instances_per_task:
            rates = {name: min(rate, limit) for name, rate in rates.items()}
    files = [(*task[:-1], sorted(task.features), instructions[n]) for n, task in tasks.items()]
    signature = (policy, files, sorted(templates.items()))
    return TaskSet(MIXTURE_NAMES[split], readers, signature, rates)


def train_rates(examples: Mapping[str, int], templates: Mapping[str, int]) -> dict[str, float]:
    """Return the weight of each training task, by t-zero's rule.

    A dataset is as large as the largest of its tasks, because some templates skip rows.

    Args:
      examples: number of examples of each task, by name.
      templates: number of templates of each dataset, by name.
    """
    sizes: Counter[str] = Counter()
    for name, count in examples.items():
        sizes[dataset_of(name)] = max(sizes[dataset_of(name)], count)

    def rate(dataset: str, count: int) -> float:
        return float(MAX_EXAMPLES // templates[dataset] if sizes[dataset] > MAX_EXAMPLES else count)

    return {name: rate(dataset_of(name), count) for name, count in examples.items()}


def dataset_of(name: str, datasets: Sequence[str] = (*TRAIN_DATASETS, *EVAL_DATASETS)) -> str:
    """Return the dataset that a task's name begins with, or ''."""
    return next((dataset for dataset in datasets if name.startswith(f"{dataset}_")), "")


def find_tasks(
    p3_dir: str, split: str, skip_missing: bool = False
) -> tuple[dict[str, CachedTask], dict[str, int]]:
    """Return T0's tasks in a folder, by name, and each dataset's number of templates there.

    Args:
      p3_dir: folder of the cache, with or without its subfolder ``data``.
      split: 'train' or 'validation'.
      skip_missing: skip incomplete tasks, with a message.

    Raises:
      UserError: no such folder or split; none of T0's tasks; an incomplete task.
    """
    if split not in SPLITS:
        raise UserError(f"p3: split {split!r} is unknown; the splits are {', '.join(SPLITS)}")
    folder, names = _list_folder(p3_dir)
    held_out = split in HELD_OUT
    names = [name for name in names if name.endswith(SCORE_EVAL) == held_out]
    known = [n for n in names if dataset_of(n, EVAL_DATASETS if held_out else TRAIN_DATASETS)]
    if unknown := [n for n in names if n not in set(known) and not dataset_of(n)]:
        print(f"{folder}: skips {_summary(unknown)}: not of T0's datasets")
    if others := [name for name in known if name.removesuffix(SCORE_EVAL) in NOT_ORIGINAL_TASK]:
        print(f"{folder}: skips {_summary(others)}: not the original task of the dataset")
        known = [name for name in known if name not in others]
    tasks, incomplete = {}, []
    for name in known:
        if name == EXCLUDED_TASK:
            continue
        try:
            tasks[name] = open_task(folder / name, name, split)
        except IncompleteTask as error:
            if not skip_missing:
                raise
            incomplete.append(name)
            last_error = error
    if not tasks:
        kind = f"a held-out dataset (*{SCORE_EVAL})" if held_out else "a training dataset"
        raise UserError(f"{folder}: holds no task of {kind} of T0's; set data.p3_dir")
    if incomplete:
        print(f"{folder}: skips {_summary(incomplete)}: incomplete; the last: {last_error}")
    return tasks, dict(Counter(map(dataset_of, known)))


def _summary(names: Sequence[str]) -> str:
    return f"{len(names)} task(s), {names[0]}" + (" and others" if len(names) > 1 else "")


def _list_folder(p3_dir: str) -> tuple[Any, list[str]]:
    """Return the folder that holds the tasks' folders, and their names in order."""
    if not p3_dir:
        raise UserError(
            "data.p3_dir is empty: set the folder of bigscience/P3 that holds data/ or the tasks"
        )
    folder = epath.Path(p3_dir).expanduser()
    try:
        folder = folder / "data" if (folder / "data").is_dir() else folder
        return folder, sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"data.p3_dir={p3_dir}: cannot read the folder ({reason})") from None


def _read_required_prompts(data_config: Any) -> dict[str, str] | None:
    """Return the prompts, or None where tasks are conditioned on examples alone."""
    if not conditioning_rule(data_config, CONCAT).instruction:
        return None
    if not data_config.p3_prompts:
        variant = data_config.get("variant", "")
        setting = f"data.variant={variant!r}" if variant else "data.use_instruction=True"
        without = "data.variant='pos_16'" if variant else "data.use_instruction=False"
        raise UserError(
            f"p3: {setting} needs instructions, and data.p3_prompts is empty; set it to a file of "
            f"prompts with their fields masked, or set {without} to condition on examples alone"
        )
    return read_prompts(data_config.p3_prompts)


def _match_prompts(
    prompts: Mapping[str, str], tasks: Collection[str], file: str, policy: Policy
) -> dict[str, str]:
    """Return the prompt of each task; those without one raise, or are skipped."""
    matches = {task: find_prompt(prompts, task) for task in tasks}
    missing = [task for task, prompt in matches.items() if prompt is None]
    if missing and (policy.on_missing_task == "raise" or len(missing) == len(matches)):
        raise UserError(
            f"{file}: has no prompt of {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; add it, or set data.on_missing_task='skip'"
        )
    if missing:
        print(f"{file}: skips {_summary(missing)}: without a prompt")
    return {task: prompt for task, prompt in matches.items() if prompt is not None}
