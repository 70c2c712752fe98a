"""A tokenizer as the fields of a GGUF file: what ``gguf_tokenizer`` reads back as the same tokenizer.

Only byte-level BPE is written, and only where every part of it has its place in GGUF: the rule by which text is split
must be one that llama.cpp has a name for. Anything else is refused by file and field.
"""

from __future__ import annotations

import json
from typing import Any

from cna_kernels.errors import InputError
from cna_kernels.fields import Fields, short
from cna_kernels.files import FilePath

from .gguf_tokenizer import END_TEXTS, GPT2, RULES, SPECIAL_IDS, WHOLE_WORDS, read_gguf_tokenizer
from .tokenizer import Tokenizer
from .tokenizer_classes import QWEN2
from .tokenizer_files import SETTINGS, TokenizerFiles, read_tokenizer_files

Value = tuple[Any, int, int | None]  # the value, its type in the file, and for an array that of its items
INT32, UINT32, FLOAT32, BOOL, TEXT, ARRAY = 5, 4, 6, 7, 8, 9
HOW = "llama.cpp's convert_hf_to_gguf.py makes a GGUF file"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_PROBES = (
    "The capital of Vietnam is", "12345 and 7, don't  we'Ll\n\n  x", "naïve 日本 émigré 😀 ", "e\u0301 ﬁ Ⅷ ²",
    "  def f(x):\n\treturn x**2 /  3\r\n", "", " ", "HTTPServer iOSApp ǅungla", "a\u200db\u00a0c\u3000d…",
)  # fmt: skip


def tokenizer_fields(tokenizer: Tokenizer, model_type: str, stops: frozenset[int]) -> dict[str, Value]:
    """The fields that hold the tokenizer, chat template and stop ids of a directory in Hugging Face layout.

    Args:
        stops: the ids that end an answer.

    Raises:
        InputError: naming the file and the field that GGUF, or its reader here, has no place for.
    """
    files = _files(tokenizer, model_type)
    if files is None:
        return {"tokenizer.ggml.model": ("none", TEXT, None)}
    settings = Fields(files.settings, tokenizer.directory / SETTINGS)
    if files.backend.encode_special_tokens:
        raise settings.error("split_special_tokens", f"has no place in GGUF; {HOW}")
    if tokenizer.cleans_up:
        raise settings.error("clean_up_tokenization_spaces", f"has no place in GGUF; {HOW}")
    record = Fields(json.loads(files.backend.to_str()), files.path)
    rule = _rule(record)
    tokens, kinds = _tokens(record, tokenizer.vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in record.object("model").record["merges"]]
    if not merges:
        raise record.error("model.merges", f"is empty, which the package gguf does not write; {HOW}")
    fields: dict[str, Value] = {
        "tokenizer.ggml.model": ("gpt2", TEXT, None),
        "tokenizer.ggml.pre": (rule, TEXT, None),
        "tokenizer.ggml.tokens": (tokens, ARRAY, TEXT),
        "tokenizer.ggml.token_type": (kinds, ARRAY, INT32),
        "tokenizer.ggml.merges": (merges, ARRAY, TEXT),
    }
    ids = {name: number for name, text in files.special.items()
           if (number := files.backend.token_to_id(text)) is not None}  # fmt: skip
    for name, key in SPECIAL_IDS.items():
        if name in ids:
            fields[f"tokenizer.ggml.{key}_token_id"] = (ids[name], UINT32, None)
    before, after = _around(tokenizer, files.backend, record)
    for name, found in (("bos", before), ("eos", after)):
        if found not in ([], [ids.get(f"{name}_token")]):
            raise record.error("post_processor", f"puts {found} around a text, not the {name.upper()} token; {HOW}")
        fields[f"tokenizer.ggml.add_{name}_token"] = (bool(found), BOOL, None)
    known = {
        n for n, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _CONTROL and text in END_TEXTS
    }
    further = sorted(stops - known - {ids.get("eos_token")})
    if len(further) > 2:
        where = tokenizer.directory / "generation_config.json"
        raise InputError(f"{where}: eos_token_id", f"GGUF has no place for {short(further)}; {HOW}")
    for name, number in zip(("eot", "eom"), further, strict=False):
        fields[f"tokenizer.ggml.{name}_token_id"] = (number, UINT32, None)
    if tokenizer.template is not None:
        source = tokenizer.template.source
        for name in sorted(files.special.keys() - SPECIAL_IDS.keys()):
            if name in source:
                raise settings.error(name, f"is named by the chat template, and has no place in GGUF; {HOW}")
        fields["tokenizer.chat_template"] = (source, TEXT, None)
    return fields


