"""Encoders that classify: their rows, their head, and what they are refused with."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, RobertaConfig

import data
import run_exp
from data import cache
from eval.backends.encoder import EncoderBackend
from flatlora.inputs.classified import encoder_ids, encoder_inputs, joined_texts
from flatlora.methods.adapters.lora import find_targets
from flatlora.methods.base import ADAPTERS
from flatlora.models import loading
from flatlora.models.clip import Classes
from flatlora.utils.errors import ConfigError
from tests.methods_toolbox import config_of
from tests.saved_models import ARCHITECTURES, CPU, ENCODERS, EXPERTS, SHAPE, model_config
from tests.test_architectures import pair_tokenizer

CLASSES = Classes(["no", "yes", "maybe"], [["no"], ["yes"], ["maybe"]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A RoBERTa as it is pretrained: with the head of a masked language model, and a pooler."""
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = pair_tokenizer()
    described = ENCODERS["roberta"] | {"vocab_size": len(tokenizer)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AutoModelForMaskedLM.from_config(AutoConfig.for_model("roberta", **described)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_ids_and_segments_are_those_of_the_tokenizers_own_call():
    tokenizer = pair_tokenizer()
    texts = ["one text", joined_texts(["a pair\tof", "two [SEP] texts"]), "", joined_texts(["a", "b" * 40])]
    pairs = [("one text",), ("a pair of", "two [SEP] texts"), ("",), ("a", "b" * 40)]
    options = {"split_special_tokens": True}
    own = [tokenizer(*pair, **options) for pair in pairs]
    ids, cut = encoder_ids(tokenizer, texts)
    assert (ids, cut) == ([row["input_ids"] for row in own], 0)
    batch = encoder_inputs(ids, tokenizer, BertConfig())
    assert encoder_inputs(ids, tokenizer, RobertaConfig(type_vocab_size=1)).keys() == {"input_ids", "attention_mask"}
    for number, row in enumerate(own):
        for key, values in row.items():
            assert batch[key][number, : len(values)].tolist() == list(values), key
        assert not batch["attention_mask"][number, len(row["input_ids"]) :].any()
    shorter, cut = encoder_ids(tokenizer, texts, 20)
    assert (shorter[:3], cut) == (
        [ids[0], tokenizer(*pairs[1], truncation=True, max_length=20, **options)["input_ids"], ids[2]],
        2,
    )
    assert tokenizer.convert_ids_to_tokens(shorter[3]) == ["[CLS]", "a", "[SEP]", *"b" * 16, "[SEP]"]


def test_a_new_head_is_drawn_from_the_seed_and_nothing_else_is(folder):
    config = model_config(folder, family="encoder")
    models = [loading.load_backbone(config, CPU, CLASSES, head_seed=seed) for seed in (1, 1, 2)]
    first, same, other = (model.state_dict() for model in models)
    assert models[0].trained_modules == ["classifier"]
    assert models[0].config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert {key for key in first if not torch.equal(first[key], same[key])} == set()
    assert {key for key in first if not torch.equal(first[key], other[key])} == {
        "classifier.dense.weight",
        "classifier.out_proj.weight",
    }
    with pytest.raises(ConfigError, match=r"4 \(classifier\.dense\.bias, .*\) missing"):
        loading.load_backbone(config, CPU, CLASSES)


def test_a_head_of_other_classes_is_replaced_and_a_missing_layer_is_not(folder, tmp_path):
    config = model_config(folder, family="encoder")
    loading.load_backbone(config, CPU, Classes(["a", "b"], [["a"], ["b"]]), head_seed=1).save_pretrained(tmp_path)
    again = loading.load_backbone(config.at(str(tmp_path)), CPU, CLASSES, head_seed=1)
    assert again.classifier.out_proj.out_features == 3
    assert loading.model_of(str(tmp_path)).family == "encoder"
    own = loading.load_backbone(config.at(str(tmp_path)), CPU)
    assert own.config.id2label == {0: "a", 1: "b"}
    described = AutoConfig.from_pretrained(folder)
    described.num_hidden_layers = 3
    described.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"16 \(roberta\.encoder\.layer\.2\..*\) missing"):
        loading.load_backbone(config.at(str(tmp_path)), CPU, CLASSES, head_seed=1)


def test_a_base_that_was_trained_for_another_loss_learns_classes(folder, tmp_path):
    config = model_config(folder, family="encoder")
    model = loading.load_backbone(config, CPU, CLASSES, head_seed=1)
    model.config.problem_type = "regression"
    model.save_pretrained(tmp_path)
    again = loading.load_backbone(config.at(str(tmp_path)), CPU, CLASSES, head_seed=2)
    assert torch.equal(again.classifier.out_proj.weight, model.classifier.out_proj.weight)  # of the same shape
    loss, logits = again(input_ids=torch.tensor([[1, 5, 2]] * 3), labels=torch.tensor([0, 1, 2]))[:2]
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).item())


