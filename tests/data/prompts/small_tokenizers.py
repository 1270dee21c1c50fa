"""Small tokenizers of the kinds that chat models have, and what transformers' processors make of a text with images."""

import copy
import json

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vr_jax.data.conversations import IMAGE_TOKEN

CORPUS = [
    "USER: What is this? ASSISTANT: It is a car, seen from the side. USER: Which colour is it? ASSISTANT: Red.",
    "[INST] What is shown in the image? [/INST] The image shows two dogs and a ball. [INST] Where? [/INST]",
    "A chat between a curious user and an artificial intelligence assistant. You are a helpful assistant.",
    "system user assistant Be brief. Describe this image.\nOne word.\n\nAnd now?  Two  spaces.",
] * 4
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MINICPM = ("<image>", "</image>", "<slice>", "</slice>")


def byte_level(specials: tuple[str, ...], *, bos: str | None = None, pad: str, eos: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as Qwen2 and Llama 3 have; with `bos` it stands in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos, clean_up_tokenization_spaces=False
    )


def sentencepiece(kind: str, model: str = "bpe", specials: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer as those of Llama 2, Vicuna and Mistral: spaces are a symbol, and <s> stands in front of every text.

    Args:
        kind: Where a space is put in front: "normalizer" (legacy: a normaliser does it at each piece between special
            tokens), "always" (legacy, the pre-tokeniser does it there), "first" (only where the text begins).
        model: "bpe" with bytes for unknown characters, or "unigram".
        specials: More special tokens.
    """
    names = ("<unk>", "<s>", "</s>")
    if model == "bpe":
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=[*names, *fallback], show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=260, special_tokens=list(names), unk_token="<unk>", show_progress=False
        )
    scheme = "always" if kind == "normalizer" else kind
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.train_from_iterator([line.replace("\n", " ") for line in CORPUS], trainer)
    if model == "bpe":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    if kind == "normalizer":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if model == "bpe":  # Training makes the bytes special; in Llama's tokenizer they are ordinary tokens.
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] in names]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


SENTENCEPIECE = [(kind, model) for kind in ("normalizer", "always", "first") for model in ("bpe", "unigram")]


def of_transformers(tokenizer: PreTrainedTokenizerFast, text: str, image: str = "<image>") -> np.ndarray:
    """The ids that a processor of transformers makes of a rendered text, with IMAGE_TOKEN for its image token.

    Source: transformers `processing_utils.py`, `apply_chat_template`: the tokenizer adds its special tokens unless the
    text begins with its BOS already.
    """
    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken(image, special=True, normalized=False)], special_tokens=True)
    begins = own.bos_token is not None and text.startswith(own.bos_token)
    ids = np.asarray(own(text, add_special_tokens=not begins).input_ids)
    return np.where(ids == own.convert_tokens_to_ids(image), IMAGE_TOKEN, ids)
