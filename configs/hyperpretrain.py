"""Stage 1, hyperpretraining on raw text by CACLM (Phang et al. 2022, HyperTuning).

A chunk of text is cut in four, A|B|C|D: the hypermodel reads A and D, and the frozen backbone reads
B and predicts C with the hypermodel's adapters. HyperT5-Prefix, as large as its backbone:

    hyper-t5 train --workdir runs/hyperpretrain \
        --config configs/hyperpretrain.py:system=hyper_prefix,size=large \
        --gin.backbone.path=t5_1_1_lm100k_large --gin.data.vocab=spiece.model \
        --gin.data.text=c4.jsonl.xz

Then configs/mtf.py, with --gin.hypermodel.path=runs/hyperpretrain. Arguments:
    system   hyper_prefix | hyper_lora
    size     small | base | large | xl | xxl, of backbone and hypermodel
    mixture  sni | synthetic: the tasks of the next stage; with synthetic the text is the embedded
             suite's own, and --gin.data.text and --gin.data.vocab are not needed

HyperTuning (arXiv 2211.12485) published no code and few hyperparameters. The values below are those
of the nearest systems with published ones:
    [HyperLoRA]  Table 5, the stage on raw text
    [HINT]       the HINT authors' code, which has HyperTuning's objective
"""

from __future__ import annotations

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; ``arg`` is explained in the docstring of the module."""
    args = config_lib.parse_args(arg, system="hyper_prefix", size="large", mixture="sni")
    config = config_lib.defaults()
    config.stage = "hyperpretrain"
    config.system = args.system
    config_lib.use_preset(config, args.size)
    config.model.dtype = "bfloat16"
    config.model.remat = "minimal"
    config.backbone.dtype = "bfloat16"  # frozen: no small update is lost by it

    config.adapter.lora_rank = 16  # [HyperLoRA]
    config.adapter.lora_alpha = 8.0  # [HyperLoRA]'s table; its text says 0.8
    config.adapter.prefix_length = 32  # ours: the paper's length could not be found

    config.data.mixture = args.mixture
    config.data.text = "synthetic" if args.mixture == "synthetic" else ""
    config.data.chunk_length = 512  # [HINT]
    # B and C are "short" in [HINT], whose cuts are uniform all the same. Ours are at most a quarter
    # of the chunk each (data.segment_shares), for a decoder of 512 places would be mostly padding.
    config.data.hyper_length = 512
    config.data.input_length = 128
    config.data.target_length = 128
    config.data.tasks_per_batch = 128  # [HyperLoRA]; [HINT] took 1024
    config.data.examples_per_task = 1  # a chunk is a task with one example

    config.train.steps = 38_000  # [HyperLoRA]; [HINT] took up to 20,000
    config.train.log_every = 100
    config.train.save_every = 1000

    config.optimizer.name = "adamw"  # [HyperLoRA]; [HINT] took Adafactor at 1e-3, constant
    config.optimizer.learning_rate = 5e-5  # [HyperLoRA]
    config.optimizer.schedule = "cosine"  # [HyperLoRA]
    config.optimizer.warmup_steps = 500  # ours: not published
    return config
