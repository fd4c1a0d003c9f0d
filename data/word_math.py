"""Multi-step arithmetic word problems in GSM8K's form ("#### 42"), made from a seed: no file, no network.

A problem is a short story about one running quantity. A kind (`@kind`) opens the story with 0-3 equations and then lets
events happen, each of which is a move (`@move`: gain, lose, share, ...) told in one sentence and 1-2 equations:

    Jack picks 3 baskets of 11 apples each. He sells all his apples for $3 each. How many dollars does he get?

    3 * 11 = 33 apples
    33 * 3 = 99 dollars
    #### 99

What always holds: a solution has as many equations as the problem has steps; numbers in a question are 2..max_value;
every result is a whole number in 1..max_answer (1..max_value**2 when max_answer is None); divisions are exact.

Splits are disjoint by construction. A hash of a problem's first two equations (operators and numbers; not the kind,
names or nouns; a + b read as b + a) says which split may use it. So no problem of one split reappears in another in
other words, nor as the beginning of a longer one, whatever the seed and the sizes.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data import DATASETS, CountTokens, Row, Splits
from flatlora.config.sections import TextDatasetConfig
from flatlora.config.settings import MOST_TOKENS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.rows import Source
from flatlora.utils.errors import ConfigError, SettingError

VERSION = 1  # raise it whenever the same arguments give other rows; a cache of rows must know it
SPLITS = {"train": range(80), "validation": range(80, 90), "test": range(90, 100)}  # percent of the hash space
STEPS = (2, 5)
MOST_ROWS = 100_000  # a minute's work
LEAST_DRAWS = 100_000  # before a split is said to have no more problems
SMALLEST_BOUND = 5  # below 5, kinds such as fuel (5 - 2 * 2) have no problem left

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
Event = tuple[str, str]  # (move, sentence)
Ending = tuple[str, str, str]  # (move, sentence with the question, unit of the answer)

KINDS: dict[str, Callable[["Story"], None]] = {}
MOVES: dict[str, tuple[int, Callable[["Story", int], Draft]]] = {}


class Config(TextDatasetConfig):
    train_rows: int = setting(2000, ge=1, le=MOST_ROWS, remedy="that many take a minute to make")
    validation_rows: int = setting(100, ge=0, le=MOST_ROWS, remedy="0 takes none")
    test_rows: int = setting(200, identity=False, ge=1, le=MOST_ROWS, remedy="that many take a minute to make")
    min_steps: int = setting(2, ge=STEPS[0], le=STEPS[1], remedy="problems have 2 to 5 steps")
    max_steps: int = setting(3, ge=STEPS[0], le=STEPS[1], remedy="problems have 2 to 5 steps")
    max_value: int = setting(20, ge=SMALLEST_BOUND, le=10_000, remedy="20 makes products up to 400")
    max_answer: int | None = setting(None, ge=SMALLEST_BOUND, le=10**8, remedy="null allows max_value squared")
    # Of the problems; the run's own seed does not change them.
    seed: int = setting(0, ge=0, lt=2**63, remedy="use a whole number of at most 18 digits")
    # How long an evaluator waits for an answer.
    answer_tokens: int = setting(160, identity=False, ge=1, le=MOST_TOKENS, remedy="160 hold every answer")

    def rule_errors(self) -> list[SettingError]:
        if self.min_steps <= self.max_steps:
            return []
        return [
            SettingError(
                ("min_steps", "max_steps"),
                f"Invalid dataset.min_steps={self.min_steps} with dataset.max_steps={self.max_steps}: the least "
                "number of steps must not exceed the greatest; change one of them.",
            )
        ]


def sources(config: Config) -> list[Source]:
    return []


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    """The three splits in the prompt of GSM8K; nothing is read, so `data_root` changes nothing.

    Raises:
        ConfigError: the difficulty leaves fewer distinct problems than rows are asked for.
    """
    sizes = {"train": config.train_rows, "validation": config.validation_rows, "test": config.test_rows}
    bounds = config.model_dump(include={"seed", "min_steps", "max_steps", "max_value", "max_answer"})
    try:
        return Splits(**{split: [_prompted(row) for row in generate(split, n, **bounds)] for split, n in sizes.items()})
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error


def _prompted(row: Row) -> Row:
    return {"x": f"Q: {row['question']}\nA: ", "y": row["answer"]}


def describe(config: Config) -> str:
    return f"generated from seed {config.seed}: {len(KINDS)} kinds, {config.min_steps}-{config.max_steps} steps"


class Misfit(Exception):
    """The numbers drawn so far leave no way to go on within the bounds: draw another story."""


@dataclass(frozen=True)
class Problem:
    """One problem with what it is made of; `generate` hands out only its two texts."""

    kind: str
    question: str
    answer: str
    equations: tuple[Equation, ...]

    @property
    def signature(self) -> str:
        """Kind, operators and numbers: equal for two tellings of one problem."""
        return f"{self.kind}: {chain(self.equations)}"

    @property
    def split(self) -> str:
        """The only split that may use this problem."""
        digest = hashlib.blake2b(chain(self.equations[:2]).encode(), digest_size=8).digest()
        percent = int.from_bytes(digest, "big") % 100
        return next(name for name, share in SPLITS.items() if percent in share)


def chain(equations: tuple[Equation, ...]) -> str:
    """Equations as one canonical string, e.g. "7+12 19-4"; the operands of + and * in rising order."""
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
    """`count` rows {"question", "answer"} of distinct problems; the same arguments give the same rows anywhere.

    A smaller `count` gives a prefix of the rows of a larger one. No two rows share kind, operators and numbers. Steps
    are drawn evenly from min_steps..max_steps, kinds about evenly. `max_value` bounds the numbers in the questions,
    `max_answer` (default max_value**2) every result; below about 20 it leaves out the kinds with long products.
    ValueError: bad arguments (all of them named), or too few problems found within max(LEAST_DRAWS, 100 * count) draws.
    """
    check_arguments(split, count, min_steps, max_steps, max_value, max_answer)
    settings = {"seed": seed, "min_steps": min_steps, "max_steps": max_steps}
    settings |= {"max_value": max_value, "max_answer": max_answer}
    draws = max(LEAST_DRAWS, 100 * count)
    found = itertools.islice(problems(split, draws, **settings), count)
    rows = [{"question": problem.question, "answer": problem.answer} for problem in found]
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
    """Raise one ValueError that names every bad argument of `generate`, its rule and the remedy."""
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
    faults = [fault for holds, fault in rules if not holds]
    if faults:
        raise ValueError("\n".join(faults))


def problems(
    split: str, draws: int, *, seed: int, min_steps: int, max_steps: int, max_value: int, max_answer: int | None
) -> Iterator[Problem]:
    """The distinct problems of `split` among the first `draws` draws of the stream that the other arguments name."""
    name = f"word_math {VERSION} {split} {seed} {min_steps} {max_steps} {max_value} {max_answer}"
    # An int seed and randrange alone: their streams are the same in every Python version, hash() and sample() are not.
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
    """A problem of one kind with exactly `steps` equations; None when ten stories in a row left the bounds."""
    limit = max_value**2 if max_answer is None else max_answer
    for _ in range(10):
        story = Story(rng, steps, max_value, limit)
        try:
            KINDS[kind_name](story)
        except Misfit:
            continue
        return story.problem(kind_name)
    return None


def kind(function: Callable[["Story"], None]) -> Callable[["Story"], None]:
    """Register a kind of problem under its function's name. It must be able to fill any 2..5 steps."""
    KINDS[function.__name__] = function
    return function


