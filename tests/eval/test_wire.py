"""What goes to an endpoint and what comes from it: keys, passwords, sizes and deadlines of replies."""

import gzip
import json
import logging
import socket
import sys
import threading
import time

import pytest
import wandb

import run_exp
from eval import BENCHMARKS
from eval.backends import Sampling, wire
from eval.backends.openai import Endpoint, EndpointError, OpenAIBackend
from eval.command import main
from flatlora.experiment import launch
from flatlora.runs.run_folder import RunFolder
from flatlora.runs.trackers import Wandb
from flatlora.utils.errors import ConfigError
from tests.loopback import Server

pytest.importorskip("openai")
GREEDY = Sampling(8)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("MY_KEY", "sk-mine")


def ask(url, **changes):
    options = {"first_wait_s": 0.01, "timeout_s": 3.0, "tries": 2, "concurrency": 1, **changes}
    return OpenAIBackend(Endpoint(url, "served", **options)).generate(["1 + 2"], GREEDY)[0]


def sent(server):
    return {name.lower(): value for name, value in server.seen[-1][2].items()}


@pytest.mark.parametrize(
    ("variable", "url", "key"),
    [
        (None, "https://api.openai.com/v1", "sk-secret"),
        (None, "http://api.openai.com/v1", None),
        (None, "https://api.openai.com.evil.example/v1", None),
        (None, "https://openai.example/v1", None),
        (None, "https://api.openai.com@evil.example/v1", None),
        (None, "http://127.0.0.1:8000/v1", None),
        (None, "https://paired.example/v1/", "sk-secret"),
        ("MY_KEY", "https://openai.example/v1", "sk-mine"),
        ("MY_KEY", "http://127.0.0.1:8000/v1", "sk-mine"),
        ("MY_KEY", "http://localhost:8000/v1", "sk-mine"),
        ("MY_KEY", "http://[::1]:8000/v1", "sk-mine"),
        ("MY_KEY", "http://127.0.0.1.evil.example/v1", None),
        ("MY_KEY", "http://10.0.0.7:8000/v1", None),
        ("NONE_SUCH", "https://api.openai.com/v1", None),
    ],
)
def test_a_key_goes_where_it_was_paired(variable, url, key, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://paired.example/v1")
    assert wire.key_of(variable, url) == key


def test_openais_key_and_account_are_not_sent_elsewhere(server):
    ask(server.url)
    assert "sk-secret" not in json.dumps(sent(server))
    assert "org-mine" not in json.dumps(sent(server))
    ask(server.url, key_variable="MY_KEY")
    assert sent(server)["authorization"] == "Bearer sk-mine"


def test_a_loopback_endpoint_is_not_asked_through_a_proxy(server, monkeypatch):
    proxy = Server()
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    ask(server.url, key_variable="MY_KEY")
    assert len(server.seen) == 1
    assert proxy.seen == []
    proxy.shutdown()
    proxy.server_close()


def test_a_key_does_not_follow_to_another_host(server):
    other = Server()
    server.script = [(307, {"location": f"{other.url}/completions"})]
    ask(server.url, key_variable="MY_KEY")
    assert "sk-mine" not in json.dumps([headers for *_, headers in other.seen])
    other.shutdown()
    other.server_close()


HOSTS = ["999.1.1.1", "a\u200db", "\uff4cocalhost", "😀`", "h/" + "v" * 70_000, "[::1", "h:99999", "h:0", "", "a b"]


@pytest.mark.parametrize("host", [*HOSTS, "xn--a"], ids=range(11))
def test_addresses_that_the_client_would_not_take_are_named(host):
    assert wire.url_error("judge_url", f"http://{host}/v1").startswith("Invalid judge_url=http://")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["base_url=http://10.0.0.7/v1", "base_key=MY_KEY"],
            "Invalid base_url=http://10.0.0.7/v1 with base_key=MY_KEY",
        ),
        (
            ["base_url=https://x/v1", "base_key=sk-mine"],
            "Invalid base_key: it must be the name of an environment variable",
        ),
        (["base_url=https://x/v1?api-version=1"], "it must not have ? or #"),
        (["base_url=http://***@x/v1"], "from a record, which has no password"),
    ],
)
def test_what_would_give_a_key_away_is_refused(words, message, tmp_path, capsys):
    assert main("gsm8k", ["m", "backend=openai", "score_only=true", f"out={tmp_path}", *words]) == 2
    reported = capsys.readouterr().err
    assert message in reported
    assert "sk-mine" not in reported


