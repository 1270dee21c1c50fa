"""The tokenizer of a run is that of the decoder, whatever the order of the directories."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from tests.data.prompts.small_tokenizers import sentencepiece
from tests.training.tiny import tiny_config
from vr_jax.errors import ConfigError, UserError
from vr_jax.model_directory import save_params
from vr_jax.settings import TrainConfig
from vr_jax.training import inputs
from vr_jax.training.inputs import tokenizer_directory


@pytest.fixture
def directories(tmp_path):
    """An encoder and a decoder, both with the files of a tokenizer."""
    for role in ("encoder", "decoder"):
        files = tmp_path / f"{role} files"
        files.mkdir()
        (files / "tokenizer.json").write_text("{}")
        save_params(tmp_path / role, {role: {}}, {f"{role}.x": jnp.zeros(2)}, files)
    return tmp_path / "encoder", tmp_path / "decoder"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_tokenizer_is_that_of_the_decoder(order, directories, tmp_path):
    names = ",".join(str(directories[index]) for index in order)
    config = TrainConfig(model=tiny_config(), init_from=names)
    assert tokenizer_directory(config, tmp_path) == directories[1]


def test_an_encoder_alone_brings_no_tokenizer(directories, tmp_path):
    config = TrainConfig(model=tiny_config(), init_from=str(directories[0]))
    with pytest.raises(UserError, match=r"no directory of config.init_from = .* holds a decoder"):
        tokenizer_directory(config, tmp_path)
    config = TrainConfig(model=tiny_config(), init_from=str(directories[0]), tokenizer=str(directories[1]))
    assert tokenizer_directory(config, tmp_path) == directories[1]


def test_a_chat_template_that_ends_no_reply_is_refused_for_training():
    tokenizer = sentencepiece("first")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    decoder = dataclasses.replace(tiny_config().decoder, vocab_size=600)
    config = TrainConfig(model=tiny_config(decoder=decoder, template="tokenizer"))
    with pytest.raises(ConfigError, match=r"^config\.model\.template = 'tokenizer': .* would not learn to end one"):
        inputs._processor(config, tokenizer)  # noqa: SLF001
    plain = tokenizer.chat_template
    tokenizer.chat_template = plain + "{# [INST] #}"
    with pytest.raises(ConfigError, match=r"to end one; set 'mistral_instruct' instead$"):
        inputs._processor(config, tokenizer)  # noqa: SLF001
    tokenizer.chat_template = plain.replace("+ ' ' }}", "+ eos_token }}")
    assert inputs._processor(config, tokenizer).encoder.format.end_tokens == ("</s>",)  # noqa: SLF001
    with pytest.raises(ConfigError, match=r"^config\.tokenizer, config\.model\.template: The tokenizer encodes"):
        inputs._processor(TrainConfig(model=tiny_config(decoder=decoder, template="llama_3")), tokenizer)  # noqa: SLF001
