"""Whether a chat template wants a message's content as a string, or as a list of parts.

Read off its syntax tree, once. Content is whatever is called so (`m.content`, `m['content']`,
`m.get('content')`), and what was made of it by name: `set`, a namespace's attribute, a macro's parameter.
It is used as parts where it is looped over and the loop looks into its items, where a filter looks into
them, or where one of them is. Such a use is guarded if an `if` around it asks whether content is a string.

    no such use            string      what most templates want, and what is taken in doubt
    one that is unguarded  parts       with a string it would lose the text
    all are guarded        as given    the template can do both
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import nodes

ContentKind = Literal["string", "parts", "as given"]

_LOOKING_INTO = frozenset({"selectattr", "rejectattr", "groupby"})
_LOOKING_INTO_WITH_ATTRIBUTE = frozenset({"map", "sum", "join", "sort", "unique", "min", "max"})
_SAME_ITEMS = frozenset(
    {"default", "d", "list", "reverse", "select", "reject", "sort", "unique", "selectattr", "rejectattr"}
)
_ONE_ITEM = frozenset({"first", "last", "random"})


def content_kind(template: nodes.Template) -> ContentKind:
    """What a template wants of a message's content; see above."""
    known = _Known({macro.name: macro for macro in template.find_all(nodes.Macro)})
    while True:  # what a name stands for may come to light behind its use: until nothing new does
        before = dict(known.guarded)
        uses = list(_uses(template, known, guarded=False))
        if known.guarded == before:
            break
    if not uses:
        return "string"
    return "as given" if all(uses) else "parts"


def as_wanted(content: Any, kind: ContentKind) -> Any:
    """A message's content in the form that its template wants. What holds more than texts stays as it is."""
    if kind == "parts" and isinstance(content, str):
        return [{"type": "text", "text": content}]
    if kind == "string" and isinstance(content, list):
        texts = [part["text"] for part in content if _is_text(part)]
        return "\n".join(texts) if len(texts) == len(content) else content
    return content


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


@dataclass
class _Known:
    """What is known of a template's names so far."""

    macros: Mapping[str, nodes.Macro]
    guarded: dict[str, bool] = field(default_factory=dict)
    """The names that stand for content; whether they do so under a guard only."""

    def add(self, name: str, guarded: bool) -> None:
        self.guarded[name] = guarded and self.guarded.get(name, True)


def _uses(node: nodes.Node, known: _Known, guarded: bool) -> Iterator[bool]:
    """Of every use of content as parts in a node: whether it is guarded. Learns names on the way."""
    match node:
        case nodes.If():
            yield from _uses(node.test, known, guarded)
            inside = guarded or _asks_for_string(node.test, known)
            for child in node.body:
                yield from _uses(child, known, inside)
            for branch in node.elif_:
                yield from _uses(branch, known, inside)
                inside = inside or _asks_for_string(branch.test, known)  # what follows has passed this too
            for child in node.else_:
                yield from _uses(child, known, inside)
            return
        case nodes.CondExpr():
            yield from _uses(node.test, known, guarded)
            inside = guarded or _asks_for_string(node.test, known)
            for expression in (node.expr1, node.expr2):
                if expression is not None:
                    yield from _uses(expression, known, inside)
            return
        case nodes.Assign():
            _learn(node.target, node.node, known, guarded)
        case nodes.With():
            for target, value in zip(node.targets, node.values, strict=True):
                _learn(target, value, known, guarded)
        case nodes.Call():
            _learn_parameters(node, known, guarded)
        case nodes.For() if (whose := _content(node.iter, known)) is not None:
            if _looks_into(node):
                yield guarded or whose
        case nodes.Filter() if node.node is not None and _filter_looks_into(node):
            if (whose := _content(node.node, known)) is not None:
                yield guarded or whose
        case nodes.Getattr() | nodes.Getitem() if (whose := _item(node.node, known)) is not None:
            if isinstance(_key(node), str):
                yield guarded or whose
    for child in node.iter_child_nodes():
        yield from _uses(child, known, guarded)


