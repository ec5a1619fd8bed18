"""Settings: frozen dataclasses with every rule about a value, read from YAML and flags.

Nothing here imports JAX, so a mistake is reported at once.
"""
