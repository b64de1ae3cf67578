"""Imports point down only, and the layers above the engines know nothing of torch: read from the source, not run."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

HTTP_AND_JSON = frozenset({"server", "starlette", "uvicorn", "orjson", "pydantic", "pydantic_settings", "h11"})
HEAVY = frozenset({"torch", "transformers", "accelerate"})


class Rule(NamedTuple):
    """A file, or every module of a folder, does not import `forbidden` packages.

    Neither directly nor through our own modules; `even_late` also forbids importing them inside a function.
    """

    place: str
    forbidden: frozenset[str]
    even_late: bool = False


RULES = [
    Rule("batching", HTTP_AND_JSON | {"httptools"}, even_late=True),
    Rule("server", HEAVY),
    Rule("batching/types.py", HEAVY, even_late=True),
    Rule("batching/events.py", HEAVY, even_late=True),
    Rule("batching/errors.py", HEAVY, even_late=True),
    Rule("batching/stream.py", HEAVY, even_late=True),
    Rule("batching/admission.py", HEAVY, even_late=True),
    Rule("batching/queue.py", HEAVY, even_late=True),
    Rule("batching/engine.py", HEAVY, even_late=True),
    Rule("batching/worker.py", HEAVY, even_late=True),
    Rule("batching/batcher.py", HEAVY, even_late=True),
    Rule("batching/progress.py", HEAVY),
    Rule("batching/checkpoint.py", HEAVY),
    Rule("batching/packed/kv_cache.py", HEAVY, even_late=True),
]


def modules(place: str) -> list[Path]:
    """The file itself, or every module of the folder and of those in it."""
    path = ROOT / place
    return [path] if path.suffix else sorted(path.rglob("*.py"))


CASES = [
    pytest.param(
        path, rule.forbidden, rule.even_late, id=f"{path.relative_to(ROOT)} {'' if rule.even_late else 'start'}"
    )
    for rule in RULES
    for path in modules(rule.place)
]


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


def own(path: Path, *, deferred: bool) -> set[Path]:
    """This project's modules among what a module imports."""
    found = (ROOT / f"{name.replace('.', '/')}.py" for name in imported(path, deferred=deferred))
    return {source for source in found if source.exists()}


def packages(path: Path, *, deferred: bool) -> set[str]:
    return {name.partition(".")[0] for name in imported(path, deferred=deferred)}


def reached(path: Path) -> set[str]:
    """Packages that importing a module brings in, directly or through this project's own modules."""
    seen: set[Path] = set()
    found: set[str] = set()
    todo = [path]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            found |= packages(module, deferred=False)
            todo.extend(own(module, deferred=False))
    return found


def test_there_is_source_to_read() -> None:
    assert all(modules(rule.place) and all(path.exists() for path in modules(rule.place)) for rule in RULES)
    assert ROOT / "batching" / "packed" / "engine.py" in modules("batching")
    assert "torch" in packages(ROOT / "batching" / "padded.py", deferred=False)
    assert "batching" in packages(ROOT / "server" / "service.py", deferred=False)


@pytest.mark.parametrize(("path", "forbidden", "even_late"), CASES)
def test_a_module_imports_nothing_that_the_table_forbids(
    path: Path, forbidden: frozenset[str], even_late: bool
) -> None:
    assert not reached(path) & forbidden
    assert not (even_late and packages(path, deferred=True) & forbidden)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {path: own(path, deferred=True) for room in ("server", "batching") for path in modules(room)}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def rooms() -> list[str]:
    """The rows of the table in server/README.md, from the bottom of the house to its top."""
    table = (ROOT / "server" / "README.md").read_text().partition("who may import whom")[2]
    return re.findall(r"^\| `([\w./]+)` \|", table, re.MULTILINE)


def room_of(path: Path) -> str:
    inside = path.relative_to(ROOT / "server").parts
    return f"{inside[0]}/" if len(inside) > 1 else inside[0]


def test_the_table_of_rooms_has_every_room() -> None:
    assert sorted(rooms()) == sorted({room_of(path) for path in modules("server")} - {"__init__.py"})


@pytest.mark.parametrize("path", modules("server"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_above_it_in_the_table(path: Path) -> None:
    order = ["__init__.py", *rooms()]
    used = {room_of(other) for other in own(path, deferred=True) if other.is_relative_to(ROOT / "server")}
    assert all(order.index(room) <= order.index(room_of(path)) for room in used), used


@pytest.mark.parametrize("room", [room for room in rooms() if room.endswith("/")])
def test_each_room_says_what_lives_there(room: str) -> None:
    folder = ROOT / "server" / room
    told = (folder / "README.md").read_text()
    assert [path.name for path in folder.glob("[a-z]*.py") if f"`{path.name}`" not in told] == []
