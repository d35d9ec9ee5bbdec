"""Real text and real tasks on two CPU cores: a 14 M backbone from scratch, minutes per stage.

There is no published result; docs/results.md has measured times and numbers. DATA is a folder with
Super-NaturalInstructions, text, and T5's vocabulary:

    flags="--gin.data.vocab=DATA/spiece.model --gin.data.sni_dir=DATA/sni \
        --gin.data.text=DATA/text/train.jsonl.xz"
    hyper-t5 train --config configs/laptop.py:system=concat,stage=hyperpretrain \
        --workdir runs/lm $flags                                             # the backbone
    hyper-t5 train --config configs/laptop.py:system=concat --workdir runs/concat \
        --gin.backbone.path=runs/lm $flags                                   # fine-tuned on tasks
    hyper-t5 train --config configs/laptop.py:stage=hyperpretrain --workdir runs/hyperpretrain \
        --gin.backbone.path=runs/concat $flags
    hyper-t5 train --config configs/laptop.py --workdir runs/prefix \
        --gin.backbone.path=runs/concat --gin.hypermodel.path=runs/hyperpretrain $flags
    hyper-t5 evaluate --workdir runs/prefix
"""

from ml_collections import ConfigDict

from hyper_t5.adapters import ATTENTION_SITES, MLP_SITES, targets_of
from hyper_t5.config import defaults, parse_args, t5_config, use_preset
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.utils.overrides import choose

LEARNING_RATES = {
    "shared_lora": 1e-3,  # at 1e-2 the loss rises
    "task_lora": 1e-3,
    "hyper_lora": 1e-4,  # at 3e-4 and above the loss rises
    "hyper_lora_plus": 1e-4,
    "text_to_lora": 1e-4,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; the arguments are explained above."""
    args = parse_args(arg, system="hyper_prefix", stage="mtf", size="mini")
    choose("system", args.system, SYSTEMS)
    config = defaults()
    config.system, config.stage = args.system, args.stage
    use_preset(config, args.size)
    data, train, optimizer = config.data, config.train, config.optimizer
    data.mixture = "sni"
    data.on_missing_task = "skip"  # large task files are often left out of copies
    data.on_long_instruction = "truncate"
    data.hyper_length, data.input_length, data.target_length = 160, 96, 16
    data.tasks_per_batch, data.examples_per_task, data.shots = 8, 2, (0, 1)
    train.steps, train.log_every, train.save_every = 200, 20, 100
    if args.stage == "hyperpretrain":
        data.chunk_length = 224
        data.hyper_length, data.input_length, data.target_length = 128, 64, 64
        data.tasks_per_batch, data.segment_shares = 16, (0.28, 0.28)
        train.steps = 100
    optimizer.schedule, optimizer.warmup_steps, optimizer.learning_rate = "linear", 20, 5e-4
    system = SYSTEMS[args.system]
    if system.small.is_backbone:  # the backbone itself
        pretrain = args.stage == "hyperpretrain"
        optimizer.learning_rate, train.steps = (1e-2, 500) if pretrain else (1e-3, 200)
    elif system.kind in ("shared", "per_task"):
        optimizer.learning_rate = 1e-2
    optimizer.learning_rate = LEARNING_RATES.get(args.system, optimizer.learning_rate)
    config.update_from_flattened_dict(system.small.fields)
    if system.kind == "per_task":
        config.adapter.task_slots = 128
    config.adapter.bottleneck_sizes = (32,)
    config.adapter.lora_rank, config.adapter.lora_alpha, config.adapter.lora_bias = 8, 8.0, True
    config.adapter.lora_targets = targets_of((*ATTENTION_SITES, *MLP_SITES), t5_config(config))
    config.adapter.prefix_length = 16
    config.eval.max_rows_per_task, config.eval.batch = 10, 10
    config.eval.max_decode_length, config.eval.shots = 16, 0
    return config
