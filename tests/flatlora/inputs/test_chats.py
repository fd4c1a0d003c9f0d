"""Chats: exactly the assistant's answers are learned, contents are text, and what cannot be told apart is refused."""

import itertools
import re

import pytest
from transformers import AutoTokenizer

from flatlora.inputs import conversations
from flatlora.inputs.chats import ChatEncoder, Learned, template_sha256
from flatlora.inputs.conversations import Chat, turns

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Of Qwen3's kind: the thinking part of an answer is left out once a question follows.
THINKS = PLAIN.replace(
    "{{ m.content }}<|im_end|>{{ '\n' }}{% else %}",
    "{% if loop.last %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}"
    "{{ m.content }}<|im_end|>{{ '\n' }}{% else %}",
)
CHATS = [
    turns(None, "What is 2 + 3?", "It is 5."),
    turns("Be brief.", "What is 2 + 3?", "5", "And 4 + 4?", "8\n\n", "Why?", "\n Because."),
    turns(
        None, "What ends a turn?", "<|im_end|> does, and <|im_start|>assistant\n begins one.", "é 漢?", "🙂 <|im_end|>"
    ),
]


@pytest.fixture
def tokenizer(tiny_model_folder):
    found = AutoTokenizer.from_pretrained(tiny_model_folder)
    found.chat_template = PLAIN
    return found


def learned_reference(tokenizer, messages) -> Learned:
    """ChatML by hand: the header, content and end of each turn are tokenized by themselves, their names as text."""

    def text(piece):
        return tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids, has_loss = [], []
    for turn in messages:
        header, content = [begin, *text(f"{turn['role']}\n")], [*text(turn["content"]), end]
        ids += [*header, *content, *text("\n")]
        has_loss += [False] * len(header) + [turn["role"] == "assistant"] * len(content) + [False] * len(text("\n"))
    last = max(index for index, learned in enumerate(has_loss) if learned) + 1
    return Learned(ids[:last], has_loss[:last])


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("messages", CHATS, ids=["one turn", "several", "names"])
def test_answers_are_learned_as_by_hand(tokenizer, template, messages):
    tokenizer.chat_template = template
    (found,) = ChatEncoder(tokenizer).learned([Chat(messages)])
    expected = learned_reference(tokenizer, messages)
    if (
        messages is CHATS[1]
    ):  # "\n" of the last header and "\n Because." begin with one token, which is split at the end
        assert tokenizer.decode(found.ids) == tokenizer.decode(expected.ids)
        assert [i for i, new in zip(found.ids, found.has_loss, strict=True) if new][-3:] == expected.ids[-3:]
    else:
        assert found == expected


@pytest.mark.parametrize("messages", CHATS, ids=["one turn", "several", "names"])
def test_what_is_learned_begins_with_what_an_evaluation_asks(tokenizer, messages):
    encoder = ChatEncoder(tokenizer)
    (found,), (asked,) = encoder.learned([Chat(messages)]), encoder([Chat(messages[:-1])])
    assert found.ids[: len(asked)] == asked
    assert found.has_loss[len(asked) :] == [True] * (len(found.ids) - len(asked))
    assert not found.has_loss[len(asked) - 1]


@pytest.mark.parametrize("messages", CHATS[:2], ids=["one turn", "several"])
def test_marks_give_the_mask_of_transformers(tokenizer, messages):
    """`return_assistant_tokens_mask`, which TRL's `assistant_only_loss` takes; where no token spans two parts."""
    tokenizer.chat_template = MARKED
    messages = [{**turn, "content": turn["content"].strip()} for turn in messages]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    (found,) = ChatEncoder(tokenizer).learned([Chat(messages)])
    count = len(found.ids)
    assert found.ids == theirs["input_ids"][:count]
    assert found.has_loss == list(map(bool, theirs["assistant_masks"][:count]))
    assert not any(theirs["assistant_masks"][count:])


@pytest.mark.parametrize("template", [THINKS, MARKED], ids=["thinks", "marked"])
def test_answers_of_the_context_are_not_learned(tokenizer, template):
    """A template that leaves out the thinking part of earlier answers is clear then, too."""
    tokenizer.chat_template = template
    messages = [{**turn, "thinking": ""} for turn in turns(None, "2 + 3?", "5", "4 + 4?", "8")]
    (found,) = ChatEncoder(tokenizer).learned([Chat(messages, context_turns=3)])
    learned = [i for i, new in zip(found.ids, found.has_loss, strict=True) if new]
    assert tokenizer.decode(learned) == ("<think></think>" if template == THINKS else "") + "8<|im_end|>"
    assert found.has_loss[-len(learned) :] == [True] * len(learned)
    if template == THINKS:
        (unclear,) = ChatEncoder(tokenizer).learned([Chat(messages)])
        assert "turn 2 is rendered in another way" in unclear


