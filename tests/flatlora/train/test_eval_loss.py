"""eval_loss is −Σ log p over the number of labels, whatever the batch size and the number of processes."""

import json

import pytest
import torch

import run_exp
from flatlora.train.trainer import FlatTrainer
from tests.conftest import run_folder, write_split
from tests.processes import end_well, fork_ranks

VALIDATION_ROWS = 5


@torch.no_grad()
def eval_loss_reference(trainer) -> float:
    """One row at a time, from logits alone, in FP64."""
    model, rows, losses = trainer.model.eval(), trainer.eval_dataset, []
    for row in (rows[index] for index in range(len(rows))):
        if "pixel_values" in row:
            logits, labels = model(pixel_values=row["pixel_values"][None]).logits, [row["labels"]]
        elif "latents" in row:
            losses.append(model(**row).loss.item())
            continue
        elif model.config.is_encoder_decoder:
            labels, said = row["answer"], [model.config.decoder_start_token_id, *row["answer"][:-1]]
            asked = torch.tensor([row["prompt"]])
            logits = model(input_ids=asked, decoder_input_ids=torch.tensor([said])).logits[0]
        else:
            labels, ids = row["answer"], torch.tensor([row["prompt"] + row["answer"]])
            logits = model(input_ids=ids).logits[0, -len(labels) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits.double(), torch.tensor(labels), reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.fixture(params=["causal_lm", "seq2seq", "clip", pytest.param("text_to_image", marks=pytest.mark.extra)])
def settings(request, tiny_settings, tiny_t5_folder, tmp_path):
    """A run of two steps with answers of several lengths."""
    if request.param == "causal_lm":
        words = [word for word in tiny_settings if not word.startswith("dataset.validation_rows")]
        return [*words, f"dataset.validation_rows={VALIDATION_ROWS}", "trainer.max_steps=2"]
    kept = [word for word in tiny_settings if not word.startswith(("model.", "dataset.", "optim.batch_size"))]
    if request.param == "seq2seq":
        rows = [{"sentence": f"s {i}", "label": i % 2, "idx": i} for i in range(24)]
        for split in ("train", "validation"):
            write_split(tmp_path, "nyu-mll/glue", "cola", split, rows)
        own = [f"model.hub_id={tiny_t5_folder}", "model=t5small", "model.dtype=float32", "dataset=cola"]
        own += [f"data_root={tmp_path}", "dataset.train_rows=12", "optim.batch_size=4"]
    elif request.param == "clip":
        own = [
            "model=clip_tiny",
            "dataset=digits",
            "dataset.test_rows=4",
            "dataset.train_rows=12",
            "optim.batch_size=4",
        ]
    else:
        own = ["model=sdxl_tiny", "dataset=shapes", "optim.batch_size=2"]
    return [*kept, *own, f"dataset.validation_rows={VALIDATION_ROWS}", "trainer.max_steps=2"]


def test_any_batch_size_gives_the_mean_over_all_labels(settings, monkeypatch):
    losses, evaluate = {}, FlatTrainer.evaluate

    def evaluate_by_all_sizes(trainer, *args, **kwargs):
        losses["reference"] = eval_loss_reference(trainer)
        for size in (1, 2, 3, 16):
            trainer.args.per_device_eval_batch_size = size
            losses[size] = trainer.evaluation_loop(trainer.get_eval_dataloader(), "").metrics["eval_loss"]
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(FlatTrainer, "evaluate", evaluate_by_all_sizes)
    assert run_exp.main(settings) == 0
    expected = losses.pop("reference")
    assert losses == pytest.approx(dict.fromkeys((1, 2, 3, 16), expected), rel=1e-5)
    record = json.loads((run_folder(settings) / "run.json").read_text())
    assert record["metrics"]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_leaves_torchs_generator_alone(tiny_settings, monkeypatch):
    evaluate, states = FlatTrainer.evaluate, []

    def watched(trainer, *args, **kwargs):
        states.append(torch.get_rng_state())
        found = evaluate(trainer, *args, **kwargs)
        states.append(torch.get_rng_state())
        return found

    monkeypatch.setattr(FlatTrainer, "evaluate", watched)
    words = [word for word in tiny_settings if not word.startswith("dataset.validation_rows")]
    assert run_exp.main([*words, "dataset.validation_rows=4", "trainer.max_steps=1"]) == 0
    assert torch.equal(*states)


@pytest.mark.extra
@pytest.mark.slow
def test_every_metric_is_the_same_on_one_two_and_three_processes(tiny_settings):
    """Five validation rows on three processes: accelerate would evaluate some of them twice."""
    replaced = ("dataset.validation_rows", "optim.batch_size", "trainer.micro_batch_size", "eval=")
    words = [word for word in tiny_settings if not word.startswith(replaced)]
    words += [f"dataset.validation_rows={VALIDATION_ROWS}", "optim.batch_size=6", "trainer.micro_batch_size=1"]
    words += ["trainer.eval_batch_size=2", "optim.best_model=true", "optim.eval_steps=1", "trainer.max_steps=3"]
    words += ["eval.gsm8k.max_new_tokens=4"]
    metrics = {}
    for count in (1, 2, 3):
        own = [f"{word}-{count}" if word.startswith("results_root=") else word for word in words]
        if count == 1:
            assert run_exp.main(own) == 0
        else:
            end_well(*fork_ranks(count, ["trainer=ddp", *own]))
        metrics[count] = json.loads((run_folder(own) / "run.json").read_text())["metrics"]
    assert metrics[1]["eval_loss"] > 0
    assert "gsm8k/exact_match" in metrics[1]
    for count in (2, 3):
        assert metrics[count] == pytest.approx(metrics[1], rel=1e-4)
