"""The tokenizer of a run is that of the decoder; its sources are those of the settings, with their names and rates."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import pytest

from tests.data.prompts.small_tokenizers import sentencepiece
from tests.training.tiny import tiny_config
from vr_jax.data.mixture import samples_of_epoch
from vr_jax.errors import ConfigError, UserError
from vr_jax.model_directory import save_params
from vr_jax.settings import DataSettings, SourceSettings, TrainConfig
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


def write(folder, name, count):
    """A file of so many texts, which are named by the letter of the file."""
    folder.mkdir(exist_ok=True)
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    records = [{"id": f"{name}{k}", "conversations": talk} for k in range(count)]
    (folder / f"{name}.json").write_text(json.dumps(records))
    return str(folder / f"{name}.json")


def opened(*sources, **fields):
    return inputs.open_training_source(DataSettings(sources=tuple(SourceSettings(**one) for one in sources), **fields))


def test_sources_without_rates_follow_one_another_under_their_names(tmp_path):
    paths = [write(tmp_path, "a", 3), write(tmp_path / "b", "a", 2), write(tmp_path, "c", 4)]
    source = opened({"path": paths[0]}, {"path": paths[1]}, {"path": paths[2], "name": "charts"})
    assert source.names == ("a", "a-2", "charts")
    assert source.counts is None
    assert [source[k].source for k in range(9)] == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_weights_and_shares_set_the_samples_of_an_epoch(tmp_path):
    a, b = write(tmp_path, "a", 30), write(tmp_path, "b", 10)
    assert opened({"path": a, "weight": 1}, {"path": b, "weight": 3}).counts == (10, 30)
    source = opened({"path": a, "share": 0.1}, {"path": b})
    assert source.counts == (3, 10)
    assert samples_of_epoch(source) == 13
    assert opened({"path": a, "sampling_strategy": "first:50%", "share": 2.0}, {"path": b}).counts == (30, 10)
    assert opened({"path": a, "share": 2.0}).counts == (60,)
    with pytest.raises(ConfigError, match=r"none of .*b\.json \(10 records, share = 0\.01\); raise its rate"):
        opened({"path": a}, {"path": b, "share": 0.01})


def test_a_list_of_llava_is_read_with_the_images_of_the_settings(tmp_path):
    a, b = write(tmp_path, "a", 30), write(tmp_path, "b", 10)
    path = tmp_path / "list.yaml"
    path.write_text(f"datasets:\n  - json_path: {a}\n    sampling_strategy: end:5\n  - json_path: {b}\n")
    data = DataSettings(path=str(path), images=str(tmp_path / "images"), format="")
    assert [(one.path, one.images, one.sampling_strategy) for one in inputs.training_sources(data)] == [
        (a, str(tmp_path / "images"), "end:5"),
        (b, str(tmp_path / "images"), "all"),
    ]
    (tmp_path / "images").mkdir()
    source = inputs.open_training_source(data)
    assert [source[k].id for k in range(5)] == ["a25", "a26", "a27", "a28", "a29"]
    assert (len(source), source.names) == (15, ("a", "b"))
    path.write_text(f"datasets: [{{json_path: {a}, sampling_strategy: some}}]")
    with pytest.raises(
        ConfigError, match=r"list\.yaml: sampling_strategy = 'some' of the source .*a\.json: expected 'all'"
    ):
        inputs.open_training_source(data)
    with pytest.raises(ConfigError, match=r"lists JSON files of LLaVA: leave config\.data\.format and"):
        inputs.open_training_source(DataSettings(path=str(path), split="validation"))
    with pytest.raises(ConfigError, match=r"list\.yaml lists sources itself; give it as config\.data\.path"):
        opened({"path": str(path)})


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"weight": 1.0}, {}], "some sources have a weight and others none"),
        ([{"weight": 1.0}, {"weight": 1.0, "share": 0.5}], "there are weights and shares"),
        ([{"name": "x"}, {"name": "x"}], r"two sources have one name \(x, x\)"),
        ([{"name": "a/b"}], "name = 'a/b' of the source data.json: expected letters, digits"),
        ([{"share": 0.0}], r"share = 0\.0: expected a finite number"),
        ([{"sampling_strategy": "first:0"}], "sampling_strategy = 'first:0' of the source data.json: expected 'all'"),
        ([{"sampling_strategy": "first:101%"}], "sampling_strategy = 'first:101%'"),
        ([{"sampling_strategy": "last:5"}], "sampling_strategy = 'last:5'"),
    ],
)
def test_rates_and_names_that_cannot_be(sources, message):
    with pytest.raises(ConfigError, match=message):
        opened(*({"path": "data.json"} | one for one in sources))
