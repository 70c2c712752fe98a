"""TextStream: what is shown, piece by piece, is the text in the end."""

import random

import pytest

from cna_kernels.model.text.text_stream import TextStream
from cna_kernels.model.text.tokenizer import Tokenizer
from tiny import SPECIAL, TEXT_VOCABULARY, set_field, write_text_files

FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def with_byte_tokens(directory):
    """As SentencePiece: a token for each byte beside those of the text, and bytes that make no text become U+FFFD."""
    import tokenizers
    from tokenizers import decoders

    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + list("▁ab.é") + ["<unk>"]
    model = tokenizers.models.BPE(
        {piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(SPECIAL)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(directory / "tokenizer.json"))
    return backend.get_vocab_size()


def with_byte_level(directory):
    write_text_files(directory)
    return TEXT_VOCABULARY


def with_clean_up(directory):
    write_text_files(directory)
    set_field(directory, clean_up_tokenization_spaces=True, **{FORCED: True})
    return TEXT_VOCABULARY


@pytest.mark.parametrize("write", [with_byte_tokens, with_byte_level, with_clean_up])
def test_the_pieces_are_the_text(tmp_path, write):
    tokenizer, shown, rng = Tokenizer(tmp_path, write(tmp_path)), {}, random.Random(0)
    stream = TextStream(tokenizer, 3, lambda row, text: shown.setdefault(row, []).append(text))
    often = [number for text in " .\u00e9a<end>" for number in tokenizer.encode_answer(text)]
    rows = [[rng.choice([rng.randrange(tokenizer.vocab_size), *often]) for _ in range(12)] for _ in range(300)]
    for step in range(12):
        for row, ids in enumerate(rows):
            stream(row, ids[step])
    early = sum(map(len, shown.values()))
    stream.finish()
    for row, ids in enumerate(rows):
        assert "".join(shown.get(row + 3, [])) == tokenizer.decode(ids)
    assert (early > 1000) == (not tokenizer.cleans_up), "text is shown as it comes"
