"""Scripts of others that the dashboard serves: pinned by version and hash, and nothing else."""

from __future__ import annotations

import json

from api.dashboard.html import render
from tests.vendored import LIST, VENDOR, integrity


def test_each_file_is_the_one_that_was_fetched() -> None:
    files = [file for package in json.loads(LIST.read_text()) for file in package["files"]]
    assert {file["file"]: file["integrity"] for file in files} == {
        path.name: integrity(path.read_bytes()) for path in VENDOR.iterdir() if path != LIST
    }


def test_the_page_pins_each_script_by_its_hash() -> None:
    page = render("sign_in.html", problem="", back="/")
    for package in json.loads(LIST.read_text()):
        for file in package["files"]:
            if file["file"].endswith(".js"):
                pinned = f'"/static/vendor/{file["file"]}" integrity="{file["integrity"]}"'
                assert f"<script src={pinned} defer></script>" in page
