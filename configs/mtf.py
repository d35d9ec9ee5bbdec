"""Stage 2, multi-task fine-tuning: a hypermodel learns on episodes of many tasks.

In an episode the hypermodel reads a task's instruction and examples and emits adapters, with which
the frozen backbone processes other inputs of the task. HyperT5-Prefix on Super-NaturalInstructions,
conditioned on the definition and two examples ("Def+2Pos"):

    hyper-t5 train --workdir runs/mtf \
        --config configs/mtf.py:system=hyper_prefix,size=large,mixture=sni \
        --gin.backbone.path=t5_1_1_lm100k_large --gin.data.vocab=spiece.model \
        --gin.data.sni_dir=natural-instructions --gin.hypermodel.path=runs/hyperpretrain
    hyper-t5 evaluate --workdir runs/mtf

Published ROUGE-L on the 119 test tasks, from LM-adapted checkpoints: large 42.0, XL 45.0 and 48.6
(two later papers; probably LoRA, and Prefix); the text concatenated to a fine-tuned model's input:
large 47.6, XL 54.0. Arguments:
    system   hyper_prefix | hyper_lora; with _plus the backbone is trained too (HyperTuning+).
             Other systems have their own config, or are in baselines.py
    size     small | base | large | xl | xxl, of backbone and hypermodel
    mixture  sni: Super-NaturalInstructions in --gin.data.sni_dir | p3: T0's training tasks in
             --gin.data.p3_dir | metaicl: --gin.data.metaicl_setting in --gin.data.metaicl_dir |
             synthetic: the embedded suite
The conditioning is --gin.data.variant: def, def_pos_1, def_pos_2, pos_16.

Phang et al. (2022, HyperTuning, arXiv 2211.12485) published no code and few hyperparameters. The
values below are those of the nearest systems with published ones:
    [HyperLoRA]  Table 5, the stages on Super-NaturalInstructions and on P3
    [Tk]         Tk-Instruct, the usual training and test rows
    [MetaICL]    16 examples, 256 tokens each and 1,024 in all
"""

from __future__ import annotations

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.utils.overrides import choose

LENGTHS = {  # of what the hypermodel reads, of inputs, of targets
    "sni": (2048, 2048, 512),  # [HyperLoRA]; [Tk] has 1024 in all and 128
    "p3": (1024, 384, 128),  # [HyperLoRA]
    "metaicl": (1024, 256, 128),  # [MetaICL]; the longest answers are cut at ours
    "synthetic": (128, 64, 32),
}
BATCHES = {"sni": (96, 32_256), "p3": (128, 130_000)}  # and steps, [HyperLoRA]; ours for others


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; ``arg`` is explained in the docstring of the module."""
    args = config_lib.parse_args(arg, system="hyper_prefix", size="large", mixture="sni")
    choose("mixture", args.mixture, LENGTHS)
    config = config_lib.defaults()
    config.stage = "mtf"
    config.system = args.system
    config_lib.use_preset(config, args.size)
    config.model.dtype = "bfloat16"
    config.model.remat = "minimal"
    config.backbone.dtype = "bfloat16"  # frozen: no small update is lost by it

    # As in configs/hyperpretrain.py, or the hypermodel that it made does not fit.
    config.adapter.lora_rank = 16  # [HyperLoRA]
    config.adapter.lora_alpha = 8.0  # [HyperLoRA]'s table; its text says 0.8
    config.adapter.prefix_length = 32  # ours: the paper's length could not be found

    config_lib.use_mixture(config, args.mixture)
    data = config.data
    data.hyper_length, data.input_length, data.target_length = LENGTHS[args.mixture]
    data.tasks_per_batch, config.train.steps = BATCHES.get(args.mixture, (96, 30_000))
    # As published. The hypermodel runs once per task, so 24 tasks of 4 examples cost less, and
    # data.pack fills its rows with examples of the task that it has read.
    data.examples_per_task = 1

    config.train.log_every = 100
    config.train.save_every = 1000

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-5  # [HyperLoRA], [Tk]
    config.optimizer.schedule = "cosine"  # [HyperLoRA]; [Tk] is constant
    config.optimizer.warmup_steps = 500  # ours: not published

    config.eval.max_rows_per_task = 100  # [Tk]: the first 100 of each test task
    config.eval.max_decode_length = 128  # [Tk]
    config.eval.shots = 2
    return config
