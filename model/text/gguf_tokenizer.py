"""The tokenizer, chat template and stop ids of a GGUF file, as ``tokenizer_files`` gives those of other checkpoints.

A GGUF file holds the vocabulary, the merges or scores, what kind each token is, and, for byte-level BPE, the name of
the rule by which a text is split before it is merged (``tokenizer.ggml.pre``). The rules by name are those of
llama.cpp; a name that is not known here is refused, because another rule gives other tokens. From these a
``tokenizer.json`` is built. Two things are the model's own instead of llama.cpp's: Qwen text is brought to NFC first,
and SentencePiece merges go by score, then by length (transformers' ``generate_merges``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from cna_kernels.fields import Fields, is_number, is_whole, short
from cna_kernels.files import FilePath, sha256

from ..checkpoint.gguf_file import read_gguf
from .tokenizer_classes import QWEN2, bpe_parts, llama_parts
from .tokenizer_files import TokenizerFiles, new_backend

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The name of a rule -> the patterns by which text is split, one after the other.
RULES = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (QWEN2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), (GPT2,)),
    "tekken": (_TEKKEN,),
}
# Rules of vocabularies whose whole words go before merges, and that put a BOS in front unless the file says otherwise.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
_LONGEST_PIECE = 512  # characters; SentencePiece makes none of more than 16 unless it is told to
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# A special token, and the start of the field that holds its id.
SPECIAL_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eos", "eot", "eom")
# Control tokens that end an answer in any model, whatever the file names: those of llama.cpp.
END_TEXTS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "</s>", "<EOT>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip
_TEMPLATE = "tokenizer.chat_template"


def read_gguf_tokenizer(path: FilePath, guard: Callable) -> TokenizerFiles | None:
    """Return the tokenizer of a GGUF file; None where it holds none.

    Args:
        guard: calls a function of ``tokenizers`` whose errors shall be InputErrors.

    Raises:
        InputError: a field is malformed, or the tokenizer is of a kind that is not read here.
    """
    gguf = read_gguf(path)
    fields = gguf.metadata
    if "tokenizer.ggml.tokens" not in fields.record:
        return None
    tokens = fields.items("tokenizer.ggml.tokens", lambda x: isinstance(x, str), "text")
    kinds = fields.items("tokenizer.ggml.token_type", is_whole, "a whole number", [_NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise fields.error("tokenizer.ggml.token_type", f"expected {len(tokens)}, one a token, got {len(kinds)}")
    model = fields.one_of("tokenizer.ggml.model", ("gpt2", "llama"))
    content = json.dumps((_byte_level if model == "gpt2" else _sentencepiece)(fields, tokens, kinds))
    special = {}
    for name, key in SPECIAL_IDS.items():
        number = fields.integer(f"tokenizer.ggml.{key}_token_id", (0, len(tokens) - 1), None)
        if number is not None:
            special[name] = tokens[number]
    settings = {"chat_template": _templates(fields)}
    return TokenizerFiles(guard(new_backend, content), special, settings, gguf.path, sha256(content))


def gguf_stop_ids(path: FilePath) -> set[int]:
    """The ids that end an answer: those that the file names, and control tokens that end one in any model."""
    fields = read_gguf(path).metadata
    tokens = fields.record.get("tokenizer.ggml.tokens") or []  # read_gguf_tokenizer has checked both, if there are any
    kinds = (tokens and fields.record.get("tokenizer.ggml.token_type")) or []
    found = {fields.integer(f"tokenizer.ggml.{name}_token_id", (0, 1 << 30), None) for name in _ENDS} - {None}
    texts = {number: text for number, text in enumerate(tokens[: len(kinds)]) if kinds[number] == _CONTROL}
    return found | {number for number, text in texts.items() if text in END_TEXTS}


def _templates(fields: Fields) -> Any:
    """The chat templates by name, or None."""
    found = {name[len(_TEMPLATE) + 1 :] or "default": text for name, text in fields.record.items()
             if name == _TEMPLATE or name.startswith(f"{_TEMPLATE}.")}  # fmt: skip
    for name in found:
        fields.text(_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}")
    return found or None


def _byte_level(fields: Fields, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    rule = fields.one_of("tokenizer.ggml.pre", RULES)
    merges = fields.items("tokenizer.ggml.merges", lambda x: isinstance(x, str) and x.count(" ") == 1, "two tokens")
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in RULES[rule]
    ]
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pairs = [merge.split(" ") for merge in merges]
    return {
        "version": "1.0",
        "added_tokens": _added(tokens, kinds),
        "normalizer": {"type": "NFC"} if RULES[rule] == (QWEN2,) else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, as_bytes]},
        "post_processor": _post_processor(fields, tokens, rule in WHOLE_WORDS),
        "decoder": as_bytes,
        "model": bpe_parts(dict(vocab=_numbered(fields, tokens), merges=pairs))
        | {"ignore_merges": rule in WHOLE_WORDS},
    }


def _sentencepiece(fields: Fields, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    vocab = _numbered(fields, tokens)
    if "tokenizer.ggml.merges" in fields.record:
        stored = fields.items("tokenizer.ggml.merges", lambda x: isinstance(x, str) and x.count(" ") == 1, "two tokens")
        merges = [merge.split(" ") for merge in stored]
    else:
        scores = fields.items("tokenizer.ggml.scores", is_number, "a number")
        if len(scores) != len(tokens):
            raise fields.error("tokenizer.ggml.scores", f"expected {len(tokens)}, one a token, got {len(scores)}")
        for place, token in enumerate(tokens):
            if len(token) > _LONGEST_PIECE:  # all ways to divide it would be tried
                what = f"has {len(token)} characters, more than the {_LONGEST_PIECE} accepted"
                raise fields.error(f"tokenizer.ggml.tokens[{place}]", what)
        merges = _merges(vocab, dict(zip(tokens, scores, strict=True)))
    settings = {"add_prefix_space": fields.boolean("tokenizer.ggml.add_space_prefix", True)}
    unknown = fields.integer("tokenizer.ggml.unknown_token_id", (0, len(tokens) - 1), 0)
    parts = llama_parts(settings, {"vocab": vocab, "merges": merges})
    parts["model"] |= {"unk_token": tokens[unknown]}
    return {
        "version": "1.0",
        "added_tokens": _added(tokens, kinds),
        "post_processor": _post_processor(fields, tokens, True),
        **parts,
    }


def _numbered(fields: Fields, tokens: list[str]) -> dict[str, int]:
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        again = next(token for number, token in enumerate(tokens) if vocab[token] != number)
        raise fields.error("tokenizer.ggml.tokens", f"holds {short(again)} twice")
    return vocab


def _added(tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    """Tokens that stay whole wherever a text holds them: control tokens, which are special, and user-defined ones."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return [
        {"id": number, "content": token, **flags, "special": kind != _USER_DEFINED}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN) and token
    ]


