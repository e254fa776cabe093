"""YAML whose scalars stay texts: the types of the settings decide their meaning."""

import re
from typing import ClassVar

import yaml


class TextLoader(yaml.SafeLoader):
    """Makes mappings, lists and texts, and None of a plain null. Refuses other tags, and a key that comes twice."""

    # SafeLoader's would make a number of 20241128_153000, and other objects where a tag asks for them.
    yaml_implicit_resolvers: ClassVar[dict] = {}
    yaml_constructors: ClassVar[dict] = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map", "null")))
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} comes twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(null|Null|NULL|~|)$"), ["n", "N", "~", ""])
TextLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])


def parse(text: str) -> object:
    """Return the content of a YAML text. Raises ValueError, in one line, for one that is wrong."""
    try:
        return yaml.load(text, TextLoader)
    except (yaml.YAMLError, OverflowError) as error:  # OverflowError: an escape such as "\\Uffffffff"
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("too many brackets inside each other") from error


def dump(content: dict) -> str:
    """Return the content as YAML, in its order."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
