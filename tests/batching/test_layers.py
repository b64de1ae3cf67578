"""Imports point down only, and the layers above the engine know nothing of torch: read from the source, not run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BATCHING = sorted((ROOT / "batching").glob("*.py"))
SERVER = sorted((ROOT / "server").glob("*.py"))
WITHOUT_TORCH = ("batcher", "queue", "row", "stream", "events", "types", "errors", "worker", "rate", "engine")

HTTP_AND_JSON = {"server", "starlette", "uvicorn", "orjson", "pydantic", "pydantic_settings", "httptools", "h11"}
HEAVY = {"torch", "transformers", "accelerate"}


def statements(tree: ast.AST, *, deferred: bool) -> Iterator[ast.AST]:
    """Every node, or only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if deferred or not (is_function(node) or is_for_types_only(node)):
            yield from statements(node, deferred=deferred)


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported(path: Path, *, deferred: bool) -> set[str]:
    """Dotted names of all that a module imports; with `deferred` also inside functions and for types only."""
    names: set[str] = set()
    for node in statements(ast.parse(path.read_text()), deferred=deferred):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def packages(path: Path, *, deferred: bool) -> set[str]:
    return {name.partition(".")[0] for name in imported(path, deferred=deferred)}


def reached(path: Path) -> set[str]:
    """Packages that importing a module brings in, directly or through this project's own modules."""
    seen: set[Path] = set()
    found: set[str] = set()
    todo = [path]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        found |= packages(module, deferred=False)
        own = (ROOT / f"{name.replace('.', '/')}.py" for name in imported(module, deferred=False))
        todo.extend(source for source in own if source.exists())
    return found


def test_there_is_source_to_read() -> None:
    assert {path.stem for path in BATCHING} >= {*WITHOUT_TORCH, "generate", "sampling"}
    assert "torch" in packages(ROOT / "batching" / "generate.py", deferred=False)
    assert "batching" in packages(ROOT / "server" / "service.py", deferred=False)


@pytest.mark.parametrize("path", BATCHING, ids=lambda path: path.stem)
def test_batching_sees_neither_http_nor_json_nor_the_server(path: Path) -> None:
    assert not packages(path, deferred=True) & HTTP_AND_JSON


@pytest.mark.parametrize("path", SERVER, ids=lambda path: path.stem)
def test_the_server_starts_without_torch(path: Path) -> None:
    assert not reached(path) & HEAVY


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_the_layers_above_the_engine_do_not_know_torch(name: str) -> None:
    path = ROOT / "batching" / f"{name}.py"
    assert not (packages(path, deferred=True) | reached(path)) & HEAVY
