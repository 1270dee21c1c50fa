"""Qwen2.5-VL through files on disk: imported models reply as transformers does, and exports load there.

The folders are made by transformers, with random values in every parameter.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert.conftest import torch, transformers
from tests.convert.qwen2_5_vl_folder import Reference, flat, image_file, write_folder
from tests.tiny import random_model, tiny_refusion
from vr_jax.cli.main import main
from vr_jax.convert.chat_template import CHAT_TEMPLATES
from vr_jax.convert.importing import _planned, import_checkpoint, plan_import
from vr_jax.convert.source_sections import open_sources
from vr_jax.data.types import Conversation, Example
from vr_jax.errors import UserError
from vr_jax.inference import Generator, load_for_inference, user_turn
from vr_jax.inference.state import on_devices
from vr_jax.model.config import VlmConfig
from vr_jax.model.parameters import flatten_params, merge_stages
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory import PIXELS, load_params, read_config, read_sections, save_params

pytestmark = pytest.mark.usefixtures("pillow_13")  # The processor of transformers resizes with Pillow.

NEW_TOKENS = 16
# Questions with the sizes (width, height) of their images: whole windows, partial ones, none, and several images.
QUESTIONS = {
    "whole windows": ("What is the word?", ((72, 36),)),
    "partial windows": ("Which colour is the tallest bar?", ((100, 61),)),
    "an image that is enlarged": ("Which?", ((9, 7),)),
    "an image that is shrunk": ("How many bars are there?", ((150, 190),)),
    "two images": ("What differs? Say it.", ((50, 70), (31, 40))),
    "three images": ("One?", ((24, 24), (90, 20), (13, 66))),
    "text only": ("How are you?", ()),
}
# Float32 against float32; measured 6e-6 at logits up to 5.4.
LOGITS = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied model in the form that transformers 5 writes, with a repetition penalty as the released files have."""
    directory = tmp_path_factory.mktemp("qwen") / "hf"
    return write_folder(directory, generation={"repetition_penalty": 1.05, "do_sample": True, "temperature": 1e-6})


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The questions with the files of their images."""
    place = tmp_path_factory.mktemp("images")
    return {
        name: (text, [image_file(place / f"{number}-{i}.png", size, i) for i, size in enumerate(sizes)])
        for number, (name, (text, sizes)) in enumerate(QUESTIONS.items())
    }


@pytest.fixture(scope="module")
def imported(folder, tmp_path_factory):
    """The imported folder, and its model and processor."""
    directory = tmp_path_factory.mktemp("ours") / "model"
    import_checkpoint(folder, directory)
    return directory, load_for_inference(directory)


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


def prompt(loaded, text, images) -> Example:
    """The question as the commands ask it."""
    turn = user_turn(text, len(images), loaded.processor.encoder.separators)
    return loaded.processor.prompt(Conversation("question", (turn,), tuple(images)))


@jax.jit
def _logits(model: VisionLanguageModel, batch):
    hidden, _ = model(batch)
    return model.logits(hidden)


def batch_of(loaded, prompts):
    """The batch of some prompts, padded at the left, on the device."""
    generator = Generator(loaded.model, loaded.tokenizer, settings=loaded.generation)
    return generator, generator.batch(dict(enumerate(prompts)), len(prompts))


@pytest.mark.parametrize("name", QUESTIONS)
def test_prompts_are_those_of_the_processor(name, imported, reference, asked):
    """Token ids, the three axes of positions, and the place of each vision token."""
    found = prompt(imported[1], *asked[name])
    inputs = reference.inputs([asked[name]])
    ids = inputs["input_ids"][0].numpy()
    image = reference.model.config.image_token_id
    np.testing.assert_array_equal(np.where(found.vision_cell >= 0, image, found.tokens), ids)
    np.testing.assert_array_equal(found.vision_cell >= 0, ids == image)
    np.testing.assert_array_equal(found.positions, reference.positions(inputs)[:, 0].T)


def test_parts_of_the_model_are_read_alone(folder, imported, tmp_path):
    """`--encoder` and `--decoder` take one part of a whole model, with the same parameters and its pixels."""
    whole, lines = load_params(imported[0]), []
    import_checkpoint(None, tmp_path / "parts", encoder=folder, decoder=folder, report=lines.append)
    found, sections = load_params(tmp_path / "parts"), read_sections(tmp_path / "parts")
    assert found.keys() == {path for path in whole if path.startswith(("encoder.", "decoder."))}
    for path, array in found.items():
        np.testing.assert_array_equal(array, whole[path], err_msg=path)
    config = read_config(imported[0])
    assert sections["encoder"] == config.encoder.to_dict()
    assert sections["decoder"] == config.decoder.to_dict()
    assert tuple(sections[PIXELS]["image_mean"]) == config.image.image_mean
    assert any("tensors (the parts of the model beside its encoder)" in line for line in lines), lines
    import_checkpoint(None, tmp_path / "encoder", encoder=folder)
    assert load_params(tmp_path / "encoder").keys() == {path for path in whole if path.startswith("encoder.")}


def assert_logits(loaded, reference, questions):
    """The logits of a batch at every token, and the next token's position."""
    prompts = [prompt(loaded, *one) for one in questions]
    inputs = reference.inputs(questions)
    _, prepared = batch_of(loaded, prompts)
    batch, _ = on_devices(prepared)
    found, expected = np.asarray(_logits(loaded.model, batch)), reference.logits(inputs)
    for row, (one, mask) in enumerate(zip(prompts, inputs["attention_mask"].numpy(), strict=True)):
        length = len(one.tokens)
        assert mask.sum() == length
        np.testing.assert_allclose(found[row, -length:], expected[row, -length:], **LOGITS)


