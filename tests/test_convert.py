"""Conversion there and back bit for bit, loading, and every kind of bad input."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import PATIENCE, edit_json, set_everywhere
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from e1jax import convert
from e1jax.checkpoint.huggingface import read_config, write_hf_weights
from e1jax.checkpoint.lazy import LazyArray, parts_of
from e1jax.checkpoint.load import LoadedModel, load_model, read_tokenizer
from e1jax.checkpoint.params import named_shapes, open_params, save_params
from e1jax.checkpoint.runs import find_params
from e1jax.cli.command import run_command
from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.nn.model import forward, unembed
from e1jax.tokenizer import write_byte_tokenizer


def weights(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a Hugging Face directory, by the safetensors library itself."""
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same_bytes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def same_params(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        return model(torch.arange(40).reshape(2, 20)).logits


def our_logits(loaded: LoadedModel) -> jax.Array:
    """Of the same tokens."""
    tokens, positions = jnp.arange(40).reshape(2, 20), jnp.tile(jnp.arange(20), (2, 1))
    hidden, _ = forward(loaded.config, loaded.read_params(), tokens, positions)
    return unembed(loaded.config, loaded.read_params(), hidden)


@pytest.fixture
def command(capsys):
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*args) -> tuple[int, str, str]:
        try:
            run_command(lambda: convert.main([str(arg) for arg in args]))
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"tied": True, "num_kv_heads": 1}, {"max_shard_size": "100KB"}],
    ids=["untied", "tied", "sharded"],
)
def test_there_and_back_is_bit_exact(tiny_hf, tmp_path, command, dtype, shape):
    source = tiny_hf(dtype=dtype, **shape)
    assert (len(list(source.glob("*.safetensors"))) > 1) == ("max_shard_size" in shape)
    for name, args in (
        ("e1", ("from-hf", source)),
        ("back", ("to-hf", tmp_path / "e1")),
    ):
        code, out, _ = command(*args, tmp_path / name)
        assert code == 0
        assert out.startswith(f"{tmp_path / name} is written")
    back = tmp_path / "back"
    assert same_bytes(weights(back), weights(source))
    assert torch.equal(logits(back), logits(source))
    for file in back.glob("*.safetensors"):  # as the library does: no reader stumbles
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"e1", "back"}


def test_manifest_and_generation_config(tiny_hf, tmp_path, command):
    source = tiny_hf(dtype="bfloat16")
    command("from-hf", source, tmp_path / "e1")
    manifest = json.loads((tmp_path / "e1" / "manifest.json").read_text())
    assert manifest["source"] == str(source) and manifest["dtype"] == "bfloat16"
    assert manifest["revision"] is None and manifest["format_version"] == 1
    assert manifest["tensors"] == {
        name: {
            "shape": list(array.shape),
            "dtype": "bfloat16",
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
        for name, array in weights(source).items()
    }
    command("to-hf", tmp_path / "e1", tmp_path / "back")
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    tokenizer = read_tokenizer(source)
    assert generation == {
        "bos_token_id": tokenizer.backend.token_to_id("<｜begin▁of▁sentence｜>"),
        "eos_token_id": tokenizer.eos_id,
    }


@pytest.mark.parametrize(
    ("in_generation", "in_config", "ends"),
    [
        ([256, 97], None, (256, 97)),
        (97, None, (256, 97)),
        ([97, 98], [98, 99, 256], (256, 97, 98, 99)),
        (None, [99, 256], (256, 99)),
        (259, 259, (256, 259)),  # also if it is named as BOS
        ([], 256, (256,)),
    ],
)
def test_every_eos_id_comes_back(
    tiny_hf, tmp_path, command, in_generation, in_config, ends
):
    source = shutil.copytree(tiny_hf(), tmp_path / "hf")
    edit_json(source / "config.json", eos_token_id=in_config, bos_token_id=259)
    generation = {"bos_token_id": 259, "eos_token_id": in_generation, "top_k": 7}
    (source / "generation_config.json").write_text(json.dumps(generation))
    command("from-hf", source, tmp_path / "e1")
    command("to-hf", tmp_path / "e1", tmp_path / "back")
    for name in ("hf", "e1", "back"):
        assert read_tokenizer(tmp_path / name).eos_ids == ends
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config.get("eos_token_id"), config["bos_token_id"]) == (in_config, 259)
    theirs = GenerationConfig.from_pretrained(tmp_path / "back")
    named = in_generation or (list(ends) if len(ends) > 1 else ends[0])
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.top_k) == (named, 259, 7)


