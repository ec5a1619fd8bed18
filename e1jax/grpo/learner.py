"""The policy in training: optimizer, jitted updates, log-probabilities of the reference."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from e1jax.checkpoint.load import LoadedModel
from e1jax.checkpoint.runs import RunCheckpoints, abstract_state
from e1jax.config.model import ModelConfig
from e1jax.config.training import GRPOConfig, RolloutConfig
from e1jax.grpo.logprobs import Solutions, response_logprobs
from e1jax.grpo.loss import configured_loss, loss_scale, token_weights
from e1jax.grpo.rollouts import (
    Batch,
    Rollouts,
    make_batch,
    mean_over_processes,
    pair_metrics,
    sampling_mesh,
)
from e1jax.nn.model import GatherParams, abstract_params
from e1jax.nn.quantize import Params
from e1jax.sharding.fsdp import data_specs, map_over_data
from e1jax.sharding.hosts import local_mesh, make_local_copy, process_allgather
from e1jax.sharding.runtime import COMPILER_OPTIONS
from e1jax.training import (
    ALL_TRAINED,
    Frozen,
    apply_gradients,
    computed_in,
    entropy_coefs,
    jit_update,
    learning_rates,
    make_optimizer,
    restore_or_init,
    starting_params,
    sum_gradients,
    trained_shapes,
)


class Learner:
    """The policy in training: its parameters, the optimizer's state, the reference.

    The engine samples from `sampling_params()`, which are the parameters themselves
    where they have the dtype of the computation and the sharding of sampling. With an
    adapter, which then is beside the frozen parameters, these are the reference too.
    """

    def __init__(
        self,
        config: GRPOConfig,
        loaded: LoadedModel,
        longest: tuple[int, int],
    ):
        self.dtype = computed_in(config)
        self.config, self.loaded = config, loaded
        self.longest = longest  # prompt and response, in tokens
        self.optimizer = make_optimizer(
            config.optimizer, config.steps, config.updates_per_step
        )
        self.schedule = learning_rates(config.optimizer, config.steps)
        self.entropy_coefs = entropy_coefs(config.loss, config.steps)
        self.frozen, self.shapes = trained_shapes(config.adapter, loaded)
        self.to_local = make_local_copy(
            loaded.mesh, self._abstract_sampled(local_mesh(loaded.config, loaded.mesh))
        )
        self.apart = None  # shardings on devices that only sample
        if config.rollout_mesh is not None:
            apart = self._abstract_sampled(sampling_mesh(config, loaded))
            self.apart = jax.tree.map(lambda s: s.sharding, apart)
        self.state_shapes = abstract_state(self.optimizer, self.shapes, loaded.mesh)
        shardings = jax.tree.map(lambda s: s.sharding, (self.shapes, self.state_shapes))
        self.update = make_update(
            config,
            loaded.config,
            self.optimizer,
            self.dtype,
            shardings,
            longest_response=longest[1],
            frozen=self.frozen,
        )
        rows = config.rollout.samples, solutions_of(config.rollout)
        self.logprobs = make_logprobs(
            loaded.config, self.dtype, shardings[0], *rows, frozen=self.frozen
        )
        self.reference_logprobs = self.logprobs
        if self.frozen.shapes is not None:  # without the adapter
            self.reference_logprobs = make_logprobs(
                loaded.config, self.frozen.dtypes, self.frozen.shardings, *rows
            )
        self.join = self.frozen.make_join(shardings[0], self.dtype)
        self.params: Params = {}  # the trained ones
        self.base: Params | None = None  # the frozen ones
        self.state: Any = None
        self.reference: Params | None = None
        # With rollout.ahead, the trained parameters that the next responses come from.
        self.sampled: Params | None = None
        # An adapter is cast after it is scaled.
        self.sampled_dtype = jnp.float32 if config.adapter.rank else self.dtype

    def _abstract_sampled(self, mesh: Mesh) -> Params:
        """Abstract parameters to sample from on a mesh."""
        loaded, adapter = self.loaded, self.config.adapter
        return abstract_params(
            loaded.config, mesh, self.dtype, loaded.quantize, adapter
        )

    def restore(self, checkpoints: RunCheckpoints, batches: Any) -> int:
        """Goes on from the latest checkpoint, or begins with the model; the step."""
        adapter, seed = self.config.adapter, self.config.seed
        self.base, init = starting_params(adapter, self.loaded, self.shapes, seed)
        init_state, shapes = self.optimizer.init, self.state_shapes
        if self.config.rollout.ahead:
            init_state, shapes = self._init_ahead, (shapes, self.sampled_shapes)
        step, self.params, self.state = restore_or_init(
            checkpoints, init_state, (self.shapes, shapes), init, batches
        )
        if self.config.rollout.ahead:
            self.state, self.sampled = self.state
        if self.config.loss.kl_coef:
            self.reference = self.base or self._initial(step)
        return step

    def _initial(self, step: int) -> Params:
        """The parameters that the run began with, in the dtype of the computation."""
        initial = self.loaded.read_params() if step else self.params
        # Copied, because the update donates its input.
        return _cast(initial, self.dtype, copy=initial is self.params)

    def _init_ahead(self, params: Params) -> tuple[Any, Params]:
        """The state of a new run with rollout.ahead: the optimizer's, and the parameters
        that the first responses come from."""
        sampled = _cast(params, self.sampled_dtype, copy=True)
        return self.optimizer.init(params), sampled

    @property
    def sampled_shapes(self) -> Params:
        """The abstract parameters that are sampled from with rollout.ahead."""

        def shape(x):
            dtype, place = self.sampled_dtype, x.sharding
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=place)

        return jax.tree.map(shape, self.shapes)

    @property
    def saved_state(self) -> Any:
        """The part of a checkpoint besides the trained parameters."""
        return self.state if self.sampled is None else (self.state, self.sampled)

    def sampling_params(self) -> Params:
        """The policy where the engine samples: on this process's own devices."""
        return self._placed(self.params)

    def params_ahead(self, *, latest: bool) -> Params:
        """The parameters that responses are sampled from while others are learned: with
        `latest` the policy as it is now, which an update then does not change, else the one
        of the last call."""
        if latest:
            # Copied, because the update donates its input.
            self.sampled = _cast(self.params, self.sampled_dtype, copy=True)
        assert self.sampled is not None
        return self._placed(self.sampled)

    def _placed(self, trained: Params) -> Params:
        params = self.to_local(self.join(self.base, trained))
        return params if self.apart is None else jax.device_put(params, self.apart)

    def learn(self, rollouts: Rollouts, step: int) -> dict[str, float]:
        """Updates the policy by the responses to be learned after `step` steps; the
        metrics of this one."""
        return self.start_learning(rollouts, step)()

    def start_learning(
        self, rollouts: Rollouts, step: int
    ) -> Callable[[], dict[str, float]]:
        """`learn` that does not wait for the devices: the function that it gives does."""
        start = time.perf_counter()
        config = self.config.at_step(step)
        temperature = jnp.float32(config.rollout.temperature)
        entropy_coef = None  # the constant one
        if config.loss.entropy_coef_end is not None:
            entropy_coef = jnp.float32(self.entropy_coefs(step))
        tokens = sum(len(c.token_ids) for c in rollouts.completions)
        tokens = process_allgather(tokens).sum()
        of_rollouts = {
            **mean_over_processes(rollouts.metrics),
            **pair_metrics(config, process_allgather(rollouts.of_pairs).sum(axis=0)),
        }
        measured = []
        for batch in self._minibatches(rollouts, temperature):
            # The first update is of the parameters that sampled.
            on_policy = config.loss.old_logprobs == "recomputed" and not measured
            self.params, self.state, metrics = self.update(
                self.params,
                self.state,
                batch,
                on_policy,
                temperature,
                entropy_coef,
                self.base,
            )
            measured.append(metrics)

        def metrics() -> dict[str, float]:
            means = jax.tree.map(lambda *values: np.mean(values).item(), *measured)
            seconds = time.perf_counter() - start
            return {
                **of_rollouts,
                **means,
                "sampler_gap": measured[0]["sampler_gap"].item(),
                "update_tokens_per_second": tokens * config.update.epochs / seconds,
            }

        return metrics

    def _minibatches(self, rollouts: Rollouts, temperature: jax.Array) -> list[Batch]:
        """Of each update in turn. The old log-probabilities are the sampler's. If they
        are to be recomputed, the current parameters do so for every update but the first."""
        loss, epochs = self.config.loss, self.config.update.epochs
        whole = make_batch(self.config, rollouts, *self.longest)
        num_micro = len(whole.tokens) * epochs // self.config.updates_per_step
        rows = NamedSharding(self.loaded.mesh, PartitionSpec(None, "data"))

        def minibatch(first: int) -> Batch:
            def put(x: np.ndarray) -> jax.Array:
                x = x[first : first + num_micro]
                return jax.make_array_from_process_local_data(rows, x, x.shape)

            batch = jax.tree.map(put, whole)
            if self.reference is None:
                return batch
            # None is written, as `recomputed` passes it: one program serves both.
            logprobs = self.reference_logprobs(self.reference, batch, temperature, None)
            return batch._replace(ref_logprobs=logprobs)

        def recomputed(batch: Batch) -> Batch:
            # Some batches have a reference's by then: it would be compiled twice.
            plain = batch._replace(ref_logprobs=None)
            logprobs = self.logprobs(self.params, plain, temperature, self.base)
            return batch._replace(old_logprobs=logprobs)

        batches = [minibatch(at) for at in range(0, len(whole.tokens), num_micro)]
        first, *others = batches
        if loss.old_logprobs == "recomputed":
            others = [recomputed(batch) for batch in others]
            batches = [recomputed(first) if epochs > 1 else first, *others]
        return [first, *others, *batches * (epochs - 1)]


