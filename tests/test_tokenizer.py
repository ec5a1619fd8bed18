"""tokenizer.json is loaded as it is, or refused; the template is rendered once."""

import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import tokenizers
from conftest import edit_json
from transformers import AutoTokenizer

from e1jax import chat_template, processes
from e1jax.chat_template import MOST_CHARACTERS
from e1jax.cli.files import read_json
from e1jax.config.checks import UserError
from e1jax.sampling.request import encode_prompt
from e1jax.tokenizer import (
    Tokenizer,
    _growth,
    copy_files,
    extract_boxed,
    write_byte_tokenizer,
)

TEXTS = ["", " ", "a  b\n\n\tc ", "3*(x+1)=\\boxed{7}", "é漢🙂", "\r\n\x00", "</think>"]
USER = [{"role": "user", "content": "What is 2+2?"}]


@pytest.fixture
def path(tmp_path):
    write_byte_tokenizer(tmp_path, words=[r"\boxed{", "wait"])
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips(path, text):
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def vocabulary(path) -> dict[str, int]:
    return read_json(path / "tokenizer.json")["model"]["vocab"] | {
        token["content"]: token["id"]
        for token in read_json(path / "tokenizer.json")["added_tokens"]
    }


def test_words_are_single_tokens(path):
    tokenizer = Tokenizer.from_dir(path)
    assert len(tokenizer.encode(r"wait \boxed{7}</think>")) == 6
    assert len(vocabulary(path)) == tokenizer.backend.get_vocab_size() == 256 + 8


def test_special_ids_are_looked_up_by_text(path):
    """Also where they are written as objects, and at other numbers than in E1."""
    tokenizer = Tokenizer.from_dir(path)
    ids = vocabulary(path)
    assert tokenizer.eos_id == ids["<｜end▁of▁sentence｜>"]
    assert tokenizer.think_end_id == ids["</think>"]
    edit_json(
        path / "tokenizer_config.json",
        eos_token={"__type": "AddedToken", "content": "<｜User｜>"},
        pad_token=None,
    )
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer.eos_id == ids["<｜User｜>"]
    assert set(tokenizer.special_tokens) == {"bos_token", "eos_token"}


