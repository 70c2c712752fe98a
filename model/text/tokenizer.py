"""Text to token ids and back: tokenizer.json through ``tokenizers``, chats through the checkpoint's template."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cna_kernels.errors import InputError
from cna_kernels.fields import Fields, is_whole, short
from cna_kernels.files import parse_json, read_json, read_text, sha256

from ..packages import require
from .chat_template import ChatTemplate, find_chat_template

_PROBE = "A probe: 1 + 2 = 3, naïve."


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Attributes:
        bos_id: id of the beginning-of-sequence token, or None.
        adds_bos: whether plain text gets a BOS in front.
        template: the ChatTemplate, or None.
        sha256, template_sha256: hashes of tokenizer.json and of the template's text.
    """

    def __init__(self, directory, vocab_size: int):
        require("tokenizers", "jinja2")
        path = Path(directory) / "tokenizer.json"
        content = read_text(path, limit=256 << 20)
        self._path, self._vocab_size = path, vocab_size
        _refuse_dropout(content, path)
        from tokenizers import Tokenizer as Backend

        self._backend = self._guard(Backend.from_str, content)
        self._backend.no_truncation()
        self._backend.no_padding()
        largest = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= largest < vocab_size:
            raise InputError(path, f"its largest id is {largest}, the model has {vocab_size} vocabulary rows")
        special = _special_tokens(Path(directory) / "tokenizer_config.json")
        self.bos_id = self._backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
        self.eos_id = self._backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
        probe = self._ids(_PROBE, special_tokens=True)
        self.adds_bos = bool(probe) and self.bos_id is not None and probe[0] == self.bos_id
        self.template: ChatTemplate | None = find_chat_template(directory, special)
        self.sha256 = sha256(content)
        self.template_sha256 = sha256(self.template.source) if self.template else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, with exactly one BOS in front if the checkpoint asks for a BOS."""
        return self._single_bos(self._ids(text, special_tokens=True))

    def encode_answer(self, text: str) -> list[int]:
        """Return the ids of text that follows a prompt: no BOS, no other special token in front."""
        return self._ids(text, special_tokens=False)

    def encode_chat(self, user_messages: list[str], *, system: str | None = None, double_bos=False) -> list[list[int]]:
        """Return the ids of one conversation per user message, up to where the assistant's answer begins.

        Args:
            double_bos: tokenise the rendered text as if it were plain text, which puts a second BOS in front for
                Llama; some published code does.
        """
        if self.template is None:
            raise InputError(self._path.parent, "has no chat template; use plain prompts (--no-template)")
        head = [] if system is None else [{"role": "system", "content": system}]
        rendered = self.template.render([[*head, {"role": "user", "content": text}] for text in user_messages])
        if double_bos:
            return [self._ids(text, special_tokens=True) for text in rendered]
        return [self._single_bos(self._ids(text, special_tokens=False)) for text in rendered]

    def first_ids(self, texts: str | Sequence[str], what: str) -> list[int]:
        """Return the first id of an answer, or of each of several answers. ``what`` names them in an error."""
        ids = [self.encode_answer(text)[:1] for text in ([texts] if isinstance(texts, str) else texts)]
        if not ids or not all(ids):
            raise InputError(what, "holds no token")
        return [first for (first,) in ids]

    def decode(self, ids: list[int]) -> str:
        """Return the text of the ids without special tokens."""
        return self._guard(self._backend.decode, ids, skip_special_tokens=True)

    def _ids(self, text, *, special_tokens):
        ids = self._guard(self._backend.encode, text, add_special_tokens=special_tokens).ids
        if max(ids, default=0) >= self._vocab_size:  # a post-processor may add ids that no token has
            raise InputError(self._path, f"gives id {max(ids)}, the model has {self._vocab_size} vocabulary rows")
        return ids

    def _single_bos(self, ids):
        if self.bos_id is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == self.bos_id:
            start += 1
        return [self.bos_id, *ids[start:]] if start or self.adds_bos else ids

    def _guard(self, function, *arguments, **options):
        """Call a function of ``tokenizers``. A hostile file can make its Rust code panic, which raises no Exception."""
        try:
            return function(*arguments, **options)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(self._path, f"tokenizer failed: {detail[:200]}") from None


def _refuse_dropout(content, path):
    """Refuse dropout: with it a text's encoding differs from call to call, and no run could be repeated."""
    model = Fields(parse_json(content, path), path).object("model", None)
    if model is not None and model.record.get("dropout"):
        raise model.error("dropout", f"expected none, got {short(model.record['dropout'])}")


def _special_tokens(path) -> dict[str, str]:
    """Return bos_token, eos_token, pad_token and unk_token as text; files store text or ``{"content": text}``."""
    if not os.path.lexists(path):
        return {}
    fields, tokens = Fields(read_json(path, limit=64 << 20), path), {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        stored = fields.record.get(name)
        if isinstance(stored, dict):
            tokens[name] = fields.object(name).text("content", None)
        else:
            tokens[name] = fields.text(name, None)
    return {name: text for name, text in tokens.items() if text is not None}


def stop_ids(directory, tokenizer: Tokenizer, vocab_size: int) -> frozenset[int]:
    """Return the ids that end an answer: of generation_config.json, else of config.json, else the tokenizer's EOS."""
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        if not os.path.lexists(path):
            continue
        fields = Fields(read_json(path, limit=1 << 20), path)
        value = fields.record.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        for number in ids:
            if not is_whole(number) or not 0 <= number < vocab_size:
                raise fields.error("eos_token_id", f"expected ids below {vocab_size}, got {short(number)}")
        return frozenset(ids)
    return frozenset() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])
