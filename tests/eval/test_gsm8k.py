"""The GSM8K scorer: numbers as people write them, the first marked answer, no mercy for what cannot be read."""

import json
import re
import shutil
import time
from decimal import Decimal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import eval as benchmarks
from eval import command, gsm8k
from eval.backends import Completion
from eval.gsm8k import parse_answer, score
from flatlora.inputs.conversations import Chat, turns
from flatlora.inputs.rows import jsonl, prompt_of, read_jsonl
from flatlora.utils.errors import ConfigError
from tests.conftest import write_split

REAL_TEST = Path(__file__).parents[2].parent / "shared/data/openai/gsm8k/main/test.jsonl"

MARKED = [
    ("#### 42", "42"),
    ("####42", "42"),
    ("3 * 14 = 42\n#### 42", "42"),
    ("#### 1,000", "1000"),  # the published pattern reads 1
    ("#### 1,000,000", "1000000"),
    ("#### 1,234,567.89", "1234567.89"),
    ("#### -1,234.5", "-1234.5"),
    ("#### -5", "-5"),
    ("#### −5", "-5"),  # U+2212
    ("#### +7", "7"),
    ("#### $42.50", "42.50"),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### $ 42", "42"),
    ("#### 42.", "42"),
    ("#### 42.\n", "42"),
    ("#### 3.0", "3"),
    ("#### 007", "7"),
    ("#### .5", "0.5"),
    ("#### 50%", "50"),
    ("#### 18 apples and 7 pears", "18"),
    ("#### **18**", "18"),
    ("#### The answer is 18.", "18"),
    ("##### 18", "18"),
    ("It is 5 or 6.\n#### 7", "7"),
    ("#### 1,00", "1"),
    ("#### ٣", "3"),
    ("#### ٣.٤", "3.4"),
    ("#### ²", None),
    ("#### 1e400", "1"),  # no exponents: GSM8K has none, and a unit may follow a number
    ("#### 18kg", "18"),
    ("#### NaN", None),
    ("#### Infinity", None),
    # A base model rambles on after its answer; what follows is not its answer.
    ("#### 18\n\nQ: Tom has 3 pens. How many?\nA: #### 3", "18"),
    ("#### 18 #### 3", "18"),
    ("#### 18\n5 more", "18"),
    # A sum comes to what stands behind its last "=".
    ("#### 3 + 4 = 7", "7"),
    ("#### $3 + $4 = $7 per day", "7"),
    ("#### 3 apples + 4 apples = 7 apples", "7"),
    ("#### (3 + 4) * 2 = 14", "14"),
    ("#### 3 + 4 = 7 + 2 = 9", "9"),
    ("#### $1,000 / 4 = $250", "250"),
    (r"#### 3 \times 4 = 12", "12"),
    ("#### 5 (because 2 + 2 = 4)", "5"),
    ("#### 20% of 50 = 10", "10"),
    ("#### 3 people x 6 eggs = 18 eggs", "18"),
    ("#### 3 times 6 = 18", "18"),
    ("#### 36 divided by 2 equals 18", "18"),
    ("#### 18 of the 24 (24 - 6 = 18)", "18"),
    # Words come first: what they announce.
    ("#### Total = 3 + 4 = 7", "7"),
    ("#### Total for 3 days: 42", "42"),
    ("#### The total for 3 days is 42 dollars", "42"),
    ("#### Answer: 18 (it is 3 each)", "18"),
    ("#### **Answer:** 18", "18"),
    (r"#### \boxed{18}", "18"),
    (r"#### \(18\)", "18"),
    (r"#### 18\text{ apples}", "18"),
    (r"#### \boxed{18\text{ cm}}", "18"),
    (r"#### $\boxed{\mathbf{18}}$", "18"),
    (r"#### 1{,}800", "1800"),
    (r"#### \boxed{1\,234{,}567.5}", "1234567.5"),
    (r"#### \$18", "18"),
    ("#### $18/hour", "18"),
    # A part of something else is no number.
    ("#### 1/2", None),
    (r"#### \frac{1}{2}", None),
    (r"#### $2\sqrt{3}$", None),
    ("#### 3^2", None),
    ("#### 2**3", None),
    ("#### 2:30", None),
    ("#### 10-15", None),
    ("#### 3 + 4", None),
    # Alone on its line, a mark announces what is alone on the next.
    ("####\n42", "42"),
    ("####\n\n**$42.00**\n\nQ: 5?", "42"),
    # Headings of a longer answer announce nothing.
    ("#### Step 1: Add 3 and 4\n3 + 4 = 7\n#### 7", "7"),
    ("#### Step 1: Add 3 and 4\nShe has 7 apples.", "7"),
    ("#### Step One: 3+4\nThat is 7.", "7"),
    ("#### Schritt 1: 3 + 4\nDas sind 7.", "7"),
    ("#### a) Count 3\nb) So 7", "7"),
    ("#### Part A: 3\nHe has 3.\n#### Part B: 4\nHe has 4, and 7 in all.", "7"),
    ("#### First 5 days\nShe lays 42.", "42"),
    ("#### Total number of eggs in 2 days\n42", "42"),
    ("#### Cost of 2 shirts: $30\n#### Cost of a hat: $15\n#### Total: $45", "45"),
    ("#### 1. 3 + 4 = 7\n#### 2. 7 * 2 = 14\nThe answer is 14.", "14"),
    ("#### Answer: 18\n\nQ: Tom has 3 pens.", "18"),
    ("#### So, the final answer is 18\n\nQ: Tom has 3 pens.", "18"),
    ("#### 5 1/2", None),
    ("#### 5 and 1/2", None),
    ("#### 1⁄2", None),
    ("#### 5½", None),
    ("#### 10²", None),
    ("#### 50 1/4-pound burgers", "50"),
    # Words over nothing but the next question are an answer, and so is a sentence.
    ("#### The total is 18\n\nQ: Tom has 3 pens.", "18"),
    ("#### Total: $45\n\nQ: Tom has 3 pens.", "45"),
    ("#### x = 18\nQ: 3", "18"),
    ("#### The final numerical answer is 18.\n### Question 2: 5?", "18"),
    ("#### She has 18 apples left.\n\nLet me check: 16 + 2 = 18, and 18 / 3 = 6.", "18"),
    ("#### none\n\nQ: Tom has 3 pens.", None),
    ("#### Answer to step 1: 3 + 4\n7 * 2 = 14\n#### 14", "14"),
    ("#### The answer in 2 steps\nThen 7 * 2\n#### 14", "14"),
    ("#### Answer:\n\n18\n\nQ: Tom has 3 pens.", "18"),
    ("#### 1. Count\n5\n#### 2. Add\n6\n#### 11", "11"),
    ("#### Solution\n3 * 4 = 12\n#### 12\n\n#### 13", "12"),
    ("#### Final Answer\n\nThe final answer is 42.", "42"),
    # A draft is no answer.
    ("<think>\n#### 5\n</think>\n#### 6", "6"),
    ("<think>\n#### 5", None),
    # A mark that announces nothing is no answer, whatever stands around it.
    ("#### ", None),
    ("5 + 5 = 10\n####", None),
    ("10\n#### ten", None),
    ("####\n\nQ: Tom has 3 pens.", None),
    ("#### \n#### 5", None),
]
UNMARKED = [
    ("12 apples and 7 pears", "7"),  # the last number
    ("The answer is 18.", "18"),
    ("The answer is 1,234.", "1234"),
    ("-5", "-5"),
    ("−5", "-5"),
    ("x=-5", "-5"),
    ("(-5)", "-5"),
    ("-.5", "-0.5"),
    ("$.50", "0.5"),
    ("$42.50", "42.5"),
    ("That is $18$.", "18"),
    (r"\boxed{18}", "18"),
    (r"\boxed{1{,}800}", "1800"),
    (r"$\{1{,}2\}$", "2"),
    ("50%", "50"),
    ("1,000,000", "1000000"),
    ("3.0", "3"),
    # A minus between numbers takes away, a dash before an item lists it.
    ("5-3 = 2", "2"),
    ("5-3", "3"),
    ("10 - 7", "7"),
    ("2+2=4.", "4"),
    ("8-", "8"),
    ("10-15", "15"),
    ("We have:\n- 18 apples", "18"),
    ("We pay:\n- $18", "18"),
    # Grouped in threes or not one number: a list of two.
    ("10,5", "5"),
    ("1, 2, 3", "3"),
    ("1,2,3", "3"),
    ("2:30", "30"),
    ("1/2", "2"),
    ("version A18 of 7.", "7"),
    ("the 1st", "1"),
    ("no answer", None),
    ("A18", None),
    ("", None),
    ("...", None),
    ("$", None),
    ("-", None),
]


