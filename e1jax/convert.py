"""Command: Hugging Face files to an e1jax checkpoint and back.

A conversion streams. A few parts of tensors at a time are in host memory, and everything
is written to a sibling of DST that gets its name at the very end, so that an interrupted
conversion leaves nothing at DST. In a bucket, which cannot rename, parameters are written
to DST and config.json, the mark of a model, at the very end.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from e1jax.checkpoint.adapter import (
    check_saved_adapter,
    merged,
    read_adapter,
    write_peft,
)
from e1jax.checkpoint.huggingface import (
    StoredTensor,
    hf_shapes,
    lazy_arrays,
    write_hf_weights,
    write_json,
)
from e1jax.checkpoint.int8 import as_int8
from e1jax.checkpoint.load import (
    FORMAT_VERSION,
    HUGGING_FACE,
    RUN,
    find_model,
    find_with_adapter,
)
from e1jax.checkpoint.params import (
    PARAMS,
    as_tree,
    named_shapes,
    quantized,
    save_params,
)
from e1jax.cli.command import Parser, check_command, run_command, stop_signals
from e1jax.cli.files import read_json
from e1jax.cli.flags import parse_path
from e1jax.cli.locks import owning
from e1jax.config.buckets import (
    copy_file,
    in_bucket,
    remove_tree,
    temporary_directory,
)
from e1jax.config.checks import LOCK, UserError, check_choice
from e1jax.config.model import QUANTIZED, ModelConfig
from e1jax.tokenizer import GENERATION, Tokenizer, copy_files


def from_hf(
    source: str, dst: Path, dtype: str | None = None, quantize: str | None = None
) -> None:
    """Writes an e1jax checkpoint of a Hugging Face model at `dst`.

    `dtype` None keeps the stored one; `quantize` "int8" is for sampling only. The manifest
    holds, per tensor of the source, its shape, dtype and the sha256 of its bytes as they
    were stored there.
    """
    if quantize is not None:
        check_choice("quantize", quantize, QUANTIZED)
    with _new_directory(dst) as (new, params):
        files = find_model(source)
        path = files.path
        if files.kind != HUGGING_FACE:
            raise UserError(
                f"{path} is an e1jax checkpoint already; nothing to convert"
            )
        _ = files.tokenizer  # which is checked
        config, tensors = files.config, files.tensors
        stored = sorted({str(tensor.dtype) for tensor in tensors.values()})
        if dtype is None and len(stored) > 1:
            raise UserError(
                f"{path} stores its tensors as {' and '.join(stored)}; "
                "choose with --dtype"
            )
        dtype = dtype or stored[0]
        manifest = {
            "format_version": FORMAT_VERSION,
            "source": source,
            "revision": path.name if path.parent.name == "snapshots" else None,
            "dtype": dtype,
            "quantize": quantize,
        }
        described = {}
        total = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
        with _progress(total) as note:

            def seen(tensor: StoredTensor) -> None:
                mine: dict[str, Any] = {}
                if described.setdefault(tensor.name, mine) is not mine:
                    return  # int8 reads a tensor for its values and for its scale
                data = tensor.map().view(np.uint8).data
                mine["shape"] = list(tensor.shape)
                mine["dtype"] = str(tensor.dtype)
                mine["sha256"] = hashlib.sha256(data).hexdigest()
                note(data.nbytes)

            arrays = lazy_arrays(tensors, config, jnp.dtype(dtype), seen)
            if quantize:  # from the stored values, not from values cast to `dtype`
                packed = as_int8(lazy_arrays(tensors, config, None, seen))
                arrays = {name: arrays.get(name, packed[name]) for name in packed}
            save_params(params, as_tree(arrays, config))
        manifest["tensors"] = {name: described[name] for name in tensors}
        _copy_files(files.directory, new, dtype, config)
        write_json(new / "manifest.json", manifest)


def to_hf(source: str, dst: Path, adapter: str | None = None) -> None:
    """Writes a Hugging Face directory of an e1jax checkpoint or a run at `dst`; with an
    adapter, or of a run that trained one, of the model with the adapter merged.

    Raises UserError if a tensor is not the one of the manifest, bit for bit.
    """
    with _new_directory(dst) as (new, _):
        files, added = find_with_adapter(source, adapter)
        if files.kind == HUGGING_FACE and not added:
            raise UserError(
                f"{files.path} is not an e1jax checkpoint or a run directory; "
                "a Hugging Face directory needs no conversion"
            )
        # A run has its own tokenizer files, with the instruction that it trained with.
        texts = added if added and added.kind == RUN else files
        config, tokenizer = files.config, texts.tokenizer
        arrays = files.lazy_arrays()
        if quantized(arrays):
            raise UserError(
                f"{files.path} has its weights as int8, which a Hugging Face directory "
                "cannot hold; convert the model that it was made from"
            )
        dtype = jnp.dtype(arrays["embedding"].dtype)
        tensors = files.manifest.get("tensors", {})
        # The manifest has the hash of the source, so cast tensors cannot be compared.
        kept = {name: t for name, t in tensors.items() if t["dtype"] == str(dtype)}
        if added and added.adapter:
            settings, kept = added.adapter.settings, {}
            check_saved_adapter(added.weights, config, settings)
            with added.reading():
                low_rank = read_adapter(added.weights, config, settings)
            arrays = merged(arrays, low_rank, settings.scale)

        sizes = {
            name: math.prod(shape) * dtype.itemsize
            for name, shape in hf_shapes(config).items()
        }
        with _progress(sum(sizes.values())) as note:

            def written(name: str, sha256: str) -> None:
                if name in kept and kept[name]["sha256"] != sha256:
                    raise UserError(
                        f"{files.weights} is damaged: {name} is not what its "
                        "manifest.json says, by the sha256; convert the model again"
                    )
                note(sizes[name])

            with files.reading():
                write_hf_weights(new, config, dtype, arrays, written)
        _copy_files(texts.directory, new, str(dtype), config)
        _name_eos_ids(new / GENERATION, tokenizer)


def to_peft(source: str, dst: Path) -> None:
    """Writes the adapter that a run trained at `dst`, in the format of peft."""
    with _new_directory(dst) as (new, _):
        files = find_model(source)
        if files.kind != RUN or not files.adapter:
            raise UserError(
                f"{files.path} is no run that trained an adapter, and --peft writes no other; "
                "leave it out"
            )
        _ = files.tensors  # which are checked
        with files.reading():
            settings = files.adapter.settings
            arrays = read_adapter(files.weights, files.config, settings)
        write_peft(new, files.config, files.adapter, arrays)


def _name_eos_ids(file: Path, tokenizer: Tokenizer) -> None:
    """Completes a generation_config.json that does not say where a response ends."""
    there = read_json(file) if file.is_file() else {}
    if there.get("eos_token_id") not in (None, []):
        return
    if there.get("_from_model_config"):  # transformers would make it again, without ids
        there = {}
    bos = tokenizer.special_tokens.get("bos_token")
    bos_id = tokenizer.backend.token_to_id(bos) if bos else None
    eos_ids = list(tokenizer.eos_ids) if tokenizer.more_eos_ids else tokenizer.eos_id
    write_json(file, {"bos_token_id": bos_id, **there, "eos_token_id": eos_ids})


def _copy_files(src: Path, dst: Path, dtype: str, sizes: ModelConfig) -> None:
    """Copies the files beside the weights; config.json gets the dtype of the new ones,
    and loses a tie that they do not have."""
    copy_files(src, dst)
    config = read_json(src / "config.json")
    # transformers 5 writes dtype, and still reads torch_dtype, the name of 4.
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    if config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = sizes.tie_word_embeddings
    write_json(dst / "config.json", config)


@contextlib.contextmanager
def _new_directory(dst: Path) -> Iterator[tuple[Path, Path]]:
    """A directory beside `dst` to write in, which becomes `dst` if all goes well, and the
    directory for parameters, PARAMS in it.

    Else nothing is left. A link at `dst` is followed. That `dst` can be written is known
    before anything else is done.
    """
    if in_bucket(dst):
        with _new_in_bucket(dst) as new:
            yield new, dst / PARAMS
        return
    target = Path(os.path.realpath(dst))
    partial = target.parent / f".{target.name}.partial"
    made = [parent for parent in target.parents if not os.path.lexists(parent)]
    try:
        _check_free(target, dst)
        if made:
            target.parent.mkdir(parents=True, exist_ok=True)
        with owning(target):
            _check_free(target, dst)  # another process may have made it meanwhile
            # Leftovers of a conversion that was killed.
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                yield partial, partial / PARAMS
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{dst} cannot be written: {error.strerror or error}; nothing was written"
        ) from None
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # not empty: all went well
                parent.rmdir()


@contextlib.contextmanager
def _new_in_bucket(dst: Path) -> Iterator[Path]:
    """A local directory, whose files are uploaded to `dst` if all goes well.

    The last one is config.json, without which a directory is no model. Of a conversion
    that fails, nothing is left; one that was killed leaves its lock, by which the next one
    knows that the rest may be removed.
    """
    try:
        there = {path.name for path in dst.glob("*")}
        if there and (LOCK not in there or "config.json" in there):
            raise UserError(f"{dst} exists already; remove it or give another name")
        with owning(dst, inside=True):
            _empty(dst)
            try:
                new = temporary_directory(dst)
                yield new
                files = [file for file in new.rglob("*") if file.is_file()]
                for file in sorted(files, key=lambda file: file.name == "config.json"):
                    copy_file(file, dst / str(file.relative_to(new)))
            except BaseException:
                _empty(dst)
                raise
    except OSError as error:
        raise UserError(
            f"{dst} cannot be written: {error.strerror or error}; nothing was written"
        ) from None


def _empty(dst: Path) -> None:
    """Removes everything but the lock in a directory of a bucket; config.json first."""
    remove_tree(dst / "config.json")
    for path in dst.glob("*"):
        if path.name != LOCK:
            remove_tree(path)


def _check_free(target: Path, dst: Path) -> None:
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{dst} exists already; remove it or give another name")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes of each tensor of `total` bytes in all.

    It shows them on a terminal, and is where Ctrl-C stops: elsewhere it could come in the
    middle of Orbax, which then complains at length.
    """
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False)
    with bar, stop_signals() as signals:

        def note(num_bytes: int) -> None:
            bar.update(num_bytes)
            if signals:
                raise KeyboardInterrupt("(nothing was written)")

        yield note


