"""Backbone weights in and out: T5X, Hugging Face and native folders.

In memory a backbone is a `T5Config` and a nested dict of arrays under T5X's names with the layers
of each stack stacked on axis 0 (`encoder/layers/attention/query/kernel [N, D, H*K]`). On disk it is

* native: `config.json` + `model.safetensors`, keys are the paths joined by `/`;
* t5x: a directory with a msgpack file `checkpoint`, whose arrays are inline or zarr arrays beside
  it, one tree per layer (`encoder/layers_0/attention/query/kernel [D, H*K]`), or scanned;
* hf: a Hugging Face T5 folder, `config.json` + `model.safetensors` (or shards with an index).

Every reader first lists what the files hold as `Tensor`s that are read only when they are needed,
brings the names to T5X's, and compares names and shapes with those of the config. Every writer
takes one array after the other. So nothing here has a model in memory but who asks for it.
"""

from hyper_t5.names import digest
from hyper_t5.weights.compatible import SHAPE_FIELDS, backbone_meta, check_compatible
from hyper_t5.weights.convert import convert, save, save_hf, save_native
from hyper_t5.weights.load import (
    STORAGE_DTYPES,
    detect,
    load_backbone,
    load_sharded,
    open_source,
    read_sizes,
)
from hyper_t5.weights.source import VocabIdentity

__all__ = [
    "SHAPE_FIELDS",
    "STORAGE_DTYPES",
    "VocabIdentity",
    "backbone_meta",
    "check_compatible",
    "convert",
    "detect",
    "digest",
    "load_backbone",
    "load_sharded",
    "open_source",
    "read_sizes",
    "save",
    "save_hf",
    "save_native",
]
