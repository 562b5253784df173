"""The rules of the house, read from the source without importing it.

Each rule is a function from one source file to the findings in it. Every rule is proven twice: the source keeps it,
and a planted violation is caught.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

# Who may import whom: a room and the rooms it may import from (itself always). The flow is one-way, left to right:
# errors <- config <- moe <- model <- parallel <- checkpoint <- train <- launch, with the others beside it.
_PLAIN = "errors config moe model"
_CORE = f"{_PLAIN} runtime parallel checkpoint"
ALLOWED_IMPORTS = {
    "errors": "",
    "config": "errors",
    "moe": "errors config",
    "model": "errors config moe",
    "optim": _PLAIN,
    "objectives": _PLAIN,
    "runtime": _PLAIN,
    "generate": _PLAIN,
    "parallel": f"{_PLAIN} runtime",
    "checkpoint": f"{_PLAIN} runtime parallel",
    "interop": _CORE,
    "train": f"{_CORE} optim objectives generate",
    "verify": f"{_CORE} optim objectives generate train",
    "launch": f"{_CORE} optim objectives generate train interop verify data_pipeline",
    "data_pipeline": "errors config",
}

# Where a library (or a part of one) may be imported: these files and folders and no others.
ALLOWED_PLACES = {
    "torch.distributed": ("moe_dist/parallel/", "moe_dist/checkpoint/", "moe_dist/runtime/"),
    "ray": ("launch/", "data_pipeline/build.py"),
    "pyarrow": ("data_pipeline/", "moe_dist/checkpoint/", "moe_dist/train/metrics.py"),  # docs/decisions/0002
    "zstandard": ("data_pipeline/", "moe_dist/checkpoint/", "moe_dist/train/metrics.py"),
    "fairscale": ("moe_dist/parallel/fairscale_bridge.py",),
    "tests": (),
}

MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS = 400, 70, 6
VAGUE_NAMES = frozenset({"utils", "util", "common", "helpers", "helper", "misc"})
RANK_VARIABLES = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"})
RANK_QUESTIONS = frozenset({"get_rank", "get_world_size", "get_node_local_rank", "is_initialized"})
MUTABLE_CALLS = frozenset({"list", "dict", "set", "bytearray", "deque", "defaultdict", "Counter", "OrderedDict"})
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|tmp/lab|tmp/spike|tmp/bash_jobs)\b(?=/)")
REGISTRY_HOST = re.compile(r"\b(?:pypi|pythonhosted|npmjs)\.(?:org|com)\b")

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("moe_dist", "data_pipeline", "launch")


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the root of the checkout, and its syntax tree."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return _parse(self.text)

    @property
    def room(self) -> str:
        parts = Path(self.path).with_suffix("").parts
        return _room(parts)


Rule = Callable[[Source], Iterator[str]]


def rooms_import_only_what_stands_to_their_left(source: Source) -> Iterator[str]:
    if source.room not in ALLOWED_IMPORTS and source.path != "moe_dist/__init__.py":
        yield f"{source.path}: the room '{source.room}' has no line in ALLOWED_IMPORTS"
    allowed = {source.room, *ALLOWED_IMPORTS.get(source.room, "").split()}
    for line, name in _imports(source):
        room = _room(tuple(name.split(".")))
        if room and room not in allowed:
            yield f"{source.path}:{line}: {source.room} may not import {name}"


def libraries_stay_in_their_places(source: Source) -> Iterator[str]:
    for line, name in _imports(source):
        for library, places in ALLOWED_PLACES.items():
            if (name == library or name.startswith(f"{library}.")) and not source.path.startswith(places):
                yield f"{source.path}:{line}: {library} may be imported only in {', '.join(places) or 'tests'}"


def no_device_is_chosen_by_a_cuda_call(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield f"{source.path}:{node.lineno}: .cuda() ties the code to one device; use .to(device)"


def no_module_level_mutable_state(source: Source) -> Iterator[str]:
    for node in _module_statements(source.tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                name = ast.unparse(target)
                constant = name == "__all__" or re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name)
                if not constant or _is_empty(node.value):
                    yield f"{source.path}:{node.lineno}: {name} is mutable state of the module"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"{source.path}:{node.lineno}: global {', '.join(node.names)}"


def no_rank_is_read_at_import(source: Source) -> Iterator[str]:
    for node in _nodes_run_at_import(source.tree):
        text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript) else ""
        variables = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
        reads = re.match(r"(os\.)?(environ|getenv)\b", text) and variables & RANK_VARIABLES
        asks = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in RANK_QUESTIONS
        if reads or asks:
            yield f"{source.path}:{node.lineno}: {text} is read when the module is imported"


def names_say_what_is_inside(source: Source) -> Iterator[str]:
    for part in Path(source.path).with_suffix("").parts:
        if part in VAGUE_NAMES:
            yield f"{source.path}: '{part}' does not say what is inside"


def files_and_functions_stay_short(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > MOST_LINES_OF_A_FILE:
        yield f"{source.path}: {lines} lines (at most {MOST_LINES_OF_A_FILE})"
    for node in _functions(source.tree):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MOST_LINES_OF_A_FUNCTION:
            yield f"{source.path}:{node.lineno}: {node.name} has {length} lines (at most {MOST_LINES_OF_A_FUNCTION})"


def functions_take_few_parameters(source: Source) -> Iterator[str]:
    for node in _functions(source.tree):
        if any(re.search(r"\.(command|callback)\b", ast.unparse(d)) for d in node.decorator_list):
            continue  # a command's parameters are its options
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(names) - (bool(names) and names[0] in {"self", "cls", "ctx"})
        if count > MOST_PARAMETERS:
            yield f"{source.path}:{node.lineno}: {node.name} takes {count} parameters (at most {MOST_PARAMETERS})"


def no_text_names_a_machine(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), start=1):
        for found in (*MACHINE_PATH.finditer(line), *REGISTRY_HOST.finditer(line)):
            yield f"{source.path}:{number}: names {found.group()!r}"


CODE_RULES: tuple[Rule, ...] = (
    rooms_import_only_what_stands_to_their_left,
    libraries_stay_in_their_places,
    no_device_is_chosen_by_a_cuda_call,
    no_module_level_mutable_state,
    no_rank_is_read_at_import,
    names_say_what_is_inside,
    files_and_functions_stay_short,
    functions_take_few_parameters,
)

PLANTED = [
    (rooms_import_only_what_stands_to_their_left, "moe_dist/moe/x.py", "from moe_dist.model import block"),
    (rooms_import_only_what_stands_to_their_left, "moe_dist/moe/x.py", "from ..parallel import mesh"),
    (rooms_import_only_what_stands_to_their_left, "moe_dist/model/x.py", "from moe_dist import parallel"),
    (rooms_import_only_what_stands_to_their_left, "moe_dist/model/x.py", "def f():\n    import moe_dist.train.loop"),
    (rooms_import_only_what_stands_to_their_left, "moe_dist/config/x.py", "import moe_dist.moe.router as r"),
    (rooms_import_only_what_stands_to_their_left, "moe_dist/errors.py", "from moe_dist import config"),
    (rooms_import_only_what_stands_to_their_left, "moe_dist/optim/x.py", "import moe_dist.parallel.mesh"),
    (rooms_import_only_what_stands_to_their_left, "moe_dist/train/x.py", "from data_pipeline.loader import Loader"),
    (rooms_import_only_what_stands_to_their_left, "moe_dist/train/x.py", "from launch import cli"),
    (rooms_import_only_what_stands_to_their_left, "data_pipeline/x.py", "from moe_dist.model import presets"),
    (rooms_import_only_what_stands_to_their_left, "moe_dist/registry/x.py", ""),
    (libraries_stay_in_their_places, "moe_dist/moe/x.py", "import torch.distributed as dist"),
    (libraries_stay_in_their_places, "moe_dist/model/x.py", "from torch.distributed import all_reduce"),
    (libraries_stay_in_their_places, "moe_dist/train/x.py", "from torch import distributed"),
    (libraries_stay_in_their_places, "launch/x.py", "import torch\ntorch.distributed.barrier()"),
    (libraries_stay_in_their_places, "moe_dist/train/x.py", "import ray.train"),
    (libraries_stay_in_their_places, "data_pipeline/loader.py", "def f():\n    import ray"),
    (libraries_stay_in_their_places, "data_pipeline/loader.py", "importlib.import_module('ray.data')"),
    (libraries_stay_in_their_places, "moe_dist/train/loop.py", "import pyarrow.parquet as pq"),
    (libraries_stay_in_their_places, "launch/x.py", "import zstandard"),
    (libraries_stay_in_their_places, "moe_dist/parallel/data.py", "import fairscale"),
    (libraries_stay_in_their_places, "launch/x.py", "from tests.support import spawn"),
    (no_device_is_chosen_by_a_cuda_call, "moe_dist/train/x.py", "def f(x):\n    return x.cuda()"),
    (no_module_level_mutable_state, "moe_dist/moe/x.py", "routers = {'top_k': 1}"),
    (no_module_level_mutable_state, "moe_dist/moe/x.py", "ROUTERS: dict[str, type] = {}"),
    (no_module_level_mutable_state, "moe_dist/moe/x.py", "if True:\n    seen = set()"),
    (no_module_level_mutable_state, "moe_dist/moe/x.py", "names = [n for n in range(3)]"),
    (no_module_level_mutable_state, "moe_dist/moe/x.py", "def f():\n    global state\n    state = 1"),
    (no_rank_is_read_at_import, "moe_dist/runtime/x.py", "import os\nRANK = int(os.environ['RANK'])"),
    (no_rank_is_read_at_import, "moe_dist/runtime/x.py", "import os\nN = os.environ.get('WORLD_SIZE', '1')"),
    (no_rank_is_read_at_import, "moe_dist/runtime/x.py", "import os\ndef f(rank=os.getenv('LOCAL_RANK')):\n    pass"),
    (no_rank_is_read_at_import, "moe_dist/runtime/x.py", "class A:\n    rank = dist.get_rank()"),
    (names_say_what_is_inside, "moe_dist/utils.py", ""),
    (names_say_what_is_inside, "moe_dist/common/x.py", ""),
    (files_and_functions_stay_short, "moe_dist/moe/x.py", "x = 1\n" * 401),
    (files_and_functions_stay_short, "moe_dist/moe/x.py", "def f():\n" + "    pass\n" * 70),
    (functions_take_few_parameters, "moe_dist/moe/x.py", "def f(a, b, c, d, *, e, f, g): ..."),
    (functions_take_few_parameters, "moe_dist/moe/x.py", "class A:\n    def f(self, a, b, c, d, e, f, g): ..."),
    (no_text_names_a_machine, "docs/x.md", "the file is /{}/main/x.py".format("work")),
    (no_text_names_a_machine, "docs/x.md", "from https://{}.org/simple".format("pypi")),
]

LAWFUL = [
    ("moe_dist/model/x.py", "import torch\nfrom moe_dist import __version__\nfrom moe_dist.moe.layer import MoELayer"),
    ("moe_dist/parallel/x.py", "import torch.distributed as dist\ndef rank():\n    return dist.get_rank()"),
    ("moe_dist/train/metrics.py", "import pyarrow as pa\nfrom moe_dist.generate import decode"),
    ("data_pipeline/build.py", "import ray\nimport zstandard\nfrom moe_dist.config import Config"),
    ("launch/cli.py", "app = App()\n@app.command()\ndef train(a, b, c, d, e, f, g): ...\n__all__ = ['train']"),
    ("moe_dist/moe/x.py", "KINDS = {'a': 1}\n_WORDS = ['b']\ndef f():\n    found = []\n    return found"),
    ("moe_dist/runtime/x.py", "import os\nHOME = os.environ.get('HOME')\ndef rank():\n    return os.environ['RANK']"),
    ("moe_dist/moe/x.py", "class A:\n    def f(self, a, b, c, d, e, f): ...\n    x = torch.cuda.is_available"),
    ("docs/x.md", "a folder such as ~/texts or data/root/x"),
]


@pytest.mark.parametrize("rule", CODE_RULES, ids=lambda rule: rule.__name__)
def test_source_keeps_the_rule(rule: Rule) -> None:
    findings = [finding for source in _sources() for finding in rule(source)]
    assert not findings, "\n" + "\n".join(findings)


def test_tracked_text_names_no_machine() -> None:
    findings = [finding for source in _texts() for finding in no_text_names_a_machine(source)]
    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED, ids=lambda x: getattr(x, "__name__", None))
def test_planted_violation_is_caught(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text)))


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _, _ in PLANTED} == {*CODE_RULES, no_text_names_a_machine}


@pytest.mark.parametrize(("path", "text"), LAWFUL)
def test_lawful_source_is_not_accused(path: str, text: str) -> None:
    rules = (*CODE_RULES, no_text_names_a_machine) if path.endswith(".py") else (no_text_names_a_machine,)
    assert [finding for rule in rules for finding in rule(Source(path, text))] == []


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def _sources() -> tuple[Source, ...]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert paths, f"no source found under {ROOT}"
    return tuple(Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths)


def _texts() -> Iterator[Source]:
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(listing, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip("not a git checkout, so nothing is tracked")
    for name in result.stdout.split("\0"):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            yield Source(name, content.decode("utf-8", errors="replace"))


def _room(parts: tuple[str, ...]) -> str:
    """The room of a path or a dotted name; empty for what is not ours."""
    if parts[0] == "moe_dist":
        return parts[1] if len(parts) > 1 and not parts[1].startswith("__") else ""
    return parts[0] if parts[0] in PACKAGES else ""


def _imports(source: Source) -> Iterator[tuple[int, str]]:
    """Every imported name, dotted and absolute, wherever the import stands."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = Path(source.path).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant))


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _module_statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements of the module itself, inside `if` and `try` too, but not those of classes and functions."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.expr):
            yield from _module_statements(node)


def _nodes_run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Everything that an import evaluates: not the bodies of functions, but their defaults and decorators."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            defaults = [default for default in (*node.args.defaults, *node.args.kw_defaults) if default is not None]
            yield from (inner for outer in (*defaults, *node.decorator_list) for inner in ast.walk(outer))
        elif not isinstance(node, ast.Lambda):
            yield node
            yield from _nodes_run_at_import(node)


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in MUTABLE_CALLS
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def _is_empty(value: ast.expr) -> bool:
    """Whether a container starts empty: then it can only be meant to be filled later, whatever its name."""
    if isinstance(value, ast.Call):
        return not value.args and not value.keywords
    return isinstance(value, ast.List | ast.Dict) and not (value.elts if isinstance(value, ast.List) else value.keys)
