"""Small models with random weights (seed 0), for tests and machines without access to the hub; not pretrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

RANDOM_VERSION = 1  # incremented when the weights below change


def write_random_clip(folder: Path) -> None:
    """Writes a full CLIP with random weights, seed 0: 32 × 32 pixels, four layers, a byte tokenizer."""
    tokenizer = byte_tokenizer()
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=tower | _vocabulary_of(tokenizer),
                vision_config=tower | {"image_size": 32, "patch_size": 4},
                projection_dim=64,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 32}
    crop = {"height": 32, "width": 32}
    getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(
        size=size, crop_size=crop
    ).save_pretrained(folder)


def write_random_sdxl(folder: Path) -> None:
    """Writes a full SDXL pipeline with random weights, seed 0: 64 × 64 pixels, both text encoders, a byte tokenizer."""
    import diffusers

    tokenizer = byte_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = transformers.CLIPTextConfig(**tower, **_vocabulary_of(tokenizer), projection_dim=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + 32,
            cross_attention_dim=64,
            norm_num_groups=8,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=0.13025,
        )
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=vae,
            unet=unet,
            text_encoder=transformers.CLIPTextModel(text),
            text_encoder_2=transformers.CLIPTextModelWithProjection(text),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per byte, at most 77 tokens, and CLIP's start and end tokens."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*alphabet, start, end])}
    backend = Tokenizer(BPE(vocabulary, [], unk_token=end))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=end, pad_token=end, unk_token=end, model_max_length=77
    )


def _vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Returns the settings of a text encoder's config that depend on its tokenizer."""
    end = tokenizer.eos_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    return {"vocab_size": len(tokenizer)} | ids
