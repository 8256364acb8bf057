"""A Hugging Face Hub on this machine, as far as a push needs one: real HTTP, faults on demand.

Repositories, cards, large files by the LFS protocol and small ones in the commit, trees and tags, as the client of
huggingface_hub 2 speaks of them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Tree = dict[str, dict[str, Any]]  # name: its entry in a listing
SMALL = (".md", ".json", ".jinja", ".txt", ".html", ".jsonl")
Fault = Callable[[str, str], int | None]  # method and path: the status to fail with, 0 to drop the line, None to go on


@dataclass
class Hub:
    """`fault` is asked before each request; `asked` counts the requests by what they are for."""

    fault: Fault = lambda method, path: None
    card: str | None = None  # why every card is refused
    asked: Counter[str] = field(default_factory=Counter)
    uploaded: list[str] = field(default_factory=list)  # sha256 of each large file that came whole
    objects: set[str] = field(default_factory=set)
    commits: list[Tree] = field(default_factory=lambda: [{".gitattributes": _entry(".gitattributes", b"x")}])
    tags: dict[str, int] = field(default_factory=dict)
    private: bool = True
    corrupt: bool = False  # commits hold other bytes than were sent
    url: str = ""

    def tree(self, revision: str) -> Tree | None:
        if revision == "main":
            return self.commits[-1]
        number = self.tags.get(revision, int(revision, 16) if len(revision) == 40 else None)
        return None if number is None else self.commits[number]


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address of a hub that answers until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            path = self.path.partition("?")[0]
            status = hub.fault(self.command, path)
            if status == 0:
                self.close_connection = True
                self.connection.close()
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if status is None:
                status, answer = _handle(hub, self.command, path, body)
            else:
                answer = {"error": "planted"}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the screen."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub.url
    finally:
        server.shutdown()
        server.server_close()


def _handle(hub: Hub, method: str, path: str, body: bytes) -> tuple[int, Any]:
    words = path.strip("/").split("/")
    if path == "/api/repos/create":
        hub.asked["create"] += 1
        name = json.loads(body)
        return 200, {"url": f"{hub.url}/{name.get('organization', 'me')}/{name['name']}"}
    if path == "/api/validate-yaml":
        hub.asked["card"] += 1
        return (400, {"errors": [{"message": hub.card}]}) if hub.card else (200, {"errors": [], "warnings": []})
    if "lfs" in words:
        return 200, _batch(hub, json.loads(body))
    if words[0] == "store":
        return _stored(hub, words[1], body)
    verb, rest = words[4] if len(words) > 4 else "", words[5:]
    hub.asked[verb or "info"] += 1
    if verb == "refs":
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": _oid(at)} for name, at in hub.tags.items()]
        return 200, {"branches": [], "tags": tags, "converts": []}
    if verb == "tree":
        tree = hub.tree(rest[0])
        return (404, {"error": "no such revision"}) if tree is None else (200, list(tree.values()))
    if verb == "preupload":
        return 200, {"files": [_mode(file) for file in json.loads(body)["files"]]}
    if verb == "commit":
        return 200, _committed(hub, [json.loads(line) for line in body.splitlines()])
    if verb == "tag":
        hub.tags[json.loads(body)["tag"]] = int(rest[0], 16)
        return 200, {}
    return 200, {
        "id": "/".join(words[2:4]),
        "private": hub.private,
        "sha": _oid(len(hub.commits) - 1),
        "siblings": [],
        "tags": [],
    }


def _batch(hub: Hub, body: dict[str, Any]) -> dict[str, Any]:
    hub.asked["batch"] += 1
    found = []
    for one in body["objects"]:
        actions = {"upload": {"href": f"{hub.url}/store/{one['oid']}"}}
        found.append({**one, **({} if one["oid"] in hub.objects else {"actions": actions})})
    return {"transfer": "basic", "objects": found}


def _stored(hub: Hub, oid: str, body: bytes) -> tuple[int, Any]:
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, {"error": "other bytes than announced"}
    hub.uploaded.append(oid)
    hub.objects.add(oid)
    return 200, {}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "regular" if file["path"].endswith(SMALL) else "lfs"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}


def _committed(hub: Hub, lines: list[dict[str, Any]]) -> dict[str, Any]:
    tree = dict(hub.commits[-1])
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            content = base64.b64decode(value["content"])
            tree[value["path"]] = _entry(value["path"], content + b"!" if hub.corrupt else content)
        elif line["key"] == "lfsFile":
            assert value["oid"] in hub.objects, "a commit of a file that was not uploaded"
            lfs = {"oid": value["oid"], "size": value["size"], "pointerSize": 130}
            tree[value["path"]] = {"type": "file", "path": value["path"], "size": value["size"], "oid": "-", "lfs": lfs}
        elif line["key"] == "deletedFile":
            del tree[value["path"]]
    hub.commits.append(tree)
    oid = _oid(len(hub.commits) - 1)
    return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/me/bot/commit/{oid}", "hookOutput": ""}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}


def _oid(number: int) -> str:
    return f"{number:040x}"
