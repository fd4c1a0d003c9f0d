"""Warnings of libraries: what decides a result is shown or raised, what is noise is not."""

import logging
import warnings

import peft
import pytest
from transformers import AutoConfig

from flatlora.utils import console
from tests.conftest import tiny_llama


@pytest.fixture
def quieted():
    """`quiet_libraries`, and afterwards logging and warnings as they were."""
    loggers = [logging.getLogger(name) for name in (None, "transformers", "huggingface_hub", "lm_eval", "datasets")]
    before = [(one, one.handlers[:], one.level, one.propagate) for one in loggers]
    shown = warnings.formatwarning
    logging.getLogger("transformers").propagate = True  # as transformers itself sets it where CI is set
    with warnings.catch_warnings():
        console.quiet_libraries()
        yield
    logging.captureWarnings(False)
    warnings.formatwarning = shown
    for one, handlers, level, propagate in before:
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


def reported(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_an_adapter_that_peft_fills_up_with_random_numbers_is_an_error(quieted, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    config.target_modules = ["q_proj", "v_proj"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UserWarning, match="Found missing adapter keys"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_warning_of_peft_that_is_not_known_as_noise_is_shown_in_a_line(quieted, capsys):
    peft.LoraConfig(init_lora_weights=True, eva_config=peft.EvaConfig())
    assert (
        reported(capsys) == "WARNING UserWarning: `eva_config` specified but will be ignored when `init_lora_weights` "
        "is not 'eva'."
    )


def test_transformers_says_what_decides_a_result_and_no_more(quieted, capsys, tmp_path):
    logging.getLogger("transformers.models").warning("`use_cache=True` is incompatible with gradient checkpointing")
    assert reported(capsys) == ""
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    AutoConfig.for_model("llama").from_pretrained(tmp_path)
    assert "You are using a model of type `bert` to instantiate a model of type `llama`" in reported(capsys)


def test_noise_by_name_is_left_out(quieted, capsys):
    warnings.warn(
        "Could not find a config file in x/y - will assume that the vocabulary was not modified.", stacklevel=1
    )
    assert reported(capsys) == ""


def test_logs_and_failures_have_no_passwords_and_no_control_characters(quieted, capsys):
    logging.getLogger("flatlora.x").warning("%s says \x1b[31mno", "http://me:pa55@h/v1")
    assert reported(capsys) == "WARNING http://***@h/v1 says \\x1b[31mno"
    console.report_failure(OSError("http://me:pa55@h/v1 says \x1b[31mno"))
    assert reported(capsys) == "The run failed: http://***@h/v1 says \\x1b[31mno"
