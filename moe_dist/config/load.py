"""From files and command-line overrides to a checked `Config`.

A YAML file may name one other file as its `base`; its own keys then replace the base's. Overrides of the form
`key.path=value` are applied last, their value read as YAML.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moe_dist.config.nearest import nearest_value
from moe_dist.config.rules import broken_rules, check_rules
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML that reads `1e-3` as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            name = str(key_node.value)
            if name in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(
                    f"line {line}", name, "a key may stand only once in a section", f"remove one '{name}'"
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads back exactly: the text `1e-3` and rare line ends are quoted."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\x85\u2028\u2029\ufeff]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, its base and the overrides into a checked tree.

    Args:
        path: The YAML file.
        overrides: Items like `train.steps=20`.

    Raises:
        ConfigError: A file, key, type, range or combination that is not allowed.
    """
    return parse_config(read_tree(path, overrides))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a YAML file, its base and the overrides into a plain tree that is not checked yet.

    Raises:
        ConfigError: A file that cannot be read as a mapping, or an override that is not `key.path=value`.
    """
    tree = _read_with_base(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return tree


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Checks a plain tree of values, as stored with a run or a checkpoint.

    Raises:
        ConfigError: The first key, type, range or combination that is not allowed.
    """
    try:
        config = Config.model_validate(dict(tree))
    except ValidationError as error:
        raise _explain(error.errors()[0]) from None
    check_rules(config)
    return config


def find_problems(tree: Mapping[str, Any]) -> list[ConfigError]:
    """Everything that is wrong with a plain tree: all keys, types and ranges, and once those hold, all rules."""
    try:
        config = Config.model_validate(dict(tree))
    except ValidationError as error:
        return [_explain(details) for details in error.errors()]
    return list(broken_rules(config))


def write_yaml(tree: Any, one_line: bool = False) -> str:
    """Writes plain values as YAML that `load_config` (or, on one line, an override) reads back as they are."""
    width = 1_000_000 if one_line else 120
    text = yaml.dump(
        tree, Dumper=_Dumper, default_flow_style=one_line, sort_keys=False, allow_unicode=True, width=width
    )
    return text.removesuffix("\n").removesuffix("\n...") if one_line else text


def key_paths(kind: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key path of the tree, sections included; sections that a person names stand under `NAME`."""
    for name, field in kind.model_fields.items():
        yield prefix + name
        inner, below = section_below(field)
        if inner is not None:
            yield from key_paths(inner, f"{prefix}{name}.{below}")


def section_below(field: FieldInfo) -> tuple[type[BaseModel] | None, str]:
    """The section that a key holds, once, by name or in a list, and what stands before its own keys; or None."""
    kind, below = field.annotation, ""
    if get_origin(kind) is dict:
        kind, below = get_args(kind)[1], "NAME."
    elif get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    return (kind, below) if isinstance(kind, type) and issubclass(kind, BaseModel) else (None, "")


def _read_with_base(path: Path) -> dict[str, Any]:
    tree = _read_yaml(path)
    base_name = tree.pop("base", None)
    if base_name is None:
        return tree
    base_path = path.parent / str(base_name)
    base = _read_yaml(base_path)
    if "base" in base:
        raise ConfigError(
            f"{base_path}: base", base["base"], "a base has no base of its own (one level)", "merge the two files"
        )
    return _merge(base, tree)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        fix = f"did you mean {path.parent / near[0]}?" if near else "name a readable YAML file"
        raise ConfigError(
            str(path), getattr(error, "strerror", None) or error, "the config file is read", fix
        ) from None
    try:
        tree = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(str(path), str(error).replace("\n", " "), "valid YAML", "correct the line named") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.where}", error.value, error.rule, error.fix) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            str(path), type(tree).__name__, "a config file is a mapping of keys", "write `key: value` lines"
        )
    return tree


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets a key of a plain tree, as `key.path=value` says it.

    Raises:
        ConfigError: It has another form.
    """
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(override, override, "an override has the form key.path=value", "for example train.steps=20")
    *parents, last = path.strip().split(".")
    section = tree
    for depth, name in enumerate(parents):
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            where = ".".join(parents[: depth + 1])
            raise ConfigError(path, text, f"{where} is a value, not a section", f"set {where}=... itself")
    try:
        section[last] = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(path, text, "the value of an override is read as YAML", f"{path}='\"{text}\"'") from None


def closest_key(path: str) -> str:
    """A fix for an unknown key: the closest known one, or what stands in its section."""
    known = list(key_paths())
    parent, _, name = path.rpartition(".")
    siblings = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == parent}
    near = [siblings[n] for n in difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)]
    near = near or [p for p in known if p.rpartition(".")[2] == name][:1]
    if not near and not siblings:
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"keys here: {', '.join(siblings.values())}" if siblings else "`moe-dist config explain` lists every key"


def _documented(loc: tuple[int | str, ...]) -> str:
    """The path of a key as it is documented: without places in a list, and with NAME for names that a person gives."""
    words = [part for part in loc if isinstance(part, str)]
    known = {tuple(path.split(".")) for path in key_paths()}
    for place in range(1, len(words)):
        if (*words[:place], "NAME") in {path[: place + 1] for path in known}:
            words[place] = "NAME"
    return ".".join(words)


def _explain(details: ErrorDetails) -> ConfigError:
    path, given = ".".join(str(part) for part in details["loc"]), details["input"]
    key = _documented(details["loc"])
    if details["type"] == "extra_forbidden":
        return ConfigError(path, given, "unknown key", closest_key(key))
    rule = re.sub(r"^Input should be", "must be", details["msg"])
    if details["type"] == "model_type":
        rule = "is a section: its keys stand below it"
    fix = f"`moe-dist config explain {key}` tells type, unit and default"
    nearest = nearest_value(Config, details)
    if nearest is not None:
        fix = f"{path}={write_yaml(nearest, one_line=True)}; {fix}"
    if isinstance(given, str) and given.lower() == "none":
        fix = f"{path}=null if you mean none"
    return ConfigError(path, f"{given!r} ({type(given).__name__})", rule, fix)
