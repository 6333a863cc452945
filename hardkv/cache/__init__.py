"""The cache itself: storage, events, and the way into transformers."""

from hardkv.cache.cache import HardKVCache
from hardkv.cache.routing.handles import UnroutedKVError
from hardkv.cache.stats import Stats
from hardkv.cache.trace import Trace

__all__ = ["HardKVCache", "Stats", "Trace", "UnroutedKVError"]
