"""The architecture, as a test: who may import whom, who may touch which library, how large and how still a file is.

The rules are a table; a function lists what speaks against a file. The same function is asked about planted offenders,
so that a rule which stopped biting would be seen.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES, MAX_FUNCTION_LINES = 400, 60

# room -> the rooms it may import besides itself. Read top to bottom: nothing points up.
MAY_IMPORT: dict[str, set[str]] = {
    "configs": set(),
    "model": {"configs"},
    "data_prep": {"configs"},
    "slurm": {"configs"},
    "parallel": {"configs", "model"},
    "pretrain": {"configs", "model", "parallel", "data_prep", "slurm"},
}
# library -> the only places (rooms or files) that may import it
ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch": ("model/", "parallel/", "pretrain/"),
    "torch.distributed": ("parallel/",),
    "deepspeed": ("parallel/",),
    "megatron": ("parallel/",),
    "pydantic": ("configs/",),
    "pydantic_core": ("configs/",),
    "yaml": ("configs/",),
    "sentencepiece": ("data_prep/",),
    "tokenizers": ("data_prep/",),
    "datasets": ("data_prep/",),
    "mpi4py": ("data_prep/",),
    "subprocess": ("slurm/submit.py",),
    "argparse": ("pretrain/arguments.py",),
    "signal": ("pretrain/stop_signals.py",),
    "torch.utils.tensorboard": ("pretrain/metrics.py",),
    "wandb": ("pretrain/metrics.py",),
}
SLURM_VARIABLES_IN = "slurm/environ.py"

FILES = sorted(str(path.relative_to(ROOT)) for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def imported_names(tree: ast.AST) -> set[str]:
    """Every dotted name imported anywhere, lazily or for types only."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def is_within(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def faults(file: str, source: str) -> list[str]:
    """What speaks against a file of this path and text."""
    tree, room = ast.parse(source), file.split("/")[0]
    names = imported_names(tree)
    reached = {name.split(".")[0] for name in names} & MAY_IMPORT.keys()
    found = [f"imports the room {other}" for other in sorted(reached - MAY_IMPORT[room] - {room})]
    for library, places in ONLY_IN.items():
        if any(is_within(name, library) for name in names) and not file.startswith(places):
            found.append(f"imports {library}, which belongs to {', '.join(places)}")
    if source.count("\n") > MAX_LINES:
        found.append(f"has {source.count(chr(10))} lines")
    for node in ast.walk(tree):
        found += faults_of_node(file, node)
    for statement in tree.body:
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        # An empty container at module level is there to be filled: state that changes.
        if value is not None and ast.unparse(value) in ("[]", "{}", "set()", "dict()", "list()"):
            found.append(f"line {statement.lineno}: an empty container at module level")
    return found


def faults_of_node(file: str, node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom) and node.level:
        return [f"line {node.lineno}: a relative import"]
    if isinstance(node, ast.Global):
        return [f"line {node.lineno}: global {', '.join(node.names)}"]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        return [f"line {node.lineno}: {node.name} has {lines} lines"] if lines > MAX_FUNCTION_LINES else []
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and file != SLURM_VARIABLES_IN:
        # Whole strings only: prose may speak of SLURM_* variables, a key of the environment is nothing but the name.
        return [f"line {node.lineno}: the variable {node.value}"] if re.fullmatch(r"SLURM_\w+", node.value) else []
    return []


