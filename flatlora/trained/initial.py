"""Finds the adapter that `peft.init_from` names, and checks it against the run before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import PreTrainedTokenizerBase

from flatlora.config.sections import ModelConfig
from flatlora.inputs.rows import UNREACHABLE, hub_is_reachable, speaks_of_the_network
from flatlora.models.hashes import PUT_BACK, differing_part, short_state, weights_sha256
from flatlora.models.loading import saved_processor, skeleton
from flatlora.models.processors import load_tokenizer
from flatlora.models.saved_adapters import base_name, check_adapter, saved_embeddings, saved_tensors, task_errors
from flatlora.models.sources import backbone_source
from flatlora.runs.record import InitialAdapterRecord
from flatlora.train import checkpoint
from flatlora.trained.place import is_hash, resolve_model
from flatlora.utils import records
from flatlora.utils.errors import ConfigError, reason_of

logger = logging.getLogger(__name__)

FILE = "init_from.json"  # in a run's folder: `InitialAdapterRecord`
_SETTING = "peft.init_from"
_HUB_FILES = ("adapter_config.json", "adapter_model.*", "*token*", "vocab.*", "merges.txt", "chat_template*", "spiece*")


@dataclass(frozen=True)
class InitialAdapter:
    """A saved adapter that a run starts from."""

    folder: Path
    record: InitialAdapterRecord
    base_name: str  # of the model that it was trained on
    base: str | None  # the state of that model, if it was recorded

    def errors(self, model: ModelConfig, processor: Any) -> list[str]:
        """Returns errors if it was trained on another base or with another tokenizer than this run's."""
        return [
            *task_errors(self.folder, model.family),
            *self._name_errors(model),
            *self._token_errors(model, processor),
        ]

    def tokens_of(self, model: ModelConfig) -> ModelConfig:
        """Returns where the run's tokenizer is: beside the adapter if it has embeddings, which belong to its tokens."""
        folder = saved_processor(model, self.folder)
        has_embeddings = saved_embeddings(skeleton(model), saved_tensors(self.folder))
        return model.at(str(folder)) if folder and has_embeddings else model

    def _name_errors(self, model: ModelConfig) -> list[str]:
        if self._can_compare(model) or _is_same(self.base_name, model.hub_id):
            return []
        return [
            f"Invalid {_SETTING}={self.record.source} with model.hub_id={model.hub_id}: the adapter was trained on "
            f"{self.base_name}; name that model with model.hub_id, or an adapter of this one (the same weights under "
            "another name: write that name as base_model_name_or_path into its adapter_config.json)."
        ]

    def _can_compare(self, model: ModelConfig) -> bool:
        """Whether the recorded state of its base and that of `model` are of one kind: files or a commit."""
        return self.base is not None and is_hash(self.base) == Path(backbone_source(model)).is_dir()

    def check_base(self, model: ModelConfig, state: Callable[[], str]) -> None:
        """Checks the backbone's bytes, which are hashed while a run begins.

        Args:
            state: returns the state of `model`, from `flatlora.models.loading.backbone_state`.

        Raises:
            ConfigError: the adapter was trained on other weights or settings.
        """
        if self.base is None or not self._can_compare(model):
            recorded = short_state(self.base) if self.base else "its name alone"
            logger.warning(
                "Cannot check that %s has the weights that %s was trained on, which are identified by %s.",
                *(model.hub_id, self.record.source, recorded),
            )
        elif part := differing_part(self.base, here := state()):
            raise ConfigError(
                [
                    f"Invalid {_SETTING}={self.record.source} with model.hub_id={model.hub_id}: the adapter was "
                    f"trained on {self.base_name} with {short_state(self.base)}, and this is {short_state(here)}, "
                    f"which differ in {part}; put {PUT_BACK[part]} back, or name an adapter of this model."
                ]
            )

    def _token_errors(self, model: ModelConfig, processor: Any) -> list[str]:
        folder = saved_processor(model, self.folder)
        if folder is None or not isinstance(processor, PreTrainedTokenizerBase):
            return []
        theirs, own = load_tokenizer(model.at(str(folder))).get_vocab(), processor.get_vocab()
        other = sorted(token for token in theirs.keys() | own.keys() if theirs.get(token) != own.get(token))
        if not other:
            return []
        return [
            f"Invalid {_SETTING}={self.record.source} with model.hub_id={model.hub_id}: the adapter was trained with "
            f"another tokenizer: {len(other)} tokens differ, such as {other[0]!r}, which is {theirs.get(other[0])} "
            f"there and {own.get(other[0])} here; use a model with that tokenizer as model.hub_id (python -m "
            "flatlora.export and --merge DIR make one), or name an adapter of this one."
        ]

    def write(self, run: Path) -> None:
        """Writes the record into a run that begins, for `check_resumed`."""
        records.write_signed(run / FILE, self.record.model_dump())

    def check_resumed(self, run: Path) -> None:
        """Checks that a run goes on with the initial adapter that it began with.

        Raises:
            ConfigError: it began with another one.
        """
        began = (records.read_record(run / FILE, "restore it, or start anew with overwrite=true") or {}).get("sha256")
        if began != self.record.sha256:
            raise ConfigError(
                [
                    f"Invalid {_SETTING}={self.record.source}: {run} began with an adapter of SHA-256 {began}, and "
                    f"this one has {self.record.sha256}; restore that adapter, or start anew with overwrite=true."
                ]
            )


def find_initial(name: str) -> InitialAdapter:
    """Finds the adapter that `peft.init_from` names: a run, a checkpoint, an adapter's folder, or a hub id.

    Args:
        name: path, or a hub id with or without @REVISION.

    Raises:
        ConfigError: there is none, its files are damaged, or it cannot be read from the hub.
    """
    resolved = resolve_model(name, setting=_SETTING)
    folder, commit = Path(resolved.weights), None
    if not folder.is_dir():
        folder = _hub_folder(name)
        commit = folder.name
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            [
                f"Invalid {_SETTING}={name}: it holds no adapter; name a run, checkpoint or adapter of PEFT, or start "
                "from a whole model with model.hub_id."
            ]
        )
    check_adapter(folder)
    manifest = records.read_record(folder / checkpoint.MANIFEST) or {}
    return InitialAdapter(
        folder,
        InitialAdapterRecord(source=name, sha256=weights_sha256(folder), commit=commit),
        resolved.model.hub_id if resolved.run else base_name(folder),
        resolved.base or manifest.get("base"),
    )


def _hub_folder(name: str) -> Path:
    """Returns the folder of an adapter's files in the hub's cache, which is named by its commit."""
    repository, _, revision = name.partition("@")
    reachable = hub_is_reachable()
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = UNREACHABLE if not reachable and speaks_of_the_network(error) else reason_of(error)
        raise ConfigError(
            [
                f"Invalid {_SETTING}={name}: there is no such folder, and reading it from the hub failed: {reason}; "
                "connect to the network, or name a run, checkpoint or adapter folder."
            ]
        ) from error


def _is_same(name: str, other: str) -> bool:
    paths = Path(name), Path(other)
    return name == other or (all(path.is_dir() for path in paths) and paths[0].samefile(paths[1]))
