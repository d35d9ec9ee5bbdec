"""HINT (Ivison et al. 2023, arXiv 2212.10315): both stages, as its code configures them.

The backbone, T5 1.1 adapted to language modelling for 100,000 steps, is trained together with the
hypermodel, so the second stage starts from the backbone and the hypermodel of the first:

    hyper-t5 train --workdir runs/hint_pretrain \
        --config configs/hint.py:size=xl,stage=hyperpretrain \
        --gin.backbone.path=t5_1_1_lm100k_xl --gin.data.vocab=spiece.model \
        --gin.data.text=c4.jsonl.xz
    hyper-t5 train --workdir runs/hint --config configs/hint.py:size=xl,mixture=sni \
        --gin.backbone.path=runs/hint_pretrain --gin.hypermodel.path=runs/hint_pretrain \
        --gin.data.sni_dir=natural-instructions
    hyper-t5 evaluate --workdir runs/hint

Published ROUGE-L on the 119 test tasks of Super-NaturalInstructions, definition (and two examples):
base 33.3 (41.8), xl 47.2 (53.2), xxl 51.1 (56.4). Arguments:
    size     base | large | xl | xxl, as published; small
    stage    hyperpretrain: text cut in three: conditioning, input, target
             mtf: many tasks
    mixture  sni | p3 | synthetic
The conditioning is --gin.data.variant: def or def_pos_2; for P3 def, the masked prompts of
--gin.data.p3_prompts. The hyperparameters are those of the gin files and scripts of
allenai/hyper-task-descriptions.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.adapters import ATTENTION_SITES
from hyper_t5.utils.overrides import choose

SIZES = {  # bottleneck, prefix
    "small": (8, 7),
    "base": (64, 30),
    "large": (8, 7),
    "xl": (512, 30),
    "xxl": (512, 30),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; ``arg`` is explained in the docstring of the module."""
    args = config_lib.parse_args(arg, size="xl", stage="mtf", mixture="sni")
    choose("size", args.size, SIZES)
    pretrain = args.stage == "hyperpretrain"
    config = config_lib.defaults()
    config.stage, config.system = args.stage, "hint"
    config_lib.use_preset(config, args.size)
    config.model.dtype = "bfloat16"
    config.model.remat = "minimal"
    config.model.dropout_rate = 0.0 if pretrain else 0.1

    size, config.adapter.prefix_length = SIZES[args.size]
    config.adapter.bottleneck_sizes = (size,)
    config.adapter.prefix_sites = ATTENTION_SITES
    config.adapter.position_bias = "zero"

    config_lib.use_mixture(config, args.mixture)
    config.data.tasks_per_batch = 2048 if args.mixture == "p3" and not pretrain else 1024
    config.data.examples_per_task = 1  # as published; 256 tasks of 4 would generate a quarter
    if pretrain:
        config.data.text = "synthetic" if args.mixture == "synthetic" else ""
        config.data.text_split = "three_way"
        config.data.chunk_length = 512
        config.data.hyper_length = config.data.input_length = config.data.target_length = 512
    else:
        config.data.hyper_length, config.data.input_length = 1024, 1024
        config.data.target_length = 256
        if args.mixture == "p3":
            config.data.variant, config.data.hyper_length = "def", 512

    # For P3 ours, as many as the baselines of HINT's authors had; theirs for HINT is not published.
    config.train.steps = 10_000 if pretrain else 20_000 if args.mixture == "p3" else 1_000
    config.train.save_every = 500 if pretrain else 100

    config.optimizer.name = "adafactor"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.clip_norm = 0.0
    # T5X's count of steps. Published, the backbone's group has 0, for T5's own second moments are
    # restored with it; here they start as fresh as the hypernetwork's.
    config.optimizer.first_step = 1_100_000
    config.optimizer.hypermodel_step_offset = 1_100_000
    config.optimizer.backbone_step_offset = 1_100_000

    config.eval.max_rows_per_task = 100
    config.eval.max_decode_length = 256
    config.eval.shots = 2
    return config
