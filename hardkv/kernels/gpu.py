"""Integer helpers that the host calls at every launch of a Triton kernel; they do not need Triton."""


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least the given number, which is at most 2^32.

    Triton's own version and its `cdiv` belong to its compiler: every call costs the host microseconds, at every launch.
    """
    number -= 1
    for shift in (1, 2, 4, 8, 16):
        number |= number >> shift
    return number + 1


def cdiv(number: int, divisor: int) -> int:
    """Return a quotient, rounded up."""
    return -(-number // divisor)
