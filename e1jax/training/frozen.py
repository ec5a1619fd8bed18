"""Which parameters a run trains: all of a model's, or an adapter beside the frozen others."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from e1jax.checkpoint.load import LoadedModel
from e1jax.config.adapter import AdapterConfig
from e1jax.nn.lora import add_adapter, scaled
from e1jax.nn.model import abstract_adapter, abstract_params, init_adapter
from e1jax.nn.quantize import Params
from e1jax.sharding.fsdp import make_gather_params
from e1jax.sharding.runtime import COMPILER_OPTIONS


class Frozen(NamedTuple):
    """The parameters that a run does not train: with an adapter, the model's own.

    Gradients, optimizer state and checkpoints are of the trained ones, and whatever
    computes with both goes through here.
    """

    shapes: Params | None = None  # abstract, with shardings; None: nothing is frozen
    scale: float = 1.0  # of the adapter's products

    @property
    def shardings(self) -> Any:
        return jax.tree.map(operator.attrgetter("sharding"), self.shapes)

    @property
    def dtypes(self) -> Any:
        return jax.tree.map(operator.attrgetter("dtype"), self.shapes)

    def join(self, frozen: Params | None, trained: Params) -> Params:
        """The parameters of the model, of the frozen and the trained ones."""
        if frozen is None:
            return trained
        return add_adapter(frozen, scaled(trained, self.scale))

    def make_gather_params(
        self, trained: Params, dtype: Any
    ) -> Callable[[Any, str], Any]:
        """As `fsdp.make_gather_params`, of the joined parameters. `trained` are shardings,
        of parameters that are cast to `dtype`; frozen ones keep their dtypes, as int8."""
        if self.shapes is None:
            return make_gather_params(trained, dtype)
        dtypes = jax.tree.map(lambda _: dtype, trained)
        return make_gather_params(
            add_adapter(self.shardings, trained), add_adapter(self.dtypes, dtypes)
        )

    def make_join(
        self, trained: Params, dtype: Any
    ) -> Callable[[Params | None, Params], Params]:
        """`join` outside of jitted functions: the frozen arrays themselves, and trained ones
        in `dtype`, sharded as `trained` says. Without frozen ones, `trained` as it is."""

        def of_adapter(adapter: Params) -> Params:
            return jax.tree.map(lambda x: x.astype(dtype), scaled(adapter, self.scale))

        cast = jax.jit(
            of_adapter, out_shardings=trained, compiler_options=COMPILER_OPTIONS
        )

        def join(frozen: Params | None, trained: Params) -> Params:
            return trained if frozen is None else add_adapter(frozen, cast(trained))

        return join


ALL_TRAINED = Frozen()


def trained_shapes(
    adapter: AdapterConfig, loaded: LoadedModel
) -> tuple[Frozen, Params]:
    """The frozen parameters of a run that begins with `loaded`, and the abstract trained
    ones: of an adapter in float32, whatever the frozen ones are."""
    config, mesh = loaded.config, loaded.mesh
    own = abstract_params(config, mesh, loaded.dtype, loaded.quantize)
    if not adapter.rank:
        return ALL_TRAINED, own
    shapes = abstract_adapter(config, adapter, mesh, jnp.float32)
    return Frozen(own, adapter.scale), shapes


def starting_params(
    adapter: AdapterConfig, loaded: LoadedModel, shapes: Params, seed: int
) -> tuple[Params | None, Callable[[], Params]]:
    """The frozen parameters of a run (None without an adapter), and a function that makes
    the trained parameters of a new run, whose shapes `trained_shapes` gives."""
    if not adapter.rank:
        return None, loaded.read_params
    return loaded.read_params(), functools.partial(init_adapter, shapes, seed)
