"""The accounting of compiled programs: hand-counted programs, and snippets of a TPU's."""

import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import AS_USERS_HAVE_IT

from e1jax.plan.account import account

pytestmark = pytest.mark.cpu


def compiled(function, *arguments, donate=()) -> str:
    jitted = jax.jit(function, donate_argnums=donate)
    lowered = jitted.lower(*map(jnp.zeros, arguments))
    return lowered.compile(AS_USERS_HAVE_IT).as_text()


# Programs compiled here.


def test_a_product_of_two_matrices():
    counted = account(compiled(jnp.matmul, (6, 70), (70, 11)))
    assert counted.flops == 2 * 6 * 70 * 11
    assert counted.bytes == 4 * (6 * 70 + 70 * 11 + 6 * 11)


def test_a_batched_product_that_contracts_two_dimensions():
    function = functools.partial(jnp.einsum, "abcd,aced->abe")
    counted = account(compiled(function, (3, 5, 7, 9), (3, 7, 11, 9)))
    assert counted.flops == 2 * 3 * 5 * 11 * 7 * 9


def test_nested_loops_count_as_often_as_they_run():
    def function(x, weights):
        def outer(x, weight):
            def inner(_, x):
                return jnp.tanh(x @ weight)

            return jax.lax.fori_loop(0, 5, inner, x), None

        return jax.lax.scan(outer, x, weights)[0]

    counted = account(compiled(function, (8, 16), (3, 16, 16)))
    assert counted.flops == 3 * 5 * 2 * 8 * 16 * 16
    assert counted.unknown_loops == []
    # Each of the three weights is sliced once, not the whole stack three times.
    sliced = [op for op in counted.ops if "dynamic_slice" in op.op_name]
    assert [(op.times, op.bytes, op.depth) for op in sliced] == [
        (3, 2 * 4 * 16 * 16 + 4, 1)
    ]


def test_the_gradient_of_a_scan():
    def loss(weights, x):
        step = jax.checkpoint(lambda x, weight: (jnp.tanh(x @ weight), None))
        return jax.lax.scan(step, x, weights)[0].sum()

    counted = account(compiled(jax.grad(loss), (7, 12, 12), (5, 12)))
    # Forward, forward again, and two products backward, in each of seven layers.
    assert counted.flops == 7 * 4 * 2 * 5 * 12 * 12


def test_a_loop_of_unknown_length_is_asked_about_and_else_reported():
    def function(x, count):
        return jax.lax.fori_loop(0, count.astype(int)[0], lambda i, x: x @ x, x)

    text = compiled(function, (8, 8), (1,))
    once = 2 * 8 * 8 * 8
    assert account(text).flops == once
    assert account(text).unknown_loops == ["jit(function)/while"]
    counted = account(text, {"jit(function)/while": 9}.get)
    assert counted.flops == 9 * once
    assert counted.unknown_loops == []


def test_an_update_in_place_costs_the_update():
    def function(cache, new, position):
        at = (position.astype(int)[0], 0)
        return jax.lax.dynamic_update_slice(cache, new, at)

    text = compiled(function, (512, 128), (3, 128), (1,), donate=(0,))
    assert 2 * 4 * 3 * 128 <= account(text).bytes <= 2 * 4 * 3 * 128 + 100


UPDATES = """
HloModule jit_put

ENTRY %main (a: f32[1000000], u: f32[5000], i: s32[], m: f32[900,7], n: s32[3,1], v: f32[3,7]) -> f32[900,7] {
  %a = f32[1000000]{0} parameter(0)
  %u = f32[5000]{0} parameter(1)
  %i = s32[] parameter(2)
  %m = f32[900,7]{1,0} parameter(3)
  %n = s32[3,1]{1,0} parameter(4)
  %v = f32[3,7]{1,0} parameter(5)
  %vector = f32[1000000]{0} dynamic-update-slice(%a, %u, %i)
  %matrix = f32[900,7]{1,0} dynamic-update-slice(%m, %v, %i, %i)
  %one = f32[900,7]{1,0} scatter(%m, %n, %v), to_apply=%put
  ROOT %two = (f32[900,7]{1,0}, f32[900,7]{1,0}) scatter(%m, %one, %n, %v, %v), to_apply=%put
}
"""


