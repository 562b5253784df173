"""Which files the input consists of: found, sorted and counted; of saved datasets, what their state.json names.

The input is a path, a pattern of paths, or either of them as the URL of an object store.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from data_pipeline.storage import StoredObject, is_url, list_objects, object_versions, open_object, split_url
from moe_dist.config.data_schema import DataConfig
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
        path: Where it lies: on this machine, or in its store.
        kind: One of `RECORD_ENDINGS`, `.arrow` for a file of a saved dataset, or `plain`.
        size_bytes: Size when it was listed.
        mtime_ns: Time of its last change when it was listed, in nanoseconds.
        store: Object store it lies in, as `storage.split_url` gives it; empty on this machine.
        version: What told its contents apart when it was listed (an ETag); empty where nothing does.
        source: Name of the source it belongs to; empty where the input has no named sources.
        text_field: Field of its records that holds their text; empty takes that of all.
    """

    id: str
    path: str
    kind: str
    size_bytes: int
    mtime_ns: int
    store: str = ""
    version: str = ""
    source: str = ""
    text_field: str = ""

    @property
    def identity(self) -> list[Any]:
        """What the name of a build takes of a file: with other contents it is another one."""
        return [self.id, self.size_bytes, self.version or self.mtime_ns]


@dataclass(frozen=True)
class Listing:
    """The files of an input, sorted by id, and how many files of which other endings were left aside."""

    files: tuple[InputFile, ...]
    ignored_endings: dict[str, int] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def list_data(data: DataConfig) -> Listing:
    """Lists the input of a build: that of each named source in turn, or `data.input`.

    Ids of a source's files begin with its name.

    Raises:
        DataError: An input does not exist, or holds no file that is read.
        StorageError: An object store does not list it.
    """
    if not data.sources:
        return list_input(data.input, data.suffixes)
    files: list[InputFile] = []
    ignored: Counter[str] = Counter()
    for name, source in data.sources.items():
        try:
            found = list_input(source.input, data.suffixes)
        except DataError as error:
            where = error.where.replace("data.input", f"data.sources.{name}.input")
            raise type(error)(where, error.value, error.rule, error.fix) from None
        field_name = source.text_field or ""
        files += [replace(f, id=f"{name}/{f.id}", source=name, text_field=field_name) for f in found.files]
        ignored.update(found.ignored_endings)
    return Listing(tuple(files), dict(ignored))


def list_input(source: str, suffixes: tuple[str, ...]) -> Listing:
    """Lists a folder, a single file, the files that match a pattern, or the interpreter's own library.

    Hidden files and folders and `__pycache__` are left out. Links are followed, except a folder inside itself.

    Args:
        source: `data.input`.
        suffixes: Endings that are read as plain text.

    Raises:
        DataError: The path does not exist, or holds no file that is read.
        StorageError: An object store does not list it.
    """
    if source == PYTHON_LIBRARY:
        return _list_library()
    if is_url(source) and not source.startswith("file://"):
        return _list_store(source, suffixes)
    path = Path(source.removeprefix("file://")).expanduser()
    if path.is_dir():
        return _list_folder(path, suffixes)
    if path.is_file():
        return _list_file(path, suffixes)
    base, pattern = _split_pattern(str(path))
    if pattern and Path(base).is_dir():
        return _list_folder(Path(base), suffixes, pattern)
    if path.exists():
        fix = "write what it gives to a file, and name that"
        raise DataError("data.input", source, "the input is a file or a folder, not a pipe or a device", fix)
    raise DataError("data.input", source, "the input exists", _nearest_path(path))


def kind_of(name: str, suffixes: tuple[str, ...]) -> str | None:
    """The way a file of this name is read: `plain`, one of `RECORD_ENDINGS`, or None where it is not."""
    lower = name.lower()
    for ending in RECORD_ENDINGS:
        if lower.endswith(ending):
            return ending
    return "plain" if lower.endswith(tuple(suffix.lower() for suffix in suffixes)) else None


def is_unchanged(file: InputFile) -> bool:
    """Whether a file has the size and time that it was listed with; reading an object proves that by itself."""
    return bool(file.store) or _stat_file(file.id, Path(file.path), file.kind).identity == file.identity


def _list_library() -> Listing:
    root = Path(sysconfig.get_path("stdlib"))
    files = [_stat_file(id_, path, "plain") for id_, path in _walk(root, _NOT_LIBRARY) if id_.endswith(".py")]
    if not files:
        raise DataError("data.input", str(root), "this interpreter's library is there as .py files", "name a folder")
    return Listing(tuple(sorted(files, key=lambda file: file.id)))


def _list_folder(root: Path, suffixes: tuple[str, ...], pattern: Sequence[str] = ()) -> Listing:
    deepest = None if "**" in pattern or not pattern else len(pattern) - 1
    found = {id_ for id_, _ in _walk(root, deepest=deepest)}
    saved = _saved_files(found, lambda id_: (root / id_).read_bytes())
    chosen, ignored = _choose(str(root), found, saved, suffixes, pattern)
    return Listing(tuple(_stat_file(id_, root / id_, kind) for id_, kind in chosen), ignored)


