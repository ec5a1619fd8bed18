"""Command: what a configuration needs on a TPU slice, found out without one.

    python -m e1jax.plan --config configs/e1_math_7b.yaml --topology v5e:2x4
    python -m e1jax.plan topologies

The compiler for TPUs (libtpu) runs on any machine. It is given the programs that
`sample` and `train` run, with shapes in place of arrays, and either says that they do
not fit or gives memory, and a text that `plan.account` adds up. Nothing here was timed
on a TPU:

- memory is the compiler's; what lies there beside a program's own arrays is added;
- bytes are those of the program's text; of a kernel, which has no text, those that it
  states. Attention states them for a full cache, and they are scaled by the blocks that
  --live fills;
- time on the chip is the compiler's estimate of cycles, plus kernels at the speed of what
  limits them;
- time on the interconnect is a floor (see interconnect.py). What the compiler starts
  beside other work overlaps with it; for all other collectives the chip waits, and the
  estimate is the sum of both.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from e1jax.cli.command import Parser, run_command
from e1jax.cli.flags import quantize_flags
from e1jax.config.checks import UserError
from e1jax.config.load import load_config
from e1jax.config.training import GRPOConfig
from e1jax.plan.report import dump, parse_size, report_json, report_table
from e1jax.plan.sampling import DEFAULT_LIVE, plan_sampling
from e1jax.plan.sizes import model_sizes
from e1jax.plan.slices import describe, topology_table
from e1jax.plan.training import plan_training


def main() -> None:
    """`python -m e1jax.plan`: what fits a TPU slice, without a TPU."""
    if sys.argv[1:2] == ["topologies"]:
        print(topology_table())
        return
    args, rest = _parser().parse_known_args()
    # Settings of the configuration can be changed as for train: --section.key value.
    argv = ["--config", args.config, *rest]
    config, _ = load_config(GRPOConfig, argv, "python -m e1jax.plan")
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
    for part in parts:
        plan = plan_sampling if part == "sample" else plan_training
        report = plan(config, sizes, slice_, args)
        reports.append(report)
        if args.dump_hlo:
            dump(report, args.dump_hlo)
        print(report_json(report) if args.json else report_table(report), flush=True)
    if not all(report.fits for report in reports):
        sys.exit(3)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m e1jax.plan",
        description="Compiles the programs of sampling and training for a TPU slice, "
        "without a TPU, and says what fits and how fast it can be.",
        epilog="'plan topologies' lists the known slices. Settings of the configuration "
        "can be changed as for train: --section.key value. Exit code 3: it does not fit.",
    )
    flag = parser.add_argument
    flag(
        "--config", required=True, metavar="FILE.yaml", help="of training; see configs/"
    )
    flag(
        "--topology",
        required=True,
        metavar="v5e:2x4",
        help="kind of TPU and shape of the slice, in chips",
    )
    flag(
        "--part",
        choices=["sample", "train"],
        help="what to plan (default: both)",
    )
    flag(
        "--mesh",
        metavar="data=2,tensor=4",
        help="device mesh (default: for sampling all devices, as many on tensor as the "
        "model's heads allow; for training the configuration's, else all on data)",
    )
    flag("--slots", type=parse_size, metavar="N", help="default: the configuration's")
    flag(
        "--cache-len",
        type=parse_size,
        metavar="TOKENS",
        help="positions of a slot (default: the configuration's, or as the longest "
        "prompt needs)",
    )
    flag(
        "--live",
        type=parse_size,
        metavar="TOKENS",
        help=f"positions filled in every slot, for bytes and time (default: "
        f"{DEFAULT_LIVE}, or all if there are fewer)",
    )
    quantize_flags(flag)
    flag("--json", action="store_true", help="print one JSON object per part")
    flag(
        "--dump-hlo",
        type=Path,
        metavar="DIR",
        help="write the compiled text of each program there",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