def test_updates_cost_what_they_put_and_where():
    counted = {op.name: op.bytes for op in account(UPDATES).ops}
    rows = 2 * 4 * 3 * 7  # read and written
    assert counted == {
        "vector": 2 * 4 * 5000 + 4,
        "matrix": rows + 2 * 4,
        "one": rows + 3 * 4,
        "two": 2 * rows + 3 * 4,
    }


def test_an_update_of_a_vector_in_place_costs_the_update():
    def function(array, new, position):
        at = (position.astype(int)[0],)
        return jax.lax.dynamic_update_slice(array, new, at)

    text = compiled(function, (1_000_000,), (5_000,), (1,), donate=(0,))
    assert 2 * 4 * 5_000 <= account(text).bytes <= 2 * 4 * 5_000 + 100


def test_what_is_outside_of_loops_can_be_left_out():
    def function(x):
        return jax.lax.fori_loop(0, 4, lambda i, x: x @ x, x @ x)

    counted = account(compiled(function, (8, 8)))
    assert counted.flops == 5 * 2 * 8**3
    assert counted.per_iteration().flops == 4 * 2 * 8**3


def test_the_costliest_branch_counts():
    def function(x, which):
        return jax.lax.cond(which[0] > 0, lambda x: x @ x, lambda x: x, x)

    assert account(compiled(function, (8, 8), (1,))).flops == 2 * 8**3


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        account("HloModule nothing")


# What a CPU does not print.

