"""`python -m datasets_bids.preview BUILDER --data-dir TREE`: a page to look at a dataset before it is pushed."""

import argparse
import html
import http.server
import json
import math
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets
from datasets.utils import tqdm

from .hub import size
from .pictures import Preview, cells, data_url, examples, image_columns, short
from .push import build


_HERE = Path(__file__).parent
_PAGE_ROW_NBYTES = 200_000  # pictures of a row; 1,000 rows make a page of 270 MB, which a browser still opens


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m datasets_bids.preview", description="Look at a tree of brain images before it is pushed."
    )
    parser.add_argument("builder", help="a builder directory, such as builders/isles24, or the name bids")
    parser.add_argument("--data-dir", required=True, help="root of the tree")
    parser.add_argument("--config", help="name of the builder's config")
    parser.add_argument("--schema", help="for bids: a YAML file with schema, row, metadata_from and splits")
    parser.add_argument("--split", help="the split to show (default: the first)")
    parser.add_argument("--rows", type=int, help="show the first ROWS rows only")
    parser.add_argument(
        "--faces", action="store_true", help="add the head's surface, to see whether faces were removed"
    )
    parser.add_argument("--out", help="write one self-contained page to this file")
    parser.add_argument(
        "--serve", action="store_true", help="serve the page on this machine, with the volumes to click through"
    )
    parser.add_argument("--port", type=int, default=0, help="port for --serve (default: a free one)")
    options = parser.parse_args(args)
    if not options.out and not options.serve:
        parser.error("say what to do: --out preview.html, --serve, or both")
    if options.rows is not None and options.rows < 1:
        parser.error("--rows is at least 1")
    return options


def page(
    preview: Preview,
    dataset: datasets.Dataset,
    *,
    title: str,
    tree: str,
    serve: str = "",
    max_rows: int | None = None,
    faces: bool = False,
) -> Iterator[str]:
    """The page, piece by piece: a row is in memory at a time.

    Args:
        preview (`Preview`): what is shown
        dataset (`Dataset`): rows of paths
        title, tree (`str`): what stands at the top
        serve (`str`): the command that the page recommends for looking at volumes
        max_rows (`int`, *optional*): no more rows than these
        faces (`bool`): see `montage.draw`
    """
    shown = len(dataset) if max_rows is None else min(max_rows, len(dataset))
    keys = [name for name in ("subject_id", "session_id") if name in dataset.features]
    scalars = [name for name in preview.features if name in dataset.features and name not in (*preview.images, *keys)]
    about = {
        "images": preview.images,
        "scalars": scalars,
        "masks": sorted(preview.masks),
        "on": dict(preview.on),
        "tree": tree,
        "serve": serve,
        "left": len(dataset) if shown < len(dataset) else None,
    }
    values = {"TITLE": html.escape(title), "ABOUT": _json(about)}
    before, after = (_HERE / "preview.html").read_text(encoding="utf-8").split("@ROWS@")
    yield _filled(before, values)
    for index, example in enumerate(tqdm(examples(dataset, 0, shown), total=shown, desc="Drawing", unit="row")):
        found = preview.look(example, faces, _PAGE_ROW_NBYTES)
        images: dict[str, list[Any]] = {name: [] for name in preview.images}
        for (name, i), image in found.items():
            file = os.path.basename(cells(example[name])[i]["path"] or "volume.nii")
            images[name].append({**image, "picture": data_url(image["picture"]), "file": file, "i": i})
        data = {
            "name": " ".join(str(example[key]) for key in keys if example[key] is not None) or f"row {index}",
            "images": images,
            "scalars": {name: _plain(example[name]) for name in scalars},
        }
        yield f'<script type="application/json" class="row">{_json(data)}</script>\n'
    yield _filled(after, values)