def test_a_model_without_think_end(path):
    text = (path / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace("</think>", "</other>")
    (path / "tokenizer.json").write_text(text, encoding="utf-8")
    assert Tokenizer.from_dir(path).think_end_id is None


def test_byte_level_file_with_a_llama_label(path):
    """As DeepSeek-R1-Distill has it. The class of that name would lose the spaces."""
    plain = Tokenizer.from_dir(path)
    edit_json(path / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    labelled = Tokenizer.from_dir(path)
    text = "one  two\n\n three"
    assert labelled.encode(text) == plain.encode(text)
    assert labelled.decode(labelled.encode(text)) == text


def test_a_tokenizer_that_loses_text_is_refused(path):
    intact = (path / "tokenizer.json").read_text(encoding="utf-8")
    losing = [
        tokenizers.pre_tokenizers.Metaspace(),
        tokenizers.pre_tokenizers.Sequence(  # without newlines
            [
                tokenizers.pre_tokenizers.Split("\n", "removed"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
    ]
    for pre_tokenizer in losing:
        backend = tokenizers.Tokenizer.from_str(intact)
        backend.pre_tokenizer = pre_tokenizer
        backend.save(str(path / "tokenizer.json"))
        with pytest.raises(UserError, match="does not round-trip") as error:
            Tokenizer.from_dir(path)
        assert str(path / "tokenizer.json") in str(error.value)


def test_bos_stands_exactly_once(path):
    """Also where tokenizer.json itself would add one to every text."""
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    bos = backend.token_to_id("<｜begin▁of▁sentence｜>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<｜begin▁of▁sentence｜> $A",
        special_tokens=[("<｜begin▁of▁sentence｜>", bos)],
    )
    backend.save(str(path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer.encode_chat(USER).count(bos) == 1
    assert tokenizer.encode_chat(USER)[0] == bos
    assert bos not in tokenizer.encode("raw text")


def test_chat_template(path):
    tokenizer = Tokenizer.from_dir(path)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nhm</think>2"},
        {"role": "user", "content": "2+2?"},
    ]
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1+1?<｜Assistant｜>2"
        "<｜end▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜><think>\n"
    )
    with pytest.raises(UserError, match="chat template refuses"):
        tokenizer.encode_chat([{"role": "wizard", "content": "?"}])
    with pytest.raises(UserError, match="chat template refuses"):
        tokenizer.encode_chat([{"role": "user"}])


def test_chat_template_in_its_own_file(path):
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer.decode(tokenizer.encode_chat(USER)) == "What is 2+2?!"


def test_chat_template_in_a_list(path):
    """As older files have it, under names."""
    templates = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ messages[0]['content'] }}!"},
    ]
    edit_json(path / "tokenizer_config.json", chat_template=templates)
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer.decode(tokenizer.encode_chat(USER)) == "What is 2+2?!"


NAMED = {"default": "{{ messages[0]['content'] }}!", "rag": "R", "a.b": "{{ 1 }}"}


@pytest.mark.parametrize("as_files", [True, False])
def test_several_templates_as_transformers_saves_them(path, tmp_path, as_files):
    """In a directory of their own, or in the list that older versions write."""
    theirs = AutoTokenizer.from_pretrained(path)
    theirs.chat_template = NAMED
    theirs.save_pretrained(tmp_path / "saved", save_jinja_files=as_files)
    assert (tmp_path / "saved" / "additional_chat_templates").is_dir() == as_files
    as_transformers_does(tmp_path / "saved", "What is 2+2?!")
    if as_files:  # a file of that name goes before the one outside
        default = tmp_path / "saved" / "additional_chat_templates" / "default.jinja"
        default.write_text("{{ messages[0]['content'] }}?")
        as_transformers_does(tmp_path / "saved", "What is 2+2??")


def as_transformers_does(path, prompt: str) -> None:
    """The prompt of USER is this one, to both."""
    tokenizer, theirs = Tokenizer.from_dir(path), AutoTokenizer.from_pretrained(path)
    ids = tokenizer.encode_chat(USER)
    assert tokenizer.decode(ids) == prompt
    rendered = theirs.apply_chat_template(
        USER, add_generation_prompt=True, tokenize=False
    )
    assert rendered == prompt
    assert tokenizer.eos_id == theirs.eos_token_id


def test_named_templates_without_a_default(path):
    """As transformers sees it, tokenizer_config.json has no template then."""
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("R")
    theirs = AutoTokenizer.from_pretrained(path)
    with pytest.raises(ValueError, match="no default specified"):
        theirs.apply_chat_template(USER)
    with pytest.raises(UserError, match="no template named 'default' but rag") as error:
        Tokenizer.from_dir(path)
    assert str(path) in str(error.value)


EOS, USER_TOKEN = "<｜end▁of▁sentence｜>", "<｜User｜>"


@pytest.mark.parametrize(
    ("in_config", "in_map", "eos"),
    [
        ({"eos_token": None}, {"eos_token": EOS}, EOS),
        ({"eos_token": None}, {"eos_token": {"content": EOS, "lstrip": False}}, EOS),
        ({}, {"eos_token": USER_TOKEN}, USER_TOKEN),
        ({}, {"pad_token": USER_TOKEN}, EOS),
        # A tokenizer_config.json that lists its tokens is complete.
        ({"added_tokens_decoder": {}}, {"eos_token": USER_TOKEN}, EOS),
    ],
)
def test_special_tokens_in_a_file_of_their_own(path, in_config, in_map, eos):
    edit_json(path / "tokenizer_config.json", **in_config)
    (path / "special_tokens_map.json").write_text(json.dumps(in_map), encoding="utf-8")
    tokenizer, theirs = Tokenizer.from_dir(path), AutoTokenizer.from_pretrained(path)
    assert tokenizer.special_tokens["eos_token"] == theirs.eos_token == eos
    assert tokenizer.eos_id == theirs.eos_token_id == vocabulary(path)[eos]
    assert tokenizer.special_tokens == theirs.special_tokens_map


def test_copied_files(path, tmp_path):
    """All that transformers may have saved of a tokenizer, and no other file."""
    theirs = AutoTokenizer.from_pretrained(path)
    theirs.chat_template = NAMED
    theirs.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "special_tokens_map.json").write_text("{}")
    (tmp_path / "saved" / "generation_config.json").write_text("{}")
    saved = {
        file.relative_to(tmp_path / "saved"): file.read_bytes()
        for file in (tmp_path / "saved").rglob("*.*")
        if file.is_file()
    }
    assert len(saved) == 7
    (tmp_path / "saved" / "training_args.bin").write_bytes(b"0")
    (tmp_path / "copy").mkdir()
    copy_files(tmp_path / "saved", tmp_path / "copy")
    assert saved == {
        file.relative_to(tmp_path / "copy"): file.read_bytes()
        for file in (tmp_path / "copy").rglob("*.*")
        if file.is_file()
    }


def test_the_error_of_a_template_is_one_line(path):
    (path / "chat_template.jinja").write_text("{{ raise_exception('one\n\n  two') }}")
    with pytest.raises(UserError, match=r"refuses these messages: one two$"):
        Tokenizer.from_dir(path).encode_chat(USER)


LOOP = "{% for i in range(99999) %}"
SAID = "{{ messages[0]['content'] }}!"
BOMBS = {
    LOOP * 4 + "{% endfor %}" * 4: "took more than 2 s",
    # Doubled by each round, to 2^60 characters.
    "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}": "more than 2 (s|GiB) ",
    "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(9) %}"
    "{% set n.s = n.s.replace('a', n.s) %}{% endfor %}{{ n.s }}": "more than",
    "{{ 'a' | center(10 ** 10) }}": "takes more than 2 GiB",
    "{{ 'a' * 10 ** 10 }}": "takes more than 2 GiB",
    "{{ 7 ** (7 ** 12) }}": "took more than 2 s",
    "{{ 'a' * 10 ** 7 }}": f"10000000 characters, more than the {MOST_CHARACTERS}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "maximum recursion depth",
    "": "makes no tokens of these messages",
    "{# nothing #}": "makes no tokens of these messages",
}


@pytest.mark.parametrize("template", BOMBS)
def test_a_template_that_does_not_end_or_fills_the_memory(path, template):
    """Is one sentence, wherever the request comes from, and leaves nothing behind."""
    (path / "chat_template.jinja").write_text(template)
    bomb = Tokenizer.from_dir(path)
    (path / "chat_template.jinja").write_text(SAID)
    good = Tokenizer.from_dir(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(1) as threads:  # no signal reaches another thread
        with pytest.raises(UserError, match=BOMBS[template]) as error:
            threads.submit(bomb.encode_chat, USER).result(timeout=120)
        assert "\n" not in str(error.value)
        ids = threads.submit(good.encode_chat, USER).result(timeout=60)
    assert good.decode(ids) == good.decode(good.encode_chat(USER)) == "What is 2+2?!"
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < 200e6  # macOS counts bytes, which is stricter


def test_templates_are_rendered_after_their_process_was_killed(path):
    tokenizer = Tokenizer.from_dir(path)
    ids = tokenizer.encode_chat(USER)
    process = chat_template._renderer(os.getpid())._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    assert tokenizer.encode_chat(USER) == ids


def test_an_interrupted_request_leaves_no_reply_behind(path, monkeypatch):
    tokenizer = Tokenizer.from_dir(path)
    ids = tokenizer.encode_chat(USER)
    with monkeypatch.context() as patch:
        patch.setattr(processes.os, "read", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tokenizer.encode_chat([{"role": "user", "content": "another"}])
    assert tokenizer.encode_chat(USER) == ids


def test_messages_are_rendered_as_transformers_does(path):
    """The values of a message cross to another process, and so do the special tokens."""
    (path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}"
        "{% endfor %}{{ add_generation_prompt }}"
    )
    numpy = {"i": np.int64(7), "f": np.float64(0.1), "b": np.bool_(False)}
    tools = [{"name": "f", "arguments": {"x": [1, 2.5, None, True]}}]
    messages = [
        {"role": "user", "content": "é漢🙂\x00\n \u2028", **numpy},
        {"role": "assistant", "content": "", "tool_calls": tools, "reasoning": "hm"},
    ]
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == theirs


def test_messages_that_are_no_json(path):
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    tokenizer = Tokenizer.from_dir(path)
    for value in (object(), nested, {1, 2}, 10**5000):
        with pytest.raises(UserError, match="cannot be written as JSON"):
            tokenizer.encode_chat([{"role": "user", "content": "?", "more": value}])


def test_prompts_without_tokens_name_their_place(path):
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    tokenizer = Tokenizer.from_dir(path)
    for prompt in ("", [], [{"role": "user", "content": ""}]):
        with pytest.raises(UserError, match=r"^prompt 7.* token to start from$"):
            encode_prompt(prompt, "prompt 7", tokenizer, 264)
    nested: list = []
    for _ in range(20_000):  # Python 3.13 writes some 10,000
        nested = [nested]
    with pytest.raises(UserError, match=r"^prompt 7: these messages cannot be written"):
        encode_prompt([{"content": nested}], "prompt 7", tokenizer, 264)
    with pytest.raises(UserError, match=r"^prompt 7 holds a form feed where \\frac"):
        encode_prompt("\frac", "prompt 7", tokenizer, 264)


def test_texts_that_no_context_holds(path):
    """A hundred megabytes ended the program, for want of memory."""
    tokenizer = Tokenizer.from_dir(path)
    for size in (MOST_CHARACTERS + 1, 100_000_000):
        with pytest.raises(UserError, match=f"text of {size} characters is longer"):
            tokenizer.encode("x" * size)
        with pytest.raises(UserError, match="more than") as error:
            tokenizer.encode_chat([{"role": "user", "content": "x" * size}])
        assert len(str(error.value)) < 300


Replace = tokenizers.normalizers.Replace
BELLS = {
    # 10^10 bells for each one.
    "normalizer": tokenizers.normalizers.Sequence([Replace("\a", "\a" * 10)] * 10),
    "decoder": tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteLevel()]
        + [tokenizers.decoders.Replace("\a", "\a" * 10)] * 10
    ),
}


