"""SDXL for training: a module that takes latents and prompts and returns its loss, built from diffusers' modules.

    x_t = √ᾱ_t x₀ + √(1−ᾱ_t) ε,   loss = w_t ‖f(x_t, t, prompt) − target‖²      target: ε, or v = √ᾱ_t ε − √(1−ᾱ_t) x₀

w_t is 1, or of min-SNR (Hang et al. 2023): min(SNR_t, γ)/SNR_t for ε, min(SNR_t, γ)/(SNR_t + 1) for v. The modules are
named as in the pipeline (unet, text_encoder, text_encoder_2), so that an adapter's names begin as diffusers' do.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.utils import ModelOutput

from flatlora.config.sections import DiffusionModelConfig, ModelConfig
from flatlora.inputs.rows import hub_is_reachable
from flatlora.inputs.tokenizing import tokenized
from flatlora.models.hashes import part_sha256
from flatlora.models.sources import NO_FOREIGN_CODE, count_errors, hub_errors, load_whole
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import write_atomic
from flatlora.utils.precision import choose_precision, hold_as_computed, stored_dtype

logger = logging.getLogger(__name__)

UNET, TEXT_ENCODERS = "unet", ("text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
INDEX = DiffusionModelConfig.index_file


@dataclass
class TextToImageOutput(ModelOutput):
    loss: torch.Tensor | None = None


class TextToImageModel(nn.Module):
    """Computes the loss of a micro-batch from its latents, noise, timesteps and prompts.

    Prior-preservation rows get the same min-SNR weights as all others.

    Args:
        unet: a UNet2DConditionModel.
        schedule: diffusers' DDPMScheduler, which defines ᾱ_t and the prediction type.
        text_encoders: both text encoders if they are trained; prompts are then token ids, else embeddings.
        snr_gamma: γ of min-SNR; None gives all timesteps the weight 1.
    """

    main_input_name = "latents"

    def __init__(
        self,
        unet: nn.Module,
        schedule: Any,
        text_encoders: Sequence[nn.Module] = (),
        snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.snr_gamma = unet, snr_gamma
        for name, encoder in zip(TEXT_ENCODERS, text_encoders, strict=False):
            setattr(self, name, encoder)
        self.prediction = schedule.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ConfigError(
                [
                    f"Invalid prediction_type={self.prediction} of the pipeline's scheduler: the model is trained to "
                    "predict epsilon or v_prediction; use a pipeline that does."
                ]
            )
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod.float(), persistent=False)

    @property
    def parts(self) -> list[str]:
        """Names of the modules that an adapter may wrap."""
        return [name for name, _ in self.named_children()]

    @property
    def first_layers(self) -> list[nn.Module]:
        """Layers that start the autograd graph when gradients are computed before training."""
        return [self.unet.conv_in]

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Same interface as in transformers; diffusers' UNet checkpoints each of its blocks, non-reentrant."""
        self.unet.enable_gradient_checkpointing()
        for name in self.parts[1:]:
            getattr(self, name).gradient_checkpointing_enable(**settings)

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        weights: torch.Tensor,
        time_ids: torch.Tensor,
        prompt_embeds: torch.Tensor | None = None,
        pooled: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        input_ids_2: torch.Tensor | None = None,
    ) -> TextToImageOutput:
        """
        Args:
            latents, noise: (B, 4, h, w), float32.
            timesteps: (B,), int64.
            weights: (B,), float32; the loss is the weighted sum of the rows' losses.
            time_ids: (B, 6), see `inputs.text_to_image.View`.
            prompt_embeds, pooled: (B, tokens, d) and (B, d₂), if the text encoders are not trained.
            input_ids, input_ids_2: (B, tokens), if they are.
        """
        if prompt_embeds is None:
            encoders = [getattr(self, name) for name in TEXT_ENCODERS]
            prompt_embeds, pooled = embed(encoders, (input_ids, input_ids_2))
        keep = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = keep.sqrt() * latents + (1 - keep).sqrt() * noise
        # unet.dtype looks through all modules first, in every step
        dtype = next(p.dtype for p in self.unet.parameters() if p.is_floating_point())
        predicted = self.unet(
            noisy.to(dtype),
            timesteps,
            prompt_embeds.to(dtype),
            added_cond_kwargs={"text_embeds": pooled.to(dtype), "time_ids": time_ids},
            return_dict=False,
        )[0]
        target = noise if self.prediction == "epsilon" else keep.sqrt() * noise - (1 - keep).sqrt() * latents
        rows = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        return TextToImageOutput(loss=(weights * self._timestep_weights(timesteps) * rows).sum())

    def _timestep_weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self.snr_gamma is None:
            return torch.ones((), device=timesteps.device)
        keep = self.alphas_cumprod[timesteps]
        snr = keep / (1 - keep)
        return snr.clamp(max=self.snr_gamma) / (snr if self.prediction == "epsilon" else snr + 1)


