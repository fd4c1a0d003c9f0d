"""Every peft × rho pair runs a step or is refused with its reason; every method resumes exactly."""

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import run_exp
from flatlora import methods
from flatlora.methods.__main__ import matrix
from flatlora.train.recorder import StepRecorder
from flatlora.train.trainer import training_of
from flatlora.utils.errors import ConfigError
from tests.conftest import adapter_bytes, metrics_rows, run_folder
from tests.processes import end_well, fork_two

PROJECT = Path(__file__).parents[3]
PEFT = sorted(path.stem for path in (PROJECT / "conf" / "peft").glob("*.yaml") if path.stem != "all")
RHO = sorted(path.stem for path in (PROJECT / "conf" / "rho").glob("*.yaml"))
DATA = {"lora_ga": "peft.ga_batches=2", "eva": "peft.eva_batches=4", "corda": "peft.corda_batches=4"}


@functools.cache  # composing takes longer than a step of the tiny model
def method_of(section, name):
    experiment = run_exp.experiment_of([f"{section}={name}"])
    return getattr(experiment, section).method


def words_of(tiny_settings, peft, rho, *more):
    kept = [word for word in tiny_settings if not (peft == "full_ft" and word.startswith("peft."))]
    return [*kept, f"peft={peft}", f"rho={rho}", *([DATA[peft]] if peft in DATA else []), *more]


PAIRS = [(peft, rho) for peft in methods.ADAPTERS for rho in methods.REGULARIZERS]
PAIRS += [
    ("qv", "flat"),
    *(("lora", rho) for rho in RHO if rho not in methods.REGULARIZERS),
]  # same method, other settings


def test_every_method_has_an_option_of_its_name():
    assert {*methods.ADAPTERS, "qv", "attention"} == set(PEFT)
    assert set(methods.REGULARIZERS) < set(RHO)


# They keep more than LoRA does: a start, and moments of their own.
RESUMED = ("pissa", "lora_pro")


def cost_of(peft, rho):
    """Marks of a pair: every method meets Flat-LoRA, here or in the test of resumed runs, and DoRA meets SAM.

    Plain LoRA meets all regularizers in tests/test_experiments.py.
    """
    rejected = peft in methods.ADAPTERS and rho in methods.REGULARIZERS and methods.refusal(peft, rho) is not None
    with_flat = rho == "flat" and peft not in RESUMED
    return [] if rejected or with_flat or (peft, rho) == ("dora", "sam") else [pytest.mark.extra]


