"""A server on loopback that speaks as an OpenAI-compatible one does, with the replies that a test gives it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]  # status, headers, content


@dataclass
class Served:
    """What was asked, and what is answered: the replies in turn, the last one for ever."""

    url: str
    replies: list[Reply]
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


def said(text: str | None, finish: str = "stop", **more: Any) -> Reply:
    """The reply with this answer."""
    message = {"role": "assistant", "content": text, **more}
    return 200, {}, {"choices": [{"message": message, "finish_reason": finish}], "usage": {"completion_tokens": 3}}


@contextmanager
def serving(*replies: Reply) -> Iterator[Served]:
    """A server that gives the replies in turn, for the length of a block."""
    served = Served("", list(replies))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            served.asked.append((self.path, dict(self.headers), json.loads(body) if body else None))
            status, headers, reply = served.replies[min(len(served.asked), len(served.replies)) - 1]
            if status == 0:  # the server drops the connection
                self.connection.close()
                return
            content = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