def test_a_checkpoint_without_generation_config(tiny_hf, tmp_path, command):
    """As older versions wrote it: it loads, and to-hf names the EOS of its tokenizer."""
    command("from-hf", tiny_hf(), tmp_path / "e1")
    (tmp_path / "e1/generation_config.json").unlink()
    assert load_model(str(tmp_path / "e1")).tokenizer.eos_ids == (256,)
    assert command("to-hf", tmp_path / "e1", tmp_path / "back")[0] == 0
    assert GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == 256


def test_named_templates_come_back(tiny_hf, tmp_path, command):
    source = shutil.copytree(tiny_hf(), tmp_path / "hf")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    command("from-hf", source, tmp_path / "e1")
    command("to-hf", tmp_path / "e1", tmp_path / "back")
    templates = [
        AutoTokenizer.from_pretrained(path).chat_template
        for path in (source, tmp_path / "back")
    ]
    assert templates[0] == templates[1] and set(templates[0]) == {"default", "rag"}


def test_dtype_of_the_written_weights(tiny_hf, tmp_path, command):
    source = tiny_hf()
    command("from-hf", source, tmp_path / "e1", "--dtype", "bfloat16")
    command("to-hf", tmp_path / "e1", tmp_path / "back")
    half = {name: w.astype(jnp.bfloat16) for name, w in weights(source).items()}
    assert same_bytes(weights(tmp_path / "back"), half)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_stored_dtypes_that_differ_need_a_choice(tiny_hf, tmp_path, command):
    source = shutil.copytree(tiny_hf(), tmp_path / "hf")
    tensors = weights(source)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(jnp.bfloat16)
    save_file(tensors, source / "model.safetensors")
    code, _, error = command("from-hf", source, tmp_path / "e1")
    assert code == 2 and "bfloat16 and float32" in error and "--dtype" in error
    assert command("from-hf", source, tmp_path / "e1", "--dtype", "float32")[0] == 0


def test_every_kind_of_directory_loads_the_same(tiny_hf, tmp_path, command):
    source = tiny_hf()
    command("from-hf", source, tmp_path / "e1")
    run_dir = shutil.copytree(source, tmp_path / "run")
    (run_dir / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "e1/params", run_dir / "checkpoints/10/params")
    loaded = load_model(str(source))
    assert loaded.dtype == np.float32 and loaded.files.name == str(source)
    for model in ("e1", "run", "run/10", "run/checkpoints/10"):
        other = load_model(str(tmp_path / model))
        assert same_params(other.read_params(), loaded.read_params())
        assert other.config == loaded.config
    half = load_model(str(tmp_path / "e1"), dtype="bfloat16")
    expected = load_model(str(source), dtype="bfloat16")
    assert half.read_params()["norm"]["scale"].dtype == jnp.bfloat16
    assert same_params(half.read_params(), expected.read_params())