def _list_store(url: str, suffixes: tuple[str, ...]) -> Listing:
    """Lists as a folder of the same files on this machine would be listed."""
    store, path = split_url(url)
    base, pattern = _split_pattern(path)
    found = list_objects(store, base)
    if set(found) == {""} and not pattern:  # the object itself
        name = PurePath(base).name
        found = {name: found[""]}
        chosen = [(name, _kind_of_named(url, name, suffixes))]
        ignored: dict[str, int] = {}
    else:
        found = {id_: entry for id_, entry in found.items() if not _is_hidden(id_)}
        saved = _saved_files(found, lambda id_: _contents(store, found[id_]))
        chosen, ignored = _choose(f"{store}/{base}", found, saved, suffixes, pattern)
    for id_, _ in chosen:
        if id_ not in found:
            fix = "save the dataset again with save_to_disk"
            raise DataError(id_, "no such object", "the files that a state.json names are there", fix)
    entries = [found[id_] for id_, _ in chosen]
    versions = object_versions(store, [entry.path for entry in entries])
    return Listing(
        tuple(
            InputFile(id_, entry.path, kind, entry.size_bytes, entry.mtime_ns, store, version)
            for (id_, kind), entry, version in zip(chosen, entries, versions, strict=True)
        ),
        ignored,
    )


def _contents(store: str, entry: StoredObject) -> bytes:
    with open_object(store, entry, "") as source:
        return source.read()


def _choose(
    where: str, found: Collection[str], saved: Collection[str], suffixes: tuple[str, ...], pattern: Sequence[str]
) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The ids that are read, sorted, each with its kind, and how many others of which ending match the pattern.

    Raises:
        DataError: None is read.
    """
    chosen: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    for id_ in sorted({*found, *saved}):
        if pattern and not _matches(id_.split("/"), pattern):
            continue
        kind = kind_of(id_, suffixes) if id_ not in saved else ".arrow"
        if kind is None:
            ignored[PurePath(id_).suffix.lower() or "(none)"] += 1
        elif id_ not in saved or id_.endswith(".arrow"):
            chosen[id_] = kind
    if not chosen:
        seen = ", ".join(f"{ending} ({count})" for ending, count in ignored.most_common(8)) or "no files"
        raise DataError(
            "data.input",
            f"{where} holds {seen}" + (f" that match {'/'.join(pattern)}" if pattern else ""),
            f"some file has an ending that is read: {', '.join(RECORD_ENDINGS + tuple(suffixes))}, "
            "or save_to_disk of datasets wrote the folder",
            "a pattern names files, as in texts/**/*.md (** stands for any folders); correct it"
            if pattern and not ignored
            else "name another folder, or add the ending of a plain-text file to data.suffixes",
        )
    return list(chosen.items()), dict(sorted(ignored.items()))


def _split_pattern(path: str) -> tuple[str, list[str]]:
    """(the folder before the first part with a wildcard, the parts of the pattern); no parts without a wildcard."""
    parts = path.split("/")
    first = next((place for place, part in enumerate(parts) if any(sign in part for sign in "*?[")), None)
    if first is None:
        return path, []
    return "/".join(parts[:first]) or ("/" if path.startswith("/") else ""), parts[first:]


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether folders and a file match: `**` stands for any number of names, other wildcards stay within one."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or (bool(names) and _matches(names[1:], pattern))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _is_hidden(id_: str) -> bool:
    return any(name.startswith(".") or name == "__pycache__" for name in id_.split("/"))


def _list_file(path: Path, suffixes: tuple[str, ...]) -> Listing:
    return Listing((_stat_file(path.name, path, _kind_of_named(str(path), path.name, suffixes)),))


def _kind_of_named(where: str, name: str, suffixes: tuple[str, ...]) -> str:
    """A file that is named itself may also have no ending at all: it is plain text then."""
    ending = PurePath(name).suffix
    kind = kind_of(name, suffixes) or (None if ending else "plain")
    if kind is None:
        raise DataError(
            "data.input",
            where,
            f"a file has an ending that is read: {', '.join(RECORD_ENDINGS + tuple(suffixes))}",
            "name the folder that save_to_disk of datasets wrote"
            if ending == ".arrow"
            else f"if it is plain text: data.suffixes='[\"{ending}\"]'",
        )
    return kind


def _saved_files(found: Collection[str], read: Callable[[str], bytes]) -> set[str]:
    """The files of every saved dataset among those found: its two tables of contents and the .arrow files they name.

    Raises:
        DataError: A state.json cannot be read, names a file outside its folder, or an order of rows of its own.
    """
    saved: set[str] = set()
    for id_ in sorted(found):
        prefix, slash, name = id_.rpartition("/")
        beside = [f"{prefix}{slash}{other}" for other in _SAVED_DATASET]
        if name == _SAVED_DATASET[0] and beside[1] in found:
            saved |= {f"{prefix}{slash}{data_file}" for data_file in _data_files(id_, read)}
            saved |= set(beside)
    return saved


def _data_files(id_: str, read: Callable[[str], bytes]) -> list[str]:
    """The .arrow files that a state.json names: names in its own folder, as a stranger may have written it."""
    fix = "save the dataset again with save_to_disk"
    try:
        state: Any = json.loads(read(id_))
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


def _walk(
    root: Path, without: frozenset[str] = frozenset({"__pycache__"}), deepest: int | None = None
) -> Iterator[tuple[str, Path]]:
    """Yields (relative path, path) of every visible regular file, broken links included, in no particular order.

    Folders below `deepest` levels under the root are not entered.
    """
    pending: list[tuple[str, Path, frozenset[tuple[int, int]]]] = [("", root, frozenset())]
    while pending:
        prefix, folder, above = pending.pop()
        inside = above | {_identity(folder)}
        for entry in _entries(folder):
            if entry.name.startswith(".") or entry.name in without:
                continue
            path = folder / entry.name
            if entry.is_dir():
                if _identity(path) not in inside and (deepest is None or prefix.count("/") < deepest):
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
