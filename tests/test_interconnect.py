"""The floor of the interconnect, against bytes counted on every link of a torus."""

import collections
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e1jax.plan.account import Op, account
from e1jax.plan.interconnect import Torus, traffic
from e1jax.plan.slices import CHIPS, Slice

SPEED = 100.0


def torus(sizes, rings=None) -> Torus:
    """Devices in the order of their coordinates, the last one fastest."""
    coords = list(itertools.product(*map(range, sizes)))
    return Torus(coords, rings or [False] * len(sizes), SPEED)


def op(kind: str, payload: int, groups, times: int = 1, beside: bool = False) -> Op:
    return Op(
        **{"name": kind, "opcode": kind, "op_name": "", "target": "", "depth": 0},
        **{"bytes": 0, "flops": 0, "cycles": None, "times": times},
        payload=payload,
        groups=tuple(map(tuple, groups)),
        is_beside=beside,
    )


class Links:
    """Bytes on each link in one direction, counted as they are sent."""

    def __init__(self, sizes, rings):
        self.sizes, self.rings = sizes, rings
        self.bytes = collections.Counter()

    def place(self, device: int) -> tuple[int, ...]:
        return tuple(int(x) for x in np.unravel_index(device, self.sizes))

    def send(self, start: int, end: int, amount: float, axes=None) -> None:
        """By the shorter way on each axis in turn; half of it each way if both are."""
        at, goal = list(self.place(start)), self.place(end)
        for axis in axes or range(len(at)):
            size, ahead = self.sizes[axis], (goal[axis] - at[axis]) % self.sizes[axis]
            ways = [(ahead, 1), (size - ahead, -1)]
            if not self.rings[axis]:
                ways = [ways[0] if goal[axis] >= at[axis] else ways[1]]
            shortest = min(hops for hops, _ in ways)
            ways = [way for way in ways if way[0] == shortest]
            for hops, step in ways:
                here = list(at)
                for _ in range(hops):
                    there = list(here)
                    there[axis] = (here[axis] + step) % size
                    self.bytes[tuple(here), tuple(there)] += amount / len(ways)
                    here = there
            at[axis] = goal[axis]

    def pass_on(self, group, amount: float, axes=None) -> None:
        """Each device's part of a gathered array goes from one to the next, both ways
        along a line; around a ring half of it in each direction."""
        n = len(group)
        closed = self.rings[-1] if axes is None else self.rings[axes[0]]
        for i in range(n):
            if closed:
                for k in range(n - 1):
                    ahead = group[(i + k) % n], group[(i + k + 1) % n]
                    back = group[(i - k) % n], group[(i - k - 1) % n]
                    self.send(*ahead, amount / 2, axes)
                    self.send(*back, amount / 2, axes)
                continue
            for start, end in itertools.pairwise(group[i:]):
                self.send(start, end, amount, axes)
            for start, end in itertools.pairwise(group[i::-1]):
                self.send(start, end, amount, axes)

    def seconds(self) -> float:
        return max(self.bytes.values()) / SPEED


def lines(count: int, length: int) -> np.ndarray:
    return np.arange(count * length).reshape(count, length)


@pytest.mark.parametrize(
    ("sizes", "rings"),
    [((3, 8), (False, False)), ((2, 16), (False, True)), ((1, 2), (False, False))],
)
def test_gathering_along_lines_and_rings(sizes, rings):
    """An array of 7 n bytes; of a sum that is scattered as much goes the other way."""
    groups, links = lines(*sizes), Links(sizes, rings)
    for group in groups.tolist():
        links.pass_on(group, 7.0)
    for kind in ("all-gather", "reduce-scatter"):
        collective = op(kind, 7 * sizes[1], groups)
        assert torus(sizes, rings).seconds(collective) == pytest.approx(links.seconds())


def test_the_hand_count_of_a_line_and_of_a_ring():
    """Of 8 chips in a line, the last one gets 7 of 8 parts over its one link; of 16 in a
    ring, each gets 15 of 16 over two."""
    line = torus((8,)).seconds(op("all-gather", 8000, lines(1, 8)))
    assert line == pytest.approx(7000 / SPEED)
    ring = torus((16,), [True]).seconds(op("all-gather", 16000, lines(1, 16)))
    assert ring == pytest.approx(15000 / 2 / SPEED)


def test_interleaved_groups_share_the_links_between_them():
    """Every second chip of a line of 8: each part passes through the other group's."""
    groups, links = [[0, 2, 4, 6], [1, 3, 5, 7]], Links((8,), (False,))
    for group in groups:
        links.pass_on(group, 5.0)
    seconds = torus((8,)).seconds(op("all-gather", 20, groups))
    assert seconds == pytest.approx(links.seconds())
    apart = torus((8,)).seconds(op("all-gather", 20, [[0, 1, 2, 3], [4, 5, 6, 7]]))
    assert seconds == pytest.approx(2 * apart)


