"""Peak host memory of an import: the result, one shard, and a bounded rest; never the checkpoint a second time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.convert.conftest import TEXT
from vr_jax.convert.decoder_configs import QWEN2_FAMILY, read_decoder
from vr_jax.convert.formats import DECODER_FORMATS
from vr_jax.convert.importing import abstract_params
from vr_jax.convert.tables import slots
from vr_jax.convert.weights import write_safetensors

MIB = 2**20
# Run in a process of its own: its peak is counted from just before the import.
MEASURE = """
import resource, sys
import psutil
from vr_jax.cli.main import main
import jax, torch, transformers, vr_jax.convert.importing
jax.config.update("jax_platforms", "cpu")
jax.numpy.zeros(1)
transformers.Qwen2Config()
before = psutil.Process().memory_info().rss
assert main(["convert", "import", "--from", sys.argv[1], "--to", sys.argv[2]]) == 0
print("extra bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


def write_synthetic(directory: Path, text: dict, shard_bytes: int) -> int:
    """A bf16 Qwen2 checkpoint of noise (which does not compress); its size in bytes."""
    directory.mkdir()
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **text}
    (directory / "config.json").write_text(json.dumps(config))
    shapes = abstract_params({"decoder": read_decoder(QWEN2_FAMILY, config, directory).to_dict()})
    places = slots(DECODER_FORMATS[0].table(["decoder"], {}), shapes)
    rng = np.random.default_rng(0)

    def noise(name: str) -> np.ndarray:
        count = int(np.prod(places[name].shape))
        bits = rng.integers(0, 2**14, count, dtype=np.uint16)  # exponents below infinity
        return bits.view(ml_dtypes.bfloat16).reshape(places[name].shape)

    sizes = {name: 2 * int(np.prod(slot.shape)) for name, slot in places.items()}
    write_safetensors(directory, sizes, noise, shard_bytes)
    return sum(sizes.values())


def measure(source: Path, target: Path) -> int:
    command = [sys.executable, "-c", MEASURE, str(source), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    return int(result.stdout.split("extra bytes")[1])


@pytest.mark.slow  # it writes and converts checkpoints of hundreds of megabytes
def test_peak_is_the_result_and_one_shard(tmp_path):
    """A loader that collects the tensors before stacking them needs twice the result here, and fails."""
    text = {**TEXT, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 42, "vocab_size": 32000}
    text["num_attention_heads"] = 16
    shard = 128 * MIB
    result = write_synthetic(tmp_path / "hf", text, shard)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 5
    extra = measure(tmp_path / "hf", tmp_path / "ours")
    print(f"result {result / MIB:.0f} MiB, peak {extra / MIB:.0f} MiB")
    assert extra >= result  # else the measurement is wrong
    # The promise; the result is larger than its slack, so that a second copy cannot hide in it.
    assert extra <= result + shard + 1024 * MIB
    assert result > shard + 1024 * MIB
