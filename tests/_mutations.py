"""The mutants of a source: one small mistake each, of the kinds that a formula suffers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Change = tuple[str, ast.AST]
"""(kind, what stands in the node's place)"""

BINARY: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}
COMPARED: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
PAIRS = (
    "amin/amax all/any argmin/argmax ceil/floor clamp_max/clamp_min exp/expm1 log/log1p max/min maximum/minimum "
    "mean/sum new_ones/new_zeros ones/zeros ones_like/zeros_like log_softmax/softmax relu/softplus"
)
SWAPPED = {a: b for pair in PAIRS.split() for a, b in (pair.split("/"), pair.split("/")[::-1])}
ATTRIBUTES = {"sums": "averages", "averages": "sums", "num_sequences": "num_tokens", "num_tokens": "num_sequences"}
DROPPED = {
    **dict.fromkeys(("where", "masked", "masked_fill"), "mask dropped"),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), "bound dropped"),
    **dict.fromkeys(("abs", "neg", "relu", "tanh", "sqrt", "square"), "call dropped"),
    "detach": "detach dropped",
}
SIGNED = {"exp", "expm1", "log_softmax", "logsigmoid", "relu", "sigmoid", "softmax", "softplus", "tanh"}
MODULES = {"F", "functional", "math", "torch"}
NOT_MUTATED = {"annotation", "returns", "msg", "type_params"}


@dataclass(frozen=True)
class Mutant:
    """file, line, column, kind, before, after: its name. text: the line it is on, stripped. source: the whole mutant.

    lines: of the original; a test that runs none of them cannot tell. None where they run at import.
    """

    file: str
    line: int
    column: int
    kind: str
    before: str
    after: str
    text: str
    lines: tuple[int, ...] | None
    source: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}:{self.column} {self.kind} {self.before!r} -> {self.after!r}"


@dataclass(frozen=True)
class Site:
    """A node, the place that holds it, and the statement and function around it."""

    node: Any
    parent: Any
    field: str
    index: int | None
    statement: ast.stmt
    function: ast.FunctionDef | None

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def mutants(source: str, file: str) -> list[Mutant]:
    """All mutants of `source`, in the order of its text. None equals it or another."""
    tree = ast.parse(source)
    text = source.splitlines()
    seen = {ast.unparse(tree)}
    found = []
    for site in list(sites(tree, tree, None)):  # type: ignore[arg-type]
        for kind, new in changes(site, source):
            site.put(ast.fix_missing_locations(ast.copy_location(new, site.node)))
            mutated = ast.unparse(tree)
            site.put(site.node)
            if mutated in seen:
                continue
            seen.add(mutated)
            line, column = site.node.lineno, site.node.col_offset + 1
            names = short(site.node), short(new)
            lines = None if site.function is None else tuple(header(site.statement))
            found.append(Mutant(file, line, column, kind, *names, text[line - 1].strip(), lines, mutated))
    return sorted(found, key=lambda m: (m.line, m.column))


def short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else text[:40] + "..." + text[-17:]


def header(statement: Any) -> range:
    """The lines of a statement, without those of its body."""
    body = getattr(statement, "body", None)
    return range(statement.lineno, max(body[0].lineno, statement.lineno + 1) if body else statement.end_lineno + 1)


def sites(parent: Any, statement: ast.stmt, function: ast.FunctionDef | None) -> Iterator[Site]:
    """Every node that may be mutated. Docstrings and messages hold nothing but text, which never is."""
    inner = parent if isinstance(parent, ast.FunctionDef) else function
    for field, value in ast.iter_fields(parent):
        if field in NOT_MUTATED:
            continue
        around = inner if field == "body" else function  # defaults and decorators are evaluated outside
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or skipped(node):
                continue
            at = node if isinstance(node, ast.stmt) else statement
            yield Site(node, parent, field, index, at, around)
            if isinstance(node, ast.Raise) or (isinstance(node, ast.UnaryOp) and is_number(node.operand)):
                continue
            yield from sites(node, at, around)


