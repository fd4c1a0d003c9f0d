"""The OpenAI backend against a server on loopback that misbehaves as reported."""

import json
import threading
import time

import pytest

from eval.backends import Sampling
from eval.backends.openai import Endpoint, EndpointError, OpenAIBackend
from eval.command import main
from flatlora.inputs.conversations import Chat, turns
from flatlora.inputs.rows import jsonl
from tests.loopback import FILTERED, refuse_as_gpt_5

pytest.importorskip("openai")


def backend(server, chat=False, **changes):
    options = {"first_wait_s": 0.01, "timeout_s": 1.0, **changes}
    return OpenAIBackend(Endpoint(server.url, "served", **options), chat=chat)


PROMPTS = [f"{i} + 1" for i in range(12)]
ANSWERS = [str(i + 1) for i in range(12)]
GREEDY = Sampling(8)


@pytest.mark.parametrize("chat", [False, True])
def test_answers_come_in_order_and_requests_say_what_is_wanted(server, chat):
    sampling = Sampling(8, temperature=0.8, top_p=0.95, stop=("\n",))
    found = backend(server, chat).generate(PROMPTS, sampling, range(100, 112))
    assert [one.text for one in found] == ANSWERS
    assert all(one.finished and one.tokens == 1 for one in found)
    path, body, _ = server.seen[0]
    assert path == ("/v1/chat/completions" if chat else "/v1/completions")
    assert {
        "model": "served",
        "max_tokens": 8,
        "temperature": 0.8,
        "top_p": 0.95,
        "stop": ["\n"],
    }.items() <= body.items()
    assert {body["seed"] for _, body, _ in server.seen} == set(range(100, 112))


def test_chats_are_sent_with_their_turns_and_tools(server):
    tools = [{"type": "function", "function": {"name": "add"}}]
    chat = Chat(turns("Add.", "1 + 1", "2", "3 + 1"), tools)
    one = backend(server)
    assert [answer.text for answer in one.generate([chat], GREEDY)] == ["4"]
    path, body, _ = server.seen[0]
    assert path == "/v1/chat/completions"
    assert (body["messages"], body["tools"]) == (chat.messages, tools)
    assert one.prompt_length(chat) == len("Add.1 + 123 + 1") + 6  # two line breaks between turns


@pytest.mark.parametrize(
    ("said", "kept"),
    [("    return x\n```\nDone.", "    return x"), ("```\ndef f(x):\n    return x\n```", None)],
)
def test_an_endpoint_is_sent_no_stops_of_a_body_alone(server, said, kept):
    server.script = [{"say": said}]
    sampling = Sampling(8, stop=("\n```", "\ndef "), stop_in_body=True)
    (answer,) = backend(server, chat=False, concurrency=1).generate(PROMPTS[:1], sampling)
    assert answer.text == (said if kept is None else kept)
    assert "stop" not in server.seen[0][1]


@pytest.mark.parametrize(
    "script",
    [
        ["garbage", "empty", "null"],
        [(429, {"retry-after": "0"}), (500, {}), (503, {})],
        ["drop", "drop"],
        ["hang"],
        ["trickle"],
        [(408, {}), (409, {}), (502, {}), "garbage", "drop"],
    ],
)
def test_what_fails_for_a_moment_is_asked_again(server, script):
    server.script = list(script)
    found = backend(server, concurrency=1, timeout_s=0.5).generate(PROMPTS[:3], GREEDY)
    assert [one.text for one in found] == ANSWERS[:3]
    assert len(server.seen) == 3 + len(script)


def test_a_server_that_says_when_is_asked_then(server):
    server.script = [(429, {"retry-after": "0.4"})]
    backend(server, concurrency=1).generate(PROMPTS[:1], GREEDY)
    assert server.times[1] - server.times[0] >= 0.4


