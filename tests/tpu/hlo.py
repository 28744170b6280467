"""What an optimised program does to a device's main memory, read from its text.

XLA's own count of "bytes accessed" is not that. It adds what is read and written in the core's memory to what crosses
to main memory, so a weight that is prefetched is counted three times; it counts the body of a loop of unknown length
once, and of a kernel of ours what the kernel claims. :func:`traffic` counts

* of an instruction the operands that it reads and the result that it writes, where they lie in main memory;
* of a (dynamic) slice or a gather, also inside a fusion, what it takes and not what it takes it from;
* of a (dynamic) update of a slice or a scatter what it puts there;
* of a loop its body as often as it is said to run; of a kernel what is said that it moves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16, "bf16": 16,
    "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "iota",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "copy-done",
        "all-gather-done",
        "all-reduce-done",
        "collective-permute-done",
        "async-update",
    ]
)
_TAKES = frozenset(("slice", "dynamic-slice", "gather"))
_PUTS = {"dynamic-update-slice": 1, "scatter": 2}
"""Which operand is what is put there."""


@dataclass(frozen=True)
class Value:
    """An array. ``nbytes``: of its elements; ``main``: whether it lies in the device's main memory."""

    dtype: str
    shape: tuple[int, ...]
    main: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS.get(self.dtype, 0) // 8

    @property
    def moved(self) -> int:
        """Bytes that cross between main memory and the core when it is read or written."""
        return self.nbytes if self.main else 0


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    values: tuple[Value, ...]
    """Of its result: more than one of a tuple."""
    argument: str
    """What stands in its brackets."""
    rest: str
    root: bool

    @property
    def moved(self) -> int:
        return sum(value.moved for value in self.values)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.values)

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.argument)

    @property
    def called(self) -> list[str]:
        branches = _BRANCHES.search(self.rest)
        named = [] if branches is None else [name.strip().lstrip("%") for name in branches[1].split(",")]
        return _CALLED.findall(self.rest) + named


@dataclass
class Computation:
    name: str
    entry: bool
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)


def parse(text: str) -> dict[str, Computation]:
    """The computations of a module, by name."""
    found: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if (begins := _COMPUTATION.match(line)) and " = " not in line.split("(")[0]:
            current = found.setdefault(begins[2], Computation(begins[2], bool(begins[1])))
        elif current is not None and (named := _INSTRUCTION.match(line)):
            each = _instruction(named[2], line[named.end() :], bool(named[1]))
            current.instructions[each.name] = each
    return found


def _instruction(name: str, line: str, root: bool) -> Instruction:
    end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    shape, line = line[:end], line[end:].lstrip()
    at = line.index("(")
    stop = _closing(line, at)
    values = tuple(
        Value(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in (layout or "").replace("S(0)", ""))
        for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    )
    return Instruction(name, line[:at], values, line[at + 1 : stop], line[stop + 1 :], root)


def _closing(line: str, at: int) -> int:
    depth = 0
    for i in range(at, len(line)):
        depth += {"(": 1, ")": -1}.get(line[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket in {line!r}")


def everywhere(module: Mapping[str, Computation]) -> Iterator[Instruction]:
    """Every instruction of a module."""
    for computation in module.values():
        yield from computation.instructions.values()


def entry(module: Mapping[str, Computation]) -> Computation:
    return next(c for c in module.values() if c.entry)


Times = Callable[[Instruction], int]
"""How often a loop runs; how many bytes a kernel moves."""


def traffic(module: Mapping[str, Computation], loops: Times, kernels: Times) -> int:
    """Bytes between the device's main memory and its cores, by the rules at the top."""
    return sum(n for _, n in accounts(module, loops, kernels))


def accounts(module: Mapping[str, Computation], loops: Times, kernels: Times) -> list[tuple[Instruction, int]]:
    """The same, instruction by instruction, those of loops and calls under the loop or call."""

    def of(computation: Computation) -> list[tuple[Instruction, int]]:
        return [(each, cost(computation, each)) for each in computation.instructions.values()]

    def cost(within: Computation, each: Instruction) -> int:
        inner = [module[name] for name in each.called if name in module]
        if each.opcode in _FREE or each.opcode.endswith("-done"):
            return each.moved if each.opcode in ("copy-done", "slice-done") else 0
        if each.opcode == "while":
            return loops(each) * sum(n for c in inner for _, n in of(c))
        if each.opcode == "conditional":
            return max(sum(n for _, n in of(c)) for c in inner)
        if each.opcode == "call":
            return sum(n for c in inner for _, n in of(c))
        if each.opcode == "custom-call" and "tpu_custom_call" in each.rest:
            return kernels(each)
        operands = [within.instructions[name] for name in each.operands if name in within.instructions]
        if each.opcode == "fusion":
            return _fused(module[each.called[0]], each, operands)
        if each.opcode.endswith("-start") and each.opcode != "async-start":
            return sum(o.moved for o in operands) if each.opcode == "copy-start" else _taken(each)
        return _plain(each, operands)

    return of(entry(module))


def _taken(each: Instruction) -> int:
    """Of a slice or collective under way: its operand lies first in its result, what it gives after that."""
    return each.values[1].nbytes if len(each.values) > 1 and each.values[0].main else 0


def _plain(each: Instruction, operands: Sequence[Instruction]) -> int:
    if each.opcode in _TAKES:
        read = each.nbytes if operands[0].values[0].main else 0
        return read + each.moved + sum(o.moved for o in operands[1:])
    if each.opcode in _PUTS:
        put = operands[_PUTS[each.opcode]]
        written = put.nbytes if each.values[0].main else 0
        return written + sum(o.moved for o in operands[1:])
    return each.moved + sum(o.moved for o in operands)


def _fused(computation: Computation, each: Instruction, operands: Sequence[Instruction]) -> int:
    """What a fusion reads of each operand and writes."""
    inside = computation.instructions
    users: dict[str, list[Instruction]] = {}
    for i in inside.values():
        for name in i.operands:
            users.setdefault(name, []).append(i)

    def read(name: str, whole: int) -> int:
        total = 0
        for user in users.get(name, []):
            if user.opcode in _TAKES and user.operands[0] == name:
                total += user.nbytes
            elif user.opcode in _PUTS and user.operands[0] == name:
                continue
            elif user.opcode in ("bitcast", "get-tuple-element"):
                total += read(user.name, whole)
            else:
                return whole
        return min(total, whole)

    def written(instruction: Instruction, main: bool) -> int:
        while instruction.opcode == "bitcast":
            instruction = inside[instruction.operands[0]]
        if instruction.opcode in _PUTS:
            put = inside[instruction.operands[_PUTS[instruction.opcode]]]
            return put.nbytes if main else 0
        return instruction.nbytes if main else 0

    parameters = {int(i.argument): i.name for i in inside.values() if i.opcode == "parameter"}
    moved = sum(read(parameters[n], o.nbytes) for n, o in enumerate(operands) if o.values[0].main)
    root = computation.root
    if root.opcode == "tuple":
        roots = [inside[name] for name in root.operands]
        return moved + sum(written(r, v.main) for r, v in zip(roots, each.values, strict=False))
    return moved + written(root, each.values[0].main)
