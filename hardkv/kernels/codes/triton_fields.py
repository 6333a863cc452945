"""Read codes in a kernel: the levels of each field of packed bytes, as float16.

The levels are integers. A byte permutation looks up eight levels of one byte each at once, and another one puts each
byte behind the byte that makes it the float16 1024 + byte. So the four codes of a 16 bit half word take seven
instructions, with no conversion and no branch.
"""

import torch
import triton
import triton.language as tl

from hardkv.kernels.backends import interpreted
from hardkv.kernels.codes.reference import LEVELS

# The interpreter runs no assembly, and only NVIDIA's GPUs run this one.
PLAIN = tl.constexpr(interpreted() or torch.version.hip is not None)

# What is added to every level, for its byte to be positive and to become a float16. Four bits are looked up in two
# tables, of positive and of negative levels, whose bytes all have the highest bit.
BIAS = {8: 1152, 4: 1216, 3: 1152, 2: 1152}
KEY_BIAS_8, KEY_BIAS_4 = tl.constexpr(BIAS[8]), tl.constexpr(BIAS[4])  # those of 3 and 2 bits are that of 8


def _words(levels: list[int]) -> list[str]:
    """Return bytes, four per word, lowest first, as hexadecimal words."""
    octets = bytes(levels)
    return [f"0x{int.from_bytes(octets[i : i + 4], 'little'):08X}" for i in range(0, len(octets), 4)]


def _assembly(bits: int, centred: bool) -> str:
    """Return PTX that turns four bytes into their levels, field by field, two float16 per register.

    The inputs follow the outputs: codes; for 3 bits also the bytes of highest bits, and bytes that are 255 where these
    are used as they are, 0 where they must be shifted by two.

    Args:
        centred: whether to subtract the bias.
    """
    fields = {8: 1, 4: 2}.get(bits, 4)
    codes, high, unshifted = (f"${2 * fields + i}" for i in range(3))
    tables = []
    if bits < 8:
        offset = BIAS[bits] - 1024
        positive, negative = ([offset + sign * level for level in LEVELS[bits]] for sign in (1, -1))
        tables = _words(positive + negative)
    # Opaque to the assembler, which would otherwise load constants anew before every use: no lane is below lane 0 but
    # above lane 31, so the highest bit of this mask is 0.
    lines = ["mov.u32 zero, %lanemask_lt;", "shr.u32 zero, zero, 31;", "or.b32 magic, zero, 0x64646464;"]
    lines += [f"or.b32 table{i}, zero, {word};" for i, word in enumerate(tables)]

    def put(first: int, second: int, half: int) -> None:
        """Write the float16s of bytes 0 and 2 of what was found, and of 1 and 3, to registers of two fields."""
        for number, order in ((first, "0x4240"), (second, "0x4341")):
            lines.append(f"prmt.b32 ${2 * number + half}, found, magic, {order};")

    if bits == 8:
        lines += [f"prmt.b32 $0, {codes}, magic, 0x4140;", f"prmt.b32 $1, {codes}, magic, 0x4342;"]
    elif bits == 4:
        lines.append(f"xor.b32 second, {codes}, 0x88888888;")
        lines.append(f"mov.b32 first, {codes};")
        for half in (0, 1):
            if half:
                lines += ["shr.u32 first, first, 16;", "shr.u32 second, second, 16;"]
            # A selector's highest bit asks for copies of a byte's highest bit: 255, in the table of the other sign.
            lines += ["prmt.b32 found, table0, table1, first;", "prmt.b32 other, table2, table3, second;"]
            lines.append("and.b32 found, found, other;")
            put(0, 1, half)
    else:
        if bits == 3:
            lines += [f"shl.b32 top, {high}, 2;", f"lop3.b32 top, {unshifted}, {high}, top, 0xCA;"]
        last = "table1" if bits == 3 else "table0"
        for field in (0, 1):
            lines.append(f"shr.u32 first, {codes}, {2 * field};")
            lines.append("and.b32 first, first, 0x33333333;")
            if bits == 3:
                lines += [f"shr.u32 second, top, {field};", "lop3.b32 first, second, 0x44444444, first, 0xEA;"]
            for half in (0, 1):
                if half:
                    lines.append("shr.u32 first, first, 16;")
                lines.append(f"prmt.b32 found, table0, {last}, first;")
                put(field, field + 2, half)
    if centred:
        bias = f"{0x6400 + BIAS[bits] - 1024:04X}"  # as a float16; above 1024 they are the integers
        lines.append(f"mov.b32 magic, 0x{bias}{bias};")
        lines += [f"sub.rn.f16x2 ${i}, ${i}, magic;" for i in range(2 * fields)]
    names = "zero, magic, first, second, found, other, top, table0, table1, table2, table3"
    return "\n".join(["{", f".reg .b32 {names};", *lines, "}"])


