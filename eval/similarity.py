"""CLIP features of images and texts for cosine similarities, and captions of images by a captioning model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn import functional

from flatlora.inputs.images import middle_of
from flatlora.inputs.tokenizing import tokenized
from flatlora.models.scorers import load_captioner, load_clip


class Similarity:
    """CLIP in FP32. Features have unit length, so that their dot products are cosine similarities."""

    def __init__(self, clip: str, device: torch.device) -> None:
        self.device = device
        self.model, self.tokenizer, self.processor = load_clip(clip, device)

    @torch.inference_mode()
    def of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Returns the features of texts, B × d, FP32, on the CPU."""
        limit = self.model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
        batch = tokenized(self.tokenizer, texts, **options)
        pooled = self.model.text_model(
            input_ids=batch["input_ids"].to(self.device), attention_mask=batch["attention_mask"].to(self.device)
        ).pooler_output
        return functional.normalize(self.model.text_projection(pooled).float(), dim=-1).cpu()

    @torch.inference_mode()
    def of_pictures(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Returns the features of images, B × d, FP32, on the CPU."""
        pixels = self.processor(list(map(middle_of, pictures)), return_tensors="pt")["pixel_values"].to(self.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return functional.normalize(self.model.visual_projection(pooled).float(), dim=-1).cpu()


class Captioner:
    """A captioning model with greedy decoding."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.model, self.processor = load_captioner(name, device)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Returns one caption per image."""
        batch: Any = self.processor(images=list(pictures), return_tensors="pt").to(self.device)
        ids = self.model.generate(**batch, max_new_tokens=40, do_sample=False)
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
