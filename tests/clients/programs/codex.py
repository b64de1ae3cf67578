"""Codex CLI: a conversation of three turns, the first of which runs a command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

URL, ASKED = sys.argv[1], json.loads(sys.argv[2])
CONFIG = f"""
model = "scripted"
model_provider = "here"
approval_policy = "never"
sandbox_mode = "danger-full-access"  # for the one command that the script has it run, on machines without a sandbox
check_for_update_on_startup = false
analytics.enabled = false

[model_providers.here]
name = "here"
base_url = "{URL}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""


def say(home, *words):
    """What Codex answers to one turn."""
    command = [os.environ["CODEX"], "exec", "--skip-git-repo-check", "--json", *words]
    environment = os.environ | {"CODEX_HOME": home, "HOME": home}
    done = subprocess.run(
        command, env=environment, cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    )
    items = [event["item"] for event in map(json.loads, done.stdout.splitlines()) if event["type"] == "item.completed"]
    return [item["text"].strip() for item in items if item["type"] == "agent_message"]


with TemporaryDirectory() as home:
    Path(home, "config.toml").write_text(CONFIG)
    # A command's output comes with its exit status and times before it.
    [told] = say(home, ASKED["shell"])
    found = {"told": f"{told.partition(':')[0]}: {told.splitlines()[-1]}"}
    [found["next: after a call"]] = say(home, "resume", "--last", ASKED["bye"])
    say(home, "resume", "--last", ASKED["think"])
    [found["next: after a thought"]] = say(home, "resume", "--last", ASKED["bye"])
    [found["plain"]] = say(home, "resume", "--last", ASKED["hello"])
print(json.dumps(found))
