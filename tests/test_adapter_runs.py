"""Runs that train an adapter, and what is made of them: commands, records, files."""

import copy
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import yaml
from conftest import edit_json
from test_train import NANO, TINY, metrics, saved
from transformers import AutoModelForCausalLM

from e1jax import Engine, SamplingParams, convert, sample, train
from e1jax.checkpoint.load import load_model
from e1jax.checkpoint.params import named_leaves
from e1jax.cli.files import read_json
from e1jax.config.checks import UserError
from e1jax.config.load import load_config
from e1jax.config.training import GRPOConfig
from e1jax.data.nano import nano_problems
from e1jax.nn.model import forward, unembed

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

TARGETS = ["q", "v", "down"]
NAMES = {
    f"{part}/{which}"
    for part in ("attention/q", "attention/v", "mlp/down")
    for which in "ab"
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, compilations_in):
    """A directory with adapter.yaml, its problems and its model."""
    path = tmp_path_factory.mktemp("adapter")
    even = [str(number) for number in range(0, 100, 2)]  # right half of the time
    made = [p for p in nano_problems(100, 3, held_out=False) if len(p.steps) == 4]
    lines = [{"problem": problem.text, "answer": even} for problem in made[:5]]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "problems.jsonl").write_text(text)
    shutil.copytree(NANO, path / "base")
    settings = copy.deepcopy(TINY)
    del settings["validation"]
    settings |= {"model": str(path / "base"), "steps": 4}
    settings["data"] |= {
        "problems": str(path / "problems.jsonl"),
        "instruction": "Now.",
    }
    settings["adapter"] = {"rank": 3, "alpha": 6, "targets": TARGETS}
    settings["optimizer"] = {"learning_rate": 0.01}
    settings["update"]["minibatch_prompts"] = 2
    (path / "adapter.yaml").write_text(yaml.safe_dump(settings))
    with compilations_in(path / "cache"):
        yield path


def settings(workplace: Path, *flags: str) -> GRPOConfig:
    argv = ["--config", str(workplace / "adapter.yaml"), *flags]
    return load_config(GRPOConfig, argv, "train")[0]


@pytest.fixture(scope="module")
def run_dir(workplace) -> Path:
    train.train(settings(workplace), workplace / "run")
    return workplace / "run"


def logits_of(loaded, tokens):
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    params, config = loaded.read_params(), loaded.config
    hidden, _ = forward(config, params, jnp.asarray(tokens), positions)
    return unembed(config, params, hidden)


TOKENS = np.random.default_rng(0).integers(0, 264, (3, 17)).astype(np.int32)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def test_a_checkpoint_holds_the_adapter_alone(run_dir):
    step = saved(run_dir)["4"]
    leaves = named_leaves(step["params"])
    assert leaves.keys() == NAMES
    assert {str(array.dtype) for array in leaves.values()} == {"float32"}
    assert leaves["attention/q/a"].shape == (3, 96, 3)
    assert all(array.any() for array in leaves.values())
    files = (run_dir / "checkpoints" / "4").rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    weights = (NANO / "model.safetensors").stat().st_size
    assert size < weights / 2


def test_the_reference_is_the_model_without_the_adapter(run_dir):
    kls = [step["kl"] for step in metrics(run_dir)]
    assert kls[0] < 1e-6 < 1e-4 < max(kls)


def test_a_run_goes_on_bit_for_bit(workplace, run_dir):
    again = shutil.copytree(run_dir, workplace / "again")
    shutil.rmtree(again / "checkpoints" / "4")
    train.train(settings(workplace), again)
    old, new = saved(run_dir)["4"], saved(again)["4"]
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_other_settings_and_another_base_are_refused(workplace, run_dir, tmp_path):
    with pytest.raises(UserError, match=r"adapter\.rank \(3 there, 4 now\)"):
        train.train(settings(workplace, "--adapter.rank", "4"), run_dir)
    weights = workplace / "base" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(UserError, match="begun with other content of model"):
            train.train(settings(workplace), run_dir)
        with pytest.raises(UserError, match="whose weights were others when it was"):
            load_model(str(run_dir))
    finally:
        weights.write_bytes(content)
    with pytest.raises(UserError, match="is an adapter, which training cannot begin"):
        train.train(settings(workplace, "--model", str(run_dir)), tmp_path / "run")


@pytest.mark.slow
def test_the_base_may_be_int8(workplace, tmp_path):
    """The run is then sampled from beside int8 too, without being asked. Its second update
    of a step is compared with log-probabilities that are computed before the first."""
    flags = ["--adapter.quantize", "int8", "--steps", "2"]
    flags += ["--update.minibatch_prompts", "1"]
    train.train(settings(workplace, *flags), tmp_path / "run")
    first, second = metrics(tmp_path / "run")
    assert 0 < first["kl"] < second["kl"]
    assert first["sampler_gap"] < 1e-3  # both compute with int8
    loaded = load_model(str(tmp_path / "run"))
    assert loaded.quantize == "int8"
    assert (
        loaded.read_params()["layers"]["mlp"]["up"]["kernel"]["values"].dtype == "int8"
    )


