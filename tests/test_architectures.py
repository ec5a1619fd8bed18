"""Qwen3 through every command, against transformers; Qwen2 is what the other tests run."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from conftest import edit_json, several_devices
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from e1jax import convert, sample, sft, train
from e1jax.checkpoint.huggingface import hf_shapes, read_config
from e1jax.checkpoint.load import load_model
from e1jax.checkpoint.params import named_leaves
from e1jax.cli.command import run_command
from e1jax.config.architectures import ARCHITECTURES
from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.grpo.logprobs import response_logprobs

# Three query heads on one key/value head, and heads wider than hidden_size / num_heads.
ODD = {
    "architecture": "qwen3",
    "hidden_size": 40,
    "intermediate_size": 36,
    "num_layers": 3,
    "num_heads": 3,
    "num_kv_heads": 1,
    "head_dim": 22,
}
PROMPTS = [[5, 9, 30, 7], [11] * 23, [40, 3]]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process and gives what it wrote to stdout."""

    def call(module, *args) -> str:
        argv = [str(arg) for arg in args]
        monkeypatch.setattr(sys, "argv", [module.__name__, *argv])
        if module is convert:
            run_command(lambda: convert.main(argv))
        else:
            run_command(module.main)
        return capsys.readouterr().out

    return call


def weights(path: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """Tokens of transformers, from its own cache."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens[0, len(prompt) :].tolist()


def sampled(run, path: Path, tmp_path: Path, *flags) -> list[dict]:
    """Greedy completions by `python -m e1jax.sample`, in the order of the prompts."""
    lines = [json.dumps({"prompt_ids": ids}) for ids in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    flags = ("--temperature", 0, "--json", "--logprobs", *flags)
    budgets = ("--thinking-budget", "none", "--solution-budget", 40)
    prompts = ("--prompts", tmp_path / "prompts.jsonl", "--cache-len", 256)
    out = run(sample, "--model", path, *prompts, *budgets, *flags)
    found = [json.loads(line) for line in out.splitlines()]
    return sorted(found, key=lambda completion: completion["id"])


def test_greedy_completions_are_those_of_transformers(run, tiny_hf, tmp_path):
    path = tiny_hf(**ODD)
    for prompt, ours in zip(PROMPTS, sampled(run, path, tmp_path), strict=True):
        tokens = ours["token_ids"]
        free = (ours["forced"] + [True]).index(True)  # before the closer, if it came
        assert free >= 20
        assert tokens[:free] == greedy(path, prompt, free)


@pytest.mark.parametrize(("samples", "remat"), [(1, True), (2, False)])
def test_gradients_are_those_of_torch(tiny_hf, samples, remat):
    """Of log-probabilities of responses; with two samples, prompts are shared."""
    path = tiny_hf(**ODD)
    loaded = load_model(str(path), dtype="float32")
    rng = np.random.default_rng(0)
    prompt_len, response_len = np.array([5, 5, 9, 9]), 7
    tokens = rng.integers(0, 260, (4, 16)).astype(np.int32)
    for row in (1, 3):
        tokens[row, : prompt_len[row]] = tokens[row - 1, : prompt_len[row]]
    mix = rng.standard_normal((4, response_len)).astype(np.float32)

    def loss(params):
        logprobs, _ = response_logprobs(
            loaded.config,
            params,
            jnp.asarray(tokens),
            jnp.asarray(prompt_len),
            response_len,
            jnp.float32(1.3),
            mesh=loaded.mesh,
            remat=remat,
            samples=samples,
        )
        return (logprobs * mix).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(loaded.read_params())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    logits = model(torch.tensor(tokens, dtype=torch.long)).logits / 1.3
    logprobs = torch.log_softmax(logits, dim=-1)
    expected = sum(
        logprobs[row, start + i - 1, tokens[row, start + i]] * float(mix[row, i])
        for row, start in enumerate(prompt_len)
        for i in range(response_len)
    )
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
    theirs = dict(model.named_parameters())
    for name, ours in named_leaves(grads).items():
        tensor = loaded.config.table.tensors[name]
        parts = np.asarray(ours) if tensor.stacked else np.asarray(ours)[None]
        names = tensor.names(loaded.config.num_layers)
        for part, hf_name in zip(parts, names, strict=True):
            reference = theirs[hf_name].grad.numpy()
            error = np.abs((part.T if tensor.turned else part) - reference).max()
            assert error <= 1e-4 * np.abs(reference).max(), hf_name


def test_there_and_back_is_bit_exact(run, tiny_hf, tmp_path):
    source = tiny_hf(**ODD, dtype="bfloat16")
    run(convert, "from-hf", source, tmp_path / "e1")
    run(convert, "to-hf", tmp_path / "e1", tmp_path / "back")
    ours, theirs = weights(tmp_path / "back"), weights(source)
    assert ours.keys() == theirs.keys()
    assert len([name for name in ours if "q_norm" in name]) == 3
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        assert array.tobytes() == theirs[name].tobytes(), name
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        for path in (tmp_path / "back", source)
    ]
    assert all(type(model) is Qwen3ForCausalLM for model in models)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(*(model(tokens).logits for model in models))


def test_int8_is_the_model_of_its_rounded_kernels(run, tiny_hf, tmp_path):
    """By the flag and by a checkpoint; logprobs of transformers with the rounded kernels."""
    path = tiny_hf(**ODD)
    run(convert, "from-hf", path, tmp_path / "e1", "--quantize", "int8")
    by_flag = sampled(run, path, tmp_path, "--quantize", "int8")
    stored = sampled(run, tmp_path / "e1", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            scale = parameter.data.abs().amax(dim=1, keepdim=True) / 127
            parameter.data = torch.round(parameter.data / scale) * scale
    for prompt, ours, again in zip(PROMPTS, by_flag, stored, strict=True):
        assert ours["token_ids"] == again["token_ids"]
        tokens = torch.tensor([prompt + ours["token_ids"]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens).logits[0], dim=-1)
        at = torch.arange(len(prompt) - 1, tokens.shape[1] - 1)
        expected = logprobs[at, tokens[0, len(prompt) :]].numpy()
        np.testing.assert_allclose(ours["logprobs"], expected, atol=2e-4)


def test_eight_devices_sample_the_tokens_of_one(run, tiny_hf, tmp_path):
    path = tiny_hf(architecture="qwen3", num_heads=8, num_kv_heads=4)
    one = sampled(run, path, tmp_path)
    arguments = "--temperature 0 --thinking-budget none --solution-budget 40 --json"
    prompts = ["--prompts", tmp_path / "prompts.jsonl", "--cache-len", "256"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "e1jax.sample", "--model", path, *prompts),
            *(*arguments.split(), "--mesh", "data=2,tensor=4"),
        ],
        env={**os.environ, "XLA_FLAGS": several_devices(8), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    eight = {line["id"]: line for line in map(json.loads, done.stdout.splitlines())}
    for ours in one:
        assert eight[ours["id"]]["token_ids"] == ours["token_ids"]


@pytest.mark.slow
def test_trained_from_scratch_and_on(run, tmp_path):
    """SFT of random parameters, then GRPO of what it gave; transformers reads the end."""
    sizes = ModelConfig(
        *(272, 16, 24, 2, 4, 2, 6, 4096, 1e4),
        tie_word_embeddings=True,
        architecture="qwen3",
    )
    first = {"batch_size": 4, "terse": 1.0}
    settings = {"steps": 2, "model": dataclasses.asdict(sizes)}
    settings |= {"first": first, "second": first, "checkpoint": {"every": 2}}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    run(sft, "--config", tmp_path / "sft.yaml", "--run-dir", tmp_path / "sft")
    assert read_config(tmp_path / "sft") == sizes
    settings = {
        "model": str(tmp_path / "sft"),
        "steps": 2,
        "data": {"problems": "nano-train", "max_prompt_len": 32},
        "rollout": {
            **{"prompts": 2, "samples": 3, "slots": 6},
            **{"thinking_budget": 8, "solution_budget": 6},
        },
        "update": {"minibatch_prompts": 2, "microbatch": 6, "remat": True},
        "checkpoint": {"every": 1},
    }
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(settings))
    run(train, "--config", tmp_path / "grpo.yaml", "--run-dir", tmp_path / "grpo")
    lines = (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    run(convert, "to-hf", tmp_path / "grpo", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model) is Qwen3ForCausalLM and model.config.head_dim == 6


def test_the_tensors_of_each_architecture_are_those_of_transformers(tiny_hf):
    """All tables, by name and shape; and the biases that Qwen3 may have are refused."""
    for architecture in ARCHITECTURES:
        path = tiny_hf(architecture=architecture)
        shapes = {name: array.shape for name, array in weights(path).items()}
        assert hf_shapes(read_config(path)) == shapes


def test_a_config_without_head_dim_is_read_as_by_transformers():
    sizes = ModelConfig(*(9, 64, 96, 2, 4, 2, 128, 512, 1e4), architecture="qwen3")
    hf = sizes.to_hf("float32")
    del hf["head_dim"]
    assert Qwen3Config(**hf).head_dim == ModelConfig.from_hf(hf).head_dim == 128
    hf["model_type"] = "qwen2"
    assert ModelConfig.from_hf(hf).head_dim == 16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_bias": True}, "attention_bias=True is not implemented"),
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe' is not implemented"),
        ({"model_type": ["qwen3"]}, "model_type=['qwen3'] is not implemented"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"model_type": "qwen2"}, "bias"),  # which the weights do not have
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tiny_hf, tmp_path, change, named):
    path = tmp_path / "hf"
    path.mkdir()
    for file in tiny_hf(**ODD).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    edit_json(path / "config.json", **change)
    with pytest.raises(UserError) as error:
        load_model(str(path))
    assert named in str(error.value)


def test_an_unknown_architecture_is_one_sentence():
    with pytest.raises(UserError, match=r"architecture.*qwen2.*qwen3"):
        ModelConfig(9, 64, 96, 2, 4, 2, 16, 512, 1e4, architecture="llama")