@pytest.mark.parametrize(("text", "number"), MARKED + UNMARKED)
def test_parse_answer(text, number):
    assert parse_answer(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("sign", ["", "-", "−"])
@pytest.mark.parametrize("mark", ["", "#### "])
def test_a_number_of_ten_thousand_digits_is_read_exactly(mark, sign):
    number, near = "9" * 10_000, "9" * 9_999 + "8"
    read = parse_answer(mark + sign + number)
    assert str(read) == ("-" if sign else "") + number
    assert read != parse_answer(mark + sign + near)


@pytest.mark.parametrize("mark", ["", "#### "])
@pytest.mark.parametrize(
    "piece",
    ["1,", "1,111", "-", "$ ", "9", ".", " ", "####", "#### A\n", "a ", "1+1=", "**", r"\boxed{", "1 x ", "<think>"],
)
def test_a_long_answer_is_read_in_time_that_grows_with_its_length(piece, mark):
    started = time.process_time()
    parse_answer(mark + piece * 100_000)
    gsm8k.parse_reference(mark + piece * 100_000)
    assert time.process_time() - started < 5  # quadratic time would be minutes


@pytest.mark.parametrize("number", ["42", "-1,234.5", "$1,000,000.00", "0", "0.125", "987654321987654321987654321"])
def test_text_around_a_number_changes_nothing(number):
    plain = parse_answer(number)
    assert plain is not None
    for text in (
        f"#### {number}",
        f"So 3 + 4 = 7.\n#### {number}",
        f"#### {number}.",
        f"I get {number}",
        f"= {number}.",
    ):
        assert parse_answer(text) == plain, text


def lm_eval_flexible(text):
    """lm-eval's flexible-extract and what its exact_match takes off, as its gsm8k.yaml has them."""
    import lm_eval
    import yaml
    from lm_eval.filters.extraction import RegexFilter

    folder = Path(lm_eval.__file__).parent / "tasks/gsm8k"
    settings = yaml.safe_load((folder / "gsm8k.yaml").read_text())
    (filters,) = [one["filter"] for one in settings["filter_list"] if one["name"] == "flexible-extract"]
    options = {key: value for key, value in filters[0].items() if key != "function"}
    ((found,),) = RegexFilter(**options).apply([[text]], [{}])
    for pattern in settings["metric_list"][0]["regexes_to_ignore"]:
        found = re.sub(pattern, "", found)
    return found


ORDINARY = [
    ("The answer is 18.", "18"),
    ("So she has 3 + 4 = 7 apples.", "7"),
    ("That is $1,234.50.", "1234.50"),
    ("x = -5", "-5"),
    ("10 - 7", "7"),
    ("1/2", "2"),
    ("It takes 2:30", "30"),
    (r"\boxed{18}", "18"),
    ("#### 42", "42"),
    ("#### 1,000", "1000"),
    ("#### 3 + 4 = 7", "7"),
    ("####\n42", "42"),
    ("#### Step 1: Add\n3 + 4 = 7\n#### 7", "7"),
    ("#### Step 1: Add 3\nShe has 7", "7"),
    ("no number", None),
]
DOCUMENTED = [  # text, ours, lm-eval's
    ("#### 18\n\nQ: 5 pens?\nA: 3", "18", "3"),
    ("10\n#### ten", None, "10"),
    ("#### 1/2", None, "2"),
    ("<think>5", None, "5"),
    ("5-3", "3", "-3"),
    ("1,00", "0", "100"),
    (r"$1{,}800$", "1800", "800"),
    ("A18", None, "18"),
    ("It is 5...", "5", "5.."),
    ("5 and so on ...", "5", ".."),
]


def test_lm_evals_flexible_filter_differs_where_it_is_documented():
    pytest.importorskip("lm_eval")
    for text, number in ORDINARY:
        assert lm_eval_flexible(text) == (number or "[invalid]"), text
        assert parse_answer(text) == (None if number is None else Decimal(number)), text
    for text, ours, theirs in DOCUMENTED:
        assert lm_eval_flexible(text) == theirs, text
        assert parse_answer(text) == (None if ours is None else Decimal(ours)), text


REFERENCES = [
    ("#### 18", "18"),
    ("#### -1,234.50", "-1234.50"),
    ("#### 18 apples", "18"),
    ("#### 3 + 4 = 7", "7"),
    ("The answer is 42.", "42"),
    (r"so $x = \boxed{18}$", "18"),
    (r"\boxed{1{,}800}", "1800"),
    ("50%", "50"),
    ("#### 1/2", None),
    ("#### 1 1/2", None),
    ("#### 18 and 7", None),
    (r"$2\sqrt{3}$", None),
    (r"The answer is \boxed{\frac{1}{2}}", None),
    ("#### 2:30", None),
    ("10-15", None),
    ("3^2", None),
    ("x^2+3", None),
    ("5x", None),
    ("#### 1e400", None),
    (r"3\pi", None),
    ("#### 5 %", "5"),
    ("#### $5 per day", "5"),
    ("#### 60 miles/hour", "60"),
    ("#### 12 m.", "12"),
    ("Half of 48 is 24. Altogether that is 48 + 24 = 72 clips.", "72"),
    ("48 / 2 = 24 in May.\nThe answer is: 72", "72"),
    ("So she makes $18.", "18"),
    ("She has 18 left", "18"),
    ("#### 18€", "18"),
    ("#### ¥18", "18"),
    ('#### "18"', "18"),
    ("#### [18],", "18"),
    ("#### 18 (rounded)", "18"),
    ("#### 18 m²", "18"),
    *[
        (mark + text, None)
        for mark in ("", "#### ")
        for text in (
            *("2½", "1⁄2", "10²", "5!", "±5", "> 5", ">= 5", "≥ 5", "~= 5", "about 5", "ln 5", "sqrt(3)", r"\sqrt 3"),
            *(
                "5 π",
                "2 pi",
                "5 x",
                "3 million",
                "$3 million",
                "2 dozen",
                "5 squared",
                "1.234.567",
                "1,23,456",
                "5 1/2",
            ),
            *("x=3 or x=-3", "a = 3, b = 4", "5 or more", "5 to the third", "minus 5", "5 (or 6)"),
            *("1 third", "3 quarters", "5/three", "5 divided by three", "5 feet six inches", "5 less than ten", "$5 M"),
            *("5 point two", "5 out of ten", "5 lakh", "5 at least", "0.333...", "5 ft. 6 in.", "3! 2", "approx. 5"),
        )
    ],
]


@pytest.mark.parametrize(("text", "number"), REFERENCES)
def test_a_reference_is_read_whole_or_refused(text, number):
    assert gsm8k.parse_reference(text) == (None if number is None else Decimal(number))
    rows = [{"x": "Q", "y": text}]
    if number is not None:
        gsm8k.check_rows(rows, "FILE", gsm8k.Config())
        return
    with pytest.raises(ConfigError, match="Invalid answer in FILE, row 1: gsm8k scores a final number"):
        gsm8k.check_rows(rows, "FILE", gsm8k.Config())
    for parser in ("strict", "math_verify"):
        with pytest.raises(ValueError, match="has no number that can be read whole in its reference"):
            gsm8k.is_right(row(text, "#### 1/3"), parser)


def row(reference, completion, *, finished=True, tokens=4):
    return {"reference": reference, "completion": completion, "finished": finished, "tokens": tokens}


def test_score_counts_rows_not_luck():
    result = score(
        [
            row("x\n#### 1,000", "1000"),
            row("x\n#### 18", "#### 18\n\nQ: ...\nA: #### 3", tokens=40, finished=False),
            row("x\n#### 18", "#### 17"),
            row("x\n#### 0", "I do not know", tokens=0),  # the published scorer calls this right
            row("x\n#### 5", ""),
        ]
    )
    assert result["n"] == 5
    assert result["scorer"] == f"gsm8k/{gsm8k.SCORER_VERSION}"
    assert result["metrics"].pop("math_verify", 2 / 5) == 2 / 5  # where that package is installed
    assert result["metrics"] == pytest.approx(
        {"n": 5, "exact_match": 2 / 5, "strict": 2 / 5, "unparsed": 2 / 5, "unfinished": 1 / 5, "mean_tokens": 52 / 5}
    )


def test_score_does_not_depend_on_the_order_and_leaves_rows_alone():
    rows = [row("#### 1", "1"), row("#### 2", "none", finished=False, tokens=9), row("#### 3", "4")]
    before = json.dumps(rows)
    assert score(rows) == score(rows[::-1])
    assert json.dumps(rows) == before


def test_a_reference_without_a_number_raises_and_names_the_row():
    broken = row("x\n#### none", "5") | {"index": 7}
    with pytest.raises(ValueError, match="Row 7 has no number that can be read whole in its reference"):
        score([row("#### 1", "1"), broken])


def test_check_rows_finds_before_a_run_what_score_would_refuse():
    good, config = {"x": "Q", "y": "#### 1"}, gsm8k.Config()
    gsm8k.check_rows([good], "FILE", config)
    gsm8k.check_rows([], "FILE", config)
    with pytest.raises(ConfigError) as caught:
        gsm8k.check_rows([good, {"x": "Q", "y": "5\n#### none"}, good, {"x": "Q", "y": ""}], "FILE", config)
    (message,) = caught.value.errors
    assert message.startswith("Invalid answer in FILE, row 2 (and 1 more): gsm8k scores a final number")
    assert "none can be read whole in '5\\n#### none'; end it in \"#### NUMBER\", or leave the row out." in message


def test_there_are_benchmarks():
    assert "gsm8k" in benchmarks.BENCHMARKS


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_every_benchmark_has_the_contract(name):
    benchmark = benchmarks.BENCHMARKS[name]
    assert {"max_rows", "batch_size"} <= benchmark.Config.model_fields.keys()
    assert benchmark.kind in ("text", "image", "text_to_image")
    assert callable(benchmark.benchmark_rows) == (benchmark.kind == "text")  # pictures come with a run
    assert f"python -m eval.{name}" in benchmark.help
    assert set(benchmark.scoring) <= benchmark.Config.model_fields.keys()


def test_no_rows_are_no_score():
    result = score([])
    assert result["n"] == 0
    assert result["metrics"].pop("n") == 0
    assert set(result["metrics"].values()) == {None}


class Echo:
    """Answers a prompt "… = N\\nA:  " by N."""

    batch_size = 2

    def describe(self):
        return {"backend": "echo"}

    def prompt_length(self, prompt):
        return len(prompt)

    def generate(self, prompts, sampling, seeds=None):
        return [Completion(f"#### {p.split('=')[1].split()[0]}"[: sampling.max_new_tokens], 1, True) for p in prompts]


def test_run_writes_predictions_and_their_score(tmp_path):
    rows = [{"x": f"Q: n = {i}\nA: ", "y": f"#### {i if i != 2 else 99}"} for i in range(5)]
    result = gsm8k.run(Echo(), rows, tmp_path, gsm8k.Config(max_rows=4))
    assert result["metrics"]["exact_match"] == 3 / 4
    assert json.loads((tmp_path / "score.json").read_text()) == result
    found = read_jsonl(tmp_path / "predictions.jsonl")
    assert [one["index"] for one in found] == [0, 1, 2, 3]
    assert found[3]["prompt"] == "Q: n = 3\nA:  "  # as in training: x and a blank
    (tmp_path / "score.json").unlink()
    assert gsm8k.score_file(tmp_path / "predictions.jsonl", gsm8k.Config()) == result
    assert (tmp_path / "score.json").is_file()


def test_a_torn_or_missing_predictions_file_is_not_scored(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(ConfigError, match="is not there: generate the answers first"):
        gsm8k.score_file(path, gsm8k.Config())
    lines = [json.dumps(row("#### 1", "1")) for _ in range(3)]
    path.write_text("\n".join(lines)[:-5])
    with pytest.raises(ConfigError, match="line 3: not JSON"):
        gsm8k.score_file(path, gsm8k.Config())
    assert not (tmp_path / "score.json").exists()


def answer_row(place, **changes):
    return {"index": place, "prompt": "Q"} | row("#### 1", "1") | changes


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"reference": "no number"}, "Row 1 has no number that can be read whole in its reference 'no number'. Fix"),
        ({"reference": None}, "row 2 has no valid reference; generate again"),
        ({"completion": 5, "tokens": "4"}, "row 2 has no valid completion, tokens; generate again"),
        ({"finished": "yes"}, "row 2 has no valid finished;"),
        ({"index": 2}, "row 2 has index 2, not 1;"),  # a row is missing
        ({"index": -1}, "row 2 has a negative index;"),
    ],
)
def test_a_predictions_file_with_a_broken_row_is_an_error(tmp_path, second, words):
    path = tmp_path / "predictions.jsonl"
    path.write_text(jsonl([answer_row(0), answer_row(1, **second)]))
    with pytest.raises(ConfigError) as caught:
        gsm8k.score_file(path, gsm8k.Config())
    (message,) = caught.value.errors
    assert message.startswith(f"Broken file {path}: {words}")
    assert not (tmp_path / "score.json").exists()


