"""Share the ragged attention's work among programs: equal parts of one line of all rows' tokens."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.backends import current
from hardkv.kernels.gpu import cdiv, next_power_of_2
from hardkv.kernels.rows import Rows

# The line is cut at multiples of this many tokens.
UNIT = 64
# Minimum number of tokens per program.
MIN_SHARE = 128
# Programs per multiprocessor. Fastest with `triton.WARPS` and `STAGES`; they fit on every GPU since sm_80
# except sm_86 and sm_89.
OCCUPANCY = 3
# Rows, or programs, that the cut kernel handles at a time.
BLOCK = 512
# Rows of the smallest product of a matrix unit; fewer queries are padded to this many.
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
    """Compute where rows begin on the line, the size of a program's share, and the row where each share begins."""
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
    tl.debug_barrier()  # the beginnings of all rows have been written
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        begin = program * share
        low, high = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + rows
        span = rows
        while span > 0:  # find the first row that ends after the beginning of the share
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
    """Assign parts of rows to programs; built on the device, without reading anything back."""

    row_start: Tensor  # int32 [R + 1], where rows begin on the line, in units
    first_row: Tensor  # int32 [P], the row where a program's share begins
    share: Tensor  # int32 [1], units per program
    arrived: Tensor  # int32 [R * query blocks], number of programs that have finished; 0 between launches

    @classmethod
    def make(cls, cu_seqlens: Tensor, total: int, dense: int, programs: int, query_blocks: int = 1) -> "Schedule":
        """Cut rows of `cu_seqlens` int32 `[R + 1]` (`total` tokens) into shares.

        Args:
            dense: expected number of dense tokens per row; the work is even when this is right on average.
            programs: maximum number of shares. query_blocks: blocks of queries that every share attends.
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
        """Rewrite the schedule in place for as many other rows and the same programs, for captured graphs."""
        with current(cu_seqlens):
            cut(self.row_start, self.first_row, self.share, cu_seqlens, dense)

    def tensors(self) -> list[Tensor]:
        """Return all tensors held, for counting bytes."""
        return [self.row_start, self.first_row, self.share, self.arrived]


def schedule_for(rows: Rows, bound: int, capacity: int, blocks: int, occupancy: int) -> Schedule:
    """Return the schedule for rows with `bound` of `capacity` dense slots filled; keep it until the rows change.

    Args:
        blocks: blocks of queries per row. occupancy: programs per multiprocessor.
    """
    key = capacity, blocks, occupancy
    if key not in rows.schedules:
        device = rows.cu_seqlens.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        programs = max(1, occupancy * processors // blocks)
        total = rows.total if rows.room is None else rows.room
        rows.schedules[key] = Schedule.make(rows.cu_seqlens, total, expected(bound, capacity), programs, blocks)
    return rows.schedules[key]


def expected(bound: int, capacity: int) -> int:
    """Return the dense tokens to plan for: filled slots and half of the free ones, the average until the next event."""
    return (bound + capacity) // 2


def recut_schedules(rows: Rows, bound: int) -> None:
    """Rewrite in place every schedule that `rows` took over from rows in the same buffers; see `schedule_for`."""
    for (capacity, _, _), schedule in rows.schedules.items():
        schedule.recut(rows.cu_seqlens, expected(bound, capacity))


def queries_per_block(group: int, q_len: int, head_dim: int, itemsize: int) -> int:
    """Return the rows of queries per program: at most 16 KB, so that small GPUs have enough shared memory."""
    fit = QUERY_BYTES // (next_power_of_2(max(head_dim, 16)) * itemsize)
    return min(max(next_power_of_2(group * q_len), MIN_QUERIES), max(MIN_QUERIES, min(fit, MAX_QUERIES)))


def query_blocks(group: int, q_len: int, head_dim: int, itemsize: int) -> int:
    """Return the number of query blocks per row."""
    return cdiv(group * q_len, queries_per_block(group, q_len, head_dim, itemsize))
