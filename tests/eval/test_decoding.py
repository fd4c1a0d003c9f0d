"""Decoding over fixed buffers gives the tokens of transformers' `generate`, with and without CUDA graphs."""

import logging

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from eval.backends import Sampling, decoding, hf
from eval.backends.decoding import Decoder, reason_against
from eval.backends.hf import HFBackend
from flatlora.config.sections import ModelConfig
from flatlora.models.processors import load_tokenizer
from flatlora.utils.precision import choose_precision
from tests.conftest import tiny_llama, tiny_lora
from tests.scripted import ScriptedLM

CUDA = torch.device("cuda")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PROMPTS = [
    "Q: 3 + 4?\nA: ",
    "Q",
    "A longer question, so that others are padded.",
    "Q: 1?",
    "12 34",
    "a",
]
TOKENS = 40


class Reran:
    """Stands for a graph: each replay runs the call again and overwrites the first result."""

    def __init__(self, compute):
        self.compute, self.result = compute, None

    def replay(self):
        self.result = self.compute().clone() if self.result is None else self.result.copy_(self.compute())
        return self.result


class FakeCapture:
    """Captures as a GPU does, on a CPU."""

    def __init__(self):
        self.labels = []

    def __call__(self, compute, label, *, warm_ups):
        self.labels.append(label)
        for _ in range(warm_ups):
            compute()
        return Reran(compute)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    config = ModelConfig(name="tiny", hub_id=str(tiny_model_folder), family="causal_lm")
    return load_tokenizer(config)  # with a padding token


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """The prompts and answers of this file take several widths, and lengthen the buffers."""
    for name, value in {"_LEAST_WIDTH": 16, "_LEAST_LENGTH": 32}.items():
        monkeypatch.setattr(decoding, name, value)


@pytest.fixture(params=["exact", "captured"])
def capture(request):
    return FakeCapture() if request.param == "captured" else None


def backend_of(model, tokenizer, capture):
    backend = HFBackend(model, tokenizer, batch_size=len(PROMPTS))
    backend._decoder = Decoder(hf.adapted_model(model), capture)
    return backend


def both(backend, sampling, seeds=None, prompts=PROMPTS):
    """(answers of the decoder, of `generate`); each ends with the token that ended it."""
    ids = [backend.prompt_ids(prompt) for prompt in prompts]
    with torch.inference_mode():
        found = backend._by_decoder(ids, sampling, seeds, lambda token: None)
        expected = backend._by_generate(ids, sampling, seeds, lambda token: None)
    return found, [up_to_end(answer, backend.ends) for answer in expected]


def up_to_end(ids, ends):
    """`generate` fills the rows that are done."""
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]


def gpt2(vocab_size):
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=128, n_embd=16, n_layer=2, n_head=2))


def opt(vocab_size):
    shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=vocab_size, max_position_embeddings=128, num_attention_heads=2, **shape)
    return OPTForCausalLM(config)


def eager_llama(vocab_size):
    return tiny_llama(vocab_size, attn_implementation="eager")


@pytest.mark.parametrize(
    "make", [tiny_lora, gpt2, *(pytest.param(make, marks=pytest.mark.extra) for make in (tiny_llama, eager_llama, opt))]
)
def test_greedy_tokens_are_those_of_generate(tokenizer, capture, make):
    torch.manual_seed(3)
    model = make(vocab_size=len(tokenizer))
    assert reason_against(hf.adapted_model(model)) is None
    backend = backend_of(model, tokenizer, capture)
    found, expected = both(backend, Sampling(TOKENS))
    assert found == expected
    assert sum(len(answer) == TOKENS for answer in found) > 1
    # Batches that follow, of fewer rows and other lengths, use the same buffers.
    for prompts in (PROMPTS[:3], ["Q", "A"], PROMPTS[2:]):
        found, expected = both(backend, Sampling(TOKENS), prompts=prompts)
        assert found == expected
    if capture:
        assert len(capture.labels) > 3


def ends_of(answers):
    """Tokens that end the rows after different numbers of tokens, and one row never."""
    kept = set(answers[0])
    ends = {token for count, answer in enumerate(answers[1:], 1) for token in answer[3 * count :][:1]}
    return frozenset(ends - kept)


