"""The READMEs agree with what is there: settings, paths, files, links, figures, and commands with their flags."""

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from server import cli, settings
from server.app import routes
from server.settings import Settings
from tests.live import ROOT, SMALL, Process, environment, live, process

FOLDERS = ("server", "batching", "benchmarks", "deploy", "tests")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.md"))])
README = (ROOT / "README.md").read_text()
API = (ROOT / "server" / "README.md").read_text()
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [body for _, found, body in FENCE.findall(text) if found == language]


def inline(text: str) -> list[str]:
    """What stands between single backticks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


# Settings, paths, figures


def default(value: object) -> str:
    match value:
        case None | ():
            return "none"
        case bool():
            return "on" if value else "off"
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def test_the_table_of_settings_is_made_of_their_defaults_and_descriptions() -> None:
    rows = re.findall(r"^\| `--([\w-]+)` \| ([^|]+) \| (.+) \|$", API, re.MULTILINE)
    fields = Settings.model_fields.items()
    assert rows == [(each.replace("_", "-"), default(field.default), field.description) for each, field in fields]


def test_the_api_has_every_path_and_the_front_page_all_but_those_of_the_web_page() -> None:
    for route in routes():
        path = re.sub(r":path}", "}", route.path)
        if not path.endswith((".css", ".js")):
            assert path in API or f"/v1{path}" in API, path
            assert path in README or f"/v1{path}" in README or path.startswith("/internal/") or "{name}" in path, path


def test_the_front_page_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_each_figure_of_the_front_page_is_one_of_the_results() -> None:
    table = README.partition("## Figures")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:-1] for row in re.findall(r"^\|.*\|$", table, re.MULTILINE)][2:]
    assert len(rows) > 5
    for _, _, ours, peer, _, measured in rows:
        figures = re.findall(r"\d{1,3}(?:,\d{3})+|\d+\.\d+|\d+", ours + peer.rpartition(":")[2])
        assert figures
        commits = re.findall(r"\b[0-9a-f]{8}\b", measured)
        missing = [one for one in [*figures, *commits] if not re.search(rf"(?<![\d,.]){one}(?![\d,.]*\d)", RESULTS)]
        assert missing == []


def test_the_core_has_about_as_many_lines_as_the_front_page_says() -> None:
    found = re.search(r"\*\*The core, in reading order\*\*, about ([\d,]+) lines:(.*?)\n\n", README, re.DOTALL)
    assert found
    files = re.findall(r"`([\w/]+\.py)`", found[2])
    assert len(files) > 5
    lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
    assert lines == pytest.approx(int(found[1].replace(",", "")), rel=0.1)


# Files and links


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_each_link_leads_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)", document.read_text()):
        if target.startswith("http"):
            continue
        file = document.parent / target if target else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), anchor


def anchors(file: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)+\.(?:py|md|json|ya?ml|sh|env|png|service)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_each_file_that_is_named_is_there(document: Path) -> None:
    named = [code for code in inline(document.read_text()) if FILE.fullmatch(code) and not code.startswith("out/")]
    assert [file for file in named if not ((ROOT / file).exists() or (document.parent / file).exists())] == []


# Commands

KEYWORDS = {"do", "until", "while", "if", "then", "{", "done", "}"}
OTHERS = frozenset(
    [
        *(".", "export", "for", "grep", "kill", "mkdir", "printf", "sed", "set", "sleep", "wait"),
        *(
            ".venv/bin/pip",
            ".venv/bin/ray",
            ".venv/bin/serve",
            "docker",
            "guidellm",
            "haproxy",
            "kubectl",
            "lm-eval",
            "pip",
        ),
        *("haproxy", "prometheus", "python3", "systemctl"),
    ]
)
"""Programs whose words are checked no further than that the files exist which they name."""
OURS = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:sudo |\.venv/bin/|python3? |make |microbatch |docker |kubectl |deploy/tmux\.sh |prometheus -)"
)
PLACES = ("deploy/", "tests/", "benchmarks/", "server/", "batching/")


def commands(block: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, without redirections and variables set for them."""
    pending = ""
    for line in block.replace("\\\n", " ").splitlines():
        pending += line + "\n"
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quoted string goes on
            continue
        pending = ""
        yield from simple(words)
    assert not pending, f"a quote is not closed: {pending}"


def simple(words: Sequence[str]) -> Iterator[list[str]]:
    command: list[str] = []
    target = False
    for word in [*words, ";"]:
        if target or word == "$":
            target = False
        elif set(word) <= set("<>&") and set(word) & set("<>"):
            target = True
        elif set(word) <= set("();|&"):
            yield command
            command = []
        elif command or not (word in KEYWORDS or re.fullmatch(r"\w+=.*", word)):
            command.append(word)


def in_document(document: Path) -> list[list[str]]:
    text = document.read_text()
    lines = [code for code in inline(text) if OURS.match(code)]
    return [command for block in [*blocks(text, "sh"), *lines] for command in commands(block) if command]


COMMANDS = {document: in_document(document) for document in DOCUMENTS}


class Understood(Exception):
    """A command's flags make sense."""


def check(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless the command exists and would understand its flags."""
    words = [word.replace("URL", "http://127.0.0.1:21010") for word in words if not re.fullmatch(r"\[\w+\]", word)]
    assert all(Path(ROOT, word).exists() for word in words if word.startswith(PLACES)), words
    match words:
        case ["sudo", *rest]:
            check(rest, monkeypatch)
        case ["make", *arguments]:
            check_make(arguments, monkeypatch)
        case [".venv/bin/python" | "python", "-m", "server", *flags]:
            settings.parse(flags)
        case [".venv/bin/python" | "python", "-m", module, *flags]:
            check_module(module, flags, monkeypatch)
        case ["microbatch" | ".venv/bin/microbatch", *arguments]:
            assert f"microbatch {arguments[0]}" in cli.USAGE
        case ["deploy/tmux.sh", command, *_]:
            assert re.search(rf"deploy/tmux.sh .*\b{command}\b", Path(ROOT, "deploy/tmux.sh").read_text())
        case ["curl", *_]:
            check_curl(words)
        case _:
            assert words[0] in OTHERS, words


def check_make(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`make --dry-run` prints what it would run; that is checked as well where it is one of our own programs."""
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in commands(done.stdout if arguments[0] in {"run", "bench"} else ""):
        if command[:2] == [".venv/bin/python", "-m"] and command[2] != "pip":
            check(command, monkeypatch)


def check_module(module: str, flags: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs its `main` until the flags are parsed."""
    if not (flags and module.startswith("benchmarks.")):
        assert importlib.util.find_spec(module)
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser, *arguments: Sequence[str] | None) -> None:
        parse_args(parser, *arguments)
        raise Understood

    main = importlib.import_module(module).main
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        patch.setattr(sys, "argv", [module, *flags])
        with pytest.raises(Understood):
            main()


def check_curl(words: Sequence[str]) -> None:
    """Sends the request to a server around a scripted engine."""
    [url] = [word for word in words if word.startswith("http://127.0.0.1:21010")]
    path = url.removeprefix("http://127.0.0.1:21010")
    with live() as service:
        if "-d" in words:
            header, value = words[words.index("-H") + 1].split(": ")
            answer = service.post(words[words.index("-d") + 1], path, headers={header: value})
        else:
            answer = service.get(path)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("variables", "port"),
    [({}, "21010"), ({"MICROBATCH_PORT": "8000"}, "8000"), ({"MICROBATCH_PORT": "8000", "PORT": "9000"}, "9000")],
)
def test_make_run_and_bench_agree_on_the_port_that_the_environment_sets(variables: dict[str, str], port: str) -> None:
    command = ["make", "--dry-run", "run", "bench"]
    done = subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True)
    assert re.findall(r"--port (\d+)|--url http://127\.0\.0\.1:(\d+)", done.stdout) == [(port, ""), ("", port)]


@pytest.mark.parametrize(
    ("arguments", "variables", "names"),
    [
        ([], {"NAME": "mine"}, ["mine"]),
        ([], {"NAME": "DESKTOP-1", "WSL_DISTRO_NAME": "Debian"}, []),
        (["NAME=mine"], {"NAME": "DESKTOP-1", "WSL_DISTRO_NAME": "Debian"}, ["mine"]),
    ],
)
def test_a_machine_s_name_is_not_taken_for_the_model_s(
    arguments: list[str], variables: dict[str, str], names: list[str]
) -> None:
    command = ["make", "--dry-run", "run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True)
    assert re.findall(r"--name '(.*?)'", done.stdout) == names


def test_the_quick_tests_are_files_that_are_there() -> None:
    done = subprocess.run(["make", "--dry-run", "test-quick"], cwd=ROOT, capture_output=True, text=True)
    pattern = done.stdout[done.stdout.index("tests/") :]
    files = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True).stdout.split()
    assert len(files) > 20
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_commands_are_found() -> None:
    assert {name(document) for document, found in COMMANDS.items() if len(found) > 2} >= {
        "README.md",
        "benchmarks/README.md",
        "benchmarks/RESULTS.md",
        "deploy/README.md",
        "deploy/kubernetes/README.md",
        "deploy/ragflow/README.md",
        "deploy/ray/README.md",
    }


@pytest.mark.parametrize("document", [each for each, found in COMMANDS.items() if found], ids=name)
def test_each_command_would_be_understood(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in COMMANDS[document]:
        check(command, monkeypatch)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_the_shell_can_read_each_script(document: Path) -> None:
    for block in blocks(document.read_text(), "sh"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.stderr == ""


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make run ARGS='--no-such-flag 1'",
        ".venv/bin/python -m server --max-batch-size many",
        ".venv/bin/python -m benchmarks.load --no-such-flag",
        "microbatch cook",
        "deploy/tmux.sh dance",
        "kubectl apply -k deploy/nowhere",
        "curl http://127.0.0.1:21010/nowhere",
        "unknown-program",
    ],
)
def test_a_command_that_would_not_be_understood_is_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [words] = [found for found in commands(command) if found]
    with pytest.raises((AssertionError, SystemExit)):
        check(words, monkeypatch)


# Programs

PROGRAMS = [document for document in DOCUMENTS if blocks(document.read_text(), "python")]


@pytest.fixture(scope="module")
def demo() -> Iterator[Process]:
    with process(*SMALL) as service:
        service.wait_ready()
        yield service


@pytest.mark.model
@pytest.mark.parametrize("document", PROGRAMS, ids=name)
def test_each_program_prints_what_stands_below_it(document: Path, demo: Process) -> None:
    for program, printed in re.findall(r"^```python\n(.*?)^```\n+```\n(.*?)^```$", document.read_text(), re.M | re.S):
        program = program.replace("http://127.0.0.1:21010", demo.url)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert (done.stdout, done.stderr) == (printed, "")
