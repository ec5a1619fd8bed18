"""Command: the needs of a configuration on a TPU slice, found out without one.

    python -m e1jax.plan --config configs/e1_math_7b.yaml --topology v5e:2x4
    python -m e1jax.plan topologies

The compiler for TPUs (libtpu) runs on any machine. It is given the programs that
`sample` and `train` run, with shapes in place of arrays, and either says that they do
not fit or gives memory, and a text that `plan.account` adds up. Nothing here was timed
on a TPU:

- memory is the compiler's, plus the arrays that wait there beside a program's own;
- bytes are counted in the program's text; a kernel, which has no text, states its own.
  Attention states them for a full cache, and they are scaled by the blocks that
  --live fills;
- time on the chip is the compiler's estimate of cycles, plus kernels at the speed of
  their limit;
- time on the interconnect is a floor (see interconnect.py). Collectives
  that the compiler starts beside other work overlap with it; for all others the chip waits, and the
  estimate is the sum of both.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from e1jax.cli.command import check_command, run_command
from e1jax.cli.flags import QuantizeFlags, flag, flags_parser
from e1jax.config.buckets import check_local
from e1jax.config.checks import UserError
from e1jax.config.finetuning import is_for_sft
from e1jax.config.load import check_one_config, given_settings, load_config
from e1jax.config.training import GRPOConfig
from e1jax.plan.report import dump, dumping, parse_size, report_json, report_table
from e1jax.plan.sampling import DEFAULT_LIVE, plan_sampling
from e1jax.plan.sizes import model_sizes
from e1jax.plan.slices import describe, topology_table
from e1jax.plan.training import plan_training

_PROG = "python -m e1jax.plan"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFlags(QuantizeFlags):
    """Compiles the programs of sampling and training for a TPU slice, without a TPU, and
    says whether they fit and how fast they can be.

    'plan topologies' lists the known slices. Settings of the configuration can be changed
    as for train: --section.key value. Exit code 3: it does not fit.
    """

    config: str = flag("FILE.yaml")
    """Of training; see configs/."""
    topology: str = flag("v5e:2x4")
    """Kind of TPU and shape of the slice, in chips."""
    part: Literal["sample", "train"] | None = None
    """Part to plan (default: both)."""
    mesh: str | None = flag("data=2,tensor=4", None)
    """Device mesh (default: for sampling all devices, as many on tensor as the model's
    heads allow; for training the configuration's, else all on data)."""
    slots: int | None = flag("N", None, type=parse_size)
    """Rows sampled at a time (default: the configuration's)."""
    cache_len: int | None = flag("TOKENS", None, type=parse_size)
    """Positions of a slot (default: the configuration's, or as the longest prompt
    needs)."""
    live: int | None = flag(
        "TOKENS",
        None,
        type=parse_size,
        help=f"Positions filled in every slot, for bytes and time (default: "
        f"{DEFAULT_LIVE}, or all if there are fewer)",
    )
    json: bool = False
    """Print one JSON object per part."""
    dump_hlo: Path | None = flag("DIR", None)
    """Write the compiled text of each program there."""


def main() -> None:
    """`python -m e1jax.plan`: does a configuration fit a TPU slice? Without a TPU."""
    if check_command(sys.argv[1:], ["topologies"], _PROG):
        print(topology_table())
        return
    check_one_config(sys.argv[1:])
    args, rest = flags_parser(PlanFlags, _PROG).parse_known_args()
    check_local(args.dump_hlo, "--dump-hlo")
    # Settings of the configuration can be changed as for train: --section.key value.
    argv = ["--config", args.config, *rest]
    if is_for_sft(given_settings(argv)):
        raise UserError(
            f"{args.config} is for sft, of which nothing is planned; give a configuration "
            "of train"
        )
    config, _ = load_config(GRPOConfig, argv, _PROG)
    if args.part == "train" and (args.quantize or args.kv_dtype):
        raise UserError(
            "--quantize and --kv-dtype are for sampling, and training uses neither; "
            "leave them out, or take --part sample"
        )
    given = {"slots": args.slots, "cache_len": args.cache_len}
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, **given)
    )
    slice_ = describe(args.topology)
    sizes = model_sizes(config.model)
    parts = ("sample", "train") if args.part is None else (args.part,)
    reports = []
    with dumping(args.dump_hlo):
        for part in parts:
            plan = plan_sampling if part == "sample" else plan_training
            report = plan(config, sizes, slice_, args)
            reports.append(report)
            if args.dump_hlo:
                dump(report, args.dump_hlo)
            text = report_json(report) if args.json else report_table(report)
            print(text, flush=True)
    if not all(report.fits for report in reports):
        sys.exit(3)


if __name__ == "__main__":
    run_command(main)
