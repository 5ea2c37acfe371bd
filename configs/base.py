"""Strict, frozen configuration: load YAML, apply dotted overrides, dump, fingerprint.

Truth flows one way: class defaults <- one preset <- dotted overrides. Every fault of a file is reported at once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import Self

from configs.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``3e-4`` as text; this loader reads it as the number it is, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"the key {', '.join(repeated)} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


# No setting is a date; a run folder named after the day is text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] not in ("timestamp", "binary", "set", "omap", "pairs")
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class Strict(BaseModel):
    """Unknown keys are errors, instances are immutable, defaults are validated too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read one YAML file and apply ``section.key=value`` overrides.

        Raises:
            UserError: the file is missing or is no YAML mapping, or any value is unknown, misspelt, of a wrong
                type or contradicts another; all faults are listed together.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {error}", "a readable YAML file", "check the path given to --config") from error
        tree = _parse(text, where=str(path))
        if not isinstance(tree, dict):
            raise UserError(
                f"{path} holds {type(tree).__name__}", "a YAML mapping of sections", "see configs/demo.yaml"
            )
        for item in overrides:
            set_dotted(tree, item)
        return cls.check(tree, where=str(path))

    @classmethod
    def check(cls, tree: dict[str, Any], where: str) -> Self:
        """Validate a plain tree of YAML values; ``where`` names its origin in errors."""
        try:
            # Through JSON, strict mode takes lists for tuples yet refuses "12" for 12 and true for 1.
            return cls.model_validate_json(json.dumps(tree), strict=True)
        except ValidationError as error:
            faults = "\n          ".join(_explain(cls, detail) for detail in error.errors(include_url=False))
            raise UserError(
                f"{error.error_count()} fault(s) in {where}\n          {faults}",
                "a configuration without faults",
                "mend the keys above in the file or on the command line",
            ) from None

    def dump(self) -> str:
        """The whole configuration, defaults included, as YAML that `load` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def fingerprint(self) -> str:
        """Twelve hex digits naming this exact configuration."""
        return fingerprint_of(self.model_dump(mode="json"))


def fingerprint_of(tree: Any) -> str:
    """Twelve hex digits naming a tree of plain values."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def set_dotted(tree: dict[str, Any], item: str) -> None:
    """Apply one ``a.b.c=value`` override in place; the value is read as YAML."""
    path, equals, text = item.partition("=")
    if not equals or not path:
        raise UserError(f"override {item!r}", "the form section.key=value", "write for example train.steps=100")
    *parents, leaf = path.split(".")
    node = tree
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise UserError(
                f"override {item!r}: {name!r} holds {child!r}", f"{name!r} to be a section", "check the path"
            )
        node = child
    node[leaf] = _parse(text, where=f"override {item!r}")


def differences(here: Any, there: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value here, value there) wherever two trees of plain values differ."""
    if not (isinstance(here, dict) and isinstance(there, dict)):
        return [] if here == there else [(key, here, there)]
    found = []
    for name in sorted(here.keys() | there.keys()):
        found += differences(here.get(name), there.get(name), f"{key}.{name}" if key else name)
    return found


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {error}", "well-formed YAML", "mend the line and column named above") from None


def _explain(cls: type[BaseModel], detail: ErrorDetails) -> str:
    """One line for one fault, with the nearest known name for an unknown key."""
    path = [str(part) for part in detail["loc"]]
    dotted = ".".join(path) or "(whole file)"
    value = repr(detail.get("input"))
    shown = value if len(value) <= 80 else value[:77] + "..."
    if detail["type"] == "extra_forbidden":
        known = _known_keys(cls, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{dotted}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{dotted}: this key is required"
    if detail["type"] == "value_error":
        return f"{dotted}: {detail['msg'].removeprefix('Value error, ')}"
    return f"{dotted}: {detail['msg']} (found {shown})"


def _known_keys(cls: type[BaseModel], path: list[str]) -> list[str]:
    """Keys valid at a dotted path; union members and list positions in the path are stepped over."""
    classes = {cls}
    for part in path:
        inner = {c for k in classes if part in k.model_fields for c in _models_in(k.model_fields[part].annotation)}
        classes = inner or classes
    tagged = {c for c in classes if "kind" in c.model_fields and c.model_fields["kind"].default in path}
    return sorted({name for c in (tagged or classes) for name in c.model_fields})


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)}
