"""Stage 3: parameter-efficient fine-tuning of each task's adapters, from generated or other ones.

Tune the adapter that a hypermodel generates for a task file (an instruction and a few examples),
export the tuned adapter, and evaluate it on the file's held-out rows:

    hyper-t5 train --config configs/peft.py:init=runs/mtf,task=task.json --workdir runs/tuned
    hyper-t5 adapt --workdir runs/tuned --task task.json --out my_adapter
    hyper-t5 evaluate --workdir runs/tuned

Backbone, lengths, and the adapters' kind and sizes are those of ``init``. Without ``task``, all
evaluation tasks of its run are tuned side by side, each on the rows that are not evaluated:

    hyper-t5 train --config configs/peft.py:init=runs/mtf --workdir runs/tuned
    hyper-t5 train --config configs/peft.py:init=runs/mtf,start=random --workdir runs/random

Arguments:
    init     a run's workdir (of a hypermodel; of shared_lora and the like; of an earlier tuning),
             or an adapter folder of `hyper-t5 adapt`, with --gin.backbone.path=
    start    generated | shared | tuned: the kind of init; random: PEFT's, in the sizes of init
    task     a task file, a folder of them, or a glob; their first 8 rows are evaluated and not
             trained on (--gin.eval.max_rows_per_task). A path with a comma is quoted:
             "configs/peft.py:task='a,b.json'"
    system   task_lora | task_prefix | task_bottleneck; not with init, which determines it
    size, mixture  as in mtf.py; not with init
"""

from __future__ import annotations

from types import SimpleNamespace

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.configs import baselines
from hyper_t5.data.task_rows import task_paths
from hyper_t5.training import peft_init
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import choose
from hyper_t5.utils.paths import expand

STARTS = ("generated", "shared", "tuned", "random")
# The best of docs/results.md from generated starts (bottlenecks: ours).
STEPS = 80
LEARNING_RATES = {"task_lora": 1e-3, "task_prefix": 1e-2, "task_bottleneck": 1e-3}


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; ``arg`` is explained in the docstring of the module."""
    args = config_lib.parse_args(arg, init="", start="", task="", system="", size="", mixture="")
    args.init, args.task = expand(args.init), expand(args.task)
    choose("start", args.start or "random", STARTS)
    config = _from_init(args) if args.init else _from_nothing(args)
    config.data.pack = False
    config.eval.max_rows_per_task = config.eval.max_rows_per_task or 50
    if args.task:
        config.data.mixture, config.data.task_files, config.data.store = "task_files", args.task, ""
        config.eval.mixture = config.eval.split = ""
        config.eval.max_rows_per_task = 8
        config.eval.shots = config.data.shots[1]  # as many as `adapt` shows
        config.adapter.task_slots = len(task_paths(args.task))
    elif not config.adapter.task_slots:
        config.adapter.task_slots = 128  # Super-NaturalInstructions has 119 test tasks
    at_once = min(config.adapter.task_slots, 32)
    config.data.tasks_per_batch = at_once
    config.data.examples_per_task = max(4, 16 // at_once)
    config.train.microbatches = 1
    # Not the machines that init was trained on; a task or two fill no more than one device.
    config.mesh.update(slices=1, data=1 if args.task else -1, model=1)
    config.train.steps, config.train.log_every, config.train.save_every = STEPS, 10, STEPS
    config.optimizer = config_lib.defaults().optimizer
    config.optimizer.learning_rate = LEARNING_RATES[config.system]
    config.optimizer.clip_norm = 0.0  # a norm over all tasks would make one depend on the others
    return config


def _from_init(args: SimpleNamespace) -> ConfigDict:
    config, kind = peft_init.config_for(args.init)
    for name in ("size", "mixture"):
        if getattr(args, name):
            raise UserError(f"{name}={getattr(args, name)}: init={args.init} decides it; leave it")
    if args.system not in ("", config.system):
        raise UserError(f"system={args.system}: init={args.init} is of {config.system}; leave it")
    if args.start == "random":
        config.peft.init = ""
    elif args.start not in ("", kind):
        raise UserError(f"start={args.start}: what init={args.init} holds is {kind}")
    return config


def _from_nothing(args: SimpleNamespace) -> ConfigDict:
    if args.start not in ("", "random"):
        raise UserError(f"start={args.start} needs init=DIR, a run or an adapter folder")
    system = choose("system", args.system or "task_lora", LEARNING_RATES)
    size, mixture = args.size or "large", args.mixture or "sni"
    return baselines.get_config(f"system={system},size={size},mixture={mixture}")
