"""What a runtime's owner may ask about what it serves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tpworker.config import RuntimeConfig
from tpworker.errors import RuntimeStopped
from tpworker.ipc.board import About
from tpworker.runtime.loading import FoundModel
from tpworker.runtime.settings import Speculation
from tpworker.runtime.start import Served, Setup

if TYPE_CHECKING:
    from tpworker.model.families import ModelSpec
    from tpworker.text.tokenizer import Tokenizer


class Facts:
    """What is served, on what, and how long a request may be. `Runtime` learns these as it starts.

    Until the model has been found (for the tokenizer: until all is ready) they raise RuntimeStopped, unless
    they say otherwise.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        """As it was given; `max_model_len` and `max_num_seqs` are what came of it."""
        self._setup: Setup | None = None  # once the model is found
        self._served: Served | None = None  # once it was ready

    @property
    def device(self) -> str:
        """What the ranks run on: 'cpu' or 'cuda'; '' before the start."""
        return "" if self._setup is None else self._setup.group.rank.device

    @property
    def dtype(self) -> str:
        """Of weights, activations and KV cache, e.g. 'bfloat16'; '' before the start."""
        return "" if self._setup is None else self._setup.group.rank.dtype

    @property
    def quantization(self) -> str:
        """Of weights: 'fp8', whether the checkpoint has them so or `RuntimeConfig.quantization` asks for it;
        '' if they are not quantised, or before the start."""
        return "" if self._setup is None or self._setup.model.spec.quantization is None else "fp8"

    @property
    def _about(self) -> About:
        """What a status board would tell."""
        return About() if self._setup is None else self._setup.group.about

    @property
    def speculation(self) -> Speculation:
        """How tokens are guessed, and how many at most; known before the start."""
        return Speculation.of(self.config)

    @property
    def has_tokenizer(self) -> bool:
        """Whether prompts may be text, and outputs have any."""
        return self._served is not None and self._served.tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer and chat template.

        Raises:
            InvalidRequest: the model's folder has none.
        """
        return self._ready.needed_tokenizer()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt, for `Runtime.prepare`: what is too long for certain is not tokenised.

        Raises:
            PromptTooLong: its characters alone prove that it does not fit.
            InvalidRequest: as `Tokenizer.encode`.
        """
        self._ready.check_length(text)
        return self.tokenizer.encode(text, add_special_tokens)

    @property
    def spec(self) -> ModelSpec:
        """What config.json says of the model."""
        return self._model.spec

    @property
    def model_folder(self) -> Path:
        """Where the model lies on this machine."""
        return self._model.folder

    @property
    def served_name(self) -> str:
        """What to call the model towards clients: its hub name, or the last part of its folder."""
        name, folder = self._model.name, self._model.folder
        is_hub_name = Path(name).expanduser().absolute() != folder and self.config.model is not None
        return name if is_hub_name else os.path.basename(os.path.normpath(folder))

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request, prompt and output together."""
        return self._known.group.rank.max_model_len

    @property
    def max_request_len(self) -> int:
        """As `max_model_len`, or fewer, where all KV blocks together hold fewer."""
        return self._ready.limits.shortest

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.spec.vocab_size

    @property
    def max_num_seqs(self) -> int:
        """Most requests that run at once."""
        return self._known.group.rank.max_num_seqs

    @property
    def _model(self) -> FoundModel:
        return self._known.model if self._served is None else self._served.model

    @property
    def _known(self) -> Setup:
        if self._setup is None:
            raise _not_started()
        return self._setup

    @property
    def _ready(self) -> Served:
        if self._served is None:
            raise _not_started()
        return self._served


def _not_started() -> RuntimeStopped:
    return RuntimeStopped("the runtime has not been started: use `async with Runtime(...) as runtime`")