def test_a_head_computes_in_fp32_on_a_backbone_in_bf16(folder):
    model = loading.load_backbone(
        model_config(folder, family="encoder", dtype="bfloat16"), CPU, CLASSES, autocast="bfloat16", head_seed=1
    ).bfloat16()
    model.classifier.float()
    assert model(input_ids=torch.tensor([[1, 5, 2]])).logits.dtype == torch.float32


def test_texts_beyond_the_table_of_positions_are_cut_and_counted(folder, caplog):
    config = model_config(folder, family="encoder")
    backend = EncoderBackend(
        loading.load_backbone(config, CPU, CLASSES, head_seed=1), loading.load_processor(config), batch_size=2
    )
    texts = ["a" * 100, joined_texts(["a" * 40, "b" * 40]), "short"]
    backend.check_choices(texts, [CLASSES.names] * 3, first_token=False)
    assert "2 of 3 texts are longer than the 63 tokens that the model has positions for" in caplog.text
    (long, pair, short) = backend.log_likelihoods(texts, [CLASSES.names, CLASSES.names, ["maybe"]])
    assert [len(row) for row in (long, pair, short)] == [3, 3, 1]
    assert sum(map(torch.exp, torch.tensor(long))).item() == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"Invalid choices never: the model's classes are no, yes, maybe"):
        backend.check_choices(["a"], [["no", "never"]], first_token=False)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"x": "a", "y": "b"}], "its rows have no classes"),
        (
            [{"x": "a", "y": "b", "choices": ["b", "c"]}, {"x": "a", "y": "b", "choices": ["c", "b"]}],
            "its rows have different ones",
        ),
    ],
)
def test_rows_without_the_same_classes_are_refused(rows, problem):
    config = run_exp.experiment_of(["dataset=word_math"]).dataset
    with pytest.raises(ConfigError, match=f"Invalid dataset=word_math with an encoder.*: {problem}; use a data set of"):
        cache._as_classes(data.Splits(rows, [], []), config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=gsm8k"], r"Invalid eval=\[gsm8k\] with model=roberta_base \(encoder\): it scores classes"),
        (["eval.glue.metric=published"], r"Invalid eval=\[glue\] with model=roberta_base .*metric=likelihood"),
        (["rho=rop"], "Invalid rho=rop with model=roberta_base"),
        (["peft.init_from=x"], "Invalid peft.init_from=.*x with model=roberta_base .*: a trained head belongs to"),
        (["dataset.template=chat"], "Invalid dataset.template=chat with model=roberta_base"),
        (["model.quantize=nf4"], "Invalid model.quantize=nf4 with model=roberta_base .*: its trained head"),
        (["model=encoder"], "Invalid model.hub_id=None: it must be text; name a repository of the hub"),
        (["model=causal_lm", "dataset=gsm8k"], "Invalid model.hub_id=None: it must be text; name a repository"),
    ],
)
def test_what_does_not_go_with_an_encoder_is_refused_with_a_remedy(words, message):
    with pytest.raises(ConfigError, match=message):
        run_exp.experiment_of(["model=roberta_base", "dataset=cola", *words])


def test_eva_which_reads_a_label_of_each_token_is_refused(folder):
    skeleton = loading.skeleton(model_config(folder, family="encoder"))
    with pytest.raises(ConfigError, match=r"Invalid peft=eva with RobertaForSequenceClassification: .* use peft=corda"):
        ADAPTERS["eva"].check(skeleton, config_of("eva"))


@pytest.mark.parametrize(
    ("name", "family", "reason"),
    [
        ("llama", "encoder", "it is no encoder with a classifier; use model=causal_lm"),
        ("t5", "encoder", "it is an encoder-decoder; use model=seq2seq"),
        ("roberta", "causal_lm", "it is an encoder, whose tokens see those that follow; use model=encoder"),
    ],
)
def test_a_model_of_another_family_is_refused_with_its_own(name, family, reason, tmp_path):
    AutoConfig.for_model(name, **(ARCHITECTURES | ENCODERS)[name]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        loading.skeleton(model_config(tmp_path, family=family))


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj and 3 more"),
        ("qwen2_moe", "model.layers.0.mlp.experts.gate_up_proj and 3 more"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj and 3 more"),
        ("qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj and 3 more"),
    ],
)
def test_experts_in_one_tensor_are_never_left_out_in_silence(name, fused):
    described = ARCHITECTURES.get(name, SHAPE | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **described))
    for wanted in ("all", "all_conv"):
        with pytest.raises(
            ConfigError, match=f"Invalid peft.target_modules={wanted} with .*: {fused} hold the weights"
        ):
            find_targets(model, wanted)
    assert len(find_targets(model, "attention")) == 8


def test_queries_keys_and_values_in_one_layer_are_attentions():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **ARCHITECTURES["phi3"]))
    assert [name.rpartition(".")[2] for name in find_targets(model, "qv")] == ["qkv_proj"] * 2
    assert {name.rpartition(".")[2] for name in find_targets(model, "attention")} == {"qkv_proj", "o_proj"}
