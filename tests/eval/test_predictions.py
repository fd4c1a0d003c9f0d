"""predictions.jsonl: killed anywhere and resumed is the same file, and nothing finished is done again."""

import json
import os

import pytest

from eval import predictions
from eval.backends import Completion, Sampling
from flatlora.inputs.rows import read_jsonl
from flatlora.utils.errors import ConfigError

PROMPTS = [f"{'word ' * (7 * i % 5)}question {i}\u2028 ×" for i in range(11)]
REFERENCES = [f"#### {i}" for i in range(11)]


class Killed(Exception):
    pass


class Backend:
    """Answers depend on the batch's company, as greedy decoding in BF16 does; dies before batch `die_at`."""

    def __init__(self, die_at=None, batch_size=3, **identity):
        self.batch_size, self.die_at, self.identity = batch_size, die_at, identity
        self.batches = []

    def describe(self):
        return {"backend": "fake", "batch_size": self.batch_size, **self.identity}

    def prompt_length(self, prompt):
        return len(prompt.split())

    def generate(self, prompts, sampling, seeds=None):
        if len(self.batches) == self.die_at:
            raise Killed
        self.batches.append(tuple(prompts))
        texts = [f"{place}|{prompt}|\u2028\x85\n{sum(map(len, prompts))}" for place, prompt in enumerate(prompts)]
        return [Completion(text, sampling.max_new_tokens, place != 1) for place, text in enumerate(texts)]


def generate(folder, backend, prompts=PROMPTS, references=REFERENCES, max_new_tokens=5, **options):
    sampling = Sampling(max_new_tokens)
    return predictions.generate(backend, prompts, references, folder, sampling=sampling, **options)


@pytest.fixture
def whole(tmp_path):
    """Bytes of the uninterrupted file, and the batches that made it."""
    backend = Backend()
    return generate(tmp_path / "whole", backend).read_bytes(), backend.batches


def killed_at(folder, batch, **options):
    with pytest.raises(Killed):
        generate(folder, Backend(die_at=batch), **options)


def test_answers_that_were_cut_or_refused_are_counted_and_named():
    rows = [{"finished": True, "tokens": 4}] * 5 + [{"finished": False, "tokens": 8}] * 2
    assert predictions.answer_counts(rows) == {"unfinished": 2 / 7, "mean_tokens": 36 / 7}
    assert predictions.incomplete(predictions.answer_counts(rows[:5])) == []
    rows += [{"finished": False, "tokens": 0, "refusal": "status 400: a filter"}]
    counts = predictions.answer_counts(rows)
    assert counts == {"unfinished": 2 / 8, "refused": 1 / 8, "mean_tokens": 36 / 8}
    cut, refused = predictions.incomplete(counts)
    assert cut.startswith("25.0% of the answers were cut at max_new_tokens")
    assert refused == "12.5% of the answers were refused by the endpoint and count as wrong"
    assert predictions.answer_counts([]) == {"unfinished": None, "mean_tokens": None}


