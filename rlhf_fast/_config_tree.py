"""Trees of settings: read from YAML and dotted overrides, merged, built into checked dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

MAX_YAML_BYTES = 1_000_000
MAX_YAML_DEPTH = 20
# YAML 1.2 core rules. The 1.1 rules of PyYAML read 1e-6 as a string, `no` as false, 010 as 8 and 1:30 as 90.
_SCALARS = {
    "tag:yaml.org,2002:null": r"null|Null|NULL|~|",
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9]{0,18})",
    "tag:yaml.org,2002:float": r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
    r"|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
}
_RESOLVERS = {None: [(tag, re.compile(rf"(?:{pattern})\Z")) for tag, pattern in _SCALARS.items()]}
T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is unknown, missing or out of range. One line: place, key, what was got and expected."""


@dataclass(frozen=True)
class Tree:
    """Settings as given by one source, and where each of them stands."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    """Dotted key -> prefix of messages, such as `run.yaml:12: `."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            problem = f"nested deeper than {MAX_YAML_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that the reader would take for something else."""

    yaml_implicit_resolvers = _RESOLVERS

    def represent_str(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes Unicode line breaks bare in every style but this one, and they read back as spaces.
        style = '"' if any(c in text for c in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, Dumper.represent_str)


def _parse_yaml(text: str, name: str) -> Tree:
    places: dict[str, str] = {}

    def convert(node: yaml.Node, key: str) -> Any:
        places[key] = f"{name}:{node.start_mark.line + 1}: "
        if isinstance(node, yaml.ScalarNode):
            return loader.construct_object(node)
        if node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            raise ConfigError(f"{places[key]}{key}: got tag {_short(node.tag)}, expected plain data")
        if isinstance(node, yaml.SequenceNode):
            return [convert(child, f"{key}.{i}") for i, child in enumerate(node.value)]
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            at = f"{name}:{key_node.start_mark.line + 1}: "
            if key_node.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"{at}{_join(key, str(key_node.value)[:40])}: keys must be plain text")
            child = _join(key, key_node.value)
            if key_node.value in mapping:
                raise ConfigError(f"{at}{child}: given twice in the same block")
            mapping[key_node.value] = convert(value_node, child)
        return mapping

    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = {} if node is None else convert(node, "")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{at}: {', '.join(filter(None, (error.context, error.problem)))}") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}: {' '.join(str(error).split())}") from None
    return Tree(values, places)


def read_yaml(path: Path) -> Tree:
    """Settings of a YAML file: plain data of at most 1 MB, no aliases, no object tags. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}") from None
    if len(raw) > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: got more than {MAX_YAML_BYTES} bytes, expected a small file of settings")
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree.values, dict):
        raise ConfigError(f"{path}: got a {type(tree.values).__name__}, expected `key: value` lines")
    return tree


