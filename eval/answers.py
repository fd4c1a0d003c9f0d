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

_UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError)  # errors of Python's parser
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_DEFINITION = _FUNCTION | ast.ClassDef
# Possible beginnings of the first line of a run; prose rarely begins like this.
_BEGINNING = re.compile(r"\s*(?:(?:from|import|async|def|class|try|if)\b|@|[A-Za-z_][\w.,\s\[\]]*(?::[^=]*)?=)")
_NOT_WRITTEN = re.compile(r"raise NotImplementedError\b")
_UNCLOSED = re.compile("never closed|too many nested")
_TAGS = "think|thinking|thought|reasoning"  # tags of thinking parts; Magistral's has square brackets
_DRAFT = re.compile(rf"<(?:seed:)?(?:{_TAGS})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>", re.IGNORECASE)
_DRAFT_END = re.compile(rf"</(?:seed:)?(?:{_TAGS})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[^\n]*$", re.MULTILINE)
_QUOTING = re.compile(r"^(?:[ \t]*>(?!>) ?)*(?:[ \t]*(?:>>>|\.\.\.)(?: |$))?", re.MULTILINE)  # "> ", ">>> ", "... "
_LAST = "(?:corrected|fixed|final|revised)"
_LAST_VERSION = re.compile(  # "**Final**", "I fixed it:", "the corrected version"; not "The final result is returned."
    rf"^\W*{_LAST}\W*$|\b{_LAST}\b[^\n.]*:\W*$"
    rf"|\b{_LAST}(?:[ *_]+\w+)?[ *_]+(?:version|code|solution|answer|function|implementation|program)\b",
    re.IGNORECASE | re.MULTILINE,
)
_TRAILING_FENCE = re.compile(r"^([^`\n]*[^`\s])[ \t]*(`{3,})[ \t]*$", re.MULTILINE)  # as in "    return x```"


def without_draft(text: str) -> str:
    """Returns the text after the last thinking part, or before it if it never ends."""
    return _DRAFT.split(_DRAFT_END.split(text)[-1])[0]


def is_draft_tag(token: str) -> bool:
    """Whether a text is a tag that begins or ends a thinking part."""
    return bool(_DRAFT.fullmatch(token) or _DRAFT_END.fullmatch(token))


def blocks(text: str) -> list[str]:
    """Splits a text at the lines that open or close a code block."""
    return _FENCE.split(_fenced(_unix(text)))


def opens_block(text: str) -> bool:
    """Whether a line of a text, quoted or not, opens a code block."""
    return bool(_FENCE.search(_unquoted(_unix(text))))


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _fenced(text: str) -> str:
    """Returns the text with each fence on its own line."""
    return _TRAILING_FENCE.sub(r"\1\n\2", text)


def _unquoted(text: str) -> str:
    """Removes quotation marks (`> `) and Python's prompts (`>>> `, `... `) from the lines of a text."""
    return _QUOTING.sub("", text)


def function_in(text: str, name: str) -> str | None:
    """Returns the program that defines `name` in a text with fences, prose and examples; None if there is none.

    It is the longest run of lines that is Python and defines the name, as in EvalPlus, or the last one that the text
    calls corrected, fixed or final. Only the statements that the name needs are kept, so that nothing else is run, such
    as an example that reads input. Statements that it needs from other runs of the text come before it. Quoted lines
    and lines at Python's prompt are read only if there is no other definition.
    """
    text = _unix(text)
    for version in dict.fromkeys((text, _unquoted(text))):
        # The tokenizer may have added a space before the first line, and the last line may end with a fence.
        variants = dict.fromkeys((version, version.lstrip(), _fenced(version)))
        if programs := [program for variant in variants if (program := _program(variant, name))]:
            return max(programs, key=lambda program: (program.is_last_version, _size(program.text))).text
    return None


def body_in(text: str, head: str, name: str) -> str | None:
    """Returns the first block of a text that completes the function `name`, begun by `head`; None if there is none."""
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
    is_last_version: bool  # according to the prose before it


