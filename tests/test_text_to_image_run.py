"""A tiny SDXL pipeline of random weights trains on eight pictures: LoRA and Flat-LoRA, killed and resumed, scored."""

import functools
import json
import math

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

import run_exp
from data import text_to_image as text_to_image_data
from eval import command, predictions, text_to_image
from eval.picture_grid import grid_figure, write_grid
from flatlora import methods
from flatlora.models import latents, loading, scorers, sources
from flatlora.models.families.text_to_image import RANDOM_SDXL
from flatlora.models.random_weights import byte_tokenizer
from flatlora.utils import records
from flatlora.utils.errors import ConfigError
from tests.conftest import Killed, adapter_bytes, die_at, metrics_rows, run_folder

STEPS = 20


def words(tmp_path, *more, scored=False):
    settings = ["model=sdxl_tiny", "dataset=shapes", f"results_root={tmp_path / 'results'}", "wandb.mode=disabled"]
    settings += ["trainer=cpu", f"trainer.max_steps={STEPS}", "trainer.save_steps=5", "seed=3", "wandb.name=run"]
    return [*settings, *([] if scored else ["eval=[]"]), *more]


def trained(tmp_path, *more, scored=False):
    settings = words(tmp_path, *more, scored=scored)
    assert run_exp.main(settings) == 0
    folder = run_folder(settings)
    return folder, json.loads((folder / "run.json").read_bytes())


def drawn(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **settings).images


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of settings, trained to its end when it is first asked for; tests read it."""

    @functools.cache
    def run(*settings):
        return trained(tmp_path_factory.mktemp("whole"), *settings)

    return run


@pytest.mark.parametrize("rho", [pytest.param("off", marks=pytest.mark.extra), "flat"])
def test_it_learns_leaves_the_backbone_and_loads_in_diffusers(tmp_path, whole, rho):
    folder, record = whole(f"rho={rho}")
    losses = [row["loss"] for row in metrics_rows(folder)]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert record["metrics"]["train_loss"] < losses[0]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
    assert record["timing"]["images_per_s"] > 0
    assert (record["perturbation"] is None) == (rho == "off")
    source = sources.backbone_source(run_exp.experiment_of(words(tmp_path)).model)
    pipeline = StableDiffusionXLPipeline.from_pretrained(source, add_watermarker=False)
    untouched = drawn(pipeline)
    pipeline.load_lora_weights(folder / "adapter")
    assert not torch.equal(drawn(pipeline), untouched)


@pytest.mark.extra
def test_sigma_zero_is_plain_lora_and_modes_are_one(tmp_path):
    runs = {
        name: adapter_bytes(trained(tmp_path / name, "trainer.max_steps=4", *more)[0])
        for name, more in {
            "off": ["rho=off"],
            "zero": ["rho=flat", "rho.sigma=0"],
            "copy": ["rho=flat", "rho.mode=copy", "rho.ramp=constant"],
            "recompute": ["rho=flat", "rho.mode=recompute", "rho.ramp=constant"],
            "checkpointed": ["rho=flat", "rho.mode=copy", "rho.ramp=constant", "trainer.gradient_checkpointing=true"],
        }.items()
    }
    assert runs["off"] == runs["zero"] != runs["copy"]
    assert runs["copy"] == runs["recompute"]
    assert runs["copy"] == runs["checkpointed"]


@pytest.mark.parametrize(
    "more",
    [
        ("rho=flat",),
        pytest.param(
            (
                "rho=flat",
                "peft.target_modules=all_conv",
                "dataset.flip=true",
                "model.snr_gamma=5",
                "dataset.class_prompt=a shape",
                "dataset.class_images=2",
                "dataset.class_steps=1",
            ),
            marks=pytest.mark.extra,
        ),
    ],
)
def test_killed_and_resumed_is_never_killed(tmp_path, monkeypatch, whole, more):
    never_killed, _ = whole(*more)
    settings = words(tmp_path / "killed", *more)
    with monkeypatch.context() as patch:
        die_at(13, patch)
        with pytest.raises(Killed):
            run_exp.main(settings)
    assert run_exp.main([*settings, "resume=true"]) == 0
    folder = run_folder(settings)
    assert json.loads((folder / "run.json").read_bytes())["resumed_from"] == 10
    assert adapter_bytes(folder) == adapter_bytes(never_killed)
    assert metrics_rows(folder) == metrics_rows(never_killed)


def name_family_as_before(folder):
    """Gives a run's files the name that model.family had in earlier versions."""
    config = folder / "config.yaml"
    assert "family: text_to_image\n" in config.read_text()
    config.write_text(config.read_text().replace("family: text_to_image\n", "family: sdxl\n"))
    if (folder / "run.json").is_file():
        record = json.loads((folder / "run.json").read_bytes())
        record["experiment"]["model"]["family"] = "sdxl"
        records.write_signed(folder / "run.json", record)


