"""The contenders of bench.py sdxl on a tiny UNet: they do the same work."""

import pytest
import torch

from flatlora import methods
from flatlora.fused.lora_linear import fuse, groups_of
from flatlora.methods import Start
from flatlora.methods.adapters.lora import LoraMethodConfig
from flatlora.models.diffusion import TextToImageModel
from scripts import bench_sdxl

TINY = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def unet():
    return bench_sdxl.random_unet(CPU, **TINY)


def tiny_batch():
    return bench_sdxl.random_batch(CPU, side=16, width=64, pooled=32)


def steps_of(unet, name, count=3):
    make = bench_sdxl.diffusers_step if name == "diffusers" else bench_sdxl.our_step
    step, close = make(bench_sdxl.shell_of(unet), bench_sdxl.noise_schedule(), name)
    losses = [float(step(number, tiny_batch())) for number in range(count)]
    close()
    return losses


@pytest.mark.extra
def test_all_contenders_take_the_same_first_step(unet):
    before = [p.clone() for p in unet.parameters()]
    losses = {name: steps_of(unet, name) for name in bench_sdxl.CONTENDERS}
    assert losses["LoRA"][0] == pytest.approx(losses["diffusers"][0], rel=1e-2)  # BF16, in other places
    assert losses["Flat-LoRA copy"] == losses["Flat-LoRA recompute"]
    assert losses["Flat-LoRA copy"][0] == pytest.approx(losses["LoRA"][0], rel=5e-2)
    assert losses["Flat-LoRA copy"][0] != losses["LoRA"][0]
    assert all(torch.equal(p, q) for p, q in zip(unet.parameters(), before, strict=True))


def test_the_table_names_every_contender():
    one = {"step_s": [1.0, 2.0, 3.0], "peak_gib": 4.0, "reserved_gib": 5.0}
    table = bench_sdxl.table_of([dict.fromkeys(bench_sdxl.CONTENDERS, one)] * 2)
    assert list(table.columns[0].cells) == list(bench_sdxl.CONTENDERS)
    assert set(table.columns[2].cells) == {"1.000"}


def test_attention_layers_that_read_one_input_are_one_group(unet):
    """And give what PEFT's own forward gives."""
    batch = {key: value.float() if value.is_floating_point() else value for key, value in tiny_batch().items()}
    config = LoraMethodConfig(name="a", method="lora", lora_r=4, lora_alpha=4.0, target_modules="attention")

    def gradients(fused):
        shell = bench_sdxl.shell_of(unet).float()
        backbone = TextToImageModel(shell, bench_sdxl.noise_schedule()).requires_grad_(False)
        model = methods.ADAPTERS["lora"].apply(backbone, config, Start(0)).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        taken = fuse(model) if fused else 0
        loss = model(**batch).loss
        loss.backward()
        return model, taken, loss, [p.grad for p in model.parameters() if p.requires_grad]

    plain, fused = gradients(False), gradients(True)
    assert fused[1] == sum("lora_A" in name for name, _ in fused[0].named_parameters())
    names = {id(module): name for name, module in fused[0].named_modules()}
    sizes = {"attn1": set(), "attn2": set()}
    for group in groups_of(fused[0]):
        kind = "attn1" if ".attn1." in names[id(group.members[0].module)] else "attn2"
        sizes[kind].add(len(group.members))
    assert sizes == {"attn1": {3, 1}, "attn2": {2, 1}}  # q, k and v; k and v of the prompt; single layers
    torch.testing.assert_close(fused[2], plain[2], rtol=1e-4, atol=1e-5)
    for one, other in zip(fused[3], plain[3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
