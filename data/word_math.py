"""Multi-step arithmetic word problems in GSM8K's form ("#### 42"), generated from a seed: no file, no network.

A problem is a short story about one quantity: an opening with 0-3 equations, then events. Each event is a move (gain,
lose, share, ...) with one sentence and 1-2 equations. word_math.yaml has the sentences of each kind of problem:

    Jack picks 3 baskets of 11 apples each. He sells all his apples for $3 each. How many dollars does he get?

    3 * 11 = 33 apples
    33 * 3 = 99 dollars
    #### 99

Invariants: a solution has as many equations as the problem has steps; numbers in a question are 2..max_value; every
result is a whole number in 1..max_answer (1..max_value**2 if max_answer is None); divisions are exact.

Splits are disjoint by construction. A hash of a problem's first two equations (operators and numbers, without kind,
names and nouns; a + b equals b + a) decides which split may use it. So for every seed and size, no problem of one split
occurs in another one with other words, or as the beginning of a longer problem.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data import DATASETS, CountTokens, Row, Splits
from flatlora.config.sections import TextDatasetConfig
from flatlora.config.settings import MOST_TOKENS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.rows import Source
from flatlora.inputs.templates import prompt
from flatlora.utils.errors import ConfigError, SettingError

VERSION = 1  # raise it whenever the same arguments give other rows; the cache of rows depends on it
SPLITS = {"train": range(80), "validation": range(80, 90), "test": range(90, 100)}  # percent of the hash space
STEPS = (2, 5)
MOST_ROWS = 100_000  # generated in a minute
LEAST_DRAWS = 100_000  # draws before `generate` gives up
SMALLEST_BOUND = 5  # below 5, kinds such as fuel (5 - 2 * 2) have no problems

NAMES = (
    ("Ann", "Chloe", "Dina", "Ella", "Grace", "Ivy", "Julia", "Lily", "Maria", "Nora", "Ruby", "Sara", "Zoe"),
    ("Adam", "Ben", "Carl", "David", "Eric", "Finn", "Hugo", "Jack", "Leo", "Max", "Omar", "Paul", "Tom"),
)
PRONOUNS = (
    {"he": "she", "He": "She", "his": "her", "His": "Her", "him": "her"},
    {"he": "he", "He": "He", "his": "his", "His": "His", "him": "him"},
)
IRREGULAR = {"person": "people", "child": "children", "loaf": "loaves"}

Equation = tuple[int, str, int]
Draft = tuple[tuple[int, ...], list[Equation]]  # a move's numbers for {n} and {m}, and its equations
Event = Mapping[str, str]  # {move: sentence}; an ending may also have a unit
Kind = Mapping[str, Any]

KINDS: dict[str, Kind] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


class Config(TextDatasetConfig):
    train_rows: int = setting(2000, ge=1, le=MOST_ROWS, remedy="100000 take a minute to generate")
    validation_rows: int = setting(100, ge=0, le=MOST_ROWS, remedy="0 takes none")
    test_rows: int = setting(200, identity=False, ge=1, le=MOST_ROWS, remedy="100000 take a minute to generate")
    min_steps: int = setting(2, ge=STEPS[0], le=STEPS[1], remedy="problems have 2 to 5 steps")
    max_steps: int = setting(3, ge=STEPS[0], le=STEPS[1], remedy="problems have 2 to 5 steps")
    max_value: int = setting(20, ge=SMALLEST_BOUND, le=10_000, remedy="20 gives products up to 400")
    max_answer: int | None = setting(None, ge=SMALLEST_BOUND, le=10**8, remedy="null allows max_value squared")
    # Seed of the problems; the run's own seed does not change them.
    seed: int = setting(0, ge=0, lt=2**63, remedy="use a whole number of at most 18 digits")
    # Maximum length of a generated answer.
    answer_tokens: int = setting(160, identity=False, ge=1, le=MOST_TOKENS, remedy="160 are enough for every answer")

    def rule_errors(self) -> list[SettingError]:
        if self.min_steps <= self.max_steps:
            return super().rule_errors()
        return [
            *super().rule_errors(),
            SettingError(
                ("min_steps", "max_steps"),
                f"Invalid dataset.min_steps={self.min_steps} with dataset.max_steps={self.max_steps}: min_steps must "
                "be ≤ max_steps; change one of them.",
            ),
        ]


def sources(config: Config) -> list[Source]:
    return []


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    """Generates the three splits in GSM8K's prompt, or as chats; `data_root` is not used.

    Raises:
        ConfigError: the settings allow fewer distinct problems than rows are requested.
    """
    tested = 0 if config.evaluate == "validation" else config.test_rows
    sizes = {"train": config.train_rows, "validation": config.validation_rows, "test": tested}
    bounds = config.model_dump(include={"seed", "min_steps", "max_steps", "max_value", "max_answer"})
    template = config.template or "qa"

    def prompted(row: Row) -> Row:
        return {"x": prompt(template, row["question"]), "y": row["answer"]}

    try:
        return Splits(**{split: [prompted(row) for row in generate(split, n, **bounds)] for split, n in sizes.items()})
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error


def describe(config: Config) -> str:
    return f"generated from seed {config.seed}: {len(KINDS)} kinds, {config.min_steps}-{config.max_steps} steps"


class Misfit(Exception):
    """The numbers drawn so far cannot be continued within the bounds: another story must be drawn."""


@dataclass(frozen=True)
class Problem:
    """One problem with its kind and equations; `generate` returns only its two texts."""

    kind: str
    question: str
    answer: str
    equations: tuple[Equation, ...]

    @property
    def signature(self) -> str:
        """Kind, operators and numbers: equal for two wordings of one problem."""
        return f"{self.kind}: {chain(self.equations)}"

    @property
    def split(self) -> str:
        """The only split that may use this problem."""
        digest = hashlib.blake2b(chain(self.equations[:2]).encode(), digest_size=8).digest()
        percent = int.from_bytes(digest, "big") % 100
        return next(name for name, share in SPLITS.items() if percent in share)


def chain(equations: tuple[Equation, ...]) -> str:
    """Equations as one canonical string, e.g. "7+12 19-4"; the operands of + and * are sorted."""
    ordered = ((*sorted((a, b)), op) if op in "+*" else (a, b, op) for a, op, b in equations)
    return " ".join(f"{a}{op}{b}" for a, b, op in ordered)


def generate(
    split: str,
    count: int,
    *,
    seed: int = 0,
    min_steps: int = 2,
    max_steps: int = 3,
    max_value: int = 20,
    max_answer: int | None = None,
) -> list[dict[str, str]]:
    """Generates `count` rows {"question", "answer"} of distinct problems, the same for the same arguments everywhere.

    A smaller `count` gives a prefix of the rows of a larger one. No two rows have the same kind, operators and numbers.
    Steps are drawn uniformly from min_steps..max_steps, kinds nearly so. `max_value` limits the numbers in questions,
    and `max_answer` (default max_value**2) every result; below about 20, kinds with long products do not occur.

    Raises:
        ValueError: arguments are invalid (the message names all), or there are too few problems within
            max(LEAST_DRAWS, 100 * count) draws.
    """
    check_arguments(split, count, min_steps, max_steps, max_value, max_answer)
    settings = {"seed": seed, "min_steps": min_steps, "max_steps": max_steps}
    settings |= {"max_value": max_value, "max_answer": max_answer}
    draws = max(LEAST_DRAWS, 100 * count)
    distinct = itertools.islice(problems(split, draws, **settings), count)
    rows = [{"question": problem.question, "answer": problem.answer} for problem in distinct]
    if len(rows) < count:
        bounds = ", ".join(f"{name}={value}" for name, value in settings.items())
        bound = "dataset.max_value" if max_answer is None else "dataset.max_value or dataset.max_answer"
        raise ValueError(
            f"Invalid count={count}: only {len(rows)} distinct {split} problems exist within {draws:,} draws "
            f"for {bounds}; raise {bound}, or lower dataset.{split}_rows"
        )
    return rows


def check_arguments(
    split: str, count: int, min_steps: int, max_steps: int, max_value: int, max_answer: int | None
) -> None:
    """Raise one ValueError that names every invalid argument of `generate`, its rule and the remedy."""
    fewest, most = STEPS
    rules = (
        (split in SPLITS, f"Invalid split={split!r}: must be one of {', '.join(SPLITS)}; use split='train'"),
        (count >= 0, f"Invalid count={count}: the number of rows must be ≥ 0; use count=0 for no rows"),
        (fewest <= min_steps <= most, f"Invalid min_steps={min_steps}: must be in {fewest}..{most}; use min_steps=2"),
        (fewest <= max_steps <= most, f"Invalid max_steps={max_steps}: must be in {fewest}..{most}; use max_steps=3"),
        (
            min_steps <= max_steps,
            f"Invalid min_steps={min_steps}: must be ≤ max_steps={max_steps}; lower min_steps or raise max_steps",
        ),
        (
            max_value >= SMALLEST_BOUND,
            f"Invalid max_value={max_value}: must be ≥ {SMALLEST_BOUND}, or kinds run out of numbers; use max_value=20",
        ),
        (
            max_answer is None or max_answer >= SMALLEST_BOUND,
            f"Invalid max_answer={max_answer}: must be ≥ {SMALLEST_BOUND}, or no bound; use max_answer=None",
        ),
    )
    errors = [message for holds, message in rules if not holds]
    if errors:
        raise ValueError("\n".join(errors))


def problems(
    split: str, draws: int, *, seed: int, min_steps: int, max_steps: int, max_value: int, max_answer: int | None
) -> Iterator[Problem]:
    """The distinct problems of `split` among the first `draws` draws of the stream that the other arguments define."""
    name = f"word_math {VERSION} {split} {seed} {min_steps} {max_steps} {max_value} {max_answer}"
    # Only int seeds and randrange are the same in every Python version; hash() and sample() are not.
    rng = random.Random(int.from_bytes(hashlib.blake2b(name.encode()).digest(), "big"))
    kinds = list(KINDS)
    seen = set()
    for _ in range(draws):
        kind_name = kinds[rng.randrange(len(kinds))]
        steps = rng.randrange(min_steps, max_steps + 1)
        problem = write(kind_name, steps, rng, max_value, max_answer)
        if problem is not None and problem.split == split and problem.signature not in seen:
            seen.add(problem.signature)
            yield problem


def write(kind_name: str, steps: int, rng: random.Random, max_value: int, max_answer: int | None) -> Problem | None:
    """A problem of one kind with exactly `steps` equations; None if ten stories in a row exceeded the bounds."""
    kind, limit = KINDS[kind_name], max_value**2 if max_answer is None else max_answer
    for _ in range(10):
        story = Story(rng, steps, max_value, min(limit, kind.get("most", limit)))
        try:
            story.tell(kind)
        except Misfit:
            continue
        return story.problem(kind_name)
    return None


def plural(noun: str) -> str:
    """The plural of an English noun of word_math.yaml: "box" → "boxes", "toy car" → "toy cars"."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