def test_rows_are_in_the_prompts_order_and_complete(tmp_path):
    rows = predictions.read(generate(tmp_path, Backend()))
    assert [row["index"] for row in rows] == list(range(11))
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["reference"] for row in rows] == REFERENCES
    assert all(prompt in row["completion"] for prompt, row in zip(PROMPTS, rows, strict=True))
    assert {row["tokens"] for row in rows} == {5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generation.json", "predictions.jsonl"]


def test_batches_are_of_like_length_longest_first(whole):
    lengths = [len(prompt.split()) for batch in whole[1] for prompt in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in whole[1]] == [3, 3, 3, 2]


@pytest.mark.parametrize("batch", [0, 1, 2, 3])
def test_killed_after_any_batch_and_resumed_is_never_killed(tmp_path, whole, batch):
    killed_at(tmp_path / "run", batch)
    assert not (tmp_path / "run" / "predictions.jsonl").exists()
    backend = Backend()
    assert generate(tmp_path / "run", backend).read_bytes() == whole[0]
    assert backend.batches == whole[1][batch:]


@pytest.mark.parametrize("cut", [1, 2, 30, 150, "one row", "two rows"])
def test_a_torn_last_line_costs_its_batch_alone_and_only_once(tmp_path, whole, cut):
    killed_at(tmp_path / "run", 2)
    partial = tmp_path / "run" / "predictions.partial.jsonl"
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    dropped = {"one row": len(lines[5]), "two rows": len(lines[4]) + len(lines[5])}.get(cut, cut)
    partial.write_bytes(b"".join(lines)[:-dropped])
    redone = 0 if cut == 1 else 1  # only the line's end is gone
    with pytest.raises(Killed):
        generate(tmp_path / "run", Backend(die_at=redone + 1))  # what it had torn, one batch more, and killed again
    backend = Backend()
    assert generate(tmp_path / "run", backend).read_bytes() == whole[0]
    assert backend.batches == whole[1][3:]


def test_a_finished_file_is_generated_never_again(tmp_path, whole):
    backend = Backend(die_at=0)
    assert generate(tmp_path / "whole", backend).read_bytes() == whole[0]
    assert backend.batches == []


CHANGES = {
    "batch size": {"backend": {"batch_size": 4}},
    "weights": {"backend": {"weights": "other"}},
    "length": {"max_new_tokens": 6},
    "fewer prompts": {"prompts": PROMPTS[:8], "references": REFERENCES[:8]},
    "another prompt": {"prompts": [*PROMPTS[:-1], "another"]},
    "order of prompts": {"prompts": PROMPTS[::-1], "references": REFERENCES[::-1]},
    "a reference": {"references": [*REFERENCES[:-1], "#### 99"]},
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_of_other_settings_or_prompts_is_put_aside(tmp_path, whole, change, finished, caplog):
    folder = tmp_path / ("whole" if finished else "run")
    if not finished:
        killed_at(folder, 2)
    name = "predictions.jsonl" if finished else "predictions.partial.jsonl"
    old = (folder / name).read_bytes()
    options = dict(CHANGES[change])
    identity = options.pop("backend", {})
    fresh = Backend(**identity)
    expected = generate(tmp_path / "fresh", fresh, **options).read_bytes()
    again = Backend(**identity)
    assert generate(folder, again, **options).read_bytes() == expected
    assert again.batches == fresh.batches
    assert (folder / name.replace(".jsonl", ".stale.jsonl")).read_bytes() == old
    assert "was made by another model, settings or prompts" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000])
@pytest.mark.parametrize("finished", [True, False])
def test_answers_of_an_unreadable_record_are_put_aside(tmp_path, whole, finished, content, caplog):
    folder = tmp_path / ("whole" if finished else "run")
    if not finished:
        killed_at(folder, 2)
    name = "predictions.jsonl" if finished else "predictions.partial.jsonl"
    old = (folder / name).read_bytes()
    (folder / "generation.json").write_bytes(content)
    assert generate(folder, Backend()).read_bytes() == whole[0]
    assert (folder / name.replace(".jsonl", ".stale.jsonl")).read_bytes() == old
    assert f"kept as {name.replace('.jsonl', '.stale.jsonl')}" in caplog.text
    assert json.loads((folder / "generation.json").read_text())["backend"] == "fake"


def changed(line, **values):
    return json.dumps(json.loads(line) | values).encode()


DAMAGES = {
    "no JSON": lambda line: line[:-9],
    "not UTF-8": lambda line: line[:-9] + b"\xff" + line[-8:],
    "no object": lambda line: b"[1]",
    "blank": lambda line: b"",
    "no index": lambda line: b"{}",
    "an index that is none": lambda line: changed(line, index="0"),
    "an index beyond": lambda line: changed(line, index=11),
    "a negative index": lambda line: changed(line, index=-1),
    "no text": lambda line: changed(line, completion=None),
    "another prompt": lambda line: changed(line, prompt="another"),
    "another reference": lambda line: changed(line, reference="#### 99"),
    "too deep": lambda line: b"[" * 100_000,
}


