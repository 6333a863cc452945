"""The cache itself: storage, selection events, and the connection to transformers."""

from hardkv.cache.cache import HardKVCache
from hardkv.cache.record.stats import Stats
from hardkv.cache.record.trace import Trace
from hardkv.cache.routing.handles import UnroutedKVError

__all__ = ["HardKVCache", "Stats", "Trace", "UnroutedKVError"]
