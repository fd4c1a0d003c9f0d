"""word_math: every solution is checked again from its text alone, every split against every other."""

import hashlib
import itertools
import json
import random
import re
import string
import time
from fractions import Fraction

import pytest

from data import word_math

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+) ([a-z]+(?: [a-z]+)?)")
WORD_NUMBERS = {"half": 2, "twice": 2, "doubles": 2, "back the same way": 2, "three times": 3, "a third": 3}
WORD_NUMBERS |= {"a quarter": 4, "25%": 4, "20%": 5, "10%": 10}
SETTINGS = {"seed": 0, "min_steps": 2, "max_steps": 5, "max_value": 20, "max_answer": None}


def draw(split="train", count=2000, **settings):
    return list(itertools.islice(word_math.problems(split, 10**6, **SETTINGS | settings), count))


def parse(answer):
    """The equations [(a, op, b, result)], their units and the final number, from the text alone."""
    *lines, last = answer.split("\n")
    matches = [EQUATION.fullmatch(line) for line in lines]
    assert all(matches), answer
    equations = [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in matches]
    assert re.fullmatch(r"#### \d+", last), answer
    return equations, [m[5] for m in matches], int(last[5:])


def evaluate(a, op, b):
    a, b = Fraction(a), Fraction(b)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op]


def numbers_in(question):
    return [int(text) for text in re.findall(r"\d+", question)]


def split_key(answer):
    """What decides the split, made again from the answer's text: the first two equations, + and * without order."""
    equations, _, _ = parse(answer)
    return tuple((op, tuple(sorted((a, b)) if op in "+*" else (a, b))) for a, op, b, _ in equations[:2])


def check_solution(question, answer, max_value, limit):
    """The slow reading of a problem: right equations, in bounds, made of the question's numbers and earlier results."""
    equations, _, final = parse(answer)
    given = numbers_in(question)
    available = given + [number for words, number in WORD_NUMBERS.items() if words in question]
    results = []
    for a, op, b, result in equations:
        assert evaluate(a, op, b) == result, answer
        assert 1 <= result <= limit, answer
        assert {a, b} <= {*available, *results}, (question, answer)
        results.append(result)
    assert final == results[-1]
    assert given
    assert all(2 <= number <= max_value for number in given), question
    operands = [operand for a, _, b, _ in equations for operand in (a, b)]
    assert {*results[:-1]} <= {*operands}, f"a result is never used: {answer}"
    plain = numbers_in(re.sub(r"\d+%", "", question))
    assert {*plain} <= {*operands}, f"a number of the question is never used: {question} {answer}"


@pytest.mark.parametrize(
    ("max_value", "max_answer"), [(5, None), (8, 30), (20, None), (20, 20), (20, 100), (100, None), (1000, 500)]
)
def test_solutions_are_correct_and_bounded(max_value, max_answer):
    limit = max_value**2 if max_answer is None else max_answer
    for problem in draw(count=1500, max_value=max_value, max_answer=max_answer):
        check_solution(problem.question, problem.answer, max_value, limit)


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
@pytest.mark.parametrize("max_value", [5, 20])
def test_every_kind_can_have_every_number_of_steps(steps, max_value):
    found = draw(count=1000, min_steps=steps, max_steps=steps, max_value=max_value)
    assert {problem.kind for problem in found} == set(word_math.KINDS)
    assert {len(parse(problem.answer)[0]) for problem in found} == {steps}


def test_there_are_enough_kinds_and_all_are_used_about_evenly():
    kinds = [problem.kind for problem in draw(count=2000)]
    assert len(word_math.KINDS) >= 14
    assert min(kinds.count(name) for name in word_math.KINDS) > 0.5 * 2000 / len(word_math.KINDS)


def test_a_range_of_steps_is_used_whole():
    rows = word_math.generate("train", 600, min_steps=2, max_steps=4)
    lengths = [len(parse(row["answer"])[0]) for row in rows]
    assert set(lengths) == {2, 3, 4}
    assert min(lengths.count(steps) for steps in (2, 3, 4)) > 120