@pytest.mark.parametrize("sizes", [(4, 4), (2, 4), (3, 3)])
def test_gathering_over_two_axes_uses_the_links_of_both(sizes):
    """Half of the array first along columns and then along rows, half the other way."""
    links, grid = Links(sizes, (False, False)), lines(*sizes)
    for first, second in ((0, 1), (1, 0)):
        across = grid if first else grid.T
        for group in across.tolist():
            links.pass_on(group, 0.5, [first])
        for group in across.T.tolist():
            links.pass_on(group, 0.5 * across.shape[1], [second])
    seconds = torus(sizes).seconds(op("all-gather", grid.size, [grid.flatten()]))
    if sizes[0] == sizes[1]:
        assert seconds == pytest.approx(links.seconds())
    # Where the sides differ, halves are not the best division; and it is a corner's two
    # links over which it gets all parts but its own.
    assert links.seconds() >= seconds >= (grid.size - 1) / 2 / SPEED


@pytest.mark.parametrize(
    ("sizes", "rings", "count", "length"),
    [((8,), (False,), 1, 8), ((16,), (True,), 1, 16), ((4, 6), (False, False), 4, 6)],
)
def test_an_exchange_of_all_with_all(sizes, rings, count, length):
    groups, links = lines(count, length), Links(sizes, rings)
    for group in groups.tolist():
        for start, end in itertools.permutations(group, 2):
            links.send(start, end, 3.0)
    collective = op("all-to-all", 3 * length, groups)
    assert torus(sizes, rings).seconds(collective) == pytest.approx(links.seconds())


@pytest.mark.parametrize("ring", [False, True])
def test_a_shift_along_lines(ring):
    """Without a link from the last to the first, that part goes all the way back; with
    it, the floor takes the links of both directions for usable."""
    pairs = [(row + i, row + (i + 1) % 16) for row in (0, 16) for i in range(16)]
    links = Links((2, 16), (False, ring))
    for start, end in pairs:
        links.send(start, end, 10.0)
    seconds = torus((2, 16), (False, ring)).seconds(op("collective-permute", 10, pairs))
    assert links.seconds() == pytest.approx(10 / SPEED)
    assert seconds == pytest.approx(links.seconds() / (2 if ring else 1))


def test_a_far_permutation_is_divided_among_the_links_it_crosses():
    pairs = [(0, 4), (1, 5), (2, 6), (3, 7), (7, 7)]
    links = Links((8,), (False,))
    for start, end in pairs:
        links.send(start, end, 10.0)
    seconds = torus((8,)).seconds(op("collective-permute", 10, pairs))
    assert seconds == pytest.approx(links.seconds()) == 40 / SPEED


def test_what_leaves_a_run_of_planes_in_the_middle_of_a_ring():
    pairs = [(6, 2), (7, 3), (8, 12), (9, 13)]
    links = Links((16,), (True,))
    for start, end in pairs:
        links.send(start, end, 10.0)
    seconds = torus((16,), [True]).seconds(op("collective-permute", 10, pairs))
    assert seconds == pytest.approx(links.seconds()) == 20 / SPEED


def test_sums_that_all_devices_get():
    """Along a line: inwards to the middle, and outwards again. Around two rings beside
    each other: scattered and gathered."""
    links = Links((8,), (False,))
    for i in range(4):
        for there, middle in ((i, i + 1), (7 - i, 6 - i)):
            if {there, middle} != {3, 4} or there == 3:
                links.send(there, middle, 8.0)
                links.send(middle, there, 8.0)
    line = torus((8,)).seconds(op("all-reduce", 8, lines(1, 8)))
    assert line == pytest.approx(links.seconds()) == 8 / SPEED
    rings = (False, True)
    links = Links((2, 16), rings)
    for group in lines(2, 16).tolist() * 2:
        links.pass_on(group, 1.0)
    ring = torus((2, 16), rings).seconds(op("all-reduce", 16, lines(2, 16)))
    assert ring == pytest.approx(links.seconds()) == 15 / SPEED


