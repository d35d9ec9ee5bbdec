"""Tasks from examples: one hypermodel that reads an instruction, examples, or both.

First a backbone that can use examples: the shipped one, trained on with the task's text in front of
every input. Then a hypermodel on it, frozen:

    hyper-t5 train --config configs/rules.py:system=concat --workdir runs/rules_backbone
    hyper-t5 train --config configs/rules.py --workdir runs/rules \
        --gin.backbone.path=runs/rules_backbone

Quality by the number of examples, without an instruction, and whether another task's examples
mislead it as they should:

    hyper-t5 robustness --workdir runs/rules --out runs/rules/examples \
        --shots 1,2,4,8,16 --gin.data.use_instruction=False --gin.data.hyper_length=264

Arguments: ``system``, as in configs/quickstart.py; ``seed``. Lengths hold eight examples and an
instruction. No run has been trained to its end yet, so there is no expected result.
"""

from __future__ import annotations

import importlib.resources

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.configs import quickstart
from hyper_t5.hypermodels import BACKBONE, SYSTEMS

BACKBONE_STEPS, STEPS = 12_000, 1_500


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; ``arg`` is explained in the docstring of the module."""
    args = config_lib.parse_args(arg, system="hyper_prefix", seed=0)
    config = quickstart.get_config(f"system={args.system},seed={args.seed}")
    trains_backbone = BACKBONE in SYSTEMS[args.system].trains
    if trains_backbone:
        shipped = importlib.resources.files("hyper_t5") / quickstart.BACKBONE
        config.backbone.path = str(shipped)
    config.data.mixture = "rules"
    config.data.hyper_length, config.data.input_length, config.data.target_length = 136, 10, 10
    config.data.shots = (1, 8)
    config.data.conditioning = "instruction=1,examples=2,both=1"
    config.eval.shots, config.eval.max_decode_length = 8, 10
    config.train.steps = BACKBONE_STEPS if trains_backbone else STEPS
    config.optimizer.learning_rate = 1e-3
    config.train.save_every = 500
    return config