def _post_processor(fields: Fields, tokens: list[str], adds_bos: bool) -> dict[str, Any] | None:
    """What puts BOS and EOS around a text, where the file, or its kind of tokenizer, says so."""
    around = []
    for name, default in (("bos", adds_bos), ("eos", False)):
        number = fields.integer(f"tokenizer.ggml.{name}_token_id", (0, len(tokens) - 1), None)
        wanted = fields.boolean(f"tokenizer.ggml.add_{name}_token", default) and number is not None
        around.append([] if not wanted else [(tokens[number], number)])
    if not any(around):
        return None
    piece = lambda pairs: [{"SpecialToken": {"id": text, "type_id": 0}} for text, _ in pairs]  # noqa: E731
    before, after = map(piece, around)
    sequence = lambda name: {"Sequence": {"id": name, "type_id": 0}}  # noqa: E731
    return {
        "type": "TemplateProcessing",
        "single": [*before, sequence("A"), *after],
        "pair": [*before, sequence("A"), *after, *before, sequence("B"), *after],
        "special_tokens": {
            text: {"id": text, "ids": [number], "tokens": [text]} for side in around for text, number in side
        },
    }


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[list[str]]:
    """The merges that a SentencePiece vocabulary implies: every way to put a piece together from two, best first."""
    found = []
    for piece, score in scores.items():
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        found += [(score, *pair) for pair in sorted(halves, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [[left, right] for _, left, right in found]