def plural(noun: str) -> str:
    """The plural of an English noun of this file: "box" → "boxes", "toy car" → "toy cars"."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


class Story:
    """A problem being written: its sentences, its equations, and how many equations are left to write.

    Sentences are templates: {n} and {m} are the numbers of the sentence, all else comes from `words`.
    """

    def __init__(self, rng: random.Random, steps: int, max_value: int, limit: int):
        self.rng, self.steps, self.max_value, self.limit = rng, steps, max_value, limit
        self.words: dict[str, str] = {}
        self.sentences: list[str] = []
        self.lines: list[str] = []
        self.equations: list[Equation] = []

    @property
    def left(self) -> int:
        """Equations still to write."""
        return self.steps - len(self.equations)

    def pick(self, options):
        """One of a non-empty sequence."""
        return options[self.rng.randrange(len(options))]

    def chance(self) -> bool:
        """A fair coin."""
        return self.rng.randrange(2) == 1

    def number(self, high: int | None = None, low: int = 2) -> int:
        """A number for the question, low..min(high, max_value). From 2 on, so that a plural can follow it."""
        high = self.max_value if high is None else min(high, self.max_value)
        if high < low:
            raise Misfit
        return self.rng.randrange(low, high + 1)

    def fitting(self, number: int, fits: bool) -> int:
        """`number`, one that words stand for ("twice"), if it fits."""
        if not fits:
            raise Misfit
        return number

    def factors(self, high: int | None = None) -> tuple[int, int]:
        """Two numbers for the question whose product is at most `high` (default: the limit)."""
        high = self.limit if high is None else high
        first = self.number(high // 2)
        return first, self.number(high // first)

    def cast(self) -> None:
        """Choose {name} with {he}, {his}, {him}, and a {friend}: of the other sex, so that every pronoun is clear."""
        sex = self.rng.randrange(2)
        self.words |= PRONOUNS[sex] | {"name": self.pick(NAMES[sex]), "friend": self.pick(NAMES[1 - sex])}

    def noun(self, *options: str) -> str:
        """One of `options` (singular), from here on {thing}, {things} and {Things}."""
        thing = self.pick(options)
        things = plural(thing)
        self.words |= {"thing": thing, "things": things, "Things": things.capitalize()}
        return thing

    def say(self, *variants: str, **numbers: int) -> None:
        """Add one of the variants to the question."""
        self.sentences.append(self.pick(variants).format_map(self.words | numbers))

    def open_product(self, unit: str, *variants: str) -> int:
        """Open with one of the variants about {n} times {m}; returns the product."""
        n, m = self.factors()
        self.say(*variants, n=n, m=m)
        return self.step(n, "*", m, unit)

    def open_sum(self, unit: str, *variants: str, high: int | None = None) -> int:
        """Open with one of the variants about {n} plus {m}; returns the sum, at most `high` (default: the limit)."""
        high = self.limit if high is None else high
        n = self.number(high - 2)
        m = self.number(high - n)
        self.say(*variants, n=n, m=m)
        return self.step(n, "+", m, unit)

    def step(self, left: int, op: str, right: int, unit: str) -> int:
        """Write the equation `left op right` and its unit (given in singular); returns the result, if in bounds."""
        if op == "/" and left % right:
            raise Misfit
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[op]
        if not 1 <= result <= self.limit:
            raise Misfit
        self.equations.append((left, op, right))
        self.lines.append(f"{left} {op} {right} = {result} {unit if result == 1 else plural(unit)}")
        return result

    def happen(self, total: int, unit: str, events: list[Event]) -> int:
        """Tell a random one of the events that fit, removing it from the list; returns the new total."""
        while events:
            move_name, sentence = events.pop(self.rng.randrange(len(events)))
            cost, draw = MOVES[move_name]
            if cost > self.left:
                continue
            try:
                numbers, equations = draw(self, total)
            except Misfit:
                continue
            self.say(sentence, **dict(zip("nm", numbers, strict=False)))  # a move draws 0-2 numbers
            for equation in equations:
                total = self.step(*equation, unit)
            return total
        raise Misfit

    def tell(
        self,
        total: int,
        unit: str,
        events: tuple[Event, ...],
        questions: tuple[str, ...],
        endings: tuple[Ending, ...] = (),
    ) -> None:
        """Let events happen to `total` until no equation is left; the last may be an ending, which asks for itself."""
        remaining = list(events)
        while self.left > 0:
            if self.left == 1 and endings and self.chance():
                move_name, sentence, new_unit = self.pick(endings)
                self.happen(total, new_unit, [(move_name, sentence)])
                return
            total = self.happen(total, unit, remaining)
        self.say(*questions)

    def problem(self, kind_name: str) -> Problem:
        """The finished problem."""
        result = self.lines[-1].split(" = ")[1].split()[0]
        answer = "\n".join([*self.lines, f"#### {result}"])
        return Problem(kind_name, " ".join(self.sentences), answer, tuple(self.equations))


# Moves: what an event does to the total.


def move(name: str, cost: int = 1):
    """Register a move that takes `cost` equations. It raises Misfit when no number fits the bounds."""

    def register(function: Callable[[Story, int], Draft]) -> Callable[[Story, int], Draft]:
        MOVES[name] = (cost, function)
        return function

    return register


@move("gain")
def gain(story: Story, total: int) -> Draft:
    """total + n"""
    n = story.number(story.limit - total)
    return (n,), [(total, "+", n)]


@move("lose")
def lose(story: Story, total: int) -> Draft:
    """total - n"""
    n = story.number(total - 1)
    return (n,), [(total, "-", n)]


@move("times")
def times(story: Story, total: int) -> Draft:
    """total * n"""
    n = story.number(story.limit // total)
    return (n,), [(total, "*", n)]


@move("share")
def share(story: Story, total: int) -> Draft:
    """total / n, exact, at least 2"""
    divisors = [n for n in range(2, min(story.max_value, total // 2) + 1) if total % n == 0]
    if not divisors:
        raise Misfit
    n = story.pick(divisors)
    return (n,), [(total, "/", n)]


@move("double")
def double(story: Story, total: int) -> Draft:
    """total * 2, in words"""
    return (), [(total, "*", story.fitting(2, 2 * total <= story.limit))]


@move("triple")
def triple(story: Story, total: int) -> Draft:
    """total * 3, in words"""
    return (), [(total, "*", story.fitting(3, 3 * total <= story.limit))]


@move("half")
def half(story: Story, total: int) -> Draft:
    """total / 2, in words, at least 2"""
    return (), [(total, "/", story.fitting(2, total % 2 == 0 and total >= 4))]


@move("missing")
def missing(story: Story, total: int) -> Draft:
    """n - total"""
    n = story.number(story.max_value, low=total + 1)
    return (n,), [(n, "-", total)]


@move("gain_groups", cost=2)
def gain_groups(story: Story, total: int) -> Draft:
    """total + n * m"""
    n, m = story.factors(story.limit - total)
    return (n, m), [(n, "*", m), (total, "+", n * m)]


@move("lose_groups", cost=2)
def lose_groups(story: Story, total: int) -> Draft:
    """total - n * m"""
    n, m = story.factors(total - 1)
    return (n, m), [(n, "*", m), (total, "-", n * m)]


@move("lose_gain", cost=2)
def lose_gain(story: Story, total: int) -> Draft:
    """total - n + m"""
    n = story.number(total - 1)
    m = story.number(story.limit - total + n)
    return (n, m), [(total, "-", n), (total - n, "+", m)]


# Kinds. Events happen in any order, so none may lean on another one ("the rest", "after that meal").


@kind
def shop(story: Story) -> None:
    """A bill: things at one price, more or less to pay, change."""
    story.cast()
    story.noun("pen", "notebook", "mug", "toy car", "puzzle", "ball", "candle", "plate")
    total = story.open_product(
        "dollar", "{name} buys {n} {things} for ${m} each.", "{Things} cost ${m} each, and {name} buys {n} of them."
    )
    story.tell(
        total,
        "dollar",
        events=(
            ("gain", "{He} also buys a hat for ${n}."),
            ("gain", "{He} also buys a magazine for ${n}."),
            ("gain", "Gift wrapping adds ${n} to the bill."),
            ("gain_groups", "{He} also buys {n} scarves for ${m} each."),
            ("lose", "A coupon takes ${n} off the bill."),
            ("lose", "{friend} pays ${n} of the bill for {him}."),
        ),
        questions=("How many dollars does {name} pay?", "How many dollars does {name} have to pay in all?"),
        endings=(("missing", "{He} hands over ${n}. How many dollars does {he} get back?", "dollar"),),
    )


@kind
def bus(story: Story) -> None:
    """People on board: some get on, some get off."""
    vehicle, stop = story.pick((("bus", "stop"), ("tram", "stop"), ("train", "station"), ("ferry", "port")))
    story.words |= {"bus": vehicle, "stop": stop}
    total = story.number(story.limit)
    story.say("A {bus} leaves with {n} people on board.", "There are {n} people on a {bus}.", n=total)
    taxis = "At the last {stop}, everyone takes a taxi, {n} people to a taxi. How many taxis do they need?"
    story.tell(
        total,
        "person",
        events=(
            ("gain", "At the next {stop}, {n} people get on."),
            ("gain", "Then {n} more people get on."),
            ("gain_groups", "Then {n} groups of {m} people get on."),
            ("lose", "At the next {stop}, {n} people get off."),
            ("lose", "Then {n} people get off."),
            ("lose_gain", "At the next {stop}, {n} people get off and {m} get on."),
            ("half", "At the next {stop}, half of the people get off."),
        ),
        questions=("How many people are on the {bus} now?", "How many people are now on board?"),
        endings=(("share", taxis, "taxi"),),
    )


@kind
def orchard(story: Story) -> None:
    """Baskets of fruit: some given away, some used, bags filled."""
    story.cast()
    fruit = story.noun("apple", "pear", "plum", "peach", "orange", "lemon")
    total = story.open_product(
        fruit, "{name} fills {n} baskets with {m} {things} each.", "{name} picks {n} baskets of {m} {things} each."
    )
    story.tell(
        total,
        fruit,
        events=(
            ("gain", "{friend} gives {him} {n} more {things}."),
            ("gain_groups", "Then {he} buys {n} bags of {m} {things}."),
            ("lose", "{He} gives {n} {things} to {friend}."),
            ("lose", "{He} throws away {n} rotten {things}."),
            ("lose_groups", "Then {he} bakes {n} pies with {m} {things} in each."),
            ("half", "Then {he} makes jam from half of {his} {things}."),
        ),
        questions=("How many {things} does {he} have now?", "How many {things} does {name} end up with?"),
        endings=(
            ("share", "{He} packs all {his} {things} into bags of {n}. How many bags does {he} fill?", "bag"),
            ("times", "{He} sells all {his} {things} for ${n} each. How many dollars does {he} get?", "dollar"),
        ),
    )


@kind
def reading(story: Story) -> None:
    """Pages left to read: some are read, some are added, days needed."""
    story.cast()
    total = story.open_product(
        "page",
        "{name} has a new book with {n} chapters of {m} pages each.",
        "{name} wants to read {n} stories of {m} pages each.",
    )
    story.tell(
        total,
        "page",
        events=(
            ("gain", "{His} teacher gives {him} {n} more pages to read."),
            ("lose", "{He} reads {n} pages before breakfast."),
            ("lose", "{He} reads {n} pages on the train."),
            ("lose", "In the evening, {he} reads {n} pages."),
            ("lose_groups", "For {n} days, {he} reads {m} pages a day."),
            ("half", "One weekend, {he} reads half of the pages {he} still has to read."),
        ),
        questions=("How many pages does {he} still have to read?", "How many pages are left to read?"),
        endings=(("share", "From now on, {he} reads {n} pages a day. In how many days will {he} finish?", "day"),),
    )


@kind
def savings(story: Story) -> None:
    """Money saved by the week, day or hour: presents, spending, what is still missing."""
    story.cast()
    total = story.open_product(
        "dollar",
        "{name} saves ${m} a week for {n} weeks.",
        "{name} works {n} hours for ${m} an hour and saves it all.",
        "For {n} days, {name} puts ${m} a day into an empty jar.",
    )
    story.tell(
        total,
        "dollar",
        events=(
            ("gain", "{His} aunt gives {him} ${n} to save."),
            ("gain_groups", "Then {he} washes {n} cars for ${m} each and saves that money too."),
            ("lose", "{He} spends ${n} of {his} savings on a gift."),
            ("lose", "{He} lends {friend} ${n} of {his} savings."),
            ("lose_groups", "Then {he} takes ${m} a day from {his} savings for {n} days."),
            ("half", "Then {he} spends half of {his} savings on a trip."),
        ),
        questions=("How many dollars of savings does {name} have now?", "How many dollars are in {his} savings now?"),
        endings=(
            ("share", "{He} spends all {his} savings on books for ${n} each. How many books does {he} buy?", "book"),
            ("missing", "{He} wants to buy a bag for ${n}. How many more dollars does {he} need?", "dollar"),
        ),
    )


@kind
def bakery(story: Story) -> None:
    """Trays of baked things: some sold, some added, boxes filled."""
    story.cast()
    food = story.noun("cookie", "muffin", "roll", "bun", "loaf", "cupcake")
    total = story.open_product(
        food, "{name} bakes {n} trays of {m} {things} for {his} shop.", "A shop bakes {n} trays of {m} {things} each."
    )
    story.tell(
        total,
        food,
        events=(
            ("gain", "{friend} brings {n} more {things} to the shop."),
            ("gain_groups", "Then the shop bakes {n} more trays of {m} {things}."),
            ("lose", "A cafe buys {n} {things}."),
            ("lose", "A dog eats {n} of the {things}."),
            ("lose_groups", "Then {n} customers buy {m} {things} each."),
            ("half", "Then half of the {things} in the shop are sold."),
        ),
        questions=("How many {things} are in the shop now?", "How many {things} does the shop have now?"),
        endings=(
            ("share", "All the {things} in the shop are put into boxes of {n}. How many boxes are there?", "box"),
        ),
    )


@kind
def sharing(story: Story) -> None:
    """Two people's things put together and shared equally; what each child then gets or eats."""
    story.cast()
    thing = story.noun("candy", "grape", "nut", "cherry", "strawberry", "cracker")
    total = story.open_sum(
        thing,
        "{name} and {friend} put together their {n} and {m} {things}.",
        "{name} brings {n} {things} and {friend} brings {m}.",
    )
    extras = [
        ("gain", "{name}'s mother adds {n} more {things}."),
        ("lose", "A dog runs off with {n} of the {things}."),
        ("lose", "{friend} drops {n} of the {things} in the mud."),
    ]
    while story.left > 1 and extras and story.chance():
        total = story.happen(total, thing, extras)
    each = story.happen(total, thing, [("share", "Then {n} children share all the {things} equally.")])
    story.tell(
        each,
        thing,
        events=(
            ("gain", "Then each child gets {n} more {things}."),
            ("gain_groups", "Then each child gets {n} packs of {m} {things}."),
            ("lose", "Each child eats {n} {things}."),
            ("half", "Then each child eats half of their {things}."),
        ),
        questions=("How many {things} does each child have now?", "How many {things} does each child end up with?"),
    )


