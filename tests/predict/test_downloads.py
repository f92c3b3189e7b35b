"""Images by their address, from a server in a thread of this process."""

from __future__ import annotations

import http.server
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from networks import write_checkpoint
from PIL import Image

from mtl_rcnn.errors import DataError, UnreadableImageError
from mtl_rcnn.predict import Predictor
from mtl_rcnn.predict.downloads import read_url
from mtl_rcnn.predict.sources import open_source

ROOT = Path(__file__).resolve().parents[2]


def _png(height: int = 30, width: int = 50) -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue(), pixels


PNG, PIXELS = _png()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the path that is asked for."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/moved.png":
            self._answer(302, b"", {"Location": "/image.png"})
        elif path == "/page.png":
            self._answer(200, b"<html>sorry</html>")
        elif path == "/large.png":
            self._answer(200, PNG, {"Content-Length": str(10**9)})
        elif path == "/endless.png":
            self._answer(200, b"x" * 100_000, {"Content-Length": None})
        elif path == "/short.png":
            self._answer(200, PNG[:200], {"Content-Length": str(len(PNG))})
        elif path == "/damaged.png":
            self._answer(200, PNG[: len(PNG) // 2])
        elif path == "/silent.png":
            time.sleep(2)
        elif path == "/slow.png":
            self._answer(200, b"", {"Content-Length": str(len(PNG))})
            for start in range(20):
                time.sleep(0.1)
                try:
                    self.wfile.write(PNG[start : start + 1])
                except OSError:  # the reader has had enough
                    return
        elif path == "/away.png":
            self._answer(302, b"", {"Location": "file:///etc/hostname"})
        elif path == "/elsewhere.png":
            self._answer(302, b"", {"Location": "ftp://127.0.0.1/image.png"})
        elif path in ("/image.png", "/sub/image.png"):
            self._answer(200, PNG)
        else:
            self.send_error(404)

    def _answer(self, status: int, body: bytes, headers: dict[str, str | None] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server."""
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("path", ["/image.png", "/moved.png", "/image.png?size=3&x=a"])
def test_an_image_comes_as_it_is(server: str, path: str) -> None:
    np.testing.assert_array_equal(read_url(server + path), PIXELS)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/missing.png", r"/missing\.png: the server answers 404 \(Not Found\)"),
        ("/page.png", r"is no image; 18 bytes that begin with '<html>sorry</html>'"),
        ("/large.png", r"1000000000 bytes; expected an image of at most 5000"),
        ("/endless.png", r"more than 5000 bytes"),
        ("/short.png", r"/short\.png: ends after 200 of \d+ bytes|cannot be read"),
        ("/damaged.png", r"/damaged\.png: the image cannot be decoded"),
        ("/silent.png", r"no answer within 0\.5 s"),
        ("/slow.png", r"not complete within 0\.5 s"),
        ("/away.png", r"/away\.png: "),
        ("/elsewhere.png", r"redirects to ftp://127\.0\.0\.1/image\.png; expected http or https"),
    ],
)
def test_what_is_no_image_is_told_with_its_address(server: str, path: str, said: str) -> None:
    with pytest.raises(UnreadableImageError, match=said):
        read_url(server + path, timeout=0.5, max_bytes=5000)


def test_a_host_that_does_not_answer() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UnreadableImageError, match=rf"127\.0\.0\.1:{port}/a\.png: cannot be reached"):
        read_url(f"http://127.0.0.1:{port}/a.png")
    with pytest.raises(UnreadableImageError, match=r"http:///a\.png: cannot be re"):
        read_url("http:///a.png")
    with pytest.raises(UnreadableImageError, match=r"http://\[::1/a\.png: cannot be re"):
        read_url("http://[::1/a.png")


def test_addresses_are_a_source_like_files(server: str, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "file.png")
    source = open_source([f"{server}/image.png", str(tmp_path / "file.png"), f"{server}/sub/image.png"])
    items = list(source.items)
    host = server.removeprefix("http://")
    assert source.total == 3
    assert [item.name for item in items] == [f"{host}/image.png", str(tmp_path / "file.png"), f"{host}/sub/image.png"]
    assert [item.path for item in items] == [None, tmp_path / "file.png", None]
    assert all((item.read() == PIXELS).all() for item in items)
    named = open_source(f"http://user:secret@{host}/image.png?size=3")
    assert [item.name for item in named.items] == [f"{host}/image.png?size=3"]
    with pytest.raises(DataError, match="a video is not read from an address"):
        open_source(f"{server}/film.mp4")


def test_the_predictor_leaves_out_what_cannot_be_fetched(server: str, tmp_path: Path) -> None:
    predictor = Predictor(write_checkpoint(tmp_path / "network.pth", ["detection"]), on_error="skip")
    results = list(predictor([f"{server}/missing.png", f"{server}/image.png"]))
    assert [result.image.shape for result in results] == [PIXELS.shape]
    assert "404" in predictor.skipped[0].reason


@pytest.mark.slow
def test_the_tool_takes_an_address_and_draws(server: str, tmp_path: Path) -> None:
    network = write_checkpoint(tmp_path / "network.pth", ["detection"])
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "tools/predict.py", f"network={network}", f"output_dir={out}"]
    given = f"input=[{server}/image.png,'{server}/image.png?size=3']"
    done = subprocess.run([*command, given, "device=cpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((out / "drawings").rglob("*.png"))) == 2
    host = server.removeprefix("http://")
    names = [entry["id"] for entry in json.loads((out / "predictions" / "images.json").read_text())]
    assert names == [f"{host}/image.png", f"{host}/image.png?size=3"]
    done = subprocess.run([*command, f"input={server}/no.png"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "404" in done.stderr + done.stdout
