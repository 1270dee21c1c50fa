"""The two sides of benchmarks/inference_speed.py, each run in a process of its own: `run_vr_jax`, `run_torch`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from inference_work import Work, weights


class _Stops:
    """What the generator asks of a tokenizer; stop tokens are ignored."""

    def get_vocab(self) -> dict[str, int]:
        return {"<|im_end|>": 0}


def run_vr_jax(work: Work, model: Any, rounds: int, warmup: int) -> dict[str, Any]:
    """Times, tokens, memory, and the logits behind the prompt."""
    import jax

    from vr_jax.inference.buckets import Buckets
    from vr_jax.inference.generate import Generator

    example = work.example()
    buckets = Buckets(tokens=(len(example.tokens),), tiles=(len(example.tile_pixels),))
    generator = Generator(model, _Stops(), buckets, ignore_stop=True)
    prompts = generator.batch(dict.fromkeys(range(work.batch), example), work.batch)

    def prefill() -> Any:
        state = generator.prefill(prompts, work.new_tokens)
        np.asarray(state.tokens)
        return state

    def decode(state: Any) -> Any:
        state = generator.decode(state, work.new_tokens)
        return np.asarray(state.tokens)

    first, rest, tokens = _measure(prefill, decode, rounds, warmup)
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "first": first,
        "rest": rest,
        "tokens": tokens[0].tolist(),
        "logits": _logits(model, generator.batch({0: example}, 1).batch),
        "peak_bytes": peak,
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model)),
        "versions": {"jax": jax.__version__, "device": device.device_kind},
    }


def exact_logits(work: Work) -> np.ndarray:
    """Behind the prompt, in float32 throughout."""
    import jax

    from vr_jax.data.collate import collate
    from vr_jax.model.batch import BatchShape

    example = work.example()
    shape = BatchShape(rows=1, tokens=len(example.tokens), tiles=5, tile_size=work.config.image.tile_size)
    single = dataclasses.replace(work, config=dataclasses.replace(work.config, dtype="float32"))
    with jax.default_matmul_precision("highest"):  # GPUs multiply float32 in tf32 otherwise
        return _logits(vr_jax_model(single), collate([[example]], shape).batch)


def _logits(model: Any, batch: Any) -> np.ndarray:
    import jax

    hidden, _ = jax.jit(lambda model, batch: model(batch))(model, jax.device_put(batch))
    return np.asarray(jax.jit(lambda model, x: model.logits(x))(model, hidden[0, -1]), np.float32)


def vr_jax_model(work: Work) -> Any:
    """With the shared weights, in the work's dtype."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from vr_jax.model.layout import split_stages, unflatten_params
    from vr_jax.model.llava import Llava

    model = nnx.eval_shape(lambda: Llava(work.config, rngs=nnx.Rngs(0)))
    host = {path: array.astype(jnp.dtype(work.config.dtype)) for path, array in weights(work.config).items()}
    staged = {path: np.asarray(array) for path, array in split_stages(host, work.config).items()}
    return jax.device_put(unflatten_params(model, staged))


def run_torch(work: Work, model: Any, rounds: int, warmup: int, *, compiled: bool = False) -> dict[str, Any]:
    """transformers' LlavaOnevisionForConditionalGeneration.

    compiled: with a static cache, for which `generate` compiles the decode step (torch.compile, CUDA graphs)."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    inputs = torch_inputs(work, model)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if compiled:
        options["cache_implementation"] = "static"

    def generate(count: int) -> np.ndarray:
        with torch.inference_mode():
            output = model.generate(**inputs, min_new_tokens=count, max_new_tokens=count, **options)
        return output[:, -count:].cpu().numpy()

    # The first token alone, then everything: the difference is what the other tokens took.
    first, whole, tokens = _measure(lambda: generate(1), lambda _: generate(work.new_tokens), rounds, warmup)
    with torch.inference_mode():
        single = {name: value[:1] for name, value in inputs.items()}
        logits = model(**single, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu().numpy()
    return {
        "first": first,
        "rest": [both - one for both, one in zip(whole, first, strict=True)],
        "tokens": tokens[0].tolist(),
        "logits": logits,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def torch_model(work: Work) -> Any:
    """With the shared weights, in the work's dtype."""
    import torch
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    from vr_jax.convert.architectures import HF_LLAVA
    from vr_jax.convert.configs import write_hf_llava
    from vr_jax.convert.tables import slots

    values = write_hf_llava(work.config, work.image_token)
    for name in ("architectures", "model_type"):
        del values[name]
    config = LlavaOnevisionConfig(**values)
    dtype = getattr(torch, work.config.dtype)
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(config)
    model = model.to_empty(device="cpu").to(dtype)
    _restore_buffers(model, config)
    params = weights(work.config)
    table = [rule for section in HF_LLAVA.tables.values() for rule in section]
    state = {
        _in_memory(name): torch.from_numpy(slot.take(params)).to(dtype) for name, slot in slots(table, params).items()
    }
    known = dict(model.named_parameters(remove_duplicate=False))
    state = {name if name in known else name.replace(".vision_model.", "."): value for name, value in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if name in known and name != "lm_head.weight"]
    if missing or unexpected:
        raise RuntimeError(f"transformers' model lacks {unexpected} or has more: {missing}")
    model.tie_weights()
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _in_memory(name: str) -> str:
    """A checkpoint's name as transformers 5 has it in memory: `model.` around everything but the head."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def _restore_buffers(model: Any, config: Any) -> None:
    """Those that no checkpoint holds (rotary frequencies, position numbers), from a model of one layer."""
    import copy

    from transformers import LlavaOnevisionForConditionalGeneration

    small = copy.deepcopy(config)
    small.text_config.num_hidden_layers = small.vision_config.num_hidden_layers = 1
    small.text_config.vocab_size = 8
    small.text_config.layer_types = ["full_attention"]
    buffers = dict(LlavaOnevisionForConditionalGeneration(small).named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name].to(buffer.dtype))


def torch_inputs(work: Work, model: Any) -> dict[str, Any]:
    import torch

    text, vision = work.text(), len(work.vision)
    ids = np.concatenate([text[: work.before], np.full(vision, work.image_token), text[work.before :]])
    pixels = torch.from_numpy(work.pixels()).permute(0, 3, 1, 2).float() * (2 / 255) - 1
    width, height = work.picture
    ids = torch.from_numpy(np.tile(ids, (work.batch, 1))).long()
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(model.dtype).expand(work.batch, *pixels.shape),
        "image_sizes": torch.tensor([[height, width]] * work.batch),
    }
    return {name: value.to(model.device) for name, value in inputs.items()}


def _measure(
    prefill: Callable[[], Any], decode: Callable[[Any], np.ndarray], rounds: int, warmup: int
) -> tuple[list[float], list[float], np.ndarray]:
    first, rest, tokens = [], [], np.zeros(0)
    for turn in range(warmup + rounds):
        start = time.perf_counter()
        state = prefill()
        middle = time.perf_counter()
        tokens = decode(state)
        end = time.perf_counter()
        if turn >= warmup:
            first.append(middle - start)
            rest.append(end - middle)
    return first, rest, tokens
