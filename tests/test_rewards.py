"""Answers in many spellings, wrong ones, and all that a comparison can do to a run."""

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import SimpleNamespace

import math_verify
import numpy as np
import pytest
from conftest import PATIENCE

from e1jax import processes
from e1jax.config.checks import UserError
from e1jax.rewards import Grader, accepted_texts, grade, score
from e1jax.rewards import grader as rewards

# Accepted answer, then spellings of it that a solution may box.
SPELLINGS = {
    "42": ["42", " 42 ", "$42$", "+42", "042", "42.0", "42.", r"x = 42", r"\text{42}"],
    "-7": ["-7", "$ -7 $", "- 7", "\N{MINUS SIGN}7", "n=-7", r"\displaystyle -7"],
    "12345": ["12,345", "12{,}345", r"12,\!345", r"12\,345", r"\$12,345", r"12345\$"],
    r"\frac{3}{4}": [
        *("3/4", r"\dfrac{3}{4}", r"\tfrac34", r"\frac34", r"\frac{6}{8}", "0.75"),
        *(r"75\%", "75 percent", r"{3 \over 4}", r"\frac { 3 } { 4 }", r"p=\frac34"),
    ],
    r"1\frac{4}{5}": [r"\frac{9}{5}", "1.8", r"1 \frac45"],
    "0.333333": ["1/3", r"\frac13"],
    ".5": ["0.5", r"\frac12", "0.50"],
    r"15\mbox{ cm}^2": ["15", r"15 \text{ cm}^2", r"15\ \mathrm{cm}^2", "15 cm"],
    r"\$18.90": ["18.9", "18.90", r"18.90\text{ dollars}", r"\$18.90"],
    r"75^\circ": ["75", "75°", r"75^{\circ}", r"75 \text{ degrees}", "75."],
    r"3\sqrt{13}": [
        r"3 \sqrt{13}",
        r"\sqrt{117}",
        r"\sqrt{13} \cdot 3",
        r"3\sqrt {13}",
    ],
    r"288 \pi": [r"288\pi", r"\pi \cdot 288"],
    "6 - 5i": ["6-5i", "-5i+6"],
    "x^2+2x+1": ["(x+1)^2", "1 + 2x + x^2", "f(x)=x^2+2x+1"],
    r"\cot x": [r"\frac{\cos x}{\sin x}", r"\cot{x}"],
    "y = 2x + 3": ["y=2x+3", "2x+3", "y-2x=3"],
    r"(15,-29)": [r"(15, -29)", r"\left( 15, -29 \right)", r"\left ( 15,-29 \right )"],
    r"\left( 3, \frac{\pi}{2} \right)": [r"(3, \pi/2)", r"(3,\tfrac{\pi}{2})"],
    "3, 5, 7": ["3,5,7", r"\{3, 5, 7\}", "7,5,3", r"3, 5 \text{ and } 7"],
    r"\{1\pm\sqrt{5},-2\}": [r"\{-2, 1+\sqrt5, 1-\sqrt5\}", r"-2, 1 \pm \sqrt{5}"],
    "(3,4]": ["(3, 4]", r"\left(3,4\right]", r"x \in (3,4]", r"3 < x \le 4"],
    r"(-\infty, 2) \cup (3, \infty)": [r"(3,\infty)\cup(-\infty,2)"],
    r"x \in [-2,7]": ["[-2, 7]", r"-2 \leq x \leq 7", r"x\in\left[-2,7\right]"],
    r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}": [
        r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}",
        "\\begin{pmatrix}\n-1/3 \\\\\n2/3\n\\end{pmatrix}",
    ],
    r"\text{Evelyn}": ["Evelyn", r"\textbf{Evelyn}", r"\mathrm{Evelyn}", "evelyn."],
    r"\text{(C)}": ["C", "(C)", r"\textbf{(C)}", r"\text{C}"],
    "4210_{5}": ["4210_5", "4210_{5}"],
    "2^{100}": ["1267650600228229401496703205376", r"4^{50}"],
}
WRONG = {
    "42": ["41", "-42", "420", "42.5", "4 2", "24", "", r"\text{not } 42", "42, 43"],
    "3": [r"3 \text{ or } 4", r"\{3,4\}", "0.3", r"\frac13", "the answer", "1 + 1"],
    "12345": ["12,34", "12.345", "12, 345", r"12\,34"],
    r"\frac{3}{4}": [r"\frac43", r"-\frac34", "0.74", r"74\%", "75", "3, 4"],
    r"3\sqrt{13}": [r"13\sqrt3", r"-3\sqrt{13}", r"3\sqrt{14}"],
    "6 - 5i": ["6+5i", "5i-6"],
    "x^2+2x+1": ["x^2+2x", "(x-1)^2", "y^2+2y+1"],
    "y = 2x + 3": ["y=3x+2", "y=2x"],
    "2x + z = 9": ["9"],  # though the other way round it is taken
    "(3,4]": ["(3,4)", "[3,4]", "[3,4)", "(3,5]", r"3 \le x < 4"],
    r"\left( 3, \frac{\pi}{2} \right)": [r"\left( \frac{\pi}{2}, 3 \right)", "(3, 1)"],
    "(6,31,-1)": ["(31,6,-1)", "(6,31)", "(6,31,1)"],
    "3, 5, 7": ["3,5", "3,5,8", "3,5,7,9"],
    r"(-\infty, 2) \cup (3, \infty)": [r"(-\infty, 2]", r"(-\infty, 3)\cup(3,\infty)"],
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": [
        r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}",
        r"\begin{pmatrix} 1 & 2 \end{pmatrix}",
    ],
    r"\text{Evelyn}": ["Carla", r"\text{Ev}", ""],
    r"\text{(C)}": [r"\text{(B)}", "D"],
    r"1 \pm \sqrt{19}": [r"1 + \sqrt{19}"],
    "2^{100}": ["1267650600228229401496703205377"],
}
HANGS = ["9^{9^{9^{9}}}", "(" * 500 + "3" + ")" * 500]
needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")


