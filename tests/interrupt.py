"""Signals at chosen moments of a training run, and a driver that runs several such runs.

    python interrupt.py "WHERE:NTH:SIGNAL ..." FLAGS

runs the command with the flags once for each moment, each in a process of its own that
sends itself the signal, and prints their exit codes. Modules are imported once for all;
JAX's devices are not touched before the forks.
"""

import os
import pathlib
import sys
import time

from e1jax import train
from e1jax.checkpoint.runs import RunCheckpoints
from e1jax.cli.command import run_command
from e1jax.grpo import learner, rollouts


def interrupt(where, nth, number, patch=setattr):
    """This process will send itself the signal when it is there the nth time."""
    count = 0

    def here(name):
        nonlocal count
        count += name == where
        if name == where and count == nth:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # Python's handler runs before the next line

    originals = rollouts.sample_rollouts, learner.make_update, RunCheckpoints.save
    write_text = pathlib.Path.write_text

    def sample_rollouts(*args, **options):
        *args, stop_if_asked = args
        chunks = []

        def stop(new_tokens):
            chunks.append(new_tokens)
            if len(chunks) == 1:
                here("sampling")  # some tokens are there
            stop_if_asked(new_tokens)

        return originals[0](*args, stop, **options)

    def make_update(*args, **options):
        update = originals[1](*args, **options)

        def updated(*args):
            result = update(*args)
            here("update")
            return result

        return updated

    def save(self, *args):
        originals[2](self, *args)
        if where != "writing":
            self.wait()  # or what is there in the end would be a matter of luck
        here("saved")

    def write_half(self, text, **options):
        if self.name.startswith("config.json"):
            write_text(self, text[:50], **options)
            here("preparing")
        return write_text(self, text, **options)

    patch(train, "sample_rollouts", sample_rollouts)
    patch(learner, "make_update", make_update)
    patch(RunCheckpoints, "save", save)
    patch(pathlib.Path, "write_text", write_half)
    if where == "writing":  # a step is whole, but for its name

        def hook(event, args):
            if event == "os.rename" and "/checkpoints/" in str(args[1]):
                here("writing" if pathlib.Path(args[1]).name.isdigit() else "")

        sys.addaudithook(hook)


def main():
    moments, flags = sys.argv[1].split(), sys.argv[2:]
    for moment in moments:
        child = os.fork()
        if not child:
            where, nth, number = moment.split(":")
            interrupt(where, int(nth), int(number))
            sys.argv = ["train", *flags]
            code = 0
            try:
                run_command(train.main)
            except SystemExit as end:
                code = end.code
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print("exit code", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    # Slow to load, and loaded late: once for all.
    import tensorboardX  # noqa: F401
    import transformers.utils.chat_template_utils  # noqa: F401

    main()
