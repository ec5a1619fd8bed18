"""Examples to fine-tune on: records of a file, as token ids and a mask of the learned ones.

A record has one of three forms; its other fields are ignored.

    {"messages": [..., {"role": "assistant", "content": ..., "thinking": ...}]}
    {"prompt": text or messages, "completion": text}
    {"problem": text, "thinking": text, "solution": text}

A prompt becomes token ids exactly as `sample` makes them, and a problem as `train` and
`evaluate` do. Learned are the tokens that a model samples after it: thinking, `</think>`,
solution and EOS. Texts are joined as they are, without a space or line break added.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from e1jax.config.buckets import open_path
from e1jax.config.checks import UserError, shortened, shown
from e1jax.config.texts import check_backslashes
from e1jax.data.problems import dataset_files, read_rows
from e1jax.data.prompts import prompt_text
from e1jax.tokenizer import THINK_END, THINK_START, Tokenizer

FORMS = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "problem": ("problem", "thinking", "solution"),
}


_RULE = (
    "a record is an object with messages, with prompt and completion, or with problem, "
    "thinking and solution"
)


# Of a turn of the assistant, the fields that may hold its thinking: ours, and the names
# that servers give it.
_THINKING = ("thinking", "reasoning_content", "reasoning")


class Example(NamedTuple):
    """A sequence to learn from."""

    token_ids: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] bool: the tokens that are learned


class Turn(NamedTuple):
    """A prompt and the response to it, as texts."""

    prompt: str | list[dict[str, Any]]  # a text as it is, or messages
    response: str  # after the thinking, if that is given
    thinking: str | None  # None: the response may hold it, in tags


def read_examples(
    name: str, tokenizer: Tokenizer, instruction: str, max_len: int, *, raw: bool
) -> tuple[list[Example], int]:
    """The examples of a file or hub dataset (see problems.load_problems) that have at most
    `max_len` tokens, and how many are longer and left out.

    The `instruction` ends the prompt of each problem; with `raw`, a prompt that is a text
    gets no chat template. Raises UserError, naming file, line and field, for a record of
    none or several of the forms, for one without anything to learn, and if none is left.
    """
    files = dataset_files(name)
    is_local = files == [open_path(name).expanduser()]
    kept: list[Example] = []
    lengths: list[int] = []
    for where, record in (row for file in files for row in read_rows(file, _RULE)):
        with _at(where):
            form = find_form(record, raw)
            turns = read_turns(record, form, instruction, raw)
            examples = encode_turns(turns, tokenizer)
        for field in (
            FORMS[form] if is_local else ()
        ):  # others cannot mend a hub dataset
            check_backslashes(record[field], f"{where}: {field}")
        lengths += [len(example.token_ids) for example in examples]
        kept += [example for example in examples if len(example.token_ids) <= max_len]
    if not lengths:
        raise UserError(f"{name} holds no examples")
    if not kept:
        raise UserError(
            f"no example of {name} has at most data.max_len={max_len} tokens; the "
            f"shortest of the {len(lengths)} has {min(lengths)}"
        )
    return kept, len(lengths) - len(kept)


def find_form(record: dict[str, Any], raw: bool) -> str:
    """The one of FORMS that a record has; raises UserError for none or several."""
    given = [name for name, value in record.items() if value is not None]
    found = [form for form, fields in FORMS.items() if set(fields) <= set(given)]
    if len(found) != 1:
        names = shortened(", ".join(given), 200) or "none"
        has = "several of these" if found else f"the fields {names}"
        raise UserError(f"{_RULE}, and this one has {has}")
    [form] = found
    if raw and form != "prompt":
        raise UserError(
            f"data.raw is for prompt and completion, and this one has {form}"
        )
    return form


def read_turns(
    record: dict[str, Any], form: str, instruction: str, raw: bool
) -> list[Turn]:
    """The turns that a record asks to learn; raises UserError for a wrong field."""
    if form == "messages":
        return _turns_of_messages(record["messages"])
    if form == "problem":
        problem, solution = _text(record, "problem"), _text(record, "solution")
        message = {"role": "user", "content": prompt_text(problem, instruction)}
        thinking = _text(record, "thinking", may_be_empty=True)
        return [Turn([message], solution, thinking)]
    prompt, completion = record["prompt"], _text(record, "completion")
    if isinstance(prompt, list):
        return [Turn(_messages(prompt, "prompt"), completion, None)]
    prompt = _text(record, "prompt")
    if not raw:
        prompt = [{"role": "user", "content": prompt}]
    return [Turn(prompt, completion, None)]


def _turns_of_messages(messages: Any) -> list[Turn]:
    """Every turn of the assistant, after the messages before it."""
    messages = _messages(messages, "messages")
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"the last of the messages is of the {messages[-1]['role']}; end with one of "
            "the assistant, which is learned"
        )
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        with _at(f"messages[{index}]"):
            if "tool_calls" in message:
                raise UserError("tool_calls cannot be learned; write them as content")
            name = next((name for name in _THINKING if name in message), None)
            thinking = name and _text(message, name, may_be_empty=True)
            turns.append(Turn(messages[:index], _text(message, "content"), thinking))
    return turns


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    """Chat messages without their empty fields, which parquet fills in."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{field} must be a list of messages, not {shown(value)}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f"{field}[{index}] must be an object with role and content, not "
                f"{shown(message)}"
            )
        messages.append({k: v for k, v in message.items() if v is not None})
    return messages


