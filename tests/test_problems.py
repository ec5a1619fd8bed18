"""Problems from files, hub datasets and the nano task; prompts and their batches."""

import json
import re
from collections import Counter
from pathlib import Path

import huggingface_hub
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
from conftest import edit_json
from hypothesis import HealthCheck, given, settings

from e1jax import data
from e1jax.cli.files import read_json
from e1jax.config.checks import UserError
from e1jax.config.texts import check_backslashes
from e1jax.data.nano import held_out_problems, nano_problems
from e1jax.data.problems import Problem, load_problems
from e1jax.data.prompts import (
    DEFAULT_INSTRUCTION,
    EncodedProblem,
    default_instruction,
    encode_problems,
    prompt_batches,
    prompt_text,
)
from e1jax.tokenizer import Tokenizer, write_byte_tokenizer


def write(path: Path, rows: list, *, ascii_only: bool = True) -> str:
    """Rows in the format of the file's name."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        text = json.dumps(rows, indent=2, ensure_ascii=ascii_only)
        path.write_text(text, encoding="utf-8", newline="")
    else:
        lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8", newline="")
    return str(path)


# Nano datasets


def test_nano_datasets_share_no_problem():
    nano, validation, train = map(
        load_problems, ("nano", "nano-validation", "nano-train")
    )
    assert [len(nano), len(validation), len(train)] == [1024, 256, 16384]
    texts = {p.text for p in (*nano, *validation, *train)}
    assert len(texts) == 1024 + 256 + 16384
    assert [{"problem": p.text, "answer": p.answers[0]} for p in nano] == (
        held_out_problems(1024)
    )
    held_out = {p.text: p.answer for p in nano_problems(1280, held_out=True)}
    assert all((held_out[p.text],) == p.answers for p in validation)
    trained = {p.text: p.answer for p in nano_problems(16384, held_out=False)}
    assert all((trained[p.text],) == p.answers for p in train)
    for problems in (nano, validation, train):
        assert [p.id for p in problems] == list(range(len(problems)))


@pytest.mark.parametrize("name", ["nano", "nano-validation", "nano-train"])
def test_a_limit_takes_the_first_problems(name):
    assert load_problems(name, limit=7) == load_problems(name)[:7]
    assert load_problems(name, limit=10**6) == load_problems(name)


# Files


def has_its_backslashes(text: str) -> bool:
    try:
        check_backslashes(text, "")
    except UserError:
        return False
    return True


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
texts = texts.filter(str.strip).filter(has_its_backslashes)
# Answers that stay as they are.
plain = texts.filter(
    lambda text: not re.search(r"boxed|####|\n|\r", text.strip(), re.DOTALL)
)
numbers = st.integers(-(10**30), 10**30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(texts, plain | numbers | st.lists(plain | numbers, min_size=1)),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.sampled_from(["x.json", "x.jsonl", "no suffix"]),
)
def test_json_and_jsonl_round_trip(tmp_path, pairs, ascii_only, name):
    """Whatever characters the texts hold, line separators of all kinds among them."""
    rows = [{"problem": text, "answer": answer} for text, answer in pairs]
    problems = load_problems(write(tmp_path / name, rows, ascii_only=ascii_only))
    assert [p.text for p in problems] == [text for text, _ in pairs]
    for problem, (_, answer) in zip(problems, pairs, strict=True):
        answers = answer if isinstance(answer, list) else [answer]
        assert problem.answers == tuple(map(str, answers))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(texts, st.lists(plain, min_size=1)), min_size=1, max_size=5))
def test_parquet_round_trips(tmp_path, pairs):
    rows = [{"problem": text, "answer": answers} for text, answers in pairs]
    problems = load_problems(write(tmp_path / "x.parquet", rows))
    assert problems == [
        Problem(i, text, tuple(answers)) for i, (text, answers) in enumerate(pairs)
    ]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.parquet"])
def test_a_limit_takes_the_first_problems_of_a_file(tmp_path, name):
    rows = [{"problem": f"p{i}", "answer": i} for i in range(9)]
    file = write(tmp_path / name, rows)
    assert load_problems(file, limit=4) == load_problems(file)[:4]
    assert load_problems(file)[3] == Problem(3, "p3", ("3",))
    assert len(load_problems(file, limit=100)) == 9
    for limit in (0, -1, 2.5, True):
        with pytest.raises(UserError, match="limit must be"):
            load_problems(file, limit=limit)


def test_rows_beyond_the_limit_are_not_looked_at(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"problem": "p", "answer": 1}\n{')
    assert len(load_problems(str(tmp_path / "x.jsonl"), limit=1)) == 1


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_byte_order_mark_and_blank_lines(tmp_path, name):
    path = tmp_path / name
    write(path, [{"problem": "p", "answer": 1}, {"problem": "q", "answer": 2}])
    path.write_bytes(
        b"\xef\xbb\xbf\r\n" + path.read_bytes().replace(b"\n", b" \r\n\n\n")
    )
    problems = load_problems(str(path))
    assert problems == [Problem(0, "p", ("1",)), Problem(1, "q", ("2",))]


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("025", ["025"]),
        (" 3 ", [" 3 "]),
        ("$2^{1009}$", ["$2^{1009}$"]),
        (r"\boxed{42}", ["42"]),
        (r"so $\boxed{\frac{1}{2}}$.", [r"\frac{1}{2}"]),
        (r"\boxed{unclosed", [r"\boxed{unclosed"]),
        (["1/2", r"\boxed{0.5}", 0.5], ["1/2", "0.5", "0.5"]),
        (0, ["0"]),
        (-17, ["-17"]),
        (10**40, ["1" + "0" * 40]),
        (142.0, ["142"]),
        (120.0, ["120"]),
        (0.1, ["0.1"]),
        (1e-7, ["0.0000001"]),
        (1e22, ["1" + "0" * 22]),
        (-2.5e-3, ["-0.0025"]),
        (1234567890.1234567, ["1234567890.1234567"]),
    ],
)
def test_accepted_answers(tmp_path, answer, accepted):
    file = write(tmp_path / "x.json", [{"problem": "p", "answer": answer}])
    assert load_problems(file) == [Problem(0, "p", tuple(accepted))]


def test_fields_and_ids(tmp_path):
    rows = [
        {"question": "a", "final_answer": ["1", "2"], "id": "own"},
        {"prompt": "b", "answer": 3, "unique_id": "test/3.json", "problem": None},
        {"problem": "c", "question": "other", "prompt": "other", "answer": "4"},
        {"problem": "d", "answer": "5", "final_answer": "6", "id": 7, "unique_id": "u"},
        {"problem": "e", "answer": "", "final_answer": "8", "id": None},
    ]
    expected = [
        Problem("own", "a", ("1", "2")),
        Problem("test/3.json", "b", ("3",)),
        Problem(2, "c", ("4",)),
        Problem(7, "d", ("5",)),
        Problem(4, "e", ("8",)),
    ]
    assert load_problems(write(tmp_path / "x.jsonl", rows)) == expected


def test_problems_are_plain_values_from_parquet_too(tmp_path):
    """Columns of small integers, floats and lists, with other columns beside them."""
    table = pyarrow.table(
        {
            "id": pyarrow.array([60, 61], pyarrow.int16()),
            "problem": pyarrow.array(["p", "q"]).dictionary_encode(),
            "answer": pyarrow.array([25.0, 0.5], pyarrow.float64()),
            "image": [b"\x89", None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.bin")
    problems = load_problems(str(tmp_path / "x.bin"))
    assert problems == [Problem(60, "p", ("25",)), Problem(61, "q", ("0.5",))]
    assert {type(p.id) for p in problems} == {int}


def test_worked_solutions_are_answers(tmp_path):
    """As in GSM8K, and in the MATH dataset."""
    worked = ["48/2 = <<48/2=24>>24 clips.\n#### 24", "So $x=2$ or\n$\\boxed{x=3}$."]
    path = write(tmp_path / "x.jsonl", [{"question": "q", "answer": worked}])
    assert [a.strip() for a in load_problems(path)[0].answers] == ["24", "x=3"]


BAD_ROWS = [
    ("p", "not 'p'"),
    ([{"problem": "p"}], "a problem is an object"),
    (None, "not None"),
    ({}, "no field problem or question or prompt; its fields are: none"),
    (
        {"statement": "p", "answer": "1"},
        "no field problem or question or prompt; its fields are: statement, answer",
    ),
    (
        {"problem": "p", "solution": "s", "level": 3},
        "no field answer or final_answer; its fields are: problem, solution, level",
    ),
    ({"problem": "", "answer": "1"}, "problem is empty"),
    ({"problem": " \n", "answer": "1"}, "problem is empty"),
    ({"problem": None, "answer": "1"}, "problem is empty"),
    ({"problem": 5, "answer": "1"}, "problem must be a text, not 5"),
    ({"prompt": [{"role": "user"}], "answer": "1"}, "prompt must be a text"),
    ({"problem": "a\ud800", "answer": "1"}, "problem is not valid Unicode"),
    ({"problem": "p", "answer": None}, "answer is empty"),
    ({"problem": "p", "answer": ""}, "answer is empty"),
    ({"problem": "p", "answer": " "}, "answer is empty"),
    ({"problem": "p", "answer": []}, "answer is empty"),
    ({"problem": "p", "answer": [""]}, "answer must be a text, a number or a list"),
    ({"problem": "p", "answer": ["1", None]}, "list of those, not None"),
    ({"problem": "p", "answer": [["1"]]}, r"list of those, not \['1'\]"),
    ({"problem": "p", "answer": True}, "not True"),
    ({"problem": "p", "answer": [False]}, "not False"),
    ({"problem": "p", "answer": {"a": 1}}, "not {'a': 1}"),
    ({"problem": "p", "answer": float("nan")}, "not nan"),
    ({"problem": "p", "answer": float("inf")}, "not inf"),
    ({"problem": "p", "answer": r"\boxed{}"}, "not ''"),
    ({"problem": "p", "answer": "48\n72"}, "answer has several lines"),
    ({"problem": "p", "answer": "48\n####"}, "not ''"),
    ({"problem": "p", "answer": "\udcff"}, "answer is not valid Unicode"),
    ({"problem": "p", "answer": "1", "id": True}, "id must be a text or a whole"),
    ({"problem": "p", "answer": "1", "id": 1.0}, "id must be a text or a whole"),
    ({"problem": "p", "answer": "1", "id": ""}, "id must be a text or a whole"),
    ({"problem": "p", "answer": "1", "unique_id": []}, "id must be a text or a whole"),
    ({"problem": "p", "answer": "1", "id": "first"}, "has the id 'first' too"),
    ({"problem": "p", "answer": "1", "id": 2}, "has the id 2 too"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
@pytest.mark.parametrize(
    ("name", "place"), [("x.json", " index 3"), ("x.jsonl", " line 4")]
)
def test_a_bad_row_is_named(tmp_path, row, message, name, place):
    good = {"problem": "p", "answer": "1"}
    file = write(tmp_path / name, [good | {"id": "first"}, good, good, row])
    with pytest.raises(UserError, match=message) as error:
        load_problems(file)
    assert str(error.value).startswith(file + place)
    assert "\n" not in str(error.value)


# Without its double backslashes this is JSON, but no longer the problem.
LATEX = [
    {"problem": r"If $\tan x=\frac{1}{2}$, what is $x$?", "answer": "1"},
    {"question": r"Is $a \neq b$, $\boxed{1}$ or $x \ne 0$?", "final_answer": ["1"]},
    {"prompt": "p", "answer": r"\text{east}"},
    {"problem": "p", "answer": ["1", r"\frac{1}{2}"]},
    {"problem": "p", "final_answer": r"\boxed{\theta}"},
]


@pytest.mark.parametrize("row", LATEX)
@pytest.mark.parametrize(
    ("name", "place"), [("x.json", " index 1"), ("x.jsonl", " line 2")]
)
def test_a_lost_backslash_is_named(tmp_path, row, name, place):
    good = {"problem": "p", "answer": "1"}
    file = Path(write(tmp_path / name, [good, row]))
    assert len(load_problems(str(file))) == 2
    file.write_text(file.read_text().replace("\\\\", "\\"))
    with pytest.raises(UserError, match=r"seems to be meant; in JSON") as error:
        load_problems(str(file))
    assert str(error.value).startswith(f"{file}{place}: ")
    assert len(load_problems(str(file), limit=1)) == 1
    broken = [json.loads(json.dumps(row).replace("\\\\", "\\"))]
    file = write(tmp_path / "x.parquet", broken)
    with pytest.raises(UserError, match=r"parquet index 0: \w+ holds a"):
        load_problems(file)


def test_fields_that_are_not_used_are_not_looked_at(tmp_path):
    row = {"problem": "p", "answer": "1", "solution": "\frac12", "id": "\textbf"}
    assert len(load_problems(write(tmp_path / "x.json", [row]))) == 1


def test_a_single_backslash_that_is_not_json(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n{"problem": "$\\sqrt2$"}')
    with pytest.raises(UserError) as error:
        load_problems(str(path))
    assert str(error.value) == (
        rf"{path} line 2 is not JSON (Invalid \escape at column 15); write \\sqrt, with "
        "two backslashes"
    )


def test_a_bad_row_of_parquet_is_named(tmp_path):
    rows = [{"problem": "p", "answer": "1"}, {"problem": "p", "answer": None}]
    file = write(tmp_path / "x.parquet", rows)
    with pytest.raises(UserError, match="answer is empty") as error:
        load_problems(file)
    assert str(error.value).startswith(f"{file} index 1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no problems"),
        (b"\n \n", "holds no problems"),
        (b"[]", "holds no problems"),
        (b'[{"problem": "p",\n "answer": 1},\n {', "line 3 is not JSON"),
        (b'[{"problem": "p",\n "answer": 1,}]', "line 2 is not JSON"),
        (b'[{"problem": "p", "answer": 1}]\n[]', "line 2 is not JSON"),
        (b'{"problem": "p", "answer": 1}\n\n{"problem"\n', "line 3 is not JSON"),
        (b'{"problem": "p",\n"answer": 1}', "or one object a line"),
        (b'{"problem": "p", "answer": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        (b"[" * 200_000, "line 1 is not JSON"),
        (b'{"problem": "\xff"}', "neither parquet nor UTF-8"),
        (b"PAR1 and no more", "not a whole parquet file"),
        (b'{"data": [{"problem": "p"}]}', "its fields are: data"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_problems(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_parquet_file_that_is_cut_or_damaged(tmp_path):
    rows = [{"problem": f"{i}" * 50, "answer": i} for i in range(500)]
    path = Path(write(tmp_path / "x.parquet", rows))
    whole = path.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a whole parquet file"):
            load_problems(str(path))
    path.write_bytes(whole[:50] + b"\xff" * 200 + whole[250:])
    with pytest.raises(UserError, match="is not a whole parquet file"):
        load_problems(str(path))
    write(path, [{"problem": "p", "answer": "1"}])
    pyarrow.parquet.write_table(pyarrow.table({"problem": []}), path)
    with pytest.raises(UserError, match="holds no problems"):
        load_problems(str(path))


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    file = write(tmp_path / "x.json", [{"problem": "p", "answer": 1}])

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied") as error:
        load_problems(file)
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("aime", "did you mean aime24"),
        ("MATH-500", "did you mean math500"),
        ("qwertz", "known are nano, nano-validation, nano-train, aime24, math500, amc"),
        ("missing.jsonl", "no file 'missing.jsonl'"),
        ("data/missing.json", "no file 'data/missing.json'"),
        ("/missing/x.parquet", "no file '/missing/x.parquet'"),
        ("./missing", "neither a known name, nor a file, nor a hub id"),
        ("", "is a directory"),
        ("x" * 5000, "cannot be looked for: File name too long"),
        ("~no-such-user/x.json", "cannot be looked for"),
    ],
)
def test_names_of_nothing(name, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # is not asked
    with pytest.raises(UserError, match=message) as error:
        load_problems(name)
    assert len(str(error.value)) < 300


def test_a_directory_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match="is a directory; give a file"):
        load_problems(str(tmp_path))


# Hub datasets


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes hub datasets of {file: rows}. A download removes what it does not ask for."""
    root = tmp_path / "hub"

    def make(repository, files):
        for name, rows in files.items():
            path = root / repository / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, rows)

    def download(repository, *, repo_type, allow_patterns):
        assert repo_type == "dataset"
        assert (root / repository).is_dir()
        paths = [p for p in (root / repository).rglob("*") if p.is_file()]
        names = [p.relative_to(root / repository).as_posix() for p in paths]
        wanted = set(
            huggingface_hub.utils.filter_repo_objects(
                names, allow_patterns=allow_patterns
            )
        )
        for path, name in zip(paths, names, strict=True):
            if name not in wanted:
                path.unlink()
        return str(root / repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return make


@pytest.mark.parametrize(
    ("name", "repository", "file", "row", "problem"),
    [
        (
            "aime24",
            "HuggingFaceH4/aime_2024",
            "data/train-00000-of-00001.parquet",
            {
                "id": 60,
                "problem": "p",
                "solution": "s",
                "answer": "204",
                "year": "2024",
            },
            Problem(60, "p", ("204",)),
        ),
        (
            "math500",
            "HuggingFaceH4/MATH-500",
            "test.jsonl",
            {
                "problem": "p",
                "solution": "s",
                "answer": "p - q",
                "unique_id": "t/1.json",
            },
            Problem("t/1.json", "p", ("p - q",)),
        ),
        (
            "amc",
            "AI-MO/aimo-validation-amc",
            "data/train-00000-of-00001.parquet",
            {"id": 0, "problem": "p", "answer": 142.0, "url": "u"},
            Problem(0, "p", ("142",)),
        ),
        (
            "minerva",
            "math-ai/minervamath",
            "test.jsonl",
            {"question": "p", "answer": "1e13"},
            Problem(0, "p", ("1e13",)),
        ),
        (
            "olympiadbench",
            "Hothan/OlympiadBench",
            "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
            {"id": 1606, "question": "p", "solution": ["s"], "final_answer": ["$2$"]},
            Problem(1606, "p", ("$2$",)),
        ),
        (
            "deepscaler",
            "agentica-org/DeepScaleR-Preview-Dataset",
            "deepscaler.json",
            {"problem": "p", "answer": "-\\frac{2}{3}", "solution": "s"},
            Problem(0, "p", ("-\\frac{2}{3}",)),
        ),
    ],
)
def test_known_names(hub, name, repository, file, row, problem):
    """Files and columns as they lie on the hub, among others in the case of the last."""
    hub(repository, {file: [row], "OlympiadBench/TP_TO/TP_TO.parquet": [{"a": 1}]})
    assert load_problems(name) == [problem]
    assert set(data.HUB) == {
        "aime24",
        "math500",
        "amc",
        "minerva",
        "olympiadbench",
        "deepscaler",
    }


def test_deepscaler_without_its_problems_that_have_no_answer(hub, tmp_path):
    answers = ["1", "", "2", None, 0, "4"]
    rows = [{"problem": f"p{i}", "answer": a} for i, a in enumerate(answers)]
    hub("agentica-org/DeepScaleR-Preview-Dataset", {"deepscaler.json": rows})
    kept = [(p.id, p.text, p.answers) for p in load_problems("deepscaler")]
    assert kept == [
        (0, "p0", ("1",)),
        (2, "p2", ("2",)),
        (4, "p4", ("0",)),
        (5, "p5", ("4",)),
    ]
    assert len(load_problems("deepscaler", limit=3)) == 3
    with pytest.raises(UserError, match="index 1: answer is empty"):
        load_problems(write(tmp_path / "copy.json", rows))


@pytest.mark.parametrize("name", ["x.json", "x.parquet"])
def test_a_dataset_of_the_hub_is_taken_as_it_is_published(hub, name, capsys):
    """Those who use it cannot mend it, and others were measured on the same texts."""
    whole = {"problem": r"\textbf{A}", "answer": "1"}
    rows = [whole, {"problem": "\textbf{A}", "answer": "1"}, whole]
    hub("owner/name", {name: [*rows, {"problem": "p", "answer": "\frac12"}]})
    problems = load_problems("owner/name")
    assert [p.text for p in problems] == [*(row["problem"] for row in rows), "p"]
    note = capsys.readouterr().err
    assert note.startswith("note: owner/name is used as it is published, with 2 of its")
    assert f"{name} index 1: problem holds a tab where \\textbf seems" in note
    load_problems("owner/name", limit=1)
    assert capsys.readouterr().err == ""


def rows_named(*names: str) -> list[dict[str, str]]:
    return [{"problem": name, "answer": "1"} for name in names]


def test_the_parts_of_a_set_are_read_in_order(hub):
    parts = {
        f"data/train-{i:05}-of-00003.parquet": rows_named(f"a{i}", f"b{i}")
        for i in (2, 0, 1)
    }
    hub("owner/name", parts)
    problems = load_problems("owner/name")
    assert [p.text for p in problems] == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert [p.id for p in problems] == list(range(6))
    assert load_problems("owner/name", limit=3) == problems[:3]


def test_one_of_several_sets_must_be_named(hub):
    files = {
        "main/train-00000-of-00001.parquet": rows_named("train"),
        "main/test-00000-of-00001-6a482bba24408a44.parquet": rows_named("test"),
        "main/test_small.jsonl": rows_named("small"),
        "main/train.json": rows_named("copy"),
    }
    for name, text in [
        ("owner/name/main/test", "test"),
        ("owner/name/main/test_small", "small"),
        ("owner/name/main/train.json", "copy"),
        ("owner/name/main/train.parquet", "train"),
    ]:
        hub("owner/name", files)
        assert [p.text for p in load_problems(name)] == [text]
    hub("owner/name", files)
    with pytest.raises(UserError, match="several sets of files") as error:
        load_problems("owner/name")
    assert (
        "main/test.parquet, main/test_small.jsonl, main/train.parquet, main/train.json"
        in str(error.value)
    )
    assert str(error.value).endswith("like owner/name/main/test.parquet")
    hub("owner/name", files)
    with pytest.raises(UserError, match=r"\(main/train.parquet, main/train.json\)"):
        load_problems("owner/name/main/train")
    with pytest.raises(UserError, match="no data on the hub") as error:
        load_problems("owner/name/main/valid")
    assert "owner/name/main/valid" in str(error.value)


def test_only_the_named_set_is_downloaded(hub, tmp_path):
    files = {f"{name}.parquet": rows_named(name) for name in ("test", "train", "b/c")}
    hub("owner/name", files)
    assert [p.text for p in load_problems("owner/name/train.parquet")] == ["train"]
    left = [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["train.parquet"]


def test_many_sets_are_not_all_listed(hub):
    hub("owner/name", {f"{i:03}.json": rows_named("p") for i in range(50)})
    with pytest.raises(UserError, match=r"007.json, \.\.\.\)") as error:
        load_problems("owner/name")
    assert "008" not in str(error.value)


def test_what_the_hub_refuses_is_one_sentence(monkeypatch):
    def refuse(*args, **settings):
        raise OSError("401 Client Error.\n\nRepository Not Found for url: ...")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for name in ("aime24", "owner/name", "some/path/x.json"):
        with pytest.raises(UserError, match=r"\(401 Client Error\); check") as error:
            load_problems(name)
        assert "give a local file" in str(error.value)


def test_without_a_network():
    with pytest.raises(UserError, match="cannot be had from the hub"):
        load_problems("aime24")


# Prompts


@pytest.fixture
def path(tmp_path):
    write_byte_tokenizer(tmp_path)
    return tmp_path


def test_the_instruction_is_the_recorded_one_or_the_references(path):
    assert Tokenizer.from_dir(path).instruction is None
    assert default_instruction(Tokenizer.from_dir(path)) == (
        "Let's think step by step and output the final answer within \\boxed{}."
    )
    for text in ("", "Be quick."):
        edit_json(path / "tokenizer_config.json", e1jax_instruction=text)
        assert default_instruction(Tokenizer.from_dir(path)) == text
    edit_json(path / "tokenizer_config.json", e1jax_instruction=["a"])
    with pytest.raises(UserError, match="e1jax_instruction must be a text") as error:
        Tokenizer.from_dir(path)
    assert str(path / "tokenizer_config.json") in str(error.value)


def test_the_bundled_model_has_no_instruction():
    bundled = Path(data.__file__).parent.parent / "models" / "nano"
    assert default_instruction(Tokenizer.from_dir(bundled)) == ""


def test_prompt_text():
    assert prompt_text("1+1?", "") == "1+1?"
    assert prompt_text("1+1?", "Be quick.") == "1+1? Be quick."


def test_prompts_are_users_messages_of_limited_length(path):
    tokenizer = Tokenizer.from_dir(path)
    problems = [Problem(i, "x" * n, (str(n),)) for i, n in enumerate((3, 9, 1, 5))]
    for instruction, tail in (("", ""), ("Go.", " Go.")):
        # BOS, User, Assistant, <think>, newline.
        for most in range(1 + len(tail) + 5, 9 + len(tail) + 6):
            kept, dropped = encode_problems(problems, tokenizer, instruction, most)
            fit = [p for p in problems if len(p.text + tail) + 5 <= most]
            assert dropped == len(problems) - len(fit)
            assert [e.answers for e in kept] == [p.answers for p in fit]
            assert [e.text for e in kept] == [p.text + tail for p in fit]
            assert [tokenizer.decode(e.prompt_ids) for e in kept] == [
                f"<｜begin▁of▁sentence｜><｜User｜>{p.text}{tail}<｜Assistant｜><think>\n"
                for p in fit
            ]


def test_prompts_that_are_all_too_long(path):
    problems = [Problem(0, "x" * 20, ("1",)), Problem(1, "x" * 10, ("1",))]
    with pytest.raises(UserError, match=r"max_prompt_len=14 .* of the 2 has 15"):
        encode_problems(problems, Tokenizer.from_dir(path), "", 14)


def test_prompts_need_a_chat_template(path):
    edit_json(path / "tokenizer_config.json", chat_template=None)
    assert "chat_template" not in read_json(path / "tokenizer_config.json")
    with pytest.raises(UserError, match="no chat template"):
        encode_problems([Problem(0, "x", ("1",))], Tokenizer.from_dir(path), "", 99)


def test_the_default_instruction_has_a_single_backslash():
    assert DEFAULT_INSTRUCTION.count("\\") == 1


# Batches


def kept_problems(count: int) -> list[EncodedProblem]:
    return [EncodedProblem([i, i + 1], (str(i),), f"{i}?") for i in range(count)]


def read(batches, count: int) -> list:
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize(
    ("count", "prompts"), [(1, 1), (1, 4), (5, 12), (12, 12), (37, 12), (64, 4)]
)
def test_every_epoch_holds_every_problem_once(count, prompts):
    kept = kept_problems(count)
    batches = read(prompt_batches(kept, prompts=prompts, seed=3), 5 * count)
    assert {len(batch) for batch in batches} == {prompts}
    stream = [prompt for batch in batches for prompt in batch]
    assert [prompt.position for prompt in stream] == list(range(len(stream)))
    for prompt in stream:
        assert prompt[2:] == kept[prompt.index]
    for start in range(0, len(stream), count):
        epoch = Counter(prompt.index for prompt in stream[start : start + count])
        assert epoch == Counter(range(count))


def epochs(seed: int, count: int, number: int) -> list[tuple[int, ...]]:
    batches = prompt_batches(kept_problems(count), prompts=count, seed=seed)
    return [tuple(prompt.index for prompt in next(batches)) for _ in range(number)]


def test_epochs_and_seeds_differ():
    """And no seed has the epochs of another one, at other times."""
    orders = [order for seed in range(20) for order in epochs(seed, 30, 20)]
    assert len(set(orders)) == 400
    assert tuple(range(30)) not in orders
    assert epochs(7, 30, 5) == epochs(7, 30, 5)


def test_any_problem_can_come_anywhere():
    """The chi-squared of 5 problems at 5 places in 2,000 epochs: 16 degrees of freedom,
    and below 39 in 99.9 % of cases."""
    orders = [order for seed in range(100) for order in epochs(seed, 5, 20)]
    cells = Counter((place, i) for order in orders for place, i in enumerate(order))
    expected = len(orders) / 5
    pairs = [(place, i) for place in range(5) for i in range(5)]
    assert sum((cells[pair] - expected) ** 2 / expected for pair in pairs) < 39


def test_the_order_of_a_seed_never_changes():
    """It is what a position in a checkpoint means, whatever the version of NumPy."""
    assert epochs(0, 10, 2) == [
        (4, 6, 2, 7, 3, 5, 9, 0, 8, 1),
        (9, 1, 3, 8, 7, 6, 0, 4, 2, 5),
    ]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 12])