def __getattr__(name: str) -> Any:
    """Returns `TextToImageModel` under its old name."""
    if name != "Denoiser":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.Denoiser is {__name__}.TextToImageModel now", DeprecationWarning, stacklevel=2)
    return TextToImageModel


def embed(encoders: Sequence[nn.Module], ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the UNet's prompt embeddings (B, tokens, d + d₂) and pooled embeddings (B, d₂) for token ids (B, tokens).

    As in SDXL: the second-to-last layer of both encoders, and the pooled output of the second.
    """
    outputs = [encoder(tokens, output_hidden_states=True) for encoder, tokens in zip(encoders, ids, strict=True)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds


# --- the pipeline's parts


def require_diffusers() -> None:
    """
    Raises:
        ConfigError: the package diffusers is not installed; with the command that installs it.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise ConfigError(
            ["Missing package diffusers: text-to-image models are its; run pip install 'flatlora-suite[diffusion]'."]
        )


def options_of(config: DiffusionModelConfig, source: str) -> dict[str, Any]:
    """Returns the keyword arguments of from_pretrained that select the revision of a repository."""
    return {"revision": config.revision} if config.revision and not os.path.isdir(source) else {}


def skeleton(config: DiffusionModelConfig, source: str) -> TextToImageModel:
    """Returns the model without weights (meta device)."""
    check_parts(config, source)
    import diffusers

    options = options_of(config, source)
    described = diffusers.UNet2DConditionModel.load_config(source, subfolder=UNET, **options)
    if errors := count_errors(described, f"{UNET}/config.json of {config.hub_id}"):
        raise ConfigError(errors)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(described)
        encoders = [
            cls(transformers.CLIPTextConfig.from_pretrained(source, subfolder=name, **options))
            for name, cls in _text_classes(config)
        ]
    return TextToImageModel(unet, schedule(config, source), encoders)


def _text_classes(config: DiffusionModelConfig, *, always: bool = False) -> list[tuple[str, type[nn.Module]]]:
    """Returns (name, class) of the text encoders that are part of the model; with `always`, of both in any case."""
    classes = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    return list(zip(TEXT_ENCODERS, classes, strict=True)) if always or config.train_text_encoders else []


def schedule(config: DiffusionModelConfig, source: str) -> Any:
    """Returns diffusers' DDPMScheduler with the pipeline's own settings."""
    import diffusers

    return diffusers.DDPMScheduler.from_pretrained(source, subfolder="scheduler", **options_of(config, source))


def load_model(config: DiffusionModelConfig, source: str, device: torch.device) -> TextToImageModel:
    """Loads the model, frozen, in `config.dtype` on `device`."""
    encoders = load_text_encoders(config, source, device) if config.train_text_encoders else ()
    model = TextToImageModel(load_unet(config, source), schedule(config, source), encoders, config.snr_gamma)
    return model.requires_grad_(False).to(device)


def load_unet(config: DiffusionModelConfig, source: str) -> nn.Module:
    import diffusers

    with _quiet_diffusers():
        return load_whole(
            config,
            diffusers.UNet2DConditionModel,
            source,
            subfolder=UNET,
            torch_dtype=getattr(torch, config.dtype),
            variant=config.variant,
            **options_of(config, source),
        )


def load_vae(config: DiffusionModelConfig, source: str, device: torch.device) -> nn.Module:
    """Loads the VAE: `config.vae_id`, or the pipeline's own if that is None; its weights are `config.vae_dtype`'s."""
    import diffusers

    name, options = _vae_place(config, source)
    owner = config if config.vae_id is None else _vae_config(config.vae_id)
    with _quiet_diffusers():
        vae = load_whole(owner, diffusers.AutoencoderKL, name, torch_dtype=getattr(torch, config.vae_dtype), **options)
    hold_as_computed(vae, choose_precision("auto", config.vae_dtype, device))
    return vae.requires_grad_(False).eval().to(device)


class _VAEConfig(ModelConfig):
    hub_setting: ClassVar[str] = "model.vae_id"


def _vae_place(config: DiffusionModelConfig, source: str) -> tuple[str, dict[str, Any]]:
    """Returns the source of the VAE and the further keyword arguments of from_pretrained."""
    if config.vae_id is not None:
        return config.vae_id, {}
    return source, {"subfolder": "vae", "variant": config.variant, **options_of(config, source)}


def vae_state(config: DiffusionModelConfig) -> str | None:
    """Returns the identity of `config.vae_id`: hash of a folder or commit on the hub; None for the pipeline's VAE.

    Raises:
        ConfigError: the VAE cannot be read; with a suggested fix.
    """
    import diffusers

    if config.vae_id is None:
        return None
    if os.path.isdir(config.vae_id):
        return f"sha256:{part_sha256(Path(config.vae_id))}"
    with _vae_errors(config):
        _, commit = diffusers.AutoencoderKL.load_config(config.vae_id, return_commit_hash=True)
    return f"{config.vae_id}@{commit}"


def _vae_errors(config: DiffusionModelConfig) -> contextlib.AbstractContextManager:
    """`hub_errors` that name model.vae_id if the VAE is not the pipeline's own."""
    if config.vae_id is None:
        return contextlib.nullcontext()
    return hub_errors(_vae_config(config.vae_id))


def _vae_config(name: str) -> _VAEConfig:
    return _VAEConfig(name="vae", hub_id=name, family="text_to_image")


def load_text_encoders(config: DiffusionModelConfig, source: str, device: torch.device) -> list[nn.Module]:
    """Loads both text encoders, frozen, with their weights rounded to `config.dtype`."""
    options = {"dtype": getattr(torch, config.dtype), "variant": config.variant, **options_of(config, source)}
    encoders = [
        load_whole(config, cls, source, subfolder=name, **options) for name, cls in _text_classes(config, always=True)
    ]
    precision = choose_precision("auto", config.dtype, device)
    for encoder in encoders:
        hold_as_computed(encoder, precision)
    return [encoder.requires_grad_(False).eval().to(device) for encoder in encoders]


def load_tokenizers(config: DiffusionModelConfig, source: str) -> list[transformers.PreTrainedTokenizerBase]:
    """Loads both tokenizers."""
    options = options_of(config, source)
    options |= NO_FOREIGN_CODE
    return [transformers.AutoTokenizer.from_pretrained(source, subfolder=name, **options) for name in _TOKENIZERS]


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Turns off progress bars and log messages of diffusers in the block."""
    import diffusers

    level, bars = diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(level)
        if bars:
            diffusers.utils.logging.enable_progress_bar()


DRAWN_FACTOR = 8  # sides of a generated image are multiples of it in diffusers' pipeline


def size_factor(config: DiffusionModelConfig, source: str) -> int:
    """Returns what both sides of an image must be multiples of, in pixels: the downsampling of VAE and UNet."""
    check_parts(config, source)
    import diffusers

    unet = diffusers.UNet2DConditionModel.load_config(source, subfolder=UNET, **options_of(config, source))
    name, options = _vae_place(config, source)
    options.pop("variant", None)
    with _vae_errors(config):
        vae = diffusers.AutoencoderKL.load_config(name, **options)
    return 2 ** (len(vae["block_out_channels"]) - 1 + len(unet["block_out_channels"]) - 1)


def weight_files(config: DiffusionModelConfig, part: str = UNET) -> list[str]:
    """Returns the file names that the weights of a part may have; one of them must exist."""
    stem = "model" if part in TEXT_ENCODERS else "diffusion_pytorch_model"
    variant = f".{config.variant}" if config.variant else ""
    names = [f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"]
    names += ["pytorch_model.bin"] if part in TEXT_ENCODERS else [f"{stem}{variant}.bin"]
    return [f"{part}/{name}" for name in names]


def commit_hash(config: DiffusionModelConfig, source: str) -> str:
    """Returns the commit on the hub that files are read from."""
    import diffusers

    options = options_of(config, source)
    _, commit = diffusers.UNet2DConditionModel.load_config(source, subfolder=UNET, return_commit_hash=True, **options)
    return commit


def check_parts(config: DiffusionModelConfig, source: str) -> None:
    """Checks that a pipeline has all of its parts; nothing is loaded.

    Raises:
        ConfigError: parts are missing, or the package diffusers is.
        OSError: the hub cannot be reached.
    """
    require_diffusers()
    weighed = [*TEXT_ENCODERS, *(["vae"] if config.vae_id is None else [])]  # the UNet's weights are checked elsewhere
    files = [[INDEX], ["scheduler/scheduler_config.json"], *([f"{name}/config.json"] for name in (UNET, *weighed))]
    files += [[f"{name}/tokenizer_config.json"] for name in _TOKENIZERS]
    files += [weight_files(config, name) for name in weighed]
    missing = [names[0] for names in files if not any(_holds(config, source, name) for name in names)]
    if not missing:
        return
    if not os.path.isdir(source) and not hub_is_reachable():
        raise OSError("offline")  # a message that speaks_of_the_network recognizes
    raise ConfigError(
        [
            f"Invalid model.hub_id={config.hub_id}: it has no {', '.join(missing)}, so it is no SDXL pipeline; name a "
            "repository or folder in diffusers' layout, made by save_pretrained or `hf download`."
        ]
    )


def _holds(config: DiffusionModelConfig, source: str, name: str) -> bool:
    return (Path(source) / name).is_file() if os.path.isdir(source) else _hub_holds(source, name, config.revision)


@functools.cache  # one request per file, and every reader of a pipeline's settings calls check_parts first
def _hub_holds(repository: str, name: str, revision: str | None) -> bool:
    from transformers.utils.hub import has_file

    return has_file(repository, name, revision=revision)


def token_ids(
    tokenizers: Sequence[transformers.PreTrainedTokenizerBase], prompts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the token ids of both tokenizers, (B, maximum length) each; see `warn_of_long_prompts` for truncation."""
    return tuple(
        tokenized(
            tokenizer,
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        for tokenizer in tokenizers
    )


def warn_of_long_prompts(tokenizers: Sequence[transformers.PreTrainedTokenizerBase], prompts: Sequence[str]) -> None:
    """Logs one warning about all prompts that are longer than a tokenizer's maximum length."""
    texts = list(dict.fromkeys(prompts))
    for tokenizer in tokenizers:
        lengths = (
            [len(ids) for ids in tokenized(tokenizer, texts, truncation=False, verbose=False)["input_ids"]]
            if texts
            else []
        )
        limit = tokenizer.model_max_length
        if long := [text for text, length in zip(texts, lengths, strict=True) if length > limit]:
            logger.warning(
                "%d of %d prompts are longer than %d tokens and are cut there; the first: %.60s…",
                *(len(long), len(texts), limit, long[0]),
            )
            return


# --- images and latents


class Scale:
    """Scales a VAE's latents for the UNet: (x − mean) · factor, per channel or with one mean and factor."""

    def __init__(self, vae: nn.Module) -> None:
        mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        self.mean = 0.0 if mean is None else torch.tensor(mean).view(-1, 1, 1)
        self.factor = vae.config.scaling_factor / (1.0 if std is None else torch.tensor(std).view(-1, 1, 1))

    def to_model(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents - self.mean) * self.factor

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / self.factor + self.mean


@torch.no_grad()
def moments(vae: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and std of an image's latents in the UNet's scale, (4, h, w) each, float32, on the CPU.

    Args:
        pixels: (3, H, W), −1 to 1.

    Raises:
        ConfigError: they are not finite, as with SDXL's own VAE in FP16.
    """
    distribution = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
    mean, std = distribution.mean[0].float().cpu(), distribution.std[0].float().cpu()
    validate_unbroken(vae, torch.stack([mean, std]))
    scale = Scale(vae)
    return scale.to_model(mean), std * scale.factor


@torch.no_grad()
def decode(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Decodes latents in the UNet's scale one by one; returns images (B, 3, H, W), float32, 0 to 1, on the CPU.

    Raises:
        ConfigError: as `moments`.
    """
    scale, images = Scale(vae), []
    for latent in latents.float().cpu():
        image = vae.decode(scale.to_vae(latent)[None].to(vae.device, vae.dtype)).sample[0].float().cpu()
        validate_unbroken(vae, image)
        images.append((image / 2 + 0.5).clamp(0, 1))
    return torch.stack(images)


def validate_unbroken(vae: nn.Module, found: torch.Tensor) -> None:
    """
    Raises:
        ConfigError: the output of a VAE is not finite.
    """
    if not found.isfinite().all():
        dtype = _dtype_name(vae)
        remedy = (
            "its weights are broken: fetch them again, or name another VAE with model.vae_id"
            if dtype == "float32"
            else "use model.vae_dtype=float32, or a VAE that was mended for FP16, such as "
            "model.vae_id=madebyollin/sdxl-vae-fp16-fix"
        )
        raise ConfigError(
            [f"Invalid model.vae_dtype={dtype}: the VAE makes NaN or infinity of a picture in it; {remedy}."]
        )


def _validate_latents(unet: nn.Module, latents: torch.Tensor, prompts: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: the output of the UNet is not finite.
    """
    broken = [prompt for latent, prompt in zip(latents, prompts, strict=True) if not latent.isfinite().all()]
    if broken:
        dtype = _dtype_name(unet)
        remedy = (
            "its weights or the adapter's are broken, or the training diverged"
            if dtype == "float32"
            else "bfloat16 and float32 have a wider range, and broken weights make it in every dtype"
        )
        raise ConfigError(
            [f"Invalid model.dtype={dtype}: the UNet makes NaN or infinity of {broken[0]!r} in it; {remedy}."]
        )


def _dtype_name(model: nn.Module) -> str:
    """Returns the dtype in which the weights are stored, as the settings name it."""
    return str(stored_dtype(next(model.parameters()))).removeprefix("torch.")


# --- sampling


def pipeline_of(model: TextToImageModel, config: DiffusionModelConfig, source: str, device: torch.device) -> Any:
    """Returns diffusers' pipeline with this model's parts, adapters included; call it with output_type="latent"."""
    import diffusers

    plain = isinstance(getattr(model, TEXT_ENCODERS[0], None), nn.Module)
    encoders = [getattr(model, name) for name in TEXT_ENCODERS] if plain else load_text_encoders(config, source, device)
    scheduler = _described(config, source, "scheduler", "scheduler_config.json")["_class_name"]
    with _quiet_diffusers():
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=load_vae(config, source, device),
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=(tokenizers := load_tokenizers(config, source))[0],
            tokenizer_2=tokenizers[1],
            unet=model.unet,
            scheduler=getattr(diffusers, scheduler).from_pretrained(
                source, subfolder="scheduler", **options_of(config, source)
            ),
            add_watermarker=False,
            **_pipeline_settings(config, source),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pipeline_settings(config: DiffusionModelConfig, source: str) -> dict[str, bool]:
    """Returns the settings in a pipeline's index besides its parts."""
    described = _described(config, source, "", INDEX)
    return {key: described[key] for key in ("force_zeros_for_empty_prompt",) if key in described}


def _described(config: DiffusionModelConfig, source: str, part: str, file: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    return json.loads(Path(cached_file(source, file, subfolder=part, **options_of(config, source))).read_bytes())


@torch.no_grad()
def sample(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: int,
    steps: int,
    guidance: float,
    negative_prompt: str = "",
) -> torch.Tensor:
    """Generates images (B, 3, size, size), float32, 0 to 1, on the CPU; each depends only on its own prompt and seed.

    The UNet runs under the caller's autocast; the VAE keeps its own dtype.

    Raises:
        ConfigError: latents or images are not finite.
    """
    with _quiet_diffusers():
        latents = pipeline(
            prompt=list(prompts),
            negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images
    _validate_latents(pipeline.unet, latents, prompts)
    with torch.autocast(latents.device.type, enabled=False):
        return decode(pipeline.vae, latents)


# --- adapters for diffusers


def export_adapter(folder: Path) -> None:
    """Writes the file for `pipeline.load_lora_weights(folder)` into the folder of a saved PEFT adapter."""
    import diffusers
    from peft import LoraConfig

    saved = LoraConfig.from_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    layers, described = {}, {}
    for part in (UNET, *TEXT_ENCODERS):
        head = f"base_model.model.{part}."
        own = {name.removeprefix(head): tensor for name, tensor in tensors.items() if name.startswith(head)}
        if not own:
            continue
        targets = sorted({name.partition(".lora_")[0] for name in own if ".lora_" in name})
        config = LoraConfig(
            r=saved.r,
            lora_alpha=saved.lora_alpha,
            use_rslora=saved.use_rslora,
            use_dora=saved.use_dora,
            target_modules=targets,
        )
        kept = {key: value for key, value in config.to_dict().items() if key in _EXPORTED}
        layers[f"{part}_lora_layers"] = own
        described[f"{part}_lora_adapter_metadata"] = kept | {"target_modules": targets}
    with _quiet_diffusers():
        diffusers.StableDiffusionXLPipeline.save_lora_weights(folder, **layers, **described)
    _sort_metadata(folder / "pytorch_lora_weights.safetensors")


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata in the header of a safetensors file: the library writes them in random order.

    Without it the same adapter would have other bytes in each run.
    """
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensors to 8 bytes
    write_atomic(path, len(text).to_bytes(8, "little") + text + content[end:])


_EXPORTED = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules")
