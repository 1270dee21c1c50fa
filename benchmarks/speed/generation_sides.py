"""One side of `benchmarks.speed.generation`, as a process that waits for lines on standard input.

It prints "ready" when the model is built. For each line "run" it generates once and prints one JSON object
{"first": seconds, "decode": seconds}. At the end of its input it writes its outputs to FOLDER/SIDE.npz and prints a
last JSON object with the peak memory and the bytes of the parameters.

    first   the time from tokens and pixels in host memory to the first token in host memory
    decode  the time of the other NEW_TOKENS - 1 greedy tokens, until the last one is in host memory
"""

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
    """The side of vr_jax."""

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
        """Generates once and returns the seconds."""
        start = time.perf_counter()
        state = self.generator.prefill(self.prompts, self.new_tokens)
        np.asarray(state.tokens)
        first = time.perf_counter()
        state = self.generator.decode(state, self.new_tokens)
        self.tokens = np.asarray(state.tokens)
        return {"first": first - start, "decode": time.perf_counter() - first}

    def finish(self, logits: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The numbers and the outputs, with the first token's logits if `logits` is set."""
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
    """The side of transformers."""

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
        """The inputs, copied to the device."""
        inputs = {name: value.to(self.device) for name, value in self.inputs.items()}
        return inputs | {"pixel_values": inputs["pixel_values"].to(self.model.dtype)}

    def run(self) -> dict[str, float]:
        """Generates once and returns the seconds."""
        with self.torch.inference_mode():
            return self._generate() if self.compiled else self._loop()

    def _loop(self) -> dict[str, float]:
        """Calls the model as `generate` does, without the work of `generate` itself."""
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
        """Calls `generate` with a static cache, which compiles the decoding (but not the prefill)."""
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
        """The numbers and the outputs, with the first token's logits if `logits` is set."""
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
                    self.model.float()  # This widens the same, rounded, parameters in place.
                    arrays["reference"] = self._logits()
        return numbers, arrays

    def _logits(self) -> np.ndarray:
        return self.model(**self.on_device(), logits_to_keep=1).logits[:, -1].float().cpu().numpy()


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--side", choices=("vr_jax", "torch", "torch_compiled"), required=True)
    flags.add_argument("--size", required=True)
    flags.add_argument("--system", help="system of the paper, in place of LLaVA-OneVision")
    flags.add_argument("--dtype", required=True)
    flags.add_argument("--batch_size", type=int, required=True)
    flags.add_argument("--new_tokens", type=int, required=True)
    flags.add_argument("--folder", type=Path, required=True)
    flags.add_argument("--logits", action="store_true")
    flags.add_argument("--wrong", action="store_true", help="with wrong parameters: for the test that this is noticed")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Builds the side and answers the lines of standard input."""
    options = parser().parse_args(arguments)
    answers = sys.stdout
    sys.stdout = sys.stderr  # What a library prints must not be taken for an answer.

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