@pytest.mark.extra
def test_a_run_of_an_earlier_version_goes_on_and_is_scored(tmp_path, monkeypatch):
    more = ["rho=flat", "trainer.max_steps=4", "trainer.save_steps=2"]
    whole, recorded = trained(tmp_path / "whole", *more)
    settings = words(tmp_path / "killed", *more)
    with monkeypatch.context() as patch:
        die_at(3, patch)
        with pytest.raises(Killed):
            run_exp.main(settings)
    folder = run_folder(settings)
    name_family_as_before(folder)
    assert run_exp.main([*settings, "resume=true"]) == 0
    record = json.loads((folder / "run.json").read_bytes())
    assert record["resumed_from"] == 2
    assert adapter_bytes(folder) == adapter_bytes(whole)
    assert record["config_sha256"] == recorded["config_sha256"]
    name_family_as_before(folder)
    before = (folder / "run.json").read_bytes()
    assert run_exp.main([*settings, "resume=true", "model.family=sdxl"]) == 0
    assert (folder / "run.json").read_bytes() == before  # nothing is left to do
    asked = [str(folder), f"out={tmp_path / 'scored'}", "clip=flatlora/random-clip", "captioner=null"]
    asked += ["prompts=shapes", "resolution=64", "steps=1", "max_rows=1", "device=cpu"]
    score = command.score_path("text_to_image", asked)
    assert score["metrics"]["image_image"] is not None  # compared with the run's training images


@pytest.mark.parametrize(
    "more",
    [
        ("model.train_text_encoders=true",),
        pytest.param(("peft.target_modules=all_conv", "model.dtype=bfloat16"), marks=pytest.mark.extra),
        pytest.param(
            ("dataset.buckets=true", "dataset.bucket_step=16", "dataset.validation_rows=2", "optim.eval_steps=2"),
            marks=pytest.mark.extra,
        ),
        pytest.param(("rho=sam",), marks=pytest.mark.extra),
        pytest.param(("peft=pissa", "peft.lora_r=2"), marks=pytest.mark.extra),
        pytest.param(
            ("peft=lora_ga", "peft.lora_r=2", "peft.target_modules=attention", "peft.ga_batches=2"),
            marks=pytest.mark.extra,
        ),
        pytest.param(("peft=lora_pro", "peft.lora_r=2", "peft.target_modules=attention"), marks=pytest.mark.extra),
        pytest.param(("optim.batch_size=4",), marks=pytest.mark.extra),
    ],
    ids=lambda more: more[0],
)
def test_options_take_steps(tmp_path, more):
    folder, record = trained(tmp_path, "rho=flat", *more, "trainer.max_steps=3")
    assert record["status"] == "finished"
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
    rows = metrics_rows(folder)
    assert all(math.isfinite(row.get("loss", row.get("eval_loss"))) for row in rows)
    assert (folder / "adapter/pytorch_lora_weights.safetensors").is_file()
    if any(word.startswith("dataset.validation_rows") for word in more):
        assert [row["step"] for row in rows if "eval_loss" in row] == [2, 3]


