"""Object stores: which objects lie below a URL, and each of them as a file that is never short or mixed in silence.

`pyarrow.fs` does the talking (S3, Google Cloud Storage, Azure, HDFS, and with `fsspec+SCHEME://` whatever fsspec
knows). Who may read, and where the store is, comes from the environment of each process, never from the config.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, cast

import pyarrow as pa
from pyarrow import fs

from moe_dist.errors import StorageError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)/*(.*)", re.DOTALL)
_BUFFER_BYTES = 4 * 2**20  # read from the store at once
_REQUESTS_AT_ONCE = 16
_AGAIN = "build again when nothing writes to data.input"
# What a message of a store says, and what to do about it. The words are those of the AWS library and of HTTP.
_FIXES = (
    (
        r"NO_SUCH_BUCKET|bucket does not exist",
        "correct the name of the bucket in data.input, or AWS_ENDPOINT_URL if it is on another store",
    ),
    (
        r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|CREDENTIALS|EXPIRED_TOKEN|AUTHENTICATION|\b40[13]\b",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) of one who may list and read it",
    ),
    (r"NETWORK_CONNECTION|curlCode|[Cc]onnect|[Tt]imed? ?out|resolve", "check the network and AWS_ENDPOINT_URL"),
)


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing shows it.

    Attributes:
        path: Its place in the file system of its store.
        size_bytes: Its size.
        mtime_ns: Time of its last change in nanoseconds; 0 where the store does not say.
    """

    path: str
    size_bytes: int
    mtime_ns: int


def is_url(source: str) -> bool:
    """Whether an input is on an object store rather than a path of this machine."""
    return _URL.fullmatch(source) is not None


def split_url(url: str) -> tuple[str, str]:
    """(store, path in it) of a URL: `s3://bucket` and `folder/name`. The path is taken as it stands, without %-codes.

    Raises:
        StorageError: The URL holds a name or password, or names no bucket.
    """
    match = _URL.fullmatch(url)
    assert match is not None, f"{url} is no URL"
    scheme, place, path = match.groups()
    user, at, _ = place.rpartition("@")
    if at and (":" in user or scheme.lower() in ("s3", "gs", "gcs")):
        fix = f"{scheme}://{place.rpartition('@')[2]}/{path}, and AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or the like"
        found = f"{scheme}://...@{place.rpartition('@')[2]}"
        raise StorageError("data.input", found, "keys and passwords come from the environment", fix)
    if not place and scheme.lower() in ("s3", "gs", "gcs"):
        raise StorageError("data.input", url, "the URL names a bucket", f"{scheme}://BUCKET/FOLDER")
    return f"{scheme.lower()}://{place}", path.strip("/")


def list_objects(store: str, path: str) -> dict[str, StoredObject]:
    """The objects below a folder of a store by their paths relative to it; an object that is named itself has "".

    Raises:
        StorageError: There is nothing of that name, or the store does not answer or refuses.
    """
    url = f"{store}/{path}"
    with _named(url):
        system, root = _connect(store)
        base = f"{root}/{path}".strip("/") if root.strip("/") else path
        if root.startswith("/"):
            base = f"/{base}"
        try:
            found = system.get_file_info(fs.FileSelector(base, recursive=True))
        except (FileNotFoundError, NotADirectoryError):
            found = []
        if not found:
            found = [info for info in system.get_file_info([base]) if info.type == fs.FileType.File]
        if not found:
            raise StorageError("data.input", url, "the input exists", _nearest(system, store, base))
    objects = (info for info in found if info.type == fs.FileType.File and not info.path.endswith("/"))
    return {
        info.path.removeprefix(base).lstrip("/"): StoredObject(info.path, info.size or 0, info.mtime_ns or 0)
        for info in objects
    }


def object_versions(store: str, paths: Sequence[str]) -> list[str]:
    """The version of each object: its ETag, which other contents change; empty where the store has none.

    Raises:
        StorageError: One is gone or cannot be asked for.
    """
    system, _ = _connect(store)

    def version(path: str) -> str:
        with _named(path), system.open_input_file(path) as source:
            return _version(source)

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(version, paths))