def test_the_step_of_a_run(tiny_hf, tmp_path, command):
    """Its best, else its latest; a step by name; steps that are not whole are none."""
    run_dir = shutil.copytree(tiny_hf(), tmp_path / "run")
    (run_dir / "model.safetensors").unlink()
    (run_dir / "checkpoints/30.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(UserError, match="no finished checkpoint"):
        find_params(run_dir)
    for step in (3, 20):
        loaded = load_model(str(tiny_hf()))
        params = jax.tree.map(
            lambda array, step=step: array * step, loaded.read_params()
        )
        save_params(run_dir / f"checkpoints/{step}/params", params)
    (run_dir / "checkpoints/30").mkdir()
    assert find_params(run_dir) == (run_dir / "checkpoints/20/params", run_dir)
    (run_dir / "checkpoints/best.json").write_text('{"step": 3, "accuracy": 0.5}')
    assert find_params(run_dir) == (run_dir / "checkpoints/3/params", run_dir)
    assert command("to-hf", run_dir / "20", tmp_path / "hf")[0] == 0
    assert "run directory" in command("inspect", run_dir)[1]
    norm = weights(tiny_hf())["model.norm.weight"]
    np.testing.assert_array_equal(
        weights(tmp_path / "hf")["model.norm.weight"], 20 * norm
    )
    code, _, error = command("to-hf", run_dir / "7", tmp_path / "other")
    assert code == 2 and "no step 7" in error and "3, 20" in error


@pytest.mark.parametrize("name", ["checkpoints", "params"])
def test_a_subdirectory_makes_no_run_of_a_hugging_face_directory(
    tiny_hf, tmp_path, command, name
):
    path = shutil.copytree(tiny_hf(), tmp_path / "hf")
    (path / name).mkdir()
    assert "Hugging Face directory" in command("inspect", path)[1]
    expected = load_model(str(tiny_hf())).read_params()
    assert same_params(load_model(str(path)).read_params(), expected)
    (tmp_path / "project" / name).mkdir(parents=True)
    refused(command("inspect", tmp_path / "project"), "no config.json", tmp_path)


def test_stray_files_hide_no_model(tiny_hf, tmp_path, command):
    """What training leaves in a directory, whatever its name ends in."""
    source = shutil.copytree(tiny_hf(), tmp_path / "hf")
    command("from-hf", source, tmp_path / "e1")
    run_dir = shutil.copytree(source, tmp_path / "run")
    (run_dir / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "e1/params", run_dir / "checkpoints/10/params")
    expected = load_model(str(source)).read_params()
    for path in (source, tmp_path / "e1", run_dir):
        for name in ("training_args.bin", "optimizer.bin", "scheduler.safetensors"):
            (path / name).write_bytes(b"0")
        assert same_params(load_model(str(path)).read_params(), expected)
    assert command("to-hf", tmp_path / "e1", tmp_path / "back")[0] == 0
    assert "kind                    run directory" in command("inspect", run_dir)[1]
    result = command("from-hf", tmp_path / "e1", tmp_path / "dst")
    refused(result, "is an e1jax checkpoint already", tmp_path)


def test_tensors_without_a_use_are_skipped(tiny_hf, tmp_path):
    """A copy of tied embeddings, and buffers that old transformers versions saved."""
    source = tiny_hf(tied=True)
    path = shutil.copytree(source, tmp_path / "hf")
    tensors = weights(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    for layer, dtype in enumerate((np.float16, jnp.bfloat16)):  # cast with the model
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[name] = (1e4 ** -(np.arange(0, 16, 2) / 16)).astype(dtype)
    save_file(tensors, path / "model.safetensors")
    expected = load_model(str(source)).read_params()
    assert same_params(load_model(str(path)).read_params(), expected)
    assert load_model(str(path)).config.tie_word_embeddings


@pytest.mark.parametrize("change", ["all", "last bit"])
def test_a_head_of_its_own_in_a_model_that_says_tied(
    tiny_hf, tmp_path, command, capsys, monkeypatch, change
):
    """transformers uses such a head, so do we, and to-hf gives it back."""
    set_everywhere(monkeypatch, "_BLOCK_BYTES", 1000)  # the last block is not full
    source = shutil.copytree(tiny_hf(tied=True), tmp_path / "hf")
    tensors = weights(source)
    head = tensors["model.embed_tokens.weight"].copy()
    if change == "all":
        head = head[::-1].copy()
    else:
        head.view(np.uint32)[-1, -1] ^= 1
    tensors["lm_head.weight"] = head
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    note = (
        f"note: {source}/config.json has tie_word_embeddings true, but lm_head.weight is "
        "not the embedding; it is used as the output head\n"
    )
    expected = logits(source)
    capsys.readouterr()
    loaded = load_model(str(source))
    ours = our_logits(loaded)
    assert capsys.readouterr().err == note
    tolerance = 1e-5 * float(expected.abs().max())  # as in test_model
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)

    assert command("from-hf", source, tmp_path / "e1")[2] == note
    assert command("to-hf", tmp_path / "e1", tmp_path / "back")[2] == ""
    assert same_bytes(weights(tmp_path / "back"), tensors)
    assert torch.equal(logits(tmp_path / "back"), expected)
    for name in ("e1", "back"):
        other = load_model(str(tmp_path / name))
        assert not other.config.tie_word_embeddings
        assert same_params(other.read_params(), loaded.read_params())


def test_files_above_the_limit_are_split(tiny_hf, tmp_path):
    source = tiny_hf(dtype="bfloat16")
    config, tensors = read_config(source), weights(source)
    convert.from_hf(str(source), tmp_path / "e1")
    split = shutil.copytree(source, tmp_path / "split")
    (split / "model.safetensors").unlink()
    arrays = open_params(tmp_path / "e1/params", config)
    write_hf_weights(
        split, config, np.dtype(jnp.bfloat16), arrays, max_shard_bytes=50_000
    )
    files = sorted(split.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3 and all(f.stat().st_size < 55_000 for f in files)
    assert same_bytes(weights(split), tensors)
    assert torch.equal(logits(split), logits(source))
    total = json.loads((split / "model.safetensors.index.json").read_text())["metadata"]
    assert total["total_size"] == sum(array.nbytes for array in tensors.values())
    expected = load_model(str(source)).read_params()
    assert same_params(load_model(str(split)).read_params(), expected)


def test_inspect(tiny_hf, tmp_path, command):
    source = tiny_hf(dtype="bfloat16", num_layers=3)
    command("from-hf", source, tmp_path / "e1")
    count = sum(array.size for array in weights(source).values())
    for path, row in [
        (source, "model.layers.*.mlp.up_proj.weight       3 x [96, 64] bfloat16"),
        (tmp_path / "e1", "layers/mlp/up/kernel           [3, 64, 96] bfloat16"),
    ]:
        code, out, error = command("inspect", path)
        assert code == 0 and error == ""
        lines = [" ".join(line.split()) for line in out.splitlines()]
        assert " ".join(row.split()) in lines
        assert f"parameters {count:,}" in lines and "dtype bfloat16" in lines
    assert f"source {source}" in lines and "kind e1jax checkpoint" in lines


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


def change_weights(path: Path, change) -> None:
    tensors = weights(path)
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def drop_shard(path: Path) -> None:
    min(path.glob("model-00002-*")).unlink()


def misplace(path: Path) -> None:
    """The index names the wrong file for one tensor."""
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    last = max(weight_map.values())
    assert weight_map["model.embed_tokens.weight"] != last
    edit_json(index, weight_map=weight_map | {"model.embed_tokens.weight": last})


def repeat(path: Path) -> None:
    """A second file holds a tensor too."""
    file = min(path.glob("model-00002-*"))
    save_file(load_file(file) | {UP: np.ones((96, 64), np.float32)}, file)


def point_outside(path: Path) -> None:
    """The index names a file by its path, which even exists."""
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={k: f"../hf/{file}" for k, file in weight_map.items()})


def only_torch_weights(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


SINGLE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
FREQUENCIES = "model.layers.1.self_attn.rotary_emb.inv_freq"
BAD_SOURCES = {
    "truncated": (lambda p: truncate(p / SINGLE), SINGLE),
    "empty": (lambda p: os.truncate(p / SINGLE, 0), SINGLE),
    "bad header": (lambda p: (p / SINGLE).write_bytes(b"\xff" * 400), SINGLE),
    "missing tensor": (lambda p: change_weights(p, lambda t: t.pop(UP)), UP),
    "extra tensor": (
        lambda p: change_weights(p, lambda t: t.update(more=np.ones(3, np.float32))),
        "more",
    ),
    "wrong shape": (
        lambda p: change_weights(p, lambda t: t.update({UP: t[UP][1:].copy()})),
        f"{UP} [95, 64] instead of [96, 64]",
    ),
    "frequencies of another model": (
        lambda p: change_weights(
            p, lambda t: t.update({FREQUENCIES: np.ones(8, np.float32)})
        ),
        f"{FREQUENCIES} is not what rope_theta=10000 and head_dim=16",
    ),
    "frequencies of other heads": (
        lambda p: change_weights(
            p, lambda t: t.update({FREQUENCIES: np.ones(4, np.float32)})
        ),
        f"{FREQUENCIES} is not what rope_theta=10000 and head_dim=16",
    ),
    "integers": (
        lambda p: change_weights(p, lambda t: t.update({UP: t[UP].astype(np.int64)})),
        f"{UP} is stored as I64",
    ),
    "no weights": (lambda p: (p / SINGLE).unlink(), SINGLE),
    "torch weights": (only_torch_weights, "save_pretrained"),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda p: truncate(p / "config.json"), "config.json"),
    "config is a list": (lambda p: (p / "config.json").write_text("[1]"), "list"),
    "other model": (
        lambda p: edit_json(p / "config.json", model_type="llama"),
        "model_type='llama'",
    ),
    "other size": (
        lambda p: edit_json(p / "config.json", num_hidden_layers=3),
        "model.layers.2.self_attn.k_proj.bias",
    ),
    "fewer layers": (
        lambda p: edit_json(p / "config.json", num_hidden_layers=1),
        "model.layers.1.input_layernorm.weight",
    ),
    **{
        f"{name} of {json.dumps(value)}": (
            lambda p, name=name, value=value: edit_json(p / name, eos_token_id=value),
            f"{name}: eos_token_id={value!r} must be an id of this model (0 to 264) or a list",
        )
        for name in ("generation_config.json", "config.json")
        for value in ("<eos>", 265, -1, True, 1.0, [256, "<eos>"], [[256]])
    },
    "generation config is no JSON": (
        lambda p: truncate(p / "generation_config.json"),
        "generation_config.json line ",
    ),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json"),
    "no tokenizer config": (
        lambda p: (p / "tokenizer_config.json").unlink(),
        "tokenizer_config.json",
    ),
    "tokenizer of another model": (
        lambda p: edit_json(p / "config.json", vocab_size=100),
        "vocab_size",
    ),
}
BAD_SHARDS = {
    "missing shard": (drop_shard, "model-00002-of"),
    "shard elsewhere": (point_outside, "../hf/model-00001-of"),
    "shard of a long name": (
        lambda p: edit_json(
            p / "model.safetensors.index.json", weight_map={UP: "x" * 5000}
        ),
        "xxx",
    ),
    "tensor in two files": (repeat, f"both hold {UP}"),
    "misplaced tensor": (misplace, "model.embed_tokens.weight"),
    "truncated shard": (
        lambda p: truncate(min(p.glob("model-00002-*"))),
        "model-00002-of",
    ),
    "index without map": (
        lambda p: edit_json(p / "model.safetensors.index.json", weight_map=None),
        "weight_map",
    ),
}


def refused(result: tuple[int, str, str], named: str, where: Path) -> None:
    """One sentence that names the thing, exit code 2, and nothing written."""
    code, out, error = result
    assert code == 2 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    assert named in error
    assert not list(where.glob(".*")) and not (where / "dst").exists()


@pytest.mark.parametrize("bad", BAD_SOURCES.values(), ids=BAD_SOURCES.keys())
def test_bad_hugging_face_directory(tiny_hf, tmp_path, command, bad):
    spoil, named = bad
    path = shutil.copytree(tiny_hf(), tmp_path / "hf")
    spoil(path)
    refused(command("from-hf", path, tmp_path / "dst"), named, tmp_path)
    with pytest.raises(UserError) as error:
        load_model(str(path))
    assert named in str(error.value)


@pytest.mark.parametrize("bad", BAD_SHARDS.values(), ids=BAD_SHARDS.keys())
def test_bad_shards(tiny_hf, tmp_path, command, bad):
    spoil, named = bad
    path = shutil.copytree(tiny_hf(max_shard_size="100KB"), tmp_path / "hf")
    spoil(path)
    refused(command("from-hf", path, tmp_path / "dst"), named, tmp_path)


def test_bad_orbax_checkpoint(tiny_hf, tmp_path, command):
    convert.from_hf(str(tiny_hf()), tmp_path / "e1")
    (tmp_path / "e1/params/_METADATA").rename(tmp_path / "aside")
    result = command("to-hf", tmp_path / "e1", tmp_path / "dst")
    refused(result, "is not a whole Orbax checkpoint", tmp_path)
    (tmp_path / "aside").rename(tmp_path / "e1/params/_METADATA")
    shutil.rmtree(tmp_path / "e1/params/ocdbt.process_0")
    result = command("to-hf", tmp_path / "e1", tmp_path / "dst")
    refused(result, "is not a whole Orbax checkpoint", tmp_path)
    edit_json(tmp_path / "e1/config.json", num_hidden_layers=3)
    result = command("inspect", tmp_path / "e1")
    refused(result, "[2, 64] instead of [3, 64]", tmp_path)


def damage(params: Path, array: np.ndarray) -> None:
    """Flips a bit of an array where it is stored."""
    for file in params.rglob("*"):
        content = bytearray(file.read_bytes()) if file.is_file() else b""
        place = content.find(array.tobytes()[:64])
        if place >= 0:
            content[place + 5] ^= 1
            file.write_bytes(content)
            return
    raise AssertionError("the array is in no file")


def test_a_flipped_bit_is_found(tiny_hf, tmp_path, command):
    for flags in ((), ("--dtype", "bfloat16")):  # of a cast tensor nothing is known
        command("from-hf", tiny_hf(), tmp_path / "e1", *flags)
        arrays = open_params(tmp_path / "e1/params", read_config(tiny_hf()))
        up = arrays["layers/mlp/up/kernel"].read(
            (slice(1, 2), slice(0, 64), slice(0, 96))
        )
        damage(tmp_path / "e1/params", up)
        result = command("to-hf", tmp_path / "e1", tmp_path / "dst")
        if flags:
            assert result[0] == 0
        else:
            refused(result, f"{UP} is not what its manifest.json says", tmp_path)
        shutil.rmtree(tmp_path / "e1")


def test_a_checkpoint_of_another_format_version(tiny_hf, tmp_path, command):
    convert.from_hf(str(tiny_hf()), tmp_path / "e1")
    edit_json(tmp_path / "e1/manifest.json", format_version=2)
    named = "manifest.json has format_version 2, and this e1jax reads 1"
    refused(command("to-hf", tmp_path / "e1", tmp_path / "dst"), named, tmp_path)
    refused(command("inspect", tmp_path / "e1"), named, tmp_path)
    with pytest.raises(UserError, match="format_version 2"):
        load_model(str(tmp_path / "e1"))


def test_bad_arguments(tiny_hf, tmp_path, command):
    source = tiny_hf()
    convert.from_hf(str(source), tmp_path / "e1")
    for args, named in [
        (("from-hf", tmp_path / "none", tmp_path / "dst"), "/none"),
        (("from-hf", "owner/name", tmp_path / "dst"), "'owner/name'"),
        (("inspect", "no such thing"), "'no such thing'"),
        (("inspect", tmp_path), "no config.json"),
        (("inspect", "x" * 5000), "'xxx"),
        (("inspect", "~nosuch/x"), "'~nosuch/x'"),
        (("from-hf", source, "/"), "/ exists already"),
        (("from-hf", source, "/proc/dst"), "/proc/dst cannot be written"),
        (("from-hf", tmp_path / "e1", tmp_path / "dst"), "already"),
        (("to-hf", source, tmp_path / "dst"), "needs no conversion"),
        (("from-hf", source), "DST"),
        (("from-hf", source, tmp_path / "dst", "--dtype", "int8"), "int8"),
        (("frum-hf", source, tmp_path / "dst"), "frum-hf"),
        ((), "COMMAND"),
        (("from_hf", "a", "b"), "no command 'from_hf'; did you mean 'from-hf'?"),
    ]:
        refused(command(*args), named, tmp_path)


def test_what_exists_is_left_alone(tiny_hf, tmp_path, command):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("data")
    code, _, error = command("from-hf", tiny_hf(), taken)
    assert code == 2 and str(taken) in error
    assert [file.read_text() for file in taken.iterdir()] == ["data"]
    code, _, error = command("from-hf", tiny_hf(), taken / "precious")
    assert code == 2 and (taken / "precious").read_text() == "data"
    code, _, error = command("from-hf", tiny_hf(), taken / "precious" / "below")
    assert code == 2 and "Not a directory" in error
    empty = tmp_path / "new" / "parents"
    empty.mkdir(parents=True)
    assert command("from-hf", tiny_hf(), empty)[0] == 0
    assert (empty / "manifest.json").is_file()


def test_dst_is_checked_before_anything_else(tmp_path, command):
    """Even before SRC, which may be a download of hours; and no parent is left."""
    for dst in ("/proc/dst", tmp_path, tmp_path / "file" / "dst"):
        (tmp_path / "file").touch()
        for direction in ("from-hf", "to-hf"):
            code, _, error = command(direction, "no such model", dst)
            assert code == 2 and error.startswith(f"error: {dst} ")
    code, _, error = command("from-hf", "no such model", tmp_path / "a" / "b" / "dst")
    assert code == 2 and "no such model" in error
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_link_at_dst_is_followed(tiny_hf, tmp_path, command):
    (tmp_path / "empty").mkdir()
    for target in ("empty", "new"):
        link = tmp_path / f"link to {target}"
        link.symlink_to(tmp_path / target)
        assert command("from-hf", tiny_hf(), link)[0] == 0
        assert link.is_symlink() and (tmp_path / target / "manifest.json").is_file()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refused(command("from-hf", tiny_hf(), loop), f"{loop} exists already", tmp_path)


def test_help_explains_every_flag(capsys):
    for args, words in [
        (["--help"], ["from-hf", "to-hf", "inspect"]),
        (["from-hf", "--help"], ["SRC", "DST", "--dtype", "default"]),
        (["to-hf", "--help"], ["RUN_DIR/STEP"]),
        (["inspect", "--help"], ["DIR"]),
    ]:
        with pytest.raises(SystemExit, match="0"):
            convert.main(args)
        out = capsys.readouterr().out
        assert all(word in out for word in words)


def write_ones(path: Path, **sizes) -> ModelConfig:
    """A Hugging Face directory of a larger model, quickly."""
    config = ModelConfig(
        **{"vocab_size": write_byte_tokenizer(path)} | sizes,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        max_position_embeddings=64,
        rope_theta=1e4,
    )
    dtype = np.dtype(np.float32)
    arrays = {
        name: LazyArray(shape, dtype, shape, np.ones(shape, dtype).__getitem__)
        for name, shape in named_shapes(config).items()
    }
    (path / "config.json").write_text(json.dumps(config.to_hf("float32")))
    write_hf_weights(path, config, dtype, arrays)
    return config


def start(*args) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "e1jax.convert", *map(str, args)],
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "direction", ["from-hf", pytest.param("to-hf", marks=pytest.mark.slow)]
)
def test_interrupted_conversion_leaves_nothing(tmp_path, direction):
    """Killed in the middle, it leaves nothing at DST, and runs afresh; so at Ctrl-C."""
    source, dst = tmp_path / "src", tmp_path / "dst"
    write_ones(source, hidden_size=512, intermediate_size=4096, num_layers=8)
    if direction == "to-hf":
        convert.from_hf(str(source), tmp_path / "e1")
        source = tmp_path / "e1"
    partial = tmp_path / ".dst.partial"
    for stop, code in [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]:
        process = start(direction, source, dst)
        started = time.monotonic()
        while not (partial.is_dir() and any(partial.iterdir())):
            assert process.poll() is None and time.monotonic() < started + 60
            time.sleep(0.001)
        process.send_signal(stop)
        _, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, error
        assert not dst.exists()
        assert partial.exists() == (stop == signal.SIGKILL)
        assert "Traceback" not in error
    (partial / "leftover").touch()
    process = start(direction, source, dst)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    assert not partial.exists() and not (dst / "leftover").exists()
    assert (dst / "config.json").is_file()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_of_many_chunks(tiny_hf, tmp_path, command, monkeypatch, dtype):
    """Chunks, parts and layers, none of which divides another evenly, meet again."""
    source = tiny_hf(
        dtype=dtype, hidden_size=62, intermediate_size=106, num_heads=5, num_kv_heads=1
    )
    config = read_config(source)
    expected = load_model(str(source), dtype=dtype).read_params()
    command("from-hf", source, tmp_path / "coarse")
    set_everywhere(monkeypatch, "_CHUNK_BYTES", 700)
    command("from-hf", source, tmp_path / "e1")
    arrays = open_params(tmp_path / "e1/params", config)
    for name, array in arrays.items():
        size = np.prod(array.parts) * array.dtype.itemsize
        assert size <= 700 and (size > 250 or array.parts == array.shape), name
    up = arrays["layers/mlp/up/kernel"]
    assert up.parts[0] == 1 and up.shape[1] % up.parts[1] and up.shape[2] % up.parts[2]
    # What was written in small chunks and in one, and what is read so from a file.
    for model in (source, tmp_path / "e1", tmp_path / "coarse"):
        loaded = load_model(str(model), dtype=dtype).read_params()
        assert same_params(loaded, expected)
    for name in ("e1", "coarse"):
        command("to-hf", tmp_path / name, tmp_path / f"{name} back")
        assert same_bytes(weights(tmp_path / f"{name} back"), weights(source))


