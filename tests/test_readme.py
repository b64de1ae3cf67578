"""What README says of settings and endpoints is what there is."""

import re
from pathlib import Path

from server.app import routes
from server.settings import Settings

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_readme_lists_every_setting_with_its_description() -> None:
    rows = re.findall(r"^\| `--([\w-]+)` \| [^|]+ \| (.+) \|$", README, re.MULTILINE)
    fields = {name.replace("_", "-"): field.description for name, field in Settings.model_fields.items()}
    assert dict(rows) == fields


def test_readme_names_every_path() -> None:
    for route in routes():
        path = re.sub(r":path}", "}", route.path)
        assert path.endswith((".css", ".js")) or path in README or f"/v1{path}" in README, path
