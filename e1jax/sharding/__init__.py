"""Where arrays are: meshes, shards of parameters (FSDP), hosts, and what XLA is told."""
