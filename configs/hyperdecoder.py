"""Hyperdecoders (Ivison & Peters 2022, arXiv 2203.08304): GLUE, or extractive question answering.

The frozen T5 1.1 (adapted to language modelling) with learned adapters in the encoder and adapters
generated for each input in the decoder:

    python -m hyper_t5.tools.convert_glue --metaicl metaicl --p3 p3 --out glue   # or GLUE's files
    hyper-t5 train --workdir runs/glue --config configs/hyperdecoder.py:mixture=glue \
        --gin.backbone.path=t5_1_1_lm100k_large --gin.data.vocab=spiece.model \
        --gin.data.glue_dir=glue
    hyper-t5 evaluate --workdir runs/glue

Published on GLUE, large: CoLA 58.7, SST-2 95.9, STS-B 91.8/92.0, MRPC 89.2/92.0, QQP 91.1/88.3,
MNLI 90.0, QNLI 94.2, RTE 80.8, average 86.5; learned adapters in both stacks 86.2. Arguments:
    mixture  glue | extractive_qa
    size     small | base | large | ...; default: as published, large for glue, base for the other
The adapters of each stack are --gin.hyperdecoder.encoder and .decoder: learned | generated |
per_task | none. The hyperparameters are those of the configs of allenai/hyperdecoders.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.utils.overrides import choose

PUBLISHED = {  # size; encoder and decoder adapters; generator; rows; input and target; steps
    "glue": ("large", (64, 64), 128, 128, (128, 128), 65_536),
    # Four epochs; some 516,000 rows in the six training sets of MRQA.
    "extractive_qa": ("base", (512, 36), 72, 128, (512, 64), 16_000),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; ``arg`` is explained in the docstring of the module."""
    args = config_lib.parse_args(arg, mixture="glue", size="")
    choose("mixture", args.mixture, PUBLISHED)
    size, adapters, generator, rows, lengths, steps = PUBLISHED[args.mixture]
    config = config_lib.defaults()
    config.system = "hyperdecoder"
    config_lib.use_preset(config, args.size or size)
    config.hyperdecoder.generator_size = generator
    config.adapter.bottleneck_sizes = adapters
    config.adapter.bottleneck_activation = "relu"
    config.adapter.bottleneck_input = "raw"

    config.data.mixture = args.mixture
    config.data.use_instruction = False  # the input says its task itself
    config.data.shots = (0, 0)
    config.data.hyper_length = 1
    config.data.input_length, config.data.target_length = lengths
    config.data.tasks_per_batch, config.data.examples_per_task = rows, 1

    config.train.steps = steps
    config.train.log_every = 100
    config.train.save_every = 1000
    config.train.label_smoothing = 0.1
    config.train.z_loss = 0.0

    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 500

    config.eval.max_rows_per_task = 0
    config.eval.max_decode_length = config.data.target_length
    config.eval.shots = 0
    return config