def test_logits_are_those_of_transformers(imported, reference, asked):
    """All questions in one batch: prompts of different lengths are padded at the left, and images have any size."""
    assert_logits(imported[1], reference, list(asked.values()))


def greedy(loaded, questions):
    """Our replies, as ids, without an end."""
    generator = Generator(loaded.model, loaded.tokenizer, settings=loaded.generation, ignore_stop=True)
    prompts = [prompt(loaded, *one) for one in questions]
    return [list(reply.tokens) for reply in generator.generate(prompts, max_new_tokens=NEW_TOKENS)]


@pytest.mark.slow  # The prefill and the decoding of a batch of seven prompts are compiled: a quarter of a minute.
def test_replies_are_those_of_transformers(imported, reference, asked):
    """16 greedy tokens with the folder's repetition penalty, which counts the tokens that stand for images."""
    questions = list(asked.values())
    expected = reference.tokens(reference.inputs(questions), NEW_TOKENS, eos_token_id=None, repetition_penalty=1.05)
    found = greedy(imported[1], questions)
    assert found == expected.tolist()
    assert len({tuple(one) for one in found}) == len(questions)


@pytest.mark.slow  # The command compiles its own programs: half a minute.
def test_the_command_replies_as_transformers_does(imported, reference, asked, tmp_path, capsys):
    """`vr-jax generate` asks in batches, and reports an image without tiles instead of stopping."""
    names = ["partial windows", "two images", "text only"]
    lines = [{"id": name, "question": asked[name][0], "images": [str(one) for one in asked[name][1]]} for name in names]
    thin = image_file(tmp_path / "thin.png", (900, 4))
    lines.append({"id": "thin", "question": "What?", "images": [str(thin)]})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [f"--input={tmp_path / 'questions.jsonl'}", f"--output={tmp_path / 'answers.jsonl'}", "--batch_size=8"]
    assert main(["generate", f"--checkpoint={imported[0]}", f"--max_new_tokens={NEW_TOKENS}", *files]) == 0
    answers = {one["id"]: one for one in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())}
    assert answers.pop("thin")["error"].startswith("image_shape: The image has 900 x 4 pixels")
    for name in names:
        tokens = reference.tokens(reference.inputs([asked[name]]), NEW_TOKENS, repetition_penalty=1.05)[0].tolist()
        ends = set(reference.model.generation_config.eos_token_id)
        kept = tokens[: next((k for k, token in enumerate(tokens) if token in ends), len(tokens))]
        assert answers[name]["answer"] == reference.processor.tokenizer.decode(kept, skip_special_tokens=True), name


