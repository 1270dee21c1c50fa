"""An exported LLaVA is complete: AutoProcessor and `generate` reply as `vr-jax chat`, in transformers 4 and 5.

A process of its own imports each version: the environment's version 5, or version 4.57 from a folder that
`make test-transformers4` fills and that VR_JAX_TRANSFORMERS4 names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert.onevision_folder import image_file
from tests.inference import tiny
from tests.tiny import random_model, tiny_decoder, tiny_encoder
from vr_jax.cli.main import main
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model_directory import save_model

OVERLAY = os.environ.get("VR_JAX_TRANSFORMERS4", "")
needs_overlay = pytest.mark.skipif(
    not OVERLAY, reason="needs the folder with transformers 4.57 and torchvision: make test-transformers4"
)
NEW_TOKENS = 10
QUESTION = "What is the word?"
SCRIPT = """
import json, sys
import torch, transformers
from PIL import Image
folder, image, question, new_tokens = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
processor = transformers.AutoProcessor.from_pretrained(folder)
processor.image_processor = transformers.AutoImageProcessor.from_pretrained(folder, **OPTIONS)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.open(image).convert("RGB")], text=prompt, return_tensors="pt")
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=int(new_tokens), do_sample=False)
reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps({"version": transformers.__version__, "reply": reply, "prompt": prompt}))
"""


def model_of(aspect: str) -> VlmConfig:
    """A model trained here, which has a class in transformers; its tokenizer knows no images."""
    encoder = tiny_encoder(num_layers=2)
    pixels = {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.3, 0.4, 0.5), "resample": "bilinear"}
    return VlmConfig(
        encoder=encoder,
        decoder=tiny_decoder(vocab_size=len(tiny.TOKENIZER) + 5, num_layers=2),
        projector=MlpConfig(),
        image=ImageConfig(
            tile_size=encoder.image_size,
            aspect_ratio=aspect,
            grids=((2, 1), (1, 2)),
            unpad_rounding="round7",
            **pixels,
        ),
        vision_feature_layer=2,
    )


@pytest.fixture(scope="module", params=["anyres_max", "anyres"])
def exported(request, tmp_path_factory):
    """An export, an image, and what `vr-jax chat` replies about it."""
    folder = tmp_path_factory.mktemp("export")
    tiny.TOKENIZER.save_pretrained(folder / "tokenizer")
    save_model(folder / "model", random_model(model_of(request.param)), folder / "tokenizer")
    image = image_file(folder / "image.png", (50, 23))
    assert main(["convert", "export", f"--from={folder / 'model'}", f"--to={folder / 'hf'}"]) == 0
    return folder, image


def reply(folder: Path, image: Path, *paths: str, pil: bool) -> dict:
    """What a process with these folders on its path replies."""
    # Version 5 takes torchvision's filters where it can; those of Pillow are LLaVA's.
    script = SCRIPT.replace("OPTIONS", "{'backend': 'pil'}" if pil else "{'use_fast': False}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "hf"), str(image), QUESTION, str(NEW_TOKENS)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_overlay
@pytest.mark.slow  # Two processes import transformers and torch.
@pytest.mark.parametrize("version", ["4", "5"])
def test_transformers_replies_as_chat_does(version, exported, capsys):
    folder, image = exported
    capsys.readouterr()
    command = ["chat", f"--checkpoint={folder / 'model'}", f"--image={image}", f"--max_new_tokens={NEW_TOKENS}"]
    assert main([*command, QUESTION]) == 0
    expected = capsys.readouterr().out.removesuffix("\n")
    older = (str(Path(OVERLAY) / "transformers"),) if version == "4" else ()
    found = reply(folder, image, *older, str(Path(OVERLAY) / "torchvision"), pil=version == "5")
    assert found["version"].startswith(version)
    assert found["reply"] == expected


def test_what_an_export_holds(exported):
    """Everything that the classes of transformers read, whatever version is installed."""
    folder, _ = exported
    out = folder / "hf"
    config, tokenizer = (json.loads((out / name).read_text()) for name in ("config.json", "tokenizer.json"))
    added = {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
    assert config["image_token_index"] == added["<image>"] == len(tiny.TOKENIZER)
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["resample"]) == ([0.4, 0.5, 0.6], 2)
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [added["<|im_end|>"], added["<|endoftext|>"]]
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in settings
    assert (out / "chat_template.jinja").is_file()