@pytest.mark.slow
@pytest.mark.parametrize(("peft", "rho"), [pytest.param(*pair, marks=cost_of(*pair)) for pair in PAIRS])
def test_a_pair_runs_a_step_or_is_rejected(peft, rho, tiny_settings):
    words = words_of(tiny_settings, peft, rho, "trainer.max_steps=1", "dataset.train_rows=4")
    words += [] if rho == "off" else ["rho.sigma=0.1"]
    reason = methods.refusal(method_of("peft", peft), method_of("rho", rho))
    if reason is not None:
        with pytest.raises(ConfigError) as caught:
            run_exp.experiment_of(words)
        (message,) = caught.value.errors
        assert message.startswith(f"Invalid rho={rho} with peft={peft}: {reason}; use rho=off")
        return
    assert run_exp.main(words) == 0
    record = json.loads((run_folder(words) / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["metrics"]["train_loss"] > 0
    hashes = record["backbone_sha256"]
    assert hashes["before"] == hashes["after"]


def test_the_documentation_has_the_matrix_that_the_code_prints():
    assert matrix() in (PROJECT / "docs/methods.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peft", "rho"),
    [
        pytest.param(peft, "flat", marks=() if peft in RESUMED else pytest.mark.extra)
        for peft in PEFT
        if peft not in ("full_ft", "qv")
    ]
    + [
        pytest.param("full_ft", "off", marks=pytest.mark.extra),
        *(  # look_sam and bi_lora save a state
            pytest.param("lora", rho, marks=() if rho == "bi_lora" else pytest.mark.extra)
            for rho in methods.REGULARIZERS
            if rho not in ("off", "flat")
        ),
        pytest.param("lora_pro", "nbar", marks=pytest.mark.extra),
    ],
)
def test_killed_and_resumed_is_never_killed(peft, rho, tiny_settings, monkeypatch):
    words = words_of(
        tiny_settings, peft, rho, "trainer.save_steps=2", "dataset.validation_rows=4", "optim.eval_steps=3"
    )
    words = [word for word in words if word != "dataset.validation_rows=0"]
    words += ["rho.sigma=0.2"] if rho != "off" else []
    words += ["peft.lora_dropout=0.2"] if peft not in ("full_ft", "dora") else []
    words += ["peft.moments=bfloat16"] if peft == "lora_pro" and rho == "flat" else []
    words += ["peft.delta_t=1"] if peft == "adalora" else []

    def run(name, *more):
        own = [f"{word}-{name}" if word.startswith("results_root=") else word for word in words] + [*more]
        assert run_exp.main(own) == 0
        return run_folder(own)

    class Killed(BaseException):
        pass

    whole = run("whole")
    step = StepRecorder.on_step_end

    def die(recorder, args, state, control, **kwargs):
        step(recorder, args, state, control, **kwargs)
        if state.global_step == 5:
            raise Killed

    monkeypatch.setattr(StepRecorder, "on_step_end", die)
    with pytest.raises(Killed):
        run("killed")
    monkeypatch.undo()
    torch.manual_seed(77)  # what the process did before must not matter
    nn.init.normal_(torch.empty(3))
    killed = run("killed", "resume=true")
    assert json.loads((killed / "run.json").read_text())["resumed_from"] == 4
    assert metrics_rows(killed) == metrics_rows(whole)
    if peft == "full_ft":
        files = [(folder / "adapter" / "model.safetensors").read_bytes() for folder in (whole, killed)]
        assert files[0] == files[1]
    else:
        assert adapter_bytes(killed) == adapter_bytes(whole)


def test_a_regularizer_may_name_the_methods_that_it_does_not_work_with(monkeypatch):
    monkeypatch.setattr(type(methods.REGULARIZERS["rop"]), "refuses", {"dora": "the reason"})
    with pytest.raises(ConfigError, match=r"Invalid rho=rop with peft=dora: the reason; use rho=off"):
        run_exp.experiment_of(["peft=dora", "rho=rop"])
    assert run_exp.experiment_of(["peft=dora", "rho=rop", "rho.sigma=0"]).rho.method == "rop"
    assert run_exp.experiment_of(["peft=lora", "rho=rop"]).rho.method == "rop"
    (row,) = [line for line in matrix().splitlines() if line.startswith("| dora |")]
    assert row.count("✓") == row.count("|") - 3
    assert "] the reason." in matrix()


def test_lora_pro_refuses_another_optimizer():
    with pytest.raises(ConfigError, match=r"optim.optimizer=adamw_8bit with peft=lora_pro.*peft.moments=bfloat16"):
        run_exp.experiment_of(["peft=lora_pro", "optim.optimizer=adamw_8bit"])
    assert run_exp.experiment_of(["optim.optimizer=adamw_8bit"]).optim.optimizer == "adamw_8bit"
    with pytest.raises(ConfigError, match=r"adamw_8bit with rho=bi_lora: bitsandbytes' optimizer cannot maximize"):
        run_exp.experiment_of(["optim.optimizer=adamw_8bit", "rho=bi_lora"])
    with pytest.raises(ConfigError, match=r"peft.moments=bfloat16, .* with peft.mode=sgd: this mode has no moments"):
        run_exp.experiment_of(["peft=lora_pro", "peft.mode=sgd", "peft.moments=bfloat16"])


def test_lora_pro_by_sgd_refuses_settings_of_adam():
    words = ["peft=lora_pro", "optim.adam_beta1=0.8", "optim.adam_epsilon=1e-6"]
    assert run_exp.experiment_of(words).optim.adam_beta1 == 0.8
    with pytest.raises(ConfigError) as caught:
        run_exp.experiment_of([*words, "peft.mode=sgd"])
    heads = [message.partition(" with")[0] for message in caught.value.errors]
    assert heads == ["Invalid optim.adam_beta1=0.8", "Invalid optim.adam_epsilon=1e-06"]
    head = ["model=clip_tiny", "dataset=digits", "model.head=linear"]  # AdamW moves the head
    assert run_exp.experiment_of([*words, "peft.mode=sgd", *head]).optim.adam_beta1 == 0.8


def test_dora_with_dropout_is_rejected():
    with pytest.raises(ConfigError, match=r"peft.lora_dropout=0.1: it must be ≤ 0; PEFT's DoRA"):
        run_exp.experiment_of(["peft=dora", "peft.lora_dropout=0.1"])


def test_lora_plus_and_lora_fa_train_what_they_say(tiny_settings):
    experiment = run_exp.experiment_of([*tiny_settings, "peft=lora_plus", "optim.lr=1e-3"])
    settings = methods.Training(experiment.optim)
    from tests.conftest import tiny_llama

    model = methods.ADAPTERS["lora_plus"].apply(tiny_llama(), experiment.peft, methods.Start(0))
    optimizer = methods.ADAPTERS["lora_plus"].optimizer(model, experiment.peft, settings)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(1.6e-2 if "lora_B" in name else 1e-3)
    headed = tiny_llama()
    headed.score, headed.trained_modules = nn.Linear(4, 3), ["score"]
    model = methods.ADAPTERS["lora_plus"].apply(headed, experiment.peft, methods.Start(0))
    optimizer = methods.ADAPTERS["lora_plus"].optimizer(model, experiment.peft, settings)
    head, before = model.base_model.model.score.modules_to_save["default"], {}
    for name, parameter in head.named_parameters():
        parameter.grad, before[name] = torch.ones_like(parameter), parameter.detach().clone()
    optimizer.step()
    for name, parameter in head.named_parameters():  # Adam's first step is lr·sign(g)
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, 1e-3), rtol=1e-3, atol=1e-6)
    experiment = run_exp.experiment_of([*tiny_settings, "peft=lora_fa", "optim.adam_beta1=0.8"])
    model = methods.ADAPTERS["lora_fa"].apply(tiny_llama(), experiment.peft, methods.Start(0))
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_B"}
    optimizer = methods.ADAPTERS["lora_fa"].optimizer(model, experiment.peft, methods.Training(experiment.optim))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.999)


