"""What the benchmarks share: a random model, peers in environments and processes of
their own, and what is said about a run."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TUNIX = "google-tunix==0.1.7"
VENVS = Path(__file__).parents[1] / ".bench-venvs"

# A Qwen2 of 49.8 million parameters.
LAYERS, HIDDEN, MLP, VOCAB = 12, 512, 2048, 4096
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
ROPE_THETA, NORM_EPS = 1e4, 1e-6


def make_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights by the path that e1jax gives them; layers are stacked, [L, ...]."""

    def normal(*shape: int, mean: float = 0.0) -> np.ndarray:
        return mean + np.float32(0.02) * rng.standard_normal(shape, np.float32)

    heads, kv_heads = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    weights = {
        "embedding": normal(VOCAB, HIDDEN),
        "norm/scale": normal(HIDDEN, mean=1),
        "lm_head/kernel": normal(HIDDEN, VOCAB),
        "layers/attention_norm/scale": normal(LAYERS, HIDDEN, mean=1),
        "layers/mlp_norm/scale": normal(LAYERS, HIDDEN, mean=1),
        "layers/attention/o/kernel": normal(LAYERS, heads, HIDDEN),
        "layers/mlp/gate/kernel": normal(LAYERS, HIDDEN, MLP),
        "layers/mlp/up/kernel": normal(LAYERS, HIDDEN, MLP),
        "layers/mlp/down/kernel": normal(LAYERS, MLP, HIDDEN),
    }
    for name, size in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        weights[f"layers/attention/{name}/kernel"] = normal(LAYERS, HIDDEN, size)
        weights[f"layers/attention/{name}/bias"] = normal(LAYERS, size)
    return weights


def e1jax_model(weights: dict[str, np.ndarray], max_position: int) -> tuple:
    """(config, mesh, parameters) of the model in e1jax."""
    # Each process has only its own library.
    import jax
    import jax.numpy as jnp

    from e1jax.config.model import ModelConfig
    from e1jax.nn.model import abstract_params
    from e1jax.sharding.mesh import make_mesh

    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_position,
        rope_theta=ROPE_THETA,
        rms_norm_eps=NORM_EPS,
    )
    mesh = make_mesh(None, config)
    params = jax.tree.map_with_path(
        lambda path, s: jax.device_put(
            weights["/".join(k.key for k in path)], s.sharding
        ),
        abstract_params(config, mesh, jnp.float32),
    )
    return config, mesh, params


def tunix_model(weights: dict[str, np.ndarray], **options: Any) -> Any:
    """The model in Tunix; `options` go into its config."""
    # Each process has only its own library.
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.qwen2 import model as qwen2

    config = qwen2.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=HIDDEN,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_kv_heads=KV_HEADS,
        rope_theta=ROPE_THETA,
        norm_eps=NORM_EPS,
        **options,
    )
    model = qwen2.Qwen2(config, rngs=nnx.Rngs(0))

    def put(param: Any, name: str, *layer: int) -> None:
        param[...] = jnp.asarray(weights[name][layer].reshape(param.shape))

    put(model.embedder.input_embedding, "embedding")
    put(model.final_norm.w, "norm/scale")
    put(model.lm_head.w, "lm_head/kernel")
    for index, layer in enumerate(model.layers):
        put(layer.input_layernorm.w, "layers/attention_norm/scale", index)
        put(layer.post_attention_layernorm.w, "layers/mlp_norm/scale", index)
        for name in ("q", "k", "v"):
            kernel = getattr(layer.attn, f"{name}_proj").w
            put(kernel, f"layers/attention/{name}/kernel", index)
            bias = getattr(layer.attn, f"{name}_bias")
            put(bias, f"layers/attention/{name}/bias", index)
        put(layer.attn.o_proj.w, "layers/attention/o/kernel", index)
        for name in ("gate", "up", "down"):
            kernel = getattr(layer.mlp, f"{name}_proj").kernel
            put(kernel, f"layers/mlp/{name}/kernel", index)
    return model


def transformers_model(weights: dict[str, np.ndarray], max_position: int) -> Any:
    """The model in transformers."""
    # Each process has only its own library.
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=max_position,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    names = {
        "embedding": "model.embed_tokens.weight",
        "norm/scale": "model.norm.weight",
        "lm_head/kernel": "lm_head.weight",
        "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
        "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    }
    for part in "qkvo":
        names[f"layers/attention/{part}/kernel"] = (
            f"model.layers.{{}}.self_attn.{part}_proj.weight"
        )
        names[f"layers/attention/{part}/bias"] = (
            f"model.layers.{{}}.self_attn.{part}_proj.bias"
        )
    for part in ("gate", "up", "down"):
        names[f"layers/mlp/{part}/kernel"] = f"model.layers.{{}}.mlp.{part}_proj.weight"
    tensors = {}
    for name, array in weights.items():
        stack = array if name.startswith("layers/") else [array]
        for layer, part in enumerate(stack):
            part = part.T if name.endswith("kernel") else part
            tensors[names[name].format(layer)] = torch.tensor(part)
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict(tensors)
    return model


def install(venv: Path, *packages: str) -> str:
    """The interpreter of the virtual environment that holds the packages, each pinned
    as NAME==VERSION; made if it is not there. One that holds others is left alone."""
    python, listed = str(venv / "bin" / "python"), " ".join(packages)
    if venv.exists():
        wanted = dict(package.split("==") for package in packages)
        show = f"import importlib.metadata as m; print(*map(m.version, {[*wanted]}))"
        if Path(python).exists():
            found = subprocess.run([python, "-c", show], capture_output=True, text=True)
            versions = [version.split("+")[0] for version in found.stdout.split()]
            if versions == [*wanted.values()]:
                return python
        sys.exit(f"{venv} does not hold {listed}; remove it, or name another directory")
    print(f"installing {listed} into {venv}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, *packages], check=True)
    return python


class Worker:
    """A library in a process of its own, which answers a JSON line with another."""

    def __init__(self, name: str, python: str, script: str, *flags: str):
        # Tunix enters meshes in a way that JAX warns about at each step.
        quiet = ("-W", "ignore::DeprecationWarning")
        command = [python, *quiet, script, "--worker", name, *flags]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.name = name

    def ask(self, question: Any) -> dict[str, Any]:
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the process of {self.name} has ended; why is said above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(make: Callable[[], Callable[[Any], dict[str, Any]]]) -> None:
    """The process of a Worker: answers each line of stdin, until there is none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    answer = make()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def machine() -> dict[str, Any]:
    """What a JSON line says of the machine and the moment."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return {
        "load": os.getloadavg()[0],
        "cpu_model": found[1] if found else platform.processor(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    median = statistics.median(values)
    return {"median": median, "low": min(values), "high": max(values)}


def append(output: Path | None, lines: Sequence[dict[str, Any]]) -> None:
    if output:
        with output.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
