"""The vocabulary of the comparison: the classes of the encoder's heads, and the words of the decoder.

The images are those of `vr_jax.data.demo.pages`.
"""

from __future__ import annotations

from vr_jax.data.demo.pages import COLOURS, DIGITS, KINDS, LETTERS, NOTHING, NUMBERS, PLACES

PAD = "<pad>"

# The parts of what a patch shows, which are the classes of the encoder's heads.
PARTS = (PAD, NOTHING, *LETTERS, *DIGITS, *NUMBERS, *COLOURS, *PLACES)
PART = {name: number for number, name in enumerate(PARTS)}

# The decoder's vocabulary. A question names a block ("top left", "centre"), its answer is what is highlighted there.
# Addresses by content (a row and a column, a colour and a tick) were tried: a decoder of this size, trained from
# scratch, learns them without compression, but needs far more steps for tokens that hold several of them.
BLOCKS = tuple(f"block {row},{column}" for row in range(6) for column in range(6))
VOCABULARY = (PAD, *KINDS, *LETTERS, *DIGITS, *BLOCKS)
TOKEN = {name: number for number, name in enumerate(VOCABULARY)}
PROMPT = 2  # Tokens of a question: the kind of the image and a block. The answer is one token.
