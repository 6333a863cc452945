"""Read codes in a kernel: the levels of each field of packed bytes, as float16.

The levels are integers. A byte permutation looks up eight levels of one byte each at once, and another one puts each
byte behind the byte that makes it the float16 1024 + byte. So the four codes of a 16 bit half word take seven
instructions, with no conversion and no branch.
"""

import torch
import triton
import triton.language as tl

from hardkv.kernels.backends import interpreted
from hardkv.kernels.codes.reference import LEVELS, num_fields

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


def _assembly(bits: int, values: bool) -> str:
    """Return PTX that turns four bytes into their levels, two float16 per register.

    The outputs are the levels of the first two bytes and of the last two, field by field; or, of values, those of the
    first bytes of two tokens and of their second bytes. The inputs follow: codes, and for 3 bits both words of highest
    bits; see `key_fields`.

    Args:
        values: whether the bytes are two of one token and two of the next. Then the bias is subtracted.
    """
    fields = num_fields(bits)
    codes, first_high, second_high = (f"${2 * fields + i}" for i in range(3))
    tables = []
    if bits < 8:
        offset = BIAS[bits] - 1024
        positive, negative = ([offset + sign * level for level in LEVELS[bits]] for sign in (1, -1))
        tables = _words(positive + negative)
    # Opaque to the assembler, which would otherwise load constants anew before every use: this lane's bit is not among
    # those of the lanes below.
    lines = ["mov.u32 zero, %lanemask_lt;", "mov.u32 first, %lanemask_eq;", "and.b32 zero, zero, first;"]
    lines.append("or.b32 magic, zero, 0x64646464;")
    lines += [f"or.b32 table{i}, zero, {word};" for i, word in enumerate(tables)]

    def put(first: int, second: int, half: int) -> None:
        """Write the float16s of bytes 0 and 2 of what was found, and of 1 and 3, to registers of two fields."""
        for number, order in ((first, "0x4240"), (second, "0x4341")):
            lines.append(f"prmt.b32 ${2 * number + half}, found, magic, {order};")

    if bits == 8:
        orders = ("0x4240", "0x4341") if values else ("0x4140", "0x4342")
        lines += [f"prmt.b32 ${i}, {codes}, magic, {order};" for i, order in enumerate(orders)]
    else:
        lines.append(f"prmt.b32 first, {codes}, zero, 0x3120;" if values else f"mov.b32 first, {codes};")
    if bits == 4:
        lines.append("xor.b32 second, first, 0x88888888;")
        for half in (0, 1):
            if half:
                lines += ["shr.u32 first, first, 16;", "shr.u32 second, second, 16;"]
            # A selector's highest bit asks for copies of a byte's highest bit: 255, in the table of the other sign.
            lines += ["prmt.b32 found, table0, table1, first;", "prmt.b32 other, table2, table3, second;"]
            lines.append("and.b32 found, found, other;")
            put(0, 1, half)
    elif bits < 4:
        lines.append("mov.b32 bytes, first;")
        if bits == 3:
            lines += [f"shl.b32 top, {first_high}, 2;", f"or.b32 top, top, {second_high};"]
            if values:
                lines.append("prmt.b32 top, top, zero, 0x3120;")
        last = "table1" if bits == 3 else "table0"
        for field in (0, 1):
            lines.append(f"shr.u32 first, bytes, {2 * field};")
            lines.append("and.b32 first, first, 0x33333333;")
            if bits == 3:
                lines += [f"shr.u32 second, top, {field};", "lop3.b32 first, second, 0x44444444, first, 0xEA;"]
            for half in (0, 1):
                if half:
                    lines.append("shr.u32 first, first, 16;")
                lines.append(f"prmt.b32 found, table0, {last}, first;")
                put(field, field + 2, half)
    if values:
        bias = f"{0x6400 + BIAS[bits] - 1024:04X}"  # as a float16; above 1024 they are the integers
        lines.append(f"mov.b32 magic, 0x{bias}{bias};")
        lines += [f"sub.rn.f16x2 ${i}, ${i}, magic;" for i in range(2 * fields)]
    names = "zero, magic, bytes, first, second, found, other, top, table0, table1, table2, table3"
    return "\n".join(["{", f".reg .b32 {names};", *lines, "}"])


