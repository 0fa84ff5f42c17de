"""The inner loop of `sink`: tiles of relevances, made in registers and sunk from there.

No compiler keeps so many numbers in vector registers by itself, so this is written in LLVM's
instructions. On a machine with shorter vectors LLVM makes several of one.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

_WIDE = "+avx512f" in get_host_cpu_features()
_LANES = 16 if _WIDE else 8
ROWS, COLUMNS = 8 if _WIDE else 4, 2 * _LANES
"""Output rows and input features of a tile: its products take half of the registers."""
JOB = (
    *("kept", "rows", "width", "samples", "tokens", "narrow"),
    *("values", "weight", "x", "g", "x_tiles", "g_tiles"),
)
"""The numbers of a job: five sizes, whether values are bfloat16, and six addresses."""
_INDEX, _SHORT, _FLOAT = ir.IntType(64), ir.IntType(16), ir.FloatType()


def _function(lanes: int) -> Any:
    def sink(_: Any, job: Any, slots: Any, row: Any, column: Any) -> Any:
        def generate(context: Any, build: Any, signature: Any, arguments: Any) -> Any:
            job, slots, row, column = arguments
            _Tile(build, job, slots, row, column, lanes).write()
            return context.get_dummy_value()

        return types.void(job, slots, row, column), generate

    return intrinsic(sink)


class _Tile:
    """Writes the instructions of a tile, whose cells are `lanes` columns of a row each."""

    def __init__(self, build: Any, job: Any, slots: Any, row: Any, column: Any, lanes: int) -> None:
        rows, columns = (ROWS, COLUMNS) if lanes > 1 else (1, 1)
        self.build, self.slots, self.lanes, self.size = build, slots, lanes, rows * columns
        self.rows, self.columns = range(rows), range(0, columns, lanes)
        self.cells = [(r, c) for r in self.rows for c in self.columns]
        vector = ir.VectorType(_FLOAT, lanes)
        self.zero = vector([0.0] * lanes)
        self.sums = {cell: cgutils.alloca_once(build, vector) for cell in self.cells}
        numbers = build.inttoptr(job, _INDEX.as_pointer())
        self.job = {n: build.load(build.gep(numbers, [_INDEX(i)])) for i, n in enumerate(JOB)}
        self.entry = build.add(build.mul(row, self.job["width"]), column)
        # Of x and g: the address, the first number's index, and how far it is from token to token.
        self.x = self.job["x"], column, self.job["width"]
        self.g = self.job["g"], row, self.job["rows"]
        if lanes > 1:
            lines = build.mul(self.job["samples"], self.job["tokens"])
            self.x = self.job["x_tiles"], build.mul(column, lines), _INDEX(columns)
            self.g = self.job["g_tiles"], build.mul(row, lines), _INDEX(rows)

    def write(self) -> None:
        """The values into slots, every sample's products through these, the slots into values."""
        self.for_every_slot(self.fill)
        with cgutils.for_range(self.build, self.job["samples"]) as sample:
            self.multiply(sample.index)
            self.insert()
        self.for_every_slot(self.empty)

    def fill(self, value: Any, slot: Any) -> None:
        kept = self.load(value)
        self.store(self.widened(kept) if value.type.pointee == _SHORT else kept, slot)

    def empty(self, value: Any, slot: Any) -> None:
        kept = self.load(slot)
        self.store(self.narrowed(kept) if value.type.pointee == _SHORT else kept, value)

    def multiply(self, sample: Any) -> None:
        """W times the sum of g x over the sample's tokens."""
        build, first = self.build, self.build.mul(sample, self.job["tokens"])
        for total in self.sums.values():
            build.store(self.zero, total)
        with cgutils.for_range(build, self.job["tokens"]) as loop:
            token = build.add(first, loop.index)
            x = {c: self.load(self.of_token(self.x, token, c)) for c in self.columns}
            for r in self.rows:
                g = self.spread(build.load(self.of_token(self.g, token, r)))
                for c in self.columns:
                    # `contract`: one rounding where the machine has an instruction for both.
                    product = build.fmul(g, x[c], flags=("contract",))
                    total = build.fadd(build.load(self.sums[r, c]), product, flags=("contract",))
                    build.store(total, self.sums[r, c])
        for cell, total in self.sums.items():
            weight = self.load(self.pointer(self.job["weight"], _FLOAT, *self.entry_of(cell)))
            build.store(build.fmul(build.load(total), weight), total)

    def insert(self) -> None:
        """The products through all slots; what falls out of the last one is forgotten."""
        build = self.build
        with cgutils.for_range(build, self.job["kept"]) as loop:
            for cell, total in self.sums.items():
                slot = self.slot_of(loop.index, cell)
                new, kept = build.load(total), self.load(slot)
                greater = build.fcmp_ordered(">", new, kept)
                self.store(build.select(greater, new, kept), slot)
                build.store(build.select(greater, kept, new), total)

    def for_every_slot(self, move: Callable[[Any, Any], None]) -> None:
        """Loops over the K slots, for bfloat16 and float32: pointers to a cell's value and slot."""
        plane = self.build.mul(self.job["rows"], self.job["width"])
        narrow = self.build.trunc(self.job["narrow"], ir.IntType(1))
        with self.build.if_else(narrow) as branches:
            for branch, element in zip(branches, (_SHORT, _FLOAT), strict=True):
                with branch, cgutils.for_range(self.build, self.job["kept"]) as loop:
                    for cell in self.cells:
                        place = self.build.mul(loop.index, plane), *self.entry_of(cell)
                        value = self.pointer(self.job["values"], element, *place)
                        move(value, self.slot_of(loop.index, cell))

    def slot_of(self, number: Any, cell: tuple[int, int]) -> Any:
        place = self.cells.index(cell) * self.lanes
        return self.pointer(self.slots, _FLOAT, self.build.mul(number, _INDEX(self.size)), place)

    def entry_of(self, cell: tuple[int, int]) -> tuple[Any, ...]:
        return self.entry, self.build.mul(_INDEX(cell[0]), self.job["width"]), cell[1]

    def of_token(self, lines: tuple[Any, Any, Any], token: Any, number: int) -> Any:
        address, first, step = lines
        return self.pointer(address, _FLOAT, first, self.build.mul(token, step), number)

    def pointer(self, address: Any, element: Any, *terms: Any) -> Any:
        """To the element whose index is the sum of the terms."""
        index = _INDEX(0)
        for term in terms:
            index = self.build.add(index, _INDEX(term) if isinstance(term, int) else term)
        return self.build.gep(self.build.inttoptr(address, element.as_pointer()), [index])

    def load(self, pointer: Any) -> Any:
        """The cell that begins there."""
        element = pointer.type.pointee
        cell = self.build.bitcast(pointer, ir.VectorType(element, self.lanes).as_pointer())
        return self.build.load(cell, align=_bytes(element))

    def store(self, cell: Any, pointer: Any) -> None:
        start = self.build.bitcast(pointer, cell.type.as_pointer())
        self.build.store(cell, start, align=_bytes(pointer.type.pointee))

    def spread(self, number: Any) -> Any:
        """A cell that holds the number everywhere."""
        first = self.build.insert_element(self.zero, number, ir.IntType(32)(0))
        return self.build.shuffle_vector(first, self.zero, self.integers(0))

    def widened(self, cell: Any) -> Any:
        """float32 of bfloat16, which is its upper half."""
        bits = self.build.zext(cell, self.integers(0).type)
        return self.build.bitcast(self.build.shl(bits, self.integers(16)), self.zero.type)

    def narrowed(self, cell: Any) -> Any:
        """bfloat16 of float32, rounded to nearest, ties to even. Not for NaN."""
        build = self.build
        bits = build.bitcast(cell, self.integers(0).type)
        odd = build.and_(build.lshr(bits, self.integers(16)), self.integers(1))
        rounded = build.add(bits, build.add(odd, self.integers(0x7FFF)))
        upper = build.lshr(rounded, self.integers(16))
        return build.trunc(upper, ir.VectorType(_SHORT, self.lanes))

    def integers(self, value: int) -> Any:
        return ir.VectorType(ir.IntType(32), self.lanes)([value] * self.lanes)


def _bytes(element: Any) -> int:
    return 2 if element == _SHORT else 4


_tile, _entry = _function(_LANES), _function(1)
"""Of a job's address, that of K free tiles, and the first row and column: insert all samples'
products of the whole tile, or of that entry alone."""


# Numba's cache only sees changes of this file: what is called from here has to be in it.
@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def sink_share(job: Any, part: int, parts: int) -> None:
    """One of equal parts of a job's output rows, tile by tile; entry by entry at the edges."""
    kept, rows, width = job[0], job[1], job[2]
    slots = np.empty(kept * ROWS * COLUMNS, np.float32)
    at, free = job.ctypes.data, slots.ctypes.data
    groups = (rows + ROWS - 1) // ROWS
    for group in range(groups * part // parts, groups * (part + 1) // parts):
        row = group * ROWS
        for column in range(0, width, COLUMNS):
            if row + ROWS <= rows and column + COLUMNS <= width:
                _tile(at, free, row, column)
            else:
                for r in range(row, min(row + ROWS, rows)):
                    for c in range(column, min(column + COLUMNS, width)):
                        _entry(at, free, r, c)
