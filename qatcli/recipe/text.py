"""Reading YAML so that what a person wrote is what is meant: plain values only, keys are text and
occur once, errors with a place.

Anchors and aliases are refused too: a recipe is short enough to be written out, and an alias can nest without end.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class YamlProblem(ValueError):
    """The text is not the YAML that a recipe may use; the message says where."""


class _StrictLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not supported; write the value out", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, OverflowError, KeyError, IndexError, TypeError, AttributeError) as error:
            # PyYAML lets the errors of int(), date() and their like escape without a place
            message = f"cannot read this value: {error}"
            raise yaml.MarkedYAMLError(problem=message, problem_mark=node.start_mark) from error

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("half of a surrogate pair is not text")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, yaml.Mark] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            mark = key_node.start_mark
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"a key must be text, not {key!r}", problem_mark=mark)
            if key in seen:
                message = f"the key {key!r} is already set on line {seen[key].line + 1}"
                raise yaml.MarkedYAMLError(problem=message, problem_mark=mark)
            seen[key] = mark
        return super().construct_mapping(node, deep=deep)


def parse(text: str) -> Any:
    """The value of one YAML document. Raises YamlProblem with line and column, counted from 1."""
    try:
        return _StrictLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        what = " ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlProblem(place + what) from error
    except yaml.reader.ReaderError as error:
        raise YamlProblem(f"character {error.position}: {error.reason}") from error
    except RecursionError as error:
        raise YamlProblem("nested too deeply") from error