def _filled(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _json(value: Any) -> str:
    # So that no value can end the script that it stands in.
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return short(value) if isinstance(value, str | int | float | bool | list | None) else str(value)


class Server(http.server.ThreadingHTTPServer):
    """Serves a page, NiiVue and the volumes of a dataset's rows to this machine alone.

    Every address begins with a secret, so that no other user of the machine and no other page in the browser can ask for volumes.
    """

    daemon_threads = True

    def __init__(self, port: int, dataset: datasets.Dataset, page: str):
        self.dataset, self.page, self.secret = dataset, page, secrets.token_urlsafe(16)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.secret}/"

    def volume(self, index: int, column: str, i: int) -> str | bytes:
        """The path or the bytes of an image; `KeyError` if there is none."""
        if column not in image_columns(self.dataset.features) or not 0 <= index < len(self.dataset):
            raise KeyError(column)
        (cell,) = self.dataset.with_format("arrow")[index : index + 1].column(column).to_pylist()
        found = cells(cell)
        if not 0 <= i < len(found) or found[i] is None:
            raise KeyError(i)
        return found[i]["bytes"] or found[i]["path"]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        prefix = f"/{self.server.secret}/"
        if not path.startswith(prefix):
            return self.send_error(404)
        try:
            match path.removeprefix(prefix).split("/"):
                case [""]:
                    self._send_file("text/html; charset=utf-8", self.server.page)
                case ["niivue.js"]:
                    self._send_bytes("text/javascript", (_HERE / "niivue.umd.js.gz").read_bytes(), gzipped=True)
                case ["volume", index, column, i, *_]:
                    source = self.server.volume(int(index), unquote(column), int(i))
                    send = self._send_bytes if isinstance(source, bytes) else self._send_file
                    send("application/octet-stream", source)
                case _:
                    self.send_error(404)
        except (KeyError, ValueError, FileNotFoundError):
            self.send_error(404)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the browser has lost interest

    def _send(self, content_type: str, length: int, *headers: tuple[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send_bytes(self, content_type: str, data: bytes, gzipped: bool = False) -> None:
        self._send(content_type, len(data), *[("Content-Encoding", "gzip")] * gzipped)
        self.wfile.write(data)

    def _send_file(self, content_type: str, path: str) -> None:
        with open(path, "rb") as file:
            self._send(content_type, os.fstat(file.fileno()).st_size)
            shutil.copyfileobj(file, self.wfile, 1 << 20)


def main(args: list[str] | None = None) -> int:
    options = parse_args(args)
    try:
        builder = build(options)
        splits = builder.as_dataset()
        split = options.split or next(iter(splits))
        if split not in splits:
            raise ValueError(f"there is no split {split!r}; there is {', '.join(splits)}")
        preview = Preview.of(splits, builder.config.preview)
        if preview is None:
            raise ValueError("the dataset has no column of images")
        with tempfile.TemporaryDirectory() as scratch:
            out = options.out or os.path.join(scratch, "preview.html")
            pieces = page(
                preview,
                splits[split],
                title=f"{builder.dataset_name}, {builder.config.name}, {split}",
                tree=os.path.abspath(options.data_dir),
                serve=_serve_command(options),
                max_rows=options.rows,
                faces=options.faces,
            )
            write_page(out, pieces)
            if options.out:
                print(f"Wrote {out} ({size(os.path.getsize(out))}); open it in a browser", flush=True)
            if options.serve:
                with Server(options.port, splits[split], out) as server:
                    print(f"Serving {server.url} (Ctrl-C ends it)", flush=True)
                    server.serve_forever()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def write_page(out: str, pieces: Iterable[str]) -> None:
    """Writes under a temporary name and renames, so that half a page does not pass for one."""
    temporary = f"{out}.{os.getpid()}.part"
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(pieces)
        os.replace(temporary, out)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _serve_command(options: argparse.Namespace) -> str:
    words = [options.builder, "--data-dir", options.data_dir]
    for name in ("config", "schema", "split"):
        words += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    return shlex.join(["python", "-m", "datasets_bids.preview", *words, "--serve"])


if __name__ == "__main__":
    sys.exit(main())
