"""Text to token ids and back, and chats through the checkpoint's template."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cna_kernels.errors import InputError
from cna_kernels.fields import Fields, is_whole, short
from cna_kernels.files import read_json, sha256

from ..checkpoint.gguf_file import is_gguf
from ..packages import require
from .chat_template import ChatTemplate, find_chat_template
from .gguf_tokenizer import gguf_stop_ids, read_gguf_tokenizer
from .tokenizer_files import JSON, OTHERS, read_tokenizer_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

CLEANED = (  # what ``clean_up_tokenization_spaces`` stands for, in transformers' order
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)
_SPACES = "\u0120\u2581 "  # how vocabularies spell a space
_PROBE = "A probe: 1 + 2 = 3, naïve."


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Ids and text are those of transformers' ``AutoTokenizer``.

    A checkpoint may hold no tokenizer. Then whatever needs one is refused, and token ids work as ever.

    Attributes:
        vocab_size: rows of the model's embedding.
        bos_id, eos_id: ids of the tokens that begin and end a sequence, or None.
        adds_bos: whether plain text gets a BOS in front.
        special_texts: the texts of the special tokens.
        cleans_up: whether decoded text is cleaned up, see ``CLEANED``.
        template: the ChatTemplate, or None.
        sha256, template_sha256: hashes of the tokenizer and of the template's text, or None.
        notes: what a user should hear about the files, a line each.
    """

    def __init__(self, directory, vocab_size: int):
        require("tokenizers", "jinja2")
        self.directory, self.vocab_size = Path(directory), vocab_size
        self._path = self.directory / JSON
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.adds_bos = False
        self.cleans_up = False
        self.notes: list[str] = []
        self.special_texts: tuple[str, ...] = ()
        self.template: ChatTemplate | None = None
        self.sha256: str | None = None
        self.template_sha256: str | None = None
        if is_gguf(directory):
            files = read_gguf_tokenizer(directory, self.guard)
        else:
            files = read_tokenizer_files(self.directory, _model_type(self.directory), self.guard)
        self._backend: Backend | None = None
        if files is None:
            return
        backend = self._backend = files.backend
        self._path, self.sha256, self.notes = files.path, files.sha256, files.notes
        backend.no_truncation()
        backend.no_padding()
        if "bos_token" in files.special:
            self.bos_id = backend.token_to_id(files.special["bos_token"])
        if "eos_token" in files.special:
            self.eos_id = backend.token_to_id(files.special["eos_token"])
        forced = files.settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        may_clean = type(backend.model).__name__ != "BPE" or bool(forced)
        self.cleans_up = may_clean and bool(files.settings.get("clean_up_tokenization_spaces"))
        probe = self.guard(backend.encode, _PROBE).ids  # a hostile file may fail only when it is used
        self.adds_bos = bool(probe) and self.bos_id is not None and probe[0] == self.bos_id
        added = backend.get_added_tokens_decoder().values()
        self.special_texts = tuple(sorted(token.content for token in added if token.special))
        self.template = find_chat_template(directory, files.settings, files.special)
        self.template_sha256 = sha256(self.template.source) if self.template else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, with a BOS in front if the tokenizer puts one there."""
        return self._ids(text, special_tokens=True)

    def encode_answer(self, text: str) -> list[int]:
        """Return the ids of text that follows a prompt: no BOS, no other special token in front."""
        return self._ids(text, special_tokens=False)

    def encode_chat(
        self,
        user_messages: Sequence[str],
        *,
        system: str | None = None,
        double_bos: bool = False,
        template_args: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """Return the ids of one conversation per user message, up to where the assistant's answer begins.

        Args:
            system: the system message, or None.
            double_bos: tokenise the rendered text as if it were plain text, which puts a second BOS in front for
                Llama; some published code does.
            template_args: variables of the template, as ``{"enable_thinking": False}``.
        """
        head = [] if system is None else [{"role": "system", "content": system}]
        chats = [[*head, {"role": "user", "content": text}] for text in user_messages]
        return self.encode_messages(chats, double_bos=double_bos, template_args=template_args)

    def encode_messages(
        self,
        chats: Sequence[Sequence[Mapping[str, Any]]],
        *,
        double_bos: bool = False,
        template_args: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """Return the ids of conversations, each a list of ``{"role", "content"}``, up to the assistant's next answer.

        The text that the template gives is tokenised as it is: whether a BOS stands in front is the template's matter.
        """
        return [
            self.encode_rendered(text, double_bos=double_bos) for text in self.each(chats, template_args=template_args)
        ]

    def encode_rendered(self, text: str, *, double_bos: bool = False) -> list[int]:
        """Return the ids of a text that the template gave; ``double_bos`` as in :meth:`encode_chat`."""
        return self._ids(text, special_tokens=double_bos)

    def each(
        self, chats: Sequence[Sequence[Mapping[str, Any]]], *, template_args: Mapping[str, Any] | None = None
    ) -> Iterator[str]:
        """Yield the text of each conversation as the checkpoint's template gives it."""
        if self.template is None:
            raise InputError(self.directory, "has no chat template; use plain prompts (--no-template)")
        return self.template.each(chats, template_args)

    def first_ids(self, texts: str | Sequence[str], what: str) -> list[int]:
        """Return the first id of an answer, or of each of several answers. ``what`` names them in an error.

        An answer whose first token is a space alone, as that of " 1949" in many vocabularies, is an error: every other
        number begins with the same token.
        """
        texts = [texts] if isinstance(texts, str) else texts
        ids = [self.encode_answer(text)[:1] for text in texts]
        if not ids or not all(ids):
            raise InputError(what, "holds no token")
        for text, (first,) in zip(texts, ids, strict=True):
            if text.strip() and not (self.token(first) or "x").strip(_SPACES):
                advice = "leave the space out, and end the prompt with it"
                raise InputError(what, f"{short(text)} begins with a token that is a space alone: {advice}")
        return [first for (first,) in ids]

    def token(self, number: int) -> str | None:
        """Return the text of a token as the vocabulary spells it; None for an id that no token has."""
        return None if self._backend is None else self._backend.id_to_token(number)

    def decode(self, ids: Sequence[int], *, keep: Collection[str] = ()) -> str:
        """Return the text of the ids without special tokens, but for those whose text is in ``keep``."""
        kept = {self._there().token_to_id(text): text for text in keep if text in self.special_texts}
        places = [place for place, number in enumerate(ids) if number in kept]
        pieces, start = [], 0
        for place in places:
            pieces += [self._decode(ids[start:place]), kept[ids[place]]]
            start = place + 1
        return "".join([*pieces, self._decode(ids[start:])])

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.guard(self._there().decode, list(ids), skip_special_tokens=True)
        for before, after in CLEANED if self.cleans_up else ():
            text = text.replace(before, after)
        return text

    def _there(self):
        """The backend; an InputError where the checkpoint has no tokenizer."""
        if self._backend is None:
            what = f"holds no tokenizer ({JSON}, or {', '.join(OTHERS)}); it works with token ids alone"
            raise InputError(self.directory, what)
        return self._backend

    def _ids(self, text, *, special_tokens):
        ids = self.guard(self._there().encode, text, add_special_tokens=special_tokens).ids
        if max(ids, default=0) >= self.vocab_size:  # a token that was added without a row of the embedding
            number = max(ids)
            token = self._there().id_to_token(number)
            what = f"the text holds {short(token)}, whose id {number} is beyond the model's {self.vocab_size} rows"
            raise InputError(self._path, what)
        return ids

    def guard(self, function, *arguments, **options):
        """Call a function of ``tokenizers``. A hostile file can make its Rust code panic, which raises no Exception."""
        try:
            return function(*arguments, **options)
        except (KeyboardInterrupt, SystemExit, InputError):
            raise
        except BaseException as error:
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(self._path, f"tokenizer failed: {detail[:200]}") from None


def _model_type(directory: Path) -> str:
    path = directory / "config.json"
    return Fields(read_json(path, limit=1 << 20), path).text("model_type", "") if os.path.lexists(path) else ""


def stop_ids(directory, tokenizer: Tokenizer, vocab_size: int) -> frozenset[int]:
    """Return the ids that end an answer: of generation_config.json, or else of config.json, and the tokenizer's EOS.

    A model that was trained further often ends its answers with a token that only one of the files names.
    """
    found: set[int] = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    if is_gguf(directory):
        found |= gguf_stop_ids(directory)
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        if not os.path.lexists(path):
            continue
        fields = Fields(read_json(path, limit=1 << 20), path)
        text = fields.record.get("text_config")  # of a model that sees pictures, too
        value = fields.record.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        for number in ids:
            if not is_whole(number) or number < 0:
                raise fields.error("eos_token_id", f"expected ids, got {short(number)}")
        found |= set(ids)
        break
    return frozenset(number for number in found if number < vocab_size)  # no answer holds an id beyond the vocabulary
