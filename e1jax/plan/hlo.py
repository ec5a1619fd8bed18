"""The text of a compiled XLA program, read into computations and instructions."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# These only say where the elements of an array come from.
MOVES = ("bitcast", "copy", "convert", "reshape", "transpose")


class Shape(NamedTuple):
    """An array; a tuple's arrays are listed one after the other."""

    dtype: str
    dims: tuple[int, ...]
    space: int  # 0: HBM

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def item_bytes(self) -> float:
        """Bytes of an element; half a byte for int4, 0 for tokens."""
        bits = re.search(r"\d+", self.dtype)
        return int(bits[0]) / 8 if bits else {"pred": 1}.get(self.dtype, 0)

    @property
    def bytes(self) -> int:
        """Bytes of the array, without padding."""
        return math.ceil(self.size * self.item_bytes)


class Cost(NamedTuple):
    """The cost of one call that a kernel's author states (`pl.CostEstimate`)."""

    flops: int
    bytes: int  # read and written


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str  # the text in the parentheses
    attributes: str  # the text after them

    def attribute(self, name: str) -> str | None:
        """A computation, or a word, that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """The path of JAX functions that the instruction comes from, or nothing."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def stated_cost(self) -> Cost | None:
        """Of a kernel whose author states one."""
        stated = re.search(r'"cost_estimate":(\{[^{}]*\})', self.attributes)
        if not stated:
            return None
        numbers = json.loads(stated[1])
        return Cost(int(numbers["flops"]), int(numbers["bytes_accessed"]))

    @property
    def kernel_metadata(self) -> dict[str, str]:
        """Further notes of a kernel's author (`metadata` of `pl.pallas_call`)."""
        found = re.search(r"kernel_metadata=(\{[^{}]*\})", self.attributes)
        return json.loads(found[1]) if found else {}

    @property
    def groups(self) -> tuple[tuple[int, ...], ...] | None:
        """Of a collective: the devices that exchange data, by their place in the program's
        order, or (from, to) of a permutation; (): all of them. None: not understood."""
        pairs = re.search(
            r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", self.attributes
        )
        if pairs:
            return _listed_groups(pairs[1])
        text = self.attributes.partition("replica_groups=")[2]
        if listed := re.match(r"\{((?:\{[\d,]+\},?)*)\}", text):
            return _listed_groups(listed[1])
        if counted := re.match(
            r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
        ):
            return _counted_groups(*counted.groups())
        if named := re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", text):
            return _named_groups(named[1], named[2])
        return None

    @property
    def is_collective(self) -> bool:
        """Whether it sends data between devices, or starts to."""
        return self.opcode.removesuffix("-start") in COLLECTIVES


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]  # in the order of their execution
    parameters: tuple[str, ...]
    root: str

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    def source(self, name: str) -> str:
        """Where an array comes from, whatever it is copied through."""
        while self[name].opcode in MOVES:
            name = self[name].operands[0]
        return name

    def users(self, name: str) -> Iterator[tuple[Instruction, int]]:
        """Each use: the instruction, and which of its operands it is."""
        for instruction in self.instructions.values():
            for position, operand in enumerate(instruction.operands):
                if operand == name:
                    yield instruction, position


def _listed_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """`{0,1},{2,3}`"""
    listed = re.findall(r"\{([\d,]+)\}", text)
    return tuple(tuple(int(n) for n in group.split(",")) for group in listed)


def _counted_groups(
    count: str, size: str, dims: str, order: str | None
) -> tuple[tuple[int, ...], ...]:
    """`[count,size]<=[dims]T(order)`: numbers from 0, an array of dims, transposed."""
    shape = [int(n) for n in dims.split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    if order:
        numbers = numbers.transpose([int(n) for n in order.split(",")])
    return tuple(map(tuple, numbers.reshape(int(count), int(size)).tolist()))


def _named_groups(mesh: str, axes: str) -> tuple[tuple[int, ...], ...] | None:
    """`mesh['a'=2,'b'=4] {'b'}`: the devices that differ on these axes."""
    sizes = dict(re.findall(r"('[^']*')=(\d+)", mesh))
    names = axes.split(",") if axes else []
    if not set(names) <= set(sizes):  # a part of an axis
        return None
    numbers = np.arange(math.prod(map(int, sizes.values())))
    numbers = numbers.reshape([int(size) for size in sizes.values()])
    order = [name for name in sizes if name not in names] + names
    numbers = numbers.transpose([list(sizes).index(name) for name in order])
    size = math.prod(int(sizes[name]) for name in names)
    return tuple(map(tuple, numbers.reshape(-1, size).tolist()))


def called(
    computations: dict[str, Computation], op: Instruction, *attributes: str
) -> Computation:
    """The computation that the first of the attributes which `op` has names."""
    names = [op.attribute(name) for name in attributes]
    return computations[next(name for name in names if name)]


_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\) -> .*\{$")


_NAMED = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the entry.

    Metadata of a kernel can run over several lines, of which one may begin with braces:
    a computation ends at a line that is one brace and nothing else.
    """
    computations, entry = {}, None
    name, lines = None, []
    for line in text.splitlines():
        if name is None:
            if header := _HEADER.match(line):
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif line == "}":
            computations[name] = _computation(name, lines)
            name = None
        elif _NAMED.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += " " + line
    if entry is None or entry not in computations:
        raise ValueError("this is not the text of a compiled program: no whole ENTRY")
    return computations, entry


def _computation(name: str, lines: Sequence[str]) -> Computation:
    instructions, parameters, root = {}, {}, ""
    for line in lines:
        instruction, is_root = _instruction(line)
        instructions[instruction.name] = instruction
        if instruction.opcode == "parameter":
            parameters[int(instruction.literal)] = instruction.name
        root = instruction.name if is_root else root
    ordered = tuple(parameters[index] for index in sorted(parameters))
    return Computation(name, instructions, ordered, root)


def _instruction(line: str) -> tuple[Instruction, bool]:
    """`  ROOT %name = f32[8]{0} opcode(%a, %b), attribute=...`"""
    line = re.sub(r"/\*.*?\*/", "", line)
    named = _NAMED.match(line)
    assert named  # or parse would have joined it to the line before
    start = named.end()
    # Not at the first space: in the type of a tuple there are some.
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    shapes = tuple(_shape(*found) for found in _ARRAY.findall(line[start:end]))
    opening = line.index("(", end)
    closing = _closing(line, opening)
    literal = line[opening + 1 : closing - 1]
    instruction = Instruction(
        name=named[2],
        opcode=line[end:opening].strip(),
        shapes=shapes,
        operands=tuple(re.findall(r"%([\w.\-]+)", literal)),
        literal=literal,
        attributes=line[closing:],
    )
    return instruction, bool(named[1])


def _closing(line: str, opening: int) -> int:
    """The index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, opening):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"an instruction has no end: {line[:80]!r}")


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(size) for size in re.findall(r"\d+", dims))
    return Shape(dtype, sizes, int(space[1]) if space else 0)
