"""The model against diffusers' own parts: noising, weights, embeddings, latents, adapters; and what is refused."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import compute_snr
from peft import PeftModel
from safetensors.torch import load_file, save_file

import run_exp
from data import text_to_image
from flatlora import methods
from flatlora.config.sections import DiffusionModelConfig
from flatlora.methods import Start
from flatlora.models import diffusion, latents, loading, scorers, sources
from flatlora.models.families.text_to_image import RANDOM_SDXL, size_errors
from flatlora.models.latents import LatentRows, collate_latents
from flatlora.train.samplers import BucketSampler
from flatlora.utils import precision
from flatlora.utils.errors import ConfigError

CPU = torch.device("cpu")


def config_of(**changes):
    settings = {"name": "sdxl_tiny", "hub_id": RANDOM_SDXL, "family": "text_to_image", "embedded": "random-sdxl"}
    return DiffusionModelConfig(**settings | {"dtype": "float32", "captioner": None} | changes)


@pytest.fixture(autouse=True)
def own_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def source():
    return sources.backbone_source(config_of())


def shapes(*words):
    return text_to_image.prepared(run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes", *words]).dataset, None)


def encoded(source, *words, config=None, seed=1):
    experiment = run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes", *words])
    rows = text_to_image.prepared(experiment.dataset, None)
    config = config or experiment.model
    return text_to_image.encode(rows, experiment.dataset, config, source, CPU, state="s", seed=seed).train


def adapted(config, **changes):
    section = run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes"]).peft.model_copy(update=changes)
    model = methods.ADAPTERS["lora"].apply(loading.load_backbone(config, CPU), section, Start(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model, section


# --- the loss


def reference_loss(pipeline, batch, gamma=None):
    """Slow twin of `TextToImageModel.forward`: diffusers' scheduler noises, its functions weigh, one row at a time."""
    schedule, total = DDPMScheduler.from_config(pipeline.scheduler.config), 0.0
    for row in range(len(batch["latents"])):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        noisy = schedule.add_noise(one["latents"], one["noise"], one["timesteps"])
        conditions = {"text_embeds": one["pooled"], "time_ids": one["time_ids"]}
        found = pipeline.unet(noisy, one["timesteps"], one["prompt_embeds"], added_cond_kwargs=conditions).sample
        predicts = schedule.config.prediction_type
        target = one["noise"]
        if predicts == "v_prediction":
            target = schedule.get_velocity(one["latents"], one["noise"], one["timesteps"])
        weight = 1.0
        if gamma is not None:
            snr = compute_snr(schedule, one["timesteps"])
            weight = snr.clamp(max=gamma) / (snr + (predicts == "v_prediction"))
        total = total + one["weights"] * weight * torch.nn.functional.mse_loss(found, target)
    return total


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
@torch.no_grad()
def test_the_loss_is_diffusers(source, prediction, gamma):
    pipeline = StableDiffusionXLPipeline.from_pretrained(source, add_watermarker=False)
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    model = diffusion.TextToImageModel(pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config), (), gamma)
    rows = encoded(source)
    batch = collate_latents([rows[0], rows[3], rows[5]])
    batch["timesteps"][0] = 20  # little noise: a signal-to-noise ratio far above gamma, which weighs it down
    wanted = reference_loss(pipeline, batch, gamma)
    torch.testing.assert_close(model(**batch).loss, wanted.squeeze(), rtol=1e-5, atol=1e-6)
    if gamma is not None:
        assert model(**batch).loss != reference_loss(pipeline, batch)


def test_other_predictions_are_refused(source):
    unet = loading.load_backbone(config_of(), CPU).unet
    schedule = DDPMScheduler(prediction_type="sample")
    with pytest.raises(ConfigError, match="prediction_type=sample"):
        diffusion.TextToImageModel(unet, schedule)


def test_the_models_old_name_still_works():
    with pytest.warns(DeprecationWarning, match="TextToImageModel"):
        assert diffusion.Denoiser is diffusion.TextToImageModel
    with pytest.raises(AttributeError, match="has no attribute 'Denoisers'"):
        _ = diffusion.Denoisers


