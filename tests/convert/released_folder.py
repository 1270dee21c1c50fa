"""Writes tiny random folders with the files of released checkpoints (`released_files`), as the hub has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.torch import save_file

from tests.convert.conftest import torch, transformers
from tests.convert.released_files import Released
from tests.data.prompts.small_tokenizers import CHATML, LLAMA_3, byte_level, sentencepiece

_VISUAL = ("<|vision_pad|>", "<|video_pad|>")


def tokenizer_json(made: Released) -> dict[str, Any]:
    """The tokenizer.json of a small tokenizer whose tokens have the ids of the released one where it is Llama's."""
    if made.tokenizer == "sentencepiece":
        state = json.loads(sentencepiece("normalizer").backend_tokenizer.to_str())
        vocabulary = state["model"]["vocab"]
        for number in range(len(vocabulary), 32000):
            vocabulary[f"filler {number}"] = number
        added = made.ids
    else:
        small = (
            byte_level((*LLAMA_3, "<image>", "<pad>"), bos="<|begin_of_text|>", pad="<pad>", eos="<|end_of_text|>")
            if made.tokenizer == "llama_3"
            else byte_level((*CHATML, *_VISUAL, "<image>"), pad="<|endoftext|>", eos="<|im_end|>")
        )
        state, added = json.loads(small.backend_tokenizer.to_str()), {}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    for name, number in added.items():
        backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
        assert backend.token_to_id(name) == number
    return json.loads(backend.to_str())


def _with_ids(value: Any, backend: tokenizers.Tokenizer | None, name: str = "") -> Any:
    """The values of a file, with the ids of tokens for those that it gives by their texts."""
    if isinstance(value, dict):
        return {inner: _with_ids(one, backend, inner) for inner, one in value.items()}
    if isinstance(value, list):
        return [_with_ids(one, backend, name) for one in value]
    if isinstance(value, str) and backend is not None and re.search(r"_token_(id|index)$", name):
        return backend.token_to_id(value)
    return value


def state_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The random tensors of transformers' model of a config.json, by their names in memory."""
    kind = config["architectures"][0]
    model_class = getattr(transformers, kind)
    made = model_class.config_class.from_dict(json.loads(json.dumps(config)))
    made.dtype = None
    torch.manual_seed(0)
    with torch.no_grad():
        model = model_class(made)
        return {
            name: (torch.randn(tensor.shape) * 0.1).numpy() if tensor.is_floating_point() else tensor.numpy()
            for name, tensor in model.state_dict().items()
        }


def released_names(state: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors under the names of the released files, which are those of transformers 4."""
    found = {}
    qwen = config["architectures"][0].startswith("Qwen2_5_VL")
    for name, tensor in state.items():
        name = re.sub(r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1", name)
        if qwen:
            name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        elif "vision_config" in config and "text_config" in config:
            name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
            name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
            name = re.sub(
                r"^(vision_tower)\.(embeddings|encoder|pre_layrnorm|post_layernorm)", r"\1.vision_model.\2", name
            )
        found[name] = tensor
    tied = config.get("tie_word_embeddings") or config.get("text_config", {}).get("tie_word_embeddings")
    if tied:
        found = {name: tensor for name, tensor in found.items() if not name.endswith("lm_head.weight")}
    return found


def own_names(state: dict[str, np.ndarray], *, tower: bool) -> dict[str, np.ndarray]:
    """The tensors of a LLaVA of transformers, as LLaVA's own code names them."""
    found = {}
    for name, tensor in released_names(state, {"architectures": [""], "vision_config": {}, "text_config": {}}).items():
        name = re.sub(r"^language_model\.(model\.)?", lambda found: found[1] or "", name)
        name = name.replace("vision_tower.", "model.vision_tower.vision_tower.")
        name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        name = "model.image_newline" if name == "image_newline" else name
        if tower or "vision_tower" not in name:
            found[name] = tensor
    return found


def with_buffers(tensors: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """Tensors with the buffers beside them that transformers up to 4.31 saved."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("embeddings.position_embedding.weight"):
            found[name.replace("position_embedding.weight", "position_ids")] = np.arange(len(tensor))[None]
    if "model.embed_tokens.weight" in tensors:
        for i in range(layers):
            found[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    return found


def write_files(directory: Path, made: Released, **changes: Any) -> dict[str, Any]:
    """Writes the JSON files of a checkpoint, and returns its config.json.

    Args:
        directory: The folder.
        made: The files.
        changes: Other fields of config.json; ... takes one away.
    """
    directory.mkdir(parents=True, exist_ok=True)
    backend = None
    if made.tokenizer is not None:
        text = json.dumps(tokenizer_json(made))
        (directory / "tokenizer.json").write_text(text)
        backend = tokenizers.Tokenizer.from_str(text)
    files = {"config.json": {k: v for k, v in (made.config | changes).items() if v is not ...}, **made.files}
    for name, values in files.items():
        (directory / name).write_text(json.dumps(_with_ids(values, backend)))
    return json.loads((directory / "config.json").read_text())


def write_shards(directory: Path, tensors: dict[str, np.ndarray], *, pickled: bool = False, dtype: str = "float32"):
    """Writes tensors as two shards and their index, as safetensors or as files of torch."""
    names, ending = sorted(tensors), "bin" if pickled else "safetensors"
    stem = "pytorch_model" if pickled else "model"
    weight_map = {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        weight_map |= dict.fromkeys(part, file)
        values = {name: torch.from_numpy(np.ascontiguousarray(tensors[name])) for name in part}
        values = {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in values.items()}
        if pickled:
            torch.save(values, directory / file)
        else:
            save_file(values, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def write_released(directory: Path, made: Released, **changes: Any) -> Path:
    """Writes the folder of a checkpoint of transformers."""
    config = write_files(directory, made, **changes)
    tensors = released_names(state_of(config), config)
    values = {name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()}
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
