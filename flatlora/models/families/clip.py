"""CLIP's image encoder with a classification head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPModel, PreTrainedConfig

from flatlora.config.sections import ModelConfig
from flatlora.models.clip import Classes, CLIPImageClassifier, classifier_of
from flatlora.models.family import FAMILIES, LoadOptions
from flatlora.models.language import TransformersFamily
from flatlora.models.processors import load_image_processor, load_tokenizer
from flatlora.models.sources import load_whole, saved_dtype, validate_finite
from flatlora.utils.precision import choose_precision, hold_as_computed


@FAMILIES.register("clip")
class CLIP(TransformersFamily):
    """Image classification with CLIP; `options.classes` are the classes of the head."""

    auto = CLIPModel
    processor_file = "preprocessor_config.json"
    whole_needs_base = True  # the head's class embeddings, from the text encoder, are in no file
    graphed = True

    def mismatch(self, described: PreTrainedConfig) -> str | None:
        if described.model_type == "clip":
            return None
        return "it is no CLIP, which model.family=clip reads; name a CLIP, or another model=NAME"

    def skeleton(self, config: ModelConfig) -> nn.Module:
        known = self.described(config)
        with torch.device("meta"):
            return CLIPImageClassifier(known.vision_config, head=config.head)

    def load(self, config: ModelConfig, options: LoadOptions) -> nn.Module:
        tokenizer = load_tokenizer(config) if config.head == "text" else None
        clip = self.read(config, options.device, onto_cpu=True)
        if config.head == "text":  # its text encoder runs here, on the CPU also if the model is moved to a GPU
            precision = choose_precision("auto", config.dtype, clip.device)
            for part in (clip.text_model, clip.text_projection):
                hold_as_computed(part, precision)
        return classifier_of(clip, options.classes, config.head, tokenizer).to(options.device)

    def load_trained(self, path: str, config: ModelConfig, options: LoadOptions) -> tuple[nn.Module, Any]:
        """Loads the trained model; with head="text", the class embeddings come from the backbone's text encoder."""
        base, saved = self.load_backbone(config, options), config.at(path)
        dtype = options.dtype or saved_dtype(saved)
        model = load_whole(
            saved,
            CLIPImageClassifier,
            path,
            classes=len(base.class_embeddings) if base.head == "text" else base.classifier.out_features,
            head=base.head,
            dtype=getattr(torch, dtype),
        )
        validate_finite(model, path)
        hold_as_computed(model, choose_precision(options.autocast, dtype, options.device))
        if base.head == "text":
            model.class_embeddings, model.temperature = base.class_embeddings, base.temperature
        return model.to(base.device), self.processor(saved if self.holds_processor(Path(path)) else config)

    def processor(self, config: ModelConfig) -> Any:
        return load_image_processor(config)

    def classes_of_run(self, run: Path) -> Classes:
        return Classes.of_run(run)
