"""hardkv: head-adaptive KV-cache compression at decoding time, on unmodified transformers checkpoints.

Importing it wraps transformers' attention and mask registries (`hardkv.cache.routing`); models without a HardKVCache
compute exactly what they did before.
"""

from hardkv.cache import HardKVCache, Stats, Trace, UnroutedKVError
from hardkv.cache.routing.registry import install
from hardkv.calibration.calibrate import calibrate
from hardkv.calibration.file import Calibration
from hardkv.config import HardKVConfig
from hardkv.decoding.generate import generate, graphed
from hardkv.decoding.plan import MemoryPlan, max_batch_size, plan

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "HardKVCache",
    "HardKVConfig",
    "MemoryPlan",
    "Stats",
    "Trace",
    "UnroutedKVError",
    "calibrate",
    "generate",
    "graphed",
    "max_batch_size",
    "plan",
]

install()
