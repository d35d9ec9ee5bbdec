"""The frozen T5: sizes, attention, network and decoding.

Parameter names, shapes, logical axes and numbers are T5X's (``examples/t5/network.py``).
"""

from hyper_t5.t5.config import PRESETS as PRESETS
from hyper_t5.t5.config import T5_1_0_PRESETS as T5_1_0_PRESETS
from hyper_t5.t5.config import T5Config as T5Config
from hyper_t5.t5.config import preset as preset
from hyper_t5.t5.network import T5 as T5
from hyper_t5.t5.network import Decoder as Decoder
from hyper_t5.t5.network import DecoderCache as DecoderCache
from hyper_t5.t5.network import Encoder as Encoder
from hyper_t5.t5.network import init_params as init_params
from hyper_t5.t5.network import logical_axes as logical_axes
