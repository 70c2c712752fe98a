"""The files of a tokenizer as one view: what transformers makes of them.

``tokenizer.json`` is one of up to four files that say what the tokens of a checkpoint are. ``tokenizer_config.json``,
``special_tokens_map.json`` and ``added_tokens.json`` add tokens, name the special ones, and choose a class; and three
classes build normaliser, pre-tokeniser and decoder themselves, from the vocabulary of ``tokenizer.json`` alone. The
rules are those of transformers 5 (``AutoTokenizer.from_pretrained``), in the same order, because a token's id may
depend on the order in which tokens are added.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cna_kernels.errors import InputError
from cna_kernels.fields import Fields, is_whole, short
from cna_kernels.files import parse_json, read_json, read_text, sha256

from .tokenizer_classes import BUILDERS

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

JSON, SETTINGS, MAP, ADDED = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# What a tokenizer may be stored as where there is no tokenizer.json.
OTHERS = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "spiece.model")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LARGEST = 256 << 20  # bytes of a file
# Classes that take tokenizer.json as it is; other classes of transformers may build their own tokenizer.
_AS_IT_IS = (None, "TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "BloomTokenizer")


@dataclass
class TokenizerFiles:
    """What the files of a tokenizer say together.

    Attributes:
        backend: the ``tokenizers.Tokenizer``.
        special: the named special tokens: "bos_token" -> text. Chat templates may use these and other names.
        settings: ``tokenizer_config.json``, or an empty object.
        path: the file that errors name.
        sha256: a hash of ``tokenizer.json``, and of what the other files change in it.
        notes: what a user should hear, a line each.
    """

    backend: Backend
    special: dict[str, str]
    settings: dict[str, Any]
    path: Path
    sha256: str
    notes: list[str] = field(default_factory=list)


def read_tokenizer_files(directory, model_type: str, guard: Callable) -> TokenizerFiles | None:
    """Return the tokenizer of a checkpoint; None where the directory holds none.

    Args:
        model_type: of config.json.
        guard: calls a function of ``tokenizers`` whose errors shall be InputErrors.

    Raises:
        InputError: a file is malformed, or the tokenizer is stored in a way that only transformers reads.
    """
    directory = Path(directory)
    path, settings = directory / JSON, _settings(directory)
    if not os.path.lexists(path):
        others = [name for name in OTHERS if os.path.lexists(directory / name)]
        return _converted(directory, others[0], settings, guard) if others else None
    content = read_text(path, limit=_LARGEST)
    record = Fields(parse_json(content, path), path)
    _refuse_dropout(record)
    kind = _kind(settings, directory, model_type, content)
    if kind is not None and kind not in (*_AS_IT_IS, *BUILDERS):
        return _converted(directory, kind, settings, guard)
    tokens = _Tokens(settings, directory, record)
    notes, built, rebuilt = [], content, False
    if kind in BUILDERS:
        model = record.object("model")
        if model.record.get("type", "BPE") != "BPE":
            raise model.error("type", f"expected BPE for tokenizer_class {kind}, got {short(model.record['type'])}")
        defaults, change = BUILDERS[kind]
        tokens.named = {**defaults, **tokens.named}
        parts = change(settings, model.record)
        built = json.dumps({**record.record, **parts, "added_tokens": []})
        rebuilt = any(_essence(parts[name]) != _essence(record.record.get(name)) for name in parts)
        if rebuilt and kind != "LlamaTokenizer":  # a Llama file spells the same rules in several ways
            notes.append(f"{path}: its rules give way to those of tokenizer_class {kind}, as in transformers")
    backend = guard(new_backend, built)
    guard(tokens.add_to, backend)
    if kind == "Qwen2Tokenizer":
        guard(tokens.mark_special, backend)
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    same = not rebuilt and not tokens.brings_new(record.record)
    digest = sha256(content) if same else sha256(content, str(kind), repr(tokens.facts()))
    return TokenizerFiles(backend, tokens.texts(), settings, path, digest, notes)


def new_backend(content: str) -> Backend:
    """A ``tokenizers.Tokenizer`` of the content of a tokenizer.json."""
    from tokenizers import Tokenizer as Backend

    return Backend.from_str(content)


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / SETTINGS
    return dict(Fields(read_json(path, limit=64 << 20), path).record) if os.path.lexists(path) else {}


def _kind(settings, directory: Path, model_type: str, content: str) -> str | None:
    """The class of transformers that reads the tokenizer, without "Fast"; None: tokenizer.json as it is."""
    where = Fields(settings, directory / SETTINGS)
    declared = where.text("tokenizer_class", None)
    config = directory / "config.json"
    if declared is None and os.path.lexists(config):
        declared = Fields(read_json(config, limit=1 << 20), config).text("tokenizer_class", None)
    kind = declared.removesuffix("Fast") if declared not in (None, "PreTrainedTokenizerFast") else declared
    if model_type == "mistral":
        return None
    if kind == "LlamaTokenizer" and model_type != "qwen2" and '"ByteLevel"' in content:
        return None
    if model_type == "qwen2" or (model_type == "qwen3" and declared is None):
        return "Qwen2Tokenizer"
    return kind


def _refuse_dropout(record: Fields):
    """Refuse dropout: with it a text's encoding differs from call to call, and no run could be repeated."""
    model = record.object("model", None)
    if model is not None and model.record.get("dropout"):
        raise model.error("dropout", f"expected none, got {short(model.record['dropout'])}")


