"""What a configuration needs on a TPU slice, found out without one: `python -m e1jax.plan`."""
