"""Models and runs on disk: Hugging Face files, Orbax checkpoints, metrics.

`load.load_model` finds a model of any kind; `runs.RunCheckpoints` keeps those of a run.
"""
