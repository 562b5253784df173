"""Checkpoints in an object store, which has no rename: parts first, the manifest last, and that one write commits.

    <url>/step-00000050/manifest.json                                  the checkpoint is there when this is
    <url>/step-00000050/9f3c.../part-00000-of-00002.safetensors        parts in a folder of their save

A checkpoint of the same step is replaced by the one write of the manifest; the parts of the other save, and those of
uploads that a kill cut short, are swept after the next. `pyarrow.fs` does the talking; who may write, and where the
store is, comes from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and the like), never from the config.
"""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path

from pyarrow import NativeFile, fs

from moe_dist.checkpoint import store
from moe_dist.checkpoint.manifest import MANIFEST, OLDER, Manifest, manifest_bytes, proven_manifest
from moe_dist.checkpoint.source import Opens, Source
from moe_dist.errors import CheckpointError

_BLOCK = 16 * 2**20
_STEP = re.compile(r"step-(\d{8,18})")
_SAVE = re.compile(r"[0-9a-f]{1,64}")
_DISTANCE = 2


class ObjectStore:
    """The checkpoints below a URL.

    Args:
        url: Such as `s3://bucket/runs/demo`.
    """

    def __init__(self, url: str) -> None:
        self.url = self.name = url.rstrip("/")
        self.lasting = True

    @cached_property
    def _files(self) -> fs.FileSystem:
        """The store, in which all names begin at the URL."""
        scheme, _, place = self.url.partition("://")
        if scheme != "s3":
            system, base = fs.FileSystem.from_uri(self.url)
            return fs.SubTreeFileSystem(base, system)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not endpoint and not region:
            region = fs.resolve_s3_region(place.partition("/")[0])
        return fs.SubTreeFileSystem(place, fs.S3FileSystem(endpoint_override=endpoint, region=region))

    def find(self) -> list[int]:
        """Steps of all checkpoints, newest first.

        Raises:
            OSError: The store does not answer, or refuses.
        """
        files = self._below("")
        committed = {path.split("/")[0] for path in files if path.endswith(f"/{MANIFEST}") and path.count("/") == 1}
        return sorted((int(m[1]) for m in map(_STEP.fullmatch, committed) if m), reverse=True)

    def source(self, found: int) -> Source:
        """The checkpoint of a step."""
        path = Path(f"{self.url}/{store.step_name(found)}")

        def opens() -> Opens:
            folder = self._folder_of(self.manifest(found))
            return lambda file: _StoredPart(self._files, f"{folder}/{file.name}", file)

        return Source(path, found, _DISTANCE, lambda: self.manifest(found), opens)

    def manifest(self, step: int) -> Manifest:
        """The proven manifest of a step.

        Raises:
            CheckpointError: It is missing, cannot be read, or is not what was written.
        """
        where = f"{self.url}/{store.step_name(step)}/{MANIFEST}"
        try:
            with self._files.open_input_stream(f"{store.step_name(step)}/{MANIFEST}", compression=None) as source:
                content = source.read()
        except OSError as error:
            raise CheckpointError(where, _words(error), "the manifest can be read", OLDER) from None
        return proven_manifest(content, where)

    def publish(self, path: Path, manifest: Manifest) -> None:
        """Copies a checkpoint from the disk; when this returns it is there.

        Raises:
            OSError: The store does not answer, or refuses. What was there before is still there.
        """
        folder = self._folder_of(manifest)
        for part in manifest.parts:
            with (path / part.file).open("rb") as source, self._writing(f"{folder}/{part.file}") as target:
                while block := source.read(_BLOCK):
                    target.write(block)
        with self._writing(f"{store.step_name(manifest.step)}/{MANIFEST}") as target:
            target.write(manifest_bytes(manifest))

    def prune(self, published: Manifest, keep: int, keep_every: int) -> None:
        """Removes all but the newest `keep` up to this one and those that are kept for good, and sweeps what is left of
        others.
        """
        older = [step for step in self.find() if step < published.step]
        for step in older[keep - 1 :]:
            if not keep_every or step % keep_every:
                self._files.delete_file(f"{store.step_name(step)}/{MANIFEST}")
        self._sweep(published)

    def _sweep(self, published: Manifest) -> None:
        """Parts of no checkpoint: of steps that have no manifest, and of other saves of the step just published."""
        there = {store.step_name(step) for step in self.find()}
        mine = self._folder_of(published)
        for path in self._below(""):
            step = path.split("/")[0]
            stale = step not in there or (
                path.startswith(f"{store.step_name(published.step)}/") and path.count("/") > 1
            )
            if _STEP.fullmatch(step) and stale and not path.startswith(f"{mine}/"):
                self._files.delete_file(path)

    def _below(self, folder: str) -> list[str]:
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        return [info.path for info in self._files.get_file_info(selector) if info.type == fs.FileType.File]

    def _writing(self, path: str) -> NativeFile:
        if isinstance(self._files.base_fs, fs.LocalFileSystem):
            self._files.create_dir(path.rpartition("/")[0], recursive=True)
        return self._files.open_output_stream(path, compression=None)

    def _folder_of(self, manifest: Manifest) -> str:
        if not _SAVE.fullmatch(manifest.save):
            where = f"{self.url}/{store.step_name(manifest.step)}"
            raise CheckpointError(where, repr(manifest.save), "a save is named by hexadecimal digits", OLDER)
        return f"{store.step_name(manifest.step)}/{manifest.save}"


class _StoredPart:
    """A part in the store, read range by range."""

    def __init__(self, files: fs.FileSystem, path: str, where: Path) -> None:
        try:
            self._source = files.open_input_file(path)
            self.size = self._source.size()
        except OSError as error:
            raise CheckpointError(str(where), _words(error), "every file of the manifest exists", OLDER) from None

    def read(self, into: memoryview, at: int) -> int:
        """As `Opened.read`."""
        content = self._source.read_at(len(into), at)
        into[: len(content)] = content
        return len(content)

    def ahead(self, start: int, end: int) -> None:
        """Several threads read: nothing is fetched before."""

    def close(self) -> None:
        """Closes the object."""
        self._source.close()


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
