"""Open tabs of the dashboard, in a separate process: each asks for its page again and again.

`python -m tests.benchmarks.tabs JSON`, with the fields of `Tabs`, runs until its standard input
ends, and prints the answers as JSON.
"""

from __future__ import annotations

import html
import http.client
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlencode

UPDATED = re.compile(r'hx-get="([^"]+)" hx-swap="innerMorph"\s+hx-trigger="every (\d+)s')


@dataclass(frozen=True)
class Tabs:
    """Pages that are open. Each visitor has signed in with a key."""

    host: str
    port: int
    pages: list[tuple[str, str]]
    """Key and address of each tab."""
    answers: list[tuple[str, int, int, float]] = field(default_factory=list)
    """Address, status, bytes and seconds of each answer."""


def sign_in(tabs: Tabs, connection: http.client.HTTPConnection, key: str) -> str:
    """Return the cookie of a new session."""
    headers = {
        "Origin": f"http://{tabs.host}:{tabs.port}",
        "Content-Type": "application/x-www-form-urlencoded",
    }
    connection.request("POST", "/login", urlencode({"key": key}), headers)
    answer = connection.getresponse()
    answer.read()
    return str(answer.headers["Set-Cookie"]).partition(";")[0]


def keep_open(tabs: Tabs, number: int, over: threading.Event) -> None:
    """Open one tab, and update it until the end, as htmx does: with the tag of the last answer."""
    key, path = tabs.pages[number]
    connection = http.client.HTTPConnection(tabs.host, tabs.port, timeout=60)
    headers = {"Cookie": sign_in(tabs, connection, key)}
    connection.request("GET", path, headers={**headers, "Accept": "text/html"})
    opened = connection.getresponse()
    page = opened.read()
    if opened.status != http.HTTPStatus.OK:
        tabs.answers.append((path, opened.status, len(page), 0.0))
        return
    [(path, every)] = UPDATED.findall(page.decode())
    path, seconds_apart = html.unescape(path), float(every)
    headers["HX-Request"] = "true"
    over.wait(seconds_apart * number / len(tabs.pages))  # tabs are opened at different times
    while not over.is_set():
        began = time.monotonic()
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        seconds = time.monotonic() - began
        tabs.answers.append((path, answer.status, len(content), seconds))
        headers["HX-PTag"] = answer.headers.get("HX-PTag", "")
        over.wait(max(0.0, seconds_apart - seconds))
    connection.close()


def main(tabs: Tabs) -> list[tuple[str, int, int, float]]:
    """Keep the tabs open until standard input ends."""
    over = threading.Event()
    threads = [
        threading.Thread(target=keep_open, args=(tabs, number, over))
        for number in range(len(tabs.pages))
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    return tabs.answers


if __name__ == "__main__":
    json.dump(main(Tabs(**json.loads(sys.argv[1]))), sys.stdout)