def _cast(params: Params, dtype: Any, *, copy: bool = False) -> Params:
    """Parameters in another dtype; the same arrays, or copies, if they have it."""

    def cast(p):
        return (jnp.copy(p) if copy else p) if p.dtype == dtype else p.astype(dtype)

    return jax.tree.map(cast, params)


def make_update(
    config: GRPOConfig,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    dtype: Any,
    shardings: tuple[Any, Any],
    *,
    longest_response: int,
    frozen: Frozen = ALL_TRAINED,
):
    """One jitted update by a mini-batch, whose micro-batches are gone through in turn.

    (params, state, batch, on_policy, temperature, entropy_coef=None, base=None) ->
    (params, state, metrics). `entropy_coef` is in place of the one of the settings, and
    `base` are the frozen parameters, if there are any. With `on_policy` (bool), the batch
    was sampled from these parameters: the old log-probabilities are then the update's own,
    and the batch's are only compared with them, for `sampler_gap`. The first two arguments
    are donated, and sharded as `shardings` says. Each place on the mesh axis `data` goes
    through its own rows with the parameters gathered layer by layer, in `dtype`; gradients
    are summed up in float32. `longest_response` is in tokens: see `loss_scale`.
    """
    mesh = jax.tree.leaves(shardings[0])[0].mesh
    gather_params = frozen.make_gather_params(shardings[0], dtype)

    def of_shard(params, base, batch, weights, on_policy, temperature, entropy_coef):
        def loss(params, inputs):
            microbatch, weight = inputs
            return grpo_loss(
                config,
                model,
                frozen.join(base, params),
                microbatch,
                weight[0],
                on_policy,
                temperature,
                entropy_coef,
                mesh=mesh,
                gather_params=gather_params,
            )

        return sum_gradients(loss, params, (batch, weights))

    specs, rows = data_specs(shardings[0]), PartitionSpec(None, "data")
    of_base = data_specs(frozen.shardings)
    of_shards = map_over_data(
        of_shard,
        mesh,
        in_specs=(specs, of_base, rows, rows, *[PartitionSpec()] * 3),
        out_specs=(specs, PartitionSpec()),
    )

    def update(
        params, state, batch, on_policy, temperature, entropy_coef=None, base=None
    ):
        weights = _share_weights(
            batch.loss_mask, config.loss.aggregate, mesh.shape["data"]
        )
        scalars = on_policy, temperature, entropy_coef
        grads, metrics = of_shards(params, base, batch, weights, *scalars)
        if config.loss.aggregate == "constant":
            scale = loss_scale(batch.loss_mask, "constant", longest_response)
            grads = jax.tree.map(lambda grad: grad * scale, grads)
            metrics["loss"] *= scale
        params, state, norm = apply_gradients(optimizer, params, state, grads)
        return params, state, metrics | {"grad_norm": norm}

    return jit_update(update, shardings)


