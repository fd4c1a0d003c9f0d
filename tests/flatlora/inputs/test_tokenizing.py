"""Names of special tokens are text; what a tokenizer puts behind a text is known."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flatlora.inputs.tokenizing import appended_ends, special_tokens, text_ids


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