@pytest.mark.parametrize(
    ("act", "tries", "reason"),
    [
        ((429, {}), 3, "failed 3 times, the last one: .*status 429"),
        ("garbage", 3, "failed 3 times, the last one"),
        ("hang", 2, "no complete answer within 0.3 s"),
        ((401, {}), 1, "refuses served: .*status 401"),
        ((404, {}), 1, "refuses served: .*status 404"),
    ],
)
def test_what_keeps_failing_ends_with_its_reason(server, act, tries, reason):
    server.script = [act] * 50
    with pytest.raises(EndpointError, match=reason):
        backend(server, concurrency=1, tries=tries, timeout_s=0.3).generate(PROMPTS[:1], GREEDY)
    assert len(server.seen) == tries


def test_nobody_at_home_is_reported():
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", tries=2, first_wait_s=0.01)
    with pytest.raises(EndpointError, match="failed 2 times, the last one: Connection error"):
        OpenAIBackend(endpoint).generate(["1"], GREEDY)


def test_no_more_are_under_way_than_allowed(server):
    backend(server, concurrency=3).generate(PROMPTS, GREEDY)
    assert 1 < server.most_at_once <= 3


def test_the_rate_is_kept(server):
    begun = time.monotonic()
    backend(server, requests_per_minute=600.0).generate(PROMPTS[:6], GREEDY)
    assert max(server.times) - begun >= 0.5  # five gaps of a tenth of a second


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    one = backend(server, key_variable="MY_KEY")
    one.generate(PROMPTS[:1], GREEDY)
    headers = {name.lower(): value for name, value in server.seen[0][2].items()}
    assert headers["authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(one.describe())


def test_after_a_failure_nothing_else_is_tried_again(server):
    server.script = [(400, {}), *["hang"] * 3, *[(500, {})] * 50]
    begun, one = time.monotonic(), backend(server, concurrency=4, timeout_s=0.5, first_wait_s=5.0)
    with pytest.raises(EndpointError, match="refuses served"):
        one.generate(PROMPTS, GREEDY)
    assert len(server.seen) == 4
    assert time.monotonic() - begun < 3.0
    server.script = []
    assert [found.text for found in one.generate(PROMPTS, GREEDY)] == ANSWERS  # it can be asked again


def test_an_interrupt_waits_for_nobody(server):
    server.script = ["hang"] * 12
    one, begun = backend(server, concurrency=4, timeout_s=100.0), time.monotonic()

    def work(item):
        if item == "quick":
            return item
        return one.generate([item], GREEDY)

    for item, _ in one.each(work, ["quick", *PROMPTS]):
        assert item == "quick"
        break  # nobody wants the rest
    assert time.monotonic() - begun < 1.5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


def test_a_benchmark_by_an_endpoint_goes_on_after_it_failed(server, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(jsonl({"x": f"Q: {i} + 1 ?\nA: ", "y": f"#### {i + 1}"} for i in range(20)))
    words = ["served", "backend=openai", f"base_url={server.url}", f"rows={rows}", f"out={tmp_path / 'out'}"]
    words += ["concurrency=4", "timeout=2"]
    server.script = ["answer"] * 9 + [(400, {})]  # the requests beside it are answered, and kept
    assert main("gsm8k", words) == 1
    assert "refuses served: " in (reported := capsys.readouterr().err)
    assert "the same command continues with the missing answers" in reported
    asked = len(server.seen)
    assert 10 <= asked < 20
    kept = (tmp_path / "out/predictions.partial.jsonl").read_text().count("\n")
    assert kept == asked - 1
    server.script = []
    assert main("gsm8k", words) == 0
    assert len(server.seen) - asked == 20 - kept
    score = json.loads((tmp_path / "out/score.json").read_text())
    assert score["metrics"]["exact_match"] == 1.0
    assert json.loads((tmp_path / "out/generation.json").read_text())["backend"] == "openai"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backend=openai"], "Missing base_url"),
        (["base_url=http://x/v1"], "Invalid base_url=http://x/v1 with backend=hf"),
        (["concurrency=2"], "Invalid concurrency=2 with backend=hf"),
        (["backend=openai", "base_url=http://x/v1", "batch_size=4"], "Invalid batch_size=4 with backend=openai"),
        (["backend=vllm", "device=cpu"], "Invalid device=cpu with backend=vllm"),
        (["backend=vllm"], "vLLM is not installed in this environment; create one with make vllm"),
        (["backend=tgi"], "Invalid backend='tgi': it must be one of 'hf', 'vllm' or 'openai'"),
    ],
)
def test_settings_of_backends_are_checked(words, message, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(jsonl([{"x": "Q", "y": "#### 1"}]))
    assert main("gsm8k", ["HuggingFaceTB/SmolLM2-135M-Instruct", f"rows={rows}", f"out={tmp_path / 'o'}", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_answer_that_stays_null_is_an_empty_one(server):
    server.script = ["null"] * 3
    found = backend(server, concurrency=1, tries=3).generate(PROMPTS[:2], GREEDY)
    assert [one.text for one in found] == ["", ANSWERS[1]]
    assert not found[0].finished


@pytest.mark.parametrize("url", ["127.0.0.1:80/v1", "", "ftp://x/v1", "http://[bad/v1", "http:///v1"])
def test_no_address_is_an_error(url, capsys):
    assert main("gsm8k", ["m", "backend=openai", f"base_url={url}", "rows=/nope"]) == 2
    assert "base_url" in capsys.readouterr().err.splitlines()[1]


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_is_not_sent_twice_what_it_refuses(server, chat, caplog):
    server.refuse = refuse_as_gpt_5
    one = backend(server, chat, concurrency=1)
    found = one.generate(PROMPTS, GREEDY, range(12))
    assert [answer.text for answer in found] == ANSWERS
    assert len(server.seen) == 12 + 3  # each parameter is refused once
    kept = [body.keys() & {"max_tokens", "max_completion_tokens", "temperature", "seed"} for _, body, _ in server.seen]
    assert kept[3:] == [{"max_completion_tokens"}] * 12
    assert server.seen[-1][1]["max_completion_tokens"] == GREEDY.max_new_tokens
    assert one.adapted == {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None}
    reported = [record.getMessage() for record in caplog.records if record.name == "eval.backends.openai"]
    assert len(reported) == 3
    assert "served does not support max_tokens" in reported[0]
    assert "max_completion_tokens is sent instead" in reported[0]
    assert "Only the default (1) value is supported): it is left out" in reported[1]


def test_requests_side_by_side_learn_it_too(server):
    server.refuse = refuse_as_gpt_5
    found = backend(server, chat=True, concurrency=6).generate(PROMPTS, GREEDY, range(12))
    assert [answer.text for answer in found] == ANSWERS
    assert len(server.seen) <= 12 + 3 * 6


@pytest.mark.parametrize(
    ("error", "left"),
    [
        ({"message": "[{'loc': ('body', 'seed'), 'msg': 'Extra inputs are not permitted'}]"}, "seed"),
        ({"message": "Unrecognized request argument supplied: seed", "param": "seed"}, "seed"),
        ({"message": "`temperature` is deprecated for this model.", "type": "invalid_request_error"}, "temperature"),
        ({"message": 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'}, "seed"),
        ({"message": "Model served does not support parameter seed."}, "seed"),
        ({"message": "Argument not supported on this model: stop"}, "stop"),
        ({"message": "openai does not support parameters: ['seed'], for model=served"}, "seed"),
        ({"message": "served models don't support temperature=0.0. Only temperature=1 is supported."}, "temperature"),
        ({"message": "property 'seed' is unsupported"}, "seed"),
        ({"message": "parameter stop is not supported"}, "stop"),
    ],
)
def test_other_servers_word_it_otherwise(server, error, left):
    server.refuse = lambda body: error if left in body else None
    one = backend(server, chat=True, concurrency=1)
    assert one.generate(PROMPTS[:1], Sampling(8, stop=("\n",)), [3])[0].text == ANSWERS[0]
    assert one.adapted == {left: None}


@pytest.mark.parametrize(
    "error",
    [
        {"message": "max_tokens is too large: 9000. This model supports at most 4096.", "param": "max_tokens"},
        {"message": "The model `served` does not support this API.", "param": "model"},
        {"message": "You requested a stop: this is not supported here."},
        {"message": "max_tokens=9000 is not supported; this model supports at most 4096"},
        {"message": "The model 'seed-oss' does not support this API"},
        {"message": "This model does not support images. Hint: set temperature to 1"},
    ],
)
def test_the_servers_own_reason_is_reported(server, error):
    server.refuse = lambda body: error
    with pytest.raises(EndpointError) as caught:
        backend(server, chat=True, concurrency=1).generate(PROMPTS[:1], GREEDY)
    assert str(caught.value).endswith(f"refuses served: status 400: {error['message'].rstrip('.')}")
    assert len(server.seen) == 1


def test_an_answer_is_no_longer_than_its_tokens_can_be(server):
    server.answer = lambda prompt: "a" * 10_000
    (answer,) = backend(server, concurrency=1).generate(PROMPTS[:1], Sampling(8))
    assert (answer.text, answer.finished) == ("a" * 8 * 128, False)
    server.answer = lambda prompt: "a" * 8 * 128
    (answer,) = backend(server, concurrency=1).generate(PROMPTS[:1], Sampling(8))
    assert (len(answer.text), answer.finished) == (8 * 128, True)


def test_what_a_server_says_has_no_control_characters(server):
    server.refuse = lambda body: {"message": "no \x1b]0;title\x07"}
    with pytest.raises(EndpointError, match=r"no \\x1b\]0;title\\x07$"):
        backend(server, concurrency=1).generate(PROMPTS[:1], GREEDY)


@pytest.mark.parametrize(
    "error",
    [
        FILTERED,
        {"message": "This model's maximum context length is 4096 tokens.", "code": "context_length_exceeded"},
        {"message": "Your request was rejected by the safety system.", "code": "moderation_blocked"},
        {"message": "Input data may contain inappropriate content.", "code": "data_inspection_failed"},
    ],
)
def test_a_refused_request_has_an_empty_answer_and_the_rest_goes_on(server, caplog, error):
    server.refuse = lambda body: error if body["messages"][-1]["content"] == PROMPTS[3] else None
    found = backend(server, chat=True).generate(PROMPTS, GREEDY)
    assert [one.text for one in found] == [*ANSWERS[:3], "", *ANSWERS[4:]]
    assert found[3].refusal == f"status 400: {error['message'].rstrip('.')}"
    assert not found[3].finished
    assert [one.refusal for one in found if one.text] == [None] * 11
    assert len(server.seen) == 12
    assert error["message"].rstrip(".") in caplog.text


def test_a_limit_that_no_request_keeps_ends_the_evaluation(server):
    error = {"message": "This model's maximum context length is 4096 tokens, and you requested 9000."}
    server.refuse = lambda body: error
    with pytest.raises(EndpointError, match="maximum context length"):
        backend(server, concurrency=1).generate(PROMPTS, GREEDY)
    assert len(server.seen) == 9


def test_what_an_endpoint_was_not_sent_stands_beside_its_answers(server, tmp_path):
    server.refuse = refuse_as_gpt_5
    rows = tmp_path / "rows.jsonl"
    rows.write_text(jsonl({"x": f"Q: {i} + 1 ?\nA: ", "y": f"#### {i + 1}"} for i in range(3)))
    words = ["served", "backend=openai", f"base_url={server.url}", f"rows={rows}", f"out={tmp_path / 'out'}"]
    assert main("gsm8k", words) == 0
    adapted = json.loads((tmp_path / "out/adapted.json").read_text())
    assert adapted == {"max_tokens": "max_completion_tokens", "temperature": None}
    seen = len(server.seen)
    assert main("gsm8k", words) == 0  # the same answers: what was left out makes no other settings of them
    assert len(server.seen) == seen