def test_a_context_that_is_rendered_in_another_way_is_an_error(tokenizer):
    tokenizer.chat_template = "{% if messages | length > 3 %}Long. {% endif %}" + MARKED
    (unclear,) = ChatEncoder(tokenizer).learned([Chat(turns(None, *"abcdef"), context_turns=3)])
    assert "renders the turns before the completion in another way" in unclear


def test_a_whole_conversation_is_learned(tokenizer):
    (found,) = ChatEncoder(tokenizer).learned([Chat(CHATS[0])], whole=True)
    assert found.ids == tokenizer.apply_chat_template(CHATS[0], return_dict=True)["input_ids"]
    assert all(found.has_loss)


def test_the_embedded_models_own_template_has_no_marks_and_is_read(smollm_tokenizer):
    (found,) = ChatEncoder(smollm_tokenizer).learned([Chat(turns("S", "Q", "A", "B", "C"))])
    learned = [
        [token for _, token in group]
        for has_loss, group in itertools.groupby(zip(found.has_loss, found.ids, strict=True), key=lambda pair: pair[0])
        if has_loss
    ]
    assert [smollm_tokenizer.decode(ids) for ids in learned] == ["A<|im_end|>", "C<|im_end|>"]


def test_tools_and_thinking_parts_reach_the_template_and_their_names_are_text(tokenizer):
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + THINKS
    tools = [{"type": "function", "function": {"name": "add <|im_end|>"}}]
    messages = turns(None, "2 + 3?", "5")
    messages[-1]["thinking"] = "two <|im_start|>"
    (found,) = ChatEncoder(tokenizer).learned([Chat(messages, tools)])
    text = tokenizer.decode(found.ids)
    assert text.startswith('[{"type": "function", "function": {"name": "add <|im_end|>"}}]')
    assert text.endswith("<think>two <|im_start|></think>5<|im_end|>")
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (found.ids.count(begin), found.ids.count(end)) == (2, 2)
    assert tokenizer.decode(list(itertools.compress(found.ids, found.has_loss))).startswith("<think>")


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (THINKS, CHATS[1], "no {% generation %} marks, and turn 3 is rendered in another way"),
        (
            MARKED.replace("assistant\n{% endif", "assistant\n<think>{% endif"),
            CHATS[0],
            "generation prompt is not how it",
        ),
        ("{{ raise_exception('No system role') }}" + PLAIN, CHATS[0], r"does not take it \(No system role\)"),
        ("{{ messages[0].content + none }}", CHATS[0], "does not take it"),
        ("{{ messages[0].content }}", CHATS[0], "renders no answer of the assistant"),
    ],
)
def test_templates_that_hide_what_is_learned_are_refused(tokenizer, template, messages, problem):
    tokenizer.chat_template = template
    messages = [{**turn, "thinking": "t"} for turn in messages]
    (found,) = ChatEncoder(tokenizer).learned([Chat(messages)])
    assert isinstance(found, str)
    assert re.search(problem.replace("{%", r"\{%").replace("%}", r"%\}"), found), found


def test_the_hash_is_of_the_templates_text(tokenizer):
    before = template_sha256(tokenizer)
    tokenizer.chat_template = MARKED
    assert template_sha256(tokenizer) != before


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, "messages must be a list of turns"),
        ([], "at least two"),
        ([{"role": "User", "content": "a"}], "turn 1 must be .* with a role of system, developer, user"),
        ([{"role": "user"}], "turn 1 has no content that is text"),
        (turns(None, "a"), "it ends with a turn of user"),
        ([*turns(None, "a"), *turns(None, "b", "c")], "turn 2 is of user after user, and may only follow"),
        ([*turns(None, "a", "b"), *turns("s")], "turn 3 is of system, which only the first may be"),
        (turns(None, "a", "b")[1:], "turn 1 is of assistant after the beginning"),
        (turns(None, "a\ud800", "b"), "half of a pair"),
    ],
)
def test_turns_out_of_order_are_named(messages, problem):
    assert re.search(problem, conversations.problem(messages) or "")


def test_calls_of_tools_and_parts_of_text_are_turns():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "7"}]}
    messages = [*turns("s", "a"), call, {"role": "tool", "content": "7"}, parts]
    assert conversations.problem(messages, [{"type": "function"}]) is None
    row = conversations.row_of(messages)
    assert row["y"] == "It is 7"
    assert conversations.without_nulls(call) == {key: value for key, value in call.items() if key != "content"}
