"""The cost of a compiled program, read from its HLO text.

`account(compiled.as_text())` goes through the text of an XLA program as it is executed
and adds up, for one device: bytes read from and written to its main memory (HBM), flops
of matrix products, the compiler's own estimate of cycles, and the traffic of
the interconnect. `compiled.cost_analysis()` cannot be used for that: it counts the body of a
loop once, however often it runs.

- A loop counts as often as it runs: as the text says, or as its condition and start
  values show, or as the caller says; the others are listed and count once.
- Of a conditional, the costliest branch counts.
- Arrays whose layout names a memory space, S(1) being the on-chip memory of a TPU, cost
  no HBM traffic. Padding of tiles is not counted.
- A slice costs its result, an update in place its operand, in fusions too.
- A custom call, a Pallas kernel say, has the cost that its author states (`pl.CostEstimate`),
  wherever its arrays are, and nothing if nothing is stated. One whose cost grows with
  the filled positions of a cache states it for a full cache: see `Op.filled`.
- A collective that the compiler hides in a fusion is found and listed.
- The compiler gives no cycles for some operations, collectives and kernels among them.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from e1jax.plan.hlo import (
    COLLECTIVES,
    MOVES,
    Computation,
    Cost,
    Instruction,
    Shape,
    called,
    parse,
)
from e1jax.plan.loops import Frame, TripCounts

# Nothing is moved or computed: names for existing arrays, or for their addresses.
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"),
}


_SLICES = ("dynamic-slice", "slice", "gather")


_UPDATES = ("dynamic-update-slice", "scatter")


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction that is executed `times` times; other figures are of one time."""

    name: str
    opcode: str
    op_name: str  # where it comes from: jit(step)/while/body/dot_general
    target: str  # of a custom call
    times: int
    depth: int  # loops that it stands in
    bytes: int  # read from and written to HBM
    flops: int  # of matrix products, two per multiplication; all that a kernel states
    cycles: int | None  # None: no estimate
    payload: int = 0  # of a collective: bytes of the full array that it gives or takes
    groups: tuple[tuple[int, ...], ...] | None = (
        None  # of a collective: see Instruction
    )
    is_beside: bool = False  # a collective that goes on beside other work
    is_copy: bool = False  # it only moves an array, from HBM to HBM
    states_cost: bool = False  # a kernel with an estimate by its author
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)  # of a kernel

    def filled(self, positions: int) -> "Op":
        """The same where each row of the cache has so many positions filled: of a kernel
        that states its cost for all `positions` of its metadata and reads blocks of
        `block_len`, the share of the blocks that hold some."""
        if "positions" not in self.metadata:
            return self
        full, block_len = (int(self.metadata[k]) for k in ("positions", "block_len"))
        share = min(1.0, math.ceil(positions / block_len) * block_len / full)
        scaled = {
            "bytes": round(share * self.bytes),
            "flops": round(share * self.flops),
        }
        return dataclasses.replace(self, **scaled)


@dataclasses.dataclass(frozen=True)
class Account:
    """All that one device does in one call of a program."""

    ops: list[Op]
    unknown_loops: list[str]  # op_name of loops that count once, for want of a number

    @property
    def bytes(self) -> int:
        """Bytes that all operations read and write in HBM."""
        return sum(op.times * op.bytes for op in self.ops)

    @property
    def flops(self) -> int:
        """Floating-point operations of all matrix products that are not in kernels."""
        kernels = sum(op.times * op.flops for op in self.custom_calls)
        return sum(op.times * op.flops for op in self.ops) - kernels

    @property
    def cycles(self) -> int:
        """Cycles that the compiler estimates, where it does."""
        return sum(op.times * (op.cycles or 0) for op in self.ops)

    @property
    def collectives(self) -> list[Op]:
        """Operations that send data between devices."""
        return [op for op in self.ops if op.opcode in COLLECTIVES]

    @property
    def custom_calls(self) -> list[Op]:
        """Kernels: calls that the compiler does not look into."""
        return [op for op in self.ops if op.opcode == "custom-call"]

    def copies(self, at_least: int) -> list[Op]:
        """Moves of arrays within HBM that read and write `at_least` bytes each time."""
        return [op for op in self.ops if op.is_copy and op.bytes >= at_least]

    def filled(self, positions: int) -> "Account":
        """The same with so many positions of each row of the cache filled."""
        return Account([op.filled(positions) for op in self.ops], self.unknown_loops)

    def in_loop(self, count: int) -> "Account":
        """The same operations in a loop that runs `count` times."""
        ops = [
            dataclasses.replace(op, times=op.times * count, depth=op.depth + 1)
            for op in self.ops
        ]
        return Account(ops, self.unknown_loops)

    def per_iteration(self) -> "Account":
        """The operations inside loops only."""
        return Account([op for op in self.ops if op.depth], self.unknown_loops)


