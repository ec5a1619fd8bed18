"""Settings: frozen dataclasses with every rule about a value, read from YAML and flags.

Nothing here imports JAX, so a mistake is reported at once.
"""

from e1jax.config.checks import (
    UNLIMITED,
    UserError,
    check_choice,
    check_integer,
    check_known,
    check_number,
    writing,
)
from e1jax.config.finetuning import FineTuningConfig
from e1jax.config.load import (
    given_settings,
    load_config,
    load_config_and_flags,
    read_yaml,
    record_config,
)
from e1jax.config.model import KV_DTYPES, QUANTIZED, ModelConfig
from e1jax.config.sampling import SamplingParams
from e1jax.config.texts import check_backslashes, parse_json
from e1jax.config.training import (
    AdamWConfig,
    CheckpointConfig,
    GRPOConfig,
    HostsConfig,
    MuonConfig,
    SFTConfig,
    TraceMix,
    ValidationConfig,
    budget_name,
)

__all__ = [
    "KV_DTYPES",
    "QUANTIZED",
    "UNLIMITED",
    "AdamWConfig",
    "CheckpointConfig",
    "FineTuningConfig",
    "GRPOConfig",
    "HostsConfig",
    "ModelConfig",
    "MuonConfig",
    "SFTConfig",
    "SamplingParams",
    "TraceMix",
    "UserError",
    "ValidationConfig",
    "budget_name",
    "check_backslashes",
    "check_choice",
    "check_integer",
    "check_known",
    "check_number",
    "given_settings",
    "load_config",
    "load_config_and_flags",
    "parse_json",
    "read_yaml",
    "record_config",
    "writing",
]
