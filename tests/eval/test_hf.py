"""Greedy decoding is the largest logit at every step, whatever the model's own generation config asks for."""

import copy
import itertools
import json
import logging

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5ForConditionalGeneration,
)

from eval import predictions
from eval.answers import without_draft
from eval.backends import Completion, Sampling, cut_at
from eval.backends.hf import HFBackend, SeededDraw, context_of
from eval.backends.tokenized import end_ids
from flatlora.inputs.chats import ChatEncoder
from flatlora.inputs.conversations import Chat
from flatlora.utils.errors import ConfigError
from tests.conftest import tiny_llama, tiny_lora
from tests.scripted import ScriptedLM, continuation, llama2_like_tokenizer

OWN = {
    "repetition penalty": {"repetition_penalty": 1e-3},  # below 1 it rewards, which a model that repeats nothing shows
    "suppressed tokens": {"suppress_tokens": list(range(0, 40_000, 2))},
    "sampling": {"do_sample": True, "temperature": 50.0},
    "beams": {"num_beams": 3, "length_penalty": 5.0},
    "a forced end": {"forced_eos_token_id": 7},
    "at least": {"min_new_tokens": 6, "exponential_decay_length_penalty": (1, 3.0)},
}


def largest_logits(model, ids, count):
    """The slow and obvious way: no cache, one row, no `generate`."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_greedy_is_the_largest_logit(tokenizer, name, adapted):
    model = (tiny_lora if adapted else tiny_llama)(vocab_size=len(tokenizer)).eval()
    own = GenerationConfig(**OWN[name])
    for module in model.modules():
        if "generation_config" in vars(module):
            module.generation_config = own
    ids = tokenizer("Q: 3 + 4?\nA: ")["input_ids"]
    expected = largest_logits(model, ids, 8)
    assert tokenizer.eos_token_id not in expected
    (answer,) = HFBackend(model, tokenizer, batch_size=1).generate(["Q: 3 + 4?\nA: "], Sampling(8))
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert (answer.tokens, answer.finished) == (8, False)
    assert model.generation_config is own  # as it was


def test_a_failed_call_leaves_the_models_own_config(tokenizer, monkeypatch):
    model = tiny_llama(vocab_size=len(tokenizer))
    own, before = model.generation_config, json.dumps(model.generation_config.to_dict(), default=str)
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        HFBackend(model, tokenizer, batch_size=1).generate(["Q"], Sampling(2))
    assert model.generation_config is own
    assert json.dumps(own.to_dict(), default=str) == before


DRAWN = Sampling(6, temperature=1.5, top_p=0.9)


def test_a_row_draws_the_same_whatever_stands_beside_it(tokenizer):
    backend = HFBackend(tiny_llama(vocab_size=len(tokenizer)), tokenizer, batch_size=4)
    prompts, seeds = ["Q: 1?", "Q: a longer one, padded?", "Q: 1?", "Q: 1?"], [5, 6, 7, 5]
    together = [one.text for one in backend.generate(prompts, DRAWN, seeds)]
    alone = [backend.generate([p], DRAWN, [s])[0].text for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert together[0] == together[3] != together[2]


def test_draws_follow_the_nucleus_of_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -4.0])
    draws = 4000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        probabilities = (logits / temperature).softmax(0)
        if top_p < 1:
            before = probabilities.cumsum(0) - probabilities  # they are in order already
            probabilities = probabilities * (before < top_p)
            probabilities /= probabilities.sum()
        processor = SeededDraw(Sampling(1, temperature, top_p), range(draws))
        drawn = processor(None, logits.expand(draws, -1)).argmax(1).bincount(minlength=4) / draws
        assert torch.allclose(drawn, probabilities, atol=0.03)
        assert ((probabilities == 0) <= (drawn == 0)).all()


def test_global_generators_are_left_alone(tokenizer):
    backend = HFBackend(tiny_llama(vocab_size=len(tokenizer)), tokenizer, batch_size=1)
    before = torch.get_rng_state()
    backend.generate(["Q"], DRAWN, [3])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("text", "kept"), [("ab\nQ: c", "ab"), ("Q: x", ""), ("none", "none")])
def test_answers_end_before_the_first_stop(text, kept):
    assert cut_at(text, ["\nQ:", "Q:"])[0] == kept


def test_generation_stops_at_a_stop(tokenizer):
    model = tiny_llama(vocab_size=len(tokenizer))
    backend = HFBackend(model, tokenizer, batch_size=2)
    (whole, other) = backend.generate(["Q: 3 + 4?\nA: ", "Q"], Sampling(8))
    stop = whole.text[3:5]
    assert stop.strip()
    (found, _) = backend.generate(["Q: 3 + 4?\nA: ", "Q"], Sampling(8, stop=(stop,)))
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.finished
    assert found.tokens < whole.tokens or whole.text.endswith(stop)
    assert other.tokens == 8


def test_tokens_move_the_count_of_rows(tokenizer, tmp_path):
    reported = []
    backend = HFBackend(tiny_llama(vocab_size=len(tokenizer)), tokenizer, batch_size=2)
    predictions.generate(
        backend,
        ["Q: 1", "Q: 2", "Q: 3"],
        ["1", "2", "3"],
        tmp_path,
        sampling=Sampling(4),
        on_progress=lambda done, total, _: reported.append((done, total)),
    )
    done = [count for count, _ in reported]
    assert done == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3]  # before; ⅖ … 8⁄5 of two rows, then two; ⅕ … ⅘ of one, then three
    assert {total for _, total in reported} == {3}
    assert backend.on_token is None


def test_the_head_s_weight_is_not_copied_for_each_row(tokenizer):
    """torch would expand it to rows × d × V for a last place that is a view."""
    model = tiny_llama(vocab_size=len(tokenizer))
    backend = HFBackend(model, tokenizer, batch_size=8)
    ids = torch.arange(40).view(8, 5)
    with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as profile:
        logits = backend.model(input_ids=ids, logits_to_keep=1).logits
    products = [
        event.input_shapes
        for event in profile.events()
        if event.name in ("aten::mm", "aten::bmm") and any(len(tokenizer) in shape for shape in event.input_shapes)
    ]
    assert [sorted(map(len, shapes)) for shapes in products] == [[2, 2]]
    with torch.inference_mode():
        torch.testing.assert_close(logits[:, 0], model(input_ids=ids).logits[:, -1])


@pytest.mark.parametrize("adapted", [False, True])
def test_every_end_that_the_model_declares_ends_an_answer(tokenizer, adapted):
    model = (tiny_lora if adapted else tiny_llama)(vocab_size=len(tokenizer)).eval()
    prompt = "Q: 3 + 4?\nA: "
    asked = tokenizer(prompt, return_tensors="pt")
    said = largest_logits(model, asked["input_ids"][0].tolist(), 8)
    for module in model.modules():
        if "generation_config" in vars(module):
            module.generation_config = GenerationConfig(eos_token_id=[said[3], tokenizer.eos_token_id])
    end = said.index(said[3])
    # As transformers itself ends it.
    (whole,) = model.generate(**asked, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    assert whole[asked["input_ids"].shape[1] :] == said[: end + 1]
    backend = HFBackend(model, tokenizer, batch_size=2)
    (answer, other) = backend.generate([prompt, "Q"], Sampling(8))
    before = asked["input_ids"][0].tolist()
    expected = tokenizer.decode(before + said[:end]).removeprefix(tokenizer.decode(before))
    assert answer == Completion(expected, end, True)
    assert backend.describe()["ends"] == sorted({said[3], tokenizer.eos_token_id})
    assert other.tokens <= 8


def test_ends_are_all_that_are_declared():
    assert end_ids(2, [7, 8]) == {2, 7, 8}
    assert end_ids(None, 2) == {2}
    assert end_ids(None, None) == frozenset()


@pytest.fixture(scope="module")
def llama2_like(tmp_path_factory):
    lines = ["def f(x):", "    return [y for y in x]", "Q: 3 + 4?", "The answer is 7 .", "            deep"] * 20
    return llama2_like_tokenizer(tmp_path_factory.mktemp("llama2-like"), lines, pieces=320)


def said(tokenizer, prompt, answer, *, stop=(), end=True):
    ids = continuation(tokenizer, prompt, answer)
    ids += [tokenizer.eos_token_id] if end else []
    model = ScriptedLM({tuple(tokenizer(prompt)["input_ids"]): ids}, len(tokenizer), tokenizer.eos_token_id)
    (found,) = HFBackend(model, tokenizer, batch_size=1).generate([prompt], Sampling(64, stop=stop))
    return found, len(ids) - end


@pytest.mark.parametrize(
    "answer", ["    return x\n", " 7 .\n", "            deep", "7", "\n\n    x", "é ü", "  ", "\tx", "<s> is text"]
)
def test_an_answer_keeps_the_blanks_that_it_begins_with(llama2_like, answer):
    prompt = "def f(x):\n"
    found, tokens = said(llama2_like, prompt, answer)
    assert found == Completion(answer, tokens, True)
    assert llama2_like.decode(continuation(llama2_like, prompt, answer)) != answer or not answer.startswith(" ")


def test_tags_of_thinking_parts_stay_in_an_answer_though_they_are_special(llama2_like):
    """Magistral's; without them, a scorer would read the draft."""
    tokenizer = copy.deepcopy(llama2_like)
    tokenizer.add_tokens(["[THINK]", "[/THINK]", "<|turn|>"], special_tokens=True)
    begin, end, turn = tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]", "<|turn|>"])
    prompt, draft, answer = "Q: 3 + 4?\nA: ", continuation(llama2_like, "a\n", "#### 5"), "    return 7"
    said = [begin, *draft, end, turn, *continuation(llama2_like, "a\n", answer), tokenizer.eos_token_id]
    model = ScriptedLM({tuple(tokenizer(prompt)["input_ids"]): said}, len(tokenizer), tokenizer.eos_token_id)
    backend = HFBackend(model, tokenizer, batch_size=1)
    (completion,) = backend.generate([prompt], Sampling(64))
    assert "#### 5[/THINK]" in completion.text
    assert "<|turn|>" not in completion.text
    assert without_draft(completion.text) == answer
    plain = HFBackend(ScriptedLM({}, len(llama2_like), 2), llama2_like, batch_size=1)
    assert plain._hidden_ids is None


DECODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def roberta(vocabulary):
    config = {"vocab_size": vocabulary, "max_position_embeddings": 64, "pad_token_id": 1, "is_decoder": True}
    return RobertaForCausalLM(RobertaConfig(**config, **DECODER))


def rwkv(vocabulary):
    return RwkvForCausalLM(RwkvConfig(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, context_length=64))


@pytest.mark.parametrize(("make", "one_by_one"), [(roberta, False), (rwkv, True)])
def test_rows_of_a_batch_are_those_on_their_own(tokenizer, make, one_by_one, caplog):
    """RoBERTa counts positions from 2, and RWKV reads padding, against the model's plain forward of each row."""
    model = make(len(tokenizer)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    backend = HFBackend(model, tokenizer, batch_size=4)
    prompts, choices = ["Q: 1?", "Q: a longer one, padded?", "Q"], [["yes", "no"], ["a", "b c"], ["yes", "no"]]
    expected = []
    for prompt, row_choices in zip(prompts, choices, strict=True):
        before = tokenizer(prompt)["input_ids"]
        for choice in row_choices:
            ids = [*before, *tokenizer(choice)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected.append(sum(scores[place - 1, ids[place]].item() for place in range(len(before), len(ids))))
    found = [score for row in backend.log_likelihoods(prompts, choices) for score in row]
    assert found == pytest.approx(expected, rel=1e-4)
    answers = backend.generate(prompts, Sampling(5))
    for prompt, answer in zip(prompts, answers, strict=True):
        before = tokenizer(prompt)["input_ids"]
        assert answer.text == backend._completion(before, largest_logits(model, before, 5), Sampling(5)).text
    drawn = [answer.text for answer in backend.generate(prompts, DRAWN, [4, 5, 6])]
    assert drawn == [backend.generate([p], DRAWN, [n])[0].text for p, n in zip(prompts, (4, 5, 6), strict=True)]
    assert ("RwkvForCausalLM reads padding as text" in caplog.text) is one_by_one


@pytest.mark.parametrize("sampling", [Sampling(4), DRAWN])
def test_logits_that_are_no_numbers_are_refused(tokenizer, sampling):
    """As when FP16 overflows: the largest of NaNs would be the first token, and the first choice the best."""
    model = tiny_llama(vocab_size=len(tokenizer))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)  # finite weights of FP16 give the same
    backend = HFBackend(model, tokenizer, batch_size=2)
    with pytest.raises(FloatingPointError, match="the model computes NaN instead of scores"):
        backend.generate(["Q: 1?", "Q: a longer one?"], sampling, [1, 2])
    with pytest.raises(FloatingPointError, match="the model computes NaN instead of scores"):
        backend.log_likelihoods(["Q: 1?"], [["a", "b"]])


def test_stops_are_looked_for_in_the_answer_alone(llama2_like):
    prompt, stop = "Q: 3 + 4?\n", "\nQ:"
    # Prompt and answer together have the stop, the answer has not; then it has.
    found, tokens = said(llama2_like, prompt, "Q: is 7", stop=(stop,))
    assert found == Completion("Q: is 7", tokens, True)
    found, tokens = said(llama2_like, prompt, " The answer is 7\nQ: 3 + 4?\nThe answer", stop=(stop,))
    assert (found.text, found.finished) == (" The answer is 7", True)
    assert found.tokens == len(continuation(llama2_like, prompt, " The answer is 7\nQ:"))
    found, tokens = said(llama2_like, prompt, " 7", stop=(" 7",))  # the blank is the stop's
    assert found == Completion("", tokens, True)


def test_a_tokenizers_own_end_is_no_part_of_a_prompt(llama2_like, tmp_path):
    llama2_like.save_pretrained(tmp_path)
    ending = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True, add_eos_token=True)
    assert ending("Q").input_ids == [*llama2_like("Q").input_ids, ending.eos_token_id]
    model = tiny_llama(vocab_size=len(ending))
    plain, same = (HFBackend(model, one, batch_size=1) for one in (llama2_like, ending))
    assert plain.prompt_length("Q: 3") == same.prompt_length("Q: 3")
    assert plain.generate(["Q: 3"], Sampling(6)) == same.generate(["Q: 3"], Sampling(6))
    assert plain.log_likelihoods(["Q: 3"], [["7", "8"]]) == same.log_likelihoods(["Q: 3"], [["7", "8"]])


