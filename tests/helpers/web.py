"""A web server on this machine that does what servers do wrong, when it is told to."""

import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """``files`` are what it has; ``faults`` are ``{path: [what goes wrong, in order]}``, each for one whole request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.tags, self.asked, self.sent = {}, {}, {}, Counter(), Counter()
        self.slow = {}  # seconds that a transfer stands still in its middle
        self.standing = Counter()  # how often one has
        self.lies = {}  # bytes by which a path is said to be longer than it is
        self.secret = ""  # what Authorization must be
        self.heard = []  # (path, headers) of every request
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):  # who cuts a connection makes noise here
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        part = self.headers.get("Range")
        self.server.asked[path] += 1
        self.server.heard.append((path, dict(self.headers)))
        queue = self.server.faults.get(path, [])
        # what is wrong with transfers leaves the look at the first byte alone
        fault = ""
        if queue and (part is None or queue[0] in ("404", "403", "500", "503", "always 503", "no length") or
                      queue[0].startswith("to ")):  # fmt: skip
            fault = queue[0] if queue[0].startswith(("to ", "always")) else queue.pop(0)
        if self.server.secret and self.headers.get("Authorization") != self.server.secret:
            return self.plain(401)
        if fault.removeprefix("always ").isdigit():
            return self.plain(int(fault.removeprefix("always ")), **{"Retry-After": "0"} if "503" in fault else {})
        if fault.startswith("to "):
            return self.plain(302, Location=fault[3:])
        if path not in self.server.files:
            return self.plain(404)
        data = self.server.files[path]
        tag = self.server.tags.get(path, f'"{len(data)}-{sum(data) % 9973}"')
        first, last = 0, len(data) - 1
        if part and "no ranges" not in queue:
            first, last = (int(n) if n else last for n in part.removeprefix("bytes=").split("-"))
            if not data:
                return self.plain(416, **{"Content-Range": "bytes */0"})
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data) + self.server.lies.get(path, 0)}")
        else:
            self.send_response(200)
        body = data[first : last + 1]
        more = 0 if part else self.server.lies.get(path, 0)
        length = len(body) + more + (1000 if fault == "too long" else 0)
        if fault == "no length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self.send_header("ETag", '"another"' if fault == "other tag" else tag)
        self.end_headers()
        body = body[: len(body) // 2] if fault.startswith("cut") else body
        if part is None and (pause := self.server.slow.get(path)):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.standing[path] += 1
            time.sleep(pause)
            body = body[len(body) // 2 :]
        self.wfile.write(body)
        if part is None:
            self.server.sent[path] += 1
        if more or fault in ("cut", "too long", "no length"):
            self.close_connection = True

    def plain(self, code, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(make=Server):
    """A running server."""
    server = make()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
