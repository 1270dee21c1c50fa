"""Measures all backends of windowed cross-attention on this machine against a copy of the same number of bytes.

    python -m benchmarks.kernels.window_attention [--rounds 20] [--json FILE]
    python -m benchmarks.kernels.window_attention --tiny
    python -m benchmarks.kernels.window_attention --compile v5e,v5p,v6e [--json FILE]

With --tiny the arrays are small, and on a CPU Pallas interprets the kernels, which only shows that they work. With
--compile the kernel for TPUs is compiled without a device (this needs libtpu), and its bytes of HBM and VMEM are
printed.

The shapes are those of Vision Remember in training: 20,480 windows of 9 keys and 24 heads in bfloat16. In the absorbed
form the keys are 3072 wide and shared by the heads; in the plain form each head has keys of width 128. The gradient is
the one that training needs. In the absorbed form it is that of the query, because the keys are the features of the
frozen encoder. In the plain form it is that of query, key and value.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import arguments
from benchmarks.timing import side_by_side
from vr_jax.errors import ConfigError
from vr_jax.kernels.window_attention import api, window_attention

BYTES = 2  # A number in bfloat16 takes two bytes.
NO_WORSE = 2.0  # The error of a kernel may be at most this many times that of the reference.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclass(frozen=True)
class Problem:
    """One form of the attention at one size.

    Attributes:
        form: "absorbed" or "plain".
        windows: Number of windows, each with one query per head.
        keys: Keys of a window.
        heads: Number of heads.
        width: Width of a head.
        heads_first: Whether absorbed queries lie in memory as (H, W, d), which is how XLA writes them on a TPU.
    """

    form: str
    windows: int = 20480
    keys: int = 9
    heads: int = 24
    width: int = 3072
    heads_first: bool = False

    @property
    def absorbed(self) -> bool:
        """Whether the keys are shared by the heads and serve as values too."""
        return self.form == "absorbed"

    @property
    def row_numbers(self) -> int:
        """The size of the query, and of the result, in numbers."""
        return self.windows * self.heads * self.width

    @property
    def key_numbers(self) -> int:
        """The size of keys and values in numbers; the absorbed form has one array for both, the plain form two."""
        return self.windows * self.keys * self.width * (1 if self.absorbed else 2 * self.heads)

    @property
    def floor(self) -> dict[str, int]:
        """The bytes that the forward pass and the gradient must move at least."""
        rows, keys = BYTES * self.row_numbers, BYTES * self.key_numbers
        return {"forward": 2 * rows + keys, "gradient": 3 * rows + keys * (1 if self.absorbed else 2)}

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of query, key, value and gradient, as they lie in memory.

        The value is empty in the absorbed form, where the keys are the values.
        """
        w, s, h, d = self.windows, self.keys, self.heads, self.width
        query = (h, w, d) if self.absorbed and self.heads_first else (w, h * d)
        key = (w * s, d if self.absorbed else h * d)
        return [query, key, (0,) if self.absorbed else key, query]

    def _query(self, x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1) if x.ndim == 3 else x.reshape(self.windows, self.heads, self.width)

    def _key(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.windows, self.keys, -1, self.width)

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        key = self._key(key)
        value = key if self.absorbed else self._key(value)
        out = window_attention(self._query(query), key, value, **options)
        return out.swapaxes(0, 1) if query.ndim == 3 else out.reshape(query.shape)

    def function(self, part: str, **options: Any) -> Callable:
        """The function to measure.

        Args:
            part: "forward" or "gradient".
            **options: Further arguments of `window_attention`, such as the backend.

        Returns:
            A function of the four arrays of `shapes`.
        """
        attend = functools.partial(self._attend, **options)
        if part == "forward":
            return lambda query, key, value, grad: attend(query, key, value)
        if self.absorbed:
            return lambda query, key, value, grad: jax.vjp(lambda q: attend(q, key, value), query)[1](grad)
        return lambda query, key, value, grad: jax.vjp(attend, query, key, value)[1](grad)

    def first(self, windows: int, arrays: Sequence[jax.Array]) -> tuple[Problem, list[jax.Array]]:
        """Cuts the problem and its arrays to the first windows, and converts the arrays to float32."""
        small = dataclasses.replace(self, windows=min(windows, self.windows))

        def cut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return x[tuple(slice(n) for n in shape)].astype(jnp.float32)

        return small, [cut(x, shape) for x, shape in zip(arrays, small.shapes(), strict=True)]


def problems(tiny: bool, heads_first: bool) -> list[Problem]:
    """The absorbed and the plain form, at the size of training or at a tiny one."""
    if tiny:
        absorbed = Problem("absorbed", windows=19, heads=2, width=256, heads_first=heads_first)
    else:
        absorbed = Problem("absorbed", heads_first=heads_first)
    return [absorbed, dataclasses.replace(absorbed, form="plain", width=128)]