@pytest.mark.skipif(not REAL_TEST.is_file(), reason=f"{REAL_TEST} is not there")
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_real_reference_is_read_and_right_against_itself(split):
    answers = [one["answer"] for one in read_jsonl(REAL_TEST.with_name(f"{split}.jsonl"))]
    assert len(answers) == {"train": 7473, "test": 1319}[split]
    for answer in answers:  # a second, plain reading: all after the mark, without separators
        number = Decimal(answer.split("####")[1].strip().replace(",", ""))
        assert parse_answer(answer) == gsm8k.parse_reference(answer) == number, answer
    result = score([row(answer, answer) for answer in answers])
    assert result["metrics"]["exact_match"] == 1.0
    assert result["metrics"]["unparsed"] == 0.0


@pytest.mark.parametrize(
    ("completion", "strict", "flexible"),
    [
        ("#### 1,000", True, True),
        ("so $\\frac{2000}{2}$", False, True),
        ("The answer is \\boxed{1000}.", True, True),
        ("about 10^3", False, True),
        ("999", False, False),
        ("no number", False, False),
        ("#### 1000\nQ: 5 + 5?\nA: #### 10", True, True),
        ("#### none of these\n1000", True, True),
        ("1000.0", True, True),
        ("-1000", False, False),
        ("#### Step 1: 5 + 5 = 10\n#### 1000", True, True),
        ("####\n1000", True, True),
        ("<think>#### 1000</think>#### 5", False, False),
    ],
)
def test_both_parsers_read_the_same_answers(completion, strict, flexible):
    pytest.importorskip("math_verify")
    one = row("#### 1,000", completion)
    assert gsm8k.is_right(one, "strict") is strict
    assert gsm8k.is_right(one, "math_verify") is flexible
    scored = score([one], "math_verify")
    assert scored["metrics"]["exact_match"] == scored["metrics"]["math_verify"] == float(flexible)
    assert scored["metrics"]["strict"] == float(strict)
    assert scored["versions"]["math_verify"]