def test_splits_are_disjoint_across_seeds_lengths_and_sizes():
    # Small numbers, so that without the rule the splits would overlap widely.
    keys, texts = {}, {}
    for split, share in (("train", 500), ("validation", 100), ("test", 100)):
        runs = itertools.product((0, 1, 7), ((2, 2), (2, 3), (4, 5)), (6, 8))
        rows = [
            row
            for seed, (low, high), value in runs
            for row in word_math.generate(split, share, seed=seed, min_steps=low, max_steps=high, max_value=value)
        ]
        keys[split] = {split_key(row["answer"]) for row in rows}
        texts[split] = {row["question"] for row in rows}
    for one, other in itertools.combinations(keys, 2):
        assert not keys[one] & keys[other]
        assert not texts[one] & texts[other]


def test_signature_forgets_names_and_the_order_of_factors():
    def problem(question, *equations):
        return word_math.Problem("shop", question, "", equations)

    one = problem("Ann ...", (3, "*", 4), (12, "-", 5))
    other = problem("Ben ...", (4, "*", 3), (12, "-", 5))
    longer = problem("Ben ...", (4, "*", 3), (12, "-", 5), (7, "+", 2))
    assert one.signature == other.signature != longer.signature
    assert one.split == other.split == longer.split


def test_splits_have_their_shares():
    rng = random.Random(0)
    chains = [((rng.randrange(99), "+", rng.randrange(99)), (rng.randrange(99), "*", 2)) for _ in range(5000)]
    splits = [word_math.Problem("shop", "", "", equations).split for equations in chains]
    for name, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(splits.count(name) / len(splits) - share) < 0.02


def test_rows_are_pinned():
    # A change here changes everyone's data: raise word_math.VERSION with it.
    rows = word_math.generate("train", 50)
    digest = hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()
    assert (word_math.VERSION, digest) == (1, "11bdef0a82f1b9dad36acb3fc67b29ed")


@pytest.mark.parametrize(
    ("split", "count", "settings", "digest"),
    [
        ("train", 1500, {"seed": 7, "min_steps": 2, "max_steps": 5}, "008acfc2244dacb6"),
        ("train", 800, {"seed": 1, "max_value": 1000, "max_steps": 5}, "8bf37d5ec6a46c9c"),
        ("validation", 150, {"seed": 0, "max_value": 5}, "cd16113220a1a4e2"),
        ("test", 500, {"seed": 123456789, "max_value": 100, "max_answer": 60, "max_steps": 5}, "e94cc02742202898"),
        ("test", 400, {"seed": 0, "min_steps": 5, "max_steps": 5, "max_value": 12}, "788cb230c9c13860"),
    ],
)
def test_rows_of_all_kinds_and_bounds_are_pinned(split, count, settings, digest):
    rows = word_math.generate(split, count, **settings)
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest


def test_sentences_name_nothing_that_a_story_does_not_have():
    """Those too that no drawn problem happens to tell."""
    always = {"n", "m"}
    of_person = {*word_math.PRONOUNS[0], "name", "friend"}
    of_opening = {"compare": {"name", "old", "new"}, "travel": {"go", "goes"}, "sale": {"offer"}}
    for name, kind in word_math.KINDS.items():
        words = {form for word in kind.get("words", ()) for form in (word, f"{word}s", f"{word.capitalize()}s")}
        known = always | words | of_opening.get(kind["open"], set()) | (of_person if kind.get("person") else set())
        assert len({len(options) for options in kind.get("words", {"": ()}).values()}) == 1, name
        events = [event for key in ("before", "shared", "events", "endings") for event in kind.get(key, ())]
        reported = [*kind.get("questions", ()), *(text for variants in kind["say"].values() for text in variants)]
        for event in events:
            ((move, sentence),) = ((key, text) for key, text in event.items() if key != "unit")
            numbers = {"n", "m"} & {field for _, field, *_ in string.Formatter().parse(sentence)}
            wanted = (
                set()
                if move in ("double", "triple", "half")
                else {"n", "m"}
                if word_math.MOVES[move][0] == 2
                else {"n"}
            )
            assert numbers == wanted, sentence
            reported.append(sentence)
        for text in reported:
            assert {field for _, field, *_ in string.Formatter().parse(text) if field} <= known, text


def test_same_arguments_same_rows_and_every_argument_matters():
    rows = word_math.generate("train", 100)
    assert rows == word_math.generate("train", 100)
    assert list(rows[0]) == ["question", "answer"]
    for changed in ({"seed": 1}, {"max_steps": 4}, {"min_steps": 3}, {"max_value": 19}, {"max_answer": 399}):
        assert rows != word_math.generate("train", 100, **changed)


