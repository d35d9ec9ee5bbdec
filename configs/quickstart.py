"""The embedded default: the whole path on a laptop CPU, minutes a stage, nothing downloaded.

    hyper-t5 quickstart --out quickstart_out           # all of it, with a table at the end

or by hand, one command a stage (the small backbone is shipped with the package):

    hyper-t5 train --config configs/quickstart.py:stage=hyperpretrain --workdir run/hyperpretrain
    hyper-t5 train --config configs/quickstart.py --workdir run/mtf \
        --gin.hypermodel.path=run/hyperpretrain
    hyper-t5 evaluate --workdir run/mtf

docs/results.md has the numbers to expect. The backbone itself, from scratch:

    hyper-t5 train --config configs/quickstart.py:system=concat --workdir run/backbone
"""

from ml_collections import ConfigDict

from hyper_t5.config import defaults, parse_args
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.overrides import choose


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of one of the small runs; see above for the arguments."""
    args = parse_args(arg, system="hyper_prefix", stage="mtf", seed=0)
    choose("system", args.system, SYSTEMS)
    config = defaults()
    config.seed, config.system, config.stage = args.seed, args.system, args.stage
    config.data.mixture = "synthetic"
    config.data.text = "synthetic"
    config.data.extra_ids = 0
    config.data.hyper_length, config.data.input_length, config.data.target_length = 72, 8, 8
    config.data.shots = (0, 2)
    config.data.tasks_per_batch, config.data.examples_per_task = 32, 4
    config.eval.max_decode_length = 8
    config.eval.shots = 0
    config.eval.batch = 50
    config.eval.max_rows_per_task = 50
    config.model.update(
        vocab_size=800,
        emb_dim=96,
        num_heads=4,
        head_dim=24,
        mlp_dim=256,
        num_encoder_layers=2,
        num_decoder_layers=2,
    )
    if args.system == "concat":
        config.train.steps = 4000
        config.optimizer.name = "adafactor"
        config.optimizer.learning_rate = 1e-2
        config.optimizer.schedule = "linear"
    return config