def inspect(model: str) -> str:
    """Kind, sizes and tensors of a model directory, as text."""
    files = find_model(model)
    config, origin, tensors = files.config, files.manifest, files.tensors
    rows: dict[str, tuple[int, Any]] = {}  # one per kind of tensor: count, any of them
    for name, tensor in tensors.items():
        name = re.sub(r"\.\d+\.", ".*.", name)
        rows[name] = (rows[name][0] + 1 if name in rows else 1, tensor)
    shapes = named_shapes(config).values()  # not of scales
    if files.adapter:
        shapes = [tensor.shape for tensor in tensors.values()]
    parameters = sum(map(math.prod, shapes))
    size = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    facts = {
        "path": files.weights,
        "kind": files.kind,
        "source": origin.get("source"),
        "revision": origin.get("revision"),
        "adapter to": files.adapter and files.adapter.base,
        "parameters": f"{parameters:,}",
        "dtype": ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()})),
        "weights": f"{size / 1e9:.3f} GB",
        **dataclasses.asdict(config),
    }
    lines = [f"{key:24}{value}" for key, value in facts.items() if value is not None]
    lines.append("")
    for name, (count, tensor) in rows.items():
        times = f"{count} x " if count > 1 else ""
        lines.append(f"{name:48}{times}{list(tensor.shape)} {tensor.dtype}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m e1jax.convert`: from-hf, to-hf, inspect."""
    prog = "python -m e1jax.convert"
    argv = sys.argv[1:] if argv is None else argv
    check_command(argv, ("from-hf", "to-hf", "inspect"), prog)
    parser = Parser(
        prog=prog,
        description="Convert weights between Hugging Face files and e1jax checkpoints.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "from-hf", help="Hugging Face files to an e1jax checkpoint"
    )
    command.add_argument(
        "src", metavar="SRC", help="hub id, or directory, local or gs://"
    )
    command.add_argument(
        "dst",
        metavar="DST",
        type=parse_path,
        help="new directory to write, local or gs://",
    )
    command.add_argument(
        "--dtype",
        choices=["bfloat16", "float32", "float16"],
        help="number format of the written weights (default: as stored in SRC)",
    )
    command.add_argument(
        "--quantize",
        choices=QUANTIZED,
        help="of the weights, with a scale per output channel: half the size of "
        "bfloat16, for sampling only (default: none)",
    )
    command = commands.add_parser(
        "to-hf", help="e1jax checkpoint to a directory that transformers loads"
    )
    command.add_argument(
        "src",
        metavar="SRC",
        help="e1jax checkpoint, run directory (its best step) or RUN_DIR/STEP",
    )
    command.add_argument(
        "dst",
        metavar="DST",
        type=parse_path,
        help="new directory to write, local or gs://",
    )
    command.add_argument(
        "--adapter",
        metavar="DIR",
        help="adapter to merge into SRC: run directory or peft directory (default: the one "
        "that SRC trained, if it is such a run)",
    )
    command.add_argument(
        "--peft",
        action="store_true",
        help="write the adapter that the run SRC trained alone, as the library peft reads it",
    )
    command = commands.add_parser("inspect", help="show what a model directory holds")
    command.add_argument("src", metavar="DIR", help="model directory of any kind")
    args = parser.parse_args(argv)
    # A conversion needs no accelerator, and must not take one from who uses it.
    jax.config.update("jax_platforms", "cpu")
    if args.command == "inspect":
        print(inspect(args.src))
        return
    if args.command == "from-hf":
        from_hf(args.src, args.dst, args.dtype, args.quantize)
    elif not args.peft:
        to_hf(args.src, args.dst, args.adapter)
    elif args.adapter:
        raise UserError("--peft writes the adapter of SRC; leave --adapter out")
    else:
        to_peft(args.src, args.dst)
    print(f"{args.dst} is written; python -m e1jax.sample --model {args.dst}")


if __name__ == "__main__":
    run_command(main)
