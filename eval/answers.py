"""Extracts answers from generated text: drops the thinking part, and the prose around a program."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import symtable
import textwrap
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError)  # as Python's parser refuses a text
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
# How a line may begin that a run begins at; prose mostly does not.
_BEGINNING = re.compile(r"\s*(?:(?:from|import|async|def|class|try|if)\b|@|[A-Za-z_][\w.,\s\[\]]*(?::[^=]*)?=)")
_NOT_WRITTEN = re.compile(r"raise NotImplementedError\b")
_UNCLOSED = re.compile("never closed|too many nested")
_TAGS = "think|thinking|thought|reasoning"  # as models mark their thinking; Magistral in brackets
_DRAFT = re.compile(rf"<(?:{_TAGS})>|\[THINK\]", re.IGNORECASE)
_DRAFT_END = re.compile(rf"</(?:{_TAGS})>|\[/THINK\]", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[^\n]*$", re.MULTILINE)
_QUOTING = re.compile(r"^(?:[ \t]*>(?!>) ?)*(?:[ \t]*(?:>>>|\.\.\.)(?: |$))?", re.MULTILINE)  # "> ", ">>> ", "... "
_LAST = "(?:corrected|fixed|final|revised)"
_LAST_VERSION = re.compile(  # "**Final**", "I fixed it:", "the corrected version"; not "The final result is returned."
    rf"^\W*{_LAST}\W*$|\b{_LAST}\b[^\n.]*:\W*$"
    rf"|\b{_LAST}(?:[ *_]+\w+)?[ *_]+(?:version|code|solution|answer|function|implementation|program)\b",
    re.IGNORECASE | re.MULTILINE,
)
_FENCE_BEHIND = re.compile(r"^([^`\n]*[^`\s])[ \t]*(`{3,})[ \t]*$", re.MULTILINE)  # as in "    return x```"


def without_draft(text: str) -> str:
    """Returns the text after the last thinking part, or before it if it never ends."""
    return _DRAFT.split(_DRAFT_END.split(text)[-1])[0]


def blocks(text: str) -> list[str]:
    """Splits a text at the lines that open or close a block of code."""
    return _FENCE.split(_fenced(_unix(text)))


def opens_block(text: str) -> bool:
    """Whether a line of a text, quoted or not, opens a block of code."""
    return bool(_FENCE.search(_unquoted(_unix(text))))


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _fenced(text: str) -> str:
    """Returns the text with each fence on its own line."""
    return _FENCE_BEHIND.sub(r"\1\n\2", text)


def _unquoted(text: str) -> str:
    """Removes quotation marks (`> `) and Python's prompts (`>>> `, `... `) from the lines of a text."""
    return _QUOTING.sub("", text)


def function_in(text: str, name: str) -> str | None:
    """Returns the program that defines `name` in a text with fences, prose and examples; None if there is none.

    It is the longest run of lines that is Python and defines the name, as EvalPlus takes it, or the last one that the
    text says is corrected, fixed or final; cut to what the name needs: of the rest, such as an example that asks for
    input, nothing is run. What it needs and another run of the text defines comes before it. Lines in quotation marks
    or at Python's prompt are read where there is no other definition.
    """
    text = _unix(text)
    for version in dict.fromkeys((text, _unquoted(text))):
        # The first line may have a blank of the tokenizer's before it, and the last one a fence behind it.
        ways = dict.fromkeys((version, version.lstrip(), _fenced(version)))
        if programs := [found for one in ways if (found := _program(one, name))]:
            return max(programs, key=lambda found: (found.is_last_version, _size(found.text))).text
    return None


def body_in(text: str, head: str, name: str) -> str | None:
    """The first block of a text that goes on with the function `name`, begun by `head`; None where there is none."""
    for block in [*blocks(text), *blocks(_unquoted(_unix(text)))]:
        for body in (block, textwrap.indent(textwrap.dedent(block), "    ")):
            if _returns(head + body, name):
                return body
    return None


