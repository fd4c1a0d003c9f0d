"""Chunk by chunk or at once: the same ids, whatever the text; and no shortcut for tokenizers of another kind."""

import json
import random

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from data.byte_level import ChunkMemory
from data.tokens import Encoder

BITS = [
    *"abcXYZ019.,;:!?'\"()-_/\\#$%&*+<=>@[]^`{|}~",
    *(
        " ",
        " ",
        " ",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2003",
        "\u2028",
    ),
    *(
        "'s",
        "'ll",
        " don't",
        "12,345.67",
        "x=3",
        "<|im_end|>",
        "<|im_end|",
        "ünï",
        "日本",
        "🙂",
        "\u0301",
        "\u200b",
        "\u3000",
    ),
]


def texts(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choices(BITS, k=draw.randrange(0, 30))) for _ in range(count)]


@pytest.fixture(params=["as it is", "digits apart", "with a beginning"])
def backend(request, smollm_tokenizer):
    from tokenizers import processors

    backend = smollm_tokenizer.backend_tokenizer
    backend = Tokenizer.from_str(backend.to_str())
    if request.param == "digits apart":  # as SmolLM2's own tokenizer on the hub
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if request.param == "with a beginning":
        end = backend.token_to_id("<|im_end|>")
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_end|> $A <|im_end|>", special_tokens=[("<|im_end|>", end)]
        )
    return backend


@pytest.mark.parametrize("special", [True, False])
def test_ids_are_the_tokenizers(backend, special):
    memory, taken = ChunkMemory.of(backend), 0
    for text in texts(6000, 1):
        found = memory.encode(text, special)
        if found is not None:
            taken += 1
            expected = backend.encode(text, add_special_tokens=special).ids
            assert [int.from_bytes(found[i : i + 4], "little") for i in range(0, len(found), 4)] == expected, text
    assert taken > 900


def test_plain_sentences_take_the_short_way(backend):
    memory = ChunkMemory.of(backend)
    for text in ("Q: Ann has 3 apples.\nA:  ", "3 * 5 = 15\n#### 15", "", "a", "naïve café – 日本 🙂 ok"):
        assert memory.encode(text, True) is not None, text
    for text in (" a", "a  b", "a \n b", "a\tb", "a\xa0b", "say <|im_end|> now"):
        assert memory.encode(text, True) is None, text


@pytest.mark.parametrize(
    "changed",
    [
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)])},
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
    ],
)
def test_other_kinds_have_no_short_way(smollm_tokenizer, changed):
    backend = Tokenizer.from_str(smollm_tokenizer.backend_tokenizer.to_str())
    for name, value in changed.items():
        setattr(backend, name, value)
    assert ChunkMemory.of(backend) is None


def test_an_encoder_asks_the_tokenizer_for_the_rest(smollm_tokenizer):
    encode, given = Encoder(smollm_tokenizer), texts(500, 2)
    expected = [smollm_tokenizer(text, split_special_tokens=True)["input_ids"] for text in given]  # names are text
    assert [
        [int.from_bytes(ids[i : i + 4], "little") for i in range(0, len(ids), 4)] for ids in encode(given)
    ] == expected
    assert encode.lengths(given) == [len(ids) for ids in expected]


def test_a_full_memory_starts_again(smollm_tokenizer, monkeypatch):
    from data import byte_level

    monkeypatch.setattr(byte_level, "_MOST_CHUNKS", 5)
    backend = smollm_tokenizer.backend_tokenizer
    memory = ChunkMemory.of(backend)
    text = " ".join(f"word{i}" for i in range(50))
    assert len(memory.encode(text, False)) == 4 * len(backend.encode(text, add_special_tokens=False).ids)
    assert len(memory._later) <= 5
    assert json.loads(backend.to_str())["model"]["type"] == "BPE"
