"""The clients that run for real: a program for each, what it does, and how it is run against a scripted model."""

import json
import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.clients.model import QUESTIONS
from tests.live import ROOT, environment

PROGRAMS = Path(__file__).parent / "programs"
INSTALLED = ROOT / ".clients"
NPM, PYTHON = INSTALLED / "node_modules", INSTALLED / "python"
NOWHERE = "http://127.0.0.1:9"
VARIABLES = {
    **{name: NOWHERE for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())},
    **{"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"},
    "CLAUDE_CODE": str(NPM / "@anthropic-ai" / "claude-code" / "cli-wrapper.cjs"),
    "CODEX": str(NPM / ".bin" / "codex"),
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""A proxy that is not there for all but this machine: whatever a client would send elsewhere stays here."""

SECONDS = 600.0
"""After which a client that hangs is given up."""

CHATS = frozenset(["plain", "streamed", "next", "called", "told"])


@dataclass(frozen=True)
class Client:
    """`does` are the kinds of what its program does, each the start of a key of what it prints."""

    program: str
    package: str
    does: frozenset[str]

    @property
    def of_npm(self) -> bool:
        return self.program.endswith(".mjs") or self.package.startswith("@")

    def version(self) -> str | None:
        """The installed version, if there is one."""
        try:
            if self.of_npm:
                return str(json.loads((NPM / self.package / "package.json").read_text())["version"])
            packages = sysconfig.get_path("purelib", vars={"base": str(PYTHON)})
            return next(iter(metadata.distributions(name=self.package, path=[packages]))).version
        except (OSError, StopIteration):
            return None

    def needed(self) -> str:
        """The installed version. Without one a test is skipped, and fails where CI is true."""
        version = self.version()
        if version is not None and (shutil.which("node") or not self.of_npm):
            return version
        reason = f"{self.package} is not installed: make test-clients{' (with npm)' if self.of_npm else ''}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)

    def run(self, url: str) -> dict[str, Any]:
        """What the program prints: for each thing that it does, what the client made of the answer."""
        given = [url, json.dumps(QUESTIONS)]
        program = PROGRAMS / self.program
        # From a file Node would look for packages beside it; from stdin it looks in the folder that it runs in.
        script = self.program.endswith(".mjs")
        python = str(PYTHON / "bin" / "python")
        command = ["node", "--input-type=module", "-", *given] if script else [python, str(program), *given]
        with program.open() as source:
            done = subprocess.run(
                command,
                stdin=source if script else subprocess.DEVNULL,
                cwd=INSTALLED if script else ROOT,
                env=environment(**VARIABLES),
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


CLIENTS = {
    "openai-python": Client("openai_python.py", "openai", CHATS | {"thought", "typed"}),
    "langchain": Client("langchain_chat.py", "langchain-openai", CHATS | {"typed"}),
    "llama-index": Client("llama_index_chat.py", "llama-index-llms-openai-like", CHATS | {"typed"}),
    "litellm": Client("litellm_chat.py", "litellm", CHATS),
    "instructor": Client("instructor_chat.py", "instructor", frozenset(["typed"])),
    "pydantic-ai": Client("pydantic_ai_chat.py", "pydantic-ai-slim", CHATS | {"typed"}),
    "openai-node": Client("openai_node.mjs", "openai", CHATS),
    "ai-sdk": Client("ai_sdk.mjs", "@ai-sdk/openai-compatible", CHATS | {"thought", "typed"}),
    "claude-code": Client("claude_code.py", "@anthropic-ai/claude-code", frozenset(["plain", "next", "told"])),
    "codex": Client("codex.py", "@openai/codex", frozenset(["plain", "next", "told"])),
}