def test_the_released_form_of_config_json_is_the_same_model(folder, imported, tmp_path):
    """The released files have the decoder's fields beside `vision_config`, and fields that nobody reads."""
    source = _changed(folder, tmp_path, "config.json", {})
    values = flat(json.loads((folder / "config.json").read_text()))
    (source / "config.json").write_text(json.dumps(values))
    assert VlmConfig.from_dict(plan_import(source)) == read_config(imported[0])


@pytest.mark.slow  # The model is imported twice, exported once, and made by transformers three times: five seconds.
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "with a head"])
def test_exports_load_in_transformers(tied, asked, tmp_path, converted):
    """transformers computes with the export what it computes with the original, and so do we with its import."""
    original = write_folder(tmp_path / "hf", tied=tied)
    converted("import", "--from", original, "--to", tmp_path / "ours")
    converted("export", "--from", tmp_path / "ours", "--to", tmp_path / "out", "--shard-gb", "0.00001")
    back, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    first, second = Reference(original), Reference(tmp_path / "out")
    expected = first.model.state_dict()
    for name, value in back.state_dict().items():
        # The two temporal slices of the patches are stored as halves of their sum.
        theirs = expected[name]
        if name.endswith("patch_embed.proj.weight"):
            assert torch.equal(value[:, :, 0], value[:, :, 1])
            value, theirs = value.sum(dim=2), theirs.sum(dim=2)
        assert torch.equal(value, theirs), name
    questions = [asked["partial windows"], asked["two images"]]
    inputs = second.inputs(questions)
    for name, value in first.inputs(questions).items():
        assert torch.equal(inputs[name], value), name
    np.testing.assert_allclose(second.logits(inputs), first.logits(inputs), **LOGITS)
    converted("import", "--from", tmp_path / "out", "--to", tmp_path / "again")
    assert read_config(tmp_path / "again") == read_config(tmp_path / "ours")
    again = load_params(tmp_path / "again")
    for path, value in load_params(tmp_path / "ours").items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_the_sum_of_the_slices_is_rounded_once(tmp_path, converted):
    """In bfloat16 the slices are added in float32, so that the sum is the nearest bfloat16."""
    source = write_folder(tmp_path / "hf")
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    converted("import", "--from", source, "--to", tmp_path / "ours")
    kernel = model.model.visual.patch_embed.proj.weight.detach().float().numpy()
    expected = kernel.sum(axis=2).transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])
    found = load_params(tmp_path / "ours")["encoder.patch_embed.kernel"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(found, np.float32), np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float32)
    )


def with_vision_remember(directory, target):
    """Writes a model directory of an imported one with Vision Remember on it, with random blocks."""
    config = read_config(directory)
    fields = config.to_dict() | {"refusion": tiny_refusion(insert_after=(1, 2), levels=(1, 2)).to_dict()}
    config = VlmConfig.from_dict(fields)
    drawn = merge_stages(flatten_params(random_model(config)))
    params = {path: value for path, value in drawn.items() if path.startswith("refusion.")}
    params |= {path: jnp.asarray(value) for path, value in load_params(directory).items()}
    params["image_newline"] = drawn["image_newline"]  # as a run writes it
    save_params(target, config.to_dict(), params, directory)
    return config


