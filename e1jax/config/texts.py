r"""Texts that a user writes into files: JSON, and LaTeX whose backslashes were lost.

In JSON, in double quotes of YAML and in Python, "\frac" is a form feed and "rac".
"""

import json
import re
from pathlib import Path
from typing import Any

from e1jax.config.checks import UserError, shown

# LaTeX commands, by the control character that JSON and YAML make of their backslash and
# first letter. No ordinary line, of a program either, goes on like them after it: hence
# the exceptions for "<tab>an apple", "go<tab>o" and "<newline>eq_1 = ...".
_COMMANDS = {
    "\t": r"""
        tan(?!\s+[a-z]{3}) tanh tag tau tbinom text text(?:bf|it|rm|sf|tt|sc|up|md|sl)
        text(?:normal|style|color|circled|less|greater|subscript|superscript) tfrac theta
        therefore thickapprox thicksim thinspace tilde times tiny to(?![\t\n]|$) top
        triangle triangle(?:down|q|left|right|lefteq|righteq) twohead(?:left|right)arrow
        """,
    "\n": r"""
        nabla natural ncong nearrow neq(?!\d*\s*[=:,._]) newcommand newline ngeq ngeqslant
        ngtr nleq nleqslant noalign nobreak noindent nolimits nonumber normalsize not
        notag notin nprec npreceq nshortmid nsubset nsubseteq nsucc nsucceq nsupset
        nsupseteq ntriangle(?:left|right) nvdash nvDash nVdash nVDash nwarrow
        n(?:left|right|leftright|Left|Right|Leftright)arrow
        """,
    "\r": r"""
        raisebox rangle rbrace rbrack rceil ref renewcommand rfloor rgroup rhd rho right
        right(?:arrow|arrowtail|harpoonup|harpoondown|leftarrows|leftharpoons)
        right(?:rightarrows|squigarrow) risingdotseq rlap rm root rtimes rule rvert rVert
        """,
}


# Lines often begin like these without their first letter, but not within $...$. A price
# in dollars may be followed by "<newline>i) ...".
_COMMANDS_IN_MATH = "ne neg nexists ni(?![).]) nless nmid nparallel nsim nu"


def _remains(control: str, commands: str) -> str:
    """A pattern of the control character, followed by the rest of one of the commands."""
    rests = "|".join(command[1:] for command in commands.split())
    return rf"{control}(?:{rests})(?![A-Za-z])"


# The five before a letter need no table. Elsewhere they may be meant: a page that breaks
# between lines, the colours of a terminal.
_LOST_BACKSLASH = re.compile(
    "([\a\b\v\f\x1b](?:[A-Za-z]{1,20}|{)|"
    + "|".join(_remains(*item) for item in _COMMANDS.items())
    + ")"
)


_IN_MATH = _remains("\n", _COMMANDS_IN_MATH)


# All math, so that its dollars are paired; of the kind that counts, a group.
_MATH = re.compile(
    rf"\$\$[^$]*\$\$|\$(?:[^$\n]*({_IN_MATH})(?:[^$\n]|{_IN_MATH})*|[^$]*)\$"
)


_CONTROLS = {
    "\a": ("a", "a bell"),
    "\b": ("b", "a backspace"),
    "\t": ("t", "a tab"),
    "\n": ("n", "a newline"),
    "\v": ("v", "a vertical tab"),
    "\f": ("f", "a form feed"),
    "\r": ("r", "a carriage return"),
    "\x1b": ("e", "an escape character"),
}


def check_backslashes(value: Any, where: str) -> None:
    r"""Refuses LaTeX whose backslash was read as the beginning of an escape.

    In JSON, in double quotes of YAML and in Python, "\frac" is a form feed and "rac".
    `value` is a text, or a list or dict of texts. Not found are commands that the tables
    above lack, and "\\" that became "\".
    """
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            check_backslashes(item, where)
    elif isinstance(value, str):
        in_math = (math for math in _MATH.finditer(value) if math[1])
        found = _LOST_BACKSLASH.search(value) or next(in_math, None)
        if found:
            letter, control = _CONTROLS[found[1][0]]
            command = f"\\{letter}{found[1][1:]}"
            raise UserError(
                f"{where} holds {control} where {command} seems to be meant; in JSON, "
                rf"YAML and Python write \{command}, or remove that character"
            )


def parse_json(
    text: str | bytes, path: Path | str, line: int = 1, form: str = ""
) -> Any:
    """The value of a JSON text that begins at a line of a file.

    Raises UserError naming the line, and ending in `form`, a description of the expected text.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        reason = f"{error.msg} at column {error.colno}"
        if "escape" in error.msg:
            start = error.doc.rfind("\\", 0, error.pos + 1)
            form = two_backslashes(error.doc[start:])
    except (ValueError, RecursionError) as error:  # endless digits, endless nesting
        reason = str(error)
    hint = f"; {form}" if form else ""
    raise UserError(f"{path} line {line} is not JSON ({reason}){hint}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; of two with the same key, Python would take the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return value


def two_backslashes(text: str) -> str:
    """The way out where a text begins with a backslash that should be two."""
    command = text[:1] + re.sub("(?s)([A-Za-z]+|.).*", r"\1", text[1:])
    return rf"write \{command}, with two backslashes"
