"""Constraints of a search space: comparisons of flags and numbers, as in `policy.dim_model % policy.n_heads == 0`.

They are Python's expressions, but only arithmetic, comparisons, `and` and `or` are understood: a space file
cannot run code.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip


def names(expression: str) -> set[str]:
    """The flags that a constraint is about.

    Raises:
        SyntaxError, ValueError, TypeError: It is no comparison, or has something else in it.
    """
    tree = ast.parse(expression, mode="eval").body
    if not isinstance(tree, ast.Compare | ast.BoolOp):
        raise ValueError(expression)
    found: set[str] = set()
    for number in (1.0, 2.5):  # for any values: 1 / (a - 1) is no mistake in itself

        def noted(name: str, number: float = number) -> float:
            found.add(name)
            return number

        try:
            _value(tree, noted)
            break
        except ArithmeticError:
            continue
    return found


def holds(expression: str, config: dict[str, Any]) -> bool:
    """Whether a configuration keeps a constraint. One about flags that it does not have is kept."""
    if not names(expression) <= config.keys():
        return True
    return bool(_value(ast.parse(expression, mode="eval").body, config.__getitem__))


def _value(node: ast.AST, look_up: Callable[[str], Any]) -> Any:
    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str()):
                return node.value
            case ast.Attribute() | ast.Name() if ast.unparse(node).replace(".", "").isidentifier():
                return look_up(ast.unparse(node))
            case ast.BoolOp():
                parts = [value(part) for part in node.values]  # all of them, for `names`
                return all(parts) if isinstance(node.op, ast.And) else any(parts)
            case ast.UnaryOp(op=op) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(node.operand))
            case ast.BinOp(op=op) if type(op) in OPERATORS:
                pair = value(node.left), value(node.right)
                if any(isinstance(part, str) for part in pair):  # a word times a billion
                    raise TypeError(ast.unparse(node))
                return OPERATORS[type(op)](*pair)
            case ast.Compare(ops=ops) if all(type(op) in OPERATORS for op in ops):
                parts = [value(part) for part in (node.left, *node.comparators)]
                pairs = zip(ops, parts, parts[1:], strict=False)
                return all([OPERATORS[type(op)](a, b) for op, a, b in pairs])
        raise ValueError(ast.unparse(node))

    return value(node)
