"""How the ragged attention's work is shared out among programs: equal parts of a line of all rows' tokens."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.backends import current
from hardkv.kernels.gpu import cdiv, next_power_of_2
from hardkv.kernels.rows import Rows

# The line is cut at multiples of this.
UNIT = 64
# Fewest tokens that are worth a program.
MIN_SHARE = 128
# Programs per multiprocessor. Measured best with `triton.WARPS` and `STAGES`; as many fit on every GPU since sm_80
# but sm_86 and sm_89.
OCCUPANCY = 3
# Rows, or programs, that are worked out at a time.
BLOCK = 512
# Rows of a matrix unit's smallest product: fewer queries are padded to it.
MIN_QUERIES = 16
MAX_QUERIES, QUERY_BYTES = 64, 16 << 10


@triton.jit(do_not_specialize=["rows", "dense", "programs"])
def _cut_kernel(
    row_start,
    first_row,
    share_out,
    cu,
    rows,
    dense,
    programs,
    UNIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where rows begin on the line, how large a program's share is, and in which row it begins."""
    end = tl.zeros([], tl.int32)
    tl.store(row_start, end)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        live = row < rows
        length = tl.load(cu + row + 1, mask=live, other=0) - tl.load(cu + row, mask=live, other=0)
        units = tl.where(live, tl.maximum((length + dense + (UNIT - 1)) // UNIT, 1), 0)
        tl.store(row_start + row + 1, end + tl.cumsum(units, 0), mask=live)
        end += tl.sum(units, 0)
    share = tl.maximum((end + programs - 1) // programs, LEAST)
    tl.store(share_out, share)
    tl.debug_barrier()  # all rows' beginnings are there
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        begin = program * share
        low, high = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + rows
        span = rows
        while span > 0:  # the first row that ends behind the share's beginning
            middle = (low + high) // 2
            searching = low < high
            before = tl.load(row_start + middle + 1, mask=searching, other=0) <= begin
            low = tl.where(searching & before, middle + 1, low)
            high = tl.where(searching & ~before, middle, high)
            span //= 2
        tl.store(first_row + program, low, mask=program < programs)


def cut(row_start: Tensor, first_row: Tensor, share: Tensor, cu_seqlens: Tensor, dense: int) -> None:
    """Write a schedule of `first_row.shape[0]` programs for the rows of `cu_seqlens`; see `Schedule`."""
    rows, programs = cu_seqlens.shape[0] - 1, first_row.shape[0]
    _cut_kernel[(1,)](
        *(row_start, first_row, share, cu_seqlens, rows, dense, programs),
        UNIT=UNIT,
        LEAST=MIN_SHARE // UNIT,
        BLOCK=BLOCK,
        num_warps=4,
    )


@dataclass(frozen=True)
class Schedule:
    """Which program works on which part of which row; made on the device, without asking it anything."""

    row_start: Tensor  # int32 [R + 1], where rows begin on the line, in units
    first_row: Tensor  # int32 [P], the row in which a program's share begins
    share: Tensor  # int32 [1], units of a program
    arrived: Tensor  # int32 [R * query blocks], programs that have finished; 0 between launches

    @classmethod
    def make(cls, cu_seqlens: Tensor, total: int, dense: int, programs: int, query_blocks: int = 1) -> "Schedule":
        """Cut rows of `cu_seqlens` int32 `[R + 1]` (`total` tokens) into shares.

        Args:
            dense: dense tokens that a row is expected to have: right on average, the work is even.
            programs: shares at most. query_blocks: blocks of queries that every share meets.
        """
        rows = cu_seqlens.shape[0] - 1
        programs = max(1, min(programs, (total + rows * dense) // MIN_SHARE + rows))
        row_start, first_row, share, arrived = (
            cu_seqlens.new_zeros(size) for size in (rows + 1, programs, 1, rows * query_blocks)
        )
        schedule = cls(row_start, first_row, share, arrived)
        schedule.recut(cu_seqlens, dense)
        return schedule

    def recut(self, cu_seqlens: Tensor, dense: int) -> None:
        """Serve other rows, as many as before, with as many programs: rewritten in place, for captured graphs."""
        with current(cu_seqlens):
            cut(self.row_start, self.first_row, self.share, cu_seqlens, dense)

    def tensors(self) -> list[Tensor]:
        """Everything held, for counting bytes."""
        return [self.row_start, self.first_row, self.share, self.arrived]


def schedule_for(rows: Rows, bound: int, capacity: int, blocks: int) -> Schedule:
    """The schedule of rows whose dense tier has `bound` of `capacity` slots filled; kept until the rows change."""
    key = capacity, blocks
    if key not in rows.schedules:
        device = rows.cu_seqlens.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        programs = max(1, OCCUPANCY * processors // blocks)
        total = rows.total if rows.room is None else rows.room
        rows.schedules[key] = Schedule.make(rows.cu_seqlens, total, expected(bound, capacity), programs, blocks)
    return rows.schedules[key]


def expected(bound: int, capacity: int) -> int:
    """Dense tokens to plan for: the tier fills up before the rows change, so half of what is free, on average."""
    return (bound + capacity) // 2


def recut_schedules(rows: Rows, bound: int) -> None:
    """Rewrite in place every schedule that `rows` took over from rows in the same buffers; see `schedule_for`."""
    for (capacity, _), schedule in rows.schedules.items():
        schedule.recut(rows.cu_seqlens, expected(bound, capacity))


def queries_per_block(group: int, q_len: int, head_dim: int, itemsize: int) -> int:
    """Rows of queries that one program works on: 16 KB of them at most, or small GPUs run out of shared memory."""
    fit = QUERY_BYTES // (next_power_of_2(max(head_dim, 16)) * itemsize)
    return min(max(next_power_of_2(group * q_len), MIN_QUERIES), max(MIN_QUERIES, min(fit, MAX_QUERIES)))


def query_blocks(group: int, q_len: int, head_dim: int, itemsize: int) -> int:
    """Blocks of queries that one row has."""
    return cdiv(group * q_len, queries_per_block(group, q_len, head_dim, itemsize))