SMALL = {"vocab_size": 4096, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_positions=16, n_embd=8, n_layer=1, n_head=1))


def opt():
    return OPTForCausalLM(OPTConfig(**SMALL, max_position_embeddings=16, ffn_dim=8, word_embed_proj_dim=8))


def gptj():
    return GPTJForCausalLM(GPTJConfig(vocab_size=4096, n_positions=16, n_embd=8, n_layer=1, n_head=1, rotary_dim=4))


@pytest.mark.parametrize("make", [gpt2, opt, gptj])
def test_prompts_beyond_learned_positions_are_refused(tokenizer, make):
    model = make().eval()
    model.generation_config.eos_token_id = None
    ids = torch.full((1, 9), 5)
    # What transformers itself takes: 9 tokens and 8 more, the last of which is not read.
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    model.generate(ids, max_new_tokens=8, **options)
    with pytest.raises((IndexError, RuntimeError)):
        model.generate(ids, max_new_tokens=9, **options)
    backend = HFBackend(model, tokenizer, batch_size=1)
    assert backend.context == (16, "learned")
    backend.check_lengths([3, 9], 8)
    with pytest.raises(
        ConfigError, match="Too long for the model: 1 of 2 prompts, the longest of 9 tokens, with up to 9"
    ):
        backend.check_lengths([3, 9], 9)
    with pytest.raises(ConfigError, match="Too long for the model: 1 of 1 prompts"):
        backend.generate(["w " * 40], Sampling(2))
    with pytest.raises(ConfigError, match="Too long for the model: 1 of 1 prompts"):
        backend.log_likelihoods(["w " * 40], [["a", "b"]])


