"""A chat server on this machine that answers as it is told: well, late, with errors, or garbage."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = str | int | float | bytes


def chat(text: str | None) -> dict:
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
        ],
    }


class Server(ThreadingHTTPServer):
    """`script` has what the next requests get: text, a status, seconds of silence, or raw bytes.

    After its end every request gets `text`. `asked` has the bodies, `keys` the headers.
    """

    def __init__(self, *script: Reply, text: str = "8 6\nThe first is better."):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.text = list(script), text
        self.asked: list[dict] = []
        self.keys: list[str] = []
        self.lock = threading.Lock()
        self.stalled, self.released = 0, threading.Event()  # requests that wait, and their end

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.append(self.headers["authorization"])
            reply = self.server.script.pop(0) if self.server.script else self.server.text
        if isinstance(reply, float):
            self.server.stalled += 1
            self.server.released.wait(reply)
            self.server.stalled -= 1
            return  # the connection ends without a word
        if isinstance(reply, int):
            error = {"error": {"message": f"refused {self.headers['authorization']}"}}
            return self.send(reply, json.dumps(error).encode())
        raw = reply if isinstance(reply, bytes) else json.dumps(chat(reply)).encode()
        self.send(200, raw)

    def send(self, status: int, raw: bytes):
        try:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            if status == 429:
                self.send_header("retry-after", "7")
            self.end_headers()
            self.wfile.write(raw)
        except OSError:  # the client has gone
            pass

    def log_message(self, *_):
        pass


@contextmanager
def serving(*script: Reply, **options) -> Iterator[Server]:
    server = Server(*script, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