# Two layers, the number of which is in no attribute: it went into the loop as an
# element of its state, through an outer loop that runs until an unknown flag.
LOOPS = """
HloModule jit_decode, is_scheduled=true

%inner_body (p: (s32[], f32[4,8], s32[], bf16[2,8,8])) -> (s32[], f32[4,8], s32[], bf16[2,8,8]) {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}, s32[]{:T(128)}, /*index=3*/bf16[2,8,8]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %n = s32[]{:T(128)} get-tuple-element(%p), index=2
  %w = bf16[2,8,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=3
  %one = s32[]{:T(128)} constant(1)
  %copied = s32[]{:T(128)} copy(%i)
  %next = s32[]{:T(128)} add(%one, %copied)
  %y = f32[4,8]{1,0:T(8,128)S(1)} fusion(%x, %w, %i), kind=kOutput, calls=%product, metadata={op_name="jit(decode)/while/body/while/body/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  ROOT %t = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}, s32[]{:T(128)}, bf16[2,8,8]{2,1,0:T(8,128)(2,1)}) tuple(%next, %y, %n, %w)
}

%moved (m: bf16[1,8,8]) -> bf16[8,8] {
  %m = bf16[1,8,8]{2,1,0} parameter(0)
  ROOT %b = bf16[8,8]{1,0} bitcast(%m)
}

%product (a: f32[4,8], stack: bf16[2,8,8], layer: s32[]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)
  %stack = bf16[2,8,8]{2,1,0:T(8,128)(2,1)} parameter(1)
  %layer = s32[]{:T(128)} parameter(2)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,8]{2,1,0} dynamic-slice(%stack, %layer, %zero, %zero), dynamic_slice_sizes={1,8,8}
  %weight = bf16[8,8]{1,0} fusion(%slice), kind=kLoop, calls=%moved
  ROOT %dot = f32[4,8]{1,0:T(8,128)S(1)} convolution(%a, %weight), dim_labels=bf_io->bf
}

%inner_test (q: (s32[], f32[4,8], s32[], bf16[2,8,8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}, s32[]{:T(128)}, bf16[2,8,8]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %qi = s32[]{:T(128)} get-tuple-element(%q), index=0
  %qn = s32[]{:T(128)} get-tuple-element(%q), index=2
  ROOT %less = pred[]{:T(512)} compare(%qi, %qn), direction=LT
}

%outer_body (s: (pred[], f32[4,8], bf16[2,8,8], s32[])) -> (pred[], f32[4,8], bf16[2,8,8], s32[]) {
  %s = (pred[]{:T(512)}, f32[4,8]{1,0:T(8,128)S(1)}, bf16[2,8,8]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %flag = pred[]{:T(512)} get-tuple-element(%s), index=0
  %sx = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%s), index=1
  %sw = bf16[2,8,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=2
  %sn = s32[]{:T(128)} get-tuple-element(%s), index=3
  %start = s32[]{:T(128)} constant(0)
  %state = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}, s32[]{:T(128)}, bf16[2,8,8]{2,1,0:T(8,128)(2,1)}) tuple(%start, %sx, %sn, %sw)
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}, s32[]{:T(128)}, bf16[2,8,8]{2,1,0:T(8,128)(2,1)}) while(%state), condition=%inner_test, body=%inner_body, metadata={op_name="jit(decode)/while/body/while"}
  %out = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%loop), index=1
  %kernel = f32[4,8]{1,0:T(8,128)S(1)} custom-call(%out), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
    "block": {"rows": 4
}}
  }, metadata={op_name="jit(decode)/while/body/kernel"}
  ROOT %u = (pred[]{:T(512)}, f32[4,8]{1,0:T(8,128)S(1)}, bf16[2,8,8]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%flag, %kernel, %sw, %sn)
}

%outer_test (r: (pred[], f32[4,8], bf16[2,8,8], s32[])) -> pred[] {
  %r = (pred[]{:T(512)}, f32[4,8]{1,0:T(8,128)S(1)}, bf16[2,8,8]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  ROOT %go = pred[]{:T(512)} get-tuple-element(%r), index=0
}

ENTRY %main (f: pred[], x0: f32[4,8], w0: bf16[2,8,8]) -> f32[4,8] {
  %f = pred[]{:T(512)} parameter(0)
  %x0 = f32[4,8]{1,0:T(8,128)} parameter(1)
  %w0 = bf16[2,8,8]{2,1,0:T(8,128)(2,1)} parameter(2)
  %layers = s32[]{:T(128)} constant(2)
  %bound = s32[]{:T(128)} copy(%layers)
  %fetch = (f32[4,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x0)
  %fetched = f32[4,8]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %turned = bf16[2,8,8]{1,2,0:T(8,128)(2,1)} copy(%w0), backend_config={"window_config":{"estimated_cycles":"30"}}
  %state0 = (pred[]{:T(512)}, f32[4,8]{1,0:T(8,128)S(1)}, bf16[2,8,8]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%f, %fetched, %turned, %bound)
  %while = (pred[]{:T(512)}, f32[4,8]{1,0:T(8,128)S(1)}, bf16[2,8,8]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) while(%state0), condition=%outer_test, body=%outer_body, metadata={op_name="jit(decode)/while"}
  ROOT %result = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%while), index=1
}
"""


def test_loops_memory_spaces_and_cycles_of_a_tpu():
    asked = []
    counted = account(LOOPS, lambda name: asked.append(name) or 3)
    assert asked == ["jit(decode)/while"]  # the inner one is derived: 2
    products = [op for op in counted.ops if op.flops]
    # Of the stacked weights one layer is read, of what is in VMEM nothing; the index
    # is read, and that of the layer, once more, by its copy and the addition.
    assert [(op.times, op.depth, op.bytes, op.flops) for op in products] == [
        (6, 2, 2 * 8 * 8 + 4, 2 * 4 * 8 * 8)
    ]
    copies = counted.copies(100)
    assert [(op.name, op.times, op.bytes) for op in copies] == [("turned", 1, 512)]
    fetches = [op for op in counted.ops if op.opcode == "copy-start"]
    assert [op.bytes for op in fetches] == [4 * 4 * 8]  # read, and written to VMEM
    assert counted.cycles == 6 * 1000 + 30
    assert counted.per_iteration().cycles == 6 * 1000
    assert account(LOOPS).cycles == 2 * 1000 + 30
    assert account(LOOPS).unknown_loops == ["jit(decode)/while"]


