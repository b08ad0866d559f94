"""How a decoder layer of vLLM hands on the residual stream, read from the source of its `forward`.

vLLM's layers follow one of a few conventions, and the addition must land where the stream really is:

- SPLIT: returns `(hidden, residual)`; the stream is their sum, and the next layer's norm adds them. Adding to the
  residual keeps vLLM's fusions of that norm.
- FIRST: returns a tuple whose first element is the whole stream; what follows is overwritten by the next layer.
- WHOLE: returns the stream itself ([n, H], or [1, n, H] from a Transformers layer).

SPLIT and FIRST look alike from outside. They differ in what `forward` does with the `residual` it is given: a SPLIT
layer reads it, a FIRST layer overwrites it unread. Adding to the first element is right for both, so that is what an
undecided layer gets; the start-up canary catches a layer taken for SPLIT by mistake.
"""

import ast
import inspect
import textwrap
from enum import Enum
from typing import Any, NamedTuple

from trimtab.sites import HookPoint


class Convention(Enum):
    """Where a layer's result holds the residual stream."""

    SPLIT = "split"
    FIRST = "first"
    WHOLE = "whole"


# Layers whose source does not tell, by class name; each was read, and why is said.
_OVERRIDES: dict[str, Convention] = {}


def convention_of(layer_class: type) -> Convention:
    """The convention of a decoder layer's class."""
    if (known := _OVERRIDES.get(layer_class.__name__)) is not None:
        return known
    function = forward_source(layer_class)
    if function is None:
        return Convention.FIRST
    if "residual" not in (argument.arg for argument in function.args.args):
        return Convention.FIRST if _returns_tuple(function) else Convention.WHOLE
    return Convention.SPLIT if _reads_residual_first(function) else Convention.FIRST


class BranchTap:
    """Where an inner hook point is: at the input or the output of the layer's child `path`."""

    __slots__ = ("is_input", "path")

    def __init__(self, path: str, *, is_input: bool) -> None:
        self.path, self.is_input = path, is_input

    def __repr__(self) -> str:
        return f"{'input' if self.is_input else 'output'} of {self.path}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BranchTap) and (self.path, self.is_input) == (other.path, other.is_input)

    def __hash__(self) -> int:
        return hash((self.path, self.is_input))


def branch_taps(layer_class: type) -> dict[HookPoint, BranchTap]:
    """The inner hook points of a layer class: empty unless its source proves where they are.

    Recognised is the one form that most pre-norm families share, whatever the modules are called:

        h = self.<attention>(...)                 any number of further h = self.<module>(h)
        h, residual = self.<norm>(h, residual)    the attention add
        h = self.<mlp>(h)                         any number of further h = self.<module>(h)
        return h, residual

    What the last module before the norm returns is the attention branch: what is added to it enters the stream, and the
    MLP, as `post_attn` says, too. What follows the norm is the MLP branch.
    """
    form = _recognised(layer_class)
    if form is None:
        return {}
    return {
        HookPoint.ATTN_OUT: BranchTap(form.attention, is_input=False),
        HookPoint.POST_ATTN: BranchTap(form.attention, is_input=False),
        HookPoint.MLP_IN: BranchTap(form.first, is_input=True),
        HookPoint.MLP_OUT: BranchTap(form.last, is_input=False),
    }


def attention_join(layer_class: type) -> str:
    """The child that adds the attention's output to the stream, in a layer class that has `post_attn`.

    It is given both, h first, so the stream after the attention add can be read there: it is their sum.
    """
    form = _recognised(layer_class)
    assert form is not None, "asked of a layer without inner hook points"
    return form.norm


class _Form(NamedTuple):
    """The children of a layer of the recognised form: before the attention add, at it, and those behind it."""

    attention: str
    norm: str
    first: str
    last: str


def _recognised(layer_class: type) -> _Form | None:
    function = forward_source(layer_class)
    if function is None or not function.body or not _returns_pair(function.body[-1]):
        return None
    branch: list[str] = []  # children after the attention add, last first
    norm: str | None = None
    for statement in reversed(function.body[:-1]):
        if (child := _applies(statement)) is not None:
            if norm is not None:
                return _Form(child, norm, branch[-1], branch[0]) if branch else None
            branch.append(child)
        elif norm is not None or (norm := _joins(statement)) is None:
            return None
    return None


def forward_source(layer_class: type) -> ast.FunctionDef | None:
    """The source of a layer class's `forward`, parsed; None where there is none to read."""
    forward: Any = inspect.unwrap(layer_class.forward)  # type: ignore[attr-defined]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


def _reads_residual_first(function: ast.FunctionDef) -> bool:
    for statement in function.body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and node.id == "residual"]
        if any(isinstance(node.ctx, ast.Load) for node in names):
            return True
        if names and isinstance(statement, (ast.Assign, ast.AnnAssign)):
            return False  # overwritten, whatever came in
    return False


def _returns_tuple(function: ast.FunctionDef) -> bool:
    returns = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    return any(isinstance(value, ast.Tuple) for value in returns)


def _returns_pair(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Return) else None
    return isinstance(value, ast.Tuple) and _names(value) == ["hidden_states", "residual"]


def _applies(statement: ast.stmt) -> str | None:
    """The child of `hidden_states = self.<child>(.. hidden_states ..)`."""
    if not isinstance(statement, ast.Assign) or _names(statement.targets[0]) != ["hidden_states"]:
        return None
    child = _child_called(statement.value)
    return child if child is not None and _passes(statement.value, "hidden_states") else None


def _joins(statement: ast.stmt) -> str | None:
    """The child of `hidden_states, residual = self.<norm>(hidden_states, residual)`."""
    parts = ["hidden_states", "residual"]
    if not isinstance(statement, ast.Assign) or _names(statement.targets[0]) != parts:
        return None
    call = statement.value
    given = _names(ast.Tuple(elts=call.args)) if isinstance(call, ast.Call) else []
    return _child_called(call) if given == parts else None


def _child_called(value: ast.expr) -> str | None:
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return None
    owner = value.func.value
    return value.func.attr if isinstance(owner, ast.Name) and owner.id == "self" else None


def _passes(value: ast.expr, name: str) -> bool:
    assert isinstance(value, ast.Call)
    given = [*value.args, *(keyword.value for keyword in value.keywords)]
    return any(isinstance(item, ast.Name) and item.id == name for item in given)


def _names(target: ast.expr) -> list[str]:
    items = target.elts if isinstance(target, ast.Tuple) else [target]
    return [item.id if isinstance(item, ast.Name) else "" for item in items]