def test_positions_that_were_not_trained_are_reported_once(tokenizer, caplog):
    backend = HFBackend(tiny_llama(vocab_size=len(tokenizer)), tokenizer, batch_size=1)
    assert backend.context == (512, "rotary")
    with caplog.at_level(logging.WARNING):
        backend.check_lengths([500, 500], 13)
        assert not caplog.records
        backend.check_lengths([3, 500, 600], 14)
        backend.check_lengths([3, 500, 600], 14)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "2 of 3 prompts and their answers of up to 14 tokens may be longer than the 512 tokens of the model's context "
        "(1 prompts by themselves, the longest of 600 tokens)"
    )


def test_contexts_are_those_of_the_architecture(tiny_t5_folder):
    assert context_of(T5ForConditionalGeneration.from_pretrained(tiny_t5_folder)) is None  # relative
    assert context_of(BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=8, n_layer=1, n_head=1))) is None
    parts = {f"{side}_{key}": 1 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    bart = BartConfig(vocab_size=96, d_model=8, max_position_embeddings=16, **parts)
    assert context_of(BartForConditionalGeneration(bart)) == (16, "learned")
    assert context_of(tiny_lora()) == (512, "rotary")
    heads = {"vocab_size": 96, "n_embd": 8, "n_layer": 1, "n_head": 1}
    assert context_of(OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_positions=16, **heads))) == (16, "learned")
    assert context_of(CTRLLMHeadModel(CTRLConfig(n_positions=16, dff=8, **heads))) == (16, "learned")
    heads = {"vocab_size": 96, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "is_decoder": True}
    roberta = RobertaForCausalLM(RobertaConfig(max_position_embeddings=18, intermediate_size=8, **heads)).eval()
    assert context_of(roberta) == (16, "learned")  # which its forward agrees to
    roberta(torch.full((1, 16), 5))
    with pytest.raises((IndexError, RuntimeError), match="index 18 is out of bounds"):
        roberta(torch.full((1, 17), 5))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def chat_of(*contents):
    return [{"role": ("user", "assistant")[turn % 2], "content": one} for turn, one in enumerate(contents)]


