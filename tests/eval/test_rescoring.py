"""What every method trained of every family of models, read from disk, answers as it did in memory."""

import json

import pytest
import torch

import run_exp
from data import text_to_image
from eval.backends.hf import HFBackend
from eval.command import main
from flatlora import methods
from flatlora.models import loading, sources
from flatlora.models.clip import Classes
from flatlora.models.latents import collate_latents
from flatlora.utils.errors import ConfigError
from tests.conftest import run_folder, write_split
from tests.methods_toolbox import batches_of, nudge

CPU = torch.device("cpu")
CLASSES = Classes(["a", "b", "c"], [["an a"], ["a b"], ["a c"]])
PROMPTS, CHOICES = ["one: ", "a longer one: "], [["yes", "no"], ["a", "b", "neither"]]
SETTINGS = {"lora_ga": ["peft.ga_batches=2"], "eva": ["peft.eva_batches=4"], "corda": ["peft.corda_batches=4"]}
REFUSED = {
    ("eva", "seq2seq"),
    ("eva", "clip"),
    ("corda", "clip"),
    *((name, "text_to_image") for name in ("adalora", "eva", "corda", "hira", "delora", "full_ft")),
}


@pytest.fixture(scope="session")
def latent_batch():
    """Two pictures of the shapes, as the model is given them."""
    experiment = run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes"])
    rows, source = text_to_image.prepared(experiment.dataset, None), sources.backbone_source(experiment.model)
    made = text_to_image.encode(rows, experiment.dataset, experiment.model, source, CPU, state="s", seed=1).train
    return collate_latents([made[0], made[3]])


@pytest.fixture
def words(tiny_model_folder, tiny_t5_folder):
    local = ["model.embedded=null", "model.dtype=float32"]
    return {
        "causal_lm": [f"model.hub_id={tiny_model_folder}", *local],
        "seq2seq": ["model=t5small", f"model.hub_id={tiny_t5_folder}", "model.dtype=float32", "dataset=cola"],
        "clip": ["model=clip_tiny", "dataset=digits"],
        "text_to_image": ["model=sdxl_tiny", "dataset=shapes"],
    }


def batches(family, latent_batch):
    if family == "text_to_image":
        return lambda count: iter([latent_batch] * count)
    if family == "clip":
        pixels = torch.randn(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        return lambda count: ({"pixel_values": pixels[one], "labels": torch.tensor([0, 2])} for one in range(count))
    if family == "seq2seq":
        return lambda count: ({**one, "labels": one["labels"][:, :6].contiguous()} for one in batches_of(count))
    return batches_of


@torch.no_grad()
def answers(family, model, processor, latent_batch):
    if family in ("causal_lm", "seq2seq"):
        scores = HFBackend(model, processor, batch_size=2).log_likelihoods(PROMPTS, CHOICES)
        return torch.tensor([one for of_prompt in scores for one in of_prompt])
    if family == "clip":
        return model.eval()(pixel_values=torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).logits
    return model.eval()(**latent_batch).loss


def quick_first(family, name):
    """All methods on causal language models, and three ways of saving on others; `make test-all` has the rest."""
    quick = family == "causal_lm" or name in ("lora", "pissa", "full_ft")
    return pytest.param(family, name, marks=() if quick else pytest.mark.extra)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        quick_first(family, name)
        for family in ("causal_lm", "seq2seq", "clip", "text_to_image")
        for name in methods.ADAPTERS
    ],
)
def test_a_saved_model_answers_as_the_trained_one(name, family, words, latent_batch, tmp_path):
    def trained():
        experiment = run_exp.experiment_of([*words[family], f"peft={name}", *SETTINGS.get(name, [])])
        config, section = experiment.model, experiment.peft
        section = section.model_copy(update={"lora_r": 4} if hasattr(section, "lora_r") else {})
        methods.ADAPTERS[name].check(loading.skeleton(config), section)
        start = methods.Start(1, tmp_path / "start", batches(family, latent_batch))
        backbone = loading.load_backbone(config, CPU, CLASSES if family == "clip" else None)
        return methods.ADAPTERS[name].apply(backbone, section, start), config, section, start

    if (name, family) in REFUSED:
        with pytest.raises(ConfigError, match=f"peft={name}"):
            trained()
        return
    model, config, section, start = trained()
    nudge(model, std=0.1)
    processor = loading.FAMILIES[family].processor(config)
    expected = answers(family, model, processor, latent_batch)
    methods.ADAPTERS[name].save(model, section, tmp_path / "adapter", start)
    if processor is not None:
        processor.save_pretrained(tmp_path / "adapter")
    classes = CLASSES if family == "clip" else None
    loaded, processor, _ = loading.load_for_inference(str(tmp_path / "adapter"), config, CPU, classes)
    found = answers(family, loaded, processor, latent_batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    untouched = loading.load_backbone(config, CPU, classes)
    assert not torch.allclose(answers(family, untouched, processor, latent_batch), expected, rtol=1e-4)


@pytest.mark.extra
def test_a_cell_of_adalora_on_t5_is_rescored(tiny_settings, tiny_t5_folder, tmp_path):
    rows = [{"sentence": f"s {i}", "label": i % 2, "idx": i} for i in range(4)]
    for split in ("train", "validation"):
        write_split(tmp_path, "nyu-mll/glue", "cola", split, rows)
    kept = [word for word in tiny_settings if not word.startswith(("dataset", "eval", "peft", "model"))]
    settings = [*kept, "model=t5small", f"model.hub_id={tiny_t5_folder}", "model.dtype=float32", "dataset=cola"]
    settings += [f"data_root={tmp_path}", "peft=adalora", "peft.lora_r=2", "trainer.max_steps=3"]
    assert run_exp.main(settings) == 0
    folder = run_folder(settings)
    assert main("glue", [str(folder), "device=cpu", f"out={tmp_path / 'again'}"]) == 0

    def scores(path):
        return [json.loads(line)["scores"] for line in (path / "predictions.jsonl").read_text().splitlines()]

    for own, again in zip(scores(folder / "eval/glue"), scores(tmp_path / "again"), strict=True):
        assert again == pytest.approx(own, rel=1e-5)
