"""Text-to-LoRA style (Charakorn et al. 2025, arXiv 2506.06105) on a frozen T5.

The published system adapts a decoder of 7 B parameters and embeds the task's description with a
text embedder. Here the backbone is a T5, and the mean of its frozen encoder's outputs is the
embedding. Published on ten other benchmarks: 67.0; one LoRA for all tasks 66.7.

    hyper-t5 train --workdir runs/text_to_lora --config configs/text_to_lora.py:size=large \
        --gin.backbone.path=t5_1_1_lm100k_large --gin.data.vocab=spiece.model \
        --gin.data.sni_dir=natural-instructions

Arguments: size and mixture, as in configs/mtf.py; the conditioning is the definition alone. The
hyperparameters are those of SakanaAI/text-to-lora unless a comment says otherwise.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.configs import mtf


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; ``arg`` is explained in the docstring of the module."""
    args = config_lib.parse_args(arg, size="large", mixture="sni")
    config = mtf.get_config(f"system=text_to_lora,size={args.size},mixture={args.mixture}")
    config.adapter.lora_rank = 8
    config.adapter.lora_alpha = 16 * 8**0.5  # published: 16, over the root of the rank
    config.data.variant = "def"
    config.data.tasks_per_batch, config.data.examples_per_task = 8, 1
    config.train.steps = 20_000  # ours
    config.train.label_smoothing = 0.1
    config.optimizer.learning_rate = 2.5e-5
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 4_000  # a fifth
    return config
