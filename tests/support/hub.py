"""A Hugging Face Hub on this machine: it has one data set, notes what it is asked for, and takes no uploads."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789" * 4


@contextlib.contextmanager
def hub_with(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Within, the data set in `folder` is on the Hub of this address as `name`; requests are listed, as
    `GET /api/datasets/...`."""
    asked: list[str] = []
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            about, at = f"/api/datasets/{name}", f"/datasets/{name}/resolve/{COMMIT}/"
            if path == f"{about}/refs":
                tag = {"name": "v3.0", "ref": "refs/tags/v3.0", "targetCommit": COMMIT}
                self.say({"tags": [tag], "branches": [], "converts": []})
            elif path == f"{about}/revision/v3.0":
                self.say({"id": name, "sha": COMMIT, "siblings": []})
            elif path == f"{about}/tree/{COMMIT}":
                sizes = {path: file.stat().st_size for path, file in files.items()}
                self.say([{"type": "file", "path": p, "size": n, "oid": etag(p)} for p, n in sizes.items()])
            elif path.startswith(at) and path.removeprefix(at) in files:
                inside = path.removeprefix(at)
                self.send(200, files[inside].read_bytes(), {"ETag": etag(inside), "X-Repo-Commit": COMMIT})
            else:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_GET = do_HEAD = do_POST = answer

        def say(self, content) -> None:
            self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for header in {**headers, "Content-Length": len(content)}.items():
                self.send_header(*map(str, header))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def etag(path: str) -> str:
    return hashlib.sha1(path.encode()).hexdigest()
