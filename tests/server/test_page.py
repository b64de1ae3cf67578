"""Laws of the files of the page at `/`: ours are small, all ask this service alone, none is there where it is off."""

import re
from pathlib import Path

import pytest

import server
from server.web.pages import PAGE
from tests.live import live
from tests.server.test_app import error_of
from tests.server.test_openapi import Links

FOLDER = Path(server.__file__).with_name("web") / "page"
MOST_BYTES = 96_000
KINDS = {".js": "javascript", ".css": "css", "/": "html"}
PATHS = [route.path for route in PAGE]
OURS = [path for path in PATHS if "/vendor/" not in path]


def test_every_file_of_it_is_served() -> None:
    files = {f"/page/{file.relative_to(FOLDER)}" for file in FOLDER.rglob("*") if file.suffix in KINDS}
    assert set(PATHS) == files | {"/"}


def test_what_is_ours_of_it_is_small() -> None:
    with live() as service:
        assert sum(len(service.get(path).content) for path in OURS) < MOST_BYTES


def test_what_is_not_ours_has_its_licence_and_version_beside_it() -> None:
    folders = [folder for folder in FOLDER.joinpath("vendor").iterdir() if folder.is_dir()]
    assert folders
    for folder in folders:
        names = {file.name.partition("-")[0].partition(".")[0] for file in folder.iterdir()}
        assert {"LICENSE", "package"} <= names, folder


@pytest.mark.parametrize("keys", [(), ("sesame",)], ids=["open", "keyed"])
def test_it_is_open_to_all_but_may_ask_only_this_service(keys: tuple[str, ...]) -> None:
    with live(api_keys=keys) as service:
        for path in PATHS:
            response = service.get(path)
            assert response.status_code == 200
            kind = next(kind for ending, kind in KINDS.items() if path.endswith(ending))
            assert response.headers["content-type"] == f"text/{kind}; charset=utf-8"
            policy = response.headers["content-security-policy"]
            assert "unsafe" not in policy
            assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'"} <= set(policy.split("; "))
            assert response.headers["x-content-type-options"] == "nosniff"


def test_it_names_no_other_place_and_has_nothing_inline() -> None:
    with live() as service:
        links = Links(service.get("/").text)
        assert not links.inline
        assert {"page/page.css", "page/page.js"} <= set(links.found)
        for link in links.found:
            assert not re.match(r"[a-z]+:(?!,)|//", link), link
            if not link.startswith(("#", "data:,")):
                assert service.get(f"/{link}").status_code == 200
        for path in OURS[1:]:
            text = service.get(path).text
            assert not re.search(r"@import|\burl\(|\beval\b|innerHTML|outerHTML|insertAdjacent|document\.write", text)
            assert not re.search(r"https?://\w", text)


def test_where_it_is_off_nothing_of_it_is_there() -> None:
    with live(page=False) as service:
        for path in (*PATHS, "/internal/live", "/internal/state"):
            error_of(service.get(path), 404, "unknown_url")
        assert service.chat().status_code == 200
        service.wait_ended()
        assert service.service.live.history()["rows"] == []
        assert service.get("/docs").status_code == 200
