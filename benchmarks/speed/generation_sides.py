"""The sides of `benchmarks.speed.generation`, each in its own process that waits for "run" lines on standard input.

Each answers "ready", then one JSON line {"first": s, "decode": s} for each "run", and at the end of its input writes
what it computed to FOLDER/<side>.npz and its last JSON line: peak memory, parameters' bytes.

    first   from tokens and pixels in host memory to the first token in host memory
    decode  the greedy tokens behind the first, NEW_TOKENS - 1 of them, to the last in host memory"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


class OurSide:
    def __init__(self, options: argparse.Namespace):
        import jax

        from benchmarks.speed.onevision import Prompt, onevision, our_model, systems
        from vr_jax.inference import Generator, PromptBatch

        self.jax, self.new_tokens = jax, options.new_tokens
        config = (
            onevision(options.size, options.dtype)
            if options.system is None
            else (systems(options.size == "tiny")[options.system])
        )
        self.model = our_model(config, wrong=options.wrong)
        stops = {"<|im_end|>": config.decoder.vocab_size - 1}
        self.generator = Generator(self.model, SimpleNamespace(get_vocab=lambda: stops), ignore_stop=True)
        batch = Prompt(config, options.batch_size).batch()
        numbers = np.arange(options.batch_size, dtype=np.int32)
        self.prompts = PromptBatch(batch, numbers, None)
        self.tokens: Any = None

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        state = self.generator.prefill(self.prompts, self.new_tokens)
        np.asarray(state.tokens)
        first = time.perf_counter()
        state = self.generator.decode(state, self.new_tokens)
        self.tokens = np.asarray(state.tokens)
        return {"first": first - start, "decode": time.perf_counter() - first}

    def finish(self, logits: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        stats = self.jax.devices()[0].memory_stats() or {}
        numbers = {
            "peak_bytes": stats.get("peak_bytes_in_use"),
            "parameter_bytes": sum(leaf.nbytes for leaf in self.jax.tree.leaves(self.model)),
            "device": self.jax.devices()[0].device_kind,
        }
        arrays = {"tokens": self.tokens}
        if logits:

            def last(model, batch):
                hidden, _ = model(batch)
                return model.logits(hidden[:, -1])

            arrays["logits"] = np.asarray(self.jax.jit(last)(self.model, self.prompts.batch))
        return numbers, arrays


class TorchSide:
    def __init__(self, options: argparse.Namespace):
        import torch

        from benchmarks.speed.onevision import Prompt, onevision, torch_model

        self.torch, self.new_tokens, self.compiled = torch, options.new_tokens, options.side == "torch_compiled"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = onevision(options.size, options.dtype)
        self.model, image_token = torch_model(config, torch, self.device)
        self.inputs = Prompt(config, options.batch_size).torch_inputs(image_token, torch)
        self.tokens: Any = None

    def on_device(self) -> dict[str, Any]:
        inputs = {name: value.to(self.device) for name, value in self.inputs.items()}
        return inputs | {"pixel_values": inputs["pixel_values"].to(self.model.dtype)}

    def run(self) -> dict[str, float]:
        with self.torch.inference_mode():
            return self._generate() if self.compiled else self._loop()

    def _loop(self) -> dict[str, float]:
        """The forward passes of `generate` without what it does around them."""
        start = time.perf_counter()
        out = self.model(**self.on_device(), use_cache=True, logits_to_keep=1)
        newest = out.logits[:, -1:].argmax(-1)
        newest.cpu()
        first = time.perf_counter()
        tokens = [newest]
        for _ in range(self.new_tokens - 1):
            out = self.model(input_ids=newest, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            newest = out.logits[:, -1:].argmax(-1)
            tokens.append(newest)
        self.tokens = self.torch.cat(tokens, 1).cpu().numpy()
        return {"first": first - start, "decode": time.perf_counter() - first}

    def _generate(self) -> dict[str, float]:
        """transformers' own way to torch.compile: `generate` with a static cache. Its prefill is not compiled."""
        seconds = []
        for count in (1, self.new_tokens):
            start = time.perf_counter()
            out = self.model.generate(
                **self.on_device(),
                attention_mask=self.torch.ones_like(self.inputs["input_ids"]).to(self.device),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
            )
            self.tokens = out[:, -count:].cpu().numpy()
            seconds.append(time.perf_counter() - start)
        return {"first": seconds[0], "decode": seconds[1] - seconds[0]}

    def finish(self, logits: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        on_gpu = self.device == "cuda"
        numbers = {
            "peak_bytes": self.torch.cuda.max_memory_allocated() if on_gpu else None,
            "parameter_bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()),
            "device": self.torch.cuda.get_device_name() if on_gpu else "cpu",
        }
        arrays = {"tokens": self.tokens}
        if logits:
            with self.torch.inference_mode():
                arrays["logits"] = self._logits()
                if self.model.dtype != self.torch.float32:
                    self.model.float()  # in place: the same, rounded, parameters
                    arrays["reference"] = self._logits()
        return numbers, arrays

    def _logits(self) -> np.ndarray:
        return self.model(**self.on_device(), logits_to_keep=1).logits[:, -1].float().cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("vr_jax", "torch", "torch_compiled"), required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--system", help="of the paper, in place of LLaVA-OneVision")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--new_tokens", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--logits", action="store_true")
    parser.add_argument("--wrong", action="store_true", help="with wrong parameters: for the test that this is noticed")
    options = parser.parse_args()
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no answer

    def answer(line: Any) -> None:
        print(json.dumps(line), file=answers, flush=True)

    side = OurSide(options) if options.side == "vr_jax" else TorchSide(options)
    answer("ready")
    for line in sys.stdin:
        if line.strip() != "run":
            break
        answer(side.run())
    numbers, arrays = side.finish(options.logits)
    np.savez(options.folder / f"{options.side}.npz", **arrays)
    answer(numbers)


if __name__ == "__main__":
    main()