def window_attention_report(rounds: int = 20, *, tiny: bool = False) -> dict[str, Any]:
    """Measures every backend that runs here, in both forms, for the forward pass and the gradient.

    Args:
        rounds: Timed calls of each backend.
        tiny: Whether the arrays are small.

    Returns:
        The device, the version of jax, and one entry for each form and pass. An entry holds for each backend:
        `of_copy`, which is the time of a copy of as many bytes divided by that of the backend, so that 1 is the limit
        of the memory; `seconds` (median, lowest, highest); `gigabytes_per_second`; and `error`, the largest error
        relative to the largest number. Where a backend has no times, `refused` or `failed` holds the reason.
    """
    platform = jax.default_backend()
    interpret = platform == "cpu"
    # Short calls are given to the device in a row, so that the time to hand one over does not count.
    repeats = {"gpu": 8, "tpu": 2}.get(platform, 1)
    results = []
    for problem in problems(tiny, heads_first=platform == "tpu"):
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, problem.shapes(), strict=True)]
        for part, floor in problem.floor.items():
            results.append(_compare(problem, part, floor, arrays, rounds, repeats, interpret))
    device = jax.devices()[0].device_kind
    return {"device": device, "jax": jax.__version__, "interpreted": interpret, "window_attention": results}


def _compare(
    problem: Problem, part: str, floor: int, arrays: list[jax.Array], rounds: int, repeats: int, interpret: bool
) -> dict[str, Any]:
    """Measures all backends at one pass of one problem."""
    small, exact_arrays = problem.first(64, arrays)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(small.function(part, backend="reference"))(*exact_arrays)
    half = jnp.ones(floor // 2 // BYTES, jnp.bfloat16)
    negate = jax.jit(jnp.negative)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: negate(half)}
    backends: dict[str, dict[str, Any]] = {}
    for name in api.BACKENDS:
        if name != "reference" and not interpret and api.KERNELS[name] != jax.default_backend():
            continue
        run = jax.jit(problem.function(part, backend=name, interpret=interpret))
        try:
            found = jax.block_until_ready(run(*arrays))
        except ConfigError as error:
            backends[name] = {"refused": str(error)}
            continue
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            # The other backends are measured all the same.
            backends[name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
            continue
        error = _error(found, exact)
        allowed = NO_WORSE * backends["reference"]["error"] if name != "reference" else error
        backends[name] = {"error": error, "agrees": error <= allowed}
        calls[name] = functools.partial(run, *arrays)
    timings = side_by_side({k: functools.partial(_repeat, call, repeats) for k, call in calls.items()}, rounds=rounds)
    for name in calls:
        if name == "copy":
            continue
        timing = timings[name]
        backends[name] |= {
            "of_copy": timings["copy"].median / timing.median,
            "seconds": [x / repeats for x in (timing.median, timing.low, timing.high)],
            "gigabytes_per_second": floor / 1e9 / (timing.median / repeats),
        }
    return {
        **dataclasses.asdict(problem),
        "part": part,
        "floor_bytes": floor,
        "copy_gigabytes_per_second": floor / 1e9 / (timings["copy"].median / repeats),
        "backends": backends,
    }


def _repeat(call: Callable[[], object], times: int) -> object:
    """Calls a function several times and returns the last result."""
    result = None
    for _ in range(times):
        result = call()
    return result


def _error(found: Any, exact: Any) -> float:
    """The largest relative error of the windows that `exact` holds, which are the first ones."""
    errors = []
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        if other.size:
            part = one[tuple(slice(n) for n in other.shape)].astype(jnp.float32)
            errors.append(float(jnp.max(jnp.abs(part - other)) / jnp.max(jnp.abs(other))))
    return max(errors)


def text(report: dict[str, Any]) -> str:
    """The report of `window_attention_report` as text."""
    lines = [f"{report['device']}, jax {report['jax']}" + (", interpreted: no times" if report["interpreted"] else "")]
    for one in report["window_attention"]:
        size = f"{one['windows']} windows, {one['keys']} keys, {one['heads']} heads, {one['width']} wide"
        lines.append(f"{one['form']}, {one['part']}: {size}; {one['floor_bytes'] / 1e9:.3g} GB")
        for name, found in one["backends"].items():
            if "seconds" not in found:
                lines.append(f"  {name:<11} {found}")
                continue
            median, low, high = (x * 1e3 for x in found["seconds"])
            lines.append(
                f"  {name:<11} {found['of_copy']:5.2f} of a copy  {median:8.3f} ms ({low:.3f} .. {high:.3f})  "
                f"{found['gigabytes_per_second']:7.0f} GB/s  error {found['error']:.1e}"
            )
    return "\n".join(lines)


def compiled_bytes(generations: Sequence[str], windows: int = 20480) -> list[dict[str, Any]]:
    """Compiles the TPU kernel with no device and reads the memory that it takes from the program.

    The arrays lie in memory as the products of the model write them. Where libtpu is absent, JAX's error is raised.

    Args:
        generations: Names of `TOPOLOGIES`.
        windows: Number of windows.

    Returns:
        One entry for each generation, form and pass, with the bytes of HBM for arguments and results, of HBM for
        temporaries, and of VMEM.

    Raises:
        ValueError: A generation is unknown.
    """
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    unknown = sorted(set(generations) - set(TOPOLOGIES))
    if unknown:
        raise ValueError(f"TPU generations {unknown}: expected some of {sorted(TOPOLOGIES)}")
    found = []
    for generation in generations:
        topology = topologies.get_topology_desc(TOPOLOGIES[generation], "tpu")
        mesh = Mesh(np.array(topology.devices[:1]), ("all",))
        where = NamedSharding(mesh, PartitionSpec())
        for problem in problems(tiny=False, heads_first=True):
            problem = dataclasses.replace(problem, windows=windows)
            arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=where) for s in problem.shapes()]
            for part, floor in problem.floor.items():
                with jax.set_mesh(mesh):
                    run = jax.jit(problem.function(part, backend="pallas_tpu"))
                    compiled = run.lower(*arrays).compile()
                memory = compiled.memory_analysis()
                found.append(
                    {
                        "generation": generation,
                        "form": problem.form,
                        "part": part,
                        "floor_bytes": floor,
                        "hbm_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes,
                        "temporary_bytes": memory.temp_size_in_bytes,
                        "vmem_bytes": _vmem(compiled.as_text()),
                    }
                )
    return found


