"""Text to token ids and back: chat template, special ids looked up by text.

`tokenizer.json` is loaded exactly as it is. Going through a transformers tokenizer
class would not do: DeepSeek-R1-Distill checkpoints label theirs `LlamaTokenizerFast`,
and several transformers 5 releases then replace its byte-level pre-tokenizer
(transformers issues 45488 and 48206), losing spaces and newlines.
"""

import contextlib
import dataclasses
import json
import math
import re
import reprlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from e1jax.chat_template import MOST_CHARACTERS, render
from e1jax.cli.files import read_json, read_text
from e1jax.config.checks import UserError
from e1jax.config.sampling import check_budget_text
from e1jax.config.texts import check_backslashes

THINK_START = "<think>"
THINK_END = "</think>"


# In tokenizer_config.json, beside the chat template: the text that training ended its
# prompts with.
INSTRUCTION_KEY = "e1jax_instruction"


# Beside it: the text that stated the budgets of each prompt in training.
BUDGET_TEXT_KEY = "e1jax_budget_text"


# Files that a model has beside config.json and weights, each of which may be missing.
GENERATION = "generation_config.json"


TEMPLATES = "additional_chat_templates"  # a directory, of NAME.jinja


FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    f"{TEMPLATES}/*.jinja",
    GENERATION,
)


_MOST_GROWTH = (
    8  # of a text by its normalizer or decoder; honest ones at most double it
)


_PROBE = "  two spaces,\n\na blank line,\ttabs, 3*(x+1)=\\boxed{7} and é漢🙂 \n"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer and the special ids that sampling needs."""

    backend: tokenizers.Tokenizer
    eos_id: int  # its own end of sequence, which training writes
    think_end_id: int | None  # None: the model has no `</think>`
    special_tokens: dict[str, str]  # bos_token, eos_token, ... for the chat template
    chat_template: str | None
    instruction: str | None  # that ended prompts in training, if recorded
    think_start_id: int | None = None  # None: the model has no `<think>`
    more_eos_ids: tuple[int, ...] = ()  # that the model's configuration names
    budget_text: str | None = None  # states a request's budgets; None: they are not

    @classmethod
    def from_dir(cls, path: Path) -> "Tokenizer":
        """Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and
        the chat template.

        Raises UserError if a file is missing or broken, if the EOS token is not known,
        or if the tokenizer loses characters of ordinary text.
        """
        backend = _load_backend(path / "tokenizer.json")
        config = read_json(path / "tokenizer_config.json")
        special = _special_tokens(path, config)
        if "eos_token" not in special:
            raise UserError(
                f"{path / 'tokenizer_config.json'} names no eos_token, so no response could ever end"
            )
        eos_id = backend.token_to_id(special["eos_token"])
        if eos_id is None:
            raise UserError(
                f"{path / 'tokenizer.json'} has no token {special['eos_token']!r}, its eos_token"
            )
        with _one_sentence(f"{path / 'tokenizer.json'} cannot encode text"):
            ids = backend.encode(_PROBE, add_special_tokens=False).ids
            back = backend.decode(ids, skip_special_tokens=False)
        if back != _PROBE:
            raise UserError(
                f"{path / 'tokenizer.json'} does not round-trip text: {_PROBE!r} came back as {back!r}; "
                "take the file from the original model repository"
            )
        instruction = config.get(INSTRUCTION_KEY)
        if not isinstance(instruction, str | None):
            raise UserError(
                f"{path / 'tokenizer_config.json'}: {INSTRUCTION_KEY} must be a text, "
                f"not {reprlib.repr(instruction)}"
            )
        check_backslashes(
            instruction, f"{path / 'tokenizer_config.json'}: {INSTRUCTION_KEY}"
        )
        budget_text = config.get(BUDGET_TEXT_KEY)
        if budget_text is not None:
            where = f"{path / 'tokenizer_config.json'}: {BUDGET_TEXT_KEY}"
            check_budget_text(budget_text, where)
        return cls(
            backend,
            eos_id,
            backend.token_to_id(THINK_END),
            special,
            _chat_template(path, config),
            instruction,
            backend.token_to_id(THINK_START),
            budget_text=budget_text,
        )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids any of which ends a response."""
        return self.eos_id, *self.more_eos_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of the text as it is; nothing is added.

        Raises UserError for a surrogate without its other half, which JSON can hold, for
        more than MOST_CHARACTERS, or where the library fails.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text is not valid Unicode text: {text[: error.end][-20:]!r} ends "
                "in half of a surrogate pair; replace it"
            ) from None
        if len(text) > MOST_CHARACTERS:
            raise UserError(
                f"a text of {len(text)} characters is longer than the {MOST_CHARACTERS} "
                "that become tokens; shorten it"
            )
        with _one_sentence("the tokenizer cannot encode this text"):
            return self.backend.encode(text, add_special_tokens=False).ids

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation in the chat template, up to the answer."""
        if self.chat_template is None:
            raise UserError(
                "this tokenizer has no chat template; pass text as it is (--raw) or prompt_ids"
            )
        ids = self.encode(render(self.chat_template, messages, self.special_tokens))
        if not ids:
            raise UserError(
                "the chat template makes no tokens of these messages; a response needs "
                "a token to start from"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included; unknown ids have no text."""
        with _one_sentence("the tokenizer cannot decode these ids"):
            return self.backend.decode(list(ids), skip_special_tokens=False)


