"""Every file in configs/: what it sets, and the state that it trains, as shapes."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import Chip

from e1jax.checkpoint.huggingface import read_config
from e1jax.checkpoint.load import resolve
from e1jax.checkpoint.runs import abstract_state
from e1jax.cli.flags import read_flags
from e1jax.config.load import load_config
from e1jax.config.model import ModelConfig
from e1jax.config.training import GRPOConfig, SFTConfig
from e1jax.nn.model import abstract_adapter, abstract_params
from e1jax.sample import SampleFlags
from e1jax.sharding.fsdp import default_mesh
from e1jax.sharding.mesh import check_divides, make_mesh
from e1jax.training import make_optimizer

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
GRPO = [path for path in CONFIGS if not path.stem.endswith("_sft")]


def sizes(vocab, hidden, mlp, layers, heads, kv_heads) -> ModelConfig:
    return ModelConfig(vocab, hidden, mlp, layers, heads, kv_heads, 128, 131072, 1e4)


# Of the models' published config.json, and their parameters counted by hand: embedding
# and head, and a layer's q, k, v with biases, o, mlp and norms.
QWEN_1_5B = sizes(151936, 1536, 8960, 28, 12, 2)
QWEN_7B = sizes(152064, 3584, 18944, 28, 28, 4)
QWEN_14B = sizes(152064, 5120, 13824, 48, 40, 8)
MODELS = {
    "agentica-org/DeepScaleR-1.5B-Preview": (QWEN_1_5B, 1_777_088_000),
    "Skywork/Skywork-OR1-Math-7B": (QWEN_7B, 7_615_616_512),
    "nvidia/AceReason-Nemotron-14B": (QWEN_14B, 14_770_033_664),
    "agentica-org/DeepCoder-14B-Preview": (QWEN_14B, 14_770_033_664),
    "nano": (read_config(resolve("nano")), 317_520),
    "runs/nano_stated_sft": (read_config(resolve("nano")), 317_520),
}


def load(path: Path) -> GRPOConfig:
    """As the command in the file's header sets it."""
    [line] = re.findall(r"#   python -m e1jax\.train (.*)", path.read_text())
    argv = shlex.split(line)
    assert argv[:2] == ["--config", f"configs/{path.name}"]
    return load_config(GRPOConfig, ["--config", str(path), *argv[2:]], "train")[0]


def chips_of(path: Path) -> int:
    """As the header says; a CPU is one device."""
    [hardware] = re.findall(
        r"# Hardware: (\d+ chips, .*|2 CPU cores)", path.read_text()
    )
    if "CPU" in hardware:
        return 1
    count = int(hardware.split()[0])
    for topology in re.findall(r"\w+:[\dx]+", hardware):
        shape = topology.partition(":")[2].split("x")
        assert math.prod(map(int, shape)) == count
    return count


def test_all_are_tested():
    assert {load(path).model for path in GRPO} == set(MODELS)


def test_fine_tuning_makes_the_bundled_model():
    path = CONFIGS[0].parent / "nano_sft.yaml"
    config, run_dir = load_config(SFTConfig, ["--config", str(path)], "sft")
    assert config.model == MODELS["nano"][0] and run_dir == Path("runs/nano_sft")


@pytest.mark.parametrize("path", GRPO, ids=lambda path: path.stem)
def test_the_state_of_a_training(path):
    """What is trained has the size of its model or adapter, and every chip of the hardware
    holds an equal part of the parameters and of both moments."""
    config = load(path)
    model, count = MODELS[config.model]
    chips = chips_of(path)
    devices = [Chip(i) for i in range(chips)]
    mesh = make_mesh(default_mesh(chips), model, devices)
    assert config.update.microbatch % mesh.shape["data"] == 0
    params = abstract_params(model, mesh, config.update.param_dtype)
    optimizer = make_optimizer(config.optimizer, config.steps)
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == count
    if config.adapter.rank:
        params = abstract_adapter(model, config.adapter, mesh, np.float32)
        count = adapter_size(model, config.adapter.rank)
        leaves += jax.tree.leaves(params)
    state = abstract_state(optimizer, params, mesh)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
    assert sum(leaf.size for leaf in moments) == 2 * count
    for leaf in [*leaves, *moments]:
        part = leaf.sharding.shard_shape(leaf.shape)
        # Norms and biases, under a thousandth of the parameters, are whole everywhere.
        if leaf.size > 2**24:
            assert np.prod(part) * chips == leaf.size


def adapter_size(model: ModelConfig, rank: int) -> int:
    """Of A and B in all linear layers."""
    d, f, c = model.hidden_size, model.intermediate_size, model.head_dim
    heads, kv_heads = model.num_heads * c, model.num_kv_heads * c
    sides = [(d, heads), (d, kv_heads), (d, kv_heads), (heads, d), *[(d, f)] * 3]
    return model.num_layers * rank * sum(map(sum, sides))


@pytest.mark.parametrize("path", GRPO, ids=lambda path: path.stem)
def test_commands_of_the_header(path):
    """Meshes of sampling suit the model, and settings for other hardware suit that."""
    config, text = load(path), path.read_text()
    model = MODELS[config.model][0]
    assert config.mesh is None
    for line in re.findall(r"#   python -m e1jax\.sample (.*)", text):
        args = read_flags(SampleFlags, shlex.split(line), "sample")
        shape = dict(part.split("=") for part in args.mesh.split(","))
        check_divides(model, {name: int(size) for name, size in shape.items()})
    for chips, line in re.findall(r"On (\d+) chips:\s(--.*)", text):
        argv = ["--config", str(path), *shlex.split(line)]
        other = load_config(GRPOConfig, argv, "train")[0]
        assert other.update.microbatch % int(chips) == 0


@pytest.mark.parametrize(
    "path", [p for p in GRPO if not p.stem.startswith("nano")], ids=lambda p: p.stem
)
def test_the_recipe_of_the_paper(path):
    """Its pair of budgets is one of the pairs where they are drawn, and unlimited thinking
    another."""
    config = load(path)
    rollout, update = config.rollout, config.update
    assert (rollout.prompts, rollout.samples, config.steps) == (128, 8, 200)
    assert (1024, 1024) in rollout.pairs
    assert rollout.state_budgets == (len(rollout.pairs) > 1) == rollout.is_unlimited
    assert rollout.state_budgets == path.stem.endswith("_elastic")
    assert (rollout.temperature, config.data.max_prompt_len) == (0.6, 1024)
    assert (update.minibatch_prompts, update.epochs) == (64, 1)
    assert config.optimizer.learning_rate == (1e-5 if config.adapter.rank else 1e-6)
    assert (config.loss.kl_coef, config.loss.entropy_coef) == (0.001, 0.001)


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("part", ["sample", "train"])
@pytest.mark.parametrize("path", GRPO, ids=lambda path: path.stem)
def test_the_hardware_of_the_header_is_large_enough(path, part):
    """The first that it names for the part; the nano model's is a CPU."""
    place = "Hardware" if part == "train" else "Sampling"
    lines = path.read_text().partition(f"# {place}")[2]
    topology = (re.findall(r"v\d\w+:[\dx]+", lines) or ["v5e:1x1"])[0]
    argv = ["--config", str(path), "--topology", topology, "--part", part, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "e1jax.plan", *argv], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] and report["topology"] == topology