@pytest.mark.parametrize("name", ["predictions.jsonl", "predictions.partial.jsonl"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_put_aside_and_made_anew(tmp_path, whole, name, damage, caplog):
    folder = tmp_path / ("whole" if name == "predictions.jsonl" else "run")
    if folder.name == "run":
        killed_at(folder, 2)
    lines = (folder / name).read_bytes().split(b"\n")
    lines[1] = DAMAGES[damage](lines[1])
    (folder / name).write_bytes(b"\n".join(lines))
    backend = Backend()
    assert generate(folder, backend).read_bytes() == whole[0]
    assert backend.batches == whole[1]
    stale = name.replace(".jsonl", ".stale.jsonl")
    assert (folder / stale).read_bytes() == b"\n".join(lines)
    assert f"{folder / name} is damaged: kept as {stale}." in caplog.text


def flipped(data):
    """Each change of one bit that leaves a digit or a letter of an answer another one."""
    for place in range(0, len(data), 7):
        yield data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_no_flipped_bit_of_an_answer_passes(tmp_path, whole):
    path = tmp_path / "whole" / "predictions.jsonl"
    for content in flipped(whole[0]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"Broken (file|row)"):
            predictions.read(path)
    assert generate(tmp_path / "whole", Backend()).read_bytes() == whole[0]
    killed_at(tmp_path / "run", 2)
    partial = tmp_path / "run" / "predictions.partial.jsonl"
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for content in list(flipped(kept[partial.name]))[::11]:
        for name, data in kept.items():
            (tmp_path / "run" / name).write_bytes(data)
        partial.write_bytes(content)
        assert generate(tmp_path / "run", Backend()).read_bytes() == whole[0]
        (tmp_path / "run" / "predictions.jsonl").unlink()


@pytest.mark.parametrize("late", ["in the middle", "at the end"])
def test_answers_of_another_model_that_still_writes_there_are_none_of_this_one(tmp_path, late):
    """Two processes in one folder, which no lock kept apart, as on a disk that has none."""
    folder = tmp_path / "answers"
    wanted = generate(tmp_path / "new", Backend(weights="new")).read_bytes()
    steps = 2 if late == "in the middle" else 4

    class Overwritten(Backend):
        """While it answers, the folder is emptied and a new model begins to answer there."""

        def generate(self, prompts, sampling, seeds=None):
            if len(self.batches) == steps - 1:
                for path in folder.iterdir():
                    path.unlink()
                with pytest.raises(Killed):
                    generate(folder, Backend(weights="new", die_at=1))
            found = super().generate(prompts, sampling, seeds)
            return [one._replace(text=f"old {one.text}") for one in found]

    generate(folder, Overwritten(weights="old"))
    assert generate(folder, Backend(weights="new")).read_bytes() == wanted


def test_answers_of_other_weights_than_their_runs_are_named(tmp_path):
    path = generate(tmp_path / "eval" / "gsm8k", Backend(weights="of-before"))
    assert len(predictions.read(path)) == 11
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "weights_sha256": "of-now"}))
    with pytest.raises(ConfigError, match=r"answers of other weights \(of-before\) than those of .* \(of-now\)"):
        predictions.read(path)
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "weights_sha256": "of-before"}))
    assert len(predictions.read(path)) == 11


def test_a_prompt_without_a_token_is_an_error(tmp_path):
    backend = Backend()
    with pytest.raises(ConfigError, match=r"Invalid prompt in row 2: .* no token"):
        generate(tmp_path / "run", backend, ["one", " "], ["1", "2"])
    assert not (tmp_path / "run").exists()
    assert backend.batches == []


