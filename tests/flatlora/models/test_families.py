"""What every family brings along, and that its parts in config, models, data and eval belong together."""

import pytest
import torch

import run_exp
from flatlora.config.families import TRAITS
from flatlora.models.family import FAMILIES, LOSS_SCALE, padded
from flatlora.models.language import LanguageModel
from flatlora.utils.labels import IGNORED_LABEL
from tests.conftest import tiny_llama


def test_each_family_has_an_entry_in_the_configuration_and_a_class():
    assert sorted(FAMILIES) == sorted(TRAITS)
    rows = {traits.rows for traits in TRAITS.values()}
    assert rows == run_exp.SUITE.kinds.keys() == run_exp.SUITE.backends.keys()


@pytest.mark.parametrize(
    "name",
    [name for name, family in FAMILIES.items() if isinstance(family, LanguageModel) and not TRAITS[name].classifies],
)
def test_the_loss_of_a_step_is_the_mean_that_the_family_says(name, tiny_model_folder, tiny_t5_folder):
    """transformers divides by `num_items_in_batch` where a family counts the tokens of the whole step."""
    family = FAMILIES[name]
    folder = {"causal_lm": tiny_model_folder, "seq2seq": tiny_t5_folder}[name]
    model, ids = family.auto.from_pretrained(folder).eval(), torch.arange(5, 17)[None]
    with torch.no_grad():
        mean, of_step = (model(input_ids=ids, labels=ids, num_items_in_batch=items).loss for items in (None, 1000))
    assert (of_step != mean) == family.token_mean


def test_a_captured_micro_step_of_text_is_padded_without_a_loss():
    ids = torch.arange(5, 75)[None]
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    family = FAMILIES["causal_lm"]
    made = family.graph_inputs(inputs, torch.tensor(69), 4, None)
    assert made["input_ids"].shape == made["labels"].shape == (1, 128)
    assert (made["labels"][:, 70:] == IGNORED_LABEL).all()
    model = tiny_llama(vocab_size=128).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**made).loss, model(**inputs).loss, rtol=1e-5, atol=1e-6)


def test_a_captured_micro_step_of_an_encoder_decoder_is_padded_without_a_loss(tiny_t5_folder):
    prompts, answers = torch.arange(5, 25).view(2, 10), torch.arange(3, 9).view(2, 3)
    mask = torch.ones_like(prompts)
    prompts[1, 6:] = mask[1, 6:] = 0
    inputs = {"input_ids": prompts, "attention_mask": mask, "labels": answers}
    family = FAMILIES["seq2seq"]
    made = family.graph_inputs(inputs, torch.tensor(6), 4, None)
    assert made.pop(LOSS_SCALE).item() == 0.25
    assert [made[key].shape for key in inputs] == [(2, 16), (2, 16), (2, 8)]
    model = family.auto.from_pretrained(tiny_t5_folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**made).loss, model(**inputs).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "text_to_image"])
def test_a_captured_micro_step_of_pictures_has_its_share_of_the_mean(name):
    made = FAMILIES[name].graph_inputs({"weights": torch.tensor([0.5, 0.5])}, torch.tensor(2), 4, None)
    assert made["weights"].tolist() == [0.5, 0.5]
    assert made[LOSS_SCALE].item() == 0.25


def test_rows_are_not_padded_beyond_the_positions_of_the_model():
    rows = torch.ones(2, 70)
    assert [padded(rows, 64, positions).shape[1] for positions in (None, 200, 100, 70, 60)] == [128, 128, 100, 70, 70]
