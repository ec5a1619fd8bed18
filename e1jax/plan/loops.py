"""How often the loops of a compiled program run, from their conditions and start values."""

import dataclasses
import re

from e1jax.plan.hlo import Computation, Instruction, called


@dataclasses.dataclass(frozen=True)
class Frame:
    """A computation where it is executed: its parameters are the caller's arrays."""

    computation: Computation
    caller: "Frame | None" = None
    arguments: tuple[str, ...] = ()
    body: Computation | None = None  # of the loop, if it is a loop's


class TripCounts:
    """Of the loops of a program with these computations."""

    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations

    def of(self, frame: Frame, op: Instruction) -> int | None:
        """How often a `while` runs, if the text states it, or shows it by `index < bound`
        and `index + step`; None: it does not."""
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.attributes)
        if stated:
            return int(stated[1])
        body = called(self.computations, op, "body")
        condition = called(self.computations, op, "condition")
        inside = Frame(condition, frame, op.operands, body)
        test = condition[condition.root]
        found = self._binary(inside, test, "compare")
        if found is None:
            return None
        (index, bound), test = found
        direction = test.attribute("direction")
        if direction == "GT":
            index, bound = bound, index
        elif direction != "LT":
            return None
        index = self._element(condition, index)
        if index is None or not isinstance(bound, int | str):
            return None
        limit = self._value(inside, bound)
        start = self._value_of_element(frame, op.operands[0], index)
        step = self._step(Frame(body, frame, op.operands, body), index)
        if limit is None or start is None or not step or step < 0:
            return None
        return max(0, -(-(limit - start) // step))

    def _binary(
        self, frame: Frame, op: Instruction, opcode: str
    ) -> tuple[list[int | str], Instruction] | None:
        """The two operands of a `compare` or `add`, which a fusion may hold: names in
        the frame, or numbers that stand in the fusion."""
        if op.opcode == opcode:
            return list(op.operands), op
        if op.opcode != "fusion":
            return None
        inner = called(self.computations, op, "calls")
        root = inner[inner.root]
        if root.opcode != opcode:
            return None
        operands: list[int | str] = []
        for name in root.operands:
            if name in inner.parameters:
                operands.append(op.operands[inner.parameters.index(name)])
            elif (value := self._value(Frame(inner), name)) is not None:
                operands.append(value)
            else:
                return None
        return operands, root

    def _step(self, inside: Frame, index: int) -> int | None:
        """The increment of element `index` of a loop's state, per iteration."""
        body = inside.computation
        new = body.source(body[body.root].operands[index])
        found = self._binary(inside, body[new], "add")
        if found is None:
            return None
        for one, other in (found[0], found[0][::-1]):
            if self._element(body, one) == index:
                return self._value(inside, other)
        return None

    def _element(self, computation: Computation, name: int | str) -> int | None:
        """Which element of the computation's one parameter it is, if it is one."""
        if isinstance(name, int):
            return None
        op = computation[computation.source(name)]
        if op.opcode != "get-tuple-element" or op.operands != computation.parameters:
            return None
        return int(str(op.attribute("index")))

    def _value(self, frame: Frame, name: int | str) -> int | None:
        """The value of an integer that does not change while the program runs."""
        if isinstance(name, int):
            return name
        computation = frame.computation
        op = computation[computation.source(name)]
        if op.opcode == "constant":
            return int(op.literal) if re.fullmatch(r"-?\d+", op.literal) else None
        if op.opcode == "get-tuple-element":
            index = int(str(op.attribute("index")))
            return self._value_of_element(frame, op.operands[0], index)
        if op.opcode == "parameter" and frame.caller and not frame.body:
            position = computation.parameters.index(op.name)
            return self._value(frame.caller, frame.arguments[position])
        return None

    def _value_of_element(self, frame: Frame, name: str, index: int) -> int | None:
        """`_value` of an element of a tuple; a loop must hand it on as it is."""
        op = frame.computation[name]
        if op.opcode == "tuple":
            return self._value(frame, op.operands[index])
        if op.opcode == "while":
            if self._keeps(called(self.computations, op, "body"), index):
                return self._value_of_element(frame, op.operands[0], index)
        elif (
            op.opcode == "parameter"
            and frame.caller
            and (frame.body is None or self._keeps(frame.body, index))
        ):
            position = frame.computation.parameters.index(name)
            argument = frame.arguments[position]
            return self._value_of_element(frame.caller, argument, index)
        return None

    def _keeps(self, body: Computation, index: int) -> bool:
        root = body[body.root]
        return (
            root.opcode == "tuple"
            and self._element(body, root.operands[index]) == index
        )
