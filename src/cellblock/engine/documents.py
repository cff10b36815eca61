"""YAML and JSON that people write, read strictly: nothing means something else than what stands there.

YAML 1.1, which PyYAML reads, takes ``1:30`` for 90, ``010`` for 8, ``1_0`` for 10 and ``no`` for false, and
of a key that is there twice the last. All of that is refused here, with line and column. What is left is read
as YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema) would.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import JobFileError

if TYPE_CHECKING:
    import yaml

# By the tag that YAML 1.1 gives a plain scalar: what also YAML 1.2 reads as that.
_PLAIN = {
    "int": re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "null": re.compile(r"|~|null|Null|NULL"),
    "timestamp": re.compile(r"(?!)"),
}


class _RepeatedKeyError(ValueError):
    """JSON with a key twice."""


def parse_document(text: str, source: str) -> object:
    """YAML or JSON text as plain data; raises :class:`JobFileError` naming ``source``, line and column."""
    try:
        # JSON first: it needs no third-party module and YAML is slow.
        return json.loads(text, object_pairs_hook=_unique)
    except ValueError:
        pass  # a repeated key as well: YAML says where
    except RecursionError:
        raise JobFileError(source, "is nested too deeply", "write a plain job") from None
    import yaml  # only clients read YAML; the service must start without it

    try:
        return yaml.load(text, _loader())  # noqa: S506 -- it is a SafeLoader
    except _RefusedError as refused:
        raise JobFileError(source, f"{refused.place}: {refused.message}", refused.remedy) from None
    except yaml.YAMLError as problem:
        detail = " ".join(str(problem).split()).replace(' in "<unicode string>",', "")
        raise JobFileError(
            source, f"is neither YAML nor JSON: {detail}", "mend the syntax"
        ) from None
    except (RecursionError, ValueError) as problem:
        raise JobFileError(source, f"cannot be read as YAML: {problem}", "mend it") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise _RepeatedKeyError
    return mapping


def ambiguities(text: str, names: Collection[str]) -> list[str]:
    """A sentence, with line and column, for each value that is read here otherwise than it may be meant, of
    YAML that somebody else parses: in whatever belongs to a key of ``names``, and each key that is there twice.

    For files with variables, which Ansible reads leniently, of which only some are ours. Merged mappings and
    tags are allowed. What is no YAML has none: whoever parses it says so.
    """
    import yaml

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        return [str(refused) for refused in _refused(root, names, False, set())] if root else []
    except (yaml.YAMLError, RecursionError):
        return []


def _refused(
    node: yaml.Node, names: Collection[str], is_ours: bool, seen: set[tuple[int, bool]]
) -> Iterator[_RefusedError]:
    # An alias is the node that it stands for: each is visited once.
    if (id(node), is_ours) in seen or (id(node), True) in seen:
        return
    seen.add((id(node), is_ours))
    import yaml

    if isinstance(node, yaml.MappingNode):
        yield from _repeated(node)
        for key, value in node.value:
            yield from _refused(value, names, is_ours or key.value in names, seen)
            if is_ours:
                yield from _refused(key, names, key.value != "<<", seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _refused(value, names, is_ours, seen)
    elif is_ours and (refused := _ambiguous(node)):
        yield refused


def _repeated(node: yaml.MappingNode) -> Iterator[_RefusedError]:
    import yaml

    found = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or _merges(key):
            continue
        if key.value in found:
            yield _RefusedError(key, f"{key.value!r} is there twice", "leave one out")
        found.add(key.value)


def _merges(key: yaml.ScalarNode) -> bool:
    return key.value == "<<" and key.style is None


def _ambiguous(node: yaml.Node) -> _RefusedError | None:
    import yaml

    kind = node.tag.rpartition(":")[2]
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if not is_plain or kind not in _PLAIN or _PLAIN[kind].fullmatch(node.value):
        return None
    return _RefusedError(
        node,
        f"{node.value!r} means different things to different readers of YAML",
        "quote it, or write a plain number, true or false",
    )


class _RefusedError(Exception):
    """What YAML allows and we do not."""

    def __init__(self, node: yaml.Node, message: str, remedy: str) -> None:
        super().__init__()
        self.place = f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
        self.message, self.remedy = message, remedy

    def __str__(self) -> str:
        return f"{self.place}: {self.message}; {self.remedy}"


@cache
def _loader() -> type[yaml.SafeLoader]:
    """A SafeLoader that refuses what is ambiguous."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Not PyYAML's C loader, which has no place of a key."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and _merges(key):
                    raise _RefusedError(key, "merges another mapping", "write its fields out")
            for refused in _repeated(node):
                raise refused
            return super().construct_mapping(node, deep)

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            if refused := _ambiguous(node):
                raise refused
            return super().construct_object(node, deep)

    return StrictLoader
