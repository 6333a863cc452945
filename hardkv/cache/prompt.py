"""Whose tokens a forward pass brings: the prompt's, or those that `generate()` drew."""

from hardkv.cache.callers import callers


def generate_prefills() -> bool:
    """Whether `generate()` is at its prompt now, whose last chunk may be a single token (`prefill_chunk_size`).

    Nothing that reaches a cache tells such a chunk from a drawn token, but who called does.
    """
    for frame in callers():
        if frame.f_code.co_name == "_prefill" and "generation_config" in frame.f_code.co_varnames:
            return True
    return False