@pytest.mark.parametrize("file", FILES)
def test_file_keeps_to_its_room(file: str) -> None:
    assert faults(file, (ROOT / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("configs/x.py", "import model.glam", "room model"),
        ("configs/x.py", "def f():\n    from parallel import groups", "room parallel"),
        ("model/x.py", "from data_prep.format import TokenStream", "room data_prep"),
        ("model/x.py", "import torch.distributed as dist", "torch.distributed"),
        ("model/x.py", "from torch import distributed", "torch.distributed"),
        ("data_prep/x.py", "import torch", "torch"),
        ("slurm/x.py", "from parallel.topology import Topology", "room parallel"),
        ("slurm/render.py", "import subprocess", "subprocess"),
        ("parallel/x.py", "from pretrain import budget", "room pretrain"),
        ("pretrain/x.py", "import deepspeed", "deepspeed"),
        ("pretrain/x.py", "from argparse import Namespace", "argparse"),
        ("pretrain/x.py", "import importlib\nimportlib.import_module('megatron.core')", "megatron"),
        ("pretrain/x.py", "from torch.utils.tensorboard import SummaryWriter", "tensorboard"),
        ("pretrain/x.py", "import signal", "signal"),
        ("parallel/x.py", "from pydantic import BaseModel", "pydantic"),
        ("parallel/x.py", "from . import groups", "relative"),
        ("pretrain/x.py", "def f():\n    global x", "global x"),
        ("pretrain/x.py", "import os\nos.environ['SLURM_PROCID']", "SLURM_PROCID"),
        ("model/x.py", "CACHE: dict[str, int] = {}", "empty container"),
        ("model/x.py", "x = 1\n" * 401, "401 lines"),
        ("model/x.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
    ],
)
def test_the_rules_bite(file: str, source: str, fault: str) -> None:
    assert any(fault in found for found in faults(file, source))


def test_what_is_allowed_passes() -> None:
    body = "import os\nimport torch\nimport torch.distributed\nfrom configs.run import RunConfig\n"
    assert faults("parallel/x.py", body + "def f() -> None:\n" + "    x = 1\n" * 59) == []
    assert faults("slurm/environ.py", "import os\nos.environ['SLURM_PROCID']") == []
    assert faults("pretrain/x.py", '"""Under srun the SLURM_* variables say it."""') == []


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_room_has_a_card(room: str) -> None:
    """`__init__.py` says what lives here, what does not and who may come in, and does nothing."""
    tree = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
    card = ast.get_docstring(tree) or ""
    assert card.startswith(f"{room}: ") and len(card.splitlines()) >= 3
    assert len(tree.body) == 1, "a room card holds no code"


def test_every_module_says_what_it_is_for() -> None:
    silent = [file for file in FILES if not ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))]
    assert silent == []


def test_scripts_shadow_no_standard_module() -> None:
    """`python pretrain/main.py` puts pretrain/ first on the import path."""
    assert {path.stem for path in (ROOT / "pretrain").iterdir()} & sys.stdlib_module_names == set()


QUIET_ROOMS = ("configs", "model", "data_prep", "slurm")

# Run in a fresh interpreter: third-party libraries first, whose start is not ours to answer for; then every module of
# the quiet rooms, with an audit hook and a comparison of the process's state.
IMPORT_ALL = """
import importlib, json, os, random, signal, sys, threading
modules, outside = json.loads(sys.argv[1])
for name in outside:
    try:
        importlib.import_module(name)
    except ImportError:  # a name imported from a module, not a module; or an optional library
        pass
import torch
touched = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+"):
        touched.append(f"opens {arguments[0]} for writing")
    elif event.startswith(("subprocess.", "socket.", "os.mkdir", "os.rename", "os.remove", "os.system", "os.putenv")):
        touched.append(event)
def state():
    return {
        "environ": dict(os.environ), "cwd": os.getcwd(), "threads": threading.active_count(),
        "torch": (str(torch.get_default_dtype()), torch.get_num_threads(), torch.initial_seed()),
        "torch random": torch.get_rng_state().tolist(), "random": hash(random.getstate()),
        "signals": [repr(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
    }
before = state()
sys.addaudithook(watch)
for name in modules:
    importlib.import_module(name)
after = state()
touched += [key for key in before if before[key] != after[key]]
print(json.dumps({"touched": touched, "loaded": sorted(sys.modules)}))
"""


def imports_of(modules: list[str], program: str = IMPORT_ALL) -> dict[str, list[str]]:
    sources = [(ROOT / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8") for name in modules]
    names = {name for source in sources for name in imported_names(ast.parse(source))}
    outside = sorted(name for name in names if name.split(".")[0] not in MAY_IMPORT)
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, json.dumps([modules, outside])],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, f"importing prints: {done.stdout}"
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_importing_touches_nothing() -> None:
    modules = [
        file.removesuffix(".py").replace("/", ".")
        for file in FILES
        if file.startswith(QUIET_ROOMS) and not file.endswith("__init__.py")
    ]
    assert imports_of(modules)["touched"] == []


def test_light_rooms_do_not_load_torch() -> None:
    """configs, data_prep and slurm stay quick to import, and nothing below the line loads DeepSpeed."""
    light = [
        file.removesuffix(".py").replace("/", ".")
        for file in FILES
        if file.startswith(("configs", "data_prep", "slurm")) and not file.endswith("__init__.py")
    ]
    program = textwrap.dedent("""
        import importlib, json, sys
        for name in json.loads(sys.argv[1])[0]:
            importlib.import_module(name)
        print(json.dumps({"loaded": sorted(sys.modules)}))
    """)
    loaded = set(imports_of(light, program)["loaded"])
    assert loaded & {"torch", "deepspeed", "megatron"} == set()
    assert set(light) <= loaded
