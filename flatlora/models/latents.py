"""Training rows of a text-to-image model: latents and prompts of all images, encoded once, so that VAE and text
encoders take no memory during training.

The cache holds mean and std of the latents. Latents, noise and timesteps are sampled in every epoch as a pure function
of (seed, epoch, row): a resumed run gets the same samples, independent of how processes share the rows.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch.utils.data import Dataset

from flatlora.config.sections import DiffusionModelConfig
from flatlora.inputs.images import png_of
from flatlora.inputs.text_to_image import TextToImageData, TextToImageRows
from flatlora.models import diffusion
from flatlora.utils import caches
from flatlora.utils.console import progress
from flatlora.utils.files import cache_folder
from flatlora.utils.precision import choose_precision

VERSION = 1  # incremented when the encoding of the same images by the same models changes
_BAR_FROM = 16  # images; fewer are encoded too quickly for a progress bar


@dataclass
class LatentRows(Dataset):
    """Images as latents, prompts as embeddings or token ids, optionally with prior-preservation images.

    A row is a dict of tensors whose keys are the arguments of `diffusion.TextToImageModel.forward`. Their first
    dimension is 1, or 2 with prior preservation: the image, then an image of the class.

    Args:
        means, stds: one tensor per image, (flips, 4, h, w), float32; flips is 2 if images are also mirrored, else 1.
        time_ids: one tensor per image, (flips, 6).
        prompts: one dict per image: {"prompt_embeds", "pooled"} or {"input_ids", "input_ids_2"}.
        timesteps: number of timesteps of the noise schedule.
        weight: loss weight of each row.
        prior: images of the class, of the same size; each epoch continues where the previous one ended.
    """

    means: list[torch.Tensor]
    stds: list[torch.Tensor]
    time_ids: list[torch.Tensor]
    prompts: list[dict[str, torch.Tensor]]
    timesteps: int
    seed: int
    weight: float = 1.0
    prior: LatentRows | None = None
    name: str = "train"
    epoch: int = 0
    lengths: list[int] = field(init=False)
    buckets: list[tuple[int, int]] = field(init=False)  # (h, w) of each row; a micro-batch has rows of one size

    def __post_init__(self) -> None:
        self.lengths = [1] * len(self.means)
        self.buckets = [tuple(mean.shape[-2:]) for mean in self.means]

    def begin_epoch(self, epoch: int) -> None:
        """Sets the epoch that determines the random samples."""
        self.epoch = epoch
        if self.prior is not None:
            self.prior.begin_epoch(epoch)

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Returns a row; indices ≥ `len(self)` repeat the rows with new samples (see `samplers.BucketSampler`)."""
        own = self._draw(row % len(self), row)
        if self.prior is None:
            return own
        other = self.prior._draw((row + self.epoch * len(self)) % len(self.prior), row)
        return {key: torch.cat([own[key], other[key]]) for key in own}

    def _draw(self, index: int, row: int) -> dict[str, torch.Tensor]:
        """Returns image `index` with the random samples of row `row` in this epoch."""
        origin = f"{self.seed}\0{self.name}\0{self.epoch}\0{row}".encode()
        digest = hashlib.blake2b(origin, digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        flip = int(torch.randint(len(self.means[index]), (), generator=generator))
        mean, std = self.means[index][flip], self.stds[index][flip]
        return {
            "latents": (mean + std * torch.randn(mean.shape, generator=generator))[None],
            "noise": torch.randn(mean.shape, generator=generator)[None],
            "timesteps": torch.randint(self.timesteps, (1,), generator=generator),
            "weights": torch.tensor([self.weight]),
            "time_ids": self.time_ids[index][flip][None],
            **{key: tensor[None] for key, tensor in self.prompts[index].items()},
        }


def collate_latents(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenates rows to a micro-batch; weights are divided by the number of rows, so that the loss is a mean."""
    batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    return batch | {"weights": batch["weights"] / len(rows)}


def encoded(
    rows: TextToImageRows,
    config: DiffusionModelConfig,
    source: str,
    device: torch.device,
    *,
    state: str,
    seed: int,
    flip: bool = False,
    name: str = "train",
) -> LatentRows:
    """Returns rows as latents and prompts, from the cache if possible; else encodes and caches them.

    Args:
        source: folder or hub id of the pipeline.
        state: identity of its weights, from `loading.backbone_state`.
        flip: whether images are mirrored with probability 1/2.
        name: part of the random seed, so that train, validation and prior rows get different samples.

    Raises:
        ConfigError: the VAE's output for an image contains NaN.
    """
    if not len(rows):
        return LatentRows([], [], [], [], timesteps=1, seed=seed, name=name)
    key = _key(config, state, device, **_key_of_rows(rows, config, flip))
    folder = cache_folder() / "latents"
    if (kept := caches.find(folder, key, ".safetensors")) is not None:
        tensors = load_file(kept)
    else:
        tensors = _encode(rows, config, source, device, flip)
        caches.keep(folder, key, ".safetensors", save(tensors))
    ids = _ids_of_prompts(rows, config, source) if config.train_text_encoders else None
    return LatentRows(
        means=[tensors[f"mean.{place}"] for place in rows.indices],
        stds=[tensors[f"std.{place}"] for place in rows.indices],
        time_ids=[tensors[f"time_ids.{place}"] for place in rows.indices],
        prompts=ids
        or [{key: tensors[f"{key}.{place}"] for key in ("prompt_embeds", "pooled")} for place in rows.indices],
        timesteps=int(tensors["timesteps"]),
        seed=seed,
        name=name,
    )


def _key(config: DiffusionModelConfig, state: str, device: torch.device, **more: Any) -> str:
    """Returns a hash of everything a cached file depends on: models, device, package versions, and `more`."""
    content = {
        "version": VERSION,
        "model": state,
        "vae": [diffusion.vae_state(config), _computed(config.vae_dtype, device)],
        "dtype": _computed(config.dtype, device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "packages": [importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "pillow")],
        **more,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def _computed(dtype: str, device: torch.device) -> str:
    """Returns a stored dtype, followed by that of its products if it is another one."""
    precision = choose_precision("auto", dtype, device)
    return dtype if precision.products == precision.stored else f"{dtype} in {precision.products}"


def _key_of_rows(rows: TextToImageRows, config: DiffusionModelConfig, flip: bool) -> dict[str, Any]:
    return {
        "pictures": [[place, digest.hex()] for place, digest in zip(rows.indices, rows.digests, strict=True)],
        "sizes": rows.sizes,
        "flip": flip,
        "text": not config.train_text_encoders,
    }


def _encode(
    rows: TextToImageRows, config: DiffusionModelConfig, source: str, device: torch.device, flip: bool
) -> dict[str, torch.Tensor]:
    """Returns the tensors of the cache file, named by the index of each image in the data set."""
    tensors = {"timesteps": torch.tensor(diffusion.schedule(config, source).config.num_train_timesteps)}
    places = {place: row for row, place in enumerate(rows.indices)}
    vae = diffusion.load_vae(config, source, device)
    with progress(f"encode {rows.images.source}", len(places), least=_BAR_FROM) as advance:
        for place, row in places.items():
            views = [rows.view(row, flipped=flipped) for flipped in ((False, True) if flip else (False,))]
            moments = [diffusion.moments(vae, view.pixels) for view in views]
            tensors[f"mean.{place}"] = torch.stack([mean for mean, _ in moments])
            tensors[f"std.{place}"] = torch.stack([std for _, std in moments])
            tensors[f"time_ids.{place}"] = torch.stack([view.time_ids for view in views])
            advance(1)
    del vae
    if not config.train_text_encoders:
        tensors |= _embeddings({place: rows.prompt(row) for place, row in places.items()}, config, source, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return tensors


@torch.no_grad()
def _embeddings(
    prompts: Mapping[int, str], config: DiffusionModelConfig, source: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """Encodes prompts one at a time, so that an embedding is independent of the rest of the batch."""
    encoders, tokenizers = (
        diffusion.load_text_encoders(config, source, device),
        diffusion.load_tokenizers(config, source),
    )
    texts = list(dict.fromkeys(prompts.values()))
    ids = diffusion.token_ids(tokenizers, texts)
    embeddings = {
        text: diffusion.embed(encoders, [batch[i : i + 1].to(device) for batch in ids]) for i, text in enumerate(texts)
    }
    tensors = {}
    for place, text in prompts.items():
        embeds, pooled = embeddings[text]
        tensors |= {f"prompt_embeds.{place}": embeds[0].cpu().clone(), f"pooled.{place}": pooled[0].cpu().clone()}
    return tensors


def _ids_of_prompts(rows: TextToImageRows, config: DiffusionModelConfig, source: str) -> list[dict[str, torch.Tensor]]:
    texts = [rows.prompt(row) for row in range(len(rows))]
    ids = diffusion.token_ids(diffusion.load_tokenizers(config, source), texts)
    return [{"input_ids": first, "input_ids_2": second} for first, second in zip(*ids, strict=True)]


def class_pictures(
    prompt: str,
    count: int,
    steps: int,
    size: int,
    config: DiffusionModelConfig,
    source: str,
    device: torch.device,
    *,
    state: str,
) -> TextToImageData:
    """Generates class images for prior preservation with the untrained model, or reads them from the cache.

    Raises:
        ConfigError: the VAE's output for an image contains NaN.
    """
    folder = cache_folder() / "class_images" / _key(config, state, device, prompt=prompt, steps=steps, size=size)
    names = [f"{number:05d}" for number in range(count)]
    pictures: list[Path | bytes | None] = [caches.find(folder, name, ".png") for name in names]
    if missing := [number for number, picture in enumerate(pictures) if picture is None]:
        pipeline = diffusion.pipeline_of(diffusion.load_model(config, source, device), config, source, device)
        with progress(f"make pictures of {prompt!r}", len(missing)) as advance:
            for number in missing:
                image = diffusion.sample(pipeline, [prompt], [number], size=size, steps=steps, guidance=CLASS_GUIDANCE)
                png = png_of((image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
                pictures[number] = caches.keep(folder, names[number], ".png", png) or png
                advance(1)
        del pipeline
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def read(index: int) -> bytes:
        picture = pictures[index]
        return picture.read_bytes() if isinstance(picture, Path) else picture

    return TextToImageData(f"pictures of {prompt!r}", [prompt] * count, read)


CLASS_GUIDANCE = 5.0  # diffusers' default for SDXL