@pytest.mark.parametrize(("autocast", "digits"), [(None, 1e-5), (torch.bfloat16, 1e-2)])
def test_lora_fa_steps_by_its_formula_in_the_precision_of_the_run(autocast, digits, tiny_settings):
    """B − lr·√(1 − β₂)/(1 − β₁) · m/(√v + eps) of g = s⁻² g_B (AAᵀ)⁻¹ in FP64; a large eps lets g's digits count."""
    experiment = run_exp.experiment_of([*tiny_settings, "peft=lora_fa", "optim.adam_epsilon=1"])
    from tests.conftest import tiny_llama

    model = methods.ADAPTERS["lora_fa"].apply(tiny_llama(), experiment.peft, methods.Start(0))
    settings = methods.Training(experiment.optim, autocast=autocast)
    optimizer = methods.ADAPTERS["lora_fa"].optimizer(model, experiment.peft, settings)
    wanted, scaling = {}, experiment.peft.lora_alpha / experiment.peft.lora_r
    parameters, generator = dict(model.named_parameters()), torch.Generator().manual_seed(1)
    for name, B in parameters.items():
        if "lora_B" in name:
            B.grad = torch.randn(B.shape, generator=generator)
            A = parameters[name.replace("lora_B", "lora_A")].detach().double()
            g = B.grad.double() @ torch.linalg.inv(A @ A.T) / scaling**2
            step = 0.01 * 0.001**0.5 / 0.1 * (0.1 * g) / (0.001**0.5 * g.abs() + 1)
            wanted[name] = B.detach().double() - step
    optimizer.step()
    errors = [float((parameters[name] - B).norm() / B.norm()) for name, B in wanted.items()]
    assert len(errors) == 14
    assert max(errors) < digits
    assert (min(errors) > 1e-5) == (autocast is not None)
    arguments = transformers.TrainingArguments("unused", use_cpu=True)
    for words, asked in ((["trainer.autocast=none"], None), (["trainer.autocast=bfloat16"], torch.bfloat16)):
        assert training_of(run_exp.experiment_of([*tiny_settings, *words]), arguments).autocast == asked


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("swept", [["peft=lora_pro,lora_ga,adalora", "rho=off"], ["rho=bi_lora,sam,off"]])
def test_two_processes_agree_with_accumulation(swept, tiny_settings):
    """Invariant 7 for what has an optimizer, a start or a second gradient of its own."""
    replaced = ("dataset.train_rows=24", "wandb.name=run")
    words = [*(word for word in tiny_settings if word not in replaced), "dataset.train_rows=16", "wandb.name=n", "-m"]
    words += swept

    def own(name, *more):
        return [f"{word}-{name}" if word.startswith("results_root=") else word for word in words] + [*more]

    def rows_of(settings):
        root = next(word.partition("=")[2] for word in settings if word.startswith("results_root="))
        found = sorted(Path(root).glob("*/*/*/run.json"))
        assert all(json.loads(path.read_text())["status"] == "finished" for path in found)
        return {path.parts[-3]: metrics_rows(path.parent) for path in found}

    assert run_exp.main(own("one")) == 0
    end_well(*fork_two(own("two", "trainer=ddp", "trainer.device=cpu")))
    one, two = rows_of(own("one")), rows_of(own("two"))
    assert one.keys() == two.keys()
    assert len(one) == 3
    for name, rows in one.items():
        assert len(rows) == len(two[name]) == 4
        for left, right in zip(rows, two[name], strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=2e-3), name
            assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=2e-2), name