@pytest.mark.parametrize("sampling", [Sampling(TOKENS), Sampling(TOKENS, temperature=1.5, top_p=0.9)])
def test_rows_that_are_done_leave_the_batch(tokenizer, capture, sampling, monkeypatch):
    backend = backend_of(tiny_lora(vocab_size=len(tokenizer)), tokenizer, capture)
    seeds = list(range(10, 10 + len(PROMPTS))) if sampling.temperature else None
    backend.ends = frozenset()
    whole, _ = both(backend, sampling, seeds)
    backend.ends = ends_of(whole)
    rows, step = [], Decoder.step

    def counted(decoder, tokens):
        rows.append(len(tokens))
        return step(decoder, tokens)

    monkeypatch.setattr(Decoder, "step", counted)
    found, expected = both(backend, sampling, seeds)
    assert found == expected == [up_to_end(answer, backend.ends) for answer in whole]
    assert len({len(answer) for answer in found}) > 2
    running = [sum(len(answer) > count for answer in found) for count in range(1, len(rows) + 1)]
    if capture is None:
        assert rows == running
    else:
        assert all(count <= kept < 2 * count or kept == len(PROMPTS) for count, kept in zip(running, rows, strict=True))
    assert rows[-1] == 1 < rows[0]


def test_stops_end_rows_as_in_generate(tokenizer, capture):
    backend = backend_of(tiny_llama(vocab_size=len(tokenizer)), tokenizer, capture)
    whole, _ = both(backend, Sampling(TOKENS))
    texts = [tokenizer.decode(answer) for answer in whole]
    stop = tuple(text[len(text) // 2 :][:3] for text in texts[1:4])
    found, expected = both(backend, Sampling(TOKENS, stop=stop))
    assert found == expected
    assert len({len(answer) for answer in found}) > 1
    answers = backend.generate(PROMPTS, Sampling(TOKENS, stop=stop))
    assert [answer.finished for answer in answers] == [len(answer) < TOKENS for answer in found]


@pytest.mark.parametrize("tokens", [1, 2])
def test_short_answers(tokenizer, capture, tokens):
    backend = backend_of(tiny_llama(vocab_size=len(tokenizer)), tokenizer, capture)
    found, expected = both(backend, Sampling(tokens))
    assert found == expected
    assert {len(answer) for answer in found} == {tokens}


def test_autocast_has_the_tokens_of_generate(tokenizer, capture):
    """Keys and values may differ in their dtype: rotary embeddings widen keys."""
    model = tiny_lora(vocab_size=len(tokenizer))
    backend = backend_of(model, tokenizer, capture)
    backend.precision = choose_precision("bfloat16", "float32", "cpu")
    found, expected = both(backend, Sampling(3), prompts=["Q: 3 + 4?\nA: "])
    assert found == expected


def sliding(vocabulary=96):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=vocabulary, num_hidden_layers=1, sliding_window=8, **shape))


def rwkv():
    return RwkvForCausalLM(RwkvConfig(vocab_size=96, hidden_size=16, num_hidden_layers=2, context_length=64))


def prompt_tuned():
    return get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (sliding, "its cache has DynamicSlidingWindowLayer"),
        (rwkv, "transformers has no static cache for it"),
        (prompt_tuned, "it is not one of transformers' language models"),
        (lambda: ScriptedLM({}, 96, 2), "it has its own generate"),
        (lambda: tiny_llama(attn_implementation="flex_attention"), "its attention is flex_attention"),
    ],
)
def test_other_models_take_generate(make, reason):
    assert reason_against(hf.adapted_model(make())) == reason


def test_the_reason_is_logged_once(tokenizer, caplog):
    backend = HFBackend(sliding(len(tokenizer)).eval(), tokenizer, batch_size=2)
    hf._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert backend.generate(["Q: 1?", "Q"], Sampling(2))[0].tokens == 2
    message = "MistralForCausalLM decodes with transformers' generate, as its cache has DynamicSlidingWindowLayer."
    assert [record.getMessage() for record in caplog.records if record.name == hf.__name__] == [message]


