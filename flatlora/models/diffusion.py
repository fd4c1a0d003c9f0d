"""SDXL as something to train: a denoiser that takes latents and prompts and returns its loss, made of diffusers' parts.

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
from flatlora.models.hashes import part_sha256
from flatlora.models.sources import NO_FOREIGN_CODE, count_errors, hub_errors, load_whole
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import choose_precision, hold_as_computed, stored_dtype

logger = logging.getLogger(__name__)

UNET, TEXT_ENCODERS = "unet", ("text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
INDEX = DiffusionModelConfig.index_file


@dataclass
class DenoisingOutput(ModelOutput):
    loss: torch.Tensor | None = None


class Denoiser(nn.Module):
    """latents, noise, timesteps and prompts of a micro-batch → its loss.

    min-SNR weighs rows of prior preservation as all others.

    Args:
        unet: a UNet2DConditionModel.
        schedule: diffusers' DDPMScheduler: ᾱ_t and what is predicted.
        text_encoders: both, where they are trained too; prompts are then token ids, else embeddings.
        snr_gamma: γ of min-SNR; None weighs all timesteps alike.
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
                    f"Invalid prediction_type={self.prediction} of the pipeline's scheduler: a denoiser is trained to "
                    "predict epsilon or v_prediction; use a pipeline that does."
                ]
            )
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod.float(), persistent=False)

    @property
    def parts(self) -> list[str]:
        """Names of the modules that an adapter is to go around."""
        return [name for name, _ in self.named_children()]

    @property
    def first_layers(self) -> list[nn.Module]:
        """Where a gradient begins that is taken before anything is trained."""
        return [self.unet.conv_in]

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """As transformers' models have it; diffusers' UNet checkpoints each of its blocks, without reentrance."""
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
    ) -> DenoisingOutput:
        """
        Args:
            latents, noise: B × 4 × h × w, FP32.
            timesteps: B, INT64.
            weights: B, FP32; the loss is the sum of the rows' losses times these.
            time_ids: B × 6, as `captioned.View` has them.
            prompt_embeds, pooled: B × tokens × d and B × d₂; or
            input_ids, input_ids_2: B × tokens, for text encoders that are trained.
        """
        if prompt_embeds is None:
            encoders = [getattr(self, name) for name in TEXT_ENCODERS]
            prompt_embeds, pooled = embed(encoders, (input_ids, input_ids_2))
        keep = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = keep.sqrt() * latents + (1 - keep).sqrt() * noise
        dtype = self.unet.dtype
        found = self.unet(
            noisy.to(dtype),
            timesteps,
            prompt_embeds.to(dtype),
            added_cond_kwargs={"text_embeds": pooled.to(dtype), "time_ids": time_ids},
            return_dict=False,
        )[0]
        target = noise if self.prediction == "epsilon" else keep.sqrt() * noise - (1 - keep).sqrt() * latents
        rows = (found.float() - target).square().mean(dim=(1, 2, 3))
        return DenoisingOutput(loss=(weights * self._timestep_weights(timesteps) * rows).sum())

    def _timestep_weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self.snr_gamma is None:
            return torch.ones((), device=timesteps.device)
        keep = self.alphas_cumprod[timesteps]
        snr = keep / (1 - keep)
        return snr.clamp(max=self.snr_gamma) / (snr if self.prediction == "epsilon" else snr + 1)


