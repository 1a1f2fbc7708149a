"""A scripted judge that speaks OpenAI's chat protocol on 127.0.0.1, with faults on demand."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[str, int], Any]


class Server(ThreadingHTTPServer):
    """Records what it was asked, with which keys, and how many questions it had at once."""

    daemon_threads = True

    def __init__(self, script: Script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.lock = threading.Lock()
        self.questions: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.at_once = 0
        self.most_at_once = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that stop waiting are part of the script."""


class Handler(BaseHTTPRequestHandler):
    """Answers with `Server.script(question, times it was asked before)`.

    A text is the judge's reply, a dict the JSON body (and its `status`), bytes a body that is not JSON, a number an
    HTTP status, with an error message that repeats the key.
    """

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            before = server.questions.count(question)
            server.questions.append(question)
            server.bodies.append(body)
            server.keys.add(self.headers.get("Authorization"))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        answer = server.script(question, before)
        with server.lock:
            server.at_once -= 1
        status = 200
        if isinstance(answer, str):
            answer = make_reply(answer)
        elif isinstance(answer, int):
            status = answer
            answer = {"error": {"message": f"scripted, asked with {self.headers.get('Authorization')}"}}
        elif isinstance(answer, dict):
            status = answer.get("status", 200)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("retry-after-ms", "5")  # otherwise the client waits half a second or more
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


def make_reply(content: str | None, refusal: str | None = None, finish_reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "scripted",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    }


@contextmanager
def judge_server(script: Script) -> Iterator[Server]:
    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