def test_a_model_with_vision_remember_has_a_layout_of_its_own(imported, tmp_path, converted, convert):
    """It is written and read again, keeps the names of transformers, and transformers does not take it for its own."""
    config = with_vision_remember(imported[0], tmp_path / "vr")
    converted("export", "--from", tmp_path / "vr", "--to", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {"vr.0.w_up.weight", "vr.1.cross_attn.in_proj_weight", "visual.blocks.0.attn.qkv.weight"} <= index.keys()
    with pytest.raises(ValueError, match="vr_jax_qwen2_5_vl"):
        transformers.AutoConfig.from_pretrained(tmp_path / "out")
    converted("import", "--from", tmp_path / "out", "--to", tmp_path / "again")
    assert read_config(tmp_path / "again") == config
    params = load_params(tmp_path / "vr")
    again = load_params(tmp_path / "again")
    assert again.keys() == params.keys() - {"image_newline"}
    for path, value in again.items():
        np.testing.assert_array_equal(value, params[path], err_msg=path)
    status, _, error = convert("export", "--from", tmp_path / "vr", "--to", tmp_path / "hf", "--layout", "hf")
    assert status == 2
    assert "transformers has no model with re-fusion block 'vision_remember'; leave --layout out" in error
    status, _, error = convert("export", "--from", imported[0], "--to", tmp_path / "hf", "--layout", "llava")
    assert status == 2
    assert "LLaVA's layout has no place for the encoder 'qwen2_5_vision'" in error


# What is changed in the files of a folder, and what the refusal says.
REFUSALS = {
    "sliding window": ({"text_config.use_sliding_window": True}, "use_sliding_window = True is not supported"),
    "layers with a window": (
        {"text_config.layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types has 'sliding_attention', which is not supported",
    ),
    "yarn": (
        {"text_config.rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}},
        "rope_parameters has rope_type = 'yarn', which is not supported, expected 'default' or 'mrope'",
    ),
    "no sections": (
        {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "mrope_section = None: expected the numbers of rotary frequencies",
    ),
    "sections that do not fit": (
        {"text_config.rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 4]}},
        r"rope_sections = \(2, 3, 4\) do not add up to 8",
    ),
    "quantised weights": (
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "quantization_config = .*awq.* is not supported",
    ),
    "another width": ({"vision_config.out_hidden_size": 48}, "out_hidden_size = 48 does not fit the decoder"),
    "another activation": ({"vision_config.hidden_act": "gelu"}, "vision_config: hidden_act = 'gelu'"),
    "three frames": ({"vision_config.temporal_patch_size": 3}, "temporal_patch_size = 3 is not supported"),
    "no window": ({"vision_config.window_size": 8}, "window_size = 8 .*expected a window of at least one merged cell"),
    "an unknown field": ({"vision_config.deepstack_visual_indexes": [1]}, "'deepstack_visual_indexes' = .*not known"),
    "too many layers": ({"vision_config.depth": 10**6}, "depth = 1000000: expected at most 10000"),
    "another token": ({"image_token_id": 7}, r"image_token_id = 7, but .*gives '<\|image_pad\|>' the id"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_computed_here_is_refused_by_name(name, folder, tmp_path):
    changes, message = REFUSALS[name]
    source = _changed(folder, tmp_path, "config.json", changes)
    with pytest.raises(UserError, match=message):
        plan_import(source)


PROCESSOR_REFUSALS = {
    "a fixed size": ({"size": {"height": 224, "width": 224}}, "size = .*expected the fields shortest_edge and longest"),
    "half a size": (
        {"size": {"longest_edge": 9000}, "min_pixels": None},
        r"\(or size.shortest_edge\) = None",
    ),
    "limits in the wrong order": ({"min_pixels": 10_000}, "min_pixels = 10000 is above max_pixels = 9000"),
    "another patch": ({"patch_size": 7}, "patch_size = 7, but the model's is 6"),
    "another class": ({"image_processor_type": "CLIPImageProcessor"}, "expected 'Qwen2VLImageProcessor'"),
    "no resizing": ({"do_resize": False}, "do_resize = False is not supported"),
    "an unknown field": ({"do_tile": True}, "'do_tile' = True is not known"),
}


@pytest.mark.parametrize("name", PROCESSOR_REFUSALS)
def test_a_processor_that_makes_other_pixels_is_refused(name, folder, tmp_path):
    changes, message = PROCESSOR_REFUSALS[name]
    source = _changed(folder, tmp_path, "preprocessor_config.json", changes)
    with pytest.raises(UserError, match=message):
        plan_import(source)


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, (3136, 1003520)),
        ({"max_pixels": 5000}, (3136, 5000)),
        ({"size": {"shortest_edge": 600, "longest_edge": 8000}}, (600, 8000)),
        ({"size": {"shortest_edge": 600, "longest_edge": 8000}, "max_pixels": 7000}, (600, 7000)),
        ({"min_pixels": 3136, "max_pixels": 12845056}, (3136, 12845056)),
    ],
    ids=["the class's", "one field", "size", "a field comes before size", "released"],
)
def test_limits_of_pixels_are_those_that_transformers_reads(given, limits, folder, tmp_path):
    """What the file leaves out has the default of the class, which is not that of the released files."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    none = dict.fromkeys(("min_pixels", "max_pixels"))
    source = _changed(folder, tmp_path, "preprocessor_config.json", none | given)
    lines: list[str] = []
    image = plan_import(source, report=lines.append)["image"]
    assert (image["min_pixels"], image["max_pixels"]) == limits
    values = json.loads((source / "preprocessor_config.json").read_text())
    kept = {name: value for name, value in values.items() if value is not None}
    size = Qwen2VLImageProcessorPil(**kept).size
    assert (size["shortest_edge"], size["longest_edge"]) == limits
    absent = "size" not in given and len(given) < 2
    assert any("the class of the image processor gives" in line for line in lines) == absent


def _changed(folder, tmp_path, file, changes):
    """A folder of links to another one's files, with one JSON file changed; None removes a field."""
    target = tmp_path / "changed"
    target.mkdir()
    for path in folder.iterdir():
        if path.name != file:
            (target / path.name).symlink_to(path)
    values = json.loads((folder / file).read_text())
    for name, value in changes.items():
        *sections, field = name.split(".")
        section = values
        for one in sections:
            section = section[one]
        if value is None:
            section.pop(field, None)
        else:
            section[field] = value
    (target / file).write_text(json.dumps(values))
    return target


def test_a_folder_is_asked_by_its_own_chat_template_where_that_writes_other_prompts(folder, tmp_path):
    def planned(template, place):
        place.mkdir()
        source = _changed(folder, place, "chat_template.json", {"chat_template": template})
        lines: list[str] = []
        return plan_import(source, report=lines.append)["template"], lines

    own = CHAT_TEMPLATES["qwen2_vl"]
    other = own.replace("You are a helpful assistant.", "Answer.")
    assert planned(own, tmp_path / "same")[0] == "qwen2_vl"
    assert planned(other, tmp_path / "other")[0] == "tokenizer"
    found, lines = planned("{{ messages | length }}", tmp_path / "unusable")
    assert found == "qwen2_vl"
    assert any("it is kept for exports" in line for line in lines)


def test_ends_of_a_reply_that_no_file_says_are_those_of_the_class(folder, tmp_path):
    """transformers takes the default of the decoder's class, which is the released `<|im_end|>`."""
    source = _changed(folder, tmp_path, "config.json", {"text_config.eos_token_id": None, "eos_token_id": None})
    (source / "generation_config.json").unlink()
    lines: list[str] = []
    _, _, generation, *_ = _planned(open_sources(source, None, None, ()), lines.append)
    assert generation == {"eos_token_id": transformers.Qwen2_5_VLTextConfig().eos_token_id}
