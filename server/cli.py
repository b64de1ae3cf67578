"""The command `microbatch`: `serve` starts the server, `bench` load-tests one. Installed, it works from any folder."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Never

from server.version import VERSION

USAGE = """usage: microbatch serve [MODEL] [flags]   serve a model: a local folder, a .gguf file or a hub id
       microbatch bench [flags]           load-test a server; from a checkout
       microbatch --version
       microbatch --help

microbatch serve --help and microbatch bench --help list the flags."""

CHECKOUT = Path(__file__).parents[1]


def main() -> None:
    """Run the given command. Exits with status 2 if there is no such command."""
    match sys.argv[1:]:
        case ["serve", *arguments]:
            serve(arguments)
        case ["bench", *arguments]:
            raise SystemExit(load_test()(arguments, "microbatch bench"))
        case ["--version"]:
            print(f"microbatch {VERSION}")
        case ["--help" | "-h"]:
            print(USAGE)
        case [word, *_]:
            give_up(f"unknown command {word}; see microbatch --help")
        case _:
            give_up("missing command, serve or bench; see microbatch --help")


def serve(arguments: list[str]) -> None:
    """The same as `python -m server`."""
    from server.__main__ import start
    from server.settings import parse

    start(parse(arguments, "microbatch serve"))


def load_test() -> Callable[[list[str], str], int]:
    """The entry point of `benchmarks.load`, which is not installed, because other packages use that name, too."""
    if not (CHECKOUT / "pyproject.toml").is_file():
        give_up(
            "the load test is not installed with the package; "
            "run pip install --editable '.[bench]' in a checkout of the source, then microbatch bench again"
        )
    sys.path.insert(0, str(CHECKOUT))
    try:
        from benchmarks.load import main as load
    except ModuleNotFoundError as error:
        give_up(f"the load test needs {error.name}; run pip install --editable '.[bench]' in {CHECKOUT}")
    return load


def give_up(sentence: str) -> Never:
    print(f"microbatch: {sentence}", file=sys.stderr)
    raise SystemExit(2)