@pytest.mark.parametrize(("sizes", "ring"), [((4, 4), False), ((2, 16), True)])
def test_scattered_groups_go_around_rings(sizes, ring):
    """Devices in blocks of 2 x 2, and groups of every fourth, a chip of each block: half
    of an array each way around the group."""
    rows, columns = sizes
    blocks = np.arange(rows * columns).reshape(rows // 2, 2, columns // 2, 2)
    groups = blocks.transpose(1, 3, 0, 2).reshape(4, -1)
    rings = (False, ring)
    links, n = Links(sizes, rings), groups.shape[1]
    for group in groups.tolist():
        for start, end in zip(group, group[1:] + group[:1], strict=True):
            links.send(start, end, (n - 1) / 2)
            links.send(end, start, (n - 1) / 2)
    scattered = torus(sizes, rings)
    for kind, times in (("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)):
        seconds = scattered.seconds(op(kind, n, groups))
        assert seconds == pytest.approx(times * links.seconds())


@given(st.data())
@settings(max_examples=60)
def test_no_way_of_sending_is_faster(data):
    """Groups of any devices, each part sent to each by itself, and along the group."""
    sizes = data.draw(st.sampled_from([(2, 3), (4, 2), (2, 2, 2), (6,)]))
    ring = data.draw(st.booleans()) and max(sizes) > 2
    rings = [ring and size > 2 for size in sizes]
    count = int(np.prod(sizes))
    size = data.draw(
        st.sampled_from([n for n in range(2, count + 1) if count % n == 0])
    )
    order = data.draw(st.permutations(range(count)))
    groups = np.array(order).reshape(-1, size)
    seconds = torus(sizes, rings).seconds(op("all-gather", size, groups))
    directly, along = Links(sizes, rings), Links(sizes, rings)
    for group in groups.tolist():
        for start, end in itertools.permutations(group, 2):
            directly.send(start, end, 1.0)
        for i in range(size):
            for k in range(size - 1):
                along.send(group[(i + k) % size], group[(i + k + 1) % size], 1.0)
    # Around the ring in one direction no link carries more than in both together.
    assert 0 < seconds <= 2 * along.seconds() + 1e-9
    scattered = torus(sizes, rings)
    scattered._around = lambda *_: 0.0
    least = scattered.seconds(op("all-gather", size, groups))
    assert 0 < least <= min(seconds, directly.seconds(), along.seconds()) + 1e-9


def test_collectives_beside_other_work_overlap_with_it():
    line = torus((8,))
    waited = op("all-gather", 8000, lines(1, 8), times=3)
    hidden = op("all-gather", 8000, [], times=2, beside=True)  # (): all devices
    odd = op("ragged-all-to-all", 8000, lines(1, 8))
    moved = traffic([waited, hidden, odd], line)
    assert moved.seconds == pytest.approx(5 * 70) and moved.beside == pytest.approx(140)
    assert moved.unknown == ["ragged-all-to-all"]
    assert moved.with_work(100) == pytest.approx(3 * 70 + 140)
    assert moved.with_work(1000) == pytest.approx(3 * 70 + 1000)


@pytest.mark.parametrize(
    ("topology", "is_ring"),
    [
        ("v5e:8x16", (False, True)),
        ("v5e:8x8", (False, False)),
        ("v6e:16x16", (True, True)),
        ("v5p:2x2x4", (False, False, False)),
        ("v5p:2x4x4", (False, False, False)),
        ("v5p:4x4x8", (True, True, True)),
    ],
)
def test_axes_that_close_to_a_ring(topology, is_ring):
    chip = CHIPS[topology.partition(":")[0]]
    assert Slice(topology, chip, []).is_ring == is_ring


@pytest.mark.parametrize(
    ("attribute", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups={}", ()),
        ("replica_groups=[2,3]<=[6]", ((0, 1, 2), (3, 4, 5))),
        ("replica_groups=[3,2]<=[2,3]T(1,0)", ((0, 3), (1, 4), (2, 5))),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}", ((0, 1, 2), (3, 4, 5))),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}", ((0, 3), (1, 4), (2, 5))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", ((0, 2, 1, 3),)),
        ("replica_groups=mesh['a'=6] {'a':(2)3}", None),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("channel_id=3", None),
    ],
)
def test_groups_of_devices_are_read(attribute, groups):
    text = (
        "ENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n"
        f"  ROOT %r = f32[8]{{0}} all-reduce(%a), channel_id=1, {attribute}, "
        "use_global_device_ids=true, to_apply=%sum\n}\n"
    )
    [collective] = account(text).collectives
    assert collective.groups == groups


PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from e1jax.plan.account import account
from e1jax.plan.interconnect import torus_of, traffic
from e1jax.plan.slices import describe
from e1jax.sharding.mesh import device_grid

slice_ = describe("v5e:4x4")
mesh = Mesh(device_grid(slice_.devices, (4, 4)), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

def local(x):
    x = jax.lax.fori_loop(0, 5, lambda i, x: jax.lax.psum(x, "y") * 0.5, x)
    x = jax.lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)])
    return jax.lax.all_gather(x, "x", tiled=True)

fun = jax.shard_map(local, mesh=mesh, in_specs=P("x", None), out_specs=P(None, None), check_vma=False)
x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=NamedSharding(mesh, P("x", None)))
text = jax.jit(fun).trace(x).lower(lowering_platforms=("tpu",)).compile().as_text()
counted, torus = account(text), torus_of(slice_, mesh)
print(json.dumps([[c.opcode, c.times, c.payload, torus.seconds(c)] for c in counted.collectives]))
"""


@pytest.mark.libtpu
def test_collectives_of_a_compiled_program():
    """On four lines of four chips without a ring, links of 50 GB/s each way."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shard = 1024 * 4096 * 4
    found = {kind: rest for kind, *rest in json.loads(done.stdout.splitlines()[-1])}
    assert found == {
        "all-reduce": [5, shard, pytest.approx(shard / 50e9)],
        "collective-permute": [1, shard, pytest.approx(shard / 50e9)],
        "all-gather": [1, 4 * shard, pytest.approx(3 * shard / 50e9)],
    }