def pairs(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(accepted, answer) for accepted in table for answer in table[accepted]]


def solved(answer: str) -> str:
    return (
        rf"so \boxed{{0}}?</think>We find \boxed{{1}}, so it is $\boxed{{{answer}}}$."
    )


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"  # ended; whoever inherited it has not looked yet


def wait_until(condition, seconds: float = 60.0) -> None:
    """Far longer than it takes, so that only a hang fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def only_worker(grader: Grader) -> int:
    """The id of a Grader's one worker, once it is ready."""
    assert grader.submit(solved("y"), "x").result(timeout=60) == 0
    (process,) = grader._processes
    return process.pid


@pytest.mark.parametrize("accepted, answer", pairs(SPELLINGS))
def test_equivalent_answers_are_accepted(accepted, answer):
    assert score([solved(answer)], [accepted]) == [1.0]


@pytest.mark.parametrize("accepted", SPELLINGS)
def test_an_answer_is_accepted_against_itself(accepted):
    forms = [accepted, f"${accepted}$", rf" $\boxed{{{accepted}}}$ ", ["?", accepted]]
    assert score([solved(accepted)] * 4, forms) == [1.0] * 4


@pytest.mark.parametrize("accepted, answer", pairs(WRONG))
def test_other_answers_are_refused(accepted, answer):
    assert score([solved(answer)], [accepted]) == [0.0]


def test_no_answer_is_accepted_for_another():
    answers = list(WRONG)
    table = [(a, b) for a in answers for b in answers if a != b]
    right = score([solved(b) for _, b in table], [a for a, _ in table])
    assert [pair for pair, reward in zip(table, right, strict=True) if reward] == []