def test_a_parser_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr(gsm8k, "_has_math_verify", lambda: False)
    (reported,) = [error.message for error in gsm8k.Config(parser="math_verify").rule_errors()]
    assert "the package math-verify is not installed" in reported
    assert "math_verify" not in score([row("#### 1", "1")])["metrics"]


def test_own_rows_have_the_template_that_is_asked_for(tmp_path):
    write_split(tmp_path, "openai/gsm8k", "main", "test", [{"question": "1 + 1?", "answer": "#### 2"}])
    for template, beginning in (("qa", "Q: 1 + 1?"), ("alpaca", "Below is"), ("none", "1 + 1?")):
        (asked,) = gsm8k.benchmark_rows(str(tmp_path), gsm8k.Config(template=template))
        assert asked["x"].startswith(beginning)


def test_own_rows_as_chats_have_shots_as_turns(tmp_path):
    for name in ("train", "test"):
        write_split(tmp_path, "openai/gsm8k", "main", name, [{"question": f"{name}?", "answer": "#### 2"}])
    config = gsm8k.Config(template="chat", system="Add.", num_fewshot=1)
    (asked,) = gsm8k.benchmark_rows(str(tmp_path), config)
    assert asked["messages"] == turns("Add.", "train?", "#### 2", "test?", "#### 2")
    assert prompt_of(asked) == Chat(asked["messages"][:-1])
    gsm8k.check_rows([asked], "here", config)
    (error,) = gsm8k.Config(system="Add.").rule_errors()
    assert "Invalid eval.gsm8k.system='Add.' with template=qa: only chats have a system prompt" in error.message