@pytest.mark.parametrize("part", BELLS)
def test_a_tokenizer_that_blows_texts_up_is_refused(path, part):
    """Before it is tried: nothing in `_PROBE` has to trigger it."""
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    setattr(backend, part, BELLS[part])
    backend.save(str(path / "tokenizer.json"))
    with pytest.raises(
        UserError, match=f"its {part} can make a text 10000000000 times"
    ):
        Tokenizer.from_dir(path)


@pytest.mark.parametrize(
    ("normalizer", "times"),
    [
        (None, 1),
        (tokenizers.normalizers.NFC(), 1),
        (Replace(" ", "▁"), 1),
        (Replace("abc", "abcde"), 2),
        (Replace("abc", ""), 1),
        (Replace("", "ab"), 3),
        (Replace(tokenizers.Regex("b*"), "abc"), 4),
        (tokenizers.normalizers.Prepend("▁"), 2),
        (
            tokenizers.normalizers.Sequence(
                [
                    Replace("a", "bb"),
                    tokenizers.normalizers.Sequence([Replace("b", "ccc")]),
                ]
            ),
            6,
        ),
    ],
)
def test_growth_bounds_what_a_normalizer_does(normalizer, times):
    assert _growth(normalizer) == times
    for text in ("a" * 30, "abc" * 10, "b", " x", "xyz"):
        if normalizer is not None:
            assert len(normalizer.normalize_str(text)) <= times * len(text) + times


