"""Sizes that a reader can take in, light imports, and no circle; pyproject.toml says who may import whom."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "hunyuan_staged"
SCRIPTS = ["stage1_text_encoder.py", "stage2_transformer.py", "stage3_vae_decoder.py"]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "demo" not in path.relative_to(PACKAGE).parts)
MODULE_LINES, FUNCTION_LINES, PARAMETERS = 300, 60, 8
SCRIPT_LINES, STORY_LINES = 130, 40

# What was over a limit when it was drawn, with its size then: it may only shrink, and goes from here once it fits.
LARGE_MODULES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
MANY_PARAMETERS: dict[str, int] = {}
KERNELS = ("models/vae_kernels.py", "models/block_kernels.py")  # Triton's take their numbers one by one

TORCH_FREE = [
    "errors",
    "flags",
    "options",
    "jobs.reading",
    "parsing",
    "versions",
    "geometry",
    "attention.modes",
    "decoding.tiling",
    "sampling.cache_settings",
]


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return [
        (f"{name(path)} {node.name}", node)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    found = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([arg for arg in found if arg not in ("self", "cls")])


def over(sizes: dict[str, int], limit: int) -> dict[str, int]:
    return {what: size for what, size in sizes.items() if size > limit}


def check(found: dict[str, int], known: dict[str, int], limit: int) -> None:
    """Nothing new is over the limit, nothing known has grown, and what fits by now is no longer listed."""
    assert {what: size for what, size in found.items() if size > known.get(what, limit)} == {}
    assert {what for what in known if what not in found} == set(), "it fits by now: take it off the list"


def test_modules_are_short():
    sizes = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert len(sizes) > 80
    check(over(sizes, MODULE_LINES), LARGE_MODULES, MODULE_LINES)


def test_functions_are_short():
    check(over({what: lines(node) for what, node in functions()}, FUNCTION_LINES), LONG_FUNCTIONS, FUNCTION_LINES)


def test_functions_take_few_arguments():
    counts = {what: parameters(node) for what, node in functions() if not what.startswith(KERNELS)}
    check(over(counts, PARAMETERS), MANY_PARAMETERS, PARAMETERS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_so_is_its_story(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= SCRIPT_LINES
    longest = max(lines(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    assert longest <= STORY_LINES


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=name)
def test_importing_a_package_imports_nothing(path):
    """Nearly: two names of the demo, which are paths."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 12
    imported = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", "import") for node in imported} <= {"pathlib", "hunyuan_staged.run_options"}


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_judges_flags_imports_neither_torch_nor_numpy_nor_a_network(module):
    program = (
        f"import json, sys, hunyuan_staged.{module}\n"
        "print(json.dumps(sorted({'torch', 'numpy', 'diffusers', 'transformers', 'http', 'ssl'} & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(result.stdout) == []


def imports() -> dict[str, set[str]]:
    """Which modules each module imports when it is imported itself."""
    modules = {"hunyuan_staged." + name(path).removesuffix(".py").replace("/", ".") for path in MODULES}
    found: dict[str, set[str]] = {}
    for path in MODULES:
        wanted: set[str] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found["hunyuan_staged." + name(path).removesuffix(".py").replace("/", ".")] = wanted & modules
    return found


def test_no_imports_go_in_a_circle():
    left = imports()
    assert sum(map(len, left.values())) > 200
    while free := {module for module, wanted in left.items() if not wanted & left.keys()}:
        left = {module: wanted for module, wanted in left.items() if module not in free}
    assert left == {}