def account(
    text: str, trip_count: Callable[[str], int | None] = lambda op_name: None
) -> Account:
    """The account of a compiled program's text.

    `trip_count` is asked, by its op_name ("jit(step)/while/body/while"), for a loop
    whose count the text does not tell; None: not known. Raises ValueError for text that
    is not of a compiled program.
    """
    computations, entry = parse(text)
    return _Walk(computations, trip_count).account(Frame(computations[entry]))


class _Walk:
    def __init__(
        self,
        computations: dict[str, Computation],
        trip_count: Callable[[str], int | None],
    ):
        self.computations, self.trip_count = computations, trip_count
        self.trip_counts = TripCounts(computations)

    def account(self, frame: Frame) -> Account:
        """The account of one execution."""
        total = Account([], [])
        channels: set[str | None] = set()
        for op in frame.computation.instructions.values():
            if op.opcode in _FREE or op.opcode.endswith(("-done", "-update")):
                continue
            for part in self._parts(frame, op, channels):
                total.ops.extend(part.ops)
                total.unknown_loops.extend(part.unknown_loops)
        return total

    def _parts(
        self, frame: Frame, op: Instruction, channels: set[str | None]
    ) -> Iterator[Account]:
        if op.opcode == "while":
            yield from self._loop(frame, op)
        elif op.opcode == "conditional":
            branches = [self.account(branch) for branch in self._branches(frame, op)]
            yield max(branches, key=lambda a: (a.cycles, a.bytes, a.flops))
        elif op.opcode in ("call", "async-start"):
            callee = called(
                self.computations, op, "to_apply", "calls", "called_computation"
            )
            yield self.account(Frame(callee, frame, op.operands))
        else:
            yield Account(list(self._leaf(frame.computation, op, channels)), [])

    def _branches(self, frame: Frame, op: Instruction) -> Iterator[Frame]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
        if listed:
            names = re.findall(r"%([\w.\-]+)", listed[1])
        else:
            names = [
                op.attribute(f"{which}_computation") for which in ("true", "false")
            ]
        for name, argument in zip(names, op.operands[1:], strict=True):
            yield Frame(self.computations[str(name)], frame, (argument,))

    def _loop(self, frame: Frame, op: Instruction) -> Iterator[Account]:
        body = called(self.computations, op, "body")
        condition = called(self.computations, op, "condition")
        inside = Frame(body, frame, op.operands, body)
        count = self.trip_counts.of(frame, op)
        if count is None:
            count = self.trip_count(op.op_name)
        unknown = [op.op_name] if count is None else []
        count = 1 if count is None else count
        yield Account([], unknown)
        test = dataclasses.replace(inside, computation=condition)
        yield self.account(inside).in_loop(count)
        yield self.account(test).in_loop(count)

    # Everything else.

    def _leaf(
        self, computation: Computation, op: Instruction, channels: set[str | None]
    ) -> Iterator[Op]:
        hidden = list(self._hidden_collectives(op))
        for inner, collective in hidden:
            # One that runs beside other work stands in each fusion that it spans.
            channel = collective.attribute("channel_id")
            if channel is None or channel not in channels:
                channels.add(channel)
                yield self._collective(inner, collective, around=op)
        if op.is_collective:
            yield self._collective(computation, op)
            return
        cycles = re.search(r'"estimated_cycles":"(\d+)"', op.attributes)
        stated = op.stated_cost or Cost(0, 0)
        target = re.search(r'custom_call_target="([^"]*)"', op.attributes)
        yield Op(
            name=op.name,
            opcode=op.opcode,
            op_name=op.op_name,
            target=target[1] if target else "",
            times=1,
            depth=0,
            bytes=stated.bytes or self._bytes(computation, op),
            flops=stated.flops or self._flops(computation, op),
            cycles=int(cycles[1]) if cycles else None,
            is_copy=self._is_copy(computation, op),
            states_cost=op.stated_cost is not None,
            metadata=op.kernel_metadata,
        )

    def _hidden_collectives(
        self, op: Instruction
    ) -> Iterator[tuple[Computation, Instruction]]:
        if op.opcode == "fusion":
            inner = called(self.computations, op, "calls")
            for instruction in inner.instructions.values():
                if instruction.is_collective:
                    yield inner, instruction
                yield from self._hidden_collectives(instruction)

    def _collective(
        self,
        computation: Computation,
        op: Instruction,
        around: Instruction | None = None,
    ) -> Op:
        kind = op.opcode.removesuffix("-start")
        # A TPU scatters by a fusion of an all-reduce and a slice of its result.
        if around and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        given, results = _operand_shapes(computation, op), op.shapes
        if around:  # the place of its result is said outside of the fusion
            places = {(shape.dtype, shape.dims): shape for shape in around.shapes}
            results = [places.get((s.dtype, s.dims), s) for s in results]
        taken = sum(shape.bytes for shape in given)
        sizes = [shape.bytes for shape in op.shapes]
        result = max(sizes, default=0) if op.opcode.endswith("-start") else sum(sizes)
        moved = given if op.opcode.endswith("-start") else (*given, *results)
        return Op(
            name=op.name,
            opcode=kind,
            op_name=op.op_name,
            target="",
            times=1,
            depth=0,
            bytes=_in_hbm(moved),
            flops=0,
            cycles=None,
            payload=max(taken, result),
            groups=op.groups,
            is_beside=op.opcode.endswith("-start")
            or (around is not None and kind != "reduce-scatter"),
        )

    def _bytes(self, computation: Computation, op: Instruction) -> int:
        """HBM bytes that one execution reads and writes."""
        if op.opcode == "custom-call":
            return 0
        if op.opcode == "fusion":
            return self._fusion_bytes(computation, op)
        given = _operand_shapes(computation, op)
        if op.opcode == "copy-start":  # (destination, source, a flag)
            return _in_hbm(op.shapes[:2])
        kind = op.opcode.removesuffix("-start")
        if kind in _SLICES:
            # One that runs beside other work gives ((given), out, a flag).
            out = op.shapes[0 if kind == op.opcode else len(given)]
            read = _in_hbm([out._replace(space=given[0].space), *given[1:]])
            return read + _in_hbm([out])
        if op.opcode in _UPDATES:
            new, at = _updates(op, given)
            written = [shape._replace(space=op.shapes[0].space) for shape in new]
            return _in_hbm([*new, *at, *written])
        return _in_hbm([*given, *op.shapes])

    def _fusion_bytes(self, computation: Computation, op: Instruction) -> int:
        inner = called(self.computations, op, "calls")
        total = 0
        for operand, parameter in zip(op.operands, inner.parameters, strict=True):
            shapes = computation[operand].shapes
            if len(shapes) == 1 and shapes[0].space == 0:
                read = self._elements_read(inner, parameter)
                total += math.ceil(read * shapes[0].item_bytes)
        root = inner[inner.root]
        roots = root.operands if root.opcode == "tuple" else [inner.root]
        # A root that gives several arrays is a collective or a kernel: see _written.
        for shape, name in zip(op.shapes, roots, strict=root.opcode == "tuple"):
            if shape.space == 0:
                total += self._written(inner, name)
        return total

    def _elements_read(self, inner: Computation, name: str) -> int:
        """How many elements of an array a fusion really takes."""
        size = inner[name].shapes[0].size
        total = 0
        for user, position in inner.users(name):
            if user.opcode in MOVES and user.name != inner.root:
                total += self._elements_read(inner, user.name)
            elif user.opcode in _SLICES and position == 0:
                total += user.shapes[0].size
            elif user.opcode == "fusion":
                callee = called(self.computations, user, "calls")
                parameter = callee.parameters[position]
                if callee.source(callee.root) != parameter:
                    total += self._elements_read(callee, parameter)
                elif user.name != inner.root:  # a fusion that only moves it
                    total += self._elements_read(inner, user.name)
                else:
                    return size
            elif not (
                (user.opcode in _UPDATES and position == 0)
                # A collective's operand is counted with it, and only passes through
                # the fusions that run beside it.
                or user.opcode in ("tuple", "custom-call")
                or user.is_collective
            ):
                return size
        return min(total, size)

    def _written(self, inner: Computation, name: str) -> int:
        """Bytes that a fusion writes for a result of its own."""
        op = inner[name]
        if op.opcode in ("parameter", "custom-call") or op.is_collective:
            return 0
        if op.opcode == "bitcast":
            return self._written(inner, op.operands[0])
        if op.opcode in _UPDATES:
            return sum(s.bytes for s in _updates(op, _operand_shapes(inner, op))[0])
        if op.opcode == "fusion" and len(op.shapes) == 1:
            callee = called(self.computations, op, "calls")
            return self._written(callee, callee.root)
        return sum(shape.bytes for shape in op.shapes)

    def _is_copy(self, computation: Computation, op: Instruction) -> bool:
        if op.opcode == "copy-start":
            return all(shape.space == 0 for shape in op.shapes[:2])
        shapes = (*_operand_shapes(computation, op), *op.shapes)
        if any(shape.space for shape in shapes if shape.dims):
            return False
        if op.opcode == "fusion":
            inner = called(self.computations, op, "calls").instructions.values()
            opcodes = {instruction.opcode for instruction in inner}
            return opcodes <= {*MOVES, "parameter", "tuple"} and bool(
                opcodes & {"copy", "transpose"}
            )
        return op.opcode in ("copy", "transpose")

    def _flops(self, computation: Computation, op: Instruction) -> int:
        if op.opcode == "fusion":
            inner = called(self.computations, op, "calls")
            return sum(self._flops(inner, i) for i in inner.instructions.values())
        if op.opcode == "dot":
            left = computation[op.operands[0]].shapes[0].dims
            listed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
            dims = re.findall(r"\d+", listed[1] if listed else "")
            summed = math.prod(left[int(dim)] for dim in dims)
            return 2 * op.shapes[0].size * summed
        if op.opcode == "convolution":
            return _convolution_flops(op, *_operand_shapes(computation, op))
        return 0