def _returns(program: str, name: str) -> bool:
    """Whether a text is a program whose function `name` returns something."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(program, "<answer>", "exec")
            tree = ast.parse(program)
    except _UNREADABLE:
        return False
    functions = [node for node in tree.body if isinstance(node, _FUNCTION) and node.name == name]
    return bool(functions) and any(isinstance(part, ast.Return | ast.Yield) for part in ast.walk(functions[-1]))


class _Program(NamedTuple):
    text: str
    is_last_version: bool  # as the words before it say


def _program(text: str, name: str) -> _Program | None:
    runs, defining, last, words = [], [], None, ""
    for before, run in _runs(text.split("\n")):
        runs.append(run)
        words += before
        if any(one.defines(name) for one in run):
            if defining and _LAST_VERSION.search(words) and _rank(run, name)[0]:
                last = run
            defining.append(run)
            words = ""
    if not defining:
        return None
    chosen = last or max(defining, key=lambda run: _rank(run, name))
    bound = frozenset().union(*(one.binds for one in chosen))
    others = [one for run in runs if run is not chosen for one in run if not one.binds & bound]
    kept = _needed(_with_calls([*others, *chosen], name), name)
    kept.sort(key=lambda one: not one.is_future)  # nothing may come before these
    return _Program("\n".join(one.text for one in kept) + "\n", last is not None)


def _rank(run: Sequence[_Statement], name: str) -> tuple[bool, int]:
    """A longer run is better, but none is worse than one that repeats the question's empty function."""
    last = [one for one in run if one.defines(name)][-1]
    return not _is_stub(last.node), sum(_size(one.text) for one in run)