class _Tokens:
    """The special and added tokens of all files.

    ``named`` has the special tokens by name, ``extra`` the special ones without a name, ``added`` those with an id.
    """

    def __init__(self, settings: dict[str, Any], directory: Path, tokenizer: Fields):
        self._where = Fields(settings, directory / SETTINGS)
        named = {name: value for name, value in settings.items() if name.endswith("_token")}
        named = {name: value for name, value in named.items() if name in NAMED or isinstance(value, (str, dict))}
        extra = _Extra(settings)
        named |= extra.by_name
        specific = self._where.object("model_specific_special_tokens", None)
        if specific is not None and all(name in NAMED for name in named):  # else transformers forgets them
            named |= specific.record
        self.added: dict[int, AddedToken] = {}
        by_text: dict[str, AddedToken] = {}

        def add(number: Any, token: AddedToken, where: Fields):
            try:
                number = int(number)
            except (TypeError, ValueError):
                raise where.error("id", f"expected a token's id, got {short(number)}") from None
            self.added[number] = by_text[token.content] = token

        if settings.get("added_tokens_decoder") is not None:
            decoder = self._where.object("added_tokens_decoder")
            for number, stored in decoder.record.items():
                add(number, _added_token(stored, decoder, number), decoder)
        else:
            path = directory / MAP
            if os.path.lexists(path):
                mapped = Fields(read_json(path, limit=64 << 20), path).record
                extra.merge(mapped)
                named |= extra.by_name
                named |= {name: _special(value) for name, value in mapped.items() if name.endswith("_token")}
            path = directory / ADDED
            if os.path.lexists(path):
                special = {_text(value) for value in (*named.values(), *(extra.extra or ()))}
                file = Fields(read_json(path, limit=64 << 20), path)
                for text, number in file.record.items():
                    if not is_whole(number) or number < 0:
                        raise file.error(repr(text), f"expected a token's id, got {short(number)}")
                    is_special = text in special
                    stored = dict(content=text, special=is_special, normalized=not is_special)
                    add(number, _added_token(stored, file, text), file)
            for place, stored in enumerate(tokenizer.record.get("added_tokens") or []):
                where = f"added_tokens[{place}]"
                add(stored.get("id") if isinstance(stored, dict) else None,
                    _added_token(stored, tokenizer, where), tokenizer)  # fmt: skip
        self.extra = [_added_or_text(value, self._where, "additional_special_tokens") for value in extra.tokens()]
        self.named: dict[str, Any] = {}
        for name, value in named.items():
            token = None if value is None else _added_or_text(value, self._where, name)
            self.named[name] = by_text.get(_text(token), token) if name in NAMED and token is not None else token

    def add_to(self, backend: Backend):
        """Add to the backend what it lacks: tokens with an id in the order of ids, then named ones, then the others."""
        from tokenizers import AddedToken

        tokens: list[Any] = [token for _, token in sorted(self.added.items())]
        known = {token.content for token in backend.get_added_tokens_decoder().values()} | set(map(_text, tokens))
        for token in (*self._in_order(), *self.extra):
            # A token that is named twice with other flags is added twice: the later flags count.
            if _text(token) not in known and token not in tokens:
                tokens.append(token)
        names = {_text(token) for token in self.named.values() if token}
        for place, token in enumerate(tokens):
            if isinstance(token, str):
                tokens[place] = AddedToken(token, special=True)
            elif not token.special and token.content in names:
                token.special = True
        backend.add_tokens(tokens)

    def _in_order(self) -> list[Any]:
        """The named tokens in the order in which transformers adds them."""
        names = [*NAMED, *(name for name in self.named if name not in NAMED)]
        return [token for name in names if (token := self.named.get(name)) is not None]

    def mark_special(self, backend: Backend):
        from tokenizers import AddedToken

        texts = dict.fromkeys(map(_text, (*self._in_order(), *self.extra)))
        backend.add_tokens([AddedToken(text, special=True) for text in texts])

    def texts(self) -> dict[str, str]:
        return {name: _text(token) for name, token in self.named.items() if token is not None}

    def brings_new(self, record: dict[str, Any]) -> bool:
        """Whether a token is not in tokenizer.json's own list of added tokens, or is there with other flags."""
        flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        own = {tuple(token.get(flag) for flag in flags) for token in record.get("added_tokens") or []}
        texts = {token[0] for token in own}
        added = {tuple(getattr(token, flag) for flag in flags) for token in self.added.values()}
        return not added <= own or any(_text(t) not in texts for t in (*filter(None, self.named.values()), *self.extra))

    def facts(self) -> list[Any]:
        """What the tokens are, for a hash."""
        numbered = [(number, _token_facts(token)) for number, token in sorted(self.added.items())]
        named = [(name, _token_facts(token)) for name, token in sorted(self.named.items()) if token]
        return [numbered, named, list(map(_token_facts, self.extra))]


