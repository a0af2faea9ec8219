"""Show a run in a browser while it goes on: curves with their healthy ranges, samples, warnings, the preflight.

    python -m pipeline.dashboard runs/demo

Give it the output folder of a stage, or a folder above several. It reads what the stages write (`training_log.jsonl`,
`samples.jsonl`, `metrics.json`), loads no model and needs no account. It listens on 127.0.0.1 unless `--host` says more.
`--write report.html` leaves the page as one file instead, which can be sent to somebody.
"""

import argparse
import os
from pathlib import Path

from data.commands import run
from data.quoting import escaped
from pipeline.pages.dashboard_page import MARKER, page
from pipeline.pages.dashboard_server import LOCAL, make_server, read_runs, serve


PORT = 8060


def arguments(args: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m pipeline.dashboard", allow_abbrev=False)
    parser.add_argument("folder", metavar="RUN", help="Output folder of a stage, or a folder above several.")
    parser.add_argument(
        "--host", default=LOCAL[0], help="Address to listen on. 0.0.0.0 lets others on the network see the page."
    )
    parser.add_argument("--port", type=int, default=PORT, help="Port to listen on. 0: a free one.")
    parser.add_argument("--write", metavar="FILE", help="Write the page to this file instead, and end.")
    return parser.parse_args(args)


def write_page(file: str, text: str) -> None:
    """Write the page to a file, all at once. It may replace an earlier page, and nothing else.

    Raises:
        ValueError: something else has this name.
        OSError: the file cannot be written.
    """
    path = Path(file).expanduser()
    where = f"--write {escaped(file)}"
    if os.path.lexists(path) and not _is_page(path):
        raise ValueError(f"{where}: this is no page that the dashboard has written. Name another file.")
    fresh = path.with_name(path.name + ".part")
    try:
        fresh.write_bytes(text.encode("utf-8", "replace"))
        fresh.replace(path)
    except OSError as error:
        raise OSError(f"{where}: cannot be written ({error.strerror}). Name another file.") from error
    print(f"{path}: {path.stat().st_size / 1000:,.0f} kB.")


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARKER.encode() in file.read(200)


def main(args: list[str]) -> None:
    given = arguments(args)
    folder = Path(given.folder).expanduser()
    runs = read_runs(folder)
    if all(isinstance(found, str) for _, found in runs):
        raise ValueError(str(runs[0][1]))
    if given.write:
        write_page(given.write, page(runs, str(folder), live=False))
        return
    server = make_server(folder, given.host, given.port)
    if given.host not in LOCAL:
        print(f"--host {given.host}: whoever reaches this machine can see the run, without a password.", flush=True)
    serve(server, lambda address: print(f"{folder}: {address} (Ctrl-C ends the dashboard)", flush=True))


if __name__ == "__main__":
    run(main)
