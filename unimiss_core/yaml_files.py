"""YAML files that people write, and papers that they are sent: read as plain values, strictly and within limits."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from unimiss_core.errors import ConfigError

MOST_BYTES = 4 * 2**20
MOST_ENTRIES = 100_000
"""Of all lists and mappings, each counted as often as it is referred to: a few lines of aliases may stand for more
than fits in memory."""

_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises ConfigError: unreadable, too large, not YAML, or a key written twice."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{path}: is larger than {MOST_BYTES // 2**20} MiB; give the path of a YAML file")
        return yaml.load(content.decode(), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        told = printable(str(getattr(error, "problem", error)))
        raise ConfigError(f"{path}: is not valid YAML{line}: {told}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nests lists or mappings too deep") from None
    except ValueError as error:  # what PyYAML takes for a date or a number, and is none
        raise ConfigError(
            f"{path}: holds a value that cannot be read ({printable(str(error))}); write texts in quotes"
        ) from None


def printable(text: str) -> str:
    """`text` without signs that steer a terminal: the file may be somebody else's."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence, follows aliases wherever they lead, and reads 1:30 as 90."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        if _entries(node, {}) > MOST_ENTRIES:
            raise yaml.YAMLError(f"it holds more than {MOST_ENTRIES:,} entries, with what its aliases stand for")
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused("a key is a list or a mapping, and should be a text", key_node)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _refused(f"key '{key}' is written twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        if ":" in node.value:
            raise _refused(f"{node.value} is a number to base 60; write a text in quotes, or another number", node)
        is_whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)


def _refused(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _entries(node: yaml.Node, known: dict[int, int]) -> int:
    """Of a node and all below it. known: of nodes that were met, 0 while these are counted."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise _refused("it refers to itself", node)
        return known[id(node)]
    known[id(node)] = 0
    below = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
    known[id(node)] = 1 + sum(_entries(each, known) for each in below)
    return known[id(node)]