def test_the_parts_of_an_array():
    array = LazyArray((7, 10), np.dtype(np.int8), (3, 4), lambda part: np.empty(0))
    for rows, columns in [((0, 7), (0, 10)), ((2, 6), (4, 8)), ((3, 4), (1, 2))]:
        index = (slice(*rows), slice(*columns))
        count = np.zeros(array.shape, int)
        for part in parts_of(array, index):
            count[part] += 1
            for span, step in zip(part, array.parts, strict=True):
                assert span.start // step == (span.stop - 1) // step
        assert (count[index] == 1).all() and count.sum() == count[index].size


BROKEN = """
import shutil, sys
from pathlib import Path
import numpy as np
from e1jax.checkpoint.lazy import LazyArray
from e1jax.checkpoint.params import save_params

def read(part):
    if part[0].start >= 20:
        raise OSError("the disk is gone")
    return np.ones((1, 200_000), np.float32)

array = LazyArray((100, 200_000), np.dtype(np.float32), (1, 200_000), read)
path = Path(sys.argv[1])
try:
    save_params(path, {"a": array})
except Exception as error:
    shutil.rmtree(path.parent)
    sys.exit(str(error))
"""


def test_a_part_that_cannot_be_read_ends_a_save(tmp_path):
    """At once, however many parts are waiting, and nothing is written after that."""
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(tmp_path / "new" / "params")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1 and "the disk is gone" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["hf", "e1"])
def test_loading_needs_no_memory_beside_the_weights(tmp_path, kind):
    """No copy of an array is made, where one of 67 MB would show."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_layers": 8}
    write_ones(tmp_path / "hf", **sizes)
    if kind == "e1":
        convert.from_hf(str(tmp_path / "hf"), tmp_path / "e1")
    loaded = load_model(str(tmp_path / kind), dtype="float32")
    loaded.read_params()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    params = loaded.read_params()
    size = sum(array.nbytes for array in jax.tree.leaves(params))
    assert memory("VmHWM") - before <= size + 45e6


def test_comparing_a_head_needs_no_memory(tmp_path):
    """Nor does it leave any: head and embedding are 134 MB each."""
    sizes = {"hidden_size": 512, "intermediate_size": 8, "num_layers": 1}
    write_ones(tmp_path, **sizes, vocab_size=2**16)
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    load_model(str(tmp_path))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loaded = load_model(str(tmp_path))
    assert memory("VmHWM") - before <= 60e6
    assert (
        loaded.config.tie_word_embeddings
        and "lm_head.weight" not in loaded.files.tensors
    )


def memory(name: str) -> int:
    """Memory of this process in bytes, as Linux says it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


