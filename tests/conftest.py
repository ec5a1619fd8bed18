"""Strict switches, and tiny real models to test with."""

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Before any import of huggingface_hub: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jax
import pytest
import torch
from jax.experimental.compilation_cache import compilation_cache
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from e1jax.cli.command import run_command
from e1jax.tokenizer import write_byte_tokenizer

jax.config.update("jax_numpy_rank_promotion", "raise")
# A machine under load is slow, and no failure.
hypothesis.settings.register_profile("e1jax", deadline=None)
hypothesis.settings.load_profile("e1jax")

# XLA flags with which the tests' programs compile in a sixth of the time; by default,
# compiling takes more than a third of a test run. They turn LLVM's optimizations off, and
# choose the older of XLA's two emitters of fused operations. XLA of jax 0.12 has only the
# newer emitter, and aborts at a flag that it does not know.
QUICKLY = "--xla_backend_optimization_level=0"
# Options of `compile` that restore XLA's defaults, for tests that inspect a compiled program.
AS_USERS_HAVE_IT = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    QUICKLY += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS_HAVE_IT["xla_cpu_use_fusion_emitters"] = True
os.environ.setdefault("XLA_FLAGS", QUICKLY)

disable_progress_bar()  # what a command writes to stderr is tested
torch.set_num_threads(1)  # tiny matrices: threads only get in each other's way

# Seconds to wait for another process: only one that hangs reaches them, however loaded
# the machine is.
PATIENCE = 600


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test whose marker names a backend that is not here; see pyproject.toml."""
    for backend in ("cpu", "gpu"):
        if item.get_closest_marker(backend) and jax.default_backend() != backend:
            pytest.skip(
                f"needs a {backend.upper()}, and JAX has {jax.default_backend()}"
            )
    if item.get_closest_marker("libtpu") and not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu")


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_file():
    """Drops the compiled programs of a test file: few of them serve another file, and the
    programs of all files would take gigabytes. Then exempts the objects that remain, mostly
    loaded modules, from garbage collection, which would scan them again and again."""
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def programs_for_tpus_are_as_users_have_them(request, monkeypatch):
    """XLA applies the flags of QUICKLY to every backend, so they are removed."""
    if request.node.get_closest_marker("libtpu"):
        monkeypatch.delenv("XLA_FLAGS", raising=False)


def several_devices(count: int) -> str:
    """XLA's flags for so many devices."""
    return f"--xla_force_host_platform_device_count={count} {QUICKLY}"


def run_on_devices(count: int, code: str) -> None:
    """Runs code that imports modules of the tests, in a process with so many devices."""
    environment = {"XLA_FLAGS": several_devices(count), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def set_everywhere(monkeypatch, name: str, value, within: str = "e1jax") -> None:
    """Sets a name in every module of e1jax that has it, by import or by definition."""
    found = [m for m in list(sys.modules.values()) if m.__name__.startswith(within)]
    found = [module for module in found if name in vars(module)]
    assert found, name
    for module in found:
        monkeypatch.setattr(module, name, value)


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory) -> Callable[..., Path]:
    """Makes Hugging Face directories of random models; equal calls share one.

    Biases are not zero, norms are not one, and the weights are so large that the logits
    are not flat: nothing can go wrong unseen.
    """

    @functools.cache
    def make(
        *,
        architecture: str = "qwen2",
        hidden_size: int = 64,
        intermediate_size: int = 96,
        num_layers: int = 2,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 16,
        rope_theta: float = 1e4,
        tied: bool = False,
        dtype: str = "float32",
        max_shard_size: str = "1GB",
    ) -> Path:
        path = tmp_path_factory.mktemp("hf")
        vocab_size = write_byte_tokenizer(path) + 3  # as in E1: more ids than tokens
        config = AutoConfig.for_model(
            architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=32768,
            rope_theta=rope_theta,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.to(getattr(torch, dtype)).save_pretrained(
            path, max_shard_size=max_shard_size
        )
        return path

    return make


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device that nothing runs on."""

    id: int
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU"


def edit_json(path: Path, **changes) -> None:
    """Sets keys of a JSON file; those given as None are removed."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: item for key, item in value.items() if item is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


@pytest.fixture(scope="session")
def compilations_in() -> Callable:
    """A context in which compiled programs, those of other processes too, are kept."""

    @contextlib.contextmanager
    def keep(path: Path):
        names = (
            "jax_compilation_cache_dir",
            "jax_persistent_cache_min_compile_time_secs",
        )
        before = {name: getattr(jax.config, name) for name in names}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JAX_COMPILATION_CACHE_DIR", str(path))
            patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
            jax.config.update(names[0], str(path))
            compilation_cache.reset_cache()
            yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    return keep


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys) -> Callable[[Callable, list[str]], str]:
    """Calls a command in tmp_path, which must refuse in one sentence and write nothing;
    gives the sentence."""

    def call(main: Callable[[], None], argv: list[str]) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", argv)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ending:
            run_command(main)
        assert ending.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return call
