"""Baselines of the hypermodels, on the data of configs/mtf.py.

    hyper-t5 train --workdir runs/tk --config configs/baselines.py:system=concat,size=large \
        --gin.backbone.path=t5_1_1_lm100k_large --gin.data.vocab=spiece.model \
        --gin.data.sni_dir=natural-instructions
    hyper-t5 evaluate --workdir runs/tk

Published ROUGE-L on the 119 test tasks, definition and two examples: Tk-Instruct large 47.6, xl
54.0; no fine-tuning xl 13.6. Arguments:
    system   concat: multi-task fine-tuning with the text in front of the input (Tk-Instruct, T0,
                 MetaICL); none: the backbone as it is (evaluate --config, nothing to train)
             shared_lora | shared_prefix | shared_bottleneck: one learned adapter for all tasks
             task_lora | task_prefix | task_bottleneck: an adapter for each evaluation task, trained
                 on its rows that are not evaluated
    size     small | base | large | xl | xxl
    mixture  sni | p3 | metaicl | synthetic; concat reads Tk-Instruct's text, T0's prompts alone,
             MetaICL's 16 examples
"""

from __future__ import annotations

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.configs import mtf
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.utils.overrides import choose

BASELINES = [name for name, system in SYSTEMS.items() if system.kind != "generated"]


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; ``arg`` is explained in the docstring of the module."""
    args = config_lib.parse_args(arg, system="concat", size="large", mixture="sni")
    choose("system", args.system, BASELINES)
    kind = SYSTEMS[args.system].kind
    config = mtf.get_config(f"system={args.system},size={args.size},mixture={args.mixture}")
    config.adapter.prefix_sites = ("enc_self", "dec_self", "dec_cross")
    if args.system == "concat":  # Tk-Instruct: 2 epochs of 75,417 rows, 16 at a time
        config.data.input_length, config.data.concat_length = 1024, 1024
        config.data.target_length = 128
        if args.mixture == "sni":
            config.data.template = "tk_instruct"
        elif args.mixture == "p3":  # the prompts say the task themselves
            config.data.variant, config.data.use_instruction = "", False
            config.data.shots, config.eval.shots = (0, 0), 0
            config.data.target_length = 256
        elif args.mixture == "metaicl":
            config.data.input_length = 256
        config.data.tasks_per_batch = 16
        config.train.steps = 9_427
        config.optimizer.learning_rate = 5e-5
        config.optimizer.schedule = "constant"
        config.optimizer.warmup_steps = 0
    elif kind != "none":
        config.optimizer.learning_rate = 1e-3  # ours: learned adapters start without effect
    if kind == "per_task":
        config.stage = "peft"
        config.adapter.task_slots = 128  # 119 are evaluated
        config.data.tasks_per_batch, config.data.examples_per_task = 32, 4
        config.train.steps = 1_000
    return config
