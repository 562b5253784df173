"""Which files the input consists of: found, sorted and counted; of saved datasets, what their state.json names."""

from __future__ import annotations

import difflib
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from moe_dist.errors import DataError

PYTHON_LIBRARY = "python-library"
RECORD_ENDINGS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
_SAVED_DATASET = ("state.json", "dataset_info.json")  # what `datasets.save_to_disk` writes beside its .arrow files
# Installed packages and tests differ between machines or hold text that is wrong on purpose; `encodings` and
# `pydoc_data` are tables rather than programs.
_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    | {"encodings", "pydoc_data"}
)


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    Attributes:
        id: Path relative to the input folder, with `/`; the file's name where the input is one file.
        path: Where it lies.
        kind: One of `RECORD_ENDINGS`, `.arrow` for a file of a saved dataset, or `plain`.
        size_bytes: Size when it was listed.
        mtime_ns: Time of its last change when it was listed, in nanoseconds.
    """

    id: str
    path: str
    kind: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Listing:
    """The files of an input, sorted by id, and how many files of which other endings were left aside."""

    files: tuple[InputFile, ...]
    ignored_endings: dict[str, int] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def list_input(source: str, suffixes: tuple[str, ...]) -> Listing:
    """Lists a folder, a single file, or the interpreter's own library.

    Hidden files and folders and `__pycache__` are left out. Links are followed, except a folder inside itself.

    Args:
        source: `data.input`.
        suffixes: Endings that are read as plain text.

    Raises:
        DataError: The path does not exist, or holds no file that is read.
    """
    if source == PYTHON_LIBRARY:
        return _list_library()
    path = Path(source).expanduser()
    if path.is_dir():
        return _list_folder(path, suffixes)
    if path.is_file():
        return _list_file(path, suffixes)
    raise DataError("data.input", source, "the input exists", _nearest_path(path))


def kind_of(name: str, suffixes: tuple[str, ...]) -> str | None:
    """The way a file of this name is read: `plain`, one of `RECORD_ENDINGS`, or None where it is not."""
    lower = name.lower()
    for ending in RECORD_ENDINGS:
        if lower.endswith(ending):
            return ending
    return "plain" if lower.endswith(tuple(suffix.lower() for suffix in suffixes)) else None


def is_unchanged(file: InputFile) -> bool:
    """Whether a file has the size and time that it was listed with."""
    return _stat_file(file.id, Path(file.path), file.kind) == file


def _list_library() -> Listing:
    root = Path(sysconfig.get_path("stdlib"))
    files = [_stat_file(id_, path, "plain") for id_, path in _walk(root, _NOT_LIBRARY) if id_.endswith(".py")]
    if not files:
        raise DataError("data.input", str(root), "this interpreter's library is there as .py files", "name a folder")
    return Listing(tuple(sorted(files, key=lambda file: file.id)))


def _list_folder(root: Path, suffixes: tuple[str, ...]) -> Listing:
    found = dict(_walk(root))
    saved = _saved_files(found)
    files = [_stat_file(id_, path, ".arrow") for id_, path in saved.items() if path.suffix == ".arrow"]
    ignored: Counter[str] = Counter()
    for id_, path in found.items():
        kind = kind_of(id_, suffixes)
        if id_ in saved:
            continue
        if kind is None:
            ignored[PurePath(id_).suffix.lower() or "(none)"] += 1
        else:
            files.append(_stat_file(id_, path, kind))
    if not files:
        seen = ", ".join(f"{ending} ({count})" for ending, count in ignored.most_common(8)) or "no files"
        raise DataError(
            "data.input",
            f"{root} holds {seen}",
            f"some file has an ending that is read: {', '.join(RECORD_ENDINGS + tuple(suffixes))}, "
            "or save_to_disk of datasets wrote the folder",
            "name another folder, or add the ending of a plain-text file to data.suffixes",
        )
    return Listing(tuple(sorted(files, key=lambda file: file.id)), dict(sorted(ignored.items())))


def _list_file(path: Path, suffixes: tuple[str, ...]) -> Listing:
    """A file that is named itself may also have no ending at all: it is plain text then."""
    kind = kind_of(path.name, suffixes) or (None if path.suffix else "plain")
    if kind is None:
        raise DataError(
            "data.input",
            str(path),
            f"a file has an ending that is read: {', '.join(RECORD_ENDINGS + tuple(suffixes))}",
            "name the folder that save_to_disk of datasets wrote"
            if path.suffix == ".arrow"
            else f"if it is plain text: data.suffixes='[\"{path.suffix}\"]'",
        )
    return Listing((_stat_file(path.name, path, kind),))


def _saved_files(found: dict[str, Path]) -> dict[str, Path]:
    """The files of every saved dataset among those found: its two tables of contents and the .arrow files they name.

    Raises:
        DataError: A state.json cannot be read, names a file outside its folder, or an order of rows of its own.
    """
    saved: dict[str, Path] = {}
    for id_, path in found.items():
        prefix, slash, name = id_.rpartition("/")
        beside = [f"{prefix}{slash}{other}" for other in _SAVED_DATASET]
        if name == _SAVED_DATASET[0] and beside[1] in found:
            names = _data_files(id_, path)
            saved |= {f"{prefix}{slash}{data_file}": path.with_name(data_file) for data_file in names}
            saved |= {other: found[other] for other in beside}
    return saved


def _data_files(id_: str, path: Path) -> list[str]:
    """The .arrow files that a state.json names: names in its own folder, as a stranger may have written it."""
    fix = "save the dataset again with save_to_disk"
    try:
        state: Any = json.loads(path.read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
        reordered = bool(state.get("_indices_data_files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(id_, error, "state.json of a saved dataset names its data files", fix) from None
    for name in names:
        plain = isinstance(name, str) and PurePath(name).name == name and name.endswith(".arrow") and "\0" not in name
        if not plain:
            raise DataError(id_, f"data file {name!r}", "a data file is an .arrow file in the same folder", fix)
    if reordered:
        rule = "the rows of a saved dataset are in their own order, without a table of indices"
        raise DataError(id_, "_indices_data_files", rule, "dataset.flatten_indices() before save_to_disk")
    return names


def _walk(root: Path, without: frozenset[str] = frozenset({"__pycache__"})) -> Iterator[tuple[str, Path]]:
    """Yields (relative path, path) of every visible regular file, broken links included, in no particular order."""
    pending: list[tuple[str, Path, frozenset[tuple[int, int]]]] = [("", root, frozenset())]
    while pending:
        prefix, folder, above = pending.pop()
        inside = above | {_identity(folder)}
        for entry in _entries(folder):
            if entry.name.startswith(".") or entry.name in without:
                continue
            path = folder / entry.name
            if entry.is_dir():
                if _identity(path) not in inside:
                    pending.append((f"{prefix}{entry.name}/", path, inside))
            elif entry.is_file() or entry.is_symlink():
                yield f"{prefix}{entry.name}", path


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        raise DataError(
            str(folder), error.strerror, "every folder of the input can be listed", "correct its permissions"
        ) from None


def _stat_file(id_: str, path: Path, kind: str) -> InputFile:
    """A broken link gets size and time 0: reading it reports the error, by the policy of `data.unreadable`."""
    try:
        status = path.stat()
    except OSError:
        return InputFile(id_, str(path), kind, 0, 0)
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return InputFile(id_, str(path), kind, size, status.st_mtime_ns)


def _nearest_path(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    names = sorted(os.listdir(parent))
    near = difflib.get_close_matches(path.name, [*names, PYTHON_LIBRARY], n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0] if near[0] == PYTHON_LIBRARY else parent / near[0]}?"
    return f"{parent} holds: {', '.join(names[:8]) or 'nothing'}"