@pytest.mark.parametrize(("fits", "late"), [(2, False), (2, True), (0, False)])
def test_fewer_rows_at_a_time_once_memory_has_run_out(tokenizer, monkeypatch, caplog, fits, late):
    backend = HFBackend(tiny_llama(vocab_size=len(tokenizer)), tokenizer, batch_size=len(PROMPTS))
    sampling = Sampling(TOKENS, temperature=1.0)
    expected, reported = backend.generate(PROMPTS, sampling, range(6)), []
    name = "step" if late else "start"
    method = getattr(Decoder, name)

    def exhausted(decoder, *arguments):
        rows = len(arguments[0])
        if rows > fits and (not late or decoder._written == decoder._most - 1):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return method(decoder, *arguments)

    monkeypatch.setattr(Decoder, name, exhausted)
    backend.on_token = reported.append
    with caplog.at_level(logging.WARNING):
        assert backend.generate(PROMPTS, sampling, range(6)) == expected
    assert "batch_size=6: the cache of 6 rows does not fit into the GPU's memory; 3 rows at a time" in caplog.text
    assert (backend._decoder is None) == (fits == 0)
    assert backend._most_rows == 1
    assert reported[-1] == TOKENS
    if not late:
        assert reported == sorted(reported)
    assert backend.generate(PROMPTS, sampling, range(6)) == expected


def test_likelihoods_have_the_memory_of_the_buffers(tokenizer):
    backend = HFBackend(tiny_llama(vocab_size=len(tokenizer)), tokenizer, batch_size=2)
    backend.generate(["Q"], Sampling(3))
    assert backend._decoder._buffers is not None
    backend.log_likelihoods(["Q"], [["a", "b"]])
    assert backend._decoder._buffers is None


class TestOnAGPU:
    pytestmark = gpu

    @pytest.fixture(params=[tiny_llama, tiny_lora])
    def backend(self, request, tokenizer):
        return HFBackend(request.param(vocab_size=len(tokenizer)).to(CUDA), tokenizer, batch_size=len(PROMPTS))

    def test_captured_steps_have_the_tokens_of_generate(self, backend):
        """In FP32. In BF16, sums of another order may decide between logits that are as good as equal."""
        sampled = Sampling(TOKENS, temperature=1.5, top_p=0.9)
        for sampling, seeds in ((Sampling(TOKENS), None), (sampled, range(6))):
            for ends in (frozenset(), None):
                backend.ends = ends_of(both(backend, sampling, seeds)[0]) if ends is None else ends
                for prompts in (PROMPTS, PROMPTS[:3], PROMPTS[1:]):
                    found, expected = both(backend, sampling, seeds and seeds[: len(prompts)], prompts)
                    assert found == expected
        graphs = backend._decoder._graphs
        assert backend._decoder._capture is not None
        assert len(graphs) > 3

    def test_answers_in_bf16_are_the_same_each_time(self, tokenizer):
        """Graphs that outlive the autocast of their capture, and memory that others have used since."""
        backend = HFBackend(
            tiny_lora(torch.bfloat16, vocab_size=len(tokenizer)).to(CUDA),
            tokenizer,
            batch_size=len(PROMPTS),
            precision=choose_precision("auto", "bfloat16", CUDA),
        )
        backend.ends = frozenset()
        first = backend.generate(PROMPTS, Sampling(TOKENS))
        noise = [torch.full((1 << 20,), torch.nan, device=CUDA) for _ in range(32)]
        del noise
        assert backend.generate(PROMPTS, Sampling(TOKENS)) == first
        backend._decoder.release()
        assert backend.generate(PROMPTS, Sampling(TOKENS)) == first

    def test_a_step_that_cannot_be_captured_runs_from_the_host(self, backend, caplog):
        layer = hf.adapted_model(backend.model).model.layers[0]
        layer.register_forward_hook(lambda module, arguments, output: output if output[0].sum().item() else None)
        with caplog.at_level(logging.WARNING):
            found, expected = both(backend, Sampling(TOKENS))
        assert found == expected
        assert caplog.text.count("No CUDA graph of a step of 6 rows") == 1
        assert backend._decoder._capture is None
        assert torch.randn(2, device=CUDA).isfinite().all()  # a failed capture has given the random generator back
