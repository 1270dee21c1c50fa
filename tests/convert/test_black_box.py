"""Folders whose processor and generation settings differ from the defaults: the commands reply as transformers does."""

from __future__ import annotations

import json

import pytest

from tests.convert.onevision_folder import Reference, image_file, write_folder
from vr_jax.cli.main import main

NEW_TOKENS = 12
QUESTIONS = {
    "wide": ("What is the word?", ((61, 30),)),
    "none": ("How many?", ()),
    "two": ("Which?", ((30, 20), (9, 31))),
}
SHAPES = {
    "a mean that is absent, and a repetition penalty": {
        "vision": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
        "pixels": {"image_size": 27, "patch_size": 4},
        "text": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
        "rest": {"num_key_value_heads": 2, "tie_word_embeddings": True},
        "grids": ((1, 1), (1, 2), (2, 1), (2, 2)),
        "processor": {"do_pad": True},
        "generation": {"repetition_penalty": 1.5, "do_sample": True, "temperature": 0.7, "top_k": 20},
    },
    "another mean, filter and scale, and tokens that are suppressed": {
        "vision": {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3},
        "pixels": {"image_size": 24, "patch_size": 6, "layer_norm_eps": 1e-5},
        "text": {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4},
        "rest": {"num_key_value_heads": 1, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
        "grids": ((1, 1), (1, 3), (2, 2)),
        "processor": {
            "image_mean": [0.2, 0.4, 0.7],
            "image_std": [0.3, 0.6, 0.2],
            "rescale_factor": 0.006,
            "resample": 2,
            "do_rescale": True,
        },
        "generation": {"suppress_tokens": [1, 2, 3], "begin_suppress_tokens": [7], "repetition_penalty": 0.8},
    },
    "one mean for all channels, and a reply that must have some tokens": {
        "vision": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        "pixels": {"image_size": 30, "patch_size": 5},
        "text": {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "rest": {"num_key_value_heads": 2, "tie_word_embeddings": False, "rope_theta": 500.0},
        "grids": ((1, 2), (2, 1)),
        "processor": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 1},
        "generation": {"min_new_tokens": 6, "repetition_penalty": 1.1},
    },
}


def made(name: str, tmp_path):
    """The folder of a shape, the questions with their images, and transformers' replies."""
    shape = SHAPES[name]
    folder = write_folder(
        tmp_path / "hf",
        vision=shape["vision"] | shape["pixels"],
        text=shape["text"] | shape["rest"],
        grids=shape["grids"],
        processor=shape["processor"],
        generation=shape["generation"],
    )
    asked = {
        key: (text, [image_file(tmp_path / f"{key}{i}.png", size, i) for i, size in enumerate(sizes)])
        for key, (text, sizes) in QUESTIONS.items()
    }
    # A token in the middle of a reply ends the replies, and a second one that no reply holds.
    middle = Reference(folder).tokens(*asked["wide"], NEW_TOKENS, eos_token_id=None)[7]
    settings = {**shape["generation"], "eos_token_id": [middle, 299]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    reference = Reference(folder)
    expected = {key: reference.reply(*one, NEW_TOKENS) for key, one in asked.items()}
    assert len(set(expected.values())) == len(expected)
    return folder, asked, expected


@pytest.mark.slow  # transformers makes the model twice, and two programs are compiled: half a minute.
def test_chat_replies_as_transformers_does(tmp_path, capsys):
    folder, asked, expected = made(next(iter(SHAPES)), tmp_path)
    assert main(["convert", "import", f"--from={folder}", f"--to={tmp_path / 'ours'}"]) == 0
    capsys.readouterr()
    text, images = asked["wide"]
    given = [f"--image={image}" for image in images]
    command = ["chat", f"--checkpoint={tmp_path / 'ours'}", f"--max_new_tokens={NEW_TOKENS}"]
    assert main([*command, *given, text]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected["wide"] + "\n"
    assert captured.err.count("do_sample") == 1
    assert main([*command, *given, "--repetition_penalty=1", text]) == 0
    assert capsys.readouterr().out != expected["wide"] + "\n"


@pytest.mark.slow  # Three shapes are compiled, for eight devices.
@pytest.mark.parametrize("name", SHAPES)
def test_the_commands_reply_as_transformers_does(name, tmp_path, capsys):
    folder, asked, expected = made(name, tmp_path)
    assert main(["convert", "import", f"--from={folder}", f"--to={tmp_path / 'ours'}"]) == 0
    lines = [
        {"id": key, "question": text, "images": [str(image) for image in images]}
        for key, (text, images) in asked.items()
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", f"--checkpoint={tmp_path / 'ours'}", f"--max_new_tokens={NEW_TOKENS}"]
    files = [f"--input={tmp_path / 'questions.jsonl'}", f"--output={tmp_path / 'answers.jsonl'}", "--batch_size=8"]
    assert main([*command, *files]) == 0, capsys.readouterr().err
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {answer["id"]: answer["answer"] for answer in answers} == expected
