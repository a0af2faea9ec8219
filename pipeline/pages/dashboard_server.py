"""Serve the dashboard of a folder: the page, and news for it. It only reads, and only what a run writes."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import parse_qs, urlsplit

from data.quoting import escaped
from pipeline.pages.dashboard_page import content, headline, page, version_of
from pipeline.reports.run_files import METRICS_FILE, Run, find_runs, is_alive, read_lock, read_run
from pipeline.runs.live_files import LOCK, LOG, SAMPLES


LOCAL = ("127.0.0.1", "localhost", "::1")


def read_runs(folder: Path) -> list[tuple[str, Run | str]]:
    """Return the name and the run of each output folder, or the message of a run that cannot be read.

    Raises the errors of `find_runs`.
    """
    found: list[tuple[str, Run | str]] = []
    for path in find_runs(folder):
        name = path.relative_to(folder.expanduser()).as_posix()
        run: Run | str
        try:
            run = read_run(path)
        except (OSError, ValueError) as error:
            run = escaped(error, 1000)
        found.append((folder.absolute().name if name == "." else name, run))
    return found


class Folder:
    """A folder of runs, which is read again when one of its files has changed."""

    def __init__(self, folder: Path):
        self.folder, self._lock = folder, Lock()
        self._read: tuple[object, list[tuple[str, Run | str]]] | None = None

    def runs(self) -> list[tuple[str, Run | str]]:
        """Return what `read_runs` returns now; a folder that has gone is a message."""
        with self._lock:
            try:
                now = self._state()
                if self._read is None or self._read[0] != now:
                    self._read = now, read_runs(self.folder)
            except (OSError, ValueError) as error:
                return [(self.folder.name, escaped(error, 1000))]
            return self._read[1]

    def _state(self) -> list[tuple]:
        """Return what changes when a run goes on: sizes and times of its files, and whether it is alive."""
        found = []
        for path in find_runs(self.folder):
            files = [path / name for name in (LOG, METRICS_FILE, SAMPLES, LOCK)]
            stats = [file.stat() if file.is_file() else None for file in files]
            found.append((path, is_alive(read_lock(path)), *((one.st_size, one.st_mtime_ns) for one in stats if one)))
        return found


def handler(folder: Folder, local: bool) -> type[BaseHTTPRequestHandler]:
    """Return a handler of requests for a folder; `local` refuses those for a name of another machine."""

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "Spine", ""

        def do_GET(self) -> None:
            """Answer with the page, or with the news since the version that the page has."""
            asked = urlsplit(self.path)
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if local and host not in LOCAL:  # a page of somebody else whose name leads here
                self._send(403, "text/plain", "This dashboard answers to 127.0.0.1 and localhost. See --host.\n")
            elif asked.path == "/":
                self._send(200, "text/html", page(folder.runs(), str(folder.folder), live=True))
            elif asked.path == "/state":
                runs = folder.runs()
                html = content(runs)
                version = version_of(html)
                if parse_qs(asked.query).get("version") == [version]:
                    self._send(204, "text/plain", "")
                else:
                    news = {"version": version, "title": headline(runs, str(folder.folder)), "html": html}
                    self._send(200, "application/json", json.dumps(news))
            else:
                self._send(404, "text/plain", "There is one page, at /.\n")

        def _send(self, status: int, kind: str, text: str) -> None:
            body = text.encode("utf-8", "replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.end_headers()
            if status != 204:
                self.wfile.write(body)

        def log_message(self, *args) -> None:
            """Override `log_message`: write no line for each request."""

    return Handler


def make_server(folder: Path, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server that is bound to an address, and does not serve yet.

    Raises:
        ValueError: the address cannot be had.
    """
    try:
        return ThreadingHTTPServer((host, port), handler(Folder(folder), host in LOCAL))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--host {host} --port {port}: cannot be opened ({reason}). Name another port, or --port 0 for a free one."
        ) from error


def serve(server: ThreadingHTTPServer, tell: Callable[[str], None]) -> None:
    """Serve until Ctrl-C."""
    host, port = str(server.server_address[0]), server.server_port
    tell(f"http://{host}:{port}/")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