def test_a_run_is_its_base_with_the_adapter(workplace, run_dir):
    base = str(workplace / "base")
    alone, beside = load_model(str(run_dir)), load_model(base, adapter=str(run_dir))
    assert alone.record() == beside.record()
    assert alone.record()["adapter"]["step"] == 4
    jax.tree.map(
        np.testing.assert_array_equal, alone.read_params(), beside.read_params()
    )
    assert alone.tokenizer.instruction == "Now."
    earlier = load_model(base, adapter=str(run_dir / "2")).record()["adapter"]
    assert earlier["step"] == 2 and earlier != alone.record()["adapter"]
    weights = load_model(base).read_params()
    mine = dict(alone.read_params()["layers"]["attention"]["q"])
    del mine["adapter"]
    jax.tree.map(
        np.testing.assert_array_equal, mine, weights["layers"]["attention"]["q"]
    )


def test_a_merged_model_is_what_transformers_and_we_compute(run_dir, tmp_path):
    convert.to_hf(str(run_dir), tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = torch_logits(theirs)
    ours = logits_of(load_model(str(run_dir)), TOKENS)
    np.testing.assert_allclose(ours, expected, atol=2e-4)
    again = load_model(str(tmp_path / "hf"))
    np.testing.assert_allclose(logits_of(again, TOKENS), expected, atol=2e-4)
    assert again.tokenizer.instruction == "Now."
    base = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    assert np.abs(torch_logits(base) - expected).max() > 1e-2


def test_peft_reads_what_we_write_and_we_read_it_back(workplace, run_dir, tmp_path):
    convert.to_peft(str(run_dir), tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    loaded = load_model(str(run_dir))
    expected = torch_logits(theirs)
    np.testing.assert_allclose(logits_of(loaded, TOKENS), expected, atol=2e-4)
    for again in (
        load_model(str(workplace / "base"), adapter=str(tmp_path / "peft")),
        load_model(str(tmp_path / "peft")),
    ):
        jax.tree.map(
            np.testing.assert_array_equal, again.read_params(), loaded.read_params()
        )


def command(capsys, monkeypatch, *argv) -> str:
    monkeypatch.setattr("sys.argv", ["sample", *map(str, argv)])
    sample.main()
    return capsys.readouterr().out


def test_outputs_refuse_another_adapter(
    workplace, run_dir, tmp_path, capsys, monkeypatch
):
    base, out = workplace / "base", tmp_path / "out.jsonl"
    flags = [
        "12a+3b*2?",
        "--thinking-budget",
        8,
        "--solution-budget",
        6,
        "--output",
        out,
    ]
    flags += ["--cache-len", 64, "--temperature", 1]
    command(capsys, monkeypatch, *flags, "--model", base, "--adapter", run_dir)
    [line] = out.read_text().splitlines()
    record = read_json(tmp_path / "out.jsonl.settings.json")["settings"]
    assert record["adapter"]["model"] == str(run_dir.resolve())
    command(capsys, monkeypatch, *flags, "--model", run_dir)  # the same, and done
    assert out.read_text().splitlines() == [line]
    for other in (
        ["--model", base],
        ["--model", base, "--adapter", run_dir / "2"],
    ):
        with pytest.raises(UserError, match=r"was made with adapter=\{'model'"):
            command(capsys, monkeypatch, *flags, *other)
    engine = Engine.from_pretrained(
        str(base), adapter=str(run_dir), cache_len=64, slots=1
    )
    params = SamplingParams(8, 6, temperature=1)
    [[completion]] = engine.generate(["12a+3b*2?"], params)
    assert completion.token_ids == json.loads(line)["token_ids"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True, which e1jax does not have"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA', which e1jax does not have"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"r": None}, "has no field r"),
        ({"r": 4}, "has the wrong shape in"),
    ],
)
def test_other_adapters_are_refused(changes, message, run_dir, tmp_path):
    convert.to_peft(str(run_dir), tmp_path / "peft")
    edit_json(tmp_path / "peft" / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_model(str(NANO), adapter=str(tmp_path / "peft"))


def test_models_and_adapters_are_not_mixed_up(workplace, run_dir, tiny_hf, tmp_path):
    base, run = str(workplace / "base"), str(run_dir)
    for model, adapter, message in (
        (run, run, "is an adapter itself"),
        (base, base, "is a model; give it as that"),
        (base, "nowhere", "the adapter 'nowhere' is neither a directory nor a hub id"),
        (str(tiny_hf()), run, "has the wrong shape in attention/q/a"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(model, adapter=adapter)
    moved = shutil.copytree(run_dir, tmp_path / "run")
    text = (moved / "config.yaml").read_text().replace(base, str(tmp_path / "gone"))
    (moved / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="give it, by --model BASE --adapter"):
        load_model(str(moved))
    assert load_model(base, adapter=str(moved)).adapter


def test_convert_refuses_what_it_cannot_write(workplace, run_dir, tmp_path):
    convert.from_hf(str(workplace / "base"), tmp_path / "int8", quantize="int8")
    with pytest.raises(UserError, match="has its weights as int8"):
        convert.to_hf(str(tmp_path / "int8"), tmp_path / "hf", adapter=str(run_dir))
    with pytest.raises(UserError, match="is no run that trained an adapter"):
        convert.to_peft(str(workplace / "base"), tmp_path / "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8"]


def test_inspect_shows_the_adapter(run_dir):
    text = convert.inspect(str(run_dir))
    assert "attention/q/a" in text and "adapter to" in text
    count = sum(3 * 3 * (96 + out) for out in (96, 24)) + 3 * 3 * (96 + 256)
    assert f"{count:,}" in text