@pytest.mark.extra
def test_accumulation_is_a_larger_batch(tmp_path):
    """Draws belong to rows, so two micro-batches of two are a batch of four up to rounding."""
    settings = ("optim.batch_size=4", "trainer.max_steps=2")
    one, _ = trained(tmp_path / "one", *settings, "trainer.micro_batch_size=4")
    two, _ = trained(tmp_path / "two", *settings, "trainer.micro_batch_size=2")
    for left, right in zip(metrics_rows(one), metrics_rows(two), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "head"),
    [
        (["optim.batch_size=16", "trainer.micro_batch_size=16"], "Invalid optim.batch_size=16 with dataset=shapes"),
        (["dataset.resolution=66"], "Invalid dataset.resolution or dataset.bucket_step"),
        (["peft.target_modules=[to_w]"], "Invalid peft.target_modules"),
        (
            ["eval.text_to_image.resolution=66"],
            "flatlora/random-sdxl draws pictures whose sides are multiples of 8; choose 64",
        ),
        (["dataset.resolution=68"], "Invalid eval.text_to_image.resolution=68"),
        (
            ["dataset.resolution=68", "dataset.class_prompt=a", "dataset.class_images=1"],
            "pictures of 68 × 68 pixels, and both sides must be multiples of 8",
        ),
        (["dataset.min_side=80"], "Invalid image in flatlora/shapes, row 1 (and 7 more)"),
        (["model.embedded=null", "model.hub_id=./nowhere"], "Cannot load model.hub_id=./nowhere"),
    ],
)
def test_errors_are_reported_before_a_weight_is_loaded(tmp_path, monkeypatch, capsys, more, head):
    monkeypatch.setattr(loading, "load_backbone", lambda *args: pytest.fail("loaded"))
    assert run_exp.main(words(tmp_path, *more, scored=any("resolution=6" in word for word in more))) == 2
    assert head in " ".join(capsys.readouterr().err.split() or capsys.readouterr().out.split())


def test_errors_of_model_data_and_scores_are_reported_at_once(tmp_path, capsys):
    more = ["peft.target_modules=[to_w]", "dataset.min_side=80", "eval.text_to_image.prompts=nofile"]
    assert run_exp.main(words(tmp_path, *more, "eval.text_to_image.resolution=66", scored=True)) == 2
    printed = capsys.readouterr().err
    heads = ("peft.target_modules", "image in flatlora/shapes", "eval.text_to_image.prompts=nofile")
    assert [f"Invalid {head}" in printed for head in heads] == [True] * 3
    assert "Invalid eval.text_to_image.resolution=66" in printed


@pytest.mark.extra
def test_a_long_prompt_is_spoken_of_once_in_every_run(tmp_path, capsys):
    own = tmp_path / "mine.yaml"
    own.write_text(yaml.safe_dump({"prompts": ["y" * 90], "seeds": [0]}))
    more = ["dataset.prompt=" + "x" * 100, "dataset.validation_rows=2", "trainer.max_steps=1"]
    more += [f"eval.text_to_image.prompts={own}", "eval.text_to_image.steps=1", "model.captioner=null"]
    for name in ("cold", "warm"):
        trained(tmp_path / name, *more, scored=True)
        printed = " ".join("".join(capsys.readouterr()).split())
        assert printed.count("1 of 1 prompts are longer than 77 tokens and are cut there; the first: xxx") == 1
        assert printed.count("1 of 1 prompts are longer than 77 tokens and are cut there; the first: yyy") == 1
        assert printed.count("longer than") == 2


# --- pictures and scores


