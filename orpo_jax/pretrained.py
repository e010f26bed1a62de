"""A model folder in Hugging Face format, less its weights: config, tokenizer, chat template, stop tokens."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer

from orpo_jax.families import FAMILIES, complete, read_config
from orpo_jax.t5 import EncoderDecoder

# What to fetch of a hub repository: no pickles, no code.
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    folder: pathlib.Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer: Any  # a fast transformers tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a turn: the tokenizer's EOS first, then those of generation_config.json."""
        eos = self.generation_config.get("eos_token_id")
        more = eos if isinstance(eos, list) else [eos]
        return tuple(dict.fromkeys([self.tokenizer.eos_token_id, *(i for i in more if i is not None)]))

    @property
    def decoder_start(self) -> int | None:
        """The id that an encoder-decoder's responses follow; None for a decoder."""
        if FAMILIES[self.config["model_type"]].module is not EncoderDecoder:
            return None
        starts = [some.get("decoder_start_token_id") for some in (self.config, self.generation_config)]
        start = next((start for start in starts if start is not None), None)
        if start is None:
            raise ValueError("config.json: an encoder-decoder needs decoder_start_token_id, got None; T5's is its "
                             "pad_token_id")
        return start

    @property
    def rows_needed(self) -> int:
        """Embedding rows for the tokens added to the tokenizer; 0 where its base vocabulary alone outgrows the model's.

        That one is another model's tokenizer: its ids are checked against the table, which is not grown for them.
        """
        fits = self.tokenizer.vocab_size <= self.config.get("vocab_size", 0)
        return max(self.tokenizer.get_vocab().values()) + 1 if fits else 0

    def save(self, folder: pathlib.Path) -> None:
        """Writes everything but the weights, for a model folder or a run."""
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        if self.generation_config:
            (folder / "generation_config.json").write_text(json.dumps(self.generation_config, indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)


def find_folder(path: str, revision: str | None, files: Sequence[str] = FILES) -> pathlib.Path:
    """Returns the local folder of a path or hub id, fetched if need be; ValueError where there is neither."""
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")):
        raise ValueError(f"model.path: must be a model folder or a hub id, got {path!r}")
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=list(files)))
    except HFValidationError:
        raise ValueError(f"model.path: no such folder, and not a hub id, got {path!r}") from None
    except Exception as error:  # the hub's client raises many kinds, and the network more
        raise ValueError(f"model.path: no such folder, and the hub gave no {path!r}: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def open_pretrained(path: str, revision: str | None = None, chat_template: str | None = None) -> Pretrained:
    """Returns what a model folder says of itself; ValueError names the file, or the setting, that breaks a rule.

    chat_template: text or a file that takes the place of the tokenizer's own.
    """
    folder = find_folder(path, revision)
    config = read_config(folder)
    complete(config)  # first: a wrong field would surface as an error of the tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizer files break in many ways
        raise ValueError(f"{folder}: the tokenizer can't be read: {_in_one_line(error)}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: needs a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer must have an eos_token, got None; set it in tokenizer_config.json")
    if chat_template is not None:
        file = pathlib.Path(chat_template)
        is_text = "{" in chat_template or "\n" in chat_template
        if not is_text and not file.is_file():
            raise ValueError(f"data.chat_template: must be a Jinja template or a file that holds one, "
                             f"got {chat_template!r}")
        tokenizer.chat_template = chat_template if is_text else file.read_text()
    generation = folder / "generation_config.json"
    try:
        generation_config = json.loads(generation.read_text()) if generation.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{generation}: must be JSON, got {error}") from None
    return Pretrained(folder, config, generation_config, tokenizer)