def embed(encoders: Sequence[nn.Module], ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of both encoders (B × tokens) → what the UNet reads: B × tokens × (d + d₂), and pooled B × d₂.

    As SDXL has it: the layer before the last of both encoders, and the pooled output of the second.
    """
    outputs = [encoder(one, output_hidden_states=True) for encoder, one in zip(encoders, ids, strict=True)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds


# --- the pipeline's parts


def require_diffusers() -> None:
    """
    Raises:
        ConfigError: the package is not installed; with the way to it.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise ConfigError(
            ["Missing package diffusers: text-to-image models are its; run pip install 'flatlora-suite[diffusion]'."]
        )


def options_of(config: DiffusionModelConfig, source: str) -> dict[str, Any]:
    """Keywords of from_pretrained that say which state of a repository is meant."""
    return {"revision": config.revision} if config.revision and not os.path.isdir(source) else {}


def skeleton(config: DiffusionModelConfig, source: str) -> Denoiser:
    """The denoiser without weights (meta device)."""
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
    return Denoiser(unet, schedule(config, source), encoders)


def _text_classes(config: DiffusionModelConfig, *, always: bool = False) -> list[tuple[str, type[nn.Module]]]:
    """Text encoders that are part of the denoiser; `always` gives them whether or not."""
    classes = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    return list(zip(TEXT_ENCODERS, classes, strict=True)) if always or config.train_text_encoders else []


def schedule(config: DiffusionModelConfig, source: str) -> Any:
    """diffusers' DDPMScheduler with the pipeline's own settings."""
    import diffusers

    return diffusers.DDPMScheduler.from_pretrained(source, subfolder="scheduler", **options_of(config, source))


def load_denoiser(config: DiffusionModelConfig, source: str, device: torch.device) -> Denoiser:
    """The frozen denoiser in `config.dtype` on `device`."""
    encoders = load_text_encoders(config, source, device) if config.train_text_encoders else ()
    model = Denoiser(load_unet(config, source), schedule(config, source), encoders, config.snr_gamma)
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
    """The VAE in `config.vae_dtype`: the pipeline's own, or `config.vae_id`."""
    import diffusers

    name, options = _vae_place(config, source)
    owner = config if config.vae_id is None else _vae_config(config.vae_id)
    with _quiet_diffusers():
        vae = load_whole(owner, diffusers.AutoencoderKL, name, torch_dtype=getattr(torch, config.vae_dtype), **options)
    return vae.requires_grad_(False).eval().to(device)


class _VAEConfig(ModelConfig):
    hub_setting: ClassVar[str] = "model.vae_id"


def _vae_place(config: DiffusionModelConfig, source: str) -> tuple[str, dict[str, Any]]:
    """Where the VAE is, and the keywords that say so."""
    if config.vae_id is not None:
        return config.vae_id, {}
    return source, {"subfolder": "vae", "variant": config.variant, **options_of(config, source)}


def vae_state(config: DiffusionModelConfig) -> str | None:
    """What changes whenever `config.vae_id` does: its folder's hash, or the hub's commit; None for the pipeline's own.

    Raises:
        ConfigError: it cannot be had; with the ways out.
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
    """Errors of a VAE that is not the pipeline's, by its own setting's name."""
    if config.vae_id is None:
        return contextlib.nullcontext()
    return hub_errors(_vae_config(config.vae_id))


def _vae_config(name: str) -> _VAEConfig:
    return _VAEConfig(name="vae", hub_id=name, family="sdxl")


def load_text_encoders(config: DiffusionModelConfig, source: str, device: torch.device) -> list[nn.Module]:
    """Both text encoders, their weights those of `config.dtype`."""
    options = {"dtype": getattr(torch, config.dtype), "variant": config.variant, **options_of(config, source)}
    encoders = [
        load_whole(config, cls, source, subfolder=name, **options) for name, cls in _text_classes(config, always=True)
    ]
    precision = choose_precision("auto", config.dtype, device)
    for encoder in encoders:
        hold_as_computed(encoder, precision)
    return [encoder.requires_grad_(False).eval().to(device) for encoder in encoders]


def load_tokenizers(config: DiffusionModelConfig, source: str) -> list[transformers.PreTrainedTokenizerBase]:
    """Both tokenizers."""
    options = options_of(config, source)
    options |= NO_FOREIGN_CODE
    return [transformers.AutoTokenizer.from_pretrained(source, subfolder=name, **options) for name in _TOKENIZERS]


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """No bars and notes of the library: what matters is said by this suite."""
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


DRAWN_FACTOR = 8  # of sides, in diffusers' pipeline


def size_factor(config: DiffusionModelConfig, source: str) -> int:
    """What both sides of a picture must be multiples of: how often VAE and UNet halve it."""
    check_parts(config, source)
    import diffusers

    unet = diffusers.UNet2DConditionModel.load_config(source, subfolder=UNET, **options_of(config, source))
    name, options = _vae_place(config, source)
    options.pop("variant", None)
    with _vae_errors(config):
        vae = diffusers.AutoencoderKL.load_config(name, **options)
    return 2 ** (len(vae["block_out_channels"]) - 1 + len(unet["block_out_channels"]) - 1)


def weight_files(config: DiffusionModelConfig, part: str = UNET) -> list[str]:
    """Names that the weights of a part may have, one of which is there."""
    stem = "model" if part in TEXT_ENCODERS else "diffusion_pytorch_model"
    variant = f".{config.variant}" if config.variant else ""
    names = [f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"]
    names += ["pytorch_model.bin"] if part in TEXT_ENCODERS else [f"{stem}{variant}.bin"]
    return [f"{part}/{name}" for name in names]


def commit_hash(config: DiffusionModelConfig, source: str) -> str:
    """The hub's, of the state that is read."""
    import diffusers

    options = options_of(config, source)
    _, found = diffusers.UNet2DConditionModel.load_config(source, subfolder=UNET, return_commit_hash=True, **options)
    return found


def check_parts(config: DiffusionModelConfig, source: str) -> None:
    """See to it that a pipeline has all of its parts; nothing is loaded.

    Raises:
        ConfigError: some are missing, or diffusers is.
        OSError: the hub is out of reach.
    """
    require_diffusers()
    weighed = [*TEXT_ENCODERS, *(["vae"] if config.vae_id is None else [])]  # the UNet's own are looked for elsewhere
    files = [[INDEX], ["scheduler/scheduler_config.json"], *([f"{name}/config.json"] for name in (UNET, *weighed))]
    files += [[f"{name}/tokenizer_config.json"] for name in _TOKENIZERS]
    files += [weight_files(config, name) for name in weighed]
    missing = [names[0] for names in files if not any(_holds(config, source, name) for name in names)]
    if not missing:
        return
    if not os.path.isdir(source) and not hub_is_reachable():
        raise OSError("offline")  # what speaks_of_the_network knows
    raise ConfigError(
        [
            f"Invalid model.hub_id={config.hub_id}: it has no {', '.join(missing)}, so it is no SDXL pipeline; name a "
            "repository or folder in diffusers' layout, made by save_pretrained or `hf download`."
        ]
    )


def _holds(config: DiffusionModelConfig, source: str, name: str) -> bool:
    return (Path(source) / name).is_file() if os.path.isdir(source) else _hub_holds(source, name, config.revision)


@functools.cache  # a request each, and everything that reads a pipeline's settings looks for its parts first
def _hub_holds(repository: str, name: str, revision: str | None) -> bool:
    from transformers.utils.hub import has_file

    return has_file(repository, name, revision=revision)


def token_ids(
    tokenizers: Sequence[transformers.PreTrainedTokenizerBase], prompts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of both tokenizers, B × their limit; `warn_of_long_prompts` speaks of those that are cut."""
    return tuple(
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        for tokenizer in tokenizers
    )


def warn_of_long_prompts(tokenizers: Sequence[transformers.PreTrainedTokenizerBase], prompts: Sequence[str]) -> None:
    """Warn, once for all of them, of prompts that are longer than a tokenizer's limit."""
    texts = list(dict.fromkeys(prompts))
    for tokenizer in tokenizers:
        lengths = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]] if texts else []
        limit = tokenizer.model_max_length
        if long := [text for text, length in zip(texts, lengths, strict=True) if length > limit]:
            logger.warning(
                "%d of %d prompts are longer than %d tokens and are cut there; the first: %.60s…",
                *(len(long), len(texts), limit, long[0]),
            )
            return