def _is_stub(node: ast.stmt) -> bool:
    """Whether a function has only a docstring and a placeholder for the body."""
    return isinstance(node, _FUNCTION) and all(
        isinstance(one, ast.Pass)
        or (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
        or (isinstance(one, ast.Raise) and _NOT_WRITTEN.match(ast.unparse(one)))
        for one in node.body
    )


def _size(text: str) -> int:
    return sum(bool(line.strip()) for line in text.split("\n"))


class _Statement(NamedTuple):
    """A top-level statement."""

    node: ast.stmt
    text: str
    binds: frozenset[str]  # names of the module that it binds
    changes: frozenset[str]  # those whose values it changes, as table[0] = 1 does
    reads: frozenset[str]
    effects: frozenset[str]  # of a function: what a call of it binds or changes of the module

    def defines(self, name: str) -> bool:
        """Also by an assignment, but by no import: a test has "from solution import NAME"."""
        return name in self.binds and not isinstance(self.node, ast.Import | ast.ImportFrom)

    @property
    def is_future(self) -> bool:
        return isinstance(self.node, ast.ImportFrom) and self.node.module == "__future__"


_ASKS = frozenset(("input", "print", "open", "exit", "quit", "sys"))


def _with_calls(statements: Sequence[_Statement], name: str) -> list[_Statement]:
    """The statements; one that calls functions such as `fill()` changes what these change of the module.

    Not an example: a call that reaches the wanted function, or that asks for input or prints.
    """
    functions = {one.node.name: one for one in statements if isinstance(one.node, _FUNCTION)}

    def with_calls(one: _Statement) -> _Statement:
        calls = [part.func for part in ast.walk(one.node) if isinstance(part, ast.Call)]
        called = {function.id for function in calls if isinstance(function, ast.Name)}
        reached, more = set(), called & functions.keys()
        while more:
            reached |= more
            more = set().union(*(functions[other].reads for other in more)) & functions.keys() - reached
        reads = one.reads.union(*(functions[other].reads for other in reached))
        if isinstance(one.node, _FUNCTION) or name in reached or reads & _ASKS:
            return one
        return one._replace(changes=one.changes.union(*(functions[other].effects for other in reached)))

    return [with_calls(one) for one in statements]


def _needed(statements: Sequence[_Statement], name: str) -> list[_Statement]:
    """Those that bind or change the name, or a name that a kept one reads; "*" stands for all names."""
    wanted, kept = {name, "*"}, set()
    while more := {
        place
        for place, one in enumerate(statements)
        if place not in kept and (one.is_future or (one.binds | one.changes) & wanted)
    }:
        kept |= more
        wanted = wanted.union(*(statements[place].reads for place in more))
    return [statements[place] for place in sorted(kept)]


def _runs(lines: Sequence[str]) -> Iterator[tuple[str, list[_Statement]]]:
    """Runs of lines that are Python, each as long as it can be, as statements; with the other lines before each."""
    start, others = 0, []
    while start < len(lines):
        run, length = _run_at(lines[start:]) if _BEGINNING.match(lines[start]) else ([], 0)
        if run:
            yield "\n".join([*others, ""]), run
            others = []
        else:
            others += lines[start : start + max(1, length)]
        start += max(1, length)


def _run_at(lines: Sequence[str]) -> tuple[list[_Statement], int]:
    """(the statements of the longest run from the first line on, how many lines it has); none where that is prose."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    if indent:  # a block in a list, say: as far as it is indented
        end = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith(indent)), len(lines))
        lines = [line.removeprefix(indent) for line in lines[:end]]
    end = len(lines)
    while end > 0:
        text = "\n".join(lines[:end]) + "\n"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes such as "\d"
                tree = ast.parse(text)
                return [_statement(node, lines) for node in tree.body if not _is_guarded(node)], end
        except SyntaxError as error:
            line = _first_open(text) if _UNCLOSED.search(error.msg or "") else error.lineno
            end = min(end - 1, (line or 1) - 1)
        except _UNREADABLE:
            break
    return [], 0


def _first_open(text: str) -> int | None:
    """Returns the line of the first unclosed bracket; Python reports the last one, so each would take a parse."""
    opened: list[int] = []
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.OP and token.string in "([{":
                opened.append(token.start[0])
            elif token.type == tokenize.OP and token.string in ")]}" and opened:
                opened.pop()
    return opened[0] if opened else None


def _is_guarded(node: ast.stmt) -> bool:
    """Whether a statement only runs in the main program, as under `if __name__ == "__main__"`."""
    return isinstance(node, ast.If) and any(
        isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test)
    )


def _statement(node: ast.stmt, lines: Sequence[str]) -> _Statement:
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    text = "\n".join(lines[first - 1 : node.end_lineno])
    if ";" in text and not isinstance(node, _FUNCTION | ast.ClassDef):
        text = ast.unparse(node)  # it may share its line with others
    return _Statement(node, text, *_names(node))


def _changed_by(called: ast.expr) -> set[str]:
    """Names whose values the call of a method, as a statement, may change; "*" of a change that all depends on."""
    if not (isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)):
        return set()
    if called.value.id == "sys":  # sys.exit() is for the program alone
        return {"*"} if called.attr == "setrecursionlimit" else set()
    return {called.value.id}


def _names(node: ast.stmt) -> tuple[frozenset[str], ...]:
    """As `_Statement` has them behind its text."""
    try:
        module = symtable.symtable(ast.unparse(node), "<answer>", "exec")
    except _UNREADABLE:  # Python to its parser alone, such as a return outside of a function
        return frozenset(), frozenset(), frozenset(), frozenset()
    binds = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
        binds.add("*")
    changes = set()
    for part in ast.walk(node):  # table[0] = 1, point.x = 2
        if isinstance(part, ast.Subscript | ast.Attribute) and isinstance(part.ctx, ast.Store):
            changes |= {one.id for one in ast.walk(part.value) if isinstance(one, ast.Name)}
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
            changes |= _changed_by(part.value.func)
    reads, assigned, tables = set(), set(), [module]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        reads |= {one.get_name() for one in table.get_symbols() if table is module or one.is_global()}
        assigned |= {one.get_name() for one in table.get_symbols() if one.is_declared_global() and one.is_assigned()}
    if isinstance(node, _FUNCTION | ast.ClassDef):  # which happens when they are called
        return frozenset(binds), frozenset(), frozenset(reads), frozenset(changes & reads | assigned)
    return frozenset(binds), frozenset(changes), frozenset(reads), frozenset()