@pytest.fixture(scope="session")
def captioner(tmp_path_factory):
    """A BLIP of random weights, which says something of every picture."""
    folder, tower = (
        tmp_path_factory.mktemp("blip"),
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    )
    tokenizer = byte_tokenizer()
    text = tower | {"vocab_size": len(tokenizer), "num_attention_heads": 2, "encoder_hidden_size": 32}
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text |= {"eos_token_id": tokenizer.eos_token_id, "sep_token_id": tokenizer.eos_token_id}
    vision = tower | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scored(tmp_path_factory, captioner):
    """Runs of LoRA (off) and Flat-LoRA (flat) with pictures, each trained when it is first asked for."""
    root = tmp_path_factory.mktemp("scored")

    @functools.cache
    def run(rho):
        more = [f"rho={rho}", "trainer.max_steps=4", f"model.captioner={captioner}", "eval.text_to_image.steps=2"]
        more.append(f"wandb.mode={'offline' if rho == 'flat' else 'disabled'}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(latents, "cache_folder", lambda: root / "cache")
            return trained(root / rho, *more, "eval.text_to_image.batch_size=3", scored=True)

    return run


def test_pictures_scores_and_grid_are_in_the_run(scored):
    folder, record = scored("flat")
    place = folder / "eval/text_to_image"
    rows = predictions.read(place / "predictions.jsonl", text_to_image.FIELDS)
    wanted = text_to_image.read_prompts("shapes")
    assert [(row["prompt"], row["seed"]) for row in rows] == [(p, s) for p in wanted.prompts for s in wanted.seeds]
    for row in rows:
        with Image.open(place / row["file"]) as picture:
            assert picture.size == (64, 64)
    for key in text_to_image.SCORES:
        mean = np.mean([row[key] for row in rows])
        assert record["metrics"][f"text_to_image/{key}"] == pytest.approx(mean)
        assert -1 <= mean <= 1
    assert all(isinstance(row["caption"], str) for row in rows)
    with Image.open(place / "grid.png") as grid:
        assert grid.size[0] > 400
        assert grid.size[1] > grid.size[0]  # four prompts down, two seeds across
    (shown,) = folder.glob("wandb/offline-run-*/files/media/images/text_to_image/pictures_*.png")
    assert shown.read_bytes() == (place / "grid.png").read_bytes()
    assert (folder / "pictures.json").is_file()


def test_scores_are_cosines_of_clip(scored):
    """A picture and its prompt, by transformers' own CLIPModel."""
    folder, _ = scored("flat")
    row = predictions.read(folder / "eval/text_to_image/predictions.jsonl", text_to_image.FIELDS)[2]
    model, tokenizer, processor = scorers.load_clip("flatlora/random-clip", torch.device("cpu"))
    with Image.open(folder / "eval/text_to_image" / row["file"]) as picture, torch.no_grad():
        batch = {**tokenizer([row["prompt"]], return_tensors="pt"), **processor([picture], return_tensors="pt")}
        cosine = model(**batch).logits_per_image / model.logit_scale.exp()
    assert row["image_text"] == pytest.approx(cosine.item(), abs=1e-5)


@pytest.mark.extra
def test_the_command_draws_the_same_pictures(scored, captioner):
    folder, record = scored("flat")
    words = [str(folder), f"out={folder}/again"]
    score = command.score_path("text_to_image", words)
    for key in text_to_image.SCORES:
        assert score["metrics"][key] == pytest.approx(record["metrics"][f"text_to_image/{key}"], abs=1e-5)
    files = (folder / part / "images/0003.png" for part in ("eval/text_to_image", "again"))
    first, again = (np.asarray(Image.open(file)).astype(int) for file in files)
    apart = np.abs(first - again)  # the loaded model rounds otherwise than the trained one, in the last bits of FP32
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


@pytest.mark.extra
def test_plain_diffusers_draws_the_runs_pictures(scored):
    folder, _ = scored("flat")
    place = folder / "eval/text_to_image"
    row = predictions.read(place / "predictions.jsonl", text_to_image.FIELDS)[3]
    source = sources.backbone_source(run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes"]).model)
    pipeline = StableDiffusionXLPipeline.from_pretrained(source, add_watermarker=False)
    pipeline.load_lora_weights(folder / "adapter")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(row["seed"])
    drawn = pipeline(
        row["prompt"], generator=generator, height=64, width=64, num_inference_steps=2, guidance_scale=5.0
    ).images[0]
    with Image.open(place / row["file"]) as kept:
        apart = np.abs(np.asarray(kept).astype(int) - np.asarray(drawn).astype(int))
    assert apart.max() <= 1


@pytest.mark.extra
def test_another_dtype_draws_too(scored, tmp_path):
    folder, _ = scored("off")
    words = [str(folder), f"out={tmp_path}", "captioner=null", "dtype=bfloat16", "max_rows=1"]
    score = command.score_path("text_to_image", words)
    assert score["n"] == 1
    again = command.score_path("text_to_image", [word for word in words if not word.startswith("dtype")])
    assert again["metrics"]["image_text"] != score["metrics"]["image_text"]  # no answers of the other dtype


@pytest.mark.extra
def test_a_lost_picture_is_drawn_anew(scored, tmp_path, caplog):
    folder, _ = scored("off")
    words = [str(folder), f"out={tmp_path}", "captioner=null", "max_rows=3", "batch_size=1"]
    command.score_path("text_to_image", words)
    lost, kept = tmp_path / "images/0001.png", tmp_path / "images/0002.png"
    before, written = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    command.score_path("text_to_image", [*words, "score_only=true"])
    assert "1 pictures of" in caplog.text
    assert not (tmp_path / "grid.png").exists()
    command.score_path("text_to_image", words)
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == written
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.extra
def test_a_killed_evaluation_goes_on(scored, tmp_path, monkeypatch):
    folder, _ = scored("off")
    words = [str(folder), f"out={tmp_path}", "captioner=null"]
    plain, calls = text_to_image._Measure.__call__, []

    def die(measure, pictures, prompts):
        calls.append(list(prompts))
        if len(calls) == 2:
            raise Killed
        return plain(measure, pictures, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(text_to_image._Measure, "__call__", die)
        with pytest.raises(Killed):
            command.score_path("text_to_image", words)
    kept = (tmp_path / "images/0000.png").stat().st_mtime_ns
    score = command.score_path("text_to_image", words)
    assert score["metrics"]["text_text"] is None
    assert score["n"] == 8
    assert (tmp_path / "images/0000.png").stat().st_mtime_ns == kept


def test_a_whole_pipeline_is_scored_without_a_run(tmp_path):
    words = [RANDOM_SDXL, f"out={tmp_path}", "clip=flatlora/random-clip", "captioner=null", "prompts=shapes"]
    score = command.score_path("text_to_image", [*words, "resolution=64", "steps=1", "max_rows=2", "device=cpu"])
    assert score["n"] == 2
    assert score["metrics"]["image_image"] is None


def test_own_prompts_and_their_errors(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"prompts": ["a", "b"], "seeds": [7]}))
    assert text_to_image.read_prompts(str(path)) == (["a", "b"], [7])
    for content, heads in {
        "prompts: []\nseeds: [0]": ["Invalid prompts"],
        "prompts: [a, 3]\nseeds: [-1]": ["Invalid prompts", "Invalid seeds"],
        "prompts: [a, a]\nseeds: [0]\nsteps: 3": ["Invalid prompts", "Unknown key steps"],
        "- a": ["Invalid prompts", "Invalid seeds"],
        "a: [": ["Invalid eval.text_to_image.prompts"],
        "prompts: [a]\nseeds: [2001-99-99]": ["Invalid eval.text_to_image.prompts"],
        f"prompts: [a]\nseeds: [{2**63}]": ["Invalid seeds"],
    }.items():
        path.write_text(content)
        with pytest.raises(ConfigError) as caught:
            text_to_image.read_prompts(str(path))
        assert [message.startswith(head) for message, head in zip(caught.value.errors, heads, strict=True)] == [
            True
        ] * len(heads)
    with pytest.raises(ConfigError, match="name one of bi_lora, icons3d, shapes"):
        text_to_image.read_prompts("icons")
    with pytest.raises(ConfigError, match="name one of bi_lora, icons3d, shapes"):
        text_to_image.read_prompts("training")  # of a model that no run describes


def test_a_set_without_prompts_of_its_own_draws_those_it_learned():
    rows = text_to_image_data.prepared(run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes"]).dataset, None).test
    assert text_to_image.read_prompts("training", rows).prompts[:2] == ["a red circle", "a green square"]


@pytest.mark.extra
def test_grids_stand_side_by_side(scored):
    shown = []
    for name, rho in (("LoRA", "off"), ("Flat-LoRA", "flat")):
        folder = scored(rho)[0] / "eval/text_to_image"
        shown.append((name, folder, predictions.read(folder / "predictions.jsonl", text_to_image.FIELDS)))
    figure = grid_figure(shown)
    captions = [axis.get_title() for axis in figure.axes]
    assert captions[:4] == ["LoRA, seed 0", "Flat-LoRA, seed 0", "LoRA, seed 1", "Flat-LoRA, seed 1"]
    assert len(captions) == 4 * 4
    assert [text.get_text() for text in figure.texts] == text_to_image.read_prompts("shapes").prompts
    lefts = [axis.get_position().x0 for axis in figure.axes]
    lows = [axis.get_position().y0 for axis in figure.axes]
    assert lefts[:4] == sorted(lefts[:4])
    assert lows[0] > lows[4] > lows[8] > lows[12]
    # What stands where it says: the second model's first picture.
    with Image.open(shown[1][1] / "images/0000.png") as picture:
        assert np.array_equal(figure.axes[1].images[0].get_array(), np.asarray(picture))
    with pytest.raises(ValueError, match="No prompt was drawn"):
        grid_figure([shown[0], ("other", shown[1][1], [])])


def test_a_caption_is_written_as_it_is(tmp_path):
    rows = [{"prompt": prompt, "seed": 0, "file": "one.png"} for prompt in ("a toy for $5 and one for $6", "a $\\foo$")]
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    write_grid(tmp_path / "grid.png", [("$x$", tmp_path, rows)])
    figure = grid_figure([("$x$", tmp_path, rows)])
    assert not any(text.get_parse_math() for text in [*figure.texts, *(axis.title for axis in figure.axes)])


@pytest.mark.extra
def test_other_benchmarks_and_runs_do_not_mix(scored):
    folder, _ = scored("off")
    for benchmark in ("gsm8k", "images"):
        with pytest.raises(ConfigError, match="generates images and no text"):
            command.score_path(benchmark, [str(folder)])
    assert methods.ADAPTERS["lora"].not_of_diffusion is None


# --- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_modes_are_one_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    settings = ("trainer=single", "trainer.deterministic=true", "rho=flat", "rho.ramp=constant", "model.dtype=bfloat16")
    copy, record = trained(tmp_path / "copy", *settings, "rho.mode=copy")
    recompute, _ = trained(tmp_path / "recompute", *settings, "rho.mode=recompute")
    assert adapter_bytes(copy) == adapter_bytes(recompute)
    assert any("fused LoRA layers" in one for one in record["kernels"])
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
    stopped = words(tmp_path / "killed", *settings, "rho.mode=copy")
    with monkeypatch.context() as patch:
        die_at(13, patch)
        with pytest.raises(Killed):
            run_exp.main(stopped)
    assert run_exp.main([*stopped, "resume=true"]) == 0
    assert adapter_bytes(run_folder(stopped)) == adapter_bytes(copy)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("more", [("peft.target_modules=all_conv",), ("optim.batch_size=4", "trainer.max_steps=7")])
def test_on_a_gpu_kernels_change_nothing_but_time(tmp_path, more):
    losses = {}
    for kernels in ("auto", "off"):
        settings = ("trainer=single", "rho=flat", f"trainer.kernels={kernels}", *more)
        folder, _ = trained(tmp_path / kernels, *settings)
        losses[kernels] = [row["loss"] for row in metrics_rows(folder)]
    assert losses["auto"] == pytest.approx(losses["off"], rel=2e-2)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_fp16_is_scaled_against_underflow(tmp_path):
    half, record = trained(tmp_path / "half", "trainer=single", "rho=flat", "model.dtype=float16")
    whole, _ = trained(tmp_path / "whole", "trainer=single", "rho=flat", "model.dtype=float32")
    assert record["status"] == "finished"
    first, second = ([row["loss"] for row in metrics_rows(folder)] for folder in (half, whole))
    assert first == pytest.approx(second, rel=5e-2)
    assert (half / "checkpoint-20/scaler.pt").is_file()


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_pictures_are_those_of_the_host(tmp_path):
    """Noise is drawn on the host, so that a prompt and seed begin alike everywhere."""
    seen = {}
    for device in ("cuda", "cpu"):
        asked = [RANDOM_SDXL, f"out={tmp_path / device}", "clip=flatlora/random-clip", "captioner=null"]
        asked += ["prompts=shapes", "resolution=64", "steps=2", "max_rows=2", f"device={device}"]
        command.score_path("text_to_image", asked)
        with Image.open(tmp_path / device / "images/0001.png") as picture:
            seen[device] = np.asarray(picture).astype(float)
    assert np.abs(seen["cuda"] - seen["cpu"]).mean() < 2  # of 255