def _vmem(program: str) -> int:
    """The bytes of VMEM that the kernel takes in a compiled program."""
    (call,) = [line for line in program.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', call)
    assert used is not None, f"no VMEM in {call}"
    return int(used[1])


def compiled_text(found: list[dict[str, Any]]) -> str:
    """The result of `compiled_bytes` as a table."""
    lines = [f"{'':<24}{'floor':>10}{'arguments, results':>20}{'temporaries':>13}{'VMEM':>11}"]
    for one in found:
        gigabytes = [one[name] / 1e9 for name in ("floor_bytes", "hbm_bytes", "temporary_bytes")]
        name = f"{one['generation']} {one['form']} {one['part']}"
        lines.append(f"{name:<24}{gigabytes[0]:7.3f} GB{gigabytes[1]:17.3f} GB{gigabytes[2]:10.3f} GB{_mib(one):>11}")
    return "\n".join(lines)


def _mib(one: dict[str, Any]) -> str:
    return f"{one['vmem_bytes'] / 2**20:.1f} MiB"


def wrong(report: dict[str, Any]) -> list[str]:
    """Lists the kernels that failed, or whose results differ from those of the reference.

    The times of such kernels mean nothing.
    """
    return [
        f"{case['form']}, {case['part']}: {name} {found.get('failed', 'DIFFERS from the reference')}"
        for case in report.get("window_attention", [])
        for name, found in case["backends"].items()
        if "failed" in found or not found.get("agrees", True)
    ]


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=20, help="timed calls of each backend")
    flags.add_argument("--tiny", action="store_true", help="small arrays; on a CPU the kernels are interpreted")
    flags.add_argument("--compile", metavar="NAMES", help=f"no device: compile for TPUs, of {', '.join(TOPOLOGIES)}")
    flags.add_argument("--json", type=arguments.path, help="also write the numbers to this file")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Measures or compiles the kernels and prints the result."""
    options = parser().parse_args(arguments)
    if options.compile:
        from vr_jax.plan.topology import prepare_process

        prepare_process(next(iter(TOPOLOGIES.values())))
        found = compiled_bytes(options.compile.split(","))
        report, shown = {"compiled": found}, compiled_text(found)
    elif jax.default_backend() == "cpu" and not options.tiny:
        sys.exit(
            "benchmarks.kernels.window_attention: the full size needs a GPU or a TPU, and this machine has a CPU only; "
            "use --tiny or --compile"
        )
    else:
        report = window_attention_report(options.rounds, tiny=options.tiny)
        shown = text(report)
    print(shown)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    for line in wrong(report):
        print(line, file=sys.stderr)
    return 1 if wrong(report) else 0


if __name__ == "__main__":
    sys.exit(main())
