"""The working folder of a build: what is done is kept, so that a build that was killed goes on from there.

    .<fingerprint>.work/
      survey-000012    what the first pass found in work item 12
      evaluation-runs  the runs of words of evaluation text, written at each try before anything else
      tokenizer        the trained tokenizer
      shards-000012    the manifest's rows of the shards of work item 12
      build/           tokenizer.json and the finished shards; becomes the build by one rename
      scratch/         what is being written; nobody reads it

A record of something done is a line with a SHA-256, and the contents. The hash covers them and their basis: all that
they depend on. A record that is torn, flipped or of another basis is not believed, and its work is done again.
Everything in here is a function of the input and the configuration, so several builders may share the folder: the same
name always gets the same bytes, by a rename.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.lengths import lengths_name
from data_pipeline.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest, fsync_folder, write_manifest

_STALE_SECONDS = 24 * 3600
_HASH_LINE = 65  # hexadecimal digits and a newline


@dataclass(frozen=True)
class WorkFolder:
    """A working folder; small and picklable, to be sent to other processes.

    Attributes:
        path: Where it lies, beside the build.
    """

    path: Path

    @property
    def build(self) -> Path:
        """What becomes the build."""
        return self.path / "build"

    @property
    def scratch(self) -> Path:
        """Where files lie until they are whole."""
        return self.path / "scratch"

    def open(self) -> None:
        """Makes the folder where it is missing. Nothing else makes it: once removed it must not come back in pieces."""
        self.build.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(exist_ok=True)
        os.utime(self.path)  # it is in use, however old what it holds may be: see `sweep`

    def remove(self) -> None:
        """Removes it with all that is done."""
        shutil.rmtree(self.path, ignore_errors=True)

    def keep(self, name: str, contents: bytes, basis: bytes) -> None:
        """Records something done. Not flushed to the disk: what a power cut tears is found by its hash."""
        self._write(self.path / name, _hash_line(contents, basis) + contents)

    def kept(self, name: str, basis: bytes) -> bytes | None:
        """What was recorded under a name; None where nothing was, or nothing that can be believed."""
        try:
            record = (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        contents = record[_HASH_LINE:]
        return contents if record[:_HASH_LINE] == _hash_line(contents, basis) else None

    def share(self, name: str, contents: bytes) -> Path:
        """Writes a file for the processes of this try, and says where it is; a later try writes its own."""
        self._write(self.path / name, contents)
        return self.path / name

    def put(self, name: str, contents: bytes) -> None:
        """Writes a file of the build, to stay after a power cut."""
        self._write(self.build / name, contents, durable=True)

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest, and leaves in the build no file but those it names.

        Raises:
            OSError: A shard is missing, as where another builder took the build away and published it.
        """
        named = {shard.file for split in manifest.splits.values() for shard in split} | {TOKENIZER_NAME}
        named |= set(map(lengths_name, manifest.lengths or ()))
        for path in self.build.iterdir():
            if path.name not in named | {MANIFEST_NAME}:
                path.unlink(missing_ok=True)
        own = self._unused()
        own.mkdir()
        write_manifest(own, manifest)
        os.replace(own / MANIFEST_NAME, self.build / MANIFEST_NAME)
        fsync_folder(self.build)
        for name in named:
            os.stat(self.build / name)

    def publish(self, folder: Path) -> None:
        """Gives the build its name. Who comes second keeps the first one's; a folder without manifest is moved away."""
        try:
            os.rename(self.build, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or (folder / MANIFEST_NAME).is_file():
                raise
            _remove_at_once(folder)
            os.rename(self.build, folder)
        fsync_folder(folder.parent)

    def _write(self, path: Path, contents: bytes, durable: bool = False) -> None:
        own = self._unused()
        try:
            with open(own, "wb") as file:
                file.write(contents)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(own, path)
        except OSError:
            own.unlink(missing_ok=True)  # on a full disk even a part of a file is in the way
            raise

    def _unused(self) -> Path:
        return self.scratch / uuid.uuid4().hex


def work_folder(build: Path) -> WorkFolder:
    """The working folder of a build."""
    return WorkFolder(build.absolute().with_name(f".{build.name}.work"))


def sweep(parent: Path, but: WorkFolder) -> None:
    """Removes the working folders, except one, in which nothing was written for a day."""
    for left in (*parent.glob(".*.work"), *parent.glob(".*.partial")):
        with contextlib.suppress(OSError):  # another builder may sweep too
            if left.absolute() != but.path and time.time() - _last_written(left) > _STALE_SECONDS:
                _remove_at_once(left)


def _last_written(folder: Path) -> float:
    """The newest time inside: that of a folder says nothing of the files that grow in it."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _remove_at_once(folder: Path) -> None:
    """Takes the name away first, so that nobody sees half of it."""
    aside = folder.with_name(f".{folder.name.lstrip('.')}.{uuid.uuid4().hex[:12]}.partial")
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _hash_line(contents: bytes, basis: bytes) -> bytes:
    digest = hashlib.sha256(len(basis).to_bytes(8, "little") + basis)
    digest.update(contents)
    return f"{digest.hexdigest()}\n".encode()
