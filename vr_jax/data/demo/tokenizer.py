"""The tokenizer of the demo: bytes, Qwen2's ChatML tokens, and the demo's own words and phrases as whole tokens."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vr_jax.data.demo.images import INKS, WORDS
from vr_jax.data.demo.reading import BEGINNINGS, END, NAMING, NEXT, PLACES, SUFFIX

END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# These are the fixed parts of questions and of ChatML. Whole phrases as tokens keep a conversation short enough for two
# CPU cores. The colours, letters and words that are asked about are tokens of their own, the same ones as in the
# answers.
PHRASES = (
    "You are a helpful assistant.", "system", "user", "assistant",
    "What is the value of the ", " bar?", "Which colour is the tallest bar?",
    "Which colour is the shortest bar?", "How many bars are there?",
    "What is in row ", ", column ",
    "What is the word?", "What colour is the word?",
)  # fmt: skip
# The same for the pages of `vr_jax.data.demo.reading`, whose answers are single letters and digits.
READING_PHRASES = (
    "You are a helpful assistant.", "system", "user", "assistant",
    *sorted(set(BEGINNINGS.values())), END + SUFFIX, *PLACES, NAMING, NEXT,
)  # fmt: skip


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a byte-level tokenizer of about 300 tokens that can spell any text.

    It is the same every time and needs no download. The ids are the 256 bytes, then phrases, colours and words, then
    the three special tokens. As in Qwen2, `<|endoftext|>` is the pad token and `<|im_end|>` ends a message.
    `save_pretrained` writes a directory that `AutoTokenizer` reads.
    """
    return _byte_level((*PHRASES, *INKS, *WORDS))


def reading_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer of the pretrained parts of the demo: that of `demo_tokenizer` with other phrases."""
    return _byte_level(READING_PHRASES)


def _byte_level(pieces: Iterable[str]) -> PreTrainedTokenizerFast:
    """Builds a tokenizer of bytes, whole pieces of text, and Qwen2's special tokens."""
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    specials = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=END_OF_TEXT,
        eos_token=MESSAGE_END,
        additional_special_tokens=[MESSAGE_START],
        clean_up_tokenization_spaces=False,
    )
