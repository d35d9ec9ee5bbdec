"""FiD-ICL (Ye et al. 2023): examples encoded one by one and fused in the decoder.

The whole backbone is trained, and no adapters are generated:

    hyper-t5 train --workdir runs/fid_icl --config configs/fid_icl.py:size=large \
        --gin.backbone.path=t5_1_1_lm100k_large --gin.data.vocab=spiece.model \
        --gin.data.sni_dir=natural-instructions

Published on P3, mean over HyperTuning's 8 held-out tasks: base 46.9, large 55.8, xl 60.6.
Arguments: size and mixture, as in configs/mtf.py. The hyperparameters are those of INK-USC/FiD-ICL
unless a comment says otherwise.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.configs import mtf


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; ``arg`` is explained in the docstring of the module."""
    args = config_lib.parse_args(arg, size="large", mixture="sni")
    config = mtf.get_config(f"system=fid_icl,size={args.size},mixture={args.mixture}")
    config.data.variant = ""  # the instruction and 16 drawn examples
    config.data.shots, config.eval.shots = (16, 16), 16
    config.data.hyper_length = 16 * 256  # published: 256 an example
    config.data.input_length, config.data.target_length = 256, 64
    # Published: 16 queries of one task a step, the gradients of 8 steps together.
    config.data.tasks_per_batch, config.data.examples_per_task = 8, 16
    config.train.microbatches = 8
    config.train.steps = 10_000
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 3_000
    return config