def skipped(node: Any) -> bool:
    """Imports, texts, types, dtypes, stubs, and what only type checkers see."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.keyword(arg="dtype"):
            return True
        case ast.If():
            return ast.unparse(node.test).endswith("TYPE_CHECKING")
        case ast.FunctionDef():
            return any(ast.unparse(d).endswith("overload") for d in node.decorator_list)
        case ast.Assign():
            return ast.unparse(node.targets[0]) == "__all__"
        case ast.Call():
            return called(node) in ("TypeVar", "warn", "cast")
    return False


def changes(site: Site, source: str) -> Iterator[Change]:
    """Every mistake that can be made at one node."""
    node = site.node
    match node:
        case ast.Raise():
            yield "raise dropped", ast.Pass()
        case ast.Expr(value=ast.Call()):
            yield "statement dropped", ast.Pass()
        case ast.BinOp(op=ast.Pow()):
            yield "power dropped", node.left
        case ast.BinOp() | ast.AugAssign():
            for op in BINARY.get(type(node.op), ()):
                yield "operator", replace(node, op=op())
            if isinstance(node.op, ast.BitAnd) and isinstance(node, ast.BinOp):
                yield from (("mask dropped", side) for side in (node.left, node.right))
        case ast.BoolOp():
            yield "operator", replace(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.Compare():
            for i, op in enumerate(node.ops):
                for other in COMPARED[type(op)]:
                    yield "comparison", replace(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
        case ast.UnaryOp(op=ast.USub()) if is_number(node.operand):
            if isinstance(node.operand.value, int) and isinstance(site.parent, ast.Call | ast.Slice | ast.Subscript):
                yield "constant", ast.Constant(0)  # a dimension or an index: -1 and 1 are often one
            else:
                yield "sign", node.operand
                yield "constant", replace(node, operand=ast.Constant(other_number(node.operand.value)))
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not()):
            yield {ast.USub: "sign", ast.Invert: "mask inverted", ast.Not: "condition"}[type(node.op)], node.operand
        case ast.Constant(value=bool()):
            yield "boolean", ast.Constant(not node.value)
        case ast.Constant() if is_number(node):
            yield "constant", ast.Constant(other_number(node.value))
        case ast.Attribute() | ast.Name() if isinstance(node.ctx, ast.Load):
            yield from swapped_side(site, source)
        case ast.Call():
            yield from changed_call(node)
    if site.field in ("test", "ifs") and isinstance(node, ast.Name | ast.Attribute | ast.Call):
        yield "condition", ast.UnaryOp(ast.Not(), node)
    if isinstance(site.parent, ast.Return) and isinstance(node, ast.BinOp | ast.Call) and site.function is not None:
        if getattr(site.function.returns, "id", "") in ("Tensor", "float"):
            yield "sign", negative(node)


def changed_call(node: ast.Call) -> Iterator[Change]:
    """Another function, no function, another sign of what it is given, a bound or a mask less."""
    name = called(node)
    stem = name.rstrip("_")
    tail = name[len(stem) :]
    func: Any = node.func
    free = not isinstance(func, ast.Attribute)
    of_module = free or ast.unparse(func.value).split(".")[-1] in MODULES
    if of_module and not node.args:
        return
    operand: Any = node.args[stem == "where" and len(node.args) > 1] if of_module else func.value
    if stem in SWAPPED and (not free or stem in ("min", "max", "all", "any")):
        other = SWAPPED[stem] + tail
        yield "function", replace(node, func=ast.Name(other, ast.Load()) if free else replace(func, attr=other))
    if stem in DROPPED and (not free or stem == "abs"):
        yield DROPPED[stem], operand
    bounds = node.args[1 if of_module else 0 :]
    if stem == "clamp" and len(bounds) == 2:
        for i in range(2):
            kept = [ast.Constant(None) if k == i else b for k, b in enumerate(bounds)]
            yield "bound dropped", replace(node, args=[*node.args[: -len(bounds)], *kept])
    if stem == "clamp":
        for i, bound in enumerate(node.keywords):
            others = [*node.keywords[:i], *node.keywords[i + 1 :]]
            if others:
                yield "bound dropped", replace(node, keywords=others)
            elif bound.arg in ("min", "max"):
                yield "function", replace(node, keywords=[ast.keyword(SWAPPED[bound.arg], bound.value)])
    if name == "of" and len(node.args) == 2:
        yield "mask dropped", replace(node, args=node.args[:1])
    if stem in SIGNED and not isinstance(operand, ast.UnaryOp):
        if of_module:
            yield "sign", replace(node, args=[negative(operand), *node.args[1:]])
        else:
            yield "sign", replace(node, func=replace(func, value=negative(operand)))


def swapped_side(site: Site, source: str) -> Iterator[Change]:
    """chosen for rejected, sums for averages: where the other name is one that the file, or function, knows."""
    node = site.node
    name = node.attr if isinstance(node, ast.Attribute) else node.id
    side = re.fullmatch(r"(chosen|rejected)(_\w+)?", name)
    if side:
        other = {"chosen": "rejected", "rejected": "chosen"}[side[1]] + (side[2] or "")
    elif isinstance(node, ast.Attribute) and name in ATTRIBUTES:
        other = ATTRIBUTES[name]
    else:
        return
    if isinstance(node, ast.Attribute):
        if re.search(rf"[.]{other}\b|\bdef {other}\b|^ +{other}:", source, re.M):
            yield "attribute", replace(node, attr=other)
    elif site.function is not None and other in bound(site.function):
        yield "name", replace(node, id=other)


def bound(function: ast.FunctionDef) -> set[str]:
    """The names a function has: its arguments and variables."""
    nodes = list(ast.walk(function))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.arg)}


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def replace(node: Any, **fields: Any) -> Any:
    """A copy of the node, the rest of it shared."""
    return ast.copy_location(type(node)(**{**dict(ast.iter_fields(node)), **fields}), node)


def negative(node: Any) -> ast.UnaryOp:
    return ast.UnaryOp(ast.USub(), node)


def is_number(node: Any) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def other_number(value: float) -> float:
    """0 -> 1, 1 -> 2, n -> n + 1, x -> 1.5 x"""
    if value in (0, 1) or isinstance(value, int):
        return value + 1
    return value * 1.5
