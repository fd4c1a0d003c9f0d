"""CLIP's image encoder with a head over named classes (Radford et al. 2021).

`text`    logits = exp(τ) · cos(image, prompt of each class); prompts are embedded once by the frozen text encoder,
          which is then freed, and τ is the model's own temperature.
`linear`  logits = W · image embedding; W is trained together with the adapter.

The encoder's modules are named as in transformers' CLIPVisionModelWithProjection, so an adapter loads there too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection, PreTrainedTokenizerBase
from transformers.modeling_outputs import ImageClassifierOutput

from flatlora.inputs.pixels import normalized
from flatlora.inputs.tokenizing import tokenized
from flatlora.utils.errors import ConfigError
from flatlora.utils.plain_files import read_plain

LINEAR_HEAD = "classifier"


CLASSES_FILE = "classes.json"  # in a run's folder: its `Classes`


class Classes(NamedTuple):
    """The classes of a head: their names, and the prompts of each class for the text encoder."""

    names: list[str]
    prompts: list[list[str]]

    @classmethod
    def of_run(cls, folder: Path) -> Classes:
        """Reads the classes of a run's folder.

        Raises:
            ConfigError: the file is missing or broken.
        """
        path = folder / CLASSES_FILE
        try:
            content = json.loads(read_plain(path, 16 << 20))
            names, prompts = content["names"], content["prompts"]
            if not (names and len(names) == len(prompts) and all(isinstance(text, str) for text in names)):
                raise ValueError("names and prompts of each class are needed")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                [f"Broken file {path}: {error}; copy the run's folder whole, or run it anew with overwrite=true."]
            ) from error
        return cls(names, prompts)


class CLIPImageClassifier(CLIPVisionModelWithProjection):
    """Computes loss and logits (B, classes) from pixel_values (B, 3, H, W) and labels (B,).

    UINT8 pixels are normalized with pixel_table (3, 256), see `flatlora.inputs.pixels`.

    Args:
        config: config of the image encoder.
        classes: number of classes.
        head: "text" uses the buffers `class_embeddings` ((classes, d), rows of norm 1) and `temperature`; "linear" has
            a trained layer.
    """

    def __init__(self, config: CLIPVisionConfig, classes: int = 2, head: str = "text") -> None:
        super().__init__(config)
        self.head, self.trained_modules = head, None
        if head == "linear":
            self.classifier = nn.Linear(config.projection_dim, classes)
            self.trained_modules = [LINEAR_HEAD]
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)
        else:
            self.register_buffer("class_embeddings", torch.zeros(classes, config.projection_dim), persistent=False)
            self.register_buffer("temperature", torch.ones(()), persistent=False)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        pixel_table: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        if not pixel_values.is_floating_point():
            pixel_values = normalized(pixel_values, pixel_table)
        embeddings = super().forward(pixel_values=pixel_values.to(self.dtype), **kwargs).image_embeds
        if self.head == "linear":
            logits = self.classifier(embeddings.to(self.classifier.weight.dtype))
        else:
            logits = self.temperature * functional.normalize(embeddings.float(), dim=-1) @ self.class_embeddings.t()
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def classifier_of(clip: CLIPModel, classes: Classes, head: str, tokenizer: PreTrainedTokenizerBase | None) -> nn.Module:
    """Returns the image encoder of a full CLIP with a head; `tokenizer` is needed for head="text" only."""
    config = clip.config.vision_config
    config.projection_dim = clip.config.projection_dim
    with torch.device("meta"):
        model = CLIPImageClassifier(config, len(classes.names), head)
    model.vision_model, model.visual_projection = clip.vision_model, clip.visual_projection
    if head == "linear":
        model.classifier = nn.Linear(config.projection_dim, len(classes.names))
        nn.init.zeros_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
    else:
        model.class_embeddings = class_embeddings(clip, classes.prompts, tokenizer)
        model.temperature = clip.logit_scale.detach().float().exp()
    return model


@torch.no_grad()
def class_embeddings(
    clip: CLIPModel, prompts: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Returns class embeddings (classes, d), float32: the mean of the normalized prompt embeddings, normalized."""
    rows = []
    for texts in prompts:
        options = {"padding": True, "truncation": True, "max_length": _longest(clip), "return_tensors": "pt"}
        batch = tokenized(tokenizer, texts, **options)
        pooled = clip.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
        embeddings = functional.normalize(clip.text_projection(pooled).float(), dim=-1)
        rows.append(functional.normalize(embeddings.mean(dim=0), dim=-1))
    return torch.stack(rows)


def _longest(clip: CLIPModel) -> int:
    return clip.config.text_config.max_position_embeddings