def test_a_panic_of_the_library_is_one_sentence(path):
    """Its exception is no `Exception`."""
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    catastrophic = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("(a+)+$"), "isolated"
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [catastrophic, backend.pre_tokenizer]
    )
    backend.save(str(path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(path)
    for encode in (
        lambda: tokenizer.encode("a" * 40 + "!"),
        lambda: tokenizer.encode_chat([{"role": "user", "content": "a" * 40 + "!"}]),
    ):
        with pytest.raises(UserError, match="cannot encode this text: Onig"):
            encode()
    with pytest.raises(UserError, match="cannot decode these ids"):
        tokenizer.decode([2**40])


def test_a_lone_surrogate_is_refused(path):
    """JSON can hold one ("\\ud800"), and so can an argument that is not UTF-8."""
    tokenizer = Tokenizer.from_dir(path)
    with pytest.raises(UserError, match="not valid Unicode text") as error:
        tokenizer.encode("a\ud800b")
    assert r"'a\ud800'" in str(error.value)
    with pytest.raises(UserError, match="not valid Unicode text"):
        tokenizer.encode_chat([{"role": "user", "content": "\udcff" * 1000}])


def test_json_with_a_byte_order_mark(path):
    file = path / "tokenizer_config.json"
    plain = read_json(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_json(file) == plain


def test_no_chat_template(path):
    edit_json(path / "tokenizer_config.json", chat_template=None)
    with pytest.raises(UserError, match="--raw"):
        Tokenizer.from_dir(path).encode_chat(USER)


def test_unknown_ids_have_no_text(path):
    tokenizer = Tokenizer.from_dir(path)
    ids = tokenizer.encode("a")
    assert tokenizer.decode([9999, *ids, 300]) == "a"
    assert tokenizer.decode([9999]) == tokenizer.decode([]) == ""


def test_settings_of_a_training_run_are_off(path):
    """A file may carry them; then long prompts would be cut, short ones padded."""
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(path)
    assert len(tokenizer.encode("a")) == 1 and len(tokenizer.encode("a" * 9)) == 9


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda p: (p / "tokenizer_config.json").unlink(), "tokenizer_config.json"),
        (lambda p: (p / "tokenizer_config.json").write_text("{"), "is not JSON"),
        (lambda p: (p / "tokenizer_config.json").write_text("3"), "int"),
        (lambda p: edit_json(p / "tokenizer_config.json", eos_token=None), "eos_token"),
        (lambda p: edit_json(p / "tokenizer_config.json", eos_token="<x>"), "'<x>'"),
        (
            lambda p: (p / "tokenizer_config.json").write_text("[" * 200_000),
            "is not JSON",
        ),
        (
            lambda p: (p / "chat_template.jinja").write_bytes(b"\xff\xfe"),
            "chat_template.jinja is not UTF-8",
        ),
        (lambda p: (p / "chat_template.jinja").mkdir(), "chat_template.jinja cannot"),
        (
            lambda p: edit_json(
                p / "tokenizer_config.json", chat_template=[{"name": "rag"}, 5]
            ),
            "chat_template must be a text, or a list with a template named 'default'",
        ),
        (
            lambda p: edit_json(p / "tokenizer_config.json", chat_template={"a": 1}),
            "chat_template must be",
        ),
        (
            lambda p: edit_json(
                p / "tokenizer_config.json", e1jax_instruction="Use \boxed{}."
            ),
            r"e1jax_instruction holds a backspace where \boxed",
        ),
    ],
)
def test_missing_or_broken_files(path, spoil, named):
    spoil(path)
    with pytest.raises(UserError) as error:
        Tokenizer.from_dir(path)
    assert named in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{}", ""),
        (r"\boxed {4}", "4"),
        ("\\boxed\n{4}", "4"),
        (r"\boxed{\left\{ 1,2 \right.}", r"\left\{ 1,2 \right."),
        (r"\boxed{\{1\}\cup\{2\}}", r"\{1\}\cup\{2\}"),
        (r"\boxed{1\\}", r"1\\"),  # a line break, then the brace
        (r"\} \\boxed{3} \{", "3"),
        (r"\boxed 7 and boxed{8}", None),
        ("", None),
    ],
)
def test_extract_boxed(text, content):
    assert extract_boxed(text) == content


def test_chat_template_without_torch_says_nothing(tmp_path):
    """As on every machine that installs the package alone."""
    write_byte_tokenizer(tmp_path)
    script = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path\n"
        "from e1jax.tokenizer import Tokenizer\n"
        f"tokenizer = Tokenizer.from_dir(Path({str(tmp_path)!r}))\n"
        "print(len(tokenizer.encode_chat([{'role': 'user', 'content': 'hi'}])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("7\n", "")