# --- between pictures and latents


class Scale:
    """How a VAE's latents are brought to the scale of the denoiser: (x − mean) · factor, by channel or alike."""

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
    """Mean and std (4 × h × w, FP32, host) of a picture's latents, in the denoiser's scale.

    Args:
        pixels: 3 × H × W, −1 to 1.

    Raises:
        ConfigError: they are not finite, as those of SDXL's own VAE are in FP16.
    """
    found = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
    mean, std = found.mean[0].float().cpu(), found.std[0].float().cpu()
    validate_unbroken(vae, torch.stack([mean, std]))
    scale = Scale(vae)
    return scale.to_model(mean), std * scale.factor


@torch.no_grad()
def decode(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (B × 3 × H × W, FP32, 0 to 1, host) of latents in the denoiser's scale, one after the other.

    Raises:
        ConfigError: as `moments`.
    """
    scale, pictures = Scale(vae), []
    for one in latents.float().cpu():
        found = vae.decode(scale.to_vae(one)[None].to(vae.device, vae.dtype)).sample[0].float().cpu()
        validate_unbroken(vae, found)
        pictures.append((found / 2 + 0.5).clamp(0, 1))
    return torch.stack(pictures)


def validate_unbroken(vae: nn.Module, found: torch.Tensor) -> None:
    """
    Raises:
        ConfigError: what a VAE made is not finite.
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


def _validate_latents(denoiser: nn.Module, latents: torch.Tensor, prompts: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: what a denoiser made is not finite.
    """
    broken = [prompt for one, prompt in zip(latents, prompts, strict=True) if not one.isfinite().all()]
    if broken:
        dtype = _dtype_name(denoiser)
        remedy = (
            "its weights or the adapter's are broken, or the training diverged"
            if dtype == "float32"
            else "bfloat16 and float32 have a wider range, and broken weights make it in every dtype"
        )
        raise ConfigError(
            [f"Invalid model.dtype={dtype}: the denoiser makes NaN or infinity of {broken[0]!r} in it; {remedy}."]
        )


def _dtype_name(model: nn.Module) -> str:
    """Of the weights as they are stored, which is what the settings name."""
    return str(stored_dtype(next(model.parameters()))).removeprefix("torch.")


# --- sampling


def pipeline_of(denoiser: Denoiser, config: DiffusionModelConfig, source: str, device: torch.device) -> Any:
    """diffusers' pipeline around a denoiser, adapters in place, and its VAE; whoever asks it takes latents."""
    import diffusers

    plain = isinstance(getattr(denoiser, TEXT_ENCODERS[0], None), nn.Module)
    encoders = (
        [getattr(denoiser, name) for name in TEXT_ENCODERS] if plain else load_text_encoders(config, source, device)
    )
    scheduler = _described(config, source, "scheduler", "scheduler_config.json")["_class_name"]
    with _quiet_diffusers():
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=load_vae(config, source, device),
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=(tokenizers := load_tokenizers(config, source))[0],
            tokenizer_2=tokenizers[1],
            unet=denoiser.unet,
            scheduler=getattr(diffusers, scheduler).from_pretrained(
                source, subfolder="scheduler", **options_of(config, source)
            ),
            add_watermarker=False,
            **_pipeline_settings(config, source),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pipeline_settings(config: DiffusionModelConfig, source: str) -> dict[str, bool]:
    """What a pipeline says of itself besides its parts."""
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
    """Pictures (B × 3 × size × size, FP32, 0 to 1, host); each depends on its own prompt and seed alone.

    Denoising follows the caller's autocast; the VAE keeps its own dtype.

    Raises:
        ConfigError: latents or pictures are not finite.
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
    """Write beside a saved PEFT adapter the file that `pipeline.load_lora_weights(folder)` reads."""
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


_EXPORTED = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules")
