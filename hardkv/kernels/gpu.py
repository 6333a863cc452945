"""What the host computes at every launch of a Triton kernel; Triton itself is not needed."""


def next_power_of_2(number: int) -> int:
    """The least power of two that is no smaller than a number of up to 2^32.

    Triton's own, and its `cdiv`, belong to its compiler: every call takes the host microseconds, at every launch.
    """
    number -= 1
    for shift in (1, 2, 4, 8, 16):
        number |= number >> shift
    return number + 1


def cdiv(number: int, divisor: int) -> int:
    """A quotient, rounded up."""
    return -(-number // divisor)
