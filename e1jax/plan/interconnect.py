"""The least time that collectives take on the interconnect (ICI) of a TPU slice.

Chips are the nodes of a grid, each linked to its neighbours; a link carries
`ici_bytes_per_second` both ways at the same time. How a compiler sends the data is not
known, but some bytes have to go anyway:

- Across the border of a region that has some devices of a group and not the others: of
  an array gathered there the part that lies outside, of a sum the part that is wanted
  inside. They are divided by the links of the border. Regions are single chips and all
  runs of planes across an axis.
- Over one link or more from each device that adds something to another: an array that
  n devices gather is sent n - 1 times in all, a sum that all of them get 2 (n - 1) times
  (Patarasuk and Yuan 2009). They are divided by the links along all axes on which the
  devices of a group differ.

The larger of both is the collective's time. Rings in both directions reach it on lines and
square grids of chips; an all-reduce over several axes, and a shift around a ring, take up
to twice as long. Latency is not in it. The times of collectives are added up: one comes
after the other.

By these bounds alone, devices scattered over the torus could use all of its links at once,
which no compiler does. A group that fills no line or box of chips is taken to pass its data
around a ring in the group's order, half of it in each direction, each hop by the shortest
way, one axis after the other; its time is the busiest link's, if that is more.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from e1jax.plan.account import Op
from e1jax.plan.slices import Slice


class Torus:
    """The chips of a slice, a device each, in a program's order of devices."""

    def __init__(
        self,
        coords: Sequence[Sequence[int]],
        is_ring: Sequence[bool],
        link_bytes_per_second: float,
    ):
        """`coords` [N, A] take in all places of a grid; `is_ring` [A] says on which axes
        the last chip is linked to the first one too."""
        self.coords = np.asarray(coords)
        self._is_ring = is_ring
        self._numbers = {
            tuple(place): i for i, place in enumerate(self.coords.tolist())
        }
        self.link_bytes_per_second = link_bytes_per_second
        starts, ends, self._axes = self._links(is_ring)
        self._regions = np.concatenate([self._slabs(), np.eye(len(coords), dtype=bool)])
        leaves = self._regions[:, starts] & ~self._regions[:, ends]
        self._border = leaves.sum(axis=1)

    def _links(self, is_ring: Sequence[bool]) -> np.ndarray:
        """[3, M]: where a link in one direction starts and ends, and its axis."""
        numbers = self._numbers
        sizes = self.coords.max(axis=0) + 1
        links = []
        for place, start in numbers.items():
            for axis, step in itertools.product(range(len(sizes)), (-1, 1)):
                other = list(place)
                other[axis] += step
                if is_ring[axis]:
                    other[axis] %= sizes[axis]
                if tuple(other) in numbers:
                    links.append((start, numbers[tuple(other)], axis))
        return np.array(links, int).reshape(-1, 3).T

    def _slabs(self) -> np.ndarray:
        """[R, N]: runs of planes. Runs across the seam of a ring are the complements of others."""
        slabs = [
            (low <= at) & (at < high)
            for at in self.coords.T
            for low, high in itertools.combinations(range(at.max() + 2), 2)
            if high - low <= at.max()
        ]
        return np.array(slabs, bool).reshape(-1, len(self.coords))

    def seconds(self, op: Op) -> float:
        """That one execution of a collective takes at least; its devices are known."""
        assert op.groups is not None
        groups = np.array(op.groups or [range(len(self.coords))])  # [G, n]
        if groups.shape[1] == 1:
            return 0.0
        crossing = self._crossing(op.opcode, groups).max(axis=0)  # [R]
        is_crossed = self._border > 0
        through = crossing[is_crossed] / self._border[is_crossed]
        spread = np.ptp(self.coords[groups], axis=1).any(axis=0)  # [A]
        links = spread[self._axes].sum()
        sent = _sent(op.opcode, groups) / links if links else 0.0
        around = self._around(op.opcode, groups)
        bytes_a_link = op.payload * max(through.max(initial=0.0), sent, around)
        return float(bytes_a_link) / self.link_bytes_per_second

    def _crossing(self, kind: str, groups: np.ndarray) -> np.ndarray:
        """[2, R]: the parts of each group's payload that enter and leave a region."""
        is_inside = self._regions[:, groups]  # [R, G, n]
        if kind == "collective-permute":
            start, end = is_inside[..., 0], is_inside[..., 1]
            return np.stack([end & ~start, start & ~end]).sum(axis=-1)
        size = groups.shape[1]
        inside = is_inside.sum(axis=-1)
        outside = size - inside
        if kind == "all-reduce":
            parts = np.ones((2, *inside.shape))
        elif kind == "all-to-all":
            parts = np.stack([inside * outside / size] * 2)
        else:  # an all-gather; a reduce-scatter is one in reverse
            parts = np.stack([outside, inside]) / size
        return np.where((inside > 0) & (outside > 0), parts, 0).sum(axis=-1)

    def _around(self, kind: str, groups: np.ndarray) -> float:
        """The part of the payload on the busiest link, if scattered groups go around
        rings; 0 for other groups."""
        boxes = np.ptp(self.coords[groups], axis=1) + 1  # [G, A]
        parts = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}
        if kind not in parts or (boxes.prod(axis=1) == groups.shape[1]).all():
            return 0.0
        rings = np.stack([groups, np.roll(groups, -1, axis=1)], axis=-1).reshape(-1, 2)
        hops = [*rings.tolist(), *rings[:, ::-1].tolist()]
        carried = collections.Counter(
            link for start, end in hops for link in self._way(start, end)
        )
        size = groups.shape[1]
        return max(carried.values()) * parts[kind] * (size - 1) / size / 2

    def _way(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The links from one chip to another."""
        at, sizes = self.coords[start].copy(), self.coords.max(axis=0) + 1
        for axis, size in enumerate(sizes):
            step = np.sign(self.coords[end][axis] - at[axis])
            if (
                self._is_ring[axis]
                and abs(self.coords[end][axis] - at[axis]) > size / 2
            ):
                step = -step
            while at[axis] != self.coords[end][axis]:
                here = self._numbers[tuple(at.tolist())]
                at[axis] = (at[axis] + step) % size
                yield here, self._numbers[tuple(at.tolist())]


_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
KINDS = (*_KINDS, "collective-permute")


def _sent(kind: str, groups: np.ndarray) -> int:
    """How often groups' payloads are sent by some device to another, in all."""
    if kind == "collective-permute":
        return int((groups[:, 0] != groups[:, 1]).sum())
    times = len(groups) * (groups.shape[1] - 1)
    return 2 * times if kind == "all-reduce" else times


class Traffic(NamedTuple):
    """The time of a program's collectives."""

    seconds: float  # of all of them
    beside: float  # of collectives that go on beside other work
    unknown: list[str]  # kinds of collectives that are not in it

    def with_work(self, seconds: float) -> float:
        """Of both, at best: collectives that the compiler started beside other work
        overlap with it; while it waits for another one, the chip does nothing else."""
        return self.seconds - self.beside + max(self.beside, seconds)


def traffic(collectives: Iterable[Op], torus: Torus) -> Traffic:
    """The time of a program's collectives together."""
    total = beside = 0.0
    unknown = set()
    for op in collectives:
        if op.opcode not in KINDS or op.groups is None:
            unknown.add(op.opcode)
            continue
        seconds = op.times * torus.seconds(op)
        total += seconds
        beside += seconds * op.is_beside
    return Traffic(total, beside, sorted(unknown))


def torus_of(slice_: Slice, mesh: Mesh) -> Torus:
    """The chips of a slice in the order of a mesh over them."""
    is_ring = slice_.is_ring
    coords = [device.coords[: len(is_ring)] for device in mesh.devices.flat]
    return Torus(coords, is_ring, slice_.chip.ici_bytes_per_second)
