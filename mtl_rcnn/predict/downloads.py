"""Images by their address: http and https, one request each, of a limited time and size."""

from __future__ import annotations

import http.client
import io
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mtl_rcnn.data.image_file import upright_rgb
from mtl_rcnn.errors import UnreadableImageError

TIMEOUT = 20.0
"""Seconds without a part of an answer, and for the whole of a file."""
MAX_BYTES = 64 * 2**20
_SCHEMES = ("http", "https")
_CHUNK = 1 << 16


def is_url(text: str) -> bool:
    """Whether a text is an address rather than a path."""
    return text.lower().startswith(tuple(f"{scheme}://" for scheme in _SCHEMES))


def url_name(url: str) -> str:
    """What results call the image: the address without its scheme and without who asks."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.netloc.rpartition('@')[2]}{parts.path}" + (f"?{parts.query}" if parts.query else "")


def read_url(url: str, timeout: float = TIMEOUT, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned upright as its EXIF orientation says. Nothing is written to the disk.

    Args:
        url: http or https; redirections to such are followed.
        timeout: seconds to wait for each part of an answer, and for the whole file once it begins to come.
        max_bytes: of the file.

    Raises:
        UnreadableImageError: no answer, an answer other than a file, too large a file, or no image; names the address.
    """
    data = _fetch(url, timeout, max_bytes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        start = data[:40].decode("ascii", "replace").split("\n")[0]
        raise UnreadableImageError(f"{url}: is no image; {len(data)} bytes that begin with {start!r}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{url}: the image has too many pixels ({error})") from None
    try:
        return upright_rgb(image)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{url}: {str(error).partition(': ')[2]}") from error


def _fetch(url: str, timeout: float, max_bytes: int) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mtl-rcnn", "Accept": "image/*"})
        with urllib.request.build_opener(_Redirects).open(request, timeout=timeout) as answer:
            return _body(answer, url, timeout, max_bytes)
    except urllib.error.HTTPError as error:
        raise UnreadableImageError(f"{url}: the server answers {error.code} ({error.reason})") from None
    except TimeoutError:
        raise UnreadableImageError(f"{url}: no answer within {timeout:g} s") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise UnreadableImageError(f"{url}: no answer within {timeout:g} s") from None
        raise UnreadableImageError(f"{url}: cannot be reached ({error.reason})") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UnreadableImageError(f"{url}: cannot be read ({error or type(error).__name__})") from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Stays with http and https: the library would also go on to ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not is_url(newurl):
            raise urllib.error.URLError(f"it redirects to {newurl}; expected http or https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _body(answer: http.client.HTTPResponse, url: str, timeout: float, max_bytes: int) -> bytes:
    announced = answer.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise UnreadableImageError(f"{url}: {int(announced)} bytes; expected an image of at most {max_bytes}")
    ends, parts, size = time.monotonic() + timeout, [], 0
    while part := answer.read1(_CHUNK):
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise UnreadableImageError(f"{url}: more than {max_bytes} bytes; expected a smaller image")
        if time.monotonic() > ends:
            raise UnreadableImageError(f"{url}: not complete within {timeout:g} s")
    if announced.isdigit() and size < int(announced):
        raise UnreadableImageError(f"{url}: ends after {size} of {announced} bytes")
    return b"".join(parts)