def require_same_tokenizer(tokenizer: Tokenizer, model_type: str, path: FilePath) -> None:
    """Raise InputError unless the tokenizer of a GGUF file gives a few texts the directory's ids."""
    there = _files(tokenizer, model_type)
    here = read_gguf_tokenizer(path, tokenizer.guard)
    if there is None or here is None:
        assert there is here, "a tokenizer is written where there is one"
        return
    known = {name: text for name, text in there.special.items() if there.backend.token_to_id(text) is not None}
    if any(here.special.get(name) != known.get(name) for name in SPECIAL_IDS):
        raise InputError(there.path, f"its special tokens are read as others from GGUF; {HOW}")
    special = sorted(token.content for token in there.backend.get_added_tokens_decoder().values())
    for text in (*_PROBES, *(f"a {token}b {token} c" for token in special[:1000])):
        for adds in (True, False):
            backends = there.backend, here.backend
            one, two = (tokenizer.guard(backend.encode, text, add_special_tokens=adds).ids for backend in backends)
            texts = [tokenizer.guard(backend.decode, one, skip_special_tokens=False) for backend in backends]
            if one != two or texts[0] != texts[1]:
                raise InputError(there.path, f"gives {short(text)} other ids than its GGUF form; {HOW}")


def _files(tokenizer: Tokenizer, model_type: str) -> TokenizerFiles | None:
    files = read_tokenizer_files(tokenizer.directory, model_type, tokenizer.guard)
    if files is not None:
        files.backend.no_truncation()
        files.backend.no_padding()
    return files


def _rule(record: Fields) -> str:
    """llama.cpp's name of the rule by which text is split before it is merged."""
    model = record.object("model")
    for name, accepted in (
        ("type", ("BPE",)), ("dropout", (None, 0.0)), ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")), ("byte_fallback", (None, False)),
    ):  # fmt: skip
        if model.record.get(name) not in accepted:
            raise model.error(name, f"is {short(model.record.get(name))}: only byte-level BPE is written; {HOW}")
    normalizer, decoder = record.record.get("normalizer"), record.record.get("decoder")
    if normalizer not in (None, {"type": "NFC"}):
        raise record.error("normalizer", f"has no name in GGUF, got {short(normalizer)}; {HOW}")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise record.error("decoder", f"is not ByteLevel: only byte-level BPE is written; {HOW}")
    patterns = _patterns(record.record.get("pre_tokenizer"))
    whole = bool(model.record.get("ignore_merges"))
    for name, found in RULES.items():
        nfc = found == (QWEN2,)
        if found == patterns and nfc == (normalizer is not None) and (name in WHOLE_WORDS) == whole:
            return name
    raise record.error(
        "pre_tokenizer", f"with its normalizer and ignore_merges has no name in GGUF that is known; {HOW}"
    )


def _patterns(part: Any) -> tuple[str, ...] | None:
    """The patterns by which a pre-tokenizer splits text before its bytes become characters; None where it does more."""
    steps = part.get("pretokenizers") if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    if not steps or not all(isinstance(step, dict) for step in steps) or steps[-1].get("type") != "ByteLevel":
        return None
    found: list[str] = []
    for step in steps[:-1]:
        pattern = step.get("pattern") or {}
        if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            found.append(pattern.get("Regex", ""))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            found.append(r"\p{N}")
        else:
            return None
    last = steps[-1]
    if last.get("add_prefix_space", True):
        return None
    return (*found, GPT2) if last.get("use_regex", True) else tuple(found)


def _tokens(record: Fields, rows: int) -> tuple[list[str], list[int]]:
    """The text and the kind of each of ``rows`` tokens; ids that no token has are padded, as llama.cpp does."""
    texts: dict[int, str] = {number: text for text, number in record.object("model").object("vocab").record.items()}
    kinds = dict.fromkeys(texts, _NORMAL)
    normalizer = record.record.get("normalizer")
    for place, token in enumerate(record.record.get("added_tokens") or []):
        for flag in ("single_word", "lstrip", "rstrip", *(["normalized"] if normalizer is not None else [])):
            if token.get(flag):
                raise record.error(f"added_tokens[{place}].{flag}", f"has no place in GGUF; {HOW}")
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    if max(texts, default=0) >= rows:
        raise record.error("model.vocab", f"holds the id {max(texts)}, beyond the model's {rows} rows; {HOW}")
    return [texts.get(n, f"[PAD{n}]") for n in range(rows)], [kinds.get(n, _UNUSED) for n in range(rows)]


def _around(tokenizer: Tokenizer, backend: Any, record: Fields) -> tuple[list[int], list[int]]:
    """The ids that come before and after those of a text."""
    inner, whole = (tokenizer.guard(backend.encode, "a b", add_special_tokens=adds).ids for adds in (False, True))
    for first in range(len(whole) - len(inner) + 1):
        if whole[first : first + len(inner)] == inner:
            return whole[:first], whole[first + len(inner) :]
    raise record.error("post_processor", f"changes the ids of a text; {HOW}")