@pytest.mark.parametrize(
    "response, reward",
    [
        (r"</think>\boxed{5}", 1),
        (r"\boxed{5}", 0),  # never stopped thinking
        (r"\boxed{5}</think>", 0),
        (r"\boxed{5}</think>It is 5.", 0),
        (r"\boxed{5}</think>\boxed{6}", 0),
        (r"\boxed{6}</think>\boxed{6} or rather \boxed{5}", 1),
        (r"</think>\boxed{5} or rather \boxed{6}", 0),
        (r"</think>\boxed{5}</think>", 1),  # there is one closer, the first
        (r"</think>\boxed{6}</think>\boxed{5}", 1),
        (r"</think>\boxed{x=\boxed{5}}", 1),
        (r"</think>\boxed{5} and \boxed{6", 1),  # cut off
        (r"</think>\boxed{}", 0),
        ("</think>", 0),
        ("", 0),
        ("</think>\\boxed{\ud800}", 0),  # half of a pair, as JSON can hold
    ],
)
def test_the_last_box_of_the_solution_counts(response, reward):
    assert score([response], ["5"]) == [reward]


def test_accepted_answers_of_every_kind():
    kinds = [5, np.int64(5), 5.0, np.float32(5), "$5$", [7, r"\boxed{5}"], ("5", 0.1)]
    assert score([r"</think>\boxed{5}"] * len(kinds), kinds) == [1.0] * len(kinds)
    assert score([r"</think>\boxed{6}"] * len(kinds), kinds) == [0.0] * len(kinds)
    assert accepted_texts([1e-7, 2.5, -3.0], "here") == ["0.0000001", "2.5", "-3"]
    assert score([r"</think>\boxed{10^{22}}"], [1e22]) == [1.0]
    assert score([], []) == []


@pytest.mark.parametrize("bad", [None, True, [], "", " $ ", r"\boxed{}", [None], {}])
def test_unusable_accepted_answers_are_refused(bad):
    with pytest.raises(UserError, match=r"answers\[1\]"):
        score([solved("1")] * 2, ["1", bad])
    # Before any sampling: the stream is not even looked at.
    with pytest.raises(UserError, match=r"answers\[0\]"):
        grade(iter([]), [bad])
    with pytest.raises(UserError, match="not a number is nan"):
        accepted_texts(float("nan"), "not a number")


def test_the_end_of_a_worked_solution_is_accepted():
    worked = "She sells 48 / 2 = <<48/2=24>>24.\nThat is 48 + 24 = 72.\n#### 72"
    assert accepted_texts([worked, "#### 1,000 "], "here") == ["72", "1,000"]
    assert accepted_texts("48\n so \\boxed{72}\n#### 7", "here") == ["72"]
    assert score([solved("72"), solved("24")], [worked] * 2) == [1.0, 0.0]
    matrix = "\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}\n"
    assert accepted_texts(matrix, "here") == [matrix.strip()]
    assert accepted_texts("a\n#### 72\nThanks", "here") == ["72"]
    with pytest.raises(UserError, match=r"answers\[0\] holds a form feed where \\frac"):
        score([solved("1/2")], ["\frac{1}{2}"])
    for lines in ("48 + 24\n72", f"{matrix}x", "48\r72"):
        with pytest.raises(UserError, match=r"answers\[0\] has several lines.*####"):
            score([solved("72")], [lines])