@torch.no_grad()
def test_embeddings_and_latents_are_the_pipelines(source):
    pipeline = StableDiffusionXLPipeline.from_pretrained(source, add_watermarker=False)
    rows, shown = encoded(source), shapes().train
    embeds, _, pooled, _ = pipeline.encode_prompt("a green square", device=CPU, do_classifier_free_guidance=False)
    torch.testing.assert_close(rows[1]["prompt_embeds"], embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[1]["pooled"], pooled, rtol=1e-4, atol=1e-5)
    found = pipeline.vae.encode(shown.view(1).pixels[None]).latent_dist
    torch.testing.assert_close(rows.means[1], found.mean * pipeline.vae.config.scaling_factor)
    torch.testing.assert_close(rows.stds[1], found.std * pipeline.vae.config.scaling_factor)
    decoded = diffusion.decode(pipeline.vae, rows.means[1])
    whole = pipeline.vae.decode(found.mean).sample
    torch.testing.assert_close(decoded, (whole / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_latents_with_a_mean_and_std_of_each_channel(source):
    vae = diffusion.load_vae(config_of(), source, CPU)
    vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    scale, latent = diffusion.Scale(vae), torch.randn(4, 8, 8)
    torch.testing.assert_close(scale.to_vae(scale.to_model(latent)), latent)
    wanted = (latent[2] - 0.3) * vae.config.scaling_factor / 3.0
    torch.testing.assert_close(scale.to_model(latent)[2], wanted)


# --- rows


def test_draws_are_a_function_of_seed_epoch_and_row(source):
    rows = encoded(source, "dataset.flip=true")
    first = rows[2]
    assert first["latents"].shape == first["noise"].shape == (1, 4, 32, 32)
    state = torch.get_rng_state()
    assert all(torch.equal(first[key], rows[2][key]) for key in first)
    assert torch.equal(torch.get_rng_state(), state)
    rows.begin_epoch(1)
    assert not torch.equal(first["noise"], rows[2]["noise"])
    rows.begin_epoch(0)
    assert torch.equal(first["noise"], rows[2]["noise"])
    assert not torch.equal(first["noise"], rows[3]["noise"])
    assert not torch.equal(first["noise"], encoded(source, "dataset.flip=true", seed=2)[2]["noise"])


def test_flips_are_drawn_and_normals_are_normal(source):
    rows = encoded(source, "dataset.flip=true")
    assert rows.means[0].shape == (2, 4, 32, 32)
    rows.stds = [torch.zeros_like(std) for std in rows.stds]  # what is drawn is the mean
    rows.means = [torch.randn_like(mean) for mean in rows.means]  # the eight shapes are their own mirror images
    drawn, noises, times = [], [], []
    for epoch in range(40):
        rows.begin_epoch(epoch)
        row = rows[7]
        drawn.append(torch.equal(row["latents"][0], rows.means[7][1]))
        noises.append(row["noise"])
        times.append(int(row["timesteps"]))
    assert 8 < sum(drawn) < 32
    noise = torch.stack(noises)
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert len(set(times)) > 30
    assert 0 <= min(times) <= max(times) < 1000


def test_rows_of_the_class_ride_along(source, tmp_path):
    words = ("dataset.class_prompt=a shape", "dataset.class_images=3", "dataset.class_steps=2")
    rows = encoded(source, *words, "dataset.prior_weight=0.5")
    row = rows[4]
    assert row["latents"].shape[0] == 2
    assert row["weights"].tolist() == [1.0, 0.5]
    assert torch.equal(row["prompt_embeds"][1], rows.prior[1]["prompt_embeds"][0])
    assert len(list((tmp_path / "cache/class_images").rglob("*.png"))) == 3
    batch = collate_latents([rows[0], rows[1]])
    assert batch["weights"].tolist() == [0.5, 0.25, 0.5, 0.25]


def test_the_cache_is_used_and_a_broken_file_made_anew(source, tmp_path, monkeypatch, caplog):
    first = encoded(source)
    (file,) = (tmp_path / "cache/latents").glob("*.safetensors")
    monkeypatch.setattr(diffusion, "load_vae", lambda *args: pytest.fail("encoded again"))
    again = encoded(source)
    assert all(torch.equal(a, b) for a, b in zip(first.means, again.means, strict=True))
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        encoded(source, "dataset.resolution=32")
    monkeypatch.undo()
    monkeypatch.setattr(latents, "cache_folder", lambda: tmp_path / "cache")
    file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        anew = encoded(source)
    assert "it will be rebuilt" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(first.means, anew.means, strict=True))


def test_long_prompts_are_cut_and_that_is_said_once(source, caplog):
    tokenizers = diffusion.load_tokenizers(config_of(), source)
    with caplog.at_level(logging.WARNING):
        ids = diffusion.token_ids(tokenizers, ["x" * 200, "y" * 100, "short"])
        assert not caplog.records
        diffusion.warn_of_long_prompts(tokenizers, ["x" * 200, "y" * 100, "short", "short", "x" * 200])
    assert [one.shape for one in ids] == [(3, 77), (3, 77)]
    (reported,) = [record.getMessage() for record in caplog.records]
    assert "2 of 3 prompts are longer than 77 tokens" in reported


def test_a_vae_that_makes_nan_names_the_remedy(source):
    vae = diffusion.load_vae(config_of(vae_dtype="float16"), source, CPU)
    with torch.no_grad():
        next(vae.parameters()).mul_(float("inf"))
    for act in (
        lambda: diffusion.moments(vae, torch.zeros(3, 64, 64)),
        lambda: diffusion.validate_unbroken(vae, torch.tensor(float("nan"))),
    ):
        with pytest.raises(ConfigError, match=r"vae_dtype=float16.*model\.vae_dtype=float32"):
            act()


@pytest.mark.parametrize(("fast", "products"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_vae_computes_in_the_dtype_of_its_cpu(source, monkeypatch, fast, products):
    monkeypatch.setattr(precision, "cpu_features", lambda: precision.CPUFeatures(*[fast] * 4))
    config = config_of(vae_dtype="bfloat16")
    vae = diffusion.load_vae(config, source, CPU)
    assert {p.dtype for p in vae.parameters()} == {products}
    with pytest.raises(ConfigError, match=r"Invalid model\.vae_dtype=bfloat16"):
        diffusion.validate_unbroken(vae, torch.tensor(float("nan")))
    keys = [latents._key(config, "state", CPU)]
    monkeypatch.setattr(precision, "cpu_features", lambda: precision.CPUFeatures(*[True] * 4))
    assert (latents._key(config, "state", CPU) == keys[0]) is fast  # latents of other arithmetic have another file


def test_a_vae_that_makes_nan_in_fp32_is_broken(source):
    vae = diffusion.load_vae(config_of(), source, CPU)
    with pytest.raises(ConfigError, match=r"vae_dtype=float32.*its weights are broken"):
        diffusion.validate_unbroken(vae, torch.tensor(float("inf")))


@pytest.mark.parametrize(("dtype", "remedy"), [("float32", "the training diverged"), ("bfloat16", "wider range")])
def test_a_unet_that_makes_nan_is_distinguished_from_its_vae(source, dtype, remedy):
    config = config_of(dtype=dtype)
    pipeline = diffusion.pipeline_of(loading.load_backbone(config, CPU), config, source, CPU)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ConfigError, match=rf"Invalid model\.dtype={dtype}: the UNet makes NaN.* of 'a'.*{remedy}"):
        diffusion.sample(pipeline, ["a"], [0], size=64, steps=1, guidance=1.0)


def test_the_vae_keeps_its_dtype_under_autocast(source):
    config = config_of()
    pipeline = diffusion.pipeline_of(loading.load_backbone(config, CPU), config, source, CPU)
    seen = []
    pipeline.unet.conv_in.register_forward_hook(lambda module, args, out: seen.append(("unet", out.dtype)))
    pipeline.vae.decoder.conv_in.register_forward_hook(lambda module, args, out: seen.append(("vae", out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        diffusion.sample(pipeline, ["a"], [0], size=64, steps=1, guidance=1.0)
    assert dict(seen) == {"unet": torch.bfloat16, "vae": torch.float32}


def test_loading_leaves_diffusers_bars_as_they_were(source):
    from diffusers.utils import logging as diffusers_logging

    for wanted in (True, False):
        (diffusers_logging.enable_progress_bar if wanted else diffusers_logging.disable_progress_bar)()
        diffusion.load_unet(config_of(), source)
        assert diffusers_logging.is_progress_bar_enabled() is wanted
    diffusers_logging.enable_progress_bar()


# --- caches


@pytest.fixture
def own_pipeline(tmp_path, source):
    """A copy that may be changed, and its config."""
    folder = shutil.copytree(source, tmp_path / "pipeline")
    return folder, config_of(embedded=None, hub_id=str(folder))


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("part", "file", "key", "load"),
    [
        ("unet", "diffusion_pytorch_model", "conv_out.bias", diffusion.load_unet),
        ("vae", "diffusion_pytorch_model", "quant_conv.weight", lambda *a: diffusion.load_vae(*a, CPU)),
        (
            "text_encoder_2",
            "model",
            "text_projection.weight",
            lambda *a: diffusion.load_text_encoders(*a, CPU),
        ),
    ],
)
def test_a_part_without_some_weights_is_refused_with_their_names(own_pipeline, part, file, key, load):
    folder, config = own_pipeline
    path = folder / part / f"{file}.safetensors"
    tensors = load_file(path)
    spare = tensors.pop(key)
    save_file(tensors | {"spare.weight": spare}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError) as reported:
        load(config, str(folder))
    (message,) = reported.value.errors
    assert message.startswith(f"Invalid model.hub_id={folder}: its weights do not make a whole ")
    assert f"1 ({key}) missing; 1 (spare.weight) left over" in message


def test_settings_of_a_pipeline_belong_to_its_state(own_pipeline):
    folder, config = own_pipeline
    states = [loading.backbone_state(config)]
    changed(folder / "vae/config.json", scaling_factor=1.0)
    states.append(loading.backbone_state(config))
    changed(folder / "scheduler/scheduler_config.json", num_train_timesteps=500)
    states.append(loading.backbone_state(config))
    with_vae = config.model_copy(update={"vae_id": str(folder / "vae")})
    states.append(loading.backbone_state(with_vae))
    changed(folder / "vae/config.json", scaling_factor=2.0)
    states.append(loading.backbone_state(with_vae))
    assert len(set(states)) == 5


def test_a_vae_of_its_own_belongs_to_the_latents(own_pipeline):
    folder, config = own_pipeline
    config = config.model_copy(update={"vae_id": str(folder / "vae")})
    before = encoded(str(folder), config=config).means[0]
    changed(folder / "vae/config.json", scaling_factor=1.0)
    assert not torch.equal(encoded(str(folder), config=config).means[0], before)  # `encoded` names one state


@pytest.mark.extra
def test_class_pictures_are_what_the_model_made_or_made_anew(source, tmp_path, caplog):
    words = ("dataset.class_prompt=a shape", "dataset.class_images=2", "dataset.class_steps=1", "dataset.min_side=64")
    before = encoded(source, *words).prior
    first, second = sorted((tmp_path / "cache/class_images").glob("*/*.png"))
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(second.read_bytes()[:100])
    first.with_name(f"00000-{'0' * 20}.png").mkdir()  # nobody's picture
    again = encoded(source, *words).prior
    assert first.read_bytes() == whole
    assert all(torch.equal(one, other) for one, other in zip(before.means, again.means, strict=True))
    assert sum("it will be rebuilt" in record.getMessage() for record in caplog.records) == 3


def test_pictures_of_the_class_may_be_small(source):
    words = ("dataset.class_prompt=a", "dataset.class_images=1", "dataset.class_steps=1", "dataset.resolution=32")
    assert len(encoded(source, *words, "dataset.min_side=60").prior) == 1


def test_buckets_fill_whole_micro_batches():
    buckets = ["a"] * 5 + ["b"] * 3 + ["c"]
    sampler = BucketSampler(buckets, seed=0, micro_batch=2)
    again = list(sampler)
    assert len(set(again)) == len(again) == len(sampler) == 6 + 4 + 2
    order = [row % 9 for row in again]
    assert set(order) == set(range(9))  # every picture, some of them twice
    assert sorted(row for row in again if row >= 9)[-1] == 8 + 9
    for start in range(0, len(order), 2):
        assert len({buckets[row] for row in order[start : start + 2]}) == 1
    assert list(sampler) == again
    sampler.set_epoch(1)
    assert list(sampler) != again


def test_a_row_that_is_taken_again_is_drawn_anew(source):
    rows = encoded(source)
    once, again = rows[3], rows[3 + len(rows)]
    assert not torch.equal(once["noise"], again["noise"])
    assert not torch.equal(once["latents"], again["latents"])
    assert torch.equal(once["pooled"], again["pooled"])  # of the same picture


# --- adapters


@pytest.mark.extra
@pytest.mark.parametrize(
    ("train_text", "changes"),
    [
        pytest.param(False, {}, marks=pytest.mark.extra),
        (False, {"target_modules": "all_conv", "lora_alpha": 16.0}),
        pytest.param(True, {"lora_r": 3}, marks=pytest.mark.extra),
    ],
)
def test_a_saved_adapter_loads_in_diffusers_and_in_peft(source, tmp_path, train_text, changes):
    config = config_of(train_text_encoders=train_text)
    model, section = adapted(config, **changes)
    methods.ADAPTERS["lora"].save(model, section, tmp_path, Start(0))
    loading.complete_adapter(config, tmp_path)
    settings = {
        "prompt": ["a red circle"],
        "height": 64,
        "width": 64,
        "num_inference_steps": 2,
        "output_type": "latent",
    }

    def drawn(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(generator=[torch.Generator().manual_seed(3)], **settings).images

    ours = drawn(diffusion.pipeline_of(model.eval().get_base_model(), config, source, CPU))
    plain = StableDiffusionXLPipeline.from_pretrained(source, add_watermarker=False)
    untouched = drawn(plain)
    plain.load_lora_weights(tmp_path)
    torch.testing.assert_close(drawn(plain), ours, rtol=1e-4, atol=1e-4)
    assert (ours - untouched).abs().max() > 0.1
    again = PeftModel.from_pretrained(loading.load_backbone(config, CPU), tmp_path).eval()
    peft_drew = drawn(diffusion.pipeline_of(again.get_base_model(), config, source, CPU))
    torch.testing.assert_close(peft_drew, ours, rtol=1e-4, atol=1e-4)
    loaded, processor, reported = loading.load_for_inference(str(tmp_path), None, CPU)
    assert processor is None
    assert reported["base"] == RANDOM_SDXL
    if not train_text:  # an adapter of the text encoders needs the run that says so
        drew = drawn(diffusion.pipeline_of(loaded.get_base_model(), config, source, CPU))
        torch.testing.assert_close(drew, ours, rtol=1e-4, atol=1e-4)


def test_the_export_for_diffusers_has_the_same_bytes_each_time(tmp_path):
    """safetensors writes metadata in random order, so that one pair of files in two would differ."""
    config = config_of()
    model, section = adapted(config)
    methods.ADAPTERS["lora"].save(model, section, tmp_path, Start(0))
    exported = tmp_path / "pytorch_lora_weights.safetensors"
    contents = set()
    for _ in range(8):
        loading.complete_adapter(config, tmp_path)
        contents.add(exported.read_bytes())
        exported.unlink()
    assert len(contents) == 1
    (content,) = contents
    assert (int.from_bytes(content[:8], "little")) % 8 == 0  # aligned, as the format asks
    exported.write_bytes(content)
    assert load_file(exported).keys() == {
        name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["to_q", "to_w"]}, "to_w matches no layer of TextToImageModel"),
        ({"target_modules": "qv"}, "qv matches no layer"),
        ({"lora_r": 500}, "lora_r=500"),
        ({"lora_r": None, "lora_relative_r": 0.5}, "different widths"),
    ],
)
def test_layers_that_are_not_there_are_refused_on_the_skeleton(changes, words):
    section = run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes"]).peft.model_copy(update=changes)
    with pytest.raises(ConfigError, match=words):
        methods.ADAPTERS["lora"].check(loading.skeleton(config_of()), section)


def test_trained_text_encoders_need_layers_of_theirs():
    section = run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes"]).peft
    skeleton = loading.skeleton(config_of(train_text_encoders=True))
    assert skeleton.parts == ["unet", "text_encoder", "text_encoder_2"]
    methods.ADAPTERS["lora"].check(skeleton, section)
    only_unet = section.model_copy(update={"target_modules": ["to_q"]})
    with pytest.raises(ConfigError, match="no layer of the text_encoder is among them"):
        methods.ADAPTERS["lora"].check(skeleton, only_unet)


@pytest.mark.parametrize("peft", ["adalora", "eva", "corda", "full_ft"])
def test_methods_that_are_not_of_diffusion_say_why(peft):
    with pytest.raises(ConfigError, match=rf"Invalid peft={peft} with model=sdxl_tiny \(text_to_image\)"):
        run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes", f"peft={peft}"])


@pytest.mark.parametrize(
    ("words", "head"),
    [
        (["model.quantize=nf4"], "Invalid model.quantize=nf4 with model=sdxl_tiny (text_to_image)"),
        (["model.attn=eager"], "Invalid model.attn=eager with model=sdxl_tiny (text_to_image)"),
        (["model.dtype=float16", "trainer=cpu"], "Invalid model.dtype=float16 with trainer=cpu"),
        (["model.snr_gamma=0"], "Invalid model.snr_gamma=0: it must be > 0"),
        (["model.revision=main"], "Invalid model.revision=main with model.embedded=random-sdxl"),
        (["optim.group_by_length=true"], "Invalid optim.group_by_length=true with dataset=shapes"),
        (["model.vae_dtyp=float16"], "Unknown key model.vae_dtyp: did you mean model.vae_dtype?"),
    ],
)
def test_settings_of_a_diffusion_model_are_checked(words, head):
    with pytest.raises(ConfigError) as caught:
        run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes", *words])
    assert [message for message in caught.value.errors if message.startswith(head)], caught.value.errors


def test_half_precision_needs_a_gpu_also_where_the_machine_chooses():
    with pytest.raises(ConfigError, match=r"Invalid model\.dtype=float16 on cpu.*use model\.dtype=bfloat16 or float32"):
        loading.check_weights(config_of(dtype="float16"), CPU)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model_index\.json"):
        loading.skeleton(config_of(embedded=None, hub_id=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"pip install 'flatlora-suite\[diffusion\]'"):
        _without_diffusers()


@pytest.mark.parametrize(
    "part",
    [
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_part_that_is_missing_is_named_before_anything_is_loaded(own_pipeline, part):
    folder, config = own_pipeline
    (folder / part).unlink()
    with pytest.raises(ConfigError, match=rf"Invalid model\.hub_id=.*it has no {part}"):
        loading.skeleton(config)


def test_a_hub_that_is_out_of_reach_is_no_broken_pipeline(monkeypatch):
    for module in (diffusion, sources):
        monkeypatch.setattr(module, "hub_is_reachable", lambda: False)
    config = config_of(embedded=None, hub_id="stabilityai/stable-diffusion-xl-base-1.0")
    with pytest.raises(ConfigError, match=r"Cannot load model\.hub_id=stabilityai.*the hub cannot be reached"):
        loading.skeleton(config)


def test_errors_name_the_setting_that_was_given(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot load model\.vae_id=\./nope: there is no such folder"):
        size_errors(config_of(vae_id="./nope"), [(64, 64)])
    with pytest.raises(ConfigError, match=r"eval\.text_to_image\.clip=\./nope"):
        scorers.check_clip("./nope")
    with pytest.raises(ConfigError, match=r"eval\.text_to_image\.captioner=\./nope"):
        scorers.check_captioner("./nope")


def _without_diffusers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        diffusion.require_diffusers()


def test_sizes_that_the_parts_cannot_halve_are_refused():
    assert size_errors(config_of(), [(68, 68)]) == []
    assert "multiples of 8" in size_errors(config_of(), [(68, 68)], drawn=True)[0]
    (message,) = size_errors(config_of(), [(64, 64), (64, 62)])
    assert "pictures of 64 × 62 pixels, and both sides must be multiples of 4" in message


def test_an_empty_set_has_no_rows():
    assert len(LatentRows([], [], [], [], timesteps=1, seed=0)) == 0
