"""The part of JSON Schema that the schemas of reports use, checked without a library."""

import re

__all__ = ["find_faults"]

_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
_WORDS = {"$schema", "title", "description", "$defs"}
_RULES = {"type", "const", "enum", "required", "properties", "additionalProperties", "items", "pattern", "$ref"}
_RULES |= {"minItems", "maxItems", "minimum", "minLength"}


def find_faults(schema, value, root=None, place="$"):
    """Where a value is not as the schema says, in sentences; a rule that is not known here is a fault, too."""
    root = schema if root is None else root
    faults = [f"{place}: the rule {rule} is not known" for rule in set(schema) - _WORDS - _RULES]
    if "$ref" in schema:
        faults += find_faults(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root, place)

    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_of(value, kind) for kind in kinds):
        return [*faults, f"{place}: {value!r} is no {' or '.join(kinds)}"]
    if "const" in schema and value != schema["const"]:
        faults.append(f"{place}: {value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        faults.append(f"{place}: {value!r} is none of {schema['enum']}")

    if isinstance(value, str):
        if not re.search(schema.get("pattern", ""), value) or len(value) < schema.get("minLength", 0):
            faults.append(f"{place}: {value!r} has another form")
    elif isinstance(value, (int, float)) and value < schema.get("minimum", value):
        faults.append(f"{place}: {value} is too small")
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            faults.append(f"{place}: {len(value)} items")
        for number, item in enumerate(value):
            faults += find_faults(schema.get("items", {}), item, root, f"{place}[{number}]")
    elif isinstance(value, dict):
        faults += _find_faults_of_object(schema, value, root, place)
    return faults


def _find_faults_of_object(schema, value, root, place):
    known = schema.get("properties", {})
    faults = [f"{place}: {name} is missing" for name in schema.get("required", []) if name not in value]
    for name, item in value.items():
        rule = known.get(name, schema.get("additionalProperties", {}))
        if rule is False:
            faults.append(f"{place}: {name} is not known")
        else:
            faults += find_faults(rule, item, root, f"{place}.{name}")
    return faults


def _is_of(value, kind):
    return isinstance(value, _TYPES[kind]) and not (isinstance(value, bool) and kind in ("integer", "number"))