def compare_people(story: Story, unit: str, relations: tuple[Event, ...], start: str, last: str, both: str) -> None:
    """A chain of people, each compared with the one before; asks for the last one, or for the last two together."""
    everyone = [*NAMES[0], *NAMES[1]]
    names = [everyone.pop(story.rng.randrange(len(everyone))) for _ in range(1 + STEPS[1])]
    story.words |= {"name": names[0]}
    older, total = 0, story.number(story.limit)
    story.say(start, n=total)
    adds_up = story.chance()
    for old, new in itertools.pairwise(names):
        if story.left == (1 if adds_up else 0):
            break
        story.words |= {"old": old, "new": new}
        older, total = total, story.happen(total, unit, list(relations))
    if adds_up:
        story.step(older, "+", total, unit)
    story.say(both if adds_up else last)


@kind
def age(story: Story) -> None:
    """Ages up to 99, each told by another one's."""
    story.limit = min(story.limit, 99)
    relations = (
        ("gain", "{new} is {n} years older than {old}."),
        ("lose", "{new} is {n} years younger than {old}."),
        ("half", "{new} is half as old as {old}."),
        ("double", "{new} is twice as old as {old}."),
        ("triple", "{new} is three times as old as {old}."),
    )
    compare_people(
        story,
        "year",
        relations,
        start="{name} is {n} years old.",
        last="How old is {new}?",
        both="What is the sum of the ages of {old} and {new}?",
    )