def test_more_prompts_than_before_are_asked_in_their_own_batches(tmp_path, whole):
    generate(tmp_path / "run", Backend(), PROMPTS[:4], REFERENCES[:4])
    assert generate(tmp_path / "run", Backend()).read_bytes() == whole[0]


def test_progress_counts_rows_also_those_of_before(tmp_path):
    seen = []
    killed_at(tmp_path, 2, on_progress=lambda done, total, rows: seen.append((done, total, len(rows))))
    assert seen == [(0, 11, 0), (3, 11, 3), (6, 11, 3)]
    seen.clear()
    generate(tmp_path, Backend(), on_progress=lambda done, total, rows: seen.append((done, total, len(rows))))
    assert seen[0] == (6, 11, 0)
    assert seen[-1] == (11, 11, 2)
    assert sum(rows for *_, rows in seen) == 11


def test_no_prompts_make_an_empty_file(tmp_path):
    assert predictions.read(generate(tmp_path, Backend(), [], [])) == []


def test_what_made_the_file_is_recorded(tmp_path):
    generate(tmp_path, Backend(weights="abc"))
    recorded = json.loads((tmp_path / "generation.json").read_text())
    assert recorded.items() >= {"backend": "fake", "batch_size": 3, "weights": "abc", "max_new_tokens": 5}.items()


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="generate the answers first"):
        predictions.read(tmp_path / "predictions.jsonl")


def test_rows_that_are_gone_are_missed(tmp_path, whole):
    """A cut at a line's end leaves a file that looks whole."""
    path = generate(tmp_path / "cut", Backend())
    lines = [f"{line}\n" for line in path.read_text().split("\n")[:-1]]
    for kept in (lines[:-1], []):
        path.write_text("".join(kept))
        with pytest.raises(ConfigError, match=rf"has {len(kept)} of {len(lines)} rows; run the same command without"):
            predictions.read(path)
    path.write_text("".join(lines)[:-5])
    with pytest.raises(ConfigError, match=r"fix it, or run the same command without score_only=true for the missing"):
        predictions.read(path)
    assert generate(tmp_path / "cut", Backend()).read_text() == "".join(lines)


def test_what_was_put_aside_is_not_written_over(tmp_path):
    for limit in (5, 6, 7):
        generate(tmp_path, Backend(), max_new_tokens=limit)
    assert sorted(path.name for path in tmp_path.glob("*stale*")) == [
        "predictions.stale-2.jsonl",
        "predictions.stale.jsonl",
    ]


def test_half_a_character_is_kept(tmp_path):
    class Half(Backend):
        def generate(self, prompts, sampling, seeds=None):
            return [Completion("\ud800 is half", 1, True) for _ in prompts]

    assert predictions.read(generate(tmp_path, Half()))[0]["completion"] == "\ud800 is half"


def sparse(path):
    path.touch()
    os.truncate(path, 200 << 30)


@pytest.mark.parametrize(
    ("make", "reason"), [(os.mkfifo, "it is a pipe, not a file"), (sparse, "it has 204,800 MiB, and at most 4,096 are")]
)
def test_answers_that_no_memory_holds_or_nobody_writes_are_named(tmp_path, make, reason):
    make(tmp_path / "predictions.jsonl")
    make(tmp_path / "outcomes.jsonl")
    with pytest.raises(ConfigError, match=f"Cannot read .*predictions.jsonl: {reason}"):
        predictions.read(tmp_path / "predictions.jsonl")
    with pytest.raises(ConfigError, match=f"Cannot read .*outcomes.jsonl: {reason}.*; move it away, and it is made"):
        predictions.appended_rows(tmp_path / "outcomes.jsonl")
    assert predictions.appended_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system(tmp_path, end):
    (tmp_path / "rows.jsonl").write_bytes(end.join(['\ufeff{"x": "a\u2028b"}', "", '{"x": 2}', ""]).encode())
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"x": "a\u2028b"}, {"x": 2}]
