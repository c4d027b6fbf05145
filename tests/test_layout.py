"""The shape of the source: imports run one way, nothing heavy is read early, everything public is described."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llama_adapter

SOURCE = Path(llama_adapter.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ORDER = [
    ("errors",), ("settings", "files", "progress"), ("core",), ("base", "compiler"), ("conditions",), ("formats",),
    ("data",), ("training", "inference"), ("serving", "evaluation"), ("cli",),
]  # fmt: skip
"""A room may import those of the tiers before its own.."""
ROOMS = {"core", "formats", "conditions", "data", "training", "inference", "serving", "evaluation", "cli"}
TIER = {room: number for number, tier in enumerate(ORDER) for room in tier}


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Names inside the package that a file imports anywhere: "config", "data.encode", "" for the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            source = (node.module or "").split(".")
            if source[0] == "llama_adapter":
                inner = ".".join(source[1:])
                for alias in node.names:
                    deeper = f"{inner}.{alias.name}".strip(".")
                    found.add(deeper if deeper in MODULES else inner)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "llama_adapter":
                    found.add(".".join(alias.name.split(".")[1:]))
    return found


MODULES = {module_of(path) for path in FILES}


def room(module: str) -> str:
    return module.partition(".")[0]


def may_import(module: str, imported: str) -> bool:
    here, there = room(module), room(imported)
    return here == there or TIER[there] < TIER[here]


def definitions(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]


def test_every_module_lives_in_a_room():
    assert {room(module) for module in MODULES} - {"", "__main__"} <= set(TIER)
    assert set(TIER) - {"errors", "settings", "files", "progress", "base", "compiler"} == ROOMS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    module = module_of(path)
    if module in ("", "__main__"):
        return  # the package's front and the command's entry stand above all others
    for imported in imports_of(path) - {""}:
        assert may_import(module, imported), f"{module} imports {imported}, which stands behind it"


def test_no_import_goes_round_in_a_circle():
    graph = {module_of(path): imports_of(path) - {module_of(path), ""} for path in FILES}
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in finished:
            for imported in graph.get(module, ()):
                visit(imported, (*above, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_the_one_way_test_sees_a_wrong_import(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "def f():\n    from llama_adapter.training.loop import train\n    from llama_adapter import formats\n"
    )
    assert imports_of(wrong) == {"training.loop", "formats"}
    assert not may_import("core.model", "formats.native")
    assert not may_import("inference.session", "training.loop")
    assert may_import("evaluation.instructions", "inference.session")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_stay_short(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400
    for node in definitions(path):
        if not isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_everything_public_is_described(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    public = [tree]
    while public:
        for node in public.pop().body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            ):
                assert ast.get_docstring(node), f"{node.name} has no docstring"
                if isinstance(node, ast.ClassDef):
                    public.append(node)


SHARED = {"run", "add_parser", "EXAMPLES", "DESCRIPTION", "log"}
"""What each command, or each module that logs, has of its own."""


def public_names(path: Path) -> set[str]:
    """Functions, classes and constants that a module defines at its top level."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in found if not name.startswith("_")} - SHARED


def test_a_public_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for path in FILES:
        for name in public_names(path):
            places.setdefault(name, []).append(module_of(path))
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_the_one_meaning_test_sees_every_kind_of_definition(tmp_path):
    file = tmp_path / "names.py"
    file.write_text(
        "A, B = 1, 2\nC: int = 3\nlog = _x = 0\nfrom os import path\n"
        "class D: inner = 1\nasync def e(): f = 1\ndef g(): ...\n"
    )
    assert public_names(file) == {"A", "B", "C", "D", "e", "g"}


def test_all_names_are_importable_and_described():
    assert llama_adapter.__all__ == sorted(llama_adapter.__all__)
    for name in llama_adapter.__all__:
        thing = getattr(llama_adapter, name)
        assert thing.__doc__, name
        assert not thing.__doc__.startswith(f"{name}("), f"{name} has only the docstring dataclasses make"
        assert thing.__module__.startswith("llama_adapter."), name


def test_type_checkers_see_the_same_names_from_the_same_modules():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(seen) == llama_adapter.__all__
    for name, module in seen.items():
        assert getattr(llama_adapter, name) is getattr(importlib.import_module(module), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'add_adaptor'"):
        llama_adapter.add_adaptor  # noqa: B018


def test_the_version_is_one_that_packaging_takes():
    from packaging.version import Version

    assert str(Version(llama_adapter.__version__)) == llama_adapter.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", llama_adapter.__version__)


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import llama_adapter", ["torch", "transformers", "numpy", "pydantic", "yaml", "rich", "matplotlib"]),
        ("from llama_adapter import LlamaAdapterError, AdapterConfig", ["torch", "transformers", "pydantic"]),
        ("import llama_adapter.cli", ["torch", "transformers", "numpy", "pydantic", "yaml", "rich", "matplotlib"]),
        (
            "import llama_adapter.training.loop, llama_adapter.inference.session",
            ["datasets", "tensorboard", "wandb", "peft", "trl"],
        ),
    ],
)
def test_heavy_packages_wait_until_they_are_needed(statement, forbidden):
    code = f"import sys\n{statement}\nprint([name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