@kind
def comparison(story: Story) -> None:
    """Collections, each told by another one's."""
    thing = story.noun("stamp", "coin", "shell", "postcard", "bead", "badge", "comic", "toy train")
    relations = (
        ("gain", "{new} has {n} more {things} than {old}."),
        ("lose", "{new} has {n} fewer {things} than {old}."),
        ("half", "{new} has half as many {things} as {old}."),
        ("double", "{new} has twice as many {things} as {old}."),
        ("triple", "{new} has three times as many {things} as {old}."),
    )
    compare_people(
        story,
        thing,
        relations,
        start="{name} has {n} {things}.",
        last="How many {things} does {new} have?",
        both="How many {things} do {old} and {new} have together?",
    )


@kind
def travel(story: Story) -> None:
    """Speed times time (at most 90 miles per hour, 12 hours), further trips, the way back."""
    story.cast()
    n = story.number(min(90, story.limit // 2))
    m = story.number(min(12, story.limit // n))
    verb = "walk" if n <= 4 else "bike" if n <= 15 else "drive"
    story.words |= {"go": verb, "goes": verb + "s"}
    story.say(
        "{name} {goes} for {m} hours at {n} miles per hour.",
        "{name} {goes} at {n} miles per hour for {m} hours.",
        n=n,
        m=m,
    )
    story.tell(
        story.step(n, "*", m, "mile"),
        "mile",
        events=(
            ("gain", "Then {he} {goes} {n} more miles."),
            ("gain", "{He} also {goes} {n} miles to see {friend}."),
            ("gain", "In the evening, {he} {goes} another {n} miles."),
            ("gain_groups", "Then {he} {goes} {m} miles a day for {n} days."),
        ),
        questions=("How many miles does {name} {go} in all?", "How many miles does {he} {go} altogether?"),
        endings=(
            ("double", "Then {he} {goes} back the same way. How many miles does {he} {go} in all?", "mile"),
            ("times", "{He} makes this whole trip {n} times. How many miles does {he} {go} in all?", "mile"),
            ("lose", "{friend} {goes} {n} miles less than {he} does. How many miles does {friend} {go}?", "mile"),
            ("missing", "{He} wants to {go} {n} miles in all. How many more miles must {he} {go}?", "mile"),
        ),
    )


@kind
def recipe(story: Story) -> None:
    """An ingredient to buy (at most 9 cups a piece): what else it is for, what is there already, packs."""
    story.cast()
    thing, ingredient = story.pick((("cake", "flour"), ("pizza", "flour"), ("pudding", "milk"), ("pie", "sugar")))
    story.words |= {"thing": thing, "things": plural(thing), "flour": ingredient}
    m = story.number(min(9, story.limit // 2))
    n = story.number(story.limit // m)
    story.say(
        "A {thing} needs {m} cups of {flour}. {name} wants to make {n} {things}.",
        "{name} wants to make {n} {things}, each with {m} cups of {flour}.",
        n=n,
        m=m,
    )
    story.tell(
        story.step(n, "*", m, "cup"),
        "cup",
        events=(
            ("gain", "{He} needs {n} more cups of {flour} for pancakes."),
            ("gain_groups", "{He} also needs {m} cups for each of {n} batches of waffles."),
            ("lose", "{He} already has {n} cups of {flour}."),
            ("lose", "{friend} gives {him} {n} cups of {flour}."),
            ("half", "A neighbor gives {him} half of the {flour} {he} still needs."),
        ),
        questions=("How many cups of {flour} must {he} buy?", "How many cups of {flour} does {name} have to buy?"),
        endings=(
            ("share", "{He} buys the {flour} {he} needs in packs of {n} cups. How many packs does {he} buy?", "pack"),
            ("times", "{He} buys the {flour} {he} needs for ${n} a cup. How many dollars does {he} pay?", "dollar"),
        ),
    )


@kind
def garden(story: Story) -> None:
    """Rows of flowers: some eaten or picked, more planted, bunches made."""
    story.cast()
    flower = story.noun("rose", "tulip", "lily", "daisy", "sunflower", "pansy")
    total = story.open_product(
        flower, "{name} plants {n} rows of {m} {things}.", "{name}'s garden has {n} rows with {m} {things} in each."
    )
    bunches = "{He} picks all the {things} in the garden and makes bunches of {n}. How many bunches does {he} make?"
    story.tell(
        total,
        flower,
        events=(
            ("gain", "Then {he} plants {n} more {things} by the fence."),
            ("gain_groups", "{He} also plants {n} beds of {m} {things} each."),
            ("lose", "A rabbit eats {n} {things}."),
            ("lose", "Then {he} picks {n} {things} for {friend}."),
            ("lose_groups", "Then {he} picks {m} {things} for each of {n} friends."),
            ("half", "Then {he} picks half of the {things} in the garden and sells them."),
        ),
        questions=("How many {things} are in the garden now?", "How many {things} does {his} garden have now?"),
        endings=(("share", bunches, "bunch"),),
    )


def open_tickets(story: Story) -> int:
    """Tickets at one price or, with three equations to spend, at one for adults and a lower one for children."""
    story.words |= {"zoo": story.pick(("zoo", "museum", "circus", "pool", "theater", "fair"))}
    if story.left < 3 or story.chance():
        return story.open_product(
            "dollar",
            "A ticket for the {zoo} costs ${m}. A group buys {n} tickets.",
            "A group of {n} people goes to the {zoo}. Each ticket costs ${m}.",
        )
    adults = story.number(story.limit // 3)
    price = story.number(story.limit // adults, low=3)
    child_price = story.number(price - 1)
    children = story.number((story.limit - adults * price) // child_price)
    story.say("A group of {n} adults and {m} children goes to the {zoo}.", n=adults, m=children)
    story.say(
        "Adults pay ${n} each and children ${m} each.",
        "It costs ${n} an adult and ${m} a child.",
        n=price,
        m=child_price,
    )
    parts = story.step(adults, "*", price, "dollar"), story.step(children, "*", child_price, "dollar")
    return story.step(parts[0], "+", parts[1], "dollar")


@kind
def tickets(story: Story) -> None:
    """What a visit costs a group: tickets, extras, discounts."""
    story.tell(
        open_tickets(story),
        "dollar",
        events=(
            ("gain", "They also pay ${n} for parking."),
            ("gain", "They also spend ${n} on snacks."),
            ("gain_groups", "They also buy {n} drinks for ${m} each."),
            ("lose", "A coupon saves them ${n}."),
            ("lose", "Their teacher pays ${n} of it."),
            ("half", "Then their school pays half of the cost."),
        ),
        questions=("How many dollars does the group pay?", "How many dollars does the group have to pay in all?"),
        endings=(("missing", "The group has ${n}. How many dollars are left after paying?", "dollar"),),
    )


@kind
def school(story: Story) -> None:
    """Children in a club: boys and girls, or groups; some join, some leave, teams are made."""
    story.words |= {"club": story.pick(("chess club", "choir", "summer camp", "drama club"))}
    if story.chance():
        total = story.open_sum(
            "child", "A {club} has {n} boys and {m} girls.", "There are {n} boys and {m} girls in a {club}."
        )
    else:
        total = story.open_product("child", "A {club} has {n} groups of {m} children.")
    story.tell(
        total,
        "child",
        events=(
            ("gain", "Then {n} more children join."),
            ("gain_groups", "Then {n} schools send {m} new children each."),
            ("lose", "Then {n} children leave."),
            ("lose", "In spring, {n} children move away."),
            ("lose_gain", "In the new year, {n} children leave and {m} join."),
            ("half", "Then half of the children leave."),
        ),
        questions=("How many children are in the {club} now?", "How many children does the {club} have now?"),
        endings=(
            ("share", "All the children now form teams of {n}. How many teams are there?", "team"),
            ("times", "Each child now needs {n} pencils. How many pencils do they need in all?", "pencil"),
        ),
    )


@kind
def fuel(story: Story) -> None:
    """Fuel in a tank: what trips use, refills, how far it still goes."""
    story.words |= {"truck": story.pick(("truck", "van", "tractor", "car", "bus"))}
    if story.chance():
        trips, each = story.factors(min(story.limit, story.max_value) - 1)
        full = story.number(low=trips * each + 1)
        story.say("A {truck} has {n} gallons of fuel.", "There are {n} gallons of fuel in a {truck}.", n=full)
        story.say("It makes {n} trips and uses {m} gallons on each.", n=trips, m=each)
        total = story.step(full, "-", story.step(trips, "*", each, "gallon"), "gallon")
    else:
        total = story.open_product("gallon", "A {truck}'s empty tank is filled with {n} cans of {m} gallons each.")
    story.tell(
        total,
        "gallon",
        events=(
            ("gain", "The driver adds {n} gallons."),
            ("gain_groups", "The driver adds {n} more cans of {m} gallons each."),
            ("lose", "A drive to the lake uses {n} gallons."),
            ("lose", "Then {n} gallons leak out."),
            ("lose_groups", "Then it uses {m} gallons a day for {n} days."),
            ("half", "A long drive uses half of the fuel in the tank."),
        ),
        questions=("How many gallons does it have now?", "How many gallons of fuel are in the tank now?"),
        endings=(("times", "It goes {n} miles on each gallon. How many miles can it still go?", "mile"),),
    )


@kind
def marbles(story: Story) -> None:
    """A collection that grows and shrinks."""
    story.cast()
    thing = story.noun("marble", "card", "sticker", "token", "button", "toy block")
    total = story.number(story.limit)
    story.say("{name} has {n} {things}.", "{name} starts with {n} {things}.", n=total)
    story.tell(
        total,
        thing,
        events=(
            ("gain", "{He} wins {n} {things} in a game."),
            ("gain", "{friend} gives {him} {n} {things}."),
            ("gain_groups", "Then {he} buys {n} bags of {m} {things}."),
            ("lose", "{He} loses {n} {things} on the way home."),
            ("lose", "{He} gives {friend} {n} {things}."),
            ("lose_groups", "Then {he} gives {n} friends {m} {things} each."),
            ("half", "Then {he} gives half of {his} {things} to {his} brother."),
            ("double", "Then {he} doubles the number of {things} {he} has."),
        ),
        questions=("How many {things} does {he} have now?", "How many {things} does {name} have in the end?"),
        endings=(
            ("share", "{He} puts all {his} {things} into jars of {n}. How many jars does {he} fill?", "jar"),
            ("gain", "{friend} now has {n} more {things} than {name}. How many {things} does {friend} have?", thing),
            ("missing", "{He} wants to have {n} {things}. How many more does {he} need?", thing),
        ),
    )


@kind
def temperature(story: Story) -> None:
    """Degrees of water, from 1 to 99, as it warms and cools."""
    story.limit = min(story.limit, 99)
    story.words |= {"pot": story.pick(("pot", "tank", "bath", "kettle"))}
    total = story.number(story.limit)
    story.say("The water in a {pot} is at {n} degrees.", "A {pot} holds water at {n} degrees.", n=total)
    story.tell(
        total,
        "degree",
        events=(
            ("gain", "It gets {n} degrees warmer in the sun."),
            ("gain", "A heater makes it {n} degrees warmer."),
            ("gain_groups", "For {n} minutes, it warms by {m} degrees a minute."),
            ("lose", "Ice cools it by {n} degrees."),
            ("lose", "In the wind, it gets {n} degrees colder."),
            ("lose_groups", "For {n} minutes, it cools by {m} degrees a minute."),
        ),
        questions=("How many degrees is the water now?", "At how many degrees is the water now?"),
        endings=(
            ("gain", "A glass of tea is {n} degrees warmer than that. At how many degrees is the tea?", "degree"),
            ("lose", "A glass of juice is {n} degrees colder than that. At how many degrees is the juice?", "degree"),
        ),
    )


def open_sale(story: Story) -> int:
    """A price with a part off (10%, 20% and 25% where max_value allows the number), or at half price."""
    percents = [(part, f"{100 // part}% off") for part in (10, 5, 4) if 100 // part <= story.max_value]
    part, offer = story.pick([*percents, (4, "a quarter off"), (3, "a third off"), (2, "half off")])
    story.words |= {"offer": offer}
    if part == 2 or (story.left >= 3 and story.chance()):
        total = story.open_product(
            "dollar", "{name} buys {n} {things} that usually cost ${m} each. Today they are {offer}."
        )
    else:
        total = part * story.number(story.max_value // part, low=1)
        story.say("{name} buys a {thing} that usually costs ${n}. Today it is {offer}.", n=total)
    saved = story.step(total, "/", part, "dollar")
    return saved if part == 2 else story.step(total, "-", saved, "dollar")


@kind
def sale(story: Story) -> None:
    """A lower price, extras, help, change."""
    story.cast()
    story.noun("coat", "lamp", "chair", "dress", "bag", "clock", "table", "bike")
    story.tell(
        open_sale(story),
        "dollar",
        events=(
            ("gain", "Delivery costs ${n} more."),
            ("gain", "{He} also buys a book for ${n}."),
            ("gain_groups", "{He} also buys {n} scarves for ${m} each."),
            ("lose", "A gift card pays for ${n} of the bill."),
            ("lose", "{friend} pays ${n} of the bill."),
        ),
        questions=("How many dollars does {name} pay?", "How many dollars does {name} have to pay in all?"),
        endings=(("missing", "{He} hands over ${n}. How many dollars does {he} get back?", "dollar"),),
    )


def open_feed(story: Story, food: str) -> int:
    """Animals (of one sort or two) times food each, a day or several."""
    two_sorts = story.chance()
    if two_sorts:
        animals = story.open_sum("animal", "{name} has {n} {animals} and {m} {others}.", high=story.limit // 2)
    else:
        animals = story.number(story.limit // 2)
        story.say("{name} has {n} {animals}.", n=animals)
    each = story.number(story.limit // animals)
    story.say("Each animal eats {n} {foods} a day.", "Every day, each animal eats {n} {foods}.", n=each)
    total = story.step(animals, "*", each, food)
    if two_sorts and (story.left == 0 or story.chance()):
        story.say("{He} needs {foods} for one day.")
        return total
    days = story.number(story.limit // total)
    story.say("{He} needs {foods} for {n} days.", n=days)
    return story.step(total, "*", days, food)


@kind
def feed(story: Story) -> None:
    """Food to buy for animals: what is needed, what is there already, sacks."""
    story.cast()
    animal, other, food = story.pick(
        (
            ("horse", "pony", "carrot"),
            ("rabbit", "hamster", "carrot"),
            ("pig", "goat", "apple"),
            ("cow", "goat", "turnip"),
        )
    )
    story.words |= {"animals": plural(animal), "others": plural(other), "foods": plural(food)}
    story.tell(
        open_feed(story, food),
        food,
        events=(
            ("gain", "{He} needs {n} more {foods} for a stew."),
            ("lose", "{He} already has {n} {foods}."),
            ("lose", "{friend} gives {him} {n} {foods}."),
            ("lose_groups", "Then {n} neighbors give {him} {m} {foods} each."),
        ),
        questions=("How many {foods} must {he} buy?", "How many {foods} does {name} have to buy?"),
        endings=(
            ("share", "{He} buys the {foods} {he} needs in sacks of {n}. How many sacks does {he} buy?", "sack"),
            ("times", "{He} buys the {foods} {he} needs for ${n} each. How many dollars does {he} pay?", "dollar"),
        ),
    )


@kind
def ribbon(story: Story) -> None:
    """A length in rolls: some used, some added, pieces cut."""
    story.cast()
    story.words |= {"ribbon": story.pick(("ribbon", "rope", "wire", "string"))}
    total = story.open_product(
        "yard",
        "{name} buys {n} rolls of {ribbon} with {m} yards each.",
        "{name} has {n} rolls of {m} yards of {ribbon}.",
    )
    story.tell(
        total,
        "yard",
        events=(
            ("gain", "{friend} gives {him} {n} more yards."),
            ("gain_groups", "Then {he} buys {n} rolls of {m} yards."),
            ("lose", "{He} uses {n} yards in the garden."),
            ("lose", "{He} gives {n} yards to {friend}."),
            ("lose_groups", "Then {he} ties up {n} boxes with {m} yards each."),
            ("half", "Then {he} sells half of {his} {ribbon}."),
        ),
        questions=("How many yards of {ribbon} does {he} have now?", "How many yards does {name} have in the end?"),
        endings=(
            ("share", "{He} cuts all {his} {ribbon} into pieces of {n} yards. How many pieces is that?", "piece"),
        ),
    )


DATASETS.add("word_math", DataSet(Config=Config, version=VERSION, describe=describe, sources=sources, load=load))
