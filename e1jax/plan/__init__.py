"""Memory and time of a configuration on a TPU slice, without a TPU: `python -m e1jax.plan`."""