_KEYS_8, _KEYS_4, _KEYS_3, _KEYS_2 = (tl.constexpr(_assembly(bits, False)) for bits in (8, 4, 3, 2))
_VALUES_8, _VALUES_4, _VALUES_3, _VALUES_2 = (tl.constexpr(_assembly(bits, True)) for bits in (8, 4, 3, 2))
_LEVELS_4, _LEVELS_3, _LEVELS_2 = (tl.constexpr(LEVELS[bits]) for bits in (4, 3, 2))


@triton.jit
def _plain(codes, high, unshifted, FIELD: tl.constexpr, BITS: tl.constexpr, CENTRED: tl.constexpr):
    """Do for one field what the assembly does for all."""
    BIAS: tl.constexpr = KEY_BIAS_4 if BITS == 4 else KEY_BIAS_8
    if BITS == 8:
        level = codes.to(tl.int32) - 128
    else:
        LEVELS: tl.constexpr = _LEVELS_4 if BITS == 4 else (_LEVELS_3 if BITS == 3 else _LEVELS_2)
        LOW: tl.constexpr = 4 if BITS == 4 else 2
        code = (codes.to(tl.int32) >> (LOW * FIELD)) & ((1 << LOW) - 1)
        if BITS == 3:
            top = high.to(tl.int32) >> tl.where(unshifted != 0, 2, 0)
            code = code | (((top >> (4 * (FIELD // 2) + FIELD % 2)) & 1) << 2)
        HALF: tl.constexpr = 1 << (BITS - 1)
        level = tl.zeros_like(code)
        for i in tl.static_range(HALF):
            level = tl.where((code & (HALF - 1)) == i, LEVELS[i], level)
        level = tl.where(code >= HALF, -level, level)
    return (level if CENTRED else level + BIAS).to(tl.float16)


@triton.jit
def fields_8(codes, CENTRED: tl.constexpr):
    """Return the levels of codes of 8 bits; see `fields_4`."""
    if PLAIN:
        return _plain(codes, codes, codes, 0, 8, CENTRED)
    return tl.inline_asm_elementwise(
        _VALUES_8 if CENTRED else _KEYS_8, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
    )


@triton.jit
def fields_4(codes, CENTRED: tl.constexpr):
    """Return the levels of both fields of bytes of 4 bit codes, float16, in units of `reference.UNIT`.

    Args:
        codes: uint8. CENTRED: whether to return levels, else each is `BIAS` larger, which takes less time.
    """
    if PLAIN:
        return (
            _plain(codes, codes, codes, 0, 4, CENTRED),
            _plain(codes, codes, codes, 1, 4, CENTRED),
        )
    return tl.inline_asm_elementwise(
        _VALUES_4 if CENTRED else _KEYS_4,
        "=r,=r,=r,=r,r",
        [codes],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def fields_3(codes, high, unshifted, CENTRED: tl.constexpr):
    """Return the levels of all four fields of bytes of 3 bit codes; see `fields_4` and `reference.pack`.

    Args:
        codes: uint8, the lower two bits. high: uint8, the byte of highest bits. unshifted: uint8, 255 in the second
            half of a token's codes, 0 in the first.
    """
    if PLAIN:
        return (
            _plain(codes, high, unshifted, 0, 3, CENTRED),
            _plain(codes, high, unshifted, 1, 3, CENTRED),
            _plain(codes, high, unshifted, 2, 3, CENTRED),
            _plain(codes, high, unshifted, 3, 3, CENTRED),
        )
    return tl.inline_asm_elementwise(
        _VALUES_3 if CENTRED else _KEYS_3,
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
        [codes, high, unshifted],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def fields_2(codes, CENTRED: tl.constexpr):
    """Return the levels of all four fields of bytes of 2 bit codes; see `fields_4`."""
    if PLAIN:
        return (
            _plain(codes, codes, codes, 0, 2, CENTRED),
            _plain(codes, codes, codes, 1, 2, CENTRED),
            _plain(codes, codes, codes, 2, 2, CENTRED),
            _plain(codes, codes, codes, 3, 2, CENTRED),
        )
    return tl.inline_asm_elementwise(
        _VALUES_2 if CENTRED else _KEYS_2,
        "=r,=r,=r,=r,=r,=r,=r,=r,r",
        [codes],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )
