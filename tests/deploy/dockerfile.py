"""A Dockerfile read into stages, and a stage's steps done without Docker: folders of the image become folders here."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import orjson


@dataclass(frozen=True)
class Step:
    """One instruction: `word` in capitals, and the rest of its lines."""

    word: str
    rest: str


@dataclass
class Stage:
    name: str
    base: str
    steps: list[Step] = field(default_factory=list)

    def of(self, word: str) -> list[str]:
        return [step.rest for step in self.steps if step.word == word]

    def last(self, word: str) -> str:
        return self.of(word)[-1]

    def environment(self) -> dict[str, str]:
        pairs = re.findall(r"(\w+)=(\S+)", " ".join(self.of("ENV")))
        return dict(pairs)


def stages(dockerfile: Path) -> list[Stage]:
    """Its stages in order. What comes before the first FROM is left out."""
    found: list[Stage] = []
    for step in instructions(dockerfile.read_text()):
        if step.word == "FROM":
            base, _, name = step.rest.partition(" AS ")
            found.append(Stage(name, base))
        elif found:
            found[-1].steps.append(step)
    return found


def instructions(text: str) -> Iterator[Step]:
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for match in re.finditer(r"^([A-Z]+) ((?:.*\\\n)*.*)$", lines, re.MULTILINE):
        yield Step(match[1], match[2])


@dataclass
class Replay:
    """Does a stage's COPY and RUN steps. `places`: folders of the image as folders here. `context` is copied from."""

    context: Path
    places: Mapping[str, Path]
    variables: dict[str, str]

    def here(self, text: str) -> str:
        for there, place in self.places.items():
            text = text.replace(there, str(place))
        return text

    def run(self, stage: Stage) -> None:
        folder = self.places["/src"]
        for step in stage.steps:
            match step.word:
                case "ARG" if "=" in step.rest:
                    name, _, value = step.rest.partition("=")
                    self.variables.setdefault(name, value)
                case "ENV":
                    pairs = re.findall(r"(\w+)=(\S+)", step.rest)
                    self.variables |= {name: self.here(os.path.expandvars(value)) for name, value in pairs}
                case "COPY":
                    *sources, target = step.rest.split()
                    self._copy(sources, folder / target)
                case "RUN":
                    shell = ["bash", "-euo", "pipefail", "-c"]
                    subprocess.run([*shell, self.here(step.rest)], cwd=folder, env=self.variables, check=True)

    def _copy(self, sources: list[str], target: Path) -> None:
        for source in sources:
            whole = self.context / source
            if whole.is_dir():
                shutil.copytree(whole, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(exist_ok=True)
                shutil.copy(whole, target)


def command(text: str) -> list[str]:
    """The words of an instruction in JSON form."""
    words: list[str] = orjson.loads(text[text.index("[") :])
    return words
