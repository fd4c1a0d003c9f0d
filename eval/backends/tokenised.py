"""What backends share that have the model's own tokenizer: prompts and chats become token ids in one way."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from eval.backends import Completion, Messages, Sampling
from flatlora.config import ConfigError


class TokenisedBackend:
    """Generation by token ids; a subclass has `tokenizer` and `_generate`."""

    tokenizer: PreTrainedTokenizerBase

    def prompt_length(self, prompt: str) -> int:
        return len(self.tokenizer(prompt)["input_ids"])

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        return self._generate([self.tokenizer(prompt)["input_ids"] for prompt in prompts], sampling, seeds)

    def chat(
        self, chats: Sequence[Messages], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """One reply to each chat.

        Raises:
            ConfigError: the tokenizer has no form for chats.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            name = self.tokenizer.name_or_path
            raise ConfigError(
                [f"Invalid template=chat: the tokenizer of {name} has no form for chats; use alpaca or qa."]
            )
        options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
        asked = [self.tokenizer.apply_chat_template(list(chat), **options)["input_ids"] for chat in chats]
        return self._generate(asked, sampling, seeds)

    def _generate(self, prompts: list[list[int]], sampling: Sampling, seeds: Sequence[int] | None) -> list[Completion]:
        """One completion for each list of token ids, in order."""
        raise NotImplementedError
