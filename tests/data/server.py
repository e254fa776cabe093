"""A real http server over a folder that misbehaves on request."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STALL_SECONDS = 6.0


class Server(ThreadingHTTPServer):
    """moods: file name -> what its next answers are, one popped by each request; then it behaves. "500"; "stall": for
    STALL_SECONDS nothing comes; "die": the connection closes in the middle of the body; "short": a whole answer with
    half of the file; "drip": a tenth of the file at a time."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.moods: dict[str, list[str]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that gave up is what some tests want."""


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.requests[name] += 1
        moods = self.server.moods[name]
        mood = moods.pop(0) if moods else ""
        path = Path(self.translate_path(self.path))
        if mood == "500":
            self.send_error(500)
        elif not mood or not path.is_file():
            super().do_GET()
        else:
            content = path.read_bytes()
            if mood == "stall":
                time.sleep(STALL_SECONDS)
            if mood == "short":
                content = content[: len(content) // 2]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if mood == "die":
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            tenth = len(content) // 10 + 1
            for start in range(0, len(content), tenth):
                self.wfile.write(content[start : start + tenth])
                if mood == "drip":
                    time.sleep(0.03)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """The server, in a thread of this process, for as long as the `with` lasts."""
    server = Server(folder)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
