"""Lists of numbers that are written as Python, as the anchors of Detectron2's own RetinaNet configs: computed, not run.

There are numbers, lists, tuples, sums, products, powers and one kind of comprehension; nothing else has a meaning here,
neither a name nor a call.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["compute"]

_MOST_LETTERS, _MOST_ITEMS, _MOST_OF_A_POWER = 1000, 1000, 4096

_OPERATIONS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


def compute(text: str) -> Any:
    """The value of a text such as "[x * 2 ** (1 / 3) for x in [32, 64]]".

    Args:
        text: an expression of Python.

    Raises:
        ValueError: it is none, or has more in it than numbers, lists of them and arithmetic.

    Example:
        >>> compute("[[x, x * 2**0.5] for x in [32, 64]]")
        [[32, 45.254833995939045], [64, 90.50966799187809]]
    """
    try:
        if len(text) > _MOST_LETTERS:
            raise ValueError(f"{len(text)} letters")
        return _compute(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _compute(node: ast.AST, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]

        case ast.List(elts=items):
            return [_compute(item, names) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_compute(item, names) for item in items)

        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(_compute(operand, names))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATIONS:
            one, other = _number(_compute(left, names)), _number(_compute(right, names))
            if isinstance(sign, ast.Pow) and max(abs(one), abs(other)) > _MOST_OF_A_POWER:
                raise ValueError("a power of large numbers")
            return _OPERATIONS[type(sign)](one, other)

        case ast.ListComp(elt=element, generators=[ast.comprehension(target=ast.Name(id=name), iter=items, ifs=[])]):
            values = _compute(items, names)
            if len(values) > _MOST_ITEMS:
                raise ValueError(f"{len(values)} items")
            return [_compute(element, {**names, name: value}) for value in values]
    raise ValueError(f"{type(node).__name__} in it")


def _number(value: Any) -> Any:
    if not isinstance(value, (int, float)):
        raise ValueError(f"arithmetic on a {type(value).__name__}")
    return value