def test_unusable_arguments_are_refused():
    with pytest.raises(UserError, match="2 responses came with 1 answers"):
        score(["a", "b"], ["1"])
    with pytest.raises(UserError, match="responses is one string"):
        score("a", ["1"])
    with pytest.raises(UserError, match="answers is one string"):
        score(["a"], "1")
    with pytest.raises(UserError, match="a response must be a text"):
        score([None], ["1"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="workers"):
        Grader(workers=0)
    with pytest.raises(UserError, match="limit"):
        Grader(limit=0)


def test_whole_numbers_are_compared_as_math_verify_does():
    rng = random.Random(0)

    def spell(value: int) -> str:
        sign = "-" if value < 0 else rng.choice(["", "", "+"])
        return sign + rng.choice(["", "0", "000"]) + str(abs(value))

    table = []
    for _ in range(300):
        value = rng.choice([0, rng.randint(-20, 20), rng.randint(-(10**30), 10**30)])
        other = rng.choice([value, -value, value + 1, value * 10])
        table.append((spell(value), spell(other)))
    at_once = [rewards._reward_at_once(b, [a]) for a, b in table]
    parsed = [[math_verify.parse(f"${text}$") for text in pair] for pair in table]
    assert at_once == [math_verify.verify(*pair) for pair in parsed]
    assert 50 < sum(at_once) < 250


def test_whole_numbers_and_equal_texts_need_no_worker():
    with Grader() as grader:
        futures = [
            grader.submit(solved("41"), "42"),
            grader.submit(solved("041"), [40, "41"]),
            grader.submit(solved(r"$\text{\alpha} $"), r"\text{\alpha}"),
            grader.submit("no box", "x^2"),
        ]
        assert [future.result(timeout=0) for future in futures] == [0, 1, 1, 0]
        assert not grader._processes


def test_very_long_answers_are_right_only_if_equal():
    long = "+".join(f"x_{{{i}}}" for i in range(1000))
    with Grader() as grader:
        futures = [grader.submit(solved(text), long) for text in (long, long + "+0")]
        assert [future.result(timeout=0) for future in futures] == [1, 0]


def test_results_depend_on_neither_order_nor_number_of_workers():
    table = [*pairs(SPELLINGS), *pairs(WRONG)][::3]
    right = dict.fromkeys(pairs(SPELLINGS), 1.0) | dict.fromkeys(pairs(WRONG), 0.0)
    for workers in (1, 3):
        random.Random(workers).shuffle(table)
        with Grader(workers) as grader:
            futures = [grader.submit(solved(b), a) for a, b in table]
            found = {pair: f.result() for pair, f in zip(table, futures, strict=True)}
        assert found == {pair: right[pair] for pair in table}


@pytest.mark.parametrize("hang", HANGS)
def test_a_hanging_comparison_is_wrong_and_counted(hang, capfd):
    with Grader(workers=1, limit=1) as grader:
        assert grader.submit(solved(hang), "3.5").result(timeout=60) == 0
        assert grader.failures == {"timeout": 1, "crash": 0}
        grader.limit = 60  # of the next worker, which a busy machine may hold up
        assert grader.submit(solved("7/2"), 3.5).result(timeout=60) == 1
        assert grader.failures == {"timeout": 1, "crash": 0}
    assert capfd.readouterr() == ("", "")  # SymPy and Python are kept quiet


def test_a_hang_in_what_is_accepted_is_one_too():
    with Grader(workers=1, limit=1) as grader:
        assert grader.submit(solved("7/2"), HANGS[0]).result(timeout=60) == 0
        assert grader.failures == {"timeout": 1, "crash": 0}


WITHOUT_THE_SIGNAL = r"""
import signal
from e1jax import processes
from e1jax.rewards import Grader
signal.signal(signal.SIGPROF, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
grader = Grader(workers=1, limit=0.3)
process = grader._spawn()
for request in (b"", b'["9^{9^{9^{9}}}", ["3.5"]]\n', b'["0.5", ["1/2"]]\n'):
    print(processes.ask(process, request, 60).decode(), end="")
grader.close()
"""


def test_the_limit_ends_a_comparison_whatever_the_worker_inherited():
    # Ignored and blocked signals stay so in a new program, unless it changes that. In a
    # process of its own: libtpu ignores SIGPROF and receives it, and Python, which does not
    # know, would restore the default, by which the signal ends this process.
    command = [sys.executable, "-c", WITHOUT_THE_SIGNAL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    # By the signal itself: a Python handler would have to wait for C code.
    assert (done.stdout, done.stderr) == ("ready\ntimeout\n1\n", "")


def test_a_worker_ends_when_nobody_writes_to_it_any_more():
    grader = Grader(workers=1)
    process = grader._spawn()
    assert processes.ask(process, b"", 60) == b"ready\n"
    process.stdin.write(b'["0.5", ["1/2"]]\n')
    process.stdin.close()
    assert (process.stdout.read(), process.wait(60)) == (b"1\n", 0)
    process.stdout.close()
    grader.close()


def test_a_stopped_worker_is_killed(monkeypatch):
    with Grader(workers=1) as grader:
        os.kill(only_worker(grader), signal.SIGSTOP)
        monkeypatch.setattr(processes, "PATIENCE", 1)
        assert grader.submit(solved("x+y"), "y+x").result(timeout=60) == 0
        assert grader.failures == {"timeout": 1, "crash": 0}
        monkeypatch.undo()
        assert grader.submit(solved("x+y"), "y+x").result(timeout=60) == 1


def test_a_worker_killed_from_outside_costs_nothing():
    with Grader(workers=1) as grader:
        os.kill(only_worker(grader), signal.SIGKILL)
        assert grader.submit(solved("x+y"), "y+x").result(timeout=60) == 1
        assert grader.failures == {"timeout": 0, "crash": 1}


def test_a_comparison_that_crashes_twice_is_wrong(monkeypatch):
    ask = processes.ask

    def crash(process, request, seconds):
        if request:  # the worker has started, and waits for it
            os.kill(process.pid, signal.SIGSEGV)
        return ask(process, request, seconds)

    with Grader(workers=1, limit=60) as grader:
        monkeypatch.setattr(processes, "ask", crash)
        assert grader.submit(solved("x+y"), "y+x").result(timeout=60) == 0
        assert grader.failures == {"timeout": 0, "crash": 2}
        monkeypatch.undo()
        assert grader.submit(solved("x+y"), "y+x").result(timeout=60) == 1


@needs_proc
def test_a_comparison_has_a_memory_limit():
    with Grader(workers=1, limit=60) as grader:
        pid = only_worker(grader)
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (2**31, 2**31)
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        used = pages * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (used, 2**31))
        assert grader.submit(solved("x+z"), "y+x").result(timeout=60) == 0
        assert grader.failures == {"timeout": 0, "crash": 2}
        # Nothing is wrong with the worker, and the crashes are not remembered.
        resource.prlimit(pid, resource.RLIMIT_AS, (2**31, 2**31))
        assert grader.submit(solved("x+z"), "y+x").result(timeout=60) == 0
        assert grader.failures == {"timeout": 0, "crash": 2}
        assert only_worker(grader) == pid


@needs_proc
def test_workers_are_new_programs_without_jax():
    with Grader(workers=1) as grader:
        pid = only_worker(grader)
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        assert command[1:5] == ["-P", "-m", "e1jax.rewards.worker", "1.0"]
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "jaxlib" in Path("/proc/self/maps").read_text()
        assert "jaxlib" not in maps and "torch" not in maps
        assert os.getsid(pid) != os.getsid(0)  # Ctrl-C in the terminal passes it by
    assert is_gone(pid)


def test_hostile_comparisons_cost_their_limit_alone():
    """No start of another worker, nor more than once for each pair."""
    hostile = [f"9^{{9^{{9^{{{i}}}}}}}" for i in range(5, 10)] * 20
    with Grader(workers=1, limit=0.3) as grader:
        pid = only_worker(grader)
        start = time.monotonic(), os.times()
        futures = [grader.submit(solved(answer), "3.5") for answer in hostile]
        assert [future.result(timeout=60) for future in futures] == [0] * len(hostile)
        # Each counts, so that a resumed run, which remembers nothing, counts the same.
        assert grader.failures == {"timeout": len(hostile), "crash": 0}
        assert only_worker(grader) == pid
        assert len(grader._known) == 1 + 5
    spent = os.times()  # of children that have ended, the worker's among them
    assert spent.children_user - start[1].children_user < 5 * 0.3 + 3


def test_remembered_comparisons_are_bounded(monkeypatch):
    monkeypatch.setattr(rewards, "_MOST_KNOWN", 3)
    table = [("x+y", "y+x", 1), ("x+y", "x", 0), ("1/2", "0.5", 1), ("x", "y", 0)] * 3
    with Grader(workers=1, limit=60) as grader:
        for answer, accepted, reward in table:
            assert grader.submit(solved(answer), accepted).result(60) == reward
            assert len(grader._known) <= 3


@pytest.mark.slow
def test_rewards_are_the_same_on_a_busy_machine():
    """At load 16, where a second of processor time takes several of wall clock."""
    terms = [f"{i + 2}x^{{{i}}}" for i in range(60)]
    table = pairs(SPELLINGS)[::9] + pairs(WRONG)[::9]
    table.append(("+".join(terms), "+".join(reversed(terms))))  # takes 0.6 s

    def rewards_now() -> list[float]:
        with Grader(workers=2, limit=2) as grader, Grader(1, limit=0.2) as strict:
            futures = [grader.submit(solved(b), a) for a, b in table]
            futures.append(strict.submit(solved(HANGS[0]), "3.5"))
            found = [future.result(timeout=300) for future in futures]
            assert grader.failures == {"timeout": 0, "crash": 0}
            assert strict.failures == {"timeout": 1, "crash": 0}
        return found

    quiet = rewards_now()
    assert quiet[-2:] == [1, 0]
    command = [sys.executable, "-c", "while True: pass"]
    # Linux shares processors out by session, and each worker has one.
    busy = [subprocess.Popen(command, start_new_session=True) for _ in range(16)]
    try:
        assert rewards_now() == quiet
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_long_lists_in_another_order():
    """With n^2 comparisons by math-verify, these took 5 to 12 s, and 0.8 s at most without.
    The limit leaves room for a slower machine."""
    kinds = [
        r"x={}\pi",
        "x^{{{0}}}+{0}",
        r"({0},\frac{{{0}}}{{7}})",
        r"{0}\sqrt{{{0}+1}}",
    ]
    with Grader(workers=2, limit=4.0) as grader:
        for kind in kinds:
            items = [kind.format(i) for i in range(2, 32)]
            accepted, answer = ", ".join(items), ", ".join(reversed(items))
            other = ", ".join([kind.format(40), *items[1:]])
            futures = [
                grader.submit(solved(text), accepted) for text in (answer, other)
            ]
            assert [future.result(timeout=60) for future in futures] == [1, 0]
        assert grader.failures == {"timeout": 0, "crash": 0}


PARENT = r"""
import sys, time
from e1jax.rewards import Grader
assert not {"jax", "sympy", "math_verify"} & set(sys.modules)
print("main")
idle, busy = Grader(workers=1), Grader(workers=1, limit=20)
for grader in (idle, busy):
    grader.submit(r"</think>\boxed{x+y}", "y+x").result()
hanging = busy.submit(r"</think>\boxed{9^{9^{9^{9}}}}", "3.5")
while not hanging.running():
    time.sleep(0.01)
print(*[process.pid for g in (idle, busy) for process in g._processes], flush=True)
END
"""


@needs_proc
@pytest.mark.parametrize(
    "end, code",
    [("time.sleep(600)", -signal.SIGKILL), ("sys.exit(3)", 3), ("raise OSError", 1)],
)
def test_workers_go_with_their_parent(tmp_path, end, code):
    script = tmp_path / "script.py"
    script.write_text(PARENT.replace("END", end))
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The script runs once: a worker that ran it again would print too.
    assert parent.stdout.readline() == "main\n"
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    if "sleep" in end:
        assert not any(map(is_gone, pids))
        parent.kill()
    out, err = parent.communicate(timeout=60)
    assert (out, parent.returncode) == ("", code)
    assert err.count("Traceback") == ("raise" in end)
    assert bool(err) == ("raise" in end)
    for pid in pids:
        wait_until(lambda pid=pid: is_gone(pid), seconds=10)


NOISY = """
import sys
print("noise", flush=True)
def verify(*pair, **_):
    print("noise", flush=True)
    print("noise", file=sys.stderr)
    return True
"""


def test_what_libraries_print_is_lost(tmp_path, monkeypatch, capfd):
    (tmp_path / "math_verify.py").write_text(NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    with Grader(workers=1) as grader:
        assert grader.submit(solved("x+y"), "y+x").result(timeout=60) == 1
        assert grader.submit(solved("x+y"), "y+x").result(timeout=60) == 1
        assert grader.failures == {"timeout": 0, "crash": 0}
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such luck')")
    monkeypatch.syspath_prepend(tmp_path)
    with Grader(workers=1) as grader:
        future = grader.submit(solved("x+y"), "y+x")
        with pytest.raises(RuntimeError, match=r"did not start: .*no such luck"):
            future.result(timeout=60)
        assert not grader._processes


def test_a_closed_grader_leaves_nothing_waiting():
    grader = Grader(workers=1, limit=60)
    only_worker(grader)
    running, waiting = [grader.submit(solved(HANGS[0]), "3.5") for _ in range(2)]
    wait_until(running.running)
    grader.close()
    with pytest.raises(RuntimeError, match="closed"):
        running.result(timeout=0)
    with pytest.raises(CancelledError):
        waiting.result(timeout=0)
    with pytest.raises(RuntimeError, match="closed"):
        grader.submit(solved("x+y"), "y+x")
    assert grader.submit(solved("5"), "5").result() == 1  # needs no worker
    grader.close()


def completion(prompt_index: int, solution: str) -> SimpleNamespace:
    return SimpleNamespace(prompt_index=prompt_index, solution=solution)


def test_a_stream_is_graded():
    answers = ["1/2", ["x+y", 3], 7]
    given = [
        completion(1, r"\boxed{y+x}"),
        completion(0, r"\boxed{9^{9^{9^{9}}}}"),
        completion(2, r"\boxed{8}"),
        completion(0, r"no</think> closer \boxed{0.5}"),
        completion(2, "no box"),
        completion(1, r"\boxed{3}"),
    ]
    with Grader(workers=2) as grader:
        graded = list(grade(iter(given), answers, grader))
    assert [item for item, _ in graded] == given
    assert [reward for _, reward in graded] == [1, 0, 0, 1, 0, 1]
    assert [reward for _, reward in grade(given[2:], answers)] == [0, 1, 0, 1]


class ManualGrader:
    """Rewards come when the test says so."""

    def __init__(self):
        self.futures: list[Future[float]] = []

    def submit(self, response: str, accepted: list[str]) -> Future[float]:
        self.futures.append(Future())
        return self.futures[-1]


def test_sampling_goes_on_while_answers_are_compared():
    grader, asked = ManualGrader(), []

    def stream():
        for index in range(4):
            asked.append(index)
            yield completion(index, "")
            if index == 2:
                grader.futures[0].set_result(1.0)

    graded = grade(stream(), ["a"] * 4, grader)  # type: ignore[arg-type]
    assert asked == []
    first, reward = next(graded)
    # It took a fourth completion to see that the first one's reward is there.
    assert (first.prompt_index, reward, asked) == (0, 1.0, [0, 1, 2, 3])
    later = threading.Timer(
        0.1, lambda: [f.set_result(0.0) for f in grader.futures[1:]]
    )
    later.start()
    assert [(c.prompt_index, r) for c, r in graded] == [(1, 0), (2, 0), (3, 0)]


def test_a_stream_given_up_leaves_nothing_waiting():
    grader = ManualGrader()

    def stream():
        yield completion(0, "")
        grader.futures[0].set_result(1.0)
        yield completion(0, "")
        raise KeyboardInterrupt

    graded = grade(stream(), ["a"], grader)  # type: ignore[arg-type]
    next(graded)
    with pytest.raises(KeyboardInterrupt):
        next(graded)
    assert grader.futures[1].cancelled()
