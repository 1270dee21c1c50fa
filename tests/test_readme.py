"""Every command and every block of Python of README.md runs, with tiny models and files in place of the real ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from vr_jax.cli.main import main
from vr_jax.data.demo.export import write_chartqa, write_llava
from vr_jax.data.demo.source import DemoSource
from vr_jax.data.demo.tokenizer import demo_tokenizer

README = Path(__file__).resolve().parents[1] / "README.md"

ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 24,  # the paper's levels are 7, 15 and 23
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
DECODER = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,  # the last insertion is after layer 4
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
# What makes the paper's configs as small as these checkpoints.
TINY = {
    "model.encoder.hidden_size": 32,
    "model.encoder.intermediate_size": 64,
    "model.encoder.num_heads": 2,
    "model.encoder.image_size": 24,
    "model.encoder.patch_size": 4,
    "model.image.tile_size": 24,
    "model.decoder.vocab_size": 512,
    "model.decoder.hidden_size": 32,
    "model.decoder.intermediate_size": 64,
    "model.decoder.num_layers": 5,
    "model.decoder.num_heads": 4,
    "model.decoder.num_kv_heads": 2,
    "batch.rows": 8,
    "batch.tokens": 512,
    "batch.tiles": 12,
    "steps": 2,
    "data.workers": 0,
}
TINY_FLAGS = tuple(f"--config.{field}={value}" for field, value in TINY.items())


def blocks(language: str) -> list[str]:
    """The fenced code blocks of the page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def command_lines() -> list[list[str]]:
    """The words of every line of the console blocks, without comments."""
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with tiny files under the names that the page uses, as if they had been downloaded."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="tiny Hugging Face models are made with torch")
    root = tmp_path_factory.mktemp("readme")
    vision, text = transformers.SiglipVisionConfig(**ENCODER), transformers.Qwen2Config(**DECODER)
    onevision = transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=511,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        vision_feature_select_strategy="full",
    )
    for name, model in {
        "siglip-large-patch16-384": transformers.SiglipVisionModel(vision),
        "Qwen2-0.5B-Instruct": transformers.Qwen2ForCausalLM(text),
        "llava-onevision-qwen2-0.5b-ov-hf": transformers.LlavaOnevisionForConditionalGeneration(onevision),
    }.items():
        model.save_pretrained(root / "models" / name)
        if "siglip" not in name:
            demo_tokenizer().save_pretrained(root / "models" / name)
    (root / "data").mkdir()
    source = DemoSource("train", 20, turns=1)
    write_llava(source, root / "llava")
    (root / "llava" / "images").rename(root / "data" / "images")
    records = json.loads((root / "llava" / "data.json").read_text())
    (root / "data" / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(records))
    for record in records:
        record["image"] = f"images/{record['image']}"
    (root / "data" / "llava_next.json").write_text(json.dumps(records))
    write_chartqa(DemoSource("held_out", 2), root / "data" / "ChartQA")
    return root


def shrunk(words: list[str]) -> list[str]:
    """A command with the flags that make it tiny."""
    command = words[1]
    if command == "demo":
        return [*words, "--steps=2", "--config.batch.rows=24"]
    if command in ("train", "plan"):
        return [*words, *TINY_FLAGS]
    if command == "chat":
        return [*words, "--max_new_tokens=4"]
    return words


def test_every_command_of_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(folder)
    ran = []
    for words in command_lines():
        if words[0] == "pip":
            continue
        if words[0] == "python":
            assert words[1] == "-c"
            exec(words[2], {})
        else:
            assert words[0] == "vr-jax"
            import time; t=time.time()
            assert main(shrunk(words)[1:]) == 0, capsys.readouterr()
            with capsys.disabled(): print(words[:3], time.time()-t)
        ran.append(words[1])
    assert {"demo", "chat", "convert", "train", "eval", "plan", "experiments"} <= set(ran)
    assert (folder / "runs/demo/report.html").is_file()
    assert (folder / "runs/phase2/eval/report.html").is_file()
