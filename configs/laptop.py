"""Real text and real tasks on two CPU cores: a 14 M backbone from scratch, minutes a stage.

No result to cite: it shows that the path works on real input, and what so little training buys.
With DATA = the folders of Super-NaturalInstructions, of text, and of T5's vocabulary:

    flags="--gin.data.vocab=DATA/spiece.model --gin.data.sni_dir=DATA/sni \
        --gin.data.text=DATA/text/train.jsonl.xz"
    hyper-t5 train --config configs/laptop.py:system=concat,stage=hyperpretrain \
        --workdir run/lm $flags                                             # the backbone
    hyper-t5 train --config configs/laptop.py:system=concat --workdir run/concat \
        --gin.backbone.path=run/lm $flags                                   # fine-tuned on tasks
    hyper-t5 train --config configs/laptop.py:stage=hyperpretrain --workdir run/hyperpretrain \
        --gin.backbone.path=run/concat $flags
    hyper-t5 train --config configs/laptop.py --workdir run/prefix \
        --gin.backbone.path=run/concat --gin.hypermodel.path=run/hyperpretrain $flags
    hyper-t5 evaluate --workdir run/prefix

docs/results.md has times and numbers.
"""

from ml_collections import ConfigDict

from hyper_t5.adapters import ATTENTION_SITES, MLP_SITES, targets_of
from hyper_t5.config import defaults, parse_args, t5_config, use_preset
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.overrides import choose


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of one run; see above for the arguments."""
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
    if args.system == "concat":
        optimizer.name = "adafactor"
        optimizer.learning_rate = 1e-2 if args.stage == "hyperpretrain" else 1e-3
        train.steps = 500 if args.stage == "hyperpretrain" else 200
    elif args.system in ("shared_lora", "task_lora"):
        optimizer.learning_rate = 1e-3  # at 1e-2 its loss rises
    elif args.system.startswith(("shared_", "task_")):
        optimizer.learning_rate = 1e-2
    elif args.system in ("hyper_lora", "hyper_lora_plus", "text_to_lora"):
        optimizer.learning_rate = 1e-4  # at 3e-4 and above its loss rises
    if args.system.startswith("task_"):
        config.stage, config.adapter.task_slots = "peft", 128
    if args.system == "hint":
        config.adapter.prefix_sites, config.adapter.position_bias = ATTENTION_SITES, "zero"
    config.adapter.bottleneck_sizes = (32,)
    if args.system == "hyperdecoder":
        config.adapter.bottleneck_activation, config.adapter.bottleneck_input = "relu", "raw"
    config.adapter.lora_rank, config.adapter.lora_alpha, config.adapter.lora_bias = 8, 8.0, True
    config.adapter.lora_targets = targets_of((*ATTENTION_SITES, *MLP_SITES), t5_config(config))
    config.adapter.prefix_length = 16
    config.eval.max_rows_per_task, config.eval.batch = 10, 10
    config.eval.max_decode_length, config.eval.shots = 16, 0
    return config
