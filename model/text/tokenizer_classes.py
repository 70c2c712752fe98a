"""Classes of transformers that build their own tokenizer: from a vocabulary, the parts of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def bpe_parts(model: dict[str, Any], **flags: Any) -> dict[str, Any]:
    """The field ``model``: BPE with the vocabulary and merges of ``model``."""
    plain: dict[str, Any] = dict(unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None)
    plain |= dict(fuse_unk=False, byte_fallback=False)
    kept = dict(vocab=model.get("vocab"), merges=model.get("merges", []))
    return {"type": "BPE", "dropout": None, **plain, **flags, **kept, "ignore_merges": False}


def llama_parts(settings: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """LlamaTokenizer: SentencePiece's space in front of a text, by ``add_prefix_space`` and ``legacy``."""
    prefix = settings.get("add_prefix_space") is None or bool(settings["add_prefix_space"])
    scheme = "never" if not prefix else "always" if settings.get("legacy") else "first"
    decoder: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    decoder += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "model": bpe_parts(model, fuse_unk=True, byte_fallback=True),
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoder},
    }


_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
# The pattern is part of the format: another one gives other tokens.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen2_parts(settings: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
    as_bytes = {**_BYTES, "add_prefix_space": bool(settings.get("add_prefix_space")), "use_regex": False}
    return {
        "model": bpe_parts(model, continuing_subword_prefix="", end_of_word_suffix=""),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
        "decoder": _BYTES,
    }


def gpt2_parts(settings: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": bpe_parts(model, continuing_subword_prefix="", end_of_word_suffix=""),
        "normalizer": None,
        "pre_tokenizer": {**_BYTES, "add_prefix_space": bool(settings.get("add_prefix_space"))},
        "decoder": _BYTES,
    }


_END = "<|endoftext|>"
# Class -> (its special tokens unless a file names others, what it puts in the place of tokenizer.json's parts).
BUILDERS: dict[Any, tuple[dict[str, str], Callable]] = {
    "LlamaTokenizer": (dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>"), llama_parts),
    "Qwen2Tokenizer": (dict(unk_token=_END, eos_token=_END, pad_token=_END), qwen2_parts),
    "GPT2Tokenizer": (dict(unk_token=_END, bos_token=_END, eos_token=_END), gpt2_parts),
}
