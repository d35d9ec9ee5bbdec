"""Cached conditioning (ours): the backbone's own keys, values and encoding of the task's text.

Untrained, it is a baseline whose only cost is one encoding of the text:

    hyper-t5 evaluate --workdir runs/cached --config configs/cached.py:size=large \
        --gin.backbone.path=flan_t5_large --gin.data.vocab=spiece.model \
        --gin.data.sni_dir=natural-instructions

Trained, at full length or compressed to P gist tokens, with a trained copy of the encoder:

    hyper-t5 train --workdir runs/gist \
        --config configs/cached.py:size=large,trained=yes,gist_tokens=32 \
        --gin.backbone.path=t5_1_1_lm100k_large --gin.data.vocab=spiece.model \
        --gin.data.sni_dir=natural-instructions

There is no published result. Arguments: size and mixture, as in configs/mtf.py; trained: no | yes;
gist_tokens: 0 is the text at full length.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.configs import mtf
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import choose


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; ``arg`` is explained in the docstring of the module."""
    args = config_lib.parse_args(arg, size="large", mixture="sni", trained="no", gist_tokens=0)
    system = "hyper_prefix" if choose("trained", args.trained, ("no", "yes")) == "yes" else "cached"
    if args.gist_tokens and system == "cached":
        raise UserError("gist_tokens: the embeddings of gist tokens are trained; say trained=yes")
    config = mtf.get_config(f"system={system},size={args.size},mixture={args.mixture}")
    config.hypermodel.reader = "layerwise"
    config.hypermodel.gist_tokens = args.gist_tokens
    return config