def _text(record: dict[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text, not {shown(value)}")
    if not may_be_empty and not value.strip():
        raise UserError(f"{name} is empty; fill it or remove the record")
    return value


def encode_turns(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[Example]:
    """Examples of the turns of one conversation.

    A turn goes on in the example of the turn before it, if its prompt begins with all
    tokens of that one; where the chat template changes earlier turns, as by dropping their
    thinking, it is an example of its own. After a prompt that opens `<think>`, a turn
    without its thinking is not learned. Raises UserError if none is.
    """
    examples: list[tuple[list[int], list[bool]]] = []
    for turn in turns:
        prompt_ids = _encode_prompt(turn.prompt, tokenizer)
        response = response_text(turn, prompt_ids, tokenizer)
        if response is None:
            continue
        ids = tokenizer.encode(response)
        if ids[-1:] != [tokenizer.eos_id]:
            ids.append(tokenizer.eos_id)
        before, mask = examples[-1] if examples else ([], [])
        if not before or prompt_ids[: len(before)] != before:
            before, mask = [], []
            examples.append((before, mask))
        mask += [False] * (len(prompt_ids) - len(before)) + [True] * len(ids)
        before += prompt_ids[len(before) :] + ids
    if not examples:
        raise UserError(
            f"the prompt opens {THINK_START} and the response has no {THINK_END}; give "
            "its thinking, as a field of that name or before a </think>"
        )
    return [Example(np.array(i, np.int32), np.array(m, bool)) for i, m in examples]


def _encode_prompt(
    prompt: str | list[dict[str, Any]], tokenizer: Tokenizer
) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.encode_chat(prompt)


def response_text(
    turn: Turn, prompt_ids: Sequence[int], tokenizer: Tokenizer
) -> str | None:
    """The text that follows the prompt, thinking included, which begins with `<think>`
    unless the prompt ends in one; None if the prompt does and the turn has no thinking."""
    start, end = tokenizer.think_start_id, tokenizer.think_end_id
    tags = [i for i, token in enumerate(prompt_ids) if token in (start, end)]
    ending = tokenizer.decode(prompt_ids[tags[-1] :]) if tags else ""  # of the prompt
    is_open = end is not None and ending.startswith(THINK_START)
    if turn.thinking is not None:
        if end is None:
            raise UserError(
                f"the tokenizer of this model has no token {THINK_END}, so its thinking "
                "could not be told from its solution; leave the thinking out"
            )
        if ending.strip() == THINK_END:
            raise UserError(
                f"the prompt ends the thinking by {THINK_END}; leave the thinking out"
            )
        if THINK_END in turn.thinking:
            raise UserError(
                f"the thinking holds {THINK_END}, which is appended to it anyway; leave "
                "it out"
            )
        opening = "" if is_open else THINK_START
        return f"{opening}{turn.thinking}{THINK_END}{turn.response}"
    if not is_open:
        return turn.response
    if THINK_END not in turn.response:
        return None
    # The ending often has a line break.
    return turn.response.removeprefix(ending).removeprefix(THINK_START)


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Puts a place before the sentence of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def examples_digest(examples: Sequence[Example]) -> str:
    """Names the examples, in their order: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for example in examples:
        for array in example:
            found.update(len(array).to_bytes(8, "little"))
            found.update(array.tobytes())
    return found.hexdigest()[:16]