def _program(text: str, name: str) -> _Program | None:
    runs, defining, last, prose = [], [], None, ""
    for before, run in _runs(text.split("\n")):
        runs.append(run)
        prose += before
        if any(statement.defines(name) for statement in run):
            if defining and _LAST_VERSION.search(prose) and _rank(run, name)[0]:
                last = run
            defining.append(run)
            prose = ""
    if not defining:
        return None
    chosen = last or max(defining, key=lambda run: _rank(run, name))
    bound = frozenset().union(*(statement.binds for statement in chosen))
    others = [statement for run in runs if run is not chosen for statement in run if not statement.binds & bound]
    needed = _needed(_with_calls([*others, *chosen], name), name)
    needed.sort(key=lambda statement: not statement.is_future)  # these must come first
    return _Program("\n".join(statement.text for statement in needed) + "\n", last is not None)


def _rank(run: Sequence[_Statement], name: str) -> tuple[bool, int]:
    """Returns the sort key of a run: longer is better, and a stub, as in the question, is worst."""
    last = [statement for statement in run if statement.defines(name)][-1]
    return not _is_stub(last.node), sum(_size(statement.text) for statement in run)


def _is_stub(node: ast.stmt) -> bool:
    """Whether a function has only a docstring and a placeholder for the body."""
    return isinstance(node, _FUNCTION) and all(
        isinstance(statement, ast.Pass)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        or (isinstance(statement, ast.Raise) and _NOT_WRITTEN.match(ast.unparse(statement)))
        for statement in node.body
    )


def _size(text: str) -> int:
    return sum(bool(line.strip()) for line in text.split("\n"))


class _Statement(NamedTuple):
    """A top-level statement."""

    node: ast.stmt
    text: str
    binds: frozenset[str]  # module-level names that it binds
    changes: frozenset[str]  # names whose values it mutates, as table[0] = 1 does
    reads: frozenset[str]
    effects: frozenset[str]  # of a function: module-level names that a call binds or mutates

    def defines(self, name: str) -> bool:
        """Whether it binds `name`, other than by an import: tests have "from solution import NAME"."""
        return name in self.binds and not isinstance(self.node, ast.Import | ast.ImportFrom)

    @property
    def is_future(self) -> bool:
        return isinstance(self.node, ast.ImportFrom) and self.node.module == "__future__"


_INTERACTIVE = frozenset(("input", "print", "open", "exit", "quit", "sys"))


def _with_calls(statements: Sequence[_Statement], name: str) -> list[_Statement]:
    """Adds to the `changes` of each statement the values that its calls may change.

    These are the effects of the functions that it calls, such as `fill()`, their arguments, as in `heappush(heap, 1)`,
    and the objects whose methods it calls, as in `last = numbers.pop()`. Examples are left as they are: statements that
    call the function `name`, assert, read input or print.
    """
    functions = {statement.node.name: statement for statement in statements if isinstance(statement.node, _FUNCTION)}
    changeable = frozenset().union(*(statement.binds for statement in statements if not _is_fixed(statement.node)))

    def with_calls(statement: _Statement) -> _Statement:
        called_now = [statement.node] if not isinstance(statement.node, _DEFINITION) else statement.node.decorator_list
        parts = [part for node in called_now for part in ast.walk(node)]
        called = {part.func.id for part in parts if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)}
        called |= {node.id for node in called_now if isinstance(node, ast.Name)}  # @register
        reachable, pending = set(), called & functions.keys()
        while pending:
            reachable |= pending
            pending = set().union(*(functions[other].reads for other in pending)) & functions.keys() - reachable
        reads = {part.id for part in parts if isinstance(part, ast.Name)}
        reads = reads.union(*(functions[other].reads for other in reachable))
        if name in reachable or reads & _INTERACTIVE or any(isinstance(part, ast.Assert) for part in parts):
            return statement
        arguments = set().union(*(_changed_in(part) for part in parts if isinstance(part, ast.Call)))
        effects = (functions[other].effects for other in reachable)
        return statement._replace(changes=statement.changes.union(arguments & changeable, *effects))

    return [with_calls(statement) for statement in statements]