def test_kernels_are_listed_and_their_metadata_ends_no_computation():
    calls = account(LOOPS, lambda name: 3).custom_calls
    assert [(op.target, op.times, op.bytes, op.op_name) for op in calls] == [
        ("tpu_custom_call", 3, 0, "jit(decode)/while/body/kernel")
    ]


KERNELS = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %full = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_len":"300",
"positions":"1000"
}}, backend_config={"custom_call_config":{"body":"TUzvUg==","cost_estimate":{"flops":"7000","transcendentals":"10","bytes_accessed":"5000","remote_bytes_transferred":"0"},"serialization_format":"1"}}
  %fixed = f32[8]{0} custom-call(%full), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={}}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"0","transcendentals":"0","bytes_accessed":"80"}}}
  ROOT %silent = f32[8]{0} custom-call(%fixed), custom_call_target="tpu_custom_call"
}
"""


@pytest.mark.parametrize(
    ("filled", "share"), [(1, 0.3), (300, 0.3), (301, 0.6), (1000, 1), (5000, 1)]
)
def test_kernels_cost_what_they_state(filled, share):
    counted = account(KERNELS)
    costs = [(op.bytes, op.flops, op.states_cost) for op in counted.custom_calls]
    assert costs == [(5000, 7000, True), (80, 0, True), (0, 0, False)]
    assert counted.bytes == 5080
    assert counted.flops == 0  # of products outside of kernels
    counted = counted.filled(filled)
    costs = [(op.bytes, op.flops) for op in counted.custom_calls]
    assert costs == [(5000 * share, 7000 * share), (80, 0), (0, 0)]


PREFETCH = """
HloModule jit_decode, is_scheduled=true

ENTRY %main (w: f32[32,200], x: f32[8,200], i: s32[]) -> f32[8,200] {
  %w = f32[32,200]{1,0:T(8,128)} parameter(0)
  %x = f32[8,200]{1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %first = ((f32[32,200]{1,0:T(8,128)}), f32[8,200]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:8], [0:200]}
  %second = ((f32[32,200]{1,0:T(8,128)}), f32[16,200]{1,0:T(8,128)}, s32[]{:S(2)}) slice-start(%w), slice={[8:24], [0:200]}
  %third = ((f32[32,200]{1,0:T(8,128)}, s32[]{:T(128)S(6)}, s32[]{:T(128)}), f32[4,200]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) dynamic-slice-start(%w, %i, %zero), dynamic_slice_sizes={4,200}
  %y = f32[8,200]{1,0:T(8,128)S(1)} negate(%x)
  %part = f32[8,200]{1,0:T(8,128)S(1)} slice-done(%first)
  %other = f32[16,200]{1,0:T(8,128)} slice-done(%second)
  %last = f32[4,200]{1,0:T(8,128)S(1)} dynamic-slice-done(%third)
  ROOT %sum = f32[8,200]{1,0:T(8,128)} add(%y, %part)
}
"""


def test_a_slice_that_is_fetched_beside_other_work_costs_what_it_takes():
    ops = {op.name: op for op in account(PREFETCH).ops}
    assert set(ops) == {"first", "second", "third", "y", "sum"}
    assert ops["first"].bytes == 4 * 8 * 200  # read, and written to VMEM
    assert ops["second"].bytes == 2 * 4 * 16 * 200  # read, and written to HBM
    assert ops["third"].bytes == 4 * 4 * 200 + 4  # and one of its two places


COLLECTIVES = """
HloModule jit_step