def _operand_shapes(computation: Computation, op: Instruction) -> tuple[Shape, ...]:
    return tuple(shape for name in op.operands for shape in computation[name].shapes)


def _in_hbm(shapes: Sequence[Shape]) -> int:
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def _updates(
    op: Instruction, given: Sequence[Shape]
) -> tuple[Sequence[Shape], Sequence[Shape]]:
    """The operands of an update in place that hold new values, and the indices."""
    if op.opcode == "dynamic-update-slice":  # (array, update, index...)
        return given[1:2], given[2:]
    count = len(given) // 2  # (arrays..., indices, updates...)
    return given[count + 1 :], given[count : count + 1]


def _convolution_flops(op: Instruction, left: Shape, right: Shape) -> int:
    """A TPU's matrix products are convolutions, whose windows stand for batches."""
    labels = str(re.search(r"dim_labels=(\S+?)(,|$)", op.attributes + ",")[1])  # type: ignore[index]
    left_labels, right_labels, out_labels = re.split("_|->", labels)
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    settings = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}

    def per_dim(name: str, default: str) -> list[str]:
        return settings[name].split("x") if name in settings else [default] * count

    count = sum(label.isdigit() for label in out_labels)
    pairs = 1
    for dim in range(count):
        kernel = right.dims[right_labels.index(str(dim))]
        out = np.arange(op.shapes[0].dims[out_labels.index(str(dim))])
        low = int(per_dim("pad", "0_0")[dim].split("_")[0])
        stride = int(per_dim("stride", "1")[dim])
        at = out[:, None] * stride - low
        at = at + np.arange(kernel) * int(per_dim("rhs_dilate", "1")[dim])
        dilation = int(per_dim("lhs_dilate", "1")[dim])
        size = left.dims[left_labels.index(str(dim))]
        inside = (at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)
        pairs *= int(inside.sum())
    rows = op.shapes[0].dims[out_labels.index("b")]
    columns = op.shapes[0].dims[out_labels.index("f")]
    return 2 * rows * columns * right.dims[right_labels.index("i")] * pairs
