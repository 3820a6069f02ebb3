"""A small fake of the Kubernetes API: enough for real helm to install, upgrade and roll back.

It keeps objects, checks their form with the schemas of Kubernetes, answers watches, and settles
Jobs and Deployments at once. It has no scheduler, no admission, and starts nothing.
"""

from __future__ import annotations

import copy
import itertools
import json
import queue
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import yaml

Object = dict[str, Any]

VERSION = "1.37"
KINDS: dict[str, dict[str, str]] = {
    "v1": {
        "configmaps": "ConfigMap",
        "secrets": "Secret",
        "services": "Service",
        "serviceaccounts": "ServiceAccount",
        "pods": "Pod",
        "persistentvolumeclaims": "PersistentVolumeClaim",
    },
    "apps/v1": {
        "deployments": "Deployment",
        "statefulsets": "StatefulSet",
        "replicasets": "ReplicaSet",
    },
    "batch/v1": {"jobs": "Job"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io/v1": {"ingresses": "Ingress", "networkpolicies": "NetworkPolicy"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
}
"""Kinds by group with version, then by the word in an address."""


class FakeCluster:
    """The objects of a cluster, and the log of all writes."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Object] = {}
        """By group with version, word, and name. There is one namespace."""
        self.log: list[str] = []
        """One entry for each write, for example `POST Job farm-migrate`."""
        self.failing: set[str] = set()
        """Names of Jobs that fail."""
        self._lock = threading.RLock()
        self._versions = itertools.count(1)
        self._watches: list[tuple[str, str, queue.Queue[Object]]] = []

    def write(self, method: str, group: str, word: str, name: str, given: Object) -> Object:
        """Store an object that was created or changed. Raise ValueError if its form is wrong."""
        with self._lock:
            key = (group, word, name)
            old = self.objects.get(key)
            before = copy.deepcopy(old)
            new = merged(copy.deepcopy(old), given) if old and method == "PATCH" else given
            metadata = new.setdefault("metadata", {})
            metadata |= {"name": name, "namespace": "default"}
            metadata["resourceVersion"] = str(next(self._versions))
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
            changed = old is None or old.get("spec") != new.get("spec")
            metadata["generation"] = (old or {}).get("metadata", {}).get("generation", 0) + changed
            new |= {"apiVersion": group, "kind": KINDS[group][word]}
            form = {part: value for part, value in new.items() if part != "status"}
            try:
                kubernetes_validate.validate(form, VERSION, strict=False)
            except kubernetes_validate.ValidationError as error:
                raise ValueError(error.message) from error
            if before and before["kind"] == "Job":
                templates = [each["spec"]["template"] for each in (before, new)]
                if templates[0] != templates[1]:
                    raise ValueError("spec.template: field is immutable")
            if before and before["kind"] in ("Deployment", "StatefulSet"):
                selectors = [each["spec"]["selector"] for each in (before, new)]
                if selectors[0] != selectors[1]:
                    raise ValueError("spec.selector: field is immutable")
            new["status"] = self._settled(new)
            self.objects[key] = new
            self.log.append(f"{method} {new['kind']} {name}")
            self._tell(group, word, "MODIFIED" if old else "ADDED", new)
            return new

    def delete(self, group: str, word: str, name: str) -> Object | None:
        """Delete an object. Return None if there is none."""
        with self._lock:
            gone = self.objects.pop((group, word, name), None)
            if gone is not None:
                self.log.append(f"DELETE {gone['kind']} {name}")
                self._tell(group, word, "DELETED", gone)
            return gone

    def listed(self, group: str, word: str, asked: dict[str, list[str]]) -> list[Object]:
        """List objects by the selectors of a request."""
        with self._lock:
            found = [each for key, each in self.objects.items() if key[:2] == (group, word)]
        return [each for each in found if selected(each, asked)]

    def watch(self, group: str, word: str, since: int) -> Iterator[Object]:
        """Yield events: those of the objects changed after `since`, then those to come."""
        events: queue.Queue[Object] = queue.Queue()
        with self._lock:
            for key, each in self.objects.items():
                if key[:2] == (group, word) and int(each["metadata"]["resourceVersion"]) > since:
                    events.put({"type": "ADDED", "object": each})
            entry = (group, word, events)
            self._watches.append(entry)
        try:
            while True:
                yield events.get(timeout=60)
        except queue.Empty:
            return
        finally:
            self._watches.remove(entry)

    def version(self) -> str:
        return str(next(self._versions))

    def _tell(self, group: str, word: str, kind: str, changed: Object) -> None:
        for of_group, of_word, events in self._watches:
            if (of_group, of_word) == (group, word):
                events.put({"type": kind, "object": changed})

    def _settled(self, new: Object) -> Object:
        """Return the status that a cluster with free resources would soon write."""
        generation = new["metadata"]["generation"]
        match new["kind"]:
            case "Job" if new["metadata"]["name"] in self.failing:
                kind, reason = "Failed", "BackoffLimitExceeded"
                condition = {"type": kind, "status": "True", "reason": reason, "message": reason}
                return {"failed": 4, "conditions": [condition]}
            case "Job":
                return {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
            case "Deployment" | "StatefulSet":
                number = new["spec"].get("replicas", 1)
                names = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
                available = {"type": "Available", "status": "True"}
                progressing = {
                    "type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable",
                }  # fmt: skip
                return {
                    "observedGeneration": generation,
                    "conditions": [available, progressing],
                    **dict.fromkeys(names, number),
                }
            case "PersistentVolumeClaim":
                return {"phase": "Bound"}
        return {}


def merged(into: Object, change: Object) -> Object:
    """Merge a change into an object: null deletes, lists are replaced."""
    for key, value in change.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            merged(into[key], value)
        else:
            into[key] = value
    return into


def selected(each: Object, asked: dict[str, list[str]]) -> bool:
    """Return True if an object matches the selectors of a request."""
    for selector in asked.get("fieldSelector", []):
        name = selector.removeprefix("metadata.name=")
        if name != selector and each["metadata"]["name"] != name:
            return False
    labels = each["metadata"].get("labels", {})
    terms = [term for words in asked.get("labelSelector", []) for term in words.split(",")]
    return all(labels.get(term.partition("=")[0]) == term.partition("=")[2] for term in terms)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: FakeCluster

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_PATCH(self) -> None:
        self._answer("PATCH")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        parts = [part for part in address.path.split("/") if part]
        asked = parse_qs(address.query)
        if (found := discovery(parts)) is not None:
            return self._send(found)
        root, *rest = parts
        group = rest[0] if root == "api" else "/".join(rest[:2])
        rest = rest[1:] if root == "api" else rest[2:]
        if root not in ("api", "apis") or group not in KINDS or not rest:
            return self._refuse(404, "NotFound", address.path)
        if rest[0] == "namespaces":
            rest = rest[2:]
        word, name = rest[0], rest[1] if len(rest) > 1 else ""
        if word not in KINDS[group]:
            return self._refuse(404, "NotFound", word)
        if method == "GET":
            return self._get(group, word, name, asked)
        if method == "DELETE":
            gone = self.cluster.delete(group, word, name)
            return self._send(gone) if gone else self._refuse(404, "NotFound", name)
        return self._write(method, group, word, name, body)

    def _get(self, group: str, word: str, name: str, asked: dict[str, list[str]]) -> None:
        if name:
            found = self.cluster.objects.get((group, word, name))
            return self._send(found) if found else self._refuse(404, "NotFound", name)
        if "sendInitialEvents" in asked:  # clients then list first
            return self._refuse(400, "BadRequest", "sendInitialEvents is not supported")
        if "watch" in asked:
            return self._watch(group, word, asked)
        metadata = {"resourceVersion": self.cluster.version()}
        items = self.cluster.listed(group, word, asked)
        kind = f"{KINDS[group][word]}List"
        return self._send({"kind": kind, "apiVersion": group, "metadata": metadata, "items": items})

    def _watch(self, group: str, word: str, asked: dict[str, list[str]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for event in self.cluster.watch(
                group, word, int(asked.get("resourceVersion", ["0"])[0])
            ):
                if selected(event["object"], asked):
                    self.wfile.write(json.dumps(event).encode() + b"\n")
                    self.wfile.flush()
        except OSError:
            pass  # the client has seen enough

    def _write(self, method: str, group: str, word: str, name: str, body: bytes) -> None:
        given: Object = yaml.safe_load(body)
        name = name or given["metadata"]["name"]
        exists = (group, word, name) in self.cluster.objects
        if method == "POST" and exists:
            return self._refuse(409, "AlreadyExists", name)
        try:
            written = self.cluster.write(method, group, word, name, given)
        except ValueError as error:
            return self._refuse(422, "Invalid", f"{KINDS[group][word]} {name}: {error}")
        return self._send(written, 200 if exists else 201)

    def _refuse(self, code: int, reason: str, message: str) -> None:
        kind = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        self._send({**kind, "reason": reason, "message": message, "code": code}, code)

    def _send(self, answer: Object, code: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def discovery(parts: list[str]) -> Object | None:
    """Answer what the API offers. None if something else is asked."""
    match parts:
        case ["version"]:
            major, minor = VERSION.split(".")
            return {"major": major, "minor": minor, "gitVersion": f"v{VERSION}.0"}
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        case ["apis"]:
            groups = [group.split("/") for group in KINDS if "/" in group]
            versions = [{"groupVersion": "/".join(each), "version": each[1]} for each in groups]
            return {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [
                    {"name": each[0], "versions": [version], "preferredVersion": version}
                    for each, version in zip(groups, versions, strict=True)
                ],
            }
        case ["openapi", "v3"]:
            paths = {
                (f"apis/{group}" if "/" in group else f"api/{group}"): group for group in KINDS
            }
            return {
                "paths": {
                    path: {"serverRelativeURL": f"/openapi/v3/of/{group}"}
                    for path, group in paths.items()
                }
            }
        case ["openapi", "v3", "of", *group]:
            return validating("/".join(group))
        case ["api" | "apis", *group] if "/".join(group) in KINDS:
            return resources("/".join(group))
    return None


def resources(group: str) -> Object:
    """List the kinds of a group."""
    verbs = ["create", "get", "list", "patch", "update", "delete", "watch"]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": group,
        "resources": [
            {"name": word, "singularName": "", "kind": kind, "namespaced": True, "verbs": verbs}
            for word, kind in KINDS[group].items()
        ],
    }


def validating(group: str) -> Object:
    """Say that the server checks fields itself, so that helm does not."""
    name, version = group.split("/") if "/" in group else ("", group)
    base = f"/apis/{group}" if name else f"/api/{group}"
    parameter = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
    paths = {
        f"{base}/namespaces/{{namespace}}/{word}/{{name}}": {
            "patch": {
                "x-kubernetes-group-version-kind": {
                    "group": name, "version": version, "kind": kind,
                },
                "x-kubernetes-action": "patch",
                "parameters": [parameter],
                "responses": {"200": {"description": "OK"}},
            }
        }
        for word, kind in KINDS[group].items()
    }  # fmt: skip
    info = {"title": "fake", "version": VERSION}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}


@contextmanager
def serving(cluster: FakeCluster) -> Iterator[str]:
    """Serve the API of a cluster during the block. Yield its address."""
    handler = type("Handler", (_Handler,), {"cluster": cluster})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