AND_STATUS = """
import sys
from e1jax import convert
convert.main(sys.argv[1:])
print(open("/proc/self/status").read())
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_of_a_conversion(tmp_path, dtype):
    """At most 1.25 times the checkpoint of 1.1 GB, the interpreter included."""
    script = Path(__file__).parents[1] / "benchmarks" / "random_checkpoint.py"
    sizes = {
        "hidden-size": 1024,
        "intermediate-size": 5504,
        "num-layers": 24 if dtype == "bfloat16" else 12,
        "num-heads": 16,
        "num-kv-heads": 4,
        "head-dim": 64,
        "vocab-size": 32000,
    }
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    source = tmp_path / "hf"
    subprocess.run(
        [sys.executable, script, source, "--dtype", dtype, *flags], check=True
    )
    size = (source / "model.safetensors").stat().st_size
    for args in [
        ("from-hf", source, tmp_path / "e1"),
        ("to-hf", tmp_path / "e1", tmp_path / "back"),
    ]:
        # Of the process itself: what getrusage tells includes the parent at the fork.
        status = subprocess.run(
            [sys.executable, "-c", AND_STATUS, *map(str, args)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
        print(f"{args[0]} {dtype}: {peak / size:.2f} x")
        assert peak <= 1.25 * size
    assert same_bytes(weights(tmp_path / "back"), weights(source))
