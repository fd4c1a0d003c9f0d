"""trainer=fsdp: the bits of W + ε, losses, adapters and hashes are those of processes with whole weights."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

import run_exp
from flatlora.experiment import prepare
from flatlora.methods import ADAPTERS, REGULARIZERS
from flatlora.methods.adapters.lora import LoraMethodConfig
from flatlora.methods.base import Start, refusal
from flatlora.models import fit, hashes, loading
from flatlora.noise import philox
from flatlora.perturb import epsilon
from flatlora.perturb.layers import PerturbedLayer, find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.train import checkpoint, distributed
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import Precision, choose_precision
from flatlora.utils.shards import is_sharded, share
from tests.conftest import adapter_bytes, metrics_rows, run_folder
from tests.flatlora.perturb.test_perturbation import tiny_gpt2
from tests.flatlora.train.test_process_count import (
    COPY,
    RECOMPUTE,
    assert_same,
    main_until_step_five,
    named,
    settings,  # noqa: F401  # a fixture
)
from tests.processes import end_well, fork_ranks

HOLDS_BF16 = choose_precision("auto", "bfloat16", "cpu").held == torch.bfloat16  # other CPUs hold it as FP32
LORA = LoraMethodConfig(name="lora", method="lora", lora_r=4)


def adapted(folder: str, dtype: str, shards: int) -> nn.Module:
    config = loading.ModelConfig(name="tiny", hub_id=folder, family="causal_lm", dtype=dtype)
    backbone = loading.load_backbone(config, torch.device("cpu"), shards=shards)
    model = ADAPTERS["lora"].apply(backbone, LORA, Start(seed=1))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:  # which starts at 0
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return model


def perturbed_hashes(model: nn.Module, mode: str, step: int) -> list[str]:
    """Of W + ε of each layer; the backbone is the same after it."""
    before, layers = hashes.backbone_sha256(model), find_lora_layers(model)
    perturbation = WeightPerturbation(layers, mode=mode, sigma=0.3, total_steps=8, seed=3)
    perturbation.begin(step)
    found = [perturbation.weight_sha256(index) for index in range(len(layers))]
    perturbation.close()
    assert hashes.backbone_sha256(model) == before
    return [before, *found]


def compare_perturbed_weights(words: list[str]) -> int:
    """In each process: a whole model beside its share of another, with ε as on the host and as on a GPU."""
    PartialState(cpu=True)
    (folder,) = [word.partition("=")[2] for word in words if word.startswith("model.hub_id=")]
    for dtype in ("float32", *(["bfloat16"] if HOLDS_BF16 else [])):
        whole, shared = (adapted(folder, dtype, shards) for shards in (1, distributed.world_size()))
        layer = find_lora_layers(shared)[0]
        assert len(layer.share_of_rows()) < layer.shape[0] == find_lora_layers(whole)[0].shape[0]
        wanted = perturbed_hashes(whole, "copy", 5)
        assert perturbed_hashes(shared, "copy", 5) == wanted
        assert perturbed_hashes(shared, "recompute", 5) == wanted
        assert len({*wanted, *perturbed_hashes(whole, "copy", 6)}) == 2 * len(wanted) - 1  # all but the backbone's
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(epsilon, "HostEpsilon", lambda layers: epsilon.DeviceEpsilon(layers, keys_of(layers)))
            wanted = perturbed_hashes(whole, "copy", 5)
            assert perturbed_hashes(shared, "copy", 5) == wanted
            assert perturbed_hashes(shared, "recompute", 5) == wanted
    return 0


def keys_of(layers: list[PerturbedLayer]) -> list[tuple[int, int]]:
    return [philox.layer_key(3, layer.name) for layer in layers]


@pytest.mark.extra
def test_perturbed_weights_have_the_bits_of_one_process(tiny_model_folder, tmp_path):
    """32, 16 and 56 rows of three processes: no share is like another."""
    words = [f"model.hub_id={tiny_model_folder}", f"results_root={tmp_path / 'results'}"]
    end_well(*fork_ranks(3, words, entry=compare_perturbed_weights), seconds=120)


def compare_and_train(words: list[str]) -> int:
    return compare_perturbed_weights(words) or run_exp.main(words)


def train(count, words, trainer="fsdp", entry=None, **environment):
    if count == 1:
        assert run_exp.main(words) == 0
    else:
        end_well(*fork_ranks(count, [f"trainer={trainer}", *words], entry=entry, **environment), seconds=120)
    return run_folder(words)


def without(settings, words):  # noqa: F811
    """Settings without those that `words` have."""
    own = tuple(f"{word.partition('=')[0]}=" for word in words)
    return [word for word in settings if not word.startswith(own)]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


EVAL = ["dataset.validation_rows=3", "trainer.eval_batch_size=1"]  # two batches for one of two processes


@pytest.mark.slow
def test_a_sharded_run_is_that_of_one_process(settings):  # noqa: F811
    words = [*COPY, *EVAL]
    kept = [word for word in settings if not word.startswith("dataset.validation_rows")]
    one, two = named(kept, words, "one"), named(kept, words, "two")
    folder = train(2, two, entry=compare_and_train)
    rows = [row for row in metrics_rows(train(1, one)) if "eval_loss" in row]
    found = [row for row in metrics_rows(folder) if "eval_loss" in row]
    assert [row["eval_loss"] for row in found] == pytest.approx([row["eval_loss"] for row in rows], rel=1e-5)
    trained = [load_file(path / "adapter/adapter_model.safetensors") for path in (run_folder(one), folder)]
    assert trained[0].keys() == trained[1].keys()
    for name, tensor in trained[0].items():
        assert (tensor - trained[1][name]).norm() <= 1e-4 * tensor.norm(), name
    assert record_of(folder)["backbone_sha256"] == record_of(run_folder(one))["backbone_sha256"]
    noise = record_of(folder)["perturbation"]["noise_sha256"]
    assert len(noise) == 2
    assert len(set(noise)) == 1


CHECKPOINTED = ["trainer.gradient_checkpointing=true"]
HALF = ["model.dtype=bfloat16"]
PUBLISHED_RHO = {
    "off": ["rho=off"],
    "copy": COPY,
    "recompute": RECOMPUTE[:-1],  # with fused layers
    "sam": ["rho=sam", "rho.sigma=0.05"],
    "bi_lora": ["rho=bi_lora", "rho.sigma=0.05"],
}


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize(
    ("count", "words"),
    [
        *(
            pytest.param(2, [f"peft={peft}", *words], id=f"{peft}-{name}")
            for peft in ("lora", "dora", "pissa", "lora_ga", "lora_pro")
            for name, words in PUBLISHED_RHO.items()
            if refusal(peft, words[0].partition("=")[2]) is None
        ),
        *(
            pytest.param(4, [f"peft={peft}", *COPY], id=f"{peft}-copy-4")
            for peft in ("lora", "dora", "pissa", "lora_ga", "lora_pro")
        ),
        pytest.param(2, [*COPY, "trainer.kernels=off"], id="copy-kernels-off"),
        pytest.param(3, [*COPY, "optim.batch_size=6"], id="copy-3"),
        pytest.param(
            2,
            [*RECOMPUTE, *CHECKPOINTED, *HALF],
            marks=pytest.mark.skipif(not HOLDS_BF16, reason="this CPU has no BF16 instructions"),
            id="recompute-checkpointing-bfloat16",
        ),
        pytest.param(2, [*COPY, *CHECKPOINTED, "rho.resample=micro_batch"], id="copy-checkpointing-micro_batch"),
        pytest.param(2, [*RECOMPUTE, "rho.per_rank=true"], id="recompute-per_rank"),
        pytest.param(2, [*COPY, "rho.every=2", "peft.lora_dropout=0.2"], id="copy-every-dropout"),
        pytest.param(2, ["peft=rslora", *RECOMPUTE], id="rslora"),
        pytest.param(2, ["peft=lora_plus", *COPY], id="lora_plus"),
        pytest.param(2, ["peft=lora_fa", *COPY], id="lora_fa"),
        pytest.param(2, ["peft=olora", "rho=off"], id="olora"),
        pytest.param(3, ["peft=lora_ga", *RECOMPUTE, "optim.batch_size=6"], id="lora_ga-3"),  # 8 batches: 3, 3 and 2
        *(
            pytest.param(2, [f"rho={name}", "rho.sigma=0.05"], id=name)
            for name in ("look_sam", "esam", "rwp_lora", "nbar", "obar", "rop")
        ),
    ],
)
def test_sharding_changes_no_bit_of_a_ddp_run(settings, count, words):  # noqa: F811
    kept = without(settings, words)
    ddp, fsdp = named(kept, words, "ddp"), named(kept, words, "fsdp")
    folders = train(count, ddp, "ddp"), train(count, fsdp)
    assert metrics_rows(folders[0]) == metrics_rows(folders[1])
    assert adapter_bytes(folders[0]) == adapter_bytes(folders[1])
    records = [record_of(folder) for folder in folders]
    assert records[0]["backbone_sha256"] == records[1]["backbone_sha256"]
    for key in ("perturbation", "kernels"):
        assert records[0][key] == records[1][key]


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize(
    ("before", "after", "trainer", "words"),
    [
        (2, 2, "fsdp", COPY),
        (2, 2, "ddp", RECOMPUTE),
        (2, 1, "single", COPY),
        (2, 4, "fsdp", [*RECOMPUTE, "rho.every=3"]),
        (2, 4, "fsdp", ["rho=off"]),
        (2, 4, "fsdp", ["peft=pissa", *COPY]),
        (4, 2, "fsdp", ["peft=dora", *RECOMPUTE]),
        (2, 4, "fsdp", ["peft=lora_ga", *COPY]),
        (2, 3, "fsdp", [*COPY, "optim.batch_size=12", "dataset.train_rows=33"]),
        (2, 1, "single", ["rho=bi_lora", "rho.sigma=0.05"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_a_killed_run_goes_on(settings, before, after, trainer, words):  # noqa: F811
    kept = without(settings, words)
    whole, killed = named(kept, words, "whole"), named(kept, words, "killed")
    undisturbed = train(before, whole)
    ranks = fork_ranks(before, ["trainer=fsdp", *killed], entry=main_until_step_five)
    assert [rank.wait(120) for rank in ranks] == [-signal.SIGKILL] * before, ranks[0].log.read_text()[-3000:]
    folder = run_folder(killed)
    assert checkpoint.step_of(checkpoint.checkpoints(folder)[-1]) == 4
    assert train(after, ["resume=true", *killed], trainer) == folder
    assert record_of(folder)["resumed_from"] == 4
    if before == after:
        assert adapter_bytes(folder) == adapter_bytes(undisturbed)
    assert_same(undisturbed, folder)


def share_one_gpu(words: list[str]) -> int:
    """`run_exp.main` in processes that have the first GPU together, where NCCL would refuse them."""
    os.environ["LOCAL_RANK"] = "0"
    PartialState(backend="gloo")
    DTensor.full_tensor = gathered_on_the_host  # torch's crashes with gloo and tensors on a GPU
    plain, offload = loading.load_backbone, "trainer=fsdp_offload" in words

    def load_and_check(*args, **kwargs) -> nn.Module:
        model = plain(*args, **kwargs)
        shares = [share(parameter) for parameter in model.parameters() if is_sharded(parameter)]
        assert shares
        assert {(rows.is_cpu, rows.is_pinned()) for rows in shares} == {(offload, offload)}
        return model

    loading.load_backbone = load_and_check
    return run_exp.main(words)


def gathered_on_the_host(weight: DTensor) -> torch.Tensor:
    parts = [torch.empty(0)] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, weight.detach()._local_tensor.cpu())
    return torch.cat(parts).to(weight.device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "words",
    [
        ["rho=off"],
        PUBLISHED_RHO["recompute"],
        ["rho=flat", "rho.sigma=0.1"],  # auto is copy there, and recompute with shares on the host
        [*RECOMPUTE, *CHECKPOINTED, *HALF],
        [*RECOMPUTE, "rho.every=2", *EVAL],
        *([f"peft={peft}", *PUBLISHED_RHO["recompute"]] for peft in ("dora", "pissa", "lora_ga", "lora_pro")),
        *(PUBLISHED_RHO[name] for name in ("sam", "bi_lora")),
    ],
    ids=" ".join,
)
def test_shares_on_the_host_change_no_bit(settings, words):  # noqa: F811
    kept = without(settings, [*words, "trainer.device=", "trainer="])
    kept = [*kept[:-1], "trainer.device=cuda", kept[-1]]
    on_gpu, on_host = named(kept, words, "gpu"), named(kept, words, "host")
    options = {"entry": share_one_gpu, "CUDA_VISIBLE_DEVICES": "0"}
    folders = train(2, on_gpu, "fsdp", **options), train(2, on_host, "fsdp_offload", **options)
    assert metrics_rows(folders[0]) == metrics_rows(folders[1])
    assert adapter_bytes(folders[0]) == adapter_bytes(folders[1])
    records = [record_of(folder) for folder in folders]
    assert records[0]["backbone_sha256"] == records[1]["backbone_sha256"]
    assert records[0]["kernels"] == records[1]["kernels"]
    noise = [record["perturbation"] or {} for record in records]
    assert noise[1].get("mode") in (None, "recompute")
    assert noise[0] | {"mode": None} == noise[1] | {"mode": None}


SHARDED_PEFT = {"lora", "rslora", "lora_plus", "lora_fa", "lora_pro", "lora_ga", "dora", "pissa", "olora"}
SHARDED_RHO = {"off", "flat", "sam", "look_sam", "esam", "rwp_lora", "bi_lora", "nbar", "obar", "rop"}


def test_every_other_pair_is_refused_by_name():
    allowed = {name for name in list(ADAPTERS) if ADAPTERS[name].not_sharded is None}
    assert allowed == SHARDED_PEFT
    assert {name for name in list(REGULARIZERS) if REGULARIZERS[name].not_sharded is None} == SHARDED_RHO
    for peft, rho in (("eva", "flat"), ("corda", "off"), ("adalora", "sam"), ("lora", "sam_full")):
        with pytest.raises(ConfigError) as caught:
            run_exp.experiment_of(["trainer=fsdp", "eval=[]", f"peft={peft}", f"rho={rho}"])
        found = "\n".join(caught.value.errors)
        assert (f"Invalid trainer=fsdp with peft={peft}: " in found) == (peft != "lora")
        assert (f"Invalid trainer=fsdp with rho={rho}: " in found) == (rho == "sam_full")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=t5base", "dataset=cola"], "Invalid trainer=fsdp with model=t5base (seq2seq): only decoder-only"),
        (["model.quantize=nf4"], "Invalid trainer=fsdp with model.quantize=nf4: packed weights have no rows"),
        (["eval=[gsm8k]"], "Invalid trainer=fsdp with eval=[gsm8k]: one process scores"),
        (["trainer.zero=2"], "Invalid trainer.fsdp=true with trainer.zero=2: each shards in its own way"),
        (["rho=flat", "rho.mode=copy", "trainer.offload=true"], "Invalid rho.mode=copy with weights that FSDP2 keeps"),
        (["trainer.offload=true", "trainer.device=cpu"], "Invalid trainer=fsdp with trainer.device=cpu: its weights"),
        (["rho=flat", "rho.mode=inplace"], "Invalid rho.mode=inplace with weights that FSDP2 shards"),
        (["rho=flat", "rho.scale=iid"], "Invalid rho.scale=iid with weights that FSDP2 shards"),
        (["rho=flat", "rho.per_rank=true"], "Invalid rho.per_rank=true with rho.mode=auto and weights"),
    ],
)
def test_what_is_not_sharded_is_refused_before_weights_are_loaded(words, message):
    with pytest.raises(ConfigError) as caught:
        run_exp.experiment_of(["trainer=fsdp", *([] if "eval=[gsm8k]" in words else ["eval=[]"]), *words])
    assert any(error.startswith(message) for error in caught.value.errors), caught.value.errors


def test_a_model_without_a_plan_of_its_layers_is_refused(tiny_model_folder):
    config = loading.ModelConfig(name="tiny", hub_id=str(tiny_model_folder), family="causal_lm")
    assert fit.sharding_errors(config, loading.skeleton(config)) == []
    (error,) = fit.sharding_errors(config, tiny_gpt2().get_base_model())
    assert "transformers has no plan for its layers (GPT2LMHeadModel); use trainer=ddp" in error


def test_a_cpu_beside_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    experiment = run_exp.experiment_of(["trainer=fsdp", "eval=[]", "trainer.device=cpu"])
    with pytest.raises(ConfigError, match="set CUDA_VISIBLE_DEVICES= to hide them"):
        distributed.check_launch(experiment)


@pytest.mark.parametrize(
    ("processes", "gpu", "message"),
    [
        ("1", True, "Invalid trainer=fsdp_offload with one process: FSDP2 keeps shares"),
        ("2", False, "Invalid trainer=fsdp_offload without a GPU: the weights are on the host in any case"),
        (None, False, "Invalid trainer=fsdp_offload without processes: set trainer.gpus=N"),
    ],
)
def test_shares_on_the_host_need_several_processes_and_gpus(monkeypatch, processes, gpu, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ConfigError) as caught:
        distributed.check_launch(run_exp.experiment_of(["trainer=fsdp_offload", "eval=[]"]))
    (error,) = caught.value.errors
    assert error.startswith(message)


def test_tied_weights_are_refused_unless_they_are_recomputed(monkeypatch):
    monkeypatch.setattr(PerturbedLayer, "sharded", True)
    layer = PerturbedLayer("head", nn.Linear(4, 6).requires_grad_(False), tied_to=["embedding"])
    for mode in ("copy", "auto"):
        with pytest.raises(ValueError, match=rf"Invalid mode={mode} with tied weights .* head \(to embedding\)"):
            WeightPerturbation([layer], mode=mode, sigma=0.1, total_steps=4, seed=1)


def test_bf16_that_a_cpu_holds_as_fp32_is_refused(settings, monkeypatch):  # noqa: F811
    held = Precision(torch.bfloat16, torch.float32, None, "it has no BF16 instructions")
    monkeypatch.setattr(prepare, "choose_precision", lambda *given: held)
    experiment = run_exp.experiment_of([*settings, "trainer=fsdp", "rho=off", *HALF])
    with pytest.raises(ConfigError) as caught:
        run_exp.prepare(experiment, torch.device("cpu"))
    assert "Invalid trainer=fsdp with model.dtype=bfloat16 on this CPU: it holds such weights" in str(caught.value)
