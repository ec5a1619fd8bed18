"""Settings: numbers of every kind, sizes of a config.json, the directory of a run."""

import dataclasses
import json

import numpy as np
import pytest

from e1jax.config import (
    CheckpointConfig,
    ModelConfig,
    SamplingParams,
    UserError,
    read_yaml,
    record_config,
)

HF = {
    "model_type": "qwen2",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rope_theta": 10000,
}


def test_numpy_numbers_are_numbers():
    params = SamplingParams(
        thinking_budget=np.int8(100),
        seed=np.uint64(2**64 - 1),
        temperature=np.float32(0.5),
        top_p=np.float64(1),
    )
    assert params == SamplingParams(100, seed=2**64 - 1, temperature=0.5, top_p=1)
    assert params.thinking_budget + 100 == 200  # a number of 8 bits would overflow
    json.dumps(dataclasses.asdict(params))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 10**400),
        ("temperature", -(10**400)),
        ("temperature", float("nan")),
        ("temperature", np.float32("inf")),
        ("temperature", True),
        ("temperature", np.True_),
        ("temperature", "1" * 1000),
        ("top_p", np.float32(1.5)),
        ("seed", 10**400),
        ("seed", np.int64(-1)),
        ("seed", np.float32(1)),
        ("top_k", np.False_),
        ("n", 1.0),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_other_numbers_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name} must be") as error:
        SamplingParams(**{name: value})
    assert len(str(error.value)) < 150


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 4 * 10**12}, "num_layers must be a whole number, from"),
        ({"hidden_size": 10**400}, "hidden_size must be"),
        ({"vocab_size": 2**31 - 1}, "vocab_size must be"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings must be"),
        ({"num_attention_heads": 0}, "num_heads must be"),
        ({"rope_theta": "abc"}, "rope_theta must be a number above 0, not 'abc'"),
        ({"rope_theta": 10**400}, "rope_theta must be"),
        ({"rope_parameters": {"rope_theta": [1]}}, "rope_theta must be"),
        ({"rope_scaling": 5}, "wrong type"),
        ({"layer_types": 5}, "layer_types holds 5"),
        ({"layer_types": [1, "x"]}, "layer_types holds 1"),
        ({"layer_types": "sliding_attention"}, "layer_types holds 'sliding_attention'"),
        ({"use_mrope": True}, "use_mrope=True is not implemented"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_a_config_json_cannot_say(change, named):
    with pytest.raises(UserError, match=r"^config\.json: ") as error:
        ModelConfig.from_hf(HF | change)
    assert named in str(error.value)


def test_what_is_off_in_a_config_json():
    plain = ModelConfig.from_hf(HF)
    off = {"use_sliding_window": None, "use_mrope": False, "layer_types": None}
    assert ModelConfig.from_hf(HF | off) == plain
    assert plain.rope_theta == 10000 and plain.tie_word_embeddings is False


def test_a_directory_that_is_no_run_is_left_alone(tmp_path):
    precious = tmp_path / "config.json"
    precious.write_text("data")
    with pytest.raises(UserError, match=r"no config\.yaml.*--run-dir"):
        record_config(CheckpointConfig(), tmp_path)
    assert list(tmp_path.iterdir()) == [precious]
    assert precious.read_text() == "data"


def test_a_run_killed_at_its_very_start_starts_over(tmp_path):
    (tmp_path / "config.yaml.new").write_text("every: 1")
    record_config(CheckpointConfig(), tmp_path)
    assert read_yaml(tmp_path / "config.yaml") == {"every": 100, "keep": 2}
    assert len(list(tmp_path.iterdir())) == 1


def test_deep_yaml_is_refused(tmp_path):
    (tmp_path / "deep.yaml").write_text("[" * 10_000)
    with pytest.raises(UserError, match=r"deep\.yaml is not YAML"):
        read_yaml(tmp_path / "deep.yaml")
