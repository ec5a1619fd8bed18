"""Settings: numbers of every kind, sizes of a config.json, the directory of a run."""

import dataclasses
import json
import re

import numpy as np
import pytest
import yaml

from e1jax import train
from e1jax.config.checks import UserError, shown
from e1jax.config.load import (
    check_one_config,
    load_config,
    load_config_and_flags,
    read_yaml,
    record_config,
)
from e1jax.config.model import ModelConfig
from e1jax.config.sampling import SamplingParams
from e1jax.config.texts import check_backslashes, parse_json
from e1jax.config.training import (
    AdamWConfig,
    CheckpointConfig,
    DataConfig,
    GRPOConfig,
    HostsConfig,
    LossConfig,
    RewardConfig,
    RolloutConfig,
    SFTConfig,
    UpdateConfig,
    ValidationConfig,
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


def test_settings_that_came_after_a_run_began_have_their_defaults_there(tmp_path):
    """In a section, and a whole section; another value than the default is a change."""
    sizes = ModelConfig.from_hf(HF)
    config = SFTConfig(sizes, steps=3)
    record_config(config, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    then = yaml.safe_load(path.read_text())
    del then["model"]["architecture"], then["checkpoint"], then["optimizer"]["warmup"]
    path.write_text(yaml.safe_dump(then))
    record_config(config, tmp_path / "run")
    qwen3 = dataclasses.replace(sizes, architecture="qwen3")
    with pytest.raises(
        UserError, match=r"model\.architecture \('qwen2' there, 'qwen3' now\)"
    ):
        record_config(dataclasses.replace(config, model=qwen3), tmp_path / "run")


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


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (RolloutConfig, {"prompts": 0}, "prompts must be a whole number, 1 or more"),
        (RolloutConfig, {"samples": 1}, "samples must be a whole number, 2 or more"),
        (RolloutConfig, {"samples": True}, "samples must be"),
        (RolloutConfig, {"thinking_budget": -1}, "thinking_budget must be"),
        (RolloutConfig, {"solution_budget": 2.0}, "solution_budget must be"),
        (RolloutConfig, {"temperature": 0}, "temperature must be a number above 0"),
        (RolloutConfig, {"temperature": float("nan")}, "temperature must be"),
        (RolloutConfig, {"slots": 0}, "slots must be"),
        (RolloutConfig, {"cache_len": 0}, "cache_len must be"),
        (RolloutConfig, {"solution_budget": None}, "needs rollout.cache_len"),
        (
            LossConfig,
            {"clip": "dual"},
            "clip must be ppo or none or cispo or gspo, not 'dual'",
        ),
        (LossConfig, {"aggregate": "mean"}, "aggregate must be token or sequence"),
        (LossConfig, {"old_logprobs": "old"}, "old_logprobs must be recomputed or"),
        (LossConfig, {"clip_low": 1.5}, "clip_low must be a number from 0 to 1"),
        (LossConfig, {"clip_high": -0.1}, "clip_high must be a number of 0 or more"),
        (LossConfig, {"kl_coef": -1}, "kl_coef must be"),
        (LossConfig, {"entropy_coef": "x"}, "entropy_coef must be"),
        (LossConfig, {"max_ratio": 0.9}, "max_ratio must be a number of 1 or more"),
        (AdamWConfig, {"learning_rate": 0}, "learning_rate must be a number above 0"),
        (AdamWConfig, {"schedule": "step"}, "schedule must be constant or linear or"),
        (RewardConfig, {"function": "mine.short"}, "must be package.module:name, not"),
        (RewardConfig, {"function": "a b:c"}, "must be package.module:name, not"),
        (AdamWConfig, {"warmup_steps": -1}, "warmup_steps must be"),
        (AdamWConfig, {"b2": 1.0}, "b2 must be a number from 0 to below 1"),
        (AdamWConfig, {"weight_decay": -0.1}, "weight_decay must be"),
        (AdamWConfig, {"max_grad_norm": 0}, "max_grad_norm must be"),
        (UpdateConfig, {"minibatch_prompts": 0}, "minibatch_prompts must be"),
        (UpdateConfig, {"microbatch": 0}, "microbatch must be"),
        (UpdateConfig, {"epochs": 0}, "epochs must be"),
        (UpdateConfig, {"param_dtype": "float16"}, "param_dtype must be float32 or"),
        (DataConfig, {"max_prompt_len": 0}, "max_prompt_len must be"),
        (ValidationConfig, {"limit": 0}, "limit must be"),
        (ValidationConfig, {"every": 0}, "every must be"),
        (ValidationConfig, {"budgets": ()}, "validation.budgets is empty"),
        (ValidationConfig, {"budgets": ((-1, 5),)}, "thinking_budget must be"),
        (ValidationConfig, {"temperature": -1}, "temperature must be"),
        (ValidationConfig, {"top_p": 0}, "top_p must be"),
        (ValidationConfig, {"best": "validation_acuracy"}, "'validation_accuracy'?"),
        (ValidationConfig, {"best": "validation_accuracy_1_2"}, "validation.best"),
        (GRPOConfig, {"steps": 0}, "steps must be"),
        (GRPOConfig, {"seed": 2**32}, "seed must be a whole number, from 0 to"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_training_configuration_cannot_say(section, values, message):
    required = {"model": "nano", "steps": 1} if section is GRPOConfig else {}
    with pytest.raises(UserError) as error:
        section(**(required | values))
    assert message in str(error.value)


def test_parameters_of_bfloat16_are_not_trained(tmp_path, capsys):
    """At the learning rate of the shipped recipe, hardly any weight would ever move."""
    path = tmp_path / "run.yaml"
    path.write_text("model: nano\nsteps: 4\nupdate: {param_dtype: bfloat16}\n")
    config, _ = load_config(GRPOConfig, ["--config", str(path)], "train")
    with pytest.raises(UserError, match="param_dtype=bfloat16 cannot be trained"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        load_config(GRPOConfig, ["--help"], "train")
    assert "train refuses bfloat16" in " ".join(capsys.readouterr().out.split())


def test_batches_divide(tmp_path):
    def config(prompts, samples, minibatch, microbatch, epochs=1):
        return GRPOConfig(
            "nano",
            3,
            rollout=RolloutConfig(prompts, samples),
            update=UpdateConfig(minibatch, microbatch, epochs),
        )

    assert config(12, 4, 3, 6, epochs=5).updates_per_step == 20
    assert config(12, 4, 12, 48).updates_per_step == 1
    with pytest.raises(UserError, match=r"prompts=12 .* update\.minibatch_prompts=5;"):
        config(12, 4, 5, 4)
    with pytest.raises(UserError, match=r"samples=12 .* update\.microbatch=8; change"):
        config(12, 4, 3, 8)


def test_the_metrics_that_can_name_the_best_step():
    budgets = ((32, 28), (None, 28), (None, None))
    names = ["validation_accuracy"]
    names += [f"validation_accuracy_{n}" for n in ("32_28", "none_28", "none_none")]
    for name in names:
        assert ValidationConfig(budgets=budgets, best=name).metrics == names


def test_yaml_and_flags_set_what_the_dataclasses_hold(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text(
        "model: nano\nsteps: 7\nrollout: {prompts: 4, thinking_budget: 9}\n"
        "update: {minibatch_prompts: 2}\n"
        "validation: {budgets: [[8, 6], [null, null]]}\n"
    )
    flags = ["--rollout.thinking_budget", "null", "--rollout.cache_len=77", "--seed=3"]
    argv = ["--config", str(file), *flags, "--optimizer.learning_rate", "1e-3"]
    config, run_dir = load_config(GRPOConfig, argv, "train")
    assert run_dir.name == "some"
    assert config == GRPOConfig(
        "nano",
        7,
        3,
        rollout=RolloutConfig(4, thinking_budget=None, cache_len=77),
        optimizer=AdamWConfig(1e-3),
        update=UpdateConfig(2),
        validation=ValidationConfig(budgets=((8, 6), (None, None))),
    )
    record_config(config, tmp_path / "run")
    record_config(config, tmp_path / "run")  # the same, read back
    changed = dataclasses.replace(config.validation, budgets=((8, 6), (None, 6)))
    with pytest.raises(UserError, match=r"other settings: validation\.budgets \("):
        record_config(dataclasses.replace(config, validation=changed), tmp_path / "run")


def test_a_run_directory_of_another_kind_is_refused(tmp_path):
    (tmp_path / "some.yaml").write_text("model: nano\nsteps: 7\n")
    argv = ["--config", str(tmp_path / "some.yaml"), "--run-dir", "s3://bucket/run"]
    with pytest.raises(UserError, match="neither a local path nor gs://"):
        load_config(GRPOConfig, argv, "train")


@pytest.mark.parametrize(
    ("line", "flags", "message"),
    [
        ("seed: five", [], "{path}: seed must be a whole number, not five"),
        ("seed: 1.5", [], "{path}: seed must be a whole number, not 1.5"),
        ("", ["--seed", "[1]"], "--seed must be a whole number, not [1]"),
        ("", ["--seed", ""], "--seed must be a whole number, not ''"),
        (
            "seed: five",
            ["--seed", "3"],
            "{path}: seed or --seed must be a whole number, not five",
        ),
        ("", ["--seed=x"], "--seed must be a whole number, not x"),
        (
            "rollout: {thinking_budget: all}",
            ["--seed", "3"],
            "{path}: rollout.thinking_budget must be a whole number or null or [a whole number or null, ...], not all",
        ),
        (
            "loss: {clip: hard}",
            [],
            "{path}: loss.clip must be ppo or none or cispo or gspo, not hard",
        ),
        (
            "",
            ["--dtype", "float16"],
            "--dtype must be float32 or bfloat16 or null, not float16",
        ),
        (
            "",
            ["--optimizer.learning_rate", "fast"],
            "--optimizer.learning_rate must be a number, not fast",
        ),
        ("", ["--update.remat", "1"], "--update.remat must be true or false, not 1"),
        ("model: [nano]", [], "{path}: model must be text, not ['nano']"),
        (
            "",
            ["--validation.budgets", "[[8, x]]"],
            "--validation.budgets must be [[a whole number or null, a whole number or "
            "null], ...]; x does not fit",
        ),
        (
            "",
            ["--processes", "two"],
            "--processes must be a whole number or null, not two",
        ),
    ],
)
def test_a_value_of_another_type_is_one_sentence(line, flags, message, tmp_path):
    path = tmp_path / "some.yaml"
    model = "" if line.startswith("model") else "model: nano\n"
    path.write_text(f"{model}steps: 7\n{line}\n")
    argv = ["--config", str(path), *flags]
    with pytest.raises(UserError) as error:
        load_config_and_flags(GRPOConfig, HostsConfig, argv, "train")
    assert str(error.value) == message.format(path=path)


# LaTeX as it is meant, in whose JSON every backslash is single.
LATEX = [
    r"\frac{1}{2}",
    r"\boxed{}",
    r"\beta + \binom{n}{k}",
    r"\forall x",
    r"$\theta$",
    r"3\times 4",
    r"\text{units}",
    r"\textbf{(A)}",
    r"\tan x",
    r"\tan DAB",
    r"\tan^{-1} 2",
    r"\tanh 1",
    r"\triangle ABC",
    r"\tfrac12",
    r"x \to 0",
    r"\tau_1",
    r"x \neq 0",
    r"\neq\nu",
    r"\nabla f",
    r"x \notin A",
    r"x \not= y",
    r"a \nleq b",
    r"$x \ne 0$",
    r"Let $x \ne 0$ and $y \ne 1$.",
    r"with speed $\nu$",
    r"$p \nmid q$",
    r"$\neg p$",
    r"\rho r",
    r"\right)",
    r"\rangle",
    r"\rfloor",
    r"\rightarrow",
    r"\rm kg",
]
ORDINARY = [
    "under\nunder the tree",
    "1\nor 2\nnot only\nnext\nno\nnew\nnearly\nequal\noted",
    "i) first\nii) second\ne.g. this\ni.e. that",
    "$$\nu = x^2,\ne = 2$$ and $5\nis less than $6",
    "Given $x$ and\ni) $y$\nmid $z$ of $$a$$\ne $5,\ni) $6",
    "lines\nparallel to the others, and\nless than half of them\nmid = 3",
    "eq = Eq(x, y)\neq1 = eq\neq_2 = eq1\nu = 3\ne = 2.7\ni = 0",
    "x\ty\tan apple\tor\tto\ttext\textra\ttop\ttan",
    "x\to\tx\no\to\n\to",
    "\treturn x\n\tfor i in x:\n\t\timport os\n\tint n;",
    "ends\r\nright here\r\nrho\r\nangle\r\nm",
    "page 1\f\npage 2\n\f\n\x1b[31mred\x1b[0m\v\n\b\a",
    "C:\\new\\table and \\frac{1}{2}",
    r"\\begin \\ \[ \] \{ \} \neq \theta \rho \beta \frac",
    "no-break\xa0space, line\u2028separator, \x85, \u2029",
    "",
]


@pytest.mark.parametrize("text", LATEX)
def test_latex_whose_backslash_was_read_as_an_escape_is_refused(text):
    check_backslashes(text, "here")
    for lost in (json.loads(f'"{text}"'), json.loads(f'"So {text}."')):
        for value in (lost, ["1", lost], [{"role": "user", "content": lost}]):
            with pytest.raises(UserError) as error:
                check_backslashes(value, "here")
            message = str(error.value)
            command = text[text.index("\\") :].partition(" ")[0].rstrip("{}1x$^-+_)(A")
            assert message.startswith("here holds a") and "\n" not in message
            assert rf"write \{command}"[:10] in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\x0crac12", r"a form feed where \frac seems to be meant; in JSON, YAML and Python write \\frac,"),
        ("\x07lpha", r"a bell where \alpha"),
        ("\x0bec{v}", r"a vertical tab where \vec"),
        ("\x0b{c}", r"a vertical tab where \v{ "),
        ("\x1bpsilon", r"an escape character where \epsilon"),
        ("\x08" + "z" * 10**6, r"a backspace where \b" + "z" * 20 + " seems"),
    ],
)  # fmt: skip
def test_the_lost_command_is_named(text, message):
    with pytest.raises(UserError) as error:
        check_backslashes(text, "x.jsonl line 3: problem")
    assert str(error.value).startswith(f"x.jsonl line 3: problem holds {message}")


@pytest.mark.parametrize("text", ORDINARY, ids=range(len(ORDINARY)))
def test_ordinary_texts_keep_their_tabs_and_newlines(text):
    check_backslashes(text, "here")
    check_backslashes({"a": [text], "b": 5, "c": None}, "here")


def test_other_values_are_no_texts():
    for value in (None, 5, 1.5, True, [], {}):
        check_backslashes(value, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            r'{"a": "\sqrt{2}"}',
            r"x line 7 is not JSON (Invalid \escape at column 8); "
            r"write \\sqrt, with two backslashes",
        ),
        ('{"a":\n\n "b\\(c"}', r"x line 9 is not JSON (Invalid \escape at column 4)"),
        ('{"a":\n\n "b\\(c"}', r"write \\(, with two"),
        (r'"\uparrow"', r"write \\uparrow, with two"),
        (r'"\\\xi"', r"write \\xi, with two"),
        (
            "{",
            "(Expecting property name enclosed in double quotes at column 2); a hint",
        ),
        ("9" * 5000, "line 7 is not JSON (Exceeds the limit"),
        ("[" * 200_000, "line 7 is not JSON (maximum recursion"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_not_json(text, message):
    for form in (text, text.encode()):
        with pytest.raises(UserError) as error:
            parse_json(form, "x", 7, "a hint")
        assert message in str(error.value)


def load_yaml(tmp_path, text: str, *flags: str) -> GRPOConfig:
    (tmp_path / "some.yaml").write_text(f"model: nano\nsteps: 7\n{text}\n")
    argv = ["--config", str(tmp_path / "some.yaml"), *flags]
    return load_config(GRPOConfig, argv, "train")[0]


@pytest.mark.parametrize(
    "command",
    [
        *(r"\boxed", r"\frac", r"\alpha", r"\vec", r"\epsilon", r"\text", r"\neq"),
        *(r"\rho", r"\_", r"\Nabla", r"\Lambda", r"\Phi", r"\0", r"\sqrt", r"\("),
        *(r"\uparrow", r"\xi"),
    ],
)
def test_yaml_reads_escapes_in_double_quotes(tmp_path, command):
    single = f"data: {{instruction: 'Use {command}{{}}.'}}"
    instruction = f"Use {command}{{}}."
    assert load_yaml(tmp_path, single).data.instruction == instruction
    double = single.replace("'", '"')
    twice = double.replace("\\", "\\\\")
    assert load_yaml(tmp_path, twice).data.instruction == instruction
    plain = f"data:\n  instruction: Use {command}{{}}."
    assert load_yaml(tmp_path, plain).data.instruction == instruction
    with pytest.raises(UserError) as error:
        load_yaml(tmp_path, f"# a comment\n{double}")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'some.yaml'} line 4")
    assert f"write \\{command}" in message and "\n" not in message


def test_yaml_keeps_other_escapes(tmp_path):
    text = r'data: {instruction: "Think.\n\tThen \"answer\", \u00e9\xe9\\\/.\r\n"}'
    instruction = load_yaml(tmp_path, text).data.instruction
    assert instruction == 'Think.\n\tThen "answer", éé\\/.\r\n'


def test_an_instruction_from_the_shell(tmp_path):
    right = load_yaml(tmp_path, "", "--data.instruction", r"Use \boxed{}.")
    assert right.data.instruction == r"Use \boxed{}."
    with pytest.raises(UserError, match=r"data\.instruction holds a backspace"):
        load_yaml(tmp_path, "", "--data.instruction", "Use \boxed{}.")


@pytest.mark.parametrize("instruction", ["no-break\xa0space", "a\u2028b", r"\boxed{}"])
def test_a_recorded_configuration_can_be_given_again(tmp_path, instruction):
    config = load_yaml(tmp_path, "", "--data.instruction", instruction)
    record_config(config, tmp_path / "run")
    argv = ["--config", str(tmp_path / "run" / "config.yaml")]
    assert load_config(GRPOConfig, argv, "train")[0] == config


def test_a_text_inserted_before_the_end_of_thinking():
    assert SamplingParams(end_of_thinking_text=r"so \boxed{").top_k == 0
    with pytest.raises(UserError, match="end_of_thinking_text holds a backspace"):
        SamplingParams(end_of_thinking_text="so \boxed{")


# Numbers, keys and files that are given twice, and messages that stay short.


def refusal_of(tmp_path, text: str, *flags: str) -> str:
    (tmp_path / "run.yaml").write_text(text)
    argv = ["--config", str(tmp_path / "run.yaml"), *flags]
    with pytest.raises(UserError) as error:
        load_config(GRPOConfig, argv, "train")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    return str(error.value)


WHOLE = [
    *("steps", "rollout.prompts", "rollout.samples", "rollout.slots"),
    *("update.epochs", "checkpoint.every", "checkpoint.keep", "validation.limit"),
    *("validation.every", "optimizer.warmup_steps"),
]
REAL = [
    *("loss.kl_coef", "loss.clip_high", "loss.max_ratio", "optimizer.learning_rate"),
    *("optimizer.weight_decay", "rollout.temperature", "validation.top_p"),
]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("digits", [25, 400, 5000])
def test_whole_numbers_that_no_device_can_count(tmp_path, name, digits):
    number = "1" + "0" * digits
    said = refusal_of(tmp_path, "model: nano\nsteps: 4\n", f"--{name}", number)
    assert name.rpartition(".")[2] in said


@pytest.mark.parametrize("name", REAL)
def test_numbers_beyond_every_float(tmp_path, name):
    section, _, key = name.rpartition(".")
    number = "1" + "0" * 400
    base = "model: nano\nsteps: 4\n"
    assert f"--{name}" in refusal_of(tmp_path, base, f"--{name}={number}")
    said = refusal_of(tmp_path, f"{base}{section}:\n  {key}: {number}\n")
    assert f"run.yaml: {name}" in said


@pytest.mark.parametrize("digits", [25, 400, 5000])
def test_endless_numbers_in_yaml(tmp_path, digits):
    refusal_of(tmp_path, f"model: nano\nsteps: 1{'0' * digits}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: nano\nsteps: 4\nsteps: 5\n",
            "line 3: steps is set a second time, .* 2;",
        ),
        (
            "model: nano\nsteps: 4\ndata:\n  problems: a\n  problems: b\n",
            "line 5: probl",
        ),
        ("model: nano\nsteps: 4\ncheckpoint: {every: 1, every: 2}\n", "line 3: every"),
        ("model: nano\nsteps: 4\n'steps': 5\n", "line 3: steps"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, text, message):
    assert re.search(message, refusal_of(tmp_path, text))


def test_keys_may_be_the_same_in_different_sections(tmp_path):
    text = "model: nano\nsteps: 4\ncheckpoint: {every: 3}\nvalidation: {every: 3}\n"
    (tmp_path / "run.yaml").write_text(text)
    argv = ["--config", str(tmp_path / "run.yaml")]
    config, _ = load_config(GRPOConfig, argv, "train")
    assert config.checkpoint.every == config.validation.every == 3


def test_two_configurations_are_refused(tmp_path):
    text = "model: nano\nsteps: 4\n"
    for second in (["--config", "b.yaml"], ["--config=b.yaml"]):
        said = refusal_of(tmp_path, text, *second)
        assert said.startswith("--config is given twice")
        with pytest.raises(UserError, match="--config is given twice"):
            check_one_config(["--config", "a.yaml", *second])


def test_json_with_a_key_twice_is_refused():
    with pytest.raises(
        UserError, match=r"line 7 is not JSON .the key 'n' is there twice"
    ):
        parse_json('{"n": 1, "m": {"n": 3}, "n": 2}', "f.jsonl", 7)
    assert parse_json('{"n": {"n": 1}}', "f.jsonl") == {"n": {"n": 1}}


def test_values_in_messages_are_short():
    assert shown("x" * 10**6).startswith("'xxxx") and len(shown("x" * 10**6)) < 120
    assert shown(-(10**5000)) == "a number of 5000 digits"
    assert shown(12345) == "12345"
    assert (
        shown("some/model-name_of-30-characters")
        == "'some/model-name_of-30-characters'"
    )
    assert len(shown([["x" * 100] * 100] * 100)) < 5000
    text = str(UserError(f"beginning {'x' * 10**6} end"))
    assert len(text) < 1600
    assert text.startswith("beginning ") and text.endswith(" end")