class Asked(HFBackend):
    """Keeps the ids that it is asked."""

    def _generate(self, prompts, sampling, seeds):
        self.asked = prompts
        return [Completion("", 0, True) for _ in prompts]


PLAIN = chat_of("What ends a list?", "Its last item.", "And a turn?")
NAMED = chat_of("What does <|im_end|> end?", "A turn; <|im_start|>user\n begins one.", "And a <|im_endless|> one?")


def test_names_of_special_tokens_in_a_chat_are_text(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = CHATML
    backend = Asked(tiny_llama(vocab_size=len(tokenizer)), tokenizer, batch_size=2)
    backend.generate([Chat(PLAIN), Chat(NAMED)], Sampling(2))
    plain, named = backend.asked
    assert plain == tokenizer.apply_chat_template(PLAIN, add_generation_prompt=True, return_dict=True)["input_ids"]
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def text(piece):  # of a byte-level tokenizer, whose pieces between special tokens are independent
        return tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    for chat, found in ((PLAIN, plain), (NAMED, named)):
        turns = [[begin, *text(f"{turn['role']}\n{turn['content']}"), end, *text("\n")] for turn in chat]
        assert found == [*itertools.chain(*turns), begin, *text("assistant\n")]
    assert backend.prompt_length(Chat(NAMED)) == len(named)


def test_names_of_special_tokens_in_a_chat_are_text_to_sentencepiece(llama2_like, monkeypatch):
    monkeypatch.setattr(llama2_like, "chat_template", LLAMA2)
    backend = Asked(tiny_llama(vocab_size=len(llama2_like)), llama2_like, batch_size=2)
    chats = chat_of("Q: 3?", "7.", "Q: 4?"), chat_of("Q: 3 </s><s>?", "7<unk>.", "Q: <s>4?")
    backend.generate(list(map(Chat, chats)), Sampling(2))
    plain, named = backend.asked
    bos, eos = llama2_like.bos_token_id, llama2_like.eos_token_id
    for ids in (plain, named):
        assert [token for token in ids if token in (bos, eos)] == [bos, eos, bos]
    assert llama2_like.unk_token_id not in named

    def text(piece):
        return llama2_like(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    assert plain == [bos, *text("[INST] Q: 3? [/INST] 7. "), eos, bos, *text("[INST] Q: 4? [/INST]")]
    first = text("[INST] Q: 3 </s><s>? [/INST] 7<unk>. ")
    assert named == [bos, *first, eos, bos, *text("[INST] Q: <s>4? [/INST]")]


def test_a_tokenizer_in_python_names_and_counts_them(tokenizer, caplog, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = CHATML
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with caplog.at_level(logging.WARNING):
        (ids,) = ChatEncoder(tokenizer)([Chat(NAMED)])
    assert ids == tokenizer.apply_chat_template(NAMED, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert "(<|im_end|> in 1, <|im_start|> in 1)" in caplog.text
