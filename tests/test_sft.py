"""Supervised fine-tuning: the command, its loss, its optimizer, and resuming."""

import dataclasses
import json
import os
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
import yaml
from conftest import several_devices
from transformers import Qwen2Config, Qwen2ForCausalLM

from e1jax import sft
from e1jax.checkpoint.params import load_params, named_leaves
from e1jax.checkpoint.runs import RunCheckpoints, abstract_state
from e1jax.cli.files import read_json
from e1jax.config.architectures import ARCHITECTURES
from e1jax.config.checks import UserError
from e1jax.config.load import load_config
from e1jax.config.model import ModelConfig
from e1jax.config.training import CheckpointConfig, MuonConfig, SFTConfig
from e1jax.data.nano import NanoProblem, nano_problems
from e1jax.nn.model import abstract_params, init_params
from e1jax.sharding.mesh import make_mesh, replicated
from e1jax.tokenizer import Tokenizer
from e1jax.training import make_optimizer

CONFIGS = Path(__file__).parent.parent / "configs"
MODEL = ModelConfig(
    vocab_size=272,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position_embeddings=4096,
    rope_theta=1e4,
    tie_word_embeddings=True,
)
TINY = {
    "steps": 60,
    "model": dataclasses.asdict(MODEL),
    # Terse solutions fit into two padded lengths: little to compile.
    "first": {"batch_size": 4, "terse": 1.0},
    "second": {"batch_size": 4, "terse": 1.0},
    "checkpoint": {"every": 10},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, compilations_in):
    """A directory with tiny.yaml and the compilations that its runs share."""
    path = tmp_path_factory.mktemp("sft")
    (path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    with compilations_in(path / "cache"):
        yield path


@pytest.fixture(scope="module")
def unbroken(workplace):
    process = start(workplace, "unbroken")
    assert process.wait() == 0, process.stderr.read()
    return workplace / "unbroken"


@pytest.fixture
def mesh():
    return make_mesh("data=1,tensor=1", MODEL, jax.devices()[:1])


def start(workplace: Path, run: str, *flags: str, devices: int = 1):
    env = {
        **os.environ,
        "XLA_FLAGS": several_devices(devices),
        "JAX_PLATFORMS": "cpu",  # where libtpu is installed, JAX would look for a TPU
    }
    command = [sys.executable, "-m", "e1jax.sft", "--config", "tiny.yaml"]
    return subprocess.Popen(
        [*command, "--run-dir", run, *flags],
        cwd=workplace,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics(run_dir: Path, without: str = "seconds") -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return [{k: v for k, v in step.items() if k != without} for step in steps]


def saved_params(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint, by name."""
    one = make_mesh("data=1,tensor=1", MODEL, jax.devices()[:1])
    path = run_dir / "checkpoints" / str(step) / "params"
    return named_leaves(load_params(path, MODEL, one, np.float32))


@pytest.mark.slow
def test_killed_and_resumed_is_bit_for_bit_the_unbroken_run(workplace, unbroken):
    broken = workplace / "broken"
    endings = (
        (3, signal.SIGKILL, -signal.SIGKILL),  # before the first checkpoint
        (27, signal.SIGKILL, -signal.SIGKILL),
        (33, signal.SIGTERM, 0),
        (42, signal.SIGINT, 130),
    )
    for step, ending, code in endings:
        process = start(workplace, "broken")
        wait_for_step(broken, step, process)
        process.send_signal(ending)
        assert process.wait() == code, process.stderr.read()
        assert "Traceback" not in process.stderr.read()
        reached = metrics(broken)[-1]["step"]
        assert reached < TINY["steps"], "the run was over before the signal came"
        if ending != signal.SIGKILL:  # saved where it stopped
            assert (broken / "checkpoints" / str(reached)).is_dir()
    # A step that was being written, and a line that was: both are ignored.
    half = broken / "checkpoints" / "59.orbax-checkpoint-tmp" / "params"
    half.mkdir(parents=True)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 59, "lo')

    process = start(workplace, "broken")
    assert process.wait() == 0, process.stderr.read()
    assert [line["step"] for line in metrics(broken)] == list(range(1, 61))
    assert metrics(broken) == metrics(unbroken)
    expected = saved_params(unbroken, 60)
    for name, array in saved_params(broken, 60).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    steps = sorted(path.name for path in (broken / "checkpoints").iterdir())
    assert steps == ["50", "60"]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    path = run_dir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(process.stderr.read())


def test_a_finished_run_learns_and_is_a_model(unbroken):
    lines = metrics(unbroken)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert {"loss", "token_accuracy", "tokens", "grad_norm", "learning_rate"} < set(
        lines[0]
    )
    assert {"terse_accuracy", "verbose_accuracy"} < set(lines[-1])
    assert ModelConfig.from_hf(read_json(unbroken / "config.json")) == MODEL
    assert Tokenizer.from_dir(unbroken).think_end_id is not None
    assert read_json(unbroken / "tokenizer_config.json")["e1jax_instruction"] == ""
    assert yaml.safe_load((unbroken / "config.yaml").read_text())["steps"] == 60


def test_started_again_a_finished_run_does_nothing(workplace, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    process = start(workplace, "unbroken")
    assert process.wait() == 0
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_other_settings_are_refused_by_name(workplace, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    flags = ["--steps", "70", "--optimizer.learning_rate", "1e-3"]
    process = start(workplace, "unbroken", *flags)
    assert process.wait() == 2
    error = process.stderr.read()
    assert error.count("\n") == 1
    for part in ("steps (60 there, 70 now)", "optimizer.learning_rate (0.004 there"):
        assert part in error
    assert (unbroken / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_mesh_of_four_devices_computes_the_same(workplace, unbroken):
    meshed = workplace / "meshed"
    process = start(workplace, "meshed", "--mesh", "data=2,tensor=2", devices=4)
    wait_for_step(meshed, 10, process)
    process.kill()
    process.wait()
    # Sums in another order: the difference grows as training goes on.
    for step, rtol in ((1, 1e-5), (10, 1e-3)):
        ours, theirs = metrics(meshed)[step - 1], metrics(unbroken)[step - 1]
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol)


@pytest.mark.slow
def test_a_mesh_that_does_not_divide_is_told_of_or_refused(workplace):
    flags = ["--mesh", "data=3,tensor=1", "--steps", "1"]
    process = start(workplace, "three", *flags, devices=3)
    _, error = process.communicate()
    assert process.returncode == 2
    assert error == (
        "error: first.batch_size=4 is not a multiple of the mesh's data=3; change one of "
        "them\n"
    )
    assert not (workplace / "three").exists()
    flags += ["--first.batch_size", "3", "--second.batch_size", "6"]
    process = start(workplace, "three", *flags, devices=3)
    _, error = process.communicate()
    assert process.returncode == 0, error
    told = [line for line in error.splitlines() if "does not divide" in line]
    # 7 kernels, 2 layers of 2 * 16 * (24 + 12) + 3 * 16 * 24 numbers, and the embedding.
    excess = 4 * (2 * (2 * 16 * 36 + 3 * 16 * 24) + 272 * 16) * 2 / 3 / 2**20
    assert told == [
        "note: mesh data=3,tensor=1 does not divide hidden_size=16 and vocab_size=272, so "
        "every device keeps 8 arrays of parameters whole in that dimension, "
        f"{excess:.3g} MiB more than its share; on 2 devices, data=2,tensor=1 divides all"
    ]


def test_a_loss_that_is_not_finite_stops_and_names_the_step(workplace, tmp_path):
    muon = MuonConfig(learning_rate=1e30)
    config = SFTConfig(MODEL, steps=3, optimizer=muon, checkpoint=CheckpointConfig(1))
    with pytest.raises(UserError, match=r"^step 2: .* is nan; lower"):
        sft.train(config, tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [1]
    assert saved_params(tmp_path, 1)


def test_too_little_memory_for_an_update_is_one_sentence(
    workplace, tmp_path, monkeypatch
):
    def update(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

    monkeypatch.setattr(sft, "make_update", lambda *args: update)
    with pytest.raises(UserError, match=r"memory for an update; lower first\.batch_si"):
        sft.train(SFTConfig(MODEL, steps=3), tmp_path)


def test_loss_and_gradients_are_those_of_torch(mesh):
    params = init_params(MODEL, mesh, jnp.float32, 5)
    rng = np.random.default_rng(0)
    # Larger than at initialisation, so that every parameter matters to the loss.
    params = jax.tree.map(
        lambda p: p + rng.normal(0, 0.2, p.shape).astype(np.float32), params
    )
    tokens = rng.integers(0, 264, (3, 17)).astype(np.int32)
    mask = (rng.random((3, 17)) < 0.6).astype(np.float32)

    config = Qwen2Config(**{**MODEL.to_hf("float32"), "attn_implementation": "eager"})
    reference = Qwen2ForCausalLM(config)
    weights = dict(reference.named_parameters())
    ours = named_leaves(params)
    for name, array in ours.items():
        for key, part in torch_parts(name, array):
            weights[key].data = torch.from_numpy(part)
    logits = reference(torch.from_numpy(tokens).long()).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.from_numpy(tokens[:, 1:]).long(), reduction="none"
    )
    kept = torch.from_numpy(mask[:, 1:])
    expected = (nll * kept).sum() / kept.sum()
    expected.backward()

    (loss, aux), grads = jax.value_and_grad(sft.sft_loss, argnums=1, has_aux=True)(
        MODEL, params, jnp.asarray(tokens), jnp.asarray(mask)
    )
    # float32 sums over a few hundred terms in another order.
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    right = (logits.argmax(-1).numpy() == tokens[:, 1:]) & (mask[:, 1:] > 0)
    np.testing.assert_allclose(
        aux["token_accuracy"], right.sum() / mask[:, 1:].sum(), rtol=1e-6
    )
    assert aux["tokens"] == mask[:, 1:].sum()
    for name, array in named_leaves(grads).items():
        for key, part in torch_parts(name, array):
            np.testing.assert_allclose(
                part, weights[key].grad.numpy(), rtol=1e-3, atol=2e-6, err_msg=key
            )


def torch_parts(name: str, array: jax.Array, architecture: str = "qwen2"):
    """(Hugging Face name, array) of a parameter, one for each layer if it is stacked."""
    key, turned = ARCHITECTURES[architecture].tensors[name]
    stacked = np.array(array) if "{}" in key else np.array(array)[None]
    for layer, part in enumerate(stacked):
        yield key.format(layer), np.ascontiguousarray(part.T if turned else part)


def test_muon_treats_the_matrix_of_each_layer_on_its_own(mesh):
    params = init_params(MODEL, mesh, jnp.float32, 0)
    rng = np.random.default_rng(1)
    grads = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
    )
    config = MuonConfig(learning_rate=1.0, warmup=0, final=1, max_grad_norm=1e9)
    optimizer = make_optimizer(config, steps=1)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    for name, update in named_leaves(updates).items():
        gradient = np.array(named_leaves(grads)[name])
        if update.ndim == 3:
            for layer in range(MODEL.num_layers):
                expected = -newton_schulz(gradient[layer]) * 0.2
                expected *= max(update.shape[1:]) ** 0.5
                np.testing.assert_allclose(update[layer], expected, atol=1e-3)
        else:  # the first step of Adam, with Nesterov's correction, is about the sign
            np.testing.assert_allclose(
                np.abs(update), 1 + 0.9 * (0.1 / 0.19) - 0.0, rtol=0.5, err_msg=name
            )


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Muon's approximation of the nearest orthogonal matrix, in float64."""
    x = matrix.astype(np.float64) / np.linalg.norm(matrix)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if x.shape == matrix.shape else x.T


def test_a_style_is_accurate_if_every_token_but_the_choice_is(tmp_path, mesh):
    sft.prepare(SFTConfig(MODEL, 1), tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    problems = nano_problems(8, held_out=True)
    batches = sft.style_batches(problems, tokenizer)
    for style, write in (
        ("terse", NanoProblem.terse),
        ("verbose", NanoProblem.verbose),
    ):
        for row, problem in enumerate(problems):
            ids = batches[style]["tokens"][row]
            learned = batches[style]["loss_mask"][row] > 0
            written = write(problem)
            text = tokenizer.decode(ids[learned].tolist())
            assert text == written[0] + written[2:]
            assert written in tokenizer.decode(ids.tolist())
    params = init_params(MODEL, mesh, jnp.float32, 0)
    accuracy = sft.style_accuracy(MODEL, params, batches)
    assert accuracy == {"terse_accuracy": 0.0, "verbose_accuracy": 0.0}
    # With nothing asked of it, any model is right.
    for batch in batches.values():
        batch["loss_mask"][1:] = 0
    accuracy = sft.style_accuracy(MODEL, params, batches)
    assert accuracy == {"terse_accuracy": 0.875, "verbose_accuracy": 0.875}


def test_the_best_step_is_kept_and_named(tmp_path, mesh):
    params = init_params(MODEL, mesh, jnp.float32, 0)
    checkpoints = RunCheckpoints(tmp_path, CheckpointConfig(keep=2), best="accuracy")
    for step, value in ((1, 0.1), (2, 0.9), (3, 0.2), (4, None), (5, 0.3)):
        measured = {} if value is None else {"accuracy": value}
        checkpoints.save(
            step, params, {"count": jnp.array(step)}, {"metrics": measured}
        )
    checkpoints.close()
    assert read_json(tmp_path / "checkpoints" / "best.json")["step"] == 2
    steps = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()}
    assert steps == {"2", "4", "5"}
    again = RunCheckpoints(tmp_path, CheckpointConfig(keep=2), best="accuracy")
    shapes = abstract_params(MODEL, mesh, jnp.float32)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    step, restored, optimizer, record = again.restore(shapes, {"count": count})
    again.close()
    assert (step, int(optimizer["count"])) == (5, 5)
    assert record == {"metrics": {"accuracy": 0.3}}
    jax.tree.map(np.testing.assert_array_equal, restored, params)


@pytest.mark.parametrize(
    "path",
    [CONFIGS / f"{name}.yaml" for name in ("nano_sft", "nano_stated_sft")],
    ids=lambda p: p.stem,
)
def test_shipped_configs_load_and_have_a_state(path):
    config, run_dir = load_config(SFTConfig, ["--config", str(path)], "sft")
    assert run_dir == Path("runs") / path.stem
    assert len(path.read_text().splitlines()) < 40
    one = make_mesh("data=1,tensor=1", config.model, jax.devices()[:1])
    params = abstract_params(config.model, one, jnp.float32)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = abstract_state(optimizer, params, one)
    sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (params, state)]
    assert sizes[0] * 4 < 4e6  # what the repository may hold
    assert sizes[0] < sizes[1] < 2 * sizes[0]  # one moment for Muon, two for Adam


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--step", "3"], "did you mean '--steps'?"),
        (["--optimizer.learningrate", "3"], "'--optimizer.learning_rate'?"),
        (["--steps", "many"], "steps"),
        (["--steps", "0"], "steps must be a whole number, 1 or more, not 0"),
        (["--steps", "1.5"], "steps"),
        (["--seed", "-1"], "seed must be"),
        (["--first.terse", "2"], "terse must be a number from 0 to 1, not 2.0"),
        (["--first.rechecks", "[0.5, 0.5, 0.5]"], "rechecks must sum to 1, not 1.5"),
        (["--first.rechecks", "[1, 0]"], "first.rechecks"),
        (["--optimizer.warmup", "1.0"], "warmup must be"),
        (["--model.vocab_size", "100"], "model.vocab_size=100 is too small"),
        (["--model.num_kv_heads", "3"], "num_heads=4 is not a multiple"),
        (["--mesh", "data=3"], "mesh data=3"),
        (["--mesh", "rows=3"], "is not an axis"),
        (["stray"], "stray"),
        (["--seed"], "--seed"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["--config", "unknown.yaml"], "did you mean 'batch_size'?"),
        (["--config", "broken.yaml"], "broken.yaml is not YAML"),
        (["--config", "text.yaml"], "text.yaml holds no settings"),
        (["--config", "partial.yaml"], "model.vocab_size"),
        (["--run-dir", "text.yaml"], "text.yaml cannot be written"),
        (["--run-dir", "mine"], "mine holds files but no config.yaml"),
        ([], "needs --config"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_sentence_and_exit_code_2(flags, part, tmp_path, refusal):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "unknown.yaml").write_text("steps: 3\nfirst: {batchsize: 3}\n")
    (tmp_path / "broken.yaml").write_text("steps: [3\n")
    (tmp_path / "text.yaml").write_text("hello\n")
    (tmp_path / "partial.yaml").write_text("steps: 3\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").touch()
    config = [] if not flags or "--config" in flags else ["--config", "tiny.yaml"]
    assert part in refusal(sft.main, ["sft", *config, *flags])


def test_settings_of_the_wrong_kind_are_refused():
    with pytest.raises(UserError, match="every must be a whole number"):
        CheckpointConfig(every=0)
    with pytest.raises(UserError, match="learning_rate must be a number above 0"):
        MuonConfig(learning_rate=float("nan"))