def test_fewer_rows_are_a_prefix_of_more():
    rows = word_math.generate("test", 400, seed=3)
    for count in (0, 1, 17, 399):
        assert word_math.generate("test", count, seed=3) == rows[:count]


def test_questions_and_signatures_are_distinct():
    found = draw(count=5000, max_value=10)
    assert len({problem.question for problem in found}) == len({problem.signature for problem in found}) == 5000


def test_global_random_state_is_untouched():
    random.seed(5)
    before = random.getstate()
    word_math.generate("validation", 50)
    assert random.getstate() == before


def test_ten_thousand_rows_take_seconds():
    start = time.perf_counter()
    assert len(word_math.generate("train", 10_000)) == 10_000
    assert time.perf_counter() - start < 10  # 0.4 s on a desktop CPU


def test_texts_are_well_formed():
    for problem in draw(count=4000) + draw(count=2000, max_value=5):
        question, text = problem.question, f"{problem.question} {problem.answer}"
        assert question.endswith("?")
        assert question.count("?") == 1
        assert not re.search(r"[{}]|  |\.\.|None", text), text
        assert not re.search(r"\b1 [a-z]+(s|people|children)\b", text), text
        assert not re.search(r"\b[Aa] [aeiouAEIOU]", question), question
        assert not re.search(r"(childs|persons|loafs|[^aeiou]ys)\b", text), text
        for sentence in re.split(r"(?<=[.?]) ", question):
            assert sentence[0].isupper(), question  # nor may a sentence begin with a digit


def test_units_agree_with_their_numbers():
    ones, others = set(), set()
    for problem in draw(count=6000):
        for (*_, result), unit in zip(*parse(problem.answer)[:2], strict=True):
            (ones if result == 1 else others).add(unit)
    assert ones
    assert {word_math.plural(unit) for unit in ones} <= others
    assert not ones & others


def test_questions_are_short():
    words = [len(problem.question.split()) for problem in draw(count=2000, max_steps=2)]
    assert max(words) <= 40
    assert sum(words) / len(words) < 30


@pytest.mark.parametrize(
    ("singular", "plural"),
    [
        ("apple", "apples"),
        ("box", "boxes"),
        ("peach", "peaches"),
        ("candy", "candies"),
        ("day", "days"),
        ("bus", "buses"),
        ("toy car", "toy cars"),
        ("person", "people"),
        ("child", "children"),
        ("loaf", "loaves"),
    ],
)
def test_plural(singular, plural):
    assert word_math.plural(singular) == plural


def test_a_friend_never_shares_the_pronoun():
    for seed in range(50):
        story = word_math.Story(random.Random(seed), 2, 20, 400)
        story.cast()
        girls = [story.words[who] in word_math.NAMES[0] for who in ("name", "friend")]
        assert girls[0] != girls[1]
        assert story.words["he"] == ("she" if girls[0] else "he")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, r"Invalid split='dev': must be one of train, validation, test"),
        ({"count": -1}, r"Invalid count=-1: .* ≥ 0"),
        ({"min_steps": 1}, r"Invalid min_steps=1: must be in 2\.\.5"),
        ({"max_steps": 6}, r"Invalid max_steps=6: must be in 2\.\.5"),
        ({"min_steps": 4, "max_steps": 3}, r"Invalid min_steps=4: must be ≤ max_steps=3"),
        ({"max_value": 4}, r"Invalid max_value=4: must be ≥ 5"),
        ({"max_answer": 0}, r"Invalid max_answer=0: must be ≥ 5"),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        word_math.generate(**{"split": "train", "count": 1} | arguments)


def test_all_bad_arguments_are_named_at_once():
    with pytest.raises(ValueError, match="split") as caught:
        word_math.generate("dev", -1, min_steps=7, max_steps=1, max_value=0, max_answer=0)
    assert len(str(caught.value).splitlines()) == 7


def test_too_few_problems_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setattr(word_math, "LEAST_DRAWS", 5000)
    with pytest.raises(ValueError, match=r"only \d+ distinct test problems exist within 10,000 draws") as caught:
        word_math.generate("test", 100, max_value=5, max_answer=5)
    message = str(caught.value)
    assert "max_value=5" in message
    assert "raise dataset.max_value or dataset.max_answer, or lower dataset.test_rows" in message