def _share_weights(
    loss_mask: Bool[Array, "M B R"], aggregate: str, shares: int
) -> Float[Array, "M S"]:
    """Weight of each device's share of each micro-batch in the mean over the mini-batch;
    see loss.token_weights."""
    num_micro, rows, length = loss_mask.shape
    weights = token_weights(loss_mask.reshape(-1, length), aggregate)
    weights = weights.reshape(num_micro, shares, rows // shares, length)
    return weights.sum(axis=(2, 3))


def grpo_loss(
    config: GRPOConfig,
    model: ModelConfig,
    params: Params,
    batch: Batch,
    weight: Float[Array, ""],
    on_policy: Bool[Array, ""],
    temperature: Float[Array, ""],
    entropy_coef: Float[Array, ""] | None = None,
    *,
    mesh: Mesh | None = None,
    gather_params: GatherParams = lambda part, name: part,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Loss of a micro-batch and its metrics, both times `weight`; see make_update."""
    loss = config.loss
    logprobs, entropy = response_logprobs(
        model,
        params,
        batch.tokens,
        batch.prompt_len,
        response_len=batch.loss_mask.shape[-1],
        temperature=temperature,
        mesh=mesh,
        remat=config.update.remat,
        gather_params=gather_params,
        entropy_grad=loss.raises_entropy,
        samples=config.rollout.samples,
        solutions=solutions_of(config.rollout),
    )
    own = jax.lax.stop_gradient(logprobs)
    value, metrics = configured_loss(
        loss,
        logprobs,
        jnp.where(on_policy, own, batch.old_logprobs),
        batch.ref_logprobs,
        batch.advantages,
        batch.loss_mask,
    )
    weights = token_weights(batch.loss_mask, loss.aggregate)

    def mean(values):
        return (jnp.where(batch.loss_mask, values, 0.0) * weights).sum()

    entropy = mean(entropy)
    value -= (loss.entropy_coef if entropy_coef is None else entropy_coef) * entropy
    gap = mean(jnp.abs(own - batch.old_logprobs))
    metrics |= {"loss": value, "entropy": entropy, "sampler_gap": gap}
    return value * weight, {name: v * weight for name, v in metrics.items()}


def solutions_of(rollout: RolloutConfig) -> Solutions | None:
    """How rows share a thought; None without cuts."""
    if not rollout.cuts:
        return None
    longest = rollout.solution_budgets[0] or 0
    return Solutions(rollout.solutions, rollout.cuts[-1], longest)


def make_logprobs(
    model: ModelConfig,
    dtype: Any,
    shardings: Any,
    samples: int = 1,
    solutions: Solutions | None = None,
    frozen: Frozen = ALL_TRAINED,
):
    """Log-probabilities of responses, a micro-batch at a time; `samples` rows in turn
    have the same prompt, and `solutions` the same thought: see `response_logprobs`.

    (params, batch, temperature, base=None) -> [M, B, R] float32; see make_update. `dtype`
    may be a tree of one for each parameter.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    gather_params = frozen.make_gather_params(shardings, dtype)

    def of_shard(params, batch, temperature, base):
        params = frozen.join(base, params)

        def of_one(microbatch):
            logprobs, _ = response_logprobs(
                model,
                params,
                microbatch.tokens,
                microbatch.prompt_len,
                response_len=batch.loss_mask.shape[-1],
                temperature=temperature,
                mesh=mesh,
                gather_params=gather_params,
                samples=samples,
                solutions=solutions,
            )
            return logprobs

        if len(batch.tokens) == 1:  # see sum_gradients
            return of_one(jax.tree.map(lambda x: x[0], batch))[None]
        return jax.lax.map(of_one, batch)

    rows = PartitionSpec(None, "data")
    of_base = data_specs(frozen.shardings)
    in_specs = (data_specs(shardings), rows, PartitionSpec(), of_base)
    of_shards = map_over_data(of_shard, mesh, in_specs, rows)

    def logprobs(params, batch, temperature, base=None):
        return of_shards(params, batch, temperature, base)

    return jax.jit(logprobs, compiler_options=COMPILER_OPTIONS)
