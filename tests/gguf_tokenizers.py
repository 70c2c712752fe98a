"""Tokenizers as GGUF files hold them: byte-level BPE by every rule of splitting, and SentencePiece."""

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "The capital of Vietnam is",
    "12345 and 7, don't  we'Ll\n\n  x",
    "naïve 日本 émigré 😀 ",
    "  def f(x):\n\treturn x**2 /  3\r\n",
    "<|im_start|>user\nhi<|im_end|> <think> so",
    "",
    " ",
    "HTTPServer iOSApp ǅungla",
]
CORPUS = [*(text * 3 for text in TEXTS), *["12 123 1234 12345 don't we'll server app tokens capital vietnam"] * 20]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern):
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), bytes_])


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
# The pre-tokeniser of the models' own tokenizer.json, by the name that llama.cpp gives it.
PRE = {
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_QWEN),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "gpt-2": _GPT2,
}


def byte_level(rule):
    """A byte-level BPE, trained on the texts, with the rule of that name."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = PRE[rule], decoders.ByteLevel()
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


def sentencepiece():
    """A BPE as SentencePiece makes it, with bytes for what it has no piece for."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, limit_alphabet=60, show_progress=False)
    backend.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    return backend
