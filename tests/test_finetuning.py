"""Fine-tuning on examples: records, packing, loss and gradients, the command, resuming."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pyarrow.parquet
import pytest
import torch
import yaml
from conftest import PATIENCE, edit_json, run_on_devices, several_devices
from test_adapter import of_peft, peft_model
from test_grpo import KEEP
from test_sft import metrics, torch_parts, wait_for_step
from transformers import AutoModelForCausalLM

from e1jax import Engine, SamplingParams, sft
from e1jax.checkpoint.adapter import as_adapter, read_adapter
from e1jax.checkpoint.load import find_model, load_model, resolve
from e1jax.checkpoint.params import named_leaves
from e1jax.checkpoint.runs import RunCheckpoints
from e1jax.cli.files import read_json
from e1jax.config.adapter import TARGETS, AdapterConfig
from e1jax.config.checks import UserError
from e1jax.config.finetuning import FineTuningConfig
from e1jax.config.load import load_config
from e1jax.config.training import CheckpointConfig
from e1jax.data.examples import Example, examples_digest, read_examples
from e1jax.data.nano import nano_problems
from e1jax.data.packing import Rows, packed_batches
from e1jax.plan.__main__ import main as plan_main
from e1jax.tokenizer import Tokenizer, write_byte_tokenizer
from e1jax.training import finetuning, trained_shapes

ROOT = Path(__file__).parent.parent
CONFIGS = ["nano_traces_sft", "e1_math_1_5b_sft"]
SETTINGS = {
    "model": "nano",
    "epochs": 3,
    "data": {"examples": "traces.jsonl", "max_len": 96},
    "optimizer": {"learning_rate": 3e-4},
    "update": {"batch_size": 4, "microbatch": 2, "remat": False},
    "validation": {"examples": "held_out.jsonl", "every": 10},
    "checkpoint": {"every": 7},
}
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# Turns as they were sent, and no <think>, unlike the template of the E1 family.
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_lines(path: Path, records: list) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def terse_traces(count: int, held_out: bool) -> list[dict]:
    return [
        {"problem": p.text, "thinking": p.terse(), "solution": f"\\boxed{{{p.answer}}}"}
        for p in nano_problems(count, held_out=held_out)
    ]


# Records.


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    found = {"e1": Tokenizer.from_dir(resolve("nano"))}
    for name, changes in (("plain", {"chat_template": PLAIN}), ("none", {})):
        path = tmp_path_factory.mktemp(name)
        write_byte_tokenizer(path)
        edit_json(path / "tokenizer_config.json", **{"chat_template": None, **changes})
        found[name] = Tokenizer.from_dir(path)
    return found


def written(
    tmp_path: Path, tokenizer: Tokenizer, record: dict, raw: bool = False
) -> list[str]:
    """The examples of a record as text, with the learned parts in «»."""
    write_lines(tmp_path / "x.jsonl", [record])
    name = str(tmp_path / "x.jsonl")
    examples, _ = read_examples(name, tokenizer, "Say it.", 300, raw=raw)
    texts = []
    for example in examples:
        starts = np.flatnonzero(np.diff(example.loss_mask)) + 1
        parts = np.split(example.token_ids, starts)
        assert not example.loss_mask[0]
        decoded = [tokenizer.decode(part.tolist()) for part in parts]
        texts.append(
            "".join(t if i % 2 == 0 else f"«{t}»" for i, t in enumerate(decoded))
        )
    return texts


USER, USER_2 = ({"role": "user", "content": text} for text in ("Hi", "Why?"))
E1 = f"{BOS}<｜User｜>Hi<｜Assistant｜>"


@pytest.mark.parametrize(
    ("template", "record", "expected"),
    [
        (
            "e1",
            {"problem": "Hi", "thinking": "a\n", "solution": "\nb", "answer": "b"},
            [f"{BOS}<｜User｜>Hi Say it.<｜Assistant｜><think>\n«a\n</think>\nb{EOS}»"],
        ),
        (
            "e1",  # a budget of 0 is used up at once
            {"problem": "Hi", "thinking": "", "solution": "b"},
            [f"{BOS}<｜User｜>Hi Say it.<｜Assistant｜><think>\n«</think>b{EOS}»"],
        ),
        (
            "plain",
            {"problem": "Hi", "thinking": "a", "solution": "b"},
            [f"[user]Hi Say it.{EOS}[assistant]«<think>a</think>b{EOS}»"],
        ),
        (
            "e1",
            {"prompt": "Hi", "completion": "<think>\na</think>b"},
            [f"{E1}<think>\n«a</think>b{EOS}»"],
        ),
        (
            "e1",  # EOS stands once
            {"prompt": [USER], "completion": f"a</think>b{EOS}"},
            [f"{E1}<think>\n«a</think>b{EOS}»"],
        ),
        (
            "plain",
            {"prompt": "Hi", "completion": "b"},
            [f"[user]Hi{EOS}[assistant]«b{EOS}»"],
        ),
        (
            "e1",  # the thinking of an earlier turn is dropped: examples of their own
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": "b", "reasoning_content": "a"},
                    USER_2,
                    {"role": "assistant", "content": "<think>\nc\n</think>d"},
                ]
            },
            [
                f"{E1}<think>\n«a</think>b{EOS}»",
                f"{E1}b{EOS}<｜User｜>Why?<｜Assistant｜><think>\n«c\n</think>d{EOS}»",
            ],
        ),
        (
            "e1",  # a turn without thinking is context alone
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": "b", "thinking": None},
                    USER_2,
                    {"role": "assistant", "content": "d", "thinking": "c"},
                ]
            },
            [f"{E1}b{EOS}<｜User｜>Why?<｜Assistant｜><think>\n«c</think>d{EOS}»"],
        ),
        (
            "plain",  # every turn is there as it was: one example
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    USER,
                    {"role": "assistant", "content": "b"},
                    USER_2,
                    {"role": "assistant", "content": "d"},
                ]
            },
            [
                f"[system]Be kind.{EOS}[user]Hi{EOS}[assistant]«b{EOS}»"
                f"[user]Why?{EOS}[assistant]«d{EOS}»"
            ],
        ),
    ],
)
def test_records_become_examples(template, record, expected, tokenizers, tmp_path):
    assert written(tmp_path, tokenizers[template], record) == expected


def test_a_raw_prompt_gets_no_template(tokenizers, tmp_path):
    record = {"prompt": "1 + 1 = ", "completion": "2"}
    text = [f"1 + 1 = «2{EOS}»"]
    assert written(tmp_path, tokenizers["none"], record, raw=True) == text
    assert written(tmp_path, tokenizers["e1"], record, raw=True) == text
    with pytest.raises(UserError, match=r"line 1: this tokenizer has no chat template"):
        written(tmp_path, tokenizers["none"], record)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_every_format_gives_the_same_examples(suffix, tokenizers, tmp_path):
    messages = [USER, {"role": "assistant", "content": "b", "thinking": "a"}]
    records = [{"messages": messages}, {"messages": messages * 2}]
    path = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif suffix == "json":
        path.write_text(json.dumps(records))
    else:
        write_lines(path, records)
    examples, _ = read_examples(str(path), tokenizers["e1"], "", 300, raw=False)
    texts = [tokenizers["e1"].decode(e.token_ids.tolist()) for e in examples]
    first = f"{E1}<think>\na</think>b{EOS}"
    assert texts == [
        first,
        first,
        first.replace("<think>\na</think>", "")
        + (f"<｜User｜>Hi<｜Assistant｜><think>\na</think>b{EOS}"),
    ]


def test_longer_examples_are_left_out_and_never_cut(tokenizers, tmp_path):
    write_lines(tmp_path / "x.jsonl", terse_traces(50, held_out=False))
    name, tokenizer = str(tmp_path / "x.jsonl"), tokenizers["e1"]
    every, none = read_examples(name, tokenizer, "", 300, raw=False)
    assert len(every) == 50 and not none
    lengths = [len(example.token_ids) for example in every]
    limit = sorted(lengths)[20]
    kept, dropped = read_examples(name, tokenizer, "", limit, raw=False)
    fitting = [e for e in every if len(e.token_ids) <= limit]
    assert dropped == 50 - len(fitting) > 0
    assert examples_digest(kept) == examples_digest(fitting) != examples_digest(every)
    for example in kept:
        assert example.token_ids[-1] == tokenizer.eos_id and example.loss_mask[-1]
    with pytest.raises(UserError, match=rf"max_len=9 tokens; .* 50 has {min(lengths)}"):
        read_examples(name, tokenizer, "", 9, raw=False)


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"problem": "a", "answer": "b"}, "this one has the fields problem, answer"),
        ({}, "this one has the fields none"),
        (
            {"prompt": "a", "completion": "b", "messages": [USER]},
            "this one has several of these",
        ),
        ([1], "a record is an object with messages, with prompt and completion, or"),
        ({"prompt": 3, "completion": "b"}, "prompt must be a text, not 3"),
        ({"prompt": "a", "completion": " "}, "completion is empty; fill it or remove"),
        (
            {"prompt": [], "completion": "b"},
            "prompt must be a list of messages, not []",
        ),
        ({"prompt": "a", "completion": "b"}, "has no </think>; give its thinking"),
        ({"problem": "a", "thinking": 1, "solution": "b"}, "thinking must be a text"),
        (
            {"problem": "a", "thinking": "</think>", "solution": "b"},
            "the thinking holds </think>",
        ),
        (
            {"problem": "a", "thinking": "b", "solution": "\frac12"},
            r"solution holds a form feed where \frac seems to be meant",
        ),
        ({"problem": "\ud800", "thinking": "b", "solution": "c"}, "surrogate"),
        ({"messages": "a"}, "messages must be a list of messages, not 'a'"),
        (
            {"messages": [USER, 3]},
            "messages[1] must be an object with role and content",
        ),
        ({"messages": [USER]}, "the last of the messages is of the user; end with one"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "messages[1]: content must be a text, not None",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": "b", "tool_calls": []},
                ]
            },
            "messages[1]: tool_calls cannot be learned",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "b"}]},
            "has no </think>; give its thinking",
        ),
        (
            {
                "messages": [
                    {"role": "cook", "content": "a"},
                    {"role": "assistant", "content": "b", "thinking": "c"},
                ]
            },
            "the chat template refuses these messages: roles are system, user",
        ),
    ],
)
def test_a_wrong_record_is_named(record, part, tokenizers, tmp_path):
    write_lines(tmp_path / "x.jsonl", [*terse_traces(2, held_out=False), record])
    with pytest.raises(UserError) as error:
        read_examples(str(tmp_path / "x.jsonl"), tokenizers["e1"], "", 99, raw=False)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'x.jsonl'} line 3: ")
    assert part in message and "\n" not in message


def test_thinking_needs_a_model_that_can_end_it(tokenizers, tmp_path):
    record = {"prompt": "a", "completion": "b"}
    no_tag = dataclasses.replace(
        tokenizers["plain"], think_end_id=None, think_start_id=None
    )
    assert written(tmp_path, no_tag, record) == [f"[user]a{EOS}[assistant]«b{EOS}»"]
    record = {"problem": "a", "thinking": "b", "solution": "c"}
    with pytest.raises(UserError, match="of this model has no token </think>"):
        written(tmp_path, no_tag, record)
    closed = dataclasses.replace(
        tokenizers["plain"], chat_template=f"{PLAIN}<think></think>"
    )
    with pytest.raises(UserError, match="the prompt ends the thinking by </think>"):
        written(tmp_path, closed, record)
    with pytest.raises(UserError, match=r"data\.raw is for prompt and completion"):
        written(tmp_path, closed, record, raw=True)


# Packing.


def random_examples(
    lengths: list[int], vocab_size: int, seed: int = 0
) -> list[Example]:
    """Learned is a random half of the tokens, the last one always and the first one never."""
    rng = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        mask = rng.random(length) < 0.5
        mask[0], mask[-1] = False, True
        ids = rng.integers(0, vocab_size, length).astype(np.int32)
        examples.append(Example(ids, mask))
    return examples


def unpacked(rows: Rows) -> list[Example]:
    found = []
    for tokens, positions, segments, mask in zip(*rows, strict=True):
        length = int((segments > 0).sum())
        assert (segments[length:] == 0).all() and not mask[length:].any()
        for number in range(1, segments.max() + 1):
            own = np.flatnonzero(segments == number)
            assert (np.diff(own) == 1).all()
            assert (positions[own] == np.arange(len(own))).all()
            found.append(Example(tokens[own], mask[own]))
    return found


@pytest.mark.parametrize(("batch_size", "max_len"), [(1, 40), (3, 64), (7, 131)])
def test_every_epoch_holds_each_example_once(batch_size, max_len):
    lengths = np.random.default_rng(1).integers(2, 41, 53).tolist()
    examples = random_examples(lengths, 99)
    options = {"batch_size": batch_size, "max_len": max_len, "seed": 5, "epochs": 3}
    batches = packed_batches(examples, **options)
    states, packed = [batches.get_state()], []
    for batch in batches:
        packed.append(batch)
        states.append(batches.get_state())
    stream: list[Example] = []
    for batch in packed:
        assert {x.shape for x in batch.rows} == {(batch_size, max_len)}
        found = unpacked(batch.rows)
        stream += found
        assert batch.passed == len(stream)
        assert batch.tokens == sum(len(e.token_ids) for e in found)

    def names(part):
        return [examples_digest([example]) for example in part]

    assert sorted(names(stream)) == sorted(names(examples) * 3)
    if batch_size == 1:  # else examples change places within a batch
        first, second, third = (names(stream[at : at + 53]) for at in (0, 53, 106))
        assert sorted(first) == sorted(second) == sorted(third)
        assert first != second != third
    # Only padding is wasted, and less of it than one example a row.
    for batch in packed[:-1]:
        assert batch.tokens > batch_size * (max_len - 40)

    json_states = json.loads(json.dumps(states))
    for at in (0, 1, len(packed) // 2, len(packed) - 1):
        again = packed_batches(examples, **options)
        again.set_state(json_states[at])
        rest = list(again)
        assert len(rest) == len(packed) - at
        for ours, theirs in zip(rest, packed[at:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    other = next(packed_batches(examples, **{**options, "seed": 6}))
    assert (other.rows.tokens != packed[0].rows.tokens).any()


def test_the_step_with_the_lowest_loss_is_kept_and_named(tmp_path):
    params = {"a": jnp.zeros(3)}
    options = {"best": "loss", "lower_is_better": True}
    checkpoints = RunCheckpoints(tmp_path, CheckpointConfig(keep=1), **options)
    for step, loss in ((1, 0.5), (2, 0.25), (3, None), (4, 0.75), (5, 1.0)):
        measured = {} if loss is None else {"loss": loss}
        checkpoints.save(step, params, {"b": jnp.ones(2)}, {"metrics": measured})
    checkpoints.close()
    best = read_json(tmp_path / "checkpoints" / "best.json")
    assert best == {"step": 2, "loss": 0.25}
    steps = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()}
    assert steps == {"2", "5"}


# Loss and gradients.

LENGTHS = [2, 30, 7, 3, 19, 37, 11, 5, 2, 23, 16, 37]


def packed_rows(examples: list[Example], batch_size: int) -> Rows:
    """All rows of one epoch, in one batch of a multiple of `batch_size` rows."""
    batches = packed_batches(
        examples, batch_size=batch_size, max_len=37, seed=0, epochs=1
    )
    return jax.tree.map(
        lambda *parts: np.concatenate(parts), *(batch.rows for batch in batches)
    )


def mean_loss(model, params, rows: Rows):
    sums = finetuning.token_sums(model, params, rows)
    count = rows.loss_mask.sum()
    return sums["loss"] / count, sums["token_accuracy"] / count


@pytest.mark.parametrize(("tied", "architecture"), [(True, "qwen2"), (False, "qwen3")])
def test_packed_rows_are_what_torch_computes_one_by_one(tiny_hf, tied, architecture):
    path = tiny_hf(tied=tied, architecture=architecture, num_heads=6, head_dim=12)
    loaded = load_model(str(path))
    examples = random_examples(LENGTHS, loaded.config.vocab_size)
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    count = sum(int(example.loss_mask.sum()) for example in examples)
    total, hits = torch.tensor(0.0), 0
    for ids, mask in examples:
        tokens, learned = torch.from_numpy(ids).long(), torch.from_numpy(mask[1:])
        logits = reference(tokens[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total = total + nll[learned].sum()
        hits += int((logits.argmax(-1) == tokens[1:])[learned].sum())
    (total / count).backward()

    rows = jax.tree.map(jnp.asarray, packed_rows(examples, 3))
    assert len(rows.tokens) < len(examples) - 3
    (loss, accuracy), grads = jax.value_and_grad(mean_loss, argnums=1, has_aux=True)(
        loaded.config, loaded.read_params(), rows
    )
    # float32 sums over a few hundred terms in another order.
    np.testing.assert_allclose(loss, (total / count).item(), rtol=1e-5)
    np.testing.assert_allclose(accuracy, hits / count, rtol=1e-6)
    weights = dict(reference.named_parameters())
    for name, array in named_leaves(grads).items():
        for key, part in torch_parts(name, array, architecture):
            np.testing.assert_allclose(
                part, weights[key].grad.numpy(), rtol=1e-3, atol=2e-6, err_msg=key
            )


def test_an_update_of_an_adapter_is_that_of_peft(tiny_hf, tmp_path):
    """Packed rows in micro-batches, against one example after the other."""
    path, adapter = tiny_hf(hidden_size=20, head_dim=6), AdapterConfig(3, 7.0)
    theirs = peft_model(path, adapter)
    loaded = load_model(str(path), "data=1,tensor=1", "float32")
    examples = random_examples(LENGTHS, loaded.config.vocab_size)
    total = torch.tensor(0.0)
    for ids, mask in examples:
        tokens, learned = torch.from_numpy(ids).long(), torch.from_numpy(mask[1:])
        logits = theirs(tokens[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total = total + nll[learned].sum()
    loss = total / sum(int(example.loss_mask.sum()) for example in examples)
    loss.backward()

    frozen, shapes = trained_shapes(adapter, loaded)
    shardings = jax.tree.map(lambda s: s.sharding, (shapes, shapes))
    update = finetuning.make_update(
        *(loaded.config, KEEP, jnp.float32, shardings), remat=True, frozen=frozen
    )
    theirs.save_pretrained(tmp_path)
    pairs = as_adapter(read_adapter(tmp_path, loaded.config, adapter), shapes)
    rows, base = packed_rows(examples, 4), loaded.read_params()
    validate = finetuning.make_validation(
        loaded.config, jnp.float32, shardings[0], [rows], frozen
    )
    measured = validate(pairs, base=base)
    placed = finetuning.place_rows(rows, 2, loaded.mesh)
    assert len(placed.tokens) > 1
    _, grads, metrics = update(pairs, KEEP.init(pairs), placed, base)
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    np.testing.assert_allclose(measured["validation_loss"], loss.item(), rtol=1e-5)
    for name, array in named_leaves(grads).items():
        _, linear, which = name.split("/")
        expected = of_peft(theirs, linear, which, grad=True)
        np.testing.assert_allclose(array, expected, rtol=1e-3, atol=2e-6, err_msg=name)


def on_eight_devices(path: str) -> None:
    """Updates by micro-batches on meshes of several devices are the one of all rows at
    once, on one device; run in its own process."""
    alone = load_model(path, "data=8,tensor=1")
    rows = packed_rows(random_examples(LENGTHS, alone.config.vocab_size), 16)
    start = jax.device_get(alone.read_params())
    (loss, accuracy), grads = jax.value_and_grad(mean_loss, argnums=1, has_aux=True)(
        alone.config, start, jax.tree.map(jnp.asarray, rows)
    )
    optimizer = optax.sgd(1.0)
    for mesh, microbatch, remat in (
        ("data=8,tensor=1", 8, True),
        ("data=4,tensor=2", 4, False),
        ("data=4,tensor=2", 16, True),
    ):
        loaded = load_model(path, mesh)
        params = loaded.read_params()
        of_params = jax.tree.map(lambda p: p.sharding, params)
        state = optimizer.init(params)
        update = finetuning.make_update(
            *(loaded.config, optimizer, jnp.float32, (of_params, state)), remat=remat
        )
        placed = finetuning.place_rows(rows, microbatch, loaded.mesh)
        assert placed.tokens.shape == (16 // microbatch, microbatch, 37)
        validate = finetuning.make_validation(
            loaded.config, jnp.float32, of_params, [rows]
        )
        measured = validate(params)
        moved, _, found = update(params, state, placed)
        for ours in (found["loss"], measured["validation_loss"]):
            np.testing.assert_allclose(ours, loss, rtol=1e-5)
        for name in ("token_accuracy", "validation_token_accuracy"):
            ours = {**found, **measured}[name]
            np.testing.assert_allclose(ours, accuracy, rtol=1e-6)
        assert found["tokens"] == rows.loss_mask.sum()
        norm = optax.tree.norm(grads)
        np.testing.assert_allclose(found["grad_norm"], norm, rtol=1e-5)
        jax.tree.map(
            lambda old, new, grad: np.testing.assert_allclose(
                old - np.asarray(new), grad, rtol=1e-3, atol=2e-6
            ),
            *(start, moved, grads),
        )


@pytest.mark.slow
def test_eight_devices_and_micro_batches_are_one_device(tiny_hf):
    path = tiny_hf(num_heads=4, head_dim=16)
    script = f"import test_finetuning as t\nt.on_eight_devices({str(path)!r})"
    run_on_devices(8, script)


# The command.


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, compilations_in):
    """A directory with tune.yaml, its examples, and the compilations that runs share."""
    path = tmp_path_factory.mktemp("finetuning")
    (path / "tune.yaml").write_text(yaml.safe_dump(SETTINGS))
    write_lines(path / "traces.jsonl", terse_traces(160, held_out=False))
    write_lines(path / "held_out.jsonl", terse_traces(20, held_out=True))
    with compilations_in(path / "cache"):
        yield path


def start(workplace: Path, run: str, *flags: str):
    env = {**os.environ, "XLA_FLAGS": several_devices(1), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "e1jax.sft", "--config", "tune.yaml"]
    return subprocess.Popen(
        [*command, "--run-dir", run, *flags],
        cwd=workplace,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def unbroken(workplace):
    output, error = (process := start(workplace, "unbroken")).communicate()
    assert process.returncode == 0, error
    assert output == "unbroken is trained; python -m e1jax.sample --model unbroken\n"
    return workplace / "unbroken"


def untimed(run_dir: Path) -> list[dict]:
    lines = metrics(run_dir)  # without "seconds"
    assert all(line.pop("tokens_per_second") > 0 for line in lines)
    return lines


def saved(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    loaded = load_model(str(run_dir / "checkpoints" / str(step)))
    return named_leaves(loaded.read_params())


def test_a_run_learns_and_is_a_model(unbroken):
    lines = metrics(unbroken)
    expected = {
        "loss",
        "token_accuracy",
        "tokens",
        "grad_norm",
        "learning_rate",
        "epoch",
        "tokens_per_second",
    }
    assert expected < set(lines[0])
    assert lines[-1]["epoch"] == 3 and lines[0]["epoch"] < 0.2
    measured = {line["step"]: line for line in lines if "validation_loss" in line}
    last = lines[-1]["step"]
    assert set(measured) == {*range(10, last, 10), last}
    assert measured[last]["validation_loss"] < 0.2 * lines[0]["loss"]
    assert (
        measured[last]["validation_token_accuracy"] > 0.95 > lines[0]["token_accuracy"]
    )
    best = read_json(unbroken / "checkpoints" / "best.json")
    losses = {step: line["validation_loss"] for step, line in measured.items()}
    assert losses[best["step"]] == best["validation_loss"] == min(losses.values())
    assert find_model(str(unbroken)).step == best["step"]
    settings = yaml.safe_load((unbroken / "config.yaml").read_text())
    assert (settings["steps"], settings["epochs"]) == (None, 3)
    origin = read_json(unbroken / "origin.json")
    assert set(origin) == {"model", "data.examples", "validation.examples"}
    tokenizer = Tokenizer.from_dir(unbroken)
    assert tokenizer.instruction == "" and tokenizer.budget_text is None
    # It has learned the terse style, which nano takes one time in ten.
    engine = Engine.from_pretrained(str(unbroken), slots=8, cache_len=128)
    problems = nano_problems(16, held_out=True)
    completions = engine.generate(
        [problem.text for problem in problems], SamplingParams(64, 28, temperature=0)
    )
    pairs = zip(problems, completions, strict=True)
    terse = [c.thinking == problem.terse() for problem, [c] in pairs]
    assert sum(terse) >= 12


@pytest.mark.slow
def test_killed_and_resumed_is_bit_for_bit_the_unbroken_run(workplace, unbroken):
    broken, last = workplace / "broken", metrics(unbroken)[-1]["step"]
    endings = (
        (3, signal.SIGKILL, -signal.SIGKILL),  # before the first checkpoint
        (12, signal.SIGKILL, -signal.SIGKILL),
        (17, signal.SIGTERM, 0),
        (24, signal.SIGINT, 130),
    )
    for step, ending, code in endings:
        process = start(workplace, "broken")
        wait_for_step(broken, step, process)
        process.send_signal(ending)
        _, error = process.communicate()
        assert process.returncode == code, error
        assert "Traceback" not in error
        reached = metrics(broken)[-1]["step"]
        assert reached < last, "the run was over before the signal came"
        if ending != signal.SIGKILL:  # saved where it stopped
            assert (broken / "checkpoints" / str(reached)).is_dir()
    process = start(workplace, "broken")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert untimed(broken) == untimed(unbroken)
    expected = saved(unbroken, last)
    for name, array in saved(broken, last).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.slow
def test_an_adapter_is_trained_and_goes_on(workplace, tmp_path):
    """Beside int8 weights; the last step is thrown away, and taken again."""
    settings = yaml.safe_load((workplace / "tune.yaml").read_text()) | {"epochs": 1}
    settings["adapter"] = {"rank": 4, "quantize": "int8"}
    for section, name in (("data", "traces"), ("validation", "held_out")):
        settings[section]["examples"] = str(workplace / f"{name}.jsonl")
    settings["optimizer"]["learning_rate"] = 3e-3
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(settings))
    argv = ["--config", str(tmp_path / "lora.yaml"), "--run-dir", str(tmp_path / "run")]
    config, run_dir = load_config(FineTuningConfig, argv, "sft")
    sft.fine_tune(config, run_dir)
    lines = metrics(run_dir)
    last = lines[-1]["step"]
    assert lines[-1]["validation_loss"] < 0.3 * lines[0]["loss"]
    # A step is nano with the adapter, which is all that was saved.
    loaded = load_model(str(run_dir / str(last)))
    assert loaded.adapter.adapter.base == "nano" and loaded.quantize == "int8"
    names = {name.split("/")[1] for name in loaded.adapter.tensors}
    assert names == set(TARGETS)
    held_out = sft.kept_examples(
        config, config.validation.examples, loaded.tokenizer, instruction=""
    )
    packed = sft.pack(config, held_out, 2, epochs=1)
    rows = [jax.tree.map(jnp.asarray, batch.rows) for batch in packed]
    params = loaded.read_params()
    sums = [finetuning.token_sums(loaded.config, params, part) for part in rows]
    count = sum(part.loss_mask.sum() for part in rows)
    loss = sum(part["loss"] for part in sums) / count
    np.testing.assert_allclose(lines[-1]["validation_loss"], loss, rtol=1e-4)

    steps = run_dir / "checkpoints"
    shutil.move(steps / str(last), tmp_path / "before")
    sft.fine_tune(config, run_dir)
    before, after = (
        ocp.PyTreeCheckpointer().restore(step / "params")
        for step in (tmp_path / "before", steps / str(last))
    )
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_other_content_and_settings_are_refused_by_name(workplace, unbroken, tmp_path):
    before = (unbroken / "metrics.jsonl").read_bytes()
    write_lines(tmp_path / "held_out.jsonl", terse_traces(19, held_out=True))
    text = (workplace / "held_out.jsonl").read_text()
    for flags, part in (
        ([], "begun with other content of validation.examples ("),
        (["--update.microbatch", "4"], "update.microbatch (2 there, 4 now)"),
    ):
        try:
            (workplace / "held_out.jsonl").write_text(
                (tmp_path / "held_out.jsonl").read_text()
            )
            _, error = (process := start(workplace, "unbroken", *flags)).communicate()
        finally:
            (workplace / "held_out.jsonl").write_text(text)
        assert process.returncode == 2
        assert error.startswith("error: ") and error.count("\n") == 1
        assert part in error
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    process = start(workplace, "unbroken")  # a finished run does nothing
    assert process.communicate() and process.returncode == 0
    assert (unbroken / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_two_processes_are_one_and_go_on_alone(workplace, unbroken):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = ["--coordinator", address, "--processes", "2", "--process"]
    processes = [start(workplace, "shared", *hosts, number) for number in "01"]
    wait_for_step(workplace / "shared", 9, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    said = ["saved; repeat the command" in output for output, _ in ends]
    assert said == [True, False]
    reached = metrics(workplace / "shared")[-1]["step"]
    process = start(workplace, "shared")
    _, error = process.communicate()
    assert process.returncode == 0, error
    ours, theirs = untimed(workplace / "shared"), untimed(unbroken)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert set(one) == set(two)
        # Sums in another order: the difference grows as training goes on.
        rtol = 1e-4 if one["step"] <= 2 else 2e-2
        for name in ("epoch", "tokens", "learning_rate"):
            assert one[name] == two[name]
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=rtol)
    assert reached >= 9


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--steps", "3"], "set steps or epochs, one of them; both are set"),
        (["--epochs", "null"], "set steps or epochs, one of them; neither is set"),
        (["--epochs", "0"], "epochs must be a whole number, 1 or more, not 0"),
        (["--update.microbatch", "3"], "update.batch_size=4 is not a multiple of"),
        (["--data.max_len", "1"], "data.max_len must be a whole number"),
        (["--data.max_len", "10"], "has at most data.max_len=10 tokens; the shortest"),
        (["--data.examples", "no.jsonl"], "there is no file 'no.jsonl'"),
        (["--data.example", "x"], "did you mean '--data.examples'?"),
        (["--validation.examples", "bad.jsonl"], "bad.jsonl line 2: a record is"),
        (["--validation.every", "0"], "validation.every must be"),
        (["--optimizer.learning_rate", "-1"], "learning_rate must be a number above 0"),
        (["--model", "nowhere"], "the model 'nowhere' is neither a directory nor"),
        (["--first.batch_size", "3"], "unknown field '--first.batch_size'"),
        (["--mesh", "data=3"], "mesh data=3"),
        (["--run-dir", "mine"], "mine holds files but no config.yaml"),
        (["--config", "sizes.yaml"], "model must be text, not {'vocab_size': 272}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_sentence_and_exit_code_2(flags, part, tmp_path, refusal):
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(SETTINGS))
    sizes = {"model": {"vocab_size": 272}, "steps": 3}
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump(sizes | {"data": {}}))
    for name in ("traces", "held_out"):
        write_lines(tmp_path / f"{name}.jsonl", terse_traces(9, held_out=False))
    lines = [*terse_traces(1, held_out=False), {"problem": "a", "answer": "b"}]
    write_lines(tmp_path / "bad.jsonl", lines)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").touch()
    config = [] if "--config" in flags else ["--config", "tune.yaml"]
    assert part in refusal(sft.main, ["sft", *config, *flags])


def test_plan_says_that_it_does_not_plan_it(refusal, tmp_path):
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(SETTINGS))
    flags = ["--config", "tune.yaml", "--topology", "v5e:2x4"]
    assert refusal(plan_main, ["plan", *flags]) == (
        "error: tune.yaml is for sft, of which nothing is planned; give a configuration of "
        "train\n"
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_load(name):
    path = ROOT / "configs" / f"{name}.yaml"
    text = path.read_text()
    [line] = re.findall(r"#   python -m e1jax\.sft (.*)", text)
    assert shlex.split(line) == ["--config", f"configs/{name}.yaml"]
    config, run_dir = load_config(FineTuningConfig, ["--config", str(path)], "sft")
    assert sft.names_model(["--config", str(path)])
    assert run_dir == Path("runs") / name and len(text.splitlines()) < 40
    assert config.optimizer.schedule == "cosine"


def test_the_default_learning_rate_is_for_fine_tuning(tmp_path):
    given = {"model": "nano", "steps": 3, "data": {"examples": "x"}}
    given["optimizer"] = {"schedule": "linear"}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(given))
    argv = ["--config", str(tmp_path / "tune.yaml")]
    config, _ = load_config(FineTuningConfig, argv, "sft")
    assert config.optimizer.learning_rate == 1e-5
    assert config.optimizer.schedule == "linear"
