"""Names of special tokens are text; what a tokenizer puts behind a text is known."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.tokens import Encoder
from flatlora.inputs import tokenizing
from flatlora.inputs.chats import ChatEncoder
from flatlora.inputs.conversations import Chat
from flatlora.inputs.tokenizing import appended_ends, special_tokens, text_ids, tokenized
from flatlora.utils.errors import ConfigError


def make(single):
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "[CLS]", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = [("<s>", 0), ("</s>", 1), ("[CLS]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("single", "ends"),
    [
        ("$A", 0),
        ("<s> $A", 0),
        ("$A </s>", 1),
        ("<s> $A </s>", 1),
        ("$A </s> </s>", 2),
        ("$A [CLS]", 0),
        ("</s> $A", 0),
    ],
)
def test_ends_are_those_behind_a_text(single, ends):
    tokenizer = make(single)
    assert appended_ends(tokenizer) == ends
    ids = tokenizer("b a")["input_ids"]  # as the template says
    assert ids[len(ids) - ends :] == [1] * ends


def test_names_of_special_tokens_are_text(tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    text = "<|im_start|>user says <|im_end|> and </s>"
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]
    ids = text_ids(tokenizer, text)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_known_by_their_text(tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    found = special_tokens(tokenizer)
    assert found["<|im_end|>"] == tokenizer.eos_token_id
    assert set(found) >= set(tokenizer.all_special_tokens)


# (where it is, a pattern that goes on for minutes or gives up on the text)
PATTERNS = [("split", r"\s*\s*x"), ("normalize", r"\s*\s*x")]
GIVES_UP = "split", r"(a|aa)+(a|aa)+$"
SLOW = f"a{' ' * 4000}bx{'a' * 5000}b"


def slow(place, pattern):
    tokenizer = make("$A")
    if place == "split":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    else:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(pattern), "a")
    return tokenizer


READERS = {
    "training": lambda tokenizer: Encoder(tokenizer)([SLOW]),
    "evaluation": lambda tokenizer: text_ids(tokenizer, SLOW),
    "pictures": lambda tokenizer: tokenized(tokenizer, [SLOW]),
    "chats": lambda tokenizer: ChatEncoder(tokenizer)([Chat([{"role": "user", "content": SLOW}])]),
    "a name in a chat": lambda tokenizer: ChatEncoder(tokenizer)([Chat([{"role": "user", "content": f"{SLOW}</s>"}])]),
}
SCRIPT = """
import itertools
import sys
from flatlora.inputs import tokenizing
from flatlora.utils.errors import ConfigError
from tests.flatlora.inputs.test_tokenizing import PATTERNS, READERS, slow

tokenizing._LEAST_SECONDS, tokenizing._LETTERS_PER_SECOND = 0.5, 1e9
for (name, read), (place, pattern) in zip(READERS.items(), itertools.cycle(PATTERNS)):  # each leaves a busy thread
    tokenizer = slow(place, pattern)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    try:
        read(tokenizer)
    except ConfigError as error:
        print(name, error, flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("name", READERS)
def test_a_pattern_that_the_library_gives_up_is_named(name):
    tokenizer = slow(*GIVES_UP)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match=r"Invalid tokenizer of .*: Onig: Regex search error: retry-limit-in-match"):
        READERS[name](tokenizer)


@pytest.mark.slow
@pytest.mark.extra  # its busy threads slow down all tests beside it; a chat template that never ends is always tried
def test_patterns_that_take_for_ever_are_named_and_do_not_keep_a_process():
    """In a process of its own: what was given up goes on until its end."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 7, done.stderr
    assert len(lines) == len(READERS), done.stderr
    assert all("Invalid tokenizer of" in line and "mend the regular expressions" in line for line in lines)
    assert time.monotonic() - begun < 200


def test_a_chat_template_that_takes_for_ever_is_named(monkeypatch):
    monkeypatch.setattr(tokenizing, "_LEAST_SECONDS", 0.2)
    tokenizer = make("$A")
    rounds = "{% for _ in range(1000) %}" * 3
    tokenizer.chat_template = f"{rounds}{'{% endfor %}' * 3}"
    with pytest.raises(ConfigError, match=r"it takes more than 0 s for 1 letters; mend .* its chat template"):
        ChatEncoder(tokenizer)([Chat([{"role": "user", "content": "a"}])])