def read_overrides(cls: type, words: Sequence[str]) -> Iterator[Tree]:
    """One tree for each `--dotted.name value...`, in order. Raises ConfigError."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            groups.append((name, [value] if equals else []))
        elif not groups:
            raise ConfigError(f"{word}: got a value without a name, expected `--name value`")
        else:
            groups[-1][1].append(word)
    for name, values in groups:
        key = _underscored(cls, name)
        parent, _, leaf = key.rpartition(".")
        positive = _join(parent, leaf.removeprefix("no_"))
        if _kind(cls, key) is None and _kind(cls, positive) == {bool}:
            if values:
                raise ConfigError(f"--{name}: got {' '.join(values)!r}, expected no value")
            key, values = positive, ["false"]
        tree: Any = _override_value(name, values, _kind(cls, key))
        for part in reversed(key.split(".")):
            tree = {part: tree}
        yield Tree(tree, {key: ""})


def _underscored(cls: type, name: str) -> str:
    """Names of settings with hyphens turned into underscores; the keys of a mapping stay as typed."""
    key, owner = "", typing.cast("type | None", cls)
    for part in name.split("."):
        hints = _hints(owner) if owner else {}
        part = part if owner is None else part.replace("-", "_")
        key, owner = _join(key, part), _nested(hints[part]) if part in hints else None
    return key


def _override_value(name: str, words: list[str], kind: set[Any] | None) -> Any:
    if not words:
        if kind == {bool}:
            return True
        if kind is not None and kind & {tuple, dict}:
            return [] if tuple in kind else {}
        raise ConfigError(f"--{name}: got no value, expected one")
    if kind is None:  # unknown here: the merge reports it with a suggestion
        return words[0]
    if len(words) == 1 and words[0][:1] in ("[", "{"):
        return _parse_yaml(words[0], f"--{name}").values
    if len(words) == 1 and type(None) in kind and words[0].lower() in ("none", "null"):
        return None
    if dict in kind:
        if bad := [word for word in words if "=" not in word]:
            raise ConfigError(f"--{name}: got {bad[0]!r}, expected NAME=VALUE")
        return dict(word.rsplit("=", 1) for word in words)
    if len(words) > 1 and tuple not in kind:
        raise ConfigError(f"--{name}: got {len(words)} values ({' '.join(words)[:60]}), expected one")
    if len(words) == 1 and not kind & {str, tuple}:
        return _parse_yaml(words[0], f"--{name}").values
    return words if tuple in kind and (len(words) > 1 or str not in kind) else words[0]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(inner for member in typing.get_args(hint) for inner in _members(member))
    return (hint,)


def _nested(hint: Any) -> type | None:
    return next((m for m in _members(hint) if isinstance(m, type) and dataclasses.is_dataclass(m)), None)


def _kind(cls: type, key: str) -> set[Any] | None:
    """Plain types a dotted key accepts (Literal counts as str), or None if there is no such key."""
    owner: type | None = cls
    parts = key.split(".")
    for i, part in enumerate(parts):
        hint = _hints(owner).get(part) if owner else None
        if hint is None:
            return None
        origins = {typing.get_origin(m) or m for m in _members(hint)}
        if dict in origins and i == len(parts) - 2:
            return {str}
        owner = _nested(hint)
        if i == len(parts) - 1:
            return {str if origin is typing.Literal else origin for origin in origins}
    return None


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _leaf_keys(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in _hints(cls).items():
        yield _join(prefix, name)
        if inner := _nested(hint):
            yield from _leaf_keys(inner, _join(prefix, name))


def _suggestion(root: type, owner: type, parent: str, name: str) -> str:
    close = difflib.get_close_matches(name, _hints(owner), n=1)
    if close:
        return f"; did you mean {_join(parent, close[0])}?"
    by_leaf = {key.rpartition(".")[2]: key for key in _leaf_keys(root)}
    close = difflib.get_close_matches(name, by_leaf, n=1)
    if close:
        return f"; did you mean {by_leaf[close[0]]}?"
    return f"; expected one of {', '.join(_hints(owner))}"


def defaults(cls: type) -> dict[str, Any]:
    """Default values of a dataclass as a tree, without the required ones."""
    tree: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        inner = _nested(_hints(cls)[f.name])
        if f.default is not dataclasses.MISSING:
            tree[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            made = f.default_factory()
            tree[f.name] = dataclasses.asdict(made) if inner else made
        elif inner:
            tree[f.name] = defaults(inner)
    return tree


def merge(base: Mapping[str, Any], tree: Tree, cls: type) -> dict[str, Any]:
    """`base` with `tree` over it: values are replaced, blocks are merged. Raises ConfigError."""

    def fail(key: str, text: str) -> typing.NoReturn:
        place = tree.places.get(key, "")
        raise ConfigError(f"{place}{key}: {text}")

    def walk(old: Mapping[str, Any], new: Mapping[str, Any], owner: type, parent: str) -> dict[str, Any]:
        merged = dict(old)
        hints = _hints(owner)
        for name, value in new.items():
            key = _join(parent, name)
            if name not in hints:
                fail(key, f"unknown setting{_suggestion(cls, owner, parent, name)}")
            inner = _nested(hints[name])
            if inner is not None:
                if not isinstance(value, dict):
                    fail(key, f"got {_short(value)}, expected a block of {', '.join(_hints(inner))}")
                merged[name] = walk(merged.get(name) or {}, value, inner, key)
                continue
            kind = _kind(cls, key) or set()
            if isinstance(value, bool) and bool not in kind:  # pydantic would count true as 1
                fail(key, f"got {str(value).lower()}, expected {_names(kind)}")
            if tuple in kind and str not in kind and isinstance(value, str):
                value = [value]
            if dict in kind and isinstance(value, dict) and value:
                value = {**(merged.get(name) or {}), **value}
            merged[name] = value
        return merged

    return walk(base, tree.values, cls, "")


def build(cls: type[T], values: Mapping[str, Any], places: Mapping[str, str] | None = None) -> T:
    """The checked dataclass of these values. Raises ConfigError: the first fault and how many more."""
    try:
        return _adapter(typing.cast("typing.Hashable", cls)).validate_python(values)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        key, text = _describe(cls, faults[0])
        raise ConfigError(f"{(places or {}).get(key, '')}{key}: {text}{more}") from None


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _describe(cls: type, fault: Any) -> tuple[str, str]:
    key, owner = "", typing.cast("type | None", cls)
    for part in fault["loc"]:
        if isinstance(part, int) or (owner is not None and part in _hints(owner)):
            key = _join(key, str(part))
            owner = _nested(_hints(owner)[part]) if owner is not None and part in _hints(owner) else None
        elif owner is None and _kind(cls, key) and dict in (_kind(cls, key) or ()) and part != "[key]":
            key = _join(key, str(part))
    if fault["type"] == "missing":
        kind = _kind(cls, key)
        return key, "missing" if kind is None else f"missing, expected {_names(kind)}"
    message = fault["msg"].removeprefix("Value error, ")
    # How the dataclasses word the checks they make themselves.
    own = re.fullmatch(r"(?:\w+: )?argument '([\w.]+)' (got .*)", message, re.DOTALL)
    if own:
        return _join(key, own[1]), own[2]
    expected = re.sub(r"^Input should be |^Value should (?:have|be) |^String should have ", "", message)
    return key, f"got {_short(fault['input'])}, expected {expected[:1].lower()}{expected[1:]}"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _names(kind: set[Any]) -> str:
    words = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
    words |= {tuple: "a list", dict: "a mapping", type(None): "nothing"}
    return " or ".join(sorted(words.get(k, "a block of settings") for k in kind)) or "a block of settings"
