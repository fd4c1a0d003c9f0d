"""Settings of the command line that all benchmarks share."""

from __future__ import annotations

from typing import Literal

from eval.backends import wire
from flatlora.config.settings import MOST_SECONDS, Section, setting
from flatlora.utils.errors import SettingError


class Target(Section):
    """Keys of the command line that all benchmarks share."""

    rows: str | None = setting(None, min_length=1, remedy="name a .jsonl file, or write rows=benchmark")
    data_root: str | None = setting(None, min_length=1, remedy="name a folder with the hub's layout")
    base: str | None = setting(None, min_length=1, remedy="name the adapter's base model: a folder or a hub id")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", remedy="auto is the model's own")
    out: str | None = setting(None, min_length=1, remedy="name a folder")
    score_only: bool = setting(False, remedy="true scores existing answers")
    backend: Literal["hf", "vllm", "openai"] = setting("hf", remedy="hf is transformers in this process")
    base_url: str | None = setting(None, min_length=1, remedy="name the endpoint of backend=openai, ending in /v1")
    base_key: str | None = setting(None, min_length=1, remedy="name the environment variable with the key of base_url")
    chat: bool = setting(False, remedy="true sends prompts as messages of a chat, for backend=openai")
    concurrency: int = setting(8, ge=1, le=1024, remedy="how many requests of backend=openai are under way at a time")
    requests_per_minute: float | None = setting(None, ge=0.01, le=1e6, remedy="null sets no limit")
    timeout: float = setting(300.0, gt=0, le=MOST_SECONDS, remedy="seconds for one request of backend=openai")

    def rule_errors(self) -> list[SettingError]:
        errors, fields = [], type(self).model_fields
        if self.backend == "openai" and self.base_url is None:
            errors.append(
                SettingError(
                    ("base_url", "backend"),
                    "Missing base_url: backend=openai needs an endpoint; name it with base_url=http://HOST:PORT/v1.",
                )
            )
        elif self.backend == "openai":
            errors += wire.endpoint_errors("base_url", self.base_url, "base_key", self.base_key)
        if self.backend != "openai":
            errors += [
                SettingError(
                    (key, "backend"),
                    f"Invalid {key}={getattr(self, key)} with backend={self.backend}: only backend=openai reads it; "
                    "drop it.",
                )
                for key in ("base_url", "base_key", "chat", "concurrency", "requests_per_minute", "timeout")
                if getattr(self, key) != fields[key].default
            ]
        if self.backend == "openai" and self.dtype != "auto":
            errors.append(
                SettingError(
                    ("dtype", "backend"),
                    f"Invalid dtype={self.dtype} with backend=openai: the server has its own; drop it.",
                )
            )
        if self.backend == "openai" and self.base is not None:
            errors.append(
                SettingError(
                    ("base", "backend"),
                    f"Invalid base={self.base} with backend=openai: the server has its own; drop it.",
                )
            )
        if self.backend != "hf" and self.device != "auto":
            errors.append(
                SettingError(
                    ("device", "backend"),
                    f"Invalid device={self.device} with backend={self.backend}: it has a device of its own; drop it.",
                )
            )
        return errors