%start (a: bf16[4,32]) -> (bf16[4,32], bf16[16,32], u32[]) {
  %a = bf16[4,32]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[16,32]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=7, dimensions={0}
  ROOT %c = (bf16[4,32]{1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (b: bf16[4,32], d: bf16[16,32], x: f32[8,16], y: f32[16,8]) -> (f32[8,8], bf16[4,32], bf16[16,32]) {
  %b = bf16[4,32]{1,0:T(8,128)(2,1)} parameter(0)
  %d = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %x = f32[8,16]{1,0:T(8,128)} parameter(2)
  %y = f32[16,8]{1,0:T(8,128)} parameter(3)
  %h = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%b), channel_id=7, dimensions={0}
  %xy = f32[8,8]{1,0:T(8,128)} convolution(%x, %y), dim_labels=bf_io->bf
  ROOT %t = (f32[8,8]{1,0:T(8,128)}, bf16[4,32]{1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) tuple(%xy, %b, %h)
}

%all-reduce-scatter (e: f32[64,8]) -> f32[16,8] {
  %e = f32[64,8]{1,0:T(8,128)} parameter(0)
  %r = f32[64,8]{1,0:T(8,128)} all-reduce(%e), channel_id=8, to_apply=%sum
  %z = s32[] constant(0)
  ROOT %s = f32[16,8]{1,0:T(8,128)} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={16,8}
}

ENTRY %main (p0: bf16[4,32], p1: f32[8,16], p2: f32[16,8], p3: f32[64,8], p4: f32[10]) -> f32[10] {
  %p0 = bf16[4,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = f32[8,16]{1,0:T(8,128)} parameter(1)
  %p2 = f32[16,8]{1,0:T(8,128)} parameter(2)
  %p3 = f32[64,8]{1,0:T(8,128)} parameter(3)
  %p4 = f32[10]{0:T(128)} parameter(4)
  %f0 = (bf16[4,32]{1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%p0), kind=kCustom, calls=%start
  %f0a = bf16[4,32]{1,0:T(8,128)(2,1)} get-tuple-element(%f0), index=0
  %f0b = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%f0), index=1
  %f1 = (f32[8,8]{1,0:T(8,128)}, bf16[4,32]{1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) fusion(%f0a, %f0b, %p1, %p2), kind=kCustom, calls=%async_collective_fusion
  %f2 = f32[16,8]{1,0:T(8,128)} fusion(%p3), kind=kCustom, calls=%all-reduce-scatter
  ROOT %ar = f32[10]{0:T(128)} all-reduce(%p4), channel_id=9, to_apply=%sum
}
"""


def test_collectives_are_found_in_fusions_and_counted_once():
    counted = account(COLLECTIVES)
    found = [(op.opcode, op.payload, op.bytes) for op in counted.collectives]
    assert found == [
        # The part is read from HBM; the whole goes to VMEM.
        ("all-gather", 2 * 16 * 32, 2 * 4 * 32),
        ("reduce-scatter", 4 * 64 * 8, 2 * 4 * 64 * 8),
        ("all-reduce", 4 * 10, 2 * 4 * 10),
    ]
    product = next(op for op in counted.ops if op.flops)
    assert product.flops == 2 * 8 * 16 * 8
    assert product.bytes == 4 * (8 * 16 + 16 * 8 + 8 * 8)


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # One side of the product is written as a window: seven heads of 128.
        (
            "f32[4,7,128]{2,0,1} convolution(%x, %w), "
            "window={size=7 pad=6_6 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
            2 * 4 * 7 * 128 * 96,
        ),
        # A batch of three products is a window of which one place is inside.
        (
            "f32[3,4,16]{2,1,0} convolution(%l, %r), "
            "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            2 * 3 * 4 * 16 * 8,
        ),
        # Left and right padding: 3 x 5 pairs less the 2 at the edges.
        (
            "f32[4,5,6]{2,1,0} convolution(%c, %k), window={size=3 pad=1_1}, "
            "dim_labels=b0f_0io->b0f",
            2 * 4 * 6 * 8 * 13,
        ),
    ],
)
def test_products_that_are_convolutions(line, flops):
    shapes = {
        "x": "f32[4,96,1]",
        "w": "f32[7,128,96]",
        "l": "f32[3,4,8]",
        "r": "f32[3,8,16]",
        "c": "f32[4,5,8]",
        "k": "f32[3,8,6]",
    }
    lines = [
        f"  %{name} = {shape} parameter({index})"
        for index, (name, shape) in enumerate(shapes.items())
    ]
    text = "\n".join(["ENTRY %main (x: f32[4]) -> f32[4] {", *lines])
    assert account(f"{text}\n  ROOT %out = {line}\n}}\n").flops == flops