def test_a_model_whose_ends_are_a_list_answers_as_transformers_ends_it(tiny_model_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("Q: n = 1\nA:  ", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": tokenizer.pad_token_id}

    def said():
        model = AutoModelForCausalLM.from_pretrained(folder)
        return model.generate(**asked, **options)[0, asked["input_ids"].shape[1] :].tolist()

    whole = said()
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, whole[3]]).save_pretrained(folder)
    cut = said()
    assert len(cut) < len(whole) == 8
    (tmp_path / "rows.jsonl").write_text(jsonl([{"x": "Q: n = 1\nA: ", "y": "#### 1"}]))
    words = [
        str(folder),
        f"rows={tmp_path / 'rows.jsonl'}",
        f"out={tmp_path / 'out'}",
        "device=cpu",
        "max_new_tokens=8",
    ]
    assert command.main("gsm8k", words) == 0
    (answer,) = read_jsonl(tmp_path / "out/predictions.jsonl")
    assert (answer["tokens"], answer["finished"]) == (len(cut) - 1, True)
    made = json.loads((tmp_path / "out/generation.json").read_text())
    assert made["ends"] == sorted({tokenizer.eos_token_id, whole[3]})


def test_shots_are_the_first_rows_of_train_in_the_template(tmp_path, tiny_model_folder):
    split = lambda name, count: [{"question": f"{name} {i}?", "answer": f"So {i}.\n#### {i}"} for i in range(count)]  # noqa: E731
    for name, count in (("train", 5), ("test", 2)):
        write_split(tmp_path, "openai/gsm8k", "main", name, split(name, count))
    config = gsm8k.Config(num_fewshot=2)
    rows = gsm8k.benchmark_rows(str(tmp_path), config)
    assert rows[1]["x"] == ("Q: train 0?\nA:  So 0.\n#### 0\n\nQ: train 1?\nA:  So 1.\n#### 1\n\nQ: test 1?\nA: ")
    gsm8k.check_rows(rows, "here", config)
    with pytest.raises(ConfigError, match="num_fewshot=2 with the rows of here"):
        gsm8k.check_rows(gsm8k.benchmark_rows(str(tmp_path), gsm8k.Config()), "here", config)
    with pytest.raises(ConfigError, match="has 5 rows here"):
        gsm8k.benchmark_rows(str(tmp_path), gsm8k.Config(num_fewshot=6))
    words = ["num_fewshot=2", "max_new_tokens=4", f"data_root={tmp_path}", "device=cpu", f"out={tmp_path / 'out'}"]
    assert command.main("gsm8k", [str(tiny_model_folder), *words]) == 0
    answers = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in answers] == [f"{row['x']} " for row in rows]
    assert json.loads((tmp_path / "out/score.json").read_text())["num_fewshot"] == 2
    assert json.loads((tmp_path / "out/generation.json").read_text())["stop"] == ["\n\nQ:"]