class Story:
    """A problem while it is written: its sentences, its equations, and the number of equations that are left.

    Sentences are templates: {n} and {m} are the numbers of the sentence, all other fields are in `words`.
    """

    def __init__(self, rng: random.Random, steps: int, max_value: int, limit: int):
        self.rng, self.steps, self.max_value, self.limit = rng, steps, max_value, limit
        self.words: dict[str, str] = {}
        self.unit = ""
        self.sentences: list[str] = []
        self.lines: list[str] = []
        self.equations: list[Equation] = []

    @property
    def left(self) -> int:
        """Equations still to write."""
        return self.steps - len(self.equations)

    def pick(self, options):
        """A random element of a non-empty sequence."""
        return options[self.rng.randrange(len(options))]

    def chance(self) -> bool:
        """A fair coin."""
        return self.rng.randrange(2) == 1

    def number(self, high: int | None = None, low: int = 2) -> int:
        """A number for the question, low..min(high, max_value); at least 2 by default, so that a plural can follow."""
        high = self.max_value if high is None else min(high, self.max_value)
        if high < low:
            raise Misfit
        return self.rng.randrange(low, high + 1)

    def factors(self, high: int | None = None) -> tuple[int, int]:
        """Two numbers for the question whose product is at most `high` (default: the limit)."""
        high = self.limit if high is None else high
        first = self.number(high // 2)
        return first, self.number(high // first)

    def cast(self) -> None:
        """Choose {name} with {he}, {his}, {him}, and a {friend} of the other sex, so that pronouns are unambiguous."""
        sex = self.rng.randrange(2)
        self.words |= PRONOUNS[sex] | {"name": self.pick(NAMES[sex]), "friend": self.pick(NAMES[1 - sex])}

    def name(self, words: Mapping[str, Sequence[str]]) -> None:
        """Choose the words at one index of all lists, with their plurals: {thing}, {things} and {Things}."""
        index = self.rng.randrange(min(map(len, words.values())))
        for key, options in words.items():
            many = plural(options[index])
            self.words |= {key: options[index], f"{key}s": many, f"{key.capitalize()}s": many.capitalize()}

    def say(self, variants: Sequence[str], **numbers: int) -> None:
        """Add one of the variants to the question."""
        self.sentences.append(self.pick(variants).format_map(self.words | numbers))

    def step(self, left: int, op: str, right: int, unit: str | None = None) -> int:
        """Write the equation `left op right` with its unit (singular; default: the story's); returns the result.

        Raises:
            Misfit: the result is not a whole number within the bounds.
        """
        if op == "/" and left % right:
            raise Misfit
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[op]
        if not 1 <= result <= self.limit:
            raise Misfit
        self.equations.append((left, op, right))
        unit = unit or self.unit
        self.lines.append(f"{left} {op} {right} = {result} {unit if result == 1 else plural(unit)}")
        return result

    def happen(self, total: int, events: list[Event], unit: str | None = None) -> int:
        """Add a random event that fits and remove it from the list; returns the new total."""
        while events:
            ((move, sentence),) = events.pop(self.rng.randrange(len(events))).items()
            cost, draw = MOVES[move]
            if cost > self.left:
                continue
            try:
                numbers, equations = draw(self, total)
            except Misfit:
                continue
            self.say([sentence], **dict(zip("nm", numbers, strict=False)))  # a move draws 0-2 numbers
            for equation in equations:
                total = self.step(*equation, unit)
            return total
        raise Misfit

    def tell(self, kind: Kind) -> None:
        """Write the whole story: its opening, then events until no equation is left; the last may be an ending."""
        if kind.get("person"):
            self.cast()
        if "words" in kind:
            self.name(kind["words"])
        self.unit = kind["unit"].format_map(self.words)
        total, events = OPENINGS[kind["open"]](self, kind), list(kind["events"])
        while self.left > 0:
            if self.left == 1 and "endings" in kind and self.chance():
                ending = dict(self.pick(kind["endings"]))
                unit = ending.pop("unit", None)
                self.happen(total, [ending], unit)
                return
            total = self.happen(total, events)
        if "questions" in kind:
            self.say(kind["questions"])

    def problem(self, kind_name: str) -> Problem:
        """The finished problem."""
        result = self.lines[-1].split(" = ")[1].split()[0]
        answer = "\n".join([*self.lines, f"#### {result}"])
        return Problem(kind_name, " ".join(self.sentences), answer, tuple(self.equations))


# Moves: the effect of an event on the total, with its number of equations. Misfit: no number fits the bounds.

Move = tuple[int, Callable[[Story, int], Draft]]
Bound = Callable[[Story, int], int]


def by_number(op: str, most: Bound) -> Move:
    """total op n"""

    def draw(story: Story, total: int) -> Draft:
        n = story.number(most(story, total))
        return (n,), [(total, op, n)]

    return 1, draw


def by_groups(op: str, most: Bound) -> Move:
    """total op n * m"""

    def draw(story: Story, total: int) -> Draft:
        n, m = story.factors(most(story, total))
        return (n, m), [(n, "*", m), (total, op, n * m)]

    return 2, draw


def in_words(op: str, n: int, fits: Callable[[Story, int], bool]) -> Move:
    """total op n, where words such as "twice" stand for n"""

    def draw(story: Story, total: int) -> Draft:
        if not fits(story, total):
            raise Misfit
        return (), [(total, op, n)]

    return 1, draw


def share(story: Story, total: int) -> Draft:
    """total / n, exact, at least 2"""
    divisors = [n for n in range(2, min(story.max_value, total // 2) + 1) if total % n == 0]
    if not divisors:
        raise Misfit
    n = story.pick(divisors)
    return (n,), [(total, "/", n)]


def missing(story: Story, total: int) -> Draft:
    """n - total"""
    n = story.number(low=total + 1)
    return (n,), [(n, "-", total)]


def lose_gain(story: Story, total: int) -> Draft:
    """total - n + m"""
    n = story.number(total - 1)
    m = story.number(story.limit - total + n)
    return (n, m), [(total, "-", n), (total - n, "+", m)]


MOVES: dict[str, Move] = {
    "gain": by_number("+", lambda story, total: story.limit - total),
    "lose": by_number("-", lambda story, total: total - 1),
    "times": by_number("*", lambda story, total: story.limit // total),
    "gain_groups": by_groups("+", lambda story, total: story.limit - total),
    "lose_groups": by_groups("-", lambda story, total: total - 1),
    "double": in_words("*", 2, lambda story, total: 2 * total <= story.limit),
    "triple": in_words("*", 3, lambda story, total: 3 * total <= story.limit),
    "half": in_words("/", 2, lambda story, total: total % 2 == 0 and total >= 4),
    "share": (1, share),
    "missing": (1, missing),
    "lose_gain": (2, lose_gain),
}

# Openings write the beginning of a story with the sentences of the kind's `say`, and return its first total.


def number(story: Story, kind: Kind) -> int:
    """n"""
    n = story.number(story.limit)
    story.say(kind["say"]["number"], n=n)
    return n


def product(story: Story, kind: Kind) -> int:
    """n * m"""
    n, m = story.factors()
    story.say(kind["say"]["product"], n=n, m=m)
    return story.step(n, "*", m)


def sum_of(story: Story, kind: Kind, high: int | None = None, unit: str | None = None) -> int:
    """n + m, at most `high` (default: the limit)"""
    high = story.limit if high is None else high
    n = story.number(high - 2)
    m = story.number(high - n)
    story.say(kind["say"]["sum"], n=n, m=m)
    return story.step(n, "+", m, unit)


def sum_or_product(story: Story, kind: Kind) -> int:
    """n + m or n * m"""
    return sum_of(story, kind) if story.chance() else product(story, kind)


def shared_sum(story: Story, kind: Kind) -> int:
    """(n + m, changed by events of `before`) / k"""
    total, before = sum_of(story, kind), list(kind["before"])
    while story.left > 1 and before and story.chance():
        total = story.happen(total, before)
    return story.happen(total, list(kind["shared"]))


def compare(story: Story, kind: Kind) -> int:
    """A chain of people, each compared with the previous one; asks for the last one, or for the sum of the last two."""
    everyone, say = [*NAMES[0], *NAMES[1]], kind["say"]
    names = [everyone.pop(story.rng.randrange(len(everyone))) for _ in range(1 + STEPS[1])]
    story.words |= {"name": names[0]}
    older, total = 0, story.number(story.limit)
    story.say(say["first"], n=total)
    adds_up = story.chance()
    for old, new in itertools.pairwise(names):
        if story.left == (1 if adds_up else 0):
            break
        story.words |= {"old": old, "new": new}
        older, total = total, story.happen(total, list(kind["events"]))
    if adds_up:
        total = story.step(older, "+", total)
    story.say(say["both" if adds_up else "last"])
    return total


def travel(story: Story, kind: Kind) -> int:
    """Speed times time: at most 90 miles per hour and 12 hours."""
    n = story.number(min(90, story.limit // 2))
    m = story.number(min(12, story.limit // n))
    verb = "walk" if n <= 4 else "bike" if n <= 15 else "drive"
    story.words |= {"go": verb, "goes": verb + "s"}
    story.say(kind["say"]["trip"], n=n, m=m)
    return story.step(n, "*", m)


def recipe(story: Story, kind: Kind) -> int:
    """n pieces with m cups each, m ≤ 9."""
    m = story.number(min(9, story.limit // 2))
    n = story.number(story.limit // m)
    story.say(kind["say"]["recipe"], n=n, m=m)
    return story.step(n, "*", m)


def tickets(story: Story, kind: Kind) -> int:
    """Tickets at one price or, if three equations are left, at a price for adults and a lower one for children."""
    if story.left < 3 or story.chance():
        return product(story, kind)
    adults = story.number(story.limit // 3)
    price = story.number(story.limit // adults, low=3)
    child_price = story.number(price - 1)
    children = story.number((story.limit - adults * price) // child_price)
    story.say(kind["say"]["group"], n=adults, m=children)
    story.say(kind["say"]["prices"], n=price, m=child_price)
    return story.step(story.step(adults, "*", price), "+", story.step(children, "*", child_price))


def fuel(story: Story, kind: Kind) -> int:
    """The rest in a tank after some trips, or cans that fill it."""
    if not story.chance():
        return product(story, kind)
    trips, each = story.factors(min(story.limit, story.max_value) - 1)
    full = story.number(low=trips * each + 1)
    story.say(kind["say"]["tank"], n=full)
    story.say(kind["say"]["trips"], n=trips, m=each)
    return story.step(full, "-", story.step(trips, "*", each))


def sale(story: Story, kind: Kind) -> int:
    """A reduced price (10%, 20% and 25% off if max_value allows the number), or half price."""
    percents = [(part, f"{100 // part}% off") for part in (10, 5, 4) if 100 // part <= story.max_value]
    part, offer = story.pick([*percents, (4, "a quarter off"), (3, "a third off"), (2, "half off")])
    story.words |= {"offer": offer}
    if part == 2 or (story.left >= 3 and story.chance()):
        total = product(story, kind)
    else:
        total = part * story.number(story.max_value // part, low=1)
        story.say(kind["say"]["one"], n=total)
    saved = story.step(total, "/", part)
    return saved if part == 2 else story.step(total, "-", saved)


def feed(story: Story, kind: Kind) -> int:
    """Animals (of one or two kinds) times food per animal, for one or several days."""
    say, two_sorts = kind["say"], story.chance()
    if two_sorts:
        animals = sum_of(story, kind, story.limit // 2, "animal")
    else:
        animals = story.number(story.limit // 2)
        story.say(say["number"], n=animals)
    each = story.number(story.limit // animals)
    story.say(say["each"], n=each)
    total = story.step(animals, "*", each)
    if two_sorts and (story.left == 0 or story.chance()):
        story.say(say["one_day"])
        return total
    days = story.number(story.limit // total)
    story.say(say["days"], n=days)
    return story.step(total, "*", days)


_ALL = (number, product, sum_or_product, shared_sum, compare, travel, recipe, tickets, fuel, sale, feed)
OPENINGS: dict[str, Callable[[Story, Kind], int]] = {opening.__name__: opening for opening in _ALL}


DATASETS.add("word_math", DataSet(Config=Config, version=VERSION, describe=describe, sources=sources, load=load))