_KEYS_8, _KEYS_4, _KEYS_3, _KEYS_2 = (tl.constexpr(_assembly(bits, False)) for bits in (8, 4, 3, 2))
_VALUES_8, _VALUES_4, _VALUES_3, _VALUES_2 = (tl.constexpr(_assembly(bits, True)) for bits in (8, 4, 3, 2))
# The registers of each: those written, then those read.
_READ_8, _READ_4, _READ_3, _READ_2 = (
    tl.constexpr("=r," * written + ",".join("r" * read)) for written, read in ((2, 1), (4, 1), (8, 3), (8, 1))
)
_LEVELS_4, _LEVELS_3, _LEVELS_2 = (tl.constexpr(LEVELS[bits]) for bits in (4, 3, 2))


@triton.jit
def _plain(codes, first_high, second_high, FIELD: tl.constexpr, BITS: tl.constexpr, CENTRED: tl.constexpr):
    """Do for one field what the assembly does for all."""
    BIAS: tl.constexpr = KEY_BIAS_4 if BITS == 4 else KEY_BIAS_8
    if BITS == 8:
        level = codes.to(tl.int32) - 128
    else:
        LEVELS: tl.constexpr = _LEVELS_4 if BITS == 4 else (_LEVELS_3 if BITS == 3 else _LEVELS_2)
        LOW: tl.constexpr = 4 if BITS == 4 else 2
        code = (codes.to(tl.int32) >> (LOW * FIELD)) & ((1 << LOW) - 1)
        if BITS == 3:
            top = (first_high.to(tl.int32) << 2) | second_high.to(tl.int32)
            code = code | (((top >> (4 * (FIELD // 2) + FIELD % 2 + 2)) & 1) << 2)
        HALF: tl.constexpr = 1 << (BITS - 1)
        level = tl.zeros_like(code)
        for i in tl.static_range(HALF):
            level = tl.where((code & (HALF - 1)) == i, LEVELS[i], level)
        level = tl.where(code >= HALF, -level, level)
    return (level if CENTRED else level + BIAS).to(tl.float16)


@triton.jit
def key_fields(codes, first_high, second_high, BITS: tl.constexpr):
    """Return the levels of all fields of bytes of codes, each float16, in units of `reference.UNIT`, plus `BIAS`.

    Args:
        codes: uint8; of 3 bits the lower two. first_high, second_high: uint8, for 3 bits: the bytes of highest bits, 0
            but in the first or the second half of a token's codes; see `reference.pack`.
    """
    FIELDS: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else 4)
    levels = ()
    if PLAIN:
        for i in tl.static_range(FIELDS):
            levels += (_plain(codes, first_high, second_high, i, BITS, False),)
    elif BITS == 8:
        level = tl.inline_asm_elementwise(_KEYS_8, _READ_8, [codes], dtype=tl.float16, is_pure=True, pack=4)
        levels += (level,)
    elif BITS == 4:
        levels = tl.inline_asm_elementwise(_KEYS_4, _READ_4, [codes], dtype=(tl.float16,) * 2, is_pure=True, pack=4)
    elif BITS == 3:
        levels = tl.inline_asm_elementwise(
            _KEYS_3, _READ_3, [codes, first_high, second_high], dtype=(tl.float16,) * 4, is_pure=True, pack=4
        )
    else:
        levels = tl.inline_asm_elementwise(_KEYS_2, _READ_2, [codes], dtype=(tl.float16,) * 4, is_pure=True, pack=4)
    return levels


@triton.jit
def value_fields(codes, first_high, second_high, BITS: tl.constexpr):
    """Return the levels of both bytes of int16 words of codes, field by field, without a bias; see `key_fields`."""
    FIELDS: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else 4)
    levels = ()
    if PLAIN:
        for i in tl.static_range(FIELDS):
            for byte in tl.static_range(2):
                low = (codes.to(tl.int32) >> (8 * byte)) & 255
                first = (first_high.to(tl.int32) >> (8 * byte)) & 255
                second = (second_high.to(tl.int32) >> (8 * byte)) & 255
                levels += (_plain(low, first, second, i, BITS, True),)
    elif BITS == 8:
        levels = tl.inline_asm_elementwise(_VALUES_8, _READ_8, [codes], dtype=(tl.float16,) * 2, is_pure=True, pack=2)
    elif BITS == 4:
        levels = tl.inline_asm_elementwise(_VALUES_4, _READ_4, [codes], dtype=(tl.float16,) * 4, is_pure=True, pack=2)
    elif BITS == 3:
        levels = tl.inline_asm_elementwise(
            _VALUES_3, _READ_3, [codes, first_high, second_high], dtype=(tl.float16,) * 8, is_pure=True, pack=2
        )
    else:
        levels = tl.inline_asm_elementwise(_VALUES_2, _READ_2, [codes], dtype=(tl.float16,) * 8, is_pure=True, pack=2)
    return levels
