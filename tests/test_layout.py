"""The package reads from leaf to root, and hides no import."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import e1jax

PACKAGE = Path(e1jax.__file__).parent
# Floors from leaf to root, and the modules of each in the same order.
FLOORS = {
    "config": "checks buckets texts architectures model adapter sampling training finetuning load",
    "cli": "command flags files leases locks mirror outputs",
    "sharding": "mesh fsdp runtime hosts",
    "nn": "norm quantize scores rope cpu cache heads kernels.splash kernels.gpu_flash kernels.decode_heads "
    "kernels.decode_attention kernels.gpu_decode kernels.top_p attention paths lora layers model chunks",
    "processes": "",
    "chat_template": "",
    "tokenizer": "",
    "checkpoint": "lazy params digests runs int8 huggingface adapter load metrics",
    "sampling": "draw budget request completion decode scheduler prefill engine record",
    "rewards": "tex spelling units marks agreement equivalence grader worker function",
    "data": "nano problems prompts examples packing",
    "training": "frozen optimizer run finetuning",
    "grpo": "loss logprobs cuts rollouts learner",
    "evaluation": "results grading figure",
    "plan": "slices programs hlo loops account interconnect sizes report sampling training",
    "serving": "protocol answers metrics worker app server",
}
COMMANDS = ["sample", "convert", "train", "sft", "evaluate", "plan.__main__", "serve"]


def leaf_to_root() -> list[str]:
    """Every library module; a package stands behind its modules, whose names it gives."""
    order = []
    for floor, names in FLOORS.items():
        modules = [f"{floor}.{name}" for name in names.split()]
        packages = {name.rpartition(".")[0] for name in modules} - {floor}
        order += [*modules, *sorted(packages), floor]
    return order


LEAF_TO_ROOT = leaf_to_root()


def module_name(path: Path) -> str:
    """`rewards.units` of e1jax/rewards/units.py, `rewards` of its `__init__`, "" of the top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in PATHS if name]


def imports(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    """Every module that is imported anywhere in the tree, by its full name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if node.module == "e1jax":
                found += [(f"e1jax.{alias.name}", node) for alias in node.names]
            else:
                found.append((node.module, node))
    return found


def own_imports(module: str) -> set[str]:
    tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
    names = {name for name, _ in imports(tree)}
    return {name.removeprefix("e1jax.") for name in names if name.startswith("e1jax.")}


def hidden_imports(source: str) -> list[int]:
    """Lines of imports inside a function that have no comment saying why."""
    lines = source.splitlines()
    bare = set()
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for _, node in imports(function):
                around = [lines[node.lineno - 1], lines[node.lineno - 2].lstrip()]
                if "# " not in around[0] and not around[1].startswith("# "):
                    bare.add(node.lineno)
    return sorted(bare)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_modules_above_it(module):
    assert module in LEAF_TO_ROOT + COMMANDS, "name its place in the order"
    place = LEAF_TO_ROOT.index(module) if module in LEAF_TO_ROOT else None
    assert own_imports(module) <= {*LEAF_TO_ROOT[:place]}


@pytest.mark.parametrize("module", MODULES)
def test_no_import_hides_in_a_function_without_a_reason(module):
    source = PATHS[module].read_text(encoding="utf-8")
    assert hidden_imports(source) == []


@pytest.mark.parametrize("module", PATHS)
def test_torch_is_never_imported(module):
    tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
    assert not [name for name, _ in imports(tree) if name.split(".")[0] == "torch"]


def test_configuration_needs_no_jax():
    for module in (name for name in MODULES if name.startswith("config")):
        tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
        assert not [name for name, _ in imports(tree) if name.split(".")[0] == "jax"]


@pytest.mark.parametrize("module", PATHS)
def test_no_module_is_longer_than_a_sitting(module):
    """500 lines of code: neither blank nor comments nor docstrings."""
    source = PATHS[module].read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= {*range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    code = [n for n, line in lines if line.strip() and not line.strip().startswith("#")]
    assert len(set(code) - docstrings) <= 500


def test_sampling_starts_without_what_it_does_not_need():
    """Each of these takes a tenth of a second or more to load."""
    slow = {"grain", "pyarrow", "matplotlib", "math_verify", "tensorboardX", "torch"}
    slow |= {"fastapi", "uvicorn", "prometheus_client"}
    script = "import sys, e1jax.sample; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "e1jax.sampling.engine" in loaded
    assert not slow & loaded


def test_training_does_not_load_torch(tmp_path):
    """tensorboardX imports PyTorch where it is installed, as it is for the tests."""
    script = (
        "import sys, e1jax.train\n"
        "from pathlib import Path\n"
        "from e1jax.checkpoint.metrics import MetricsLog\n"
        f"MetricsLog(Path({str(tmp_path)!r}), 0, 1, []).close()\n"
        "assert 'tensorboardX' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert importlib.util.find_spec("torch")


def test_the_checks_themselves():
    assert hidden_imports("def f():\n    import os\n") == [2]
    assert hidden_imports("def f():\n    # Slow to load.\n    import os\n") == []
    assert hidden_imports("def f():\n    import os  # slow to load\n") == []
    assert hidden_imports("import os\n\n\nclass A:\n    import re\n") == []
    found = imports(ast.parse("from e1jax import model\nimport e1jax.engine as e"))
    assert [name for name, _ in found] == ["e1jax.model", "e1jax.engine"]


def test_the_names_of_the_architecture_page_exist():
    """Each dotted name in docs/architecture.md is a module, or a name in a module."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    dotted = {
        name
        for name in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", page)
        if name.partition(".")[0] in {m.partition(".")[0] for m in MODULES}
    }
    assert len(dotted) > 60
    for name in dotted:
        assert is_there(name), name


def is_there(name: str) -> bool:
    parts = name.split(".")
    module = max(
        (m for m in MODULES if name == m or name.startswith(f"{m}.")),
        key=len,
        default=None,
    )
    if module is None:
        return False
    rest = parts[len(module.split(".")) :]
    defined = {
        node.name
        for node in ast.walk(ast.parse(PATHS[module].read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    source = PATHS[module].read_text(encoding="utf-8")
    return all(
        part in defined or re.search(rf"^ *{part}\b.*[:=]", source, re.M)
        for part in rest
    )
