"""Generates with vLLM in this process: whole batches, with adapters by LoRARequest, not merged.

vLLM pins its own torch and numba, so it has a separate environment, made by `make vllm`, in which the commands of
`eval` also run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from eval.backends import Completion, Sampling
from eval.backends.tokenized import Context, TokenizedBackend, end_ids
from flatlora.models.loading import check_served, model_of
from flatlora.models.saved_adapters import adapter_config, check_adapter, tensor_names
from flatlora.models.sources import in_short
from flatlora.utils.errors import ConfigError


class VLLMBackend(TokenizedBackend):
    """Generates with vLLM's engine in this process.

    Args:
        weights: folder or hub id of the backbone, or of a complete model.
        adapter: folder of a PEFT adapter on it.
        tokenizer: folder of the tokenizer that the adapter was trained with; None: the backbone's.
        revision: of the backbone at the hub.
        dtype: of the weights and computations.
        context: maximum number of tokens of prompt and answer; None: the model's own limit.

    Raises:
        ConfigError: vLLM is not installed or does not support the adapter; or as
            `flatlora.models.loading.check_served`.
    """

    def __init__(
        self,
        weights: str,
        adapter: Path | None = None,
        *,
        batch_size: int,
        tokenizer: Path | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        context: int | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                [
                    "Invalid backend=vllm: vLLM is not installed in this environment; create one with make vllm, and "
                    "run .venv-vllm/bin/python -m eval.NAME … backend=vllm, or use backend=hf."
                ]
            )
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.batch_size, self.identity = batch_size, identity or {}
        lora = {}
        self._adapter = None
        if adapter is not None:
            lora = {"enable_lora": True, "max_lora_rank": _rank_that_fits(_served_rank(adapter))}
            self._adapter = LoRARequest("adapter", 1, str(adapter.resolve()))
        # vLLM ignores missing tensors of an adapter, and tensors that the model has no layer for.
        check_served(model_of(weights).model_copy(update={"revision": revision}), adapter, tokenizer)
        self._dtype = dtype
        self.llm = LLM(
            model=weights,
            revision=revision,
            tokenizer=None if tokenizer is None else str(tokenizer),
            tokenizer_revision=revision if tokenizer is None else None,
            dtype=dtype,
            max_model_len=context,
            seed=0,
            disable_log_stats=True,
            **lora,
            **_memory(),
        )
        if self._adapter is not None:
            self.llm.llm_engine.add_lora(self._adapter)  # so that errors show now, not at the first prompt
        self.tokenizer = self.llm.get_tokenizer()
        model_config = self.llm.llm_engine.model_config
        self.ends = end_ids(self.tokenizer.eos_token_id, model_config.try_get_generation_config().get("eos_token_id"))
        self.context = Context(model_config.max_model_len, "served")

    def describe(self) -> dict[str, Any]:
        import vllm

        return {
            "backend": "vllm",
            "version": vllm.__version__,
            "dtype": self._dtype,
            "batch_size": self.batch_size,
            "ends": sorted(self.ends),
            "tokenizer": self.tokenizer_sha256,
            **self.identity,
        }

    def _generate(self, prompts: list[list[int]], sampling: Sampling, seeds: Sequence[int] | None) -> list[Completion]:
        from vllm import SamplingParams

        self.check_lengths([len(prompt) for prompt in prompts], sampling.max_new_tokens)
        vllm_seeds = [None] * len(prompts)
        if seeds is not None and sampling.temperature:
            vllm_seeds = [seed % (1 << 63) for seed in seeds]
        options = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.temperature else 1.0,
                stop=None if sampling.stop_in_body else list(sampling.stop) or None,  # else `_completion` cuts
                stop_token_ids=sorted(self.ends),
                seed=seed,
            )
            for seed in vllm_seeds
        ]
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        request_outputs = self.llm.generate(requests, options, lora_request=self._adapter, use_tqdm=False)
        outputs = [request_output.outputs[0] for request_output in request_outputs]
        return [self._output_completion(*pair, sampling) for pair in zip(prompts, outputs, strict=True)]

    def _output_completion(self, prompt: list[int], output: Any, sampling: Sampling) -> Completion:
        """Decodes vLLM's tokens like backend=hf, so that the same tokens give the same answer."""
        completion = self._completion(prompt, list(output.token_ids), sampling)
        return completion._replace(finished=completion.finished or output.finish_reason == "stop")


def _memory() -> dict[str, float]:
    """Returns vLLM's memory setting on a CPU: half of the free memory, as vLLM's default is 90% of all memory."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    memory = psutil.virtual_memory()
    return {"gpu_memory_utilization": 0.5 * memory.available / memory.total}


def _served_rank(adapter: Path) -> int:
    """Returns the rank of an adapter.

    Raises:
        ConfigError: it is broken, or vLLM's LoRA layers do not compute the same as PEFT.
    """
    check_adapter(adapter)
    config = adapter_config(adapter)
    if (kind := config.get("peft_type")) != "LORA":
        errors = [f"its kind is {kind}"]
    else:
        errors = [text for key, text in _NOT_SERVED.items() if config.get(key) not in (None, False, "none", {}, [])]
        start = str(config.get("init_lora_weights")).lower()
        if start.startswith(_MOVED_PART_OF_W):
            errors.append(f"PEFT moves a part of the base's weights into it (init_lora_weights={start})")
        others = [name for name in tensor_names(adapter) if ".lora_" not in name]
        errors += [f"it also has other tensors, {in_short(others)}"] if others and not errors else []
    if errors:
        raise ConfigError(
            [
                f"Invalid backend=vllm for {adapter}: {' and '.join(errors)}, which vLLM does not support; use "
                "backend=hf."
            ]
        )
    return config["r"]


_NOT_SERVED = {  # keys of adapter_config.json that vLLM rejects or ignores
    "use_dora": "it is DoRA, whose magnitudes are no low-rank term",
    "modules_to_save": "it also has whole modules (modules_to_save)",
    "bias": "it also has biases (bias)",
    "lora_bias": "its B has biases (lora_bias)",
    "rank_pattern": "its layers have ranks of their own (rank_pattern)",
    "alpha_pattern": "its layers have scalings of their own (alpha_pattern)",
    "target_parameters": "it adapts parameters (target_parameters)",
    "layer_replication": "it repeats layers (layer_replication)",
    "trainable_token_indices": "it has embeddings of its own (trainable_token_indices)",
    "alora_invocation_tokens": "it acts only after certain tokens (alora_invocation_tokens)",
    "use_qalora": "it is QA-LoRA (use_qalora)",
    "use_bdlora": "it is BD-LoRA (use_bdlora)",
    "arrow_config": "it is a mixture of adapters (arrow_config)",
    "kasa_config": "it is KaSA (kasa_config)",
    "monteclora_config": "it is MonteCLoRA (monteclora_config)",
}
# Values of init_lora_weights for which PEFT changes the base's weights whenever it loads the adapter.
_MOVED_PART_OF_W = ("pissa", "olora", "corda", "loftq")


def _rank_that_fits(rank: int) -> int:
    """Returns the smallest rank that vLLM has layers for and that the adapter's rank does not exceed.

    Raises:
        ConfigError: the adapter's rank is larger than vLLM supports.
    """
    sizes = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    fitting = [size for size in sizes if size >= rank]
    if not fitting:
        raise ConfigError(
            [
                f"Invalid backend=vllm: the adapter's rank is {rank}, and vLLM supports {sizes[-1]} at most; use "
                "backend=hf."
            ]
        )
    return fitting[0]