class _Extra:
    """Special tokens without a name, which files list under two keys; one of them may hold named tokens instead."""

    def __init__(self, settings: dict[str, Any]):
        self.extra, self._additional = settings.get("extra_special_tokens"), settings.get("additional_special_tokens")
        self.by_name: dict[str, Any] = {}
        if self._additional is not None and not self.extra:
            self.extra, self._additional = self._additional, None
        self._take_names()

    def merge(self, mapped: dict[str, Any]) -> None:
        """Take what special_tokens_map.json lists."""
        if "additional_special_tokens" in mapped:
            self._additional = mapped["additional_special_tokens"]
        listed = mapped.get("extra_special_tokens")
        if isinstance(listed, list):
            before = list(self.extra or [])
            listed = [*before, *(_special(token) for token in listed if token not in before)]
        self.extra = listed if "extra_special_tokens" in mapped else self.extra
        self._take_names()

    def _take_names(self) -> None:
        if isinstance(self.extra, dict):
            self.by_name |= self.extra
            self.extra = None

    def tokens(self) -> list[Any]:
        found = self._additional if self.extra is None else self.extra
        return found if isinstance(found, list) else []


def _token_facts(token) -> tuple:
    if isinstance(token, str):
        return (token,)
    return token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special


def _text(token: Any) -> Any:
    """The text of a token in any of the ways in which files and ``tokenizers`` hold one."""
    return token.get("content") if isinstance(token, dict) else getattr(token, "content", token)


def _special(value: Any) -> Any:
    """An entry of special_tokens_map.json: its tokens are special, whatever the entry says."""
    return {**value, "special": True} if isinstance(value, dict) else value


def _added_or_text(value: Any, where: Fields, name: str) -> Any:
    from tokenizers import AddedToken

    if isinstance(value, (str, AddedToken)):
        return value
    return _added_token(value, where, name)


def _added_token(stored: Any, where: Fields, name: str) -> AddedToken:
    from tokenizers import AddedToken

    if not isinstance(stored, dict) or not isinstance(stored.get("content"), str):
        raise where.error(name, f"expected a token's text, got {short(stored)}")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    given = {flag: stored[flag] for flag in flags if flag in stored}
    for flag, value in given.items():
        if not isinstance(value, bool):
            raise where.error(f"{name}.{flag}", f"expected true or false, got {short(value)}")
    return AddedToken(stored["content"], **given)


def _essence(part: Any) -> Any:
    """A part of tokenizer.json without what changes no token: an empty prefix is none, offsets are not asked for."""
    if isinstance(part, list):
        return [_essence(value) for value in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "BPE":  # vocab and merges are kept as they are
        part = {name: value for name, value in part.items() if name not in ("vocab", "merges")}
    if part.get("type") == "ByteLevel" and "use_regex" not in part:
        part = {**part, "use_regex": True}
    return {name: _essence(value) for name, value in part.items() if value not in (None, False, "")
            and name != "trim_offsets"}  # fmt: skip


def _converted(directory: Path, what: str, settings: dict[str, Any], guard: Callable) -> TokenizerFiles:
    """Let transformers build the tokenizer, for files and classes that only it reads."""
    where = directory / (what if what in OTHERS else SETTINGS)
    reads = f"only transformers reads {what!r}"
    out = f"{reads}: pip install transformers sentencepiece, or write a tokenizer.json once with save_pretrained"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError(where, out) from None
    try:
        found = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        content = found.backend_tokenizer.to_str()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises errors of many kinds, and tokenizers may panic
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(where, f"{out} ({detail[:160]})") from None
    special = {name: str(text) for name, text in found.special_tokens_map.items() if isinstance(text, str)}
    backend = guard(new_backend, content)
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    return TokenizerFiles(backend, special, settings, where, sha256(content))
