"""Clients that submit one-image jobs over HTTP, in a separate process.

`python -m tests.benchmarks.clients HOST PORT KEY CLIENTS SECONDS` prints the answers as JSON.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time

BODY = {"pipeline": "null", "prompts": ["a red star"], "width": 32, "height": 32, "steps": 1}


def submit_on(
    host: str, port: int, key: str, until: float, number: int, found: list[tuple[float, str]]
) -> None:
    """Submit one job after the other on one connection, until the deadline."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    body = json.dumps({**BODY, "seed": number})
    while (started := time.monotonic()) < until:
        connection.request("POST", "/v1/jobs", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        told = json.loads(content)["id"] if answer.status == http.HTTPStatus.ACCEPTED else ""
        found.append((time.monotonic() - started, told))
    connection.close()


def main(host: str, port: int, key: str, clients: int, seconds: float) -> dict[str, object]:
    """Run the clients. Return the seconds and job ID of each answer, with "" if it was refused."""
    found: list[tuple[float, str]] = []
    started = time.monotonic()
    threads = [
        threading.Thread(target=submit_on, args=(host, port, key, started + seconds, number, found))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.monotonic() - started, "answers": found}


if __name__ == "__main__":
    where, port, key, clients, seconds = sys.argv[1:6]
    json.dump(main(where, int(port), key, int(clients), float(seconds)), sys.stdout)