def test_a_key_that_no_request_can_have_is_named_and_blanks_around_one_are_left_out(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", " sk-mine\r\n")
    ask(server.url, key_variable="MY_KEY")
    assert sent(server)["authorization"] == "Bearer sk-mine"
    for key in ("sk-mi\nne", "sk-min\u00e9", "sk mine"):
        monkeypatch.setenv("MY_KEY", key)
        (error,) = wire.endpoint_errors("base_url", server.url, "base_key", "MY_KEY")
        assert error.message.startswith("Invalid base_key=MY_KEY: the key in it has blanks or letters")


def test_a_variable_that_is_not_there_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        assert wire.endpoint_errors("base_url", "https://x/v1", "base_key", "NONE_SUCH") == []
    assert "base_key=NONE_SUCH: there is no such environment variable" in caplog.text


def test_a_refused_request_says_that_no_key_was_sent(server):
    server.script = [(401, {})]
    with pytest.raises(EndpointError, match="status 401; no key was sent"):
        ask(server.url)


def raw_server(head: bytes, body: bytes, *, endless: bool = False) -> str:
    """The address of a server that says `head` and `body` to every request, the body again and again if asked."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + head + b"\r\n" + body)
                while endless:
                    connection.sendall(body)
                connection.close()
            except OSError:
                continue

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def test_a_compressed_reply_is_refused_before_it_is_unpacked():
    bomb = gzip.compress(bytes(1 << 28), 1)
    url = raw_server(b"content-encoding: gzip\r\ncontent-length: %d\r\n" % len(bomb), bomb)
    begun = time.monotonic()
    with pytest.raises(EndpointError, match=r"its reply is compressed \(gzip\) without a request for it"):
        ask(url)
    assert time.monotonic() - begun < 2.0


def test_no_compression_is_asked_for(server):
    ask(server.url)
    assert sent(server)["accept-encoding"] == "identity"


def test_a_reply_without_an_end_is_ended():
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    url = raw_server(b"transfer-encoding: chunked\r\n", chunk, endless=True)
    with pytest.raises(EndpointError, match="its reply has more than 16 MiB"):
        ask(url, timeout_s=30.0)


def with_password(url):
    return url.replace("://", "://me:pa55@")


def test_a_password_is_used_and_stays_out_of_failures(server):
    assert ask(with_password(server.url)).text == "3"
    assert sent(server)["authorization"].startswith("Basic ")
    server.refuse = lambda body: {"message": "pa55 is no password here, nor sk-mine"}
    for variable in (None, "MY_KEY"):
        with pytest.raises(EndpointError, match="refuses served") as caught:
            ask(with_password(server.url), key_variable=variable)
        assert "pa55" not in str(caught.value)
    assert "sk-mine" not in str(caught.value)


@pytest.mark.parametrize(
    "form",
    [
        *("http://me:pa55@h:99999/v1", "http://me:pa55@[h/v1", "http://me:pa55 x@h/v1", "http://me:pa/55@h"),
        *("me:pa55@h/v1", "me:pa55 x@h", "//me:pa55@h/v1", "http:me:pa55@h", "http:/me:pa55@h"),
    ],
)
def test_no_error_shows_a_password(form, capsys):
    assert main("gsm8k", ["m", "backend=openai", "score_only=true", f"base_url={form}", "concurrency=0"]) == 2
    assert "55" not in capsys.readouterr().err.replace("99999", "")
    words = [
        "eval=[mt_bench]",
        "eval.mt_bench.judge=j",
        f"+eval.mt_bench.judge_url='{form}'",
        "dry_run=true",
        "seed=-1",
    ]
    assert run_exp.main(words) == 2
    assert "pa55" not in "".join(capsys.readouterr())


def test_no_record_and_no_dry_run_has_a_password(tmp_path, capsys):
    words = ["eval=[mt_bench]", "eval.mt_bench.judge=j", "eval.mt_bench.judge_url=http://me:pa55@h/v1"]
    words += [f"results_root={tmp_path}"]
    assert run_exp.main([*words, "dry_run=true"]) == 0
    reported = "".join(capsys.readouterr())
    assert "http://***@h/v1" in "".join(reported.split())
    assert "pa55" not in reported
    experiment = run_exp.experiment_of(words)
    assert experiment.eval["mt_bench"].judge_url == "http://me:pa55@h/v1"  # the judge is asked with it
    assert "pa55" not in json.dumps(experiment.model_dump(mode="json"))
    folder = RunFolder.of(experiment)
    folder.begin(experiment)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"pa55" in path.read_bytes()]
    assert not folder.is_finished(experiment.model_copy(update={"resume": True}))


def test_wandb_gets_no_password(tmp_path, monkeypatch):
    """Its page has the command line."""
    reported = []
    monkeypatch.setattr("sys.argv", ["run_exp.py", "eval.mt_bench.judge_url=http://me:pa55@h/v1"])
    monkeypatch.setattr("wandb.init", lambda **settings: reported.append((settings, wandb.Settings()._args)))
    words = ["eval=[mt_bench]", "eval.mt_bench.judge=j", "eval.mt_bench.judge_url=http://me:pa55@h/v1"]
    Wandb(run_exp.experiment_of(words), tmp_path)
    ((settings, arguments),) = reported
    assert arguments == ["eval.mt_bench.judge_url=http://***@h/v1"]
    assert "pa55" not in str(settings)
    assert "pa55" in sys.argv[1]


def test_the_record_of_a_sweep_has_no_password(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run_exp.py"])
    asked = []
    monkeypatch.setattr(launch, "run", lambda suite, experiment, settings: asked.append(experiment) or 0)
    words = ["eval=[mt_bench]", "eval.mt_bench.judge=j", "eval.mt_bench.judge_url=http://me:pa55@h/v1", "seed=1,2"]
    run_exp.main(["-m", *words, f"results_root={tmp_path}"])
    assert [one.eval["mt_bench"].judge_url for one in asked] == ["http://me:pa55@h/v1"] * 2
    (record,) = tmp_path.rglob("multirun.yaml")
    assert "http://***@h/v1" in record.read_text()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"pa55" in path.read_bytes()]


def test_a_judges_key_is_for_the_address_that_it_was_named_with(monkeypatch):
    """A run's own judge_key does not go to another judge_url of the command line."""
    from types import SimpleNamespace

    from eval.command import _config

    saved = {"judge": "j", "judge_url": "https://a/v1", "judge_key": "MY_KEY"}
    place = SimpleNamespace(scored_with=saved)
    assert _config(BENCHMARKS["mt_bench"], lambda: place, {}).judge_key == "MY_KEY"
    assert _config(BENCHMARKS["mt_bench"], lambda: place, {"judge_url": "https://b/v1"}).judge_key is None
    assert (
        _config(BENCHMARKS["mt_bench"], lambda: place, {"judge_url": "https://b/v1", "judge_key": "MY_KEY"}).judge_key
        == "MY_KEY"
    )
    with pytest.raises(ConfigError, match="not the key itself"):
        _config(BENCHMARKS["mt_bench"], lambda: place, {"judge_key": "abc123"})
