"""The report on sampling or on training, as JSON and as a table."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from e1jax.cli.flags import aligned
from e1jax.cli.locks import owning
from e1jax.config.checks import shown, writing
from e1jax.config.model import ModelConfig
from e1jax.plan.account import Account
from e1jax.plan.interconnect import Traffic
from e1jax.plan.programs import Program
from e1jax.plan.slices import GIB, Slice
from e1jax.sharding.mesh import undivided

MOST_SLOTS = 1024  # that are tried: programs for more compile long, and none needs them


LARGE_COPY = 16 * 2**20  # bytes of an array, from which on a copy of it is told


LARGE_REDUCE = 16 * 2**20


@dataclasses.dataclass
class Report:
    """The printed values of a part; bytes are per JAX device."""

    part: str
    topology: str
    mesh: str
    fits: bool = True
    hbm_bytes_per_chip: int = 0
    hbm_limit_bytes: int = 0
    devices: int = 0
    hosts: int = 0
    max_slots: int | None = None
    bytes_per_step: int | None = None
    floor_bytes: int | None = None
    estimated_seconds: float | None = (
        None  # of the two below, overlapped where possible
    )
    chip_seconds: float | None = None  # memory traffic and work of a device
    interconnect_seconds: float | None = None  # collectives, of which some overlap
    interconnect_beside_seconds: float | None = None  # the overlapping ones
    bound_by: str | None = None  # chip or interconnect: the longer one
    compile_seconds: float = 0.0
    warnings: list[str] = dataclasses.field(default_factory=list)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes by kind
    roofline_share: float | None = None
    collective_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    not_in_estimate: list[str] = dataclasses.field(default_factory=list)
    fitting: str | None = None  # if it does not fit: settings that would
    programs: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)


def new_report(part: str, slice_: Slice, mesh: Mesh) -> Report:
    """A report of a slice and mesh, with nothing counted yet."""
    text = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    return Report(
        part=part,
        topology=slice_.topology,
        mesh=text,
        hbm_limit_bytes=slice_.chip.hbm_bytes,
        devices=len(slice_.devices),
        hosts=slice_.hosts,
    )


def note(report: Report, programs: dict[str, Program]) -> None:
    """Adds the programs to a report: seconds of compiling, texts, warnings."""
    count_seconds(report, programs.values())
    unprinted = [name for name, p in programs.items() if p.fits and not p.text]
    if unprinted:
        report.warnings.append(
            f"the compiler cannot print {', '.join(unprinted)} for this chip: memory only"
        )
    for name, program in programs.items():
        if program.text:
            report.programs[name] = program.text
        if not program.fits:
            report.fits = False
            report.warnings.append(
                f"{name} does not fit: {program.total / GIB:.2f} GiB of "
                f"{report.hbm_limit_bytes / GIB:.2f} GiB"
            )


def warn_if_undivided(report: Report, sizes: ModelConfig, params: Any) -> None:
    """Warns of arrays that the mesh does not divide, by name and size."""
    if text := undivided(sizes, params):
        report.warnings.append(text)


def count_seconds(report: Report, programs: Iterable[Program]) -> None:
    """Adds the seconds that the programs took to compile."""
    report.compile_seconds += sum(program.seconds for program in programs)


def set_most(report: Report, phases: dict[str, int]) -> None:
    """Sets HBM use to the fullest phase, in bytes a chip, and whether it fits."""
    report.hbm_bytes_per_chip = max(phases.values())
    report.fits &= report.hbm_bytes_per_chip <= report.hbm_limit_bytes


def all_fit(
    report: Report, programs: dict[str, Program], phases: dict[str, int]
) -> bool:
    """Whether each does, alone and beside the arrays that wait meanwhile."""
    each = all(program.fits for program in programs.values())
    return each and max(phases.values()) <= report.hbm_limit_bytes


def add_seconds(report: Report, chip: float, moved: Traffic, times: int = 1) -> None:
    """Adds the time of a program that a step calls so often."""

    def add(name: str, seconds: float) -> float:
        total = (getattr(report, name) or 0.0) + times * seconds
        setattr(report, name, total)
        return total

    add("estimated_seconds", moved.with_work(chip))
    add("interconnect_beside_seconds", moved.beside)
    on_chip, between = (
        add("chip_seconds", chip),
        add("interconnect_seconds", moved.seconds),
    )
    report.bound_by = "interconnect" if between > on_chip else "chip"
    if moved.unknown:
        report.warnings.append(
            f"collectives that are not in the time: {', '.join(moved.unknown)}"
        )


def collective_bytes(counted: Account) -> dict[str, int]:
    """Bytes of the arrays that go through each kind of collective."""
    sizes: dict[str, int] = {}
    for op in counted.collectives:
        sizes[op.opcode] = sizes.get(op.opcode, 0) + op.times * op.payload
    return sizes


def warn_of_copies(
    report: Report, counted: Account, at_least: int, calls: int = 1
) -> None:
    """Of a program; a step of training calls it so often."""
    for op in counted.copies(2 * at_least):  # each is read and written
        how = f"{calls * op.times} times a step" if op.depth else "once a call"
        report.warnings.append(
            f"a copy of {op.bytes / 2 / 2**20:.0f} MiB, {how} ({op.op_name or op.name})"
        )


def report_json(report: Report) -> str:
    """The report as one line of JSON, without the texts of the programs."""
    values = dataclasses.asdict(report)
    del values["programs"]
    return json.dumps(values)


def report_table(report: Report) -> str:
    """Aligned text: names, figures and their parts."""
    limit = report.hbm_limit_bytes
    kinds = ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in report.memory.items() if size
    )
    used = report.hbm_bytes_per_chip
    verdict = "fits" if report.fits else "does not fit"
    rows = [
        (report.part, f"{report.topology}, {report.mesh}", verdict),
        (
            "",
            _counted(report.devices, "device"),
            f"on {_counted(report.hosts, 'host')}",
        ),
        ("settings", *_settings(report)),
        ("HBM a device", f"{used / GIB:.2f} of {limit / GIB:.2f} GiB", kinds),
    ]
    phases = report.settings.get("phases")
    if phases:
        texts = [f"{name} {size / GIB:.2f}" for name, size in phases.items()]
        host = report.settings.get("rollouts_on")
        texts[-1] += f" (each host on its own {host})" if host else ""
        rows.append(("", "in turn", ", ".join(texts)))
    if report.max_slots is not None:
        note = "or more" if report.max_slots >= MOST_SLOTS else "found by compiling"
        rows.append(("most slots", str(report.max_slots), note))
    if report.bytes_per_step is not None and report.floor_bytes:
        least = f"{report.floor_bytes / 1e9:.3f} GB"
        ratio = report.bytes_per_step / report.floor_bytes
        note = f"{ratio:.2f} x the floor of {least}"
        if report.part == "train":
            note = f"{least} for the state, the rest for products"
        amount = f"{report.bytes_per_step / 1e9:.3f} GB"
        rows.append(("HBM traffic a step", amount, note))
    if report.estimated_seconds is not None:
        rows.extend(_time_rows(report))
    if report.collective_bytes:
        texts = [f"{n} {s / 1e6:.1f}" for n, s in report.collective_bytes.items()]
        rows.append(("collectives, MB", "", ", ".join(texts)))
    rows.append(("compiled in", f"{report.compile_seconds:.0f} s", ""))
    rows.extend(("warning", "", text) for text in report.warnings)
    if report.fitting:
        rows.append(("instead", "", report.fitting))
    return aligned(rows, left=True) + "\n"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _settings(report: Report) -> tuple[str, str]:
    settings = report.settings
    if report.part == "train":
        samples = settings["samples_in_pass"]
        shared = f", a prompt of {samples} once" if samples > 1 else ""
        rows = f"{settings['rows']} x {settings['tokens']} tokens"
        return rows, f"a device's rows{shared}"
    forms = {"quantize": "weights", "kv_dtype": "cache"}
    told = [f", {forms[key]} {settings[key]}" for key in forms if key in settings]
    return (
        f"{settings['slots']} slots of {settings['cache_len']}",
        f"{settings['live']} positions filled in each{''.join(told)}",
    )


def _time_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    seconds, share = report.estimated_seconds or 0.0, report.roofline_share or 0.0
    settings = report.settings
    if report.part == "sample":
        rate = settings["slots"] / seconds
        note = f"{rate:.0f} tokens a second, {100 * share:.0f} % of the roofline"
        yield "time a step, at best", _time(seconds), note
        yield from _both_rows(report)
        ratio = settings["xla_to_floor"]
        yield "", f"{ratio:.2f} x floor", "the chip's time that is not in kernels"
        sampling = f"{100 * settings['sampling_share']:.1f} %"
        yield "", sampling, "of the chip's time outside of layers and matrix products"
    else:
        note = f"{100 * share:.0f} % of the peak in useful products (6ND)"
        yield "time of an update", _time(settings["update_seconds"]), note
        on_chip = _time(settings["update_chip_seconds"])
        moved = _time(settings["update_interconnect_seconds"])
        yield "", "", f"{on_chip} on the chip, {moved} on the interconnect"
        yield "step without rollouts", _time(seconds), "at best"
        yield from _both_rows(report)
        if "rollout_seconds" in settings:
            step = _time(settings["decode_seconds"])
            note = (
                f"{step} a decode step, at best; all responses as long as they can be"
            )
            yield "rollouts", _time(settings["rollout_seconds"]), note
        ratio = report.flops["matrix_to_useful"]
        yield "matrix flops", f"{ratio:.2f} x 6ND", "with what is computed again"
    yield "", "", f"without {' and '.join(report.not_in_estimate)}"


def _both_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    """The times that the estimate is made of, and which of them is the bound."""
    moved = report.interconnect_seconds or 0.0
    beside = report.interconnect_beside_seconds or 0.0
    yield "on the chip", _time(report.chip_seconds or 0.0), _bound("chip", report)
    bound = _bound("interconnect", report)
    how = f"{_time(beside)} of it beside the chip's work" if beside else ""
    note = ", ".join(filter(None, (bound, how)))
    yield "on the interconnect", _time(moved), note


def _bound(name: str, report: Report) -> str:
    return "the bound" if report.bound_by == name else ""


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


@contextlib.contextmanager
def dumping(directory: Path | None) -> Iterator[None]:
    """Makes the directory of --dump-hlo, if one is given; while the context is entered, no
    other command writes there. Raises UserError if that cannot be."""
    with contextlib.ExitStack() as stack:
        if directory is not None:
            with writing(directory):
                directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(owning(directory, inside=True))
        yield


def dump(report: Report, directory: Path) -> None:
    """Writes the programs' texts (HLO) to files; raises UserError if it cannot."""
    with writing(directory):
        for name, text in report.programs.items():
            (directory / f"{report.part}_{name}.hlo.txt").write_text(text)


def parse_size(text: str) -> int:
    """A positive integer of a flag, for argparse."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a whole number, 1 or more"
        )
    return int(text)
