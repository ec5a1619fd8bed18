"""Where arrays are: meshes, shards of parameters (FSDP), hosts, and what XLA is told."""

from e1jax.sharding.fsdp import make_whole, map_over_data, over_data, sum_over_data
from e1jax.sharding.hosts import (
    any_of,
    is_first,
    joined,
    local_mesh,
    make_copy_to_all,
    make_local_copy,
    of_all,
    rows_of_all,
)
from e1jax.sharding.mesh import (
    make_mesh,
    note_undivided,
    on_cpu,
    on_tpu,
    replicated,
    sharding,
    undivided,
)
from e1jax.sharding.runtime import (
    COMPILER_OPTIONS,
    backward_options,
    enough_memory,
    use_compilation_cache,
)

__all__ = [
    "COMPILER_OPTIONS",
    "any_of",
    "backward_options",
    "enough_memory",
    "is_first",
    "joined",
    "local_mesh",
    "make_copy_to_all",
    "make_local_copy",
    "make_mesh",
    "make_whole",
    "map_over_data",
    "note_undivided",
    "of_all",
    "on_cpu",
    "on_tpu",
    "over_data",
    "replicated",
    "rows_of_all",
    "sharding",
    "sum_over_data",
    "undivided",
    "use_compilation_cache",
]
