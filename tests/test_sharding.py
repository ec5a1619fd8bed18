"""Meshes from text, and the same logits on eight devices as on one."""

import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PATIENCE, Chip, several_devices

from e1jax import convert
from e1jax.checkpoint.load import load_model
from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.nn.model import abstract_params, forward, unembed
from e1jax.plan.sizes import SIZES
from e1jax.sharding.fsdp import grid_columns, line_length
from e1jax.sharding.mesh import make_mesh, undivided
from e1jax.sharding.runtime import use_compilation_cache

CONFIG = ModelConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_position_embeddings=64,
    rope_theta=1e4,
)
EIGHT = [Chip(i) for i in range(8)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data=2,tensor=2", ["needs 4", "sees 8"]),
        ("tensor=16", ["needs 16", "sees 8"]),
        ("data=1,tensor=8", ["tensor=8", "num_kv_heads=4", "tensor=1 or 2 or 4"]),
        ("data=2;tensor=4", ["'data=2;tensor=4'"]),
        ("tensor", ["'tensor'"]),
        ("model=8", ["'model=8'"]),
        ("data=-1,tensor=8", ["'data=-1'"]),
        ("data=0,tensor=8", ["'data=0'"]),
        ("data=2.0,tensor=4", ["'data=2.0'"]),
        ("data=８,tensor=1", ["'data=８'"]),
        ("", ["''"]),
        ("data=1,data=1", ["the axis data twice"]),
        ("data=1,tensor=1,tensor=8", ["the axis tensor twice"]),
        pytest.param("data=" + "9" * 5000, ["is not an axis"], id="5000 digits"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(text, named):
    with pytest.raises(UserError) as error:
        make_mesh(text, CONFIG, EIGHT)
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"num_heads": 6, "num_kv_heads": 2}, "num_kv_heads=2"),
        ({"intermediate_size": 98}, "intermediate_size=98"),
    ],
)
def test_a_mesh_that_cuts_a_head_or_the_mlp(sizes, named):
    config = ModelConfig(**{**vars(CONFIG), **sizes})
    with pytest.raises(UserError, match="tensor=4 does not divide") as error:
        make_mesh("data=2,tensor=4", config, EIGHT)
    assert named in str(error.value)


SEVEN_B = SIZES["Salesforce/E1-Math-7B"]
# Of a layer: q and o, k and v, and the mlp's three.
LAYER = 2 * 3584 * 28 * 128 + 2 * 3584 * 4 * 128 + 3 * 3584 * 18944
KERNELS, VOCABULARY = 28 * LAYER, 2 * 152064 * 3584


def told(text: str, sizes: ModelConfig, dtype=jnp.bfloat16, form=None) -> str | None:
    """What `undivided` says of a mesh of so many devices."""
    data, tensor = (int(part.split("=")[1]) for part in text.split(","))
    mesh = make_mesh(text, sizes, [Chip(i) for i in range(data * tensor)])
    return undivided(sizes, abstract_params(sizes, mesh, dtype, form))


@pytest.mark.parametrize(
    ("mesh", "size", "arrays", "elements", "better"),
    [
        ("data=6,tensor=1", "hidden_size=3584", 7, KERNELS * 5 / 6, (4, 4, 1)),
        ("data=3,tensor=2", "hidden_size=3584", 7, KERNELS * 2 / 6, (4, 2, 2)),
        (
            "data=5,tensor=1",
            "hidden_size=3584 and vocab_size=152064",
            *(9, (KERNELS + VOCABULARY) * 4 / 5, (4, 4, 1)),
        ),
        ("data=7,tensor=1", "vocab_size=152064", 2, VOCABULARY * 6 / 7, (4, 4, 1)),
    ],
)
@pytest.mark.parametrize("form", [None, "int8"])
def test_what_a_mesh_does_not_divide_is_told(
    mesh, size, arrays, elements, better, form
):
    """With what it costs a device, and the nearest mesh that divides all."""
    num_bytes = elements * (1 if form else 2)
    text = told(mesh, SEVEN_B, form=form)
    assert text.startswith(
        f"mesh {mesh} does not divide {size}, so every device keeps {arrays} arrays of "
        f"parameters whole in that dimension, {num_bytes / 2**30:.3g} GiB more than its "
        "share"
    )
    assert text.endswith(
        "; on {} devices, data={},tensor={} divides all".format(*better)
    )


@pytest.mark.parametrize(
    "mesh",
    ["data=1,tensor=1", "data=2,tensor=4", "data=8,tensor=1", "data=64,tensor=4"],
)
@pytest.mark.parametrize("form", [None, "int8"])
def test_a_mesh_that_divides_all_is_not_told_of(mesh, form):
    assert told(mesh, SEVEN_B, form=form) is None
    assert told(mesh, dataclasses.replace(SEVEN_B, tie_word_embeddings=True)) is None


