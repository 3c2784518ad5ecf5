"""The byte tokenizer of the bundled model: ids 0..255 are the bytes of UTF-8, special and location tokens follow."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from vlmslice.spatial_schema import LOCATION_TOKENS, add_special_tokens


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one id per byte and no merges, so that every text round-trips unchanged.

    "é<|end|>" becomes `[0xC3, 0xA9, 257]`: two bytes and the end token. A tokenizer with nothing to learn suits a
    model that reads characters off an image: a code, a price and a word in any script are spelled alike.
    """
    vocabulary = {_printable_character(byte): byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", clean_up_tokenization_spaces=False
    )
    add_special_tokens(tokenizer)
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in LOCATION_TOKENS], special_tokens=True
    )
    return tokenizer


def _printable_character(byte: int) -> str:
    """The character by which the ByteLevel alphabet of `tokenizers` (from GPT-2's `bytes_to_unicode`) writes a byte.

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, take the code points from 256 on.
    """
    if byte in _PRINTABLE:
        return chr(byte)
    return chr(256 + sum(other not in _PRINTABLE for other in range(byte)))


_PRINTABLE = frozenset([*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)])
