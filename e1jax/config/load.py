"""Settings from a YAML file and flags, by jsonargparse; and the record of them in a run directory."""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import jsonargparse
import yaml

from e1jax.config.buckets import in_bucket, open_path, temporary_directory, write_whole
from e1jax.config.checks import (
    LOCK,
    UserError,
    check_known,
    shortened,
    shown,
    writing,
)
from e1jax.config.texts import check_backslashes, two_backslashes

ConfigT = TypeVar("ConfigT")


FlagsT = TypeVar("FlagsT")


def load_config(
    cls: type[ConfigT], argv: Sequence[str], prog: str
) -> tuple[ConfigT, Path]:
    """The configuration (a dataclass) and run directory that a training command names.

    `--config FILE.yaml` is read first, then flags `--section.key value` change values
    in it: YAML keys, flags and dataclass fields are the same names (in a flag, `-` may
    stand for `_`). The run directory is `--run-dir`, by default runs/FILE. Raises
    UserError for an unknown key or flag, a value of the wrong type, and whatever the
    dataclasses refuse.
    """
    config, run_dir, _ = load_config_and_flags(cls, NoFlags, argv, prog)
    return config, run_dir


@dataclasses.dataclass(frozen=True)
class NoFlags:
    """A command whose flags are all settings of the run."""


def load_config_and_flags(
    cls: type[ConfigT], flags: type[FlagsT], argv: Sequence[str], prog: str
) -> tuple[ConfigT, Path, FlagsT]:
    """As `load_config`, and the flags that are no settings of the run, a dataclass."""
    argv = _with_underscores(argv, _flag_names(cls, flags))
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=cls.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with these settings; required"
    )
    parser.add_argument(
        "--run-dir",
        help="directory of the run, which may be in a bucket, gs://BUCKET/PATH (default: "
        "runs/NAME-OF-THE-YAML-FILE)",
    )
    parser.add_class_arguments(flags)
    parser.add_class_arguments(cls)
    try:
        if not {"-h", "--help"} & set(argv):
            _check_names(cls, flags, argv, prog)
        parsed = parser.instantiate(parser.parse_args(_with_local_config(argv)))
    except argparse.ArgumentError as error:
        raise UserError(_sentence(error, (cls, flags), argv)) from None
    except OverflowError:
        raise UserError(f"{_beyond_floats(argv)} must be a smaller number") from None
    run_dir = open_path(parsed.run_dir or Path("runs") / Path(parsed.config[0]).stem)
    config = cls(**{name: parsed[name] for name in _types(cls)})
    others = flags(**{name: parsed[name] for name in _types(flags)})
    return config, run_dir, others


def given_settings(argv: Sequence[str]) -> dict[str, Any]:
    """The settings in the file that --config names; none without one. Raises UserError if
    it cannot be read."""
    try:
        path = _config_path(argv)
    except argparse.ArgumentError:  # of which `load_config` tells
        return {}
    return {} if path is None else read_yaml(open_path(path))


