"""Claude Code: a conversation of three turns, the first of which runs a command, and one turn alone."""

import json
import os
import subprocess
import sys
from tempfile import TemporaryDirectory

URL, ASKED = sys.argv[1], json.loads(sys.argv[2])
VARIABLES = {
    "ANTHROPIC_BASE_URL": URL,
    "ANTHROPIC_API_KEY": "any",
    "ANTHROPIC_MODEL": "scripted",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": "scripted",  # for titles and the like
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_MAX_RETRIES": "0",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
}


def say(home, question, *words):
    """What Claude Code answers to one turn."""
    command = ["node", os.environ["CLAUDE_CODE"], "-p", question, "--output-format", "json", *words]
    environment = os.environ | VARIABLES | {"HOME": home, "CLAUDE_CONFIG_DIR": home}
    done = subprocess.run(
        command, env=environment, cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)["result"]


with TemporaryDirectory() as home:
    found = {"told": say(home, ASKED["bash"], "--allowedTools", "Bash(echo:*)")}
    found["next: after a call"] = say(home, ASKED["bye"], "--continue")
    say(home, ASKED["think"], "--continue")
    found["next: after a thought"] = say(home, ASKED["bye"], "--continue")
    found["plain"] = say(home, ASKED["hello"])
print(json.dumps(found))
