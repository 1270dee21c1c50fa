"""Every command and every block of Python of README.md runs, with tiny models and files in place of the real ones."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from vr_jax.cli import plan as plan_command
from vr_jax.cli.flags import Command, Group, parse
from vr_jax.cli.main import COMMANDS, main
from vr_jax.data.demo.export import write_chartqa, write_llava
from vr_jax.data.demo.source import DemoSource
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.plan import topology
from vr_jax.settings import load_config

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
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},  # as Qwen2 is released
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


# The language and the text of every fenced code block of the page.
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def lines_of(text: str) -> list[list[str]]:
    """The words of every line of a console block, without comments."""
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


CONSOLE_LINES = [words for language, text in BLOCKS if language == "console" for words in lines_of(text)]
PROGRAM_LINES = [words for words in CONSOLE_LINES if words[0] == "vr-jax"]


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
        return [*words, "--steps=1", "--pages=40", "--held_out=10"]
    if command in ("train", "plan"):
        return [*words, *TINY_FLAGS]
    if command == "chat":
        return [*words, "--max_new_tokens=4"]
    return words


def command_of(words: list[str]) -> tuple[Command, list[str]]:
    """The command that a line calls, and the line's flags."""
    _, name, *rest = words
    assert name in COMMANDS, f"no command {name!r}"
    command = importlib.import_module(f"vr_jax.cli.{name}").COMMAND
    if isinstance(command, Group):
        assert rest[0] in command.actions, f"{name} has no action {rest[0]!r}"
        return command.actions[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize("line", [shlex.join(words) for words in PROGRAM_LINES])
def test_commands_have_flags_and_configs_that_exist(line: str):
    command, rest = command_of(shlex.split(line))
    flags = parse(command.flags, rest)
    if config := getattr(flags, "config", None):
        load_config(config, flags.overrides)


def test_all_main_commands_are_shown():
    assert {words[1] for words in PROGRAM_LINES} >= {"demo", "chat", "convert", "train", "eval", "plan", "experiments"}


@pytest.mark.slow
def test_everything_on_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """In the order of the page, in an empty folder but for the files that a user would have downloaded."""
    monkeypatch.chdir(folder)
    # JAX runs already in this process, on the eight devices that the page's plan asks for.
    monkeypatch.setattr(plan_command, "prepare_process", topology.parse)
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "README.md", "exec"), {})
            continue
        for words in lines_of(text):
            if words[:2] == ["python", "-c"]:
                exec(words[2], {})
            elif words[0] == "vr-jax":
                assert main(shrunk(words)[1:]) == 0, f"{words}: {capfd.readouterr().err}"
            else:
                # The wheel is tested where it is built.
                assert words[:2] in (["python3", "-m"], ["pip", "install"]), words
    assert (folder / "runs/demo/report.html").is_file()
    assert (folder / "runs/phase2/eval/report.html").is_file()