def record_config(config: Any, run_dir: Path) -> None:
    """Writes `config.yaml` to a new run directory; in an old one, refuses any change.

    Raises UserError naming the settings that differ from the run's first ones, and
    for a directory with other content.
    """
    now = yaml.safe_load(json.dumps(dataclasses.asdict(config)))
    path = run_dir / "config.yaml"
    with writing(run_dir):
        if not path.exists():
            run_dir.mkdir(parents=True, exist_ok=True)
            if any(f.name not in ("config.yaml.new", LOCK) for f in run_dir.iterdir()):
                raise UserError(
                    f"{run_dir} holds files but no config.yaml, so it is not the "
                    "directory of a run; take another --run-dir"
                )
            text = yaml.safe_dump(now, sort_keys=False, allow_unicode=True)
            write_whole(path, text)
            return
    then = read_yaml(path)
    _add_defaults(then, config)
    then, now = dict(flatten(then)), dict(flatten(now))
    changes = [
        f"{key} ({shown(then.get(key))} there, {shown(now.get(key))} now)"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
    if changes:
        raise UserError(
            f"{run_dir} was begun with other settings: {', '.join(changes)}; "
            "repeat those, or take another --run-dir"
        )


def _add_defaults(values: dict[str, Any], config: Any) -> None:
    """Adds the settings that `values` lack, each with its default: they came into
    `config`'s class after the file was written."""
    for field in dataclasses.fields(config):
        section, value = getattr(config, field.name), values.get(field.name)
        if dataclasses.is_dataclass(section) and isinstance(value, dict):
            _add_defaults(value, section)
        elif field.default is not dataclasses.MISSING:
            default = json.dumps(field.default, default=dataclasses.asdict)
            values.setdefault(field.name, json.loads(default))


class _DuplicateKey(Exception):
    """A key that a mapping of a YAML file has twice."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which PyYAML takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                raise _DuplicateKey(
                    f"{line}: {key.value} is set a second time, after line "
                    f"{first[key.value]}; remove one of them"
                )
            first[key.value] = line
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file; raises UserError if it is missing or is not one."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except _DuplicateKey as error:
        raise UserError(f"{path} line {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: no UTF-8, a number of endless digits, a day that no month has.
        raise _not_yaml(path, error) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no settings; write lines like 'steps: 100'")
    try:
        json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        # An alias that holds itself, a number of thousands of digits.
        raise UserError(f"{path} holds no settings: {error}") from None
    return value


def _not_yaml(path: Path, error: Exception) -> UserError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or ""
    if mark is None or "escape" not in problem:
        return UserError(f"{path} is not YAML: {' '.join(str(error).split())}")
    start = mark.buffer.rfind("\\", 0, mark.pointer)
    return UserError(
        f"{path} line {mark.line + 1} is not YAML ({problem}); "
        f"{two_backslashes(mark.buffer[start:])}, or use single quotes"
    )


def _flag_names(*classes: Any) -> list[str]:
    return [f"--{name}" for cls in classes for name, _ in flatten(_types(cls))]


def _with_underscores(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """The command line with settings named as in YAML, `--rollout-mesh` among them."""
    found = {name.replace("_", "-"): name for name in names}

    def named(word: str) -> str:
        name, equals, value = word.partition("=")
        return f"{found.get(name, name)}{equals}{value}"

    return [named(word) for word in argv]


def _check_names(cls: Any, flags: Any, argv: Sequence[str], prog: str) -> None:
    """Refuses flags and YAML keys that name no setting, offering the nearest one."""
    names = _flag_names(cls, flags)
    # The last one comes with jsonargparse, which explains it in --help.
    known = [*names, "--config", "--run-dir", "--print_config"]
    given = [word.partition("=")[0] for word in argv if word.startswith("--")]
    check_known(given, known, prog)
    check_one_config(argv)
    path = _config_path(argv)
    if path is None:
        raise UserError(f"{prog} needs --config FILE.yaml; see configs/")
    _check_keys(cls, read_yaml(open_path(path)), path)
    _check_quoted(open_path(path))


def _with_local_config(argv: Sequence[str]) -> list[str]:
    """The command line with a local copy of a --config in a bucket, for jsonargparse."""
    path = _config_path(argv)
    if path is None or not in_bucket(path):
        return list(argv)
    source = open_path(path)
    copy = temporary_directory(source.parent) / source.name
    copy.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    own = {path: str(copy), f"--config={path}": f"--config={copy}"}
    return [own.get(word, word) for word in argv]


def check_one_config(argv: Sequence[str]) -> None:
    """Refuses a second --config: which of both wins should not have to be guessed."""
    if [word.partition("=")[0] for word in argv].count("--config") > 1:
        raise UserError(
            "--config is given twice; give one file, and change its settings by flags, "
            "like --steps 100"
        )


def _check_quoted(path: Path) -> None:
    r"""Refuses double-quoted texts of a YAML file with an escape that looks like LaTeX.

    Not for files that we write: YAML's own writer makes "\_" of a no-break space.
    """
    text = path.read_text(encoding="utf-8")
    for token in yaml.scan(text):
        if not isinstance(token, yaml.ScalarToken) or token.style != '"':
            continue
        quoted = text[token.start_mark.index : token.end_mark.index]
        where = f"{path} line {token.start_mark.line + 1}"
        for escape in re.findall(r"\\(?:[A-Za-z]+|.)", quoted, re.DOTALL):
            if escape[1] in "abefv0_NLP":
                raise UserError(
                    f"{where}: YAML reads {escape[:2]} in double quotes as one "
                    rf"character; write \{escape}, or use single quotes"
                )
        check_backslashes(token.value, where)


def _config_path(argv: Sequence[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    finder.add_argument("--config")
    return finder.parse_known_args(argv)[0].config


def _sentence(
    error: argparse.ArgumentError, kinds: Sequence[Any], argv: Sequence[str]
) -> str:
    """The fault of a value in a few words, from jsonargparse's several lines:
    'Parser key "steps": Expected a <class 'int'>. Got value: five'."""
    text = " ".join(str(error).split()).removeprefix("Parser key ")
    found = re.match(r'"([\w.]+)": .*?(?:Got|Given) value: ?(.*)', text)
    if not found:
        return text
    name, value = found[1], shortened(found[2], 100) or "''"
    kind = {key: kind for cls in kinds for key, kind in flatten(_types(cls))}[name]
    path, places = _config_path(argv), []
    if path is not None and name in dict(flatten(read_yaml(open_path(path)))):
        places.append(f"{path}: {name}")
    if f"--{name}" in [word.partition("=")[0] for word in argv]:
        places.append(f"--{name}")
    where = " or ".join(places) or name
    words = _in_words(kind)
    if get_origin(kind) is tuple:  # of which the value may be an item
        return f"{where} must be {words}; {value} does not fit"
    return f"{where} must be {words}, not {value}"


def _beyond_floats(argv: Sequence[str]) -> str:
    """The settings, with their places, that are whole numbers beyond every float."""
    path = _config_path(argv)
    values = {} if path is None else dict(flatten(read_yaml(open_path(path))))
    found = [
        f"{path}: {k}"
        for k, v in values.items()
        if isinstance(v, int) and abs(v) > sys.float_info.max
    ]
    flags = re.findall(r"(--[\w.]+)[= ]-?\d{300,}", " ".join(argv))
    return " and ".join([*found, *flags])


def _in_words(kind: Any) -> str:
    """The values that a type admits, in words for a message."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(parts)
    if get_origin(kind) is tuple:
        return f"[{', '.join(map(_in_words, parts))}]"
    if get_origin(kind) is dict:
        return f"{{{': '.join(map(_in_words, parts))}}}"
    if parts:  # of a union
        return " or ".join(map(_in_words, parts))
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        ...: "...",
    }
    return words[kind]


def _check_keys(cls: Any, values: dict[str, Any], where: str) -> None:
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    check_known(values, fields, where)
    for key, value in values.items():
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise UserError(
                    f"{where}: {key} is {shown(value)}, but it is a section; write its "
                    "settings below it, indented"
                )
            _check_keys(fields[key], value, f"{where}: {key}")


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _types(cls: Any) -> dict[str, Any]:
    """The type of each field of a dataclass; nested dataclasses become dicts."""
    return {
        f.name: _types(f.type) if dataclasses.is_dataclass(f.type) else f.type
        for f in dataclasses.fields(cls)
    }