def _is_fixed(node: ast.stmt) -> bool:
    """Whether no call changes the value that a statement binds: a function, a module, or a number such as 10**9 + 7."""
    if isinstance(node, ast.Assign):
        return not any(isinstance(part, _MUTABLE) for part in ast.walk(node.value))
    return isinstance(node, _FUNCTION | ast.Import | ast.ImportFrom)


# Expressions whose value a call may change.
_MUTABLE = (ast.Name, ast.Call, ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)


def _changed_in(call: ast.Call) -> set[str]:
    """Returns the names of the values that a call may change: those of its arguments and of its method's object."""
    inside = [*call.args, *(keyword.value for keyword in call.keywords)]
    inside += [call.func.value] if isinstance(call.func, ast.Attribute) else []
    return {part.id for node in inside for part in ast.walk(node) if isinstance(part, ast.Name)}


def _needed(statements: Sequence[_Statement], name: str) -> list[_Statement]:
    """Returns the statements that bind or change `name`, or a name that another of them reads; "*" means all names."""
    names, needed = {name, "*"}, set()
    while added := {
        index
        for index, statement in enumerate(statements)
        if index not in needed and (statement.is_future or (statement.binds | statement.changes) & names)
    }:
        needed |= added
        names = names.union(*(statements[index].reads for index in added))
    return [statements[index] for index in sorted(needed)]


def _runs(lines: Sequence[str]) -> Iterator[tuple[str, list[_Statement]]]:
    """Yields (the other lines before it, its statements) for each run of lines that is Python, as long as possible."""
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
    """Returns (statements, number of lines) of the longest run that begins at the first line; ([], 0) for prose."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    if indent:  # such as a block in a list: it ends with its indentation
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
    """Returns the line of the first unclosed bracket; Python reports the last, which would take a parse for each."""
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
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    text = "\n".join(lines[first - 1 : node.end_lineno])
    if ";" in text and not isinstance(node, _DEFINITION):
        text = ast.unparse(node)  # its line may have other statements
    return _Statement(node, text, *_names(node))


def _changed_by(called: ast.expr) -> set[str]:
    """Returns the names whose values a method call, as a statement, may change; {"*"} if it affects everything."""
    if not (isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)):
        return set()
    if called.value.id == "sys":  # not sys.exit(), which only ends the program
        return {"*"} if called.attr == "setrecursionlimit" else set()
    return {called.value.id}


def _names(node: ast.stmt) -> tuple[frozenset[str], ...]:
    """Returns `binds`, `changes`, `reads` and `effects` of a `_Statement`."""
    try:
        module = symtable.symtable(ast.unparse(node), "<answer>", "exec")
    except _UNREADABLE:  # it parses but does not compile, such as a return outside of a function
        return frozenset(), frozenset(), frozenset(), frozenset()
    binds = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
        binds.add("*")
    changes = set()
    for part in ast.walk(node):  # table[0] = 1, point.x = 2
        if isinstance(part, ast.Subscript | ast.Attribute) and isinstance(part.ctx, ast.Store):
            changes |= {symbol.id for symbol in ast.walk(part.value) if isinstance(symbol, ast.Name)}
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
            changes |= _changed_by(part.value.func)
    reads, assigned, tables = set(), set(), [module]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        reads |= {symbol.get_name() for symbol in table.get_symbols() if table is module or symbol.is_global()}
        assigned |= {
            symbol.get_name() for symbol in table.get_symbols() if symbol.is_declared_global() and symbol.is_assigned()
        }
    if isinstance(node, _DEFINITION):  # whose changes happen when they are called
        return frozenset(binds), frozenset(), frozenset(reads), frozenset(changes & reads | assigned)
    return frozenset(binds), frozenset(changes), frozenset(reads), frozenset()