def extract_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}` of a text, or None."""
    # One pass over the braces: a model that never closes its boxes must not cost more.
    opened, best, found = [], -1, None
    for match in re.finditer(r"\\[\\{}](?!boxed)|(\\boxed\s*)?\{|\}", text):
        if match[0][0] == "\\" and match[1] is None:
            continue  # an escaped brace opens and closes nothing
        if match[0] != "}":
            opened.append((match.end(), match[1] is not None))
        elif opened:
            start, is_box = opened.pop()
            if is_box and start > best:
                best, found = start, text[start : match.start()]
    return found


def copy_files(src: Path, dst: Path) -> None:
    """Copies FILES, as far as they exist, from one model directory to another."""
    for pattern in FILES:
        for file in filter(Path.is_file, src.glob(pattern)):
            target = dst / file.relative_to(src)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _special_tokens(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as transformers reads them: `special_tokens_map.json` goes
    before `tokenizer_config.json`, unless that lists its tokens itself, as newer ones do.
    """
    file = path / "special_tokens_map.json"
    if file.is_file() and "added_tokens_decoder" not in config:
        config = config | read_json(file)
    texts = {k: _token_text(v) for k, v in config.items() if k.endswith("_token")}
    return {k: text for k, text in texts.items() if text is not None}


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """The template, from its own file or from `tokenizer_config.json`.

    Where there are several under names, it is the one named "default". As transformers
    does, files go before the configuration, even if none of them is the default.
    """
    files = {file.stem: file for file in (path / TEMPLATES).glob("*.jinja")}
    if (path / "chat_template.jinja").exists():
        files = {"default": path / "chat_template.jinja"} | files
    if "default" in files:
        return read_text(files["default"])
    if files:
        raise UserError(
            f"{path / TEMPLATES} has no template named 'default' but "
            f"{', '.join(sorted(files))}; put the one to use in chat_template.jinja"
        )
    value = config.get("chat_template")
    if isinstance(value, list):
        named = [t for t in value if isinstance(t, dict) and t.get("name") == "default"]
        value = named[-1].get("template", value) if named else value
    if not isinstance(value, str | None):
        raise UserError(
            f"{path / 'tokenizer_config.json'}: chat_template must be a text, or a list "
            f"with a template named 'default', not {reprlib.repr(value)}"
        )
    return value


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UserError(
            f"{path} is missing; e1jax reads the fast tokenizer file that Hugging Face models carry"
        )
    with _one_sentence(f"{path} is not a tokenizer file"):
        backend = tokenizers.Tokenizer.from_file(str(path))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        times = _growth(getattr(backend, part))
        if times > _MOST_GROWTH:
            raise UserError(
                f"{path}: its {part} can make a text {times} times as long, more than "
                f"the {_MOST_GROWTH} allowed; take the file from the original model "
                "repository"
            )
    # A file saved during training may carry the settings of its batches.
    backend.no_truncation()
    backend.no_padding()
    return backend


@contextlib.contextmanager
def _one_sentence(failure: str) -> Iterator[None]:
    """What the Rust library raises as UserError. Its panics are no Exception, nor have
    they a type that could be imported."""
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not panic and not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{failure}: {reason}") from None


def _growth(part: Any) -> int:
    """How many times as long a normalizer, pre-tokenizer or decoder can make a text, as
    far as the texts that it inserts do: a few `Replace` in a row could fill the memory."""
    return 1 if part is None else _growth_of(json.loads(part.__getstate__()))


def _growth_of(part: dict[str, Any]) -> int:
    steps = [s for value in part.values() if isinstance(value, list) for s in value]
    if part["type"] == "Sequence":
        return math.prod(map(_growth_of, steps))
    inserted = len(part.get("content", "")) + len(part.get("prepend", ""))
    if "String" in part.get("pattern", {}) and part["pattern"]["String"]:
        return max(1, math.ceil(inserted / len(part["pattern"]["String"])))
    return 1 + inserted  # before any character, or before all of them


def _token_text(value: Any) -> str | None:
    """A special token is written as a string or as an object with `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


# The chat template has the shape of the E1 / DeepSeek-R1-Distill one: the thinking of
# earlier turns is dropped, and the prompt ends inside a freshly opened <think>.
_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] }}
{%- elif message['role'] == 'user' -%}{{ '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' -%}
{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}
{%- else -%}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\\n' }}{%- endif -%}
"""


def write_byte_tokenizer(path: Path, words: Sequence[str] = ()) -> int:
    """Writes a byte-level tokenizer without merges; returns its number of ids.

    Every byte is one token, so any text round-trips, and so is each of `words`. The
    special tokens are the E1 family's.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    special = [eos, "<｜User｜>", "<｜Assistant｜>", bos]
    backend.add_special_tokens(
        [tokenizers.AddedToken(text, normalized=False) for text in special]
    )
    plain = [THINK_START, THINK_END, *words]
    backend.add_tokens(
        [tokenizers.AddedToken(text, normalized=False) for text in plain]
    )
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "chat_template": _CHAT_TEMPLATE,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (path / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return backend.get_vocab_size()