def test_processes_share_each_batch(processes):
    kept = kept_problems(37)
    whole = read(prompt_batches(kept, prompts=12, seed=5), 9)
    parts = [
        read(
            prompt_batches(
                kept, prompts=12, seed=5, process=process, processes=processes
            ),
            9,
        )
        for process in range(processes)
    ]
    for number, batch in enumerate(whole):
        for process in range(processes):
            assert parts[process][number] == batch[process::processes]


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(UserError, match=r"12 prompts cannot be shared .* 5 processes"):
        prompt_batches(kept_problems(3), prompts=12, seed=0, processes=5)


def test_restored_anywhere_in_any_number_of_processes():
    kept = kept_problems(7)
    whole = read(prompt_batches(kept, prompts=4, seed=1), 12)
    iterator = prompt_batches(kept, prompts=4, seed=1)
    for done in range(10):
        state = json.loads(json.dumps(iterator.get_state()))
        for processes in (1, 2, 4):
            for process in range(processes):
                restored = prompt_batches(
                    kept, prompts=4, seed=1, process=process, processes=processes
                )
                next(restored)  # what was read before does not matter
                restored.set_state(state)
                assert restored.get_state() == state
                assert read(restored, 2) == [
                    batch[process::processes] for batch in whole[done : done + 2]
                ]
        assert next(iterator) == whole[done]


def test_a_state_far_in_the_stream():
    """Nothing before a position is needed for what comes there."""
    iterator = prompt_batches(kept_problems(5), prompts=3, seed=0)
    iterator.set_state({"next_index": 10**9})
    assert [prompt.position for prompt in next(iterator)] == [
        3 * 10**9,
        3 * 10**9 + 1,
        3 * 10**9 + 2,
    ]
