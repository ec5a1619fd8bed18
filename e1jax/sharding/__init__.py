"""Placement of arrays: meshes, sharded parameters (FSDP), hosts, and options of XLA."""

from e1jax.sharding.fsdp import (
    data_specs,
    make_gather_params,
    map_over_data,
    sum_over_data,
)
from e1jax.sharding.hosts import (
    allgather_rows,
    any_process,
    is_first,
    joined,
    local_mesh,
    make_copy_to_all,
    make_local_copy,
    process_allgather,
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
    enough_memory,
    use_compilation_cache,
)

__all__ = [
    "COMPILER_OPTIONS",
    "allgather_rows",
    "any_process",
    "data_specs",
    "enough_memory",
    "is_first",
    "joined",
    "local_mesh",
    "make_copy_to_all",
    "make_gather_params",
    "make_local_copy",
    "make_mesh",
    "map_over_data",
    "note_undivided",
    "on_cpu",
    "on_tpu",
    "process_allgather",
    "replicated",
    "sharding",
    "sum_over_data",
    "undivided",
    "use_compilation_cache",
]