def test_an_odd_vocabulary_is_told_without_a_way_out():
    sizes = dataclasses.replace(SEVEN_B, vocab_size=151665)
    assert told("data=1,tensor=4", sizes).endswith("1.52 GiB more than its share")
    assert told("data=1,tensor=1", sizes) is None


@pytest.mark.parametrize(("devices", "notes"), [(3, 1), (4, 0)])
def test_sampling_tells_once_of_a_mesh_that_does_not_divide(devices, notes):
    command = "-m e1jax.sample --thinking-budget 0 --solution-budget 1 47a+5b*3?"
    done = subprocess.run(
        [sys.executable, *command.split(), "--mesh", f"data={devices},tensor=1"],
        env={**os.environ, "XLA_FLAGS": several_devices(devices)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    note = (
        "note: mesh data=3,tensor=1 does not divide vocab_size=272, so every device keeps "
        "1 array of"
    )
    assert done.stderr.count(note) == done.stderr.count("does not divide") == notes


@pytest.fixture
def cache_dir(monkeypatch):
    """Gives the compilation cache that is in use, and puts JAX's back in the end."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_at_home(cache_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    use_compilation_cache()
    path = tmp_path / ".cache/e1jax/xla"
    assert cache_dir() == str(path) and path.is_dir()
    assert capsys.readouterr().err == f"note: compiled programs are kept in {path}\n"
    use_compilation_cache()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("home", ["/dev/null", "/proc/none", None])
def test_without_a_home_nothing_is_kept(cache_dir, monkeypatch, capsys, home):
    if home:
        monkeypatch.setenv("HOME", home)
    else:  # a user without an entry in /etc/passwd
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 54321)
    use_compilation_cache()
    assert cache_dir() is None
    error = capsys.readouterr().err
    assert error.startswith("note: compiled programs are not kept (~/.cache/e1jax/xla")
    assert error.count("\n") == 1


# Runs with eight devices, which a process can only get at its start.
ON_EIGHT = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from e1jax.checkpoint.load import load_model
from e1jax.nn import model

assert len(jax.devices()) == 8
hf, e1, out = sys.argv[1:]
tokens = np.random.default_rng(0).integers(0, 265, (8, 12), dtype=np.int32)
positions = np.tile(np.arange(12, dtype=np.int32), (8, 1))
forward = jax.jit(model.forward, static_argnums=0)
results = {}
for mesh in ["data=8,tensor=1", "data=2,tensor=4", "data=4,tensor=2", None]:
    for kind, path in [("hf", hf), ("e1", e1)]:
        loaded = load_model(path, mesh)
        kernel = loaded.read_params()["layers"]["mlp"]["up"]["kernel"]
        shards = {str(shard.index) for shard in kernel.addressable_shards}
        assert len(shards) == 8, shards  # nothing is whole on one device
        hidden, _ = forward(loaded.config, loaded.read_params(), tokens, positions)
        logits = model.unembed(loaded.config, loaded.read_params(), hidden)
        results[f"{kind} {mesh}"] = np.asarray(logits)
np.savez(out, tokens=tokens, positions=positions, **results)
"""


def test_eight_devices_give_the_logits_of_one(tiny_hf, tmp_path):
    source = tiny_hf(num_heads=8, num_kv_heads=4)
    convert.from_hf(str(source), tmp_path / "e1")
    flags = (  # see sharding.COMPILER_OPTIONS
        "--xla_force_host_platform_device_count=8 "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    subprocess.run(
        [sys.executable, "-c", ON_EIGHT, source, tmp_path / "e1", tmp_path / "out.npz"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    results = dict(np.load(tmp_path / "out.npz"))
    tokens = jnp.asarray(results.pop("tokens"))
    positions = jnp.asarray(results.pop("positions"))
    loaded = load_model(str(source))
    hidden, _ = forward(loaded.config, loaded.read_params(), tokens, positions)
    one = np.asarray(unembed(loaded.config, loaded.read_params(), hidden))
    assert len(results) == 8
    for name, logits in results.items():
        # Sums in another order; the same tolerance as against Hugging Face.
        assert np.abs(logits - one).max() <= 1e-5 * np.abs(one).max(), name


@pytest.mark.parametrize(
    ("coords", "length"),
    [
        ([None] * 4, 1),
        ([(0, 0)], 1),
        ([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)], 3),
        ([(0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (2, 1)], 4),  # a snake
        ([(0, 0), (0, 1), (1, 0), (1, 1)], 2),
        ([(0, 0), (1, 1), (2, 2)], 1),  # no line
        ([(0, 0), (0, 0), (0, 1)], 1),  # two devices of one chip
        ([(0, 0, 0), (0, 0, 1), (0, 0, 2)], 3),
    ],
)
def test_devices_on_a_line_of_the_torus(coords, length):
    assert line_length(coords) == length


@pytest.mark.parametrize(
    ("coords", "columns"),
    [
        ([(i // 8, i % 8) for i in range(16)], 8),  # lines of 8, though 4 x 4 is square
        ([(i // 3, i % 3) for i in range(6)], 3),
        ([(0, i) for i in range(12)], 3),  # all on one line: as square as possible
        ([None] * 12, 3),
    ],
)
def test_a_row_of_the_grid_of_devices_is_a_line(coords, columns):
    devices = np.empty((len(coords), 1), object)
    devices[:, 0] = [types.SimpleNamespace(coords=place) for place in coords]
    mesh = types.SimpleNamespace(devices=devices)
    assert grid_columns(mesh) == columns


TORUS = """
import jax
import jax.numpy as jnp
from e1jax.config.model import ModelConfig
from e1jax.nn.model import abstract_params
from e1jax.plan.slices import describe
from e1jax.sharding.fsdp import grid_columns
from e1jax.sharding.hosts import by_process, devices_by_process, make_copy_to_all
from e1jax.sharding.mesh import make_mesh
sizes = ModelConfig(4096, 1024, 4096, 3, 8, 4, 128, 4096, 1e4)

def links(a, b):
    # On the way from one chip to another: of 8 chips on an axis, the ends are not linked.
    return sum(abs(x - y) for x, y in zip(a.coords, b.coords))

slice_ = describe("v5e:8x8")
mesh = make_mesh("data=64,tensor=1", sizes, slice_.devices)
grid = mesh.devices.reshape(-1, grid_columns(mesh))
assert grid.shape == (8, 8)
for lines in (grid, grid.T):
    for line in lines:
        assert [links(a, b) for a, b in zip(line, line[1:])] == [1] * 7
hosts = devices_by_process(mesh)
assert hosts.shape == (16, 4)
for process, devices in enumerate(hosts):
    assert {device.process_index for device in devices} == {process}
    assert max(links(devices[0], device) for device in devices) == 2  # a block of 2x2
make_mesh("data=16,tensor=4", sizes, slice_.devices)  # cuts axes: in the order of hosts

# What each host samples from is made by one program, though its mesh has another order.
params = abstract_params(sizes, mesh, jnp.float32)
given = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_process(x.sharding)),
    params,
)
local = abstract_params(sizes, make_mesh(None, sizes, hosts[3]), jnp.bfloat16)
copy = make_copy_to_all(mesh, local).trace(given).lower(lowering_platforms=("tpu",))
assert copy.out_info["embedding"].dtype == jnp.bfloat16
print("lines of direct links")
"""


@pytest.mark.libtpu
def test_sums_over_data_go_over_direct_links_of_the_torus():
    done = subprocess.run(
        [sys.executable, "-c", TORUS],
        capture_output=True,
        text=True,
        env=os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert done.stdout == "lines of direct links\n", done.stderr


KEEPING = """
import sys, jax, jax.numpy as jnp
from e1jax.sharding import runtime
runtime.CACHE_BYTES = int(sys.argv[1])
runtime.use_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
for n in range(int(sys.argv[2])):
    print(jax.jit(lambda x: jnp.sort(jnp.tanh(x) + n).sum())(jnp.arange(40.0)))
"""


def keep_programs(path: Path, limit: int, count: int) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", KEEPING, str(limit), str(count)],
        # On the CPU: where libtpu is installed, JAX would look for a TPU, and say so.
        env=os.environ
        | {"JAX_COMPILATION_CACHE_DIR": str(path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_damaged_program_is_compiled_again_and_replaced(tmp_path):
    printed, _ = keep_programs(tmp_path, 2**30, 1)
    programs = list(tmp_path.glob("*-cache"))
    damage = {
        "cut": lambda data: data[: len(data) // 2],
        "empty": lambda data: b"",
        "flipped": lambda data: data[:-40] + bytes([data[-40] ^ 8]) + data[-39:],
    }
    for change in damage.values():
        for program in programs:
            program.write_bytes(change(program.read_bytes()))
        again, said = keep_programs(tmp_path, 2**30, 1)
        assert again == printed
        lines = said.splitlines()
        assert lines and all(x.startswith("note: the compiled program") for x in lines)
        assert all(line.endswith("compiled again") for line in lines)
        assert keep_programs(tmp_path, 2**30, 1) == (printed, "")


def test_programs_beyond_a_limit_are_dropped(tmp_path):
    """Also programs that were kept before there was a limit, and so have no time."""
    keep_programs(tmp_path, 2**30, 4)
    for time in tmp_path.glob("*-atime"):
        time.unlink()
    size = sum(file.stat().st_size for file in tmp_path.glob("*-cache"))
    _, said = keep_programs(tmp_path, size, 8)
    assert said == ""
    assert size // 2 < sum(f.stat().st_size for f in tmp_path.glob("*-cache")) <= size


def test_the_limit_is_two_gibibytes_unless_the_user_sets_another(tmp_path, monkeypatch):
    def limit() -> int:
        monkeypatch.setattr(jax.config, "update", changed.__setitem__)
        use_compilation_cache()
        return changed.get("jax_compilation_cache_max_size")

    changed = {}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert limit() == 2 * 2**30
    changed.clear()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "5000")
    assert limit() is None