@contextlib.contextmanager
def open_object(store: str, seen: StoredObject, version: str) -> Iterator[BinaryIO]:
    """Opens an object for reading, seeking included; afterwards it must be the one that was listed.

    Args:
        store: As `split_url` gives it.
        seen: The object when it was listed.
        version: Its version then; empty checks size and time alone.

    Raises:
        StorageError: It is gone, another one, or cannot be read to its end; in mid-read too.
    """
    with _named(seen.path):
        system, _ = _connect(store)
        source = system.open_input_file(seen.path)
    with source:
        with _named(seen.path):
            _check_same(system, source, seen, version)
        yield cast(BinaryIO, io.BufferedReader(_Object(source, seen), _BUFFER_BYTES))
    with _named(seen.path), system.open_input_file(seen.path) as after:
        _check_same(system, after, seen, version)


class _Object(io.RawIOBase):
    """Reads by place, so that a read that breaks off is seen: the end is where the listing said it is."""

    def __init__(self, source: pa.NativeFile, seen: StoredObject) -> None:
        self._source, self._seen, self._place = source, seen, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = (0, self._place, self._seen.size_bytes)[whence]
        if start + offset < 0:
            raise ValueError(f"negative seek position {start + offset}")
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), max(0, self._seen.size_bytes - self._place))
        if not wanted:
            return 0
        with _named(self._seen.path):
            data = self._source.read_at(wanted, self._place)
        if not data:
            found = f"ends at byte {self._place:,}, not {self._seen.size_bytes:,}"
            raise StorageError(self._seen.path, found, "an object is read to its end", _AGAIN)
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


def _check_same(system: fs.FileSystem, source: pa.NativeFile, seen: StoredObject, version: str) -> None:
    size, now = source.size(), _version(source)
    if size != seen.size_bytes:
        found = f"{size:,} bytes, not {seen.size_bytes:,}"
    elif version and now != version:
        found = f"version {now}, not {version}"
    elif not version and _seconds(system.get_file_info(seen.path).mtime_ns) != _seconds(seen.mtime_ns):
        found = "another time of its last change"
    else:
        return
    raise StorageError(seen.path, found, "the input does not change while it is built", _AGAIN)


def _seconds(time_ns: int | None) -> int:
    """Whole seconds: a listing of some stores knows the time better than a request for one object."""
    return (time_ns or 0) // 10**9


def _version(source: pa.NativeFile) -> str:
    values = {name.lower(): value for name, value in (source.metadata() or {}).items()}
    value = values.get("etag", b"")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@lru_cache(maxsize=16)
def _connect(store: str) -> tuple[fs.FileSystem, str]:
    """The file system of a store and the store's root in it; once for each process, with what its environment says."""
    scheme, _, place = store.partition("://")
    if scheme != "s3":
        system, root = fs.FileSystem.from_uri(f"{store}/")
        return system, root
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not endpoint and not region:
        region = fs.resolve_s3_region(place)
    return fs.S3FileSystem(endpoint_override=endpoint, region=region), place


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Turns what a file system raises into an error that names the object and what to do."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError:
        rule = "an object that was listed is there when it is read"
        raise StorageError(where, "no such object", rule, _AGAIN) from None
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        message = " ".join(str(error).split())
        fix = next((fix for words, fix in _FIXES if re.search(words, message)), "name another input, or copy it here")
        raise StorageError(where, message, "the store lists and gives what is asked for", fix) from None


def _nearest(system: fs.FileSystem, store: str, base: str) -> str:
    """What lies beside a name that does not exist."""
    parent, _, _ = base.rpartition("/")
    try:
        beside = system.get_file_info(fs.FileSelector(parent, recursive=False)) if parent else []
    except (OSError, pa.ArrowException):
        beside = []
    names = sorted(info.base_name for info in beside)
    return f"{store}: {parent} holds {', '.join(names[:8])}" if names else "correct the name in data.input"
