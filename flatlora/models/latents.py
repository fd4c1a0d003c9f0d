"""What a denoiser is trained on: latents and prompts of all pictures, encoded once, so that VAE and text encoders need
no memory while it trains.

Latents are kept as mean and std, and drawn anew in every epoch, with the noise and the timestep, as a pure function of
(seed, epoch, row): a resumed run sees what the killed one would have, whatever processes share the rows.
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
from flatlora.inputs.captioned import CaptionedImages, CaptionedRows
from flatlora.inputs.images import png_of
from flatlora.models import diffusion
from flatlora.utils import caches
from flatlora.utils.console import progress
from flatlora.utils.files import cache_folder
from flatlora.utils.precision import choose_precision

VERSION = 1  # raised whenever the same pictures and models would be encoded otherwise
_BAR_FROM = 16  # pictures; fewer are encoded before a bar could be read


@dataclass
class LatentRows(Dataset):
    """Pictures as latents, prompts as embeddings or token ids; rows of prior preservation ride along.

    A row is a dict of tensors, one or two pictures high: the picture, and one of the class. Its keys are the arguments
    of `diffusion.Denoiser.forward`.

    Args:
        means, stds: of each picture, flips × 4 × h × w, FP32; flips is 1, or 2 where mirrored ones are drawn too.
        time_ids: of each picture, flips × 6.
        prompts: of each picture, what the denoiser is given: {"prompt_embeds", "pooled"} or {"input_ids", …}.
        timesteps: their number.
        prior: rows of the class at large, of one size with these; each epoch goes on where the last one ended.
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
    buckets: list[tuple[int, int]] = field(init=False)  # micro-batches are made of rows of one

    def __post_init__(self) -> None:
        self.lengths = [1] * len(self.means)
        self.buckets = [tuple(mean.shape[-2:]) for mean in self.means]

    def begin_epoch(self, epoch: int) -> None:
        """Draw what belongs to another epoch from now on."""
        self.epoch = epoch
        if self.prior is not None:
            self.prior.begin_epoch(epoch)

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """A row, or from `len(self)` on the same ones again with other draws, as `samplers.BucketSampler` asks for."""
        own = self._draw(row % len(self), row)
        if self.prior is None:
            return own
        other = self.prior._draw((row + self.epoch * len(self)) % len(self.prior), row)
        return {key: torch.cat([own[key], other[key]]) for key in own}

    def _draw(self, index: int, row: int) -> dict[str, torch.Tensor]:
        """Picture `index` with the draws of row `row` of this epoch."""
        told = f"{self.seed}\0{self.name}\0{self.epoch}\0{row}".encode()
        digest = hashlib.blake2b(told, digest_size=8).digest()
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
    """Rows as one micro-batch; weights make the loss a mean over rows."""
    batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    return batch | {"weights": batch["weights"] / len(rows)}


def encoded(
    rows: CaptionedRows,
    config: DiffusionModelConfig,
    source: str,
    device: torch.device,
    *,
    state: str,
    seed: int,
    flip: bool = False,
    name: str = "train",
) -> LatentRows:
    """Rows as latents and prompts: from the cache, else encoded and put there.

    Args:
        source: folder or hub id of the pipeline.
        state: of its weights, as `loading.backbone_state` gives it.
        flip: whether pictures are mirrored in half of their draws.
        name: keeps the draws of train, validation and prior rows apart.

    Raises:
        ConfigError: the VAE makes NaN of a picture.
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
    """Of all that makes a cached file: the models, the machine, the packages, and `more`."""
    precision = choose_precision("auto", config.dtype, device)
    told = {
        "version": VERSION,
        "model": state,
        "vae": [diffusion.vae_state(config), config.vae_dtype],
        "dtype": config.dtype if precision.products == precision.stored else f"{config.dtype} in {precision.products}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "packages": [importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "pillow")],
        **more,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:40]


def _key_of_rows(rows: CaptionedRows, config: DiffusionModelConfig, flip: bool) -> dict[str, Any]:
    return {
        "pictures": [[place, one.hex()] for place, one in zip(rows.indices, rows.digests, strict=True)],
        "sizes": rows.sizes,
        "flip": flip,
        "text": not config.train_text_encoders,
    }


def _encode(
    rows: CaptionedRows, config: DiffusionModelConfig, source: str, device: torch.device, flip: bool
) -> dict[str, torch.Tensor]:
    """All tensors of the cache file: of each picture by its place in the set."""
    tensors = {"timesteps": torch.tensor(diffusion.schedule(config, source).config.num_train_timesteps)}
    places = {place: row for row, place in enumerate(rows.indices)}
    vae = diffusion.load_vae(config, source, device)
    with progress(f"encode {rows.images.source}", len(places), least=_BAR_FROM) as advance:
        for place, row in places.items():
            views = [rows.view(row, flipped=flipped) for flipped in ((False, True) if flip else (False,))]
            found = [diffusion.moments(vae, view.pixels) for view in views]
            tensors[f"mean.{place}"] = torch.stack([mean for mean, _ in found])
            tensors[f"std.{place}"] = torch.stack([std for _, std in found])
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
    """Of each prompt, encoded one at a time: its embedding does not hang on its company."""
    encoders, tokenizers = (
        diffusion.load_text_encoders(config, source, device),
        diffusion.load_tokenizers(config, source),
    )
    texts = list(dict.fromkeys(prompts.values()))
    ids = diffusion.token_ids(tokenizers, texts)
    found = {
        text: diffusion.embed(encoders, [one[i : i + 1].to(device) for one in ids]) for i, text in enumerate(texts)
    }
    tensors = {}
    for place, text in prompts.items():
        embeds, pooled = found[text]
        tensors |= {f"prompt_embeds.{place}": embeds[0].cpu().clone(), f"pooled.{place}": pooled[0].cpu().clone()}
    return tensors


def _ids_of_prompts(rows: CaptionedRows, config: DiffusionModelConfig, source: str) -> list[dict[str, torch.Tensor]]:
    texts = [rows.prompt(row) for row in range(len(rows))]
    ids = diffusion.token_ids(diffusion.load_tokenizers(config, source), texts)
    return [{"input_ids": one, "input_ids_2": other} for one, other in zip(*ids, strict=True)]


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
) -> CaptionedImages:
    """Pictures of a class that the untrained model makes, for prior preservation: made once, kept in the cache.

    Raises:
        ConfigError: the VAE makes NaN of one.
    """
    folder = cache_folder() / "class_images" / _key(config, state, device, prompt=prompt, steps=steps, size=size)
    names = [f"{number:05d}" for number in range(count)]
    pictures: list[Path | bytes | None] = [caches.find(folder, name, ".png") for name in names]
    if missing := [number for number, picture in enumerate(pictures) if picture is None]:
        pipeline = diffusion.pipeline_of(diffusion.load_denoiser(config, source, device), config, source, device)
        with progress(f"make pictures of {prompt!r}", len(missing)) as advance:
            for number in missing:
                made = diffusion.sample(pipeline, [prompt], [number], size=size, steps=steps, guidance=CLASS_GUIDANCE)
                png = png_of((made[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
                pictures[number] = caches.keep(folder, names[number], ".png", png) or png
                advance(1)
        del pipeline
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def read(index: int) -> bytes:
        picture = pictures[index]
        return picture.read_bytes() if isinstance(picture, Path) else picture

    return CaptionedImages(f"pictures of {prompt!r}", [prompt] * count, read)


CLASS_GUIDANCE = 5.0  # diffusers' default for SDXL