def _content(node: nodes.Node | None, known: _Known) -> bool | None:
    """None unless an expression may be a message's content, or some of its parts; else whether guarded."""
    match node:
        case nodes.Name():
            return known.guarded.get(node.name)
        case nodes.Getattr() | nodes.Getitem():
            if _key(node) == "content":
                return False
            if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
                return _content(node.node, known)
            return known.guarded.get(_path(node))
        case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value="content"), *_]):
            return False
        case nodes.Filter() if node.name in _SAME_ITEMS:
            return _content(node.node, known)
        case nodes.CondExpr():
            inside = _asks_for_string(node.test, known)
            whose = _any_of((node.expr1, node.expr2), known)
            return None if whose is None else whose or inside
        case nodes.Or() | nodes.And():
            return _any_of((node.left, node.right), known)
    return None


def _any_of(expressions: Sequence[nodes.Node | None], known: _Known) -> bool | None:
    whose = [found for expression in expressions if (found := _content(expression, known)) is not None]
    return all(whose) if whose else None


def _item(node: nodes.Node, known: _Known) -> bool | None:
    """As `_content`, for one part of it: `content[0]`, `content | first`."""
    if isinstance(node, nodes.Getitem) and isinstance(_key(node), int):
        return _content(node.node, known)
    if isinstance(node, nodes.Filter) and node.name in _ONE_ITEM:
        return _content(node.node, known)
    return None


def _key(node: nodes.Getattr | nodes.Getitem) -> Any:
    if isinstance(node, nodes.Getattr):
        return node.attr
    match node.arg:
        case nodes.Const():
            return node.arg.value
        case nodes.Neg(node=nodes.Const(value=int(value))):
            return -value
    return None


def _path(node: nodes.Node) -> str:
    """A namespace's attribute as a name; '' for what is none."""
    return f"{node.node.name}.{node.attr}" if _is_attribute(node) else ""  # type: ignore[attr-defined]


def _is_attribute(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name)


def _asks_for_string(test: nodes.Node, known: _Known) -> bool:
    tests = [test, *test.find_all(nodes.Test)]
    return any(
        isinstance(t, nodes.Test) and t.name == "string" and _content(t.node, known) is not None
        for t in tests
    )


def _looks_into(loop: nodes.For) -> bool:
    """Whether a loop treats its items as parts: takes something out of them, or hands them to a macro."""
    names = {
        name.name for name in (loop.target, *loop.target.find_all(nodes.Name)) if isinstance(name, nodes.Name)
    }

    def is_item(node: nodes.Node | None) -> bool:
        return isinstance(node, nodes.Name) and node.name in names

    for child in [*loop.body, *([loop.test] if loop.test is not None else [])]:
        for node in (
            child,
            *child.find_all((nodes.Getattr, nodes.Getitem, nodes.Call, nodes.Test, nodes.Compare)),
        ):
            match node:
                case nodes.Getattr() | nodes.Getitem() if is_item(node.node):
                    return True
                case nodes.Call() if any(map(is_item, node.args)):
                    return True
                case nodes.Test(name="mapping") if is_item(node.node):
                    return True
                case nodes.Compare() if any(o.op in ("in", "notin") and is_item(o.expr) for o in node.ops):
                    return True
    return False


def _filter_looks_into(node: nodes.Filter) -> bool:
    if node.name in _LOOKING_INTO:
        return True
    return node.name in _LOOKING_INTO_WITH_ATTRIBUTE and any(k.key == "attribute" for k in node.kwargs)


def _learn(target: nodes.Node, value: nodes.Node, known: _Known, guarded: bool) -> None:
    """Of `set target = value`."""
    whose = _content(value, known)
    if whose is None:
        return
    if isinstance(target, nodes.Name):
        known.add(target.name, guarded or whose)
    elif isinstance(target, nodes.NSRef):
        known.add(f"{target.name}.{target.attr}", guarded or whose)


def _learn_parameters(call: nodes.Call, known: _Known, guarded: bool) -> None:
    """Of a call of one of the template's macros: its parameters stand for what it is given."""
    if not isinstance(call.node, nodes.Name) or call.node.name not in known.macros:
        return
    parameters = known.macros[call.node.name].args
    given = [(p.name, value) for p, value in zip(parameters, call.args, strict=False)]
    given += [(keyword.key, keyword.value) for keyword in call.kwargs]
    for name, value in given:
        if (whose := _content(value, known)) is not None:
            known.add(name, guarded or whose)
