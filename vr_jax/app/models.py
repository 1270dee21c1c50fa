"""The checkpoints of the page, and the one thread that runs them.

A page is served by many threads, and the steps of one streamed answer may run in different ones. JAX keeps the mesh of
`jax.set_mesh` for each thread. So everything that touches the devices runs in one thread, one question after another,
which also keeps the measured times free of each other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import jax
from jax.sharding import Mesh

from vr_jax.app.contract import Loader, Variant
from vr_jax.data.processor import Processor
from vr_jax.inference import Generator

SECONDS_TO_END = 5.0  # how long `close` waits for the step that runs


@dataclass(frozen=True)
class _Held:
    """A checkpoint in the memory of the devices."""

    variant: Variant
    generator: Generator
    processor: Processor
    mesh: Mesh | None


class Models:
    """The checkpoints, each loaded in one variant at a time."""

    def __init__(self, loaders: Sequence[Loader]):
        """Loads nothing yet.

        Args:
            loaders: One for each checkpoint.
        """
        self._loaders = tuple(loaders)
        self._held: dict[int, _Held] = {}

    def __len__(self) -> int:
        """Returns the number of checkpoints."""
        return len(self._loaders)

    @contextlib.contextmanager
    def use(self, number: int, variant: Variant) -> Iterator[tuple[Generator, Processor]]:
        """Runs a block with a checkpoint under its mesh, and loads it where it is not loaded in this way.

        Args:
            number: The number of the checkpoint.
            variant: How it is loaded. Another variant of it is dropped first.

        Raises:
            UserError: The checkpoint cannot be loaded in this way.
        """
        if number not in self._held or self._held[number].variant != variant:
            self._held.pop(number, None)  # the memory may not suffice for both
            with self._loaders[number](variant) as (generator, processor):
                mesh = jax.sharding.get_mesh()
                concrete = mesh if isinstance(mesh, Mesh) and not mesh.empty else None
                self._held[number] = _Held(variant, generator, processor, concrete)
        held = self._held[number]
        with contextlib.nullcontext() if held.mesh is None else jax.set_mesh(held.mesh):
            yield held.generator, held.processor


_END = object()


@dataclass(frozen=True)
class _Task:
    """A job, what came out of it, and whether anybody still waits for it."""

    job: Callable[[Models], Iterator[Any]]
    results: SimpleQueue[tuple[Any, BaseException | None]] = field(default_factory=SimpleQueue)
    left: threading.Event = field(default_factory=threading.Event)


class ModelThread:
    """A thread that runs jobs with the checkpoints one after another."""

    def __init__(self, loaders: Sequence[Loader]):
        """Starts the thread.

        Args:
            loaders: One for each checkpoint.
        """
        self.count = len(loaders)
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        models = Models(loaders)
        # An interpreter that ends does not wait for a daemon thread, nor for a long answer.
        self._thread = threading.Thread(target=self._work, args=(models,), name="vr-jax-models", daemon=True)
        self._thread.start()

    def run[T](self, job: Callable[[Models], Iterator[T]]) -> Iterator[T]:
        """Runs a job in the thread, after those before it, and yields what it yields.

        Args:
            job: Is called with the checkpoints. A job that nobody reads any more ends after its current step.

        Raises:
            Exception: What the job raised.
        """
        task = _Task(job)
        self._tasks.put(task)
        try:
            while True:
                value, error = task.results.get()
                if error is not None:
                    raise error
                if value is _END:
                    return
                yield value
        finally:
            task.left.set()

    def close(self) -> None:
        """Ends the thread after the job that runs."""
        self._tasks.put(None)
        self._thread.join(SECONDS_TO_END)

    def _work(self, models: Models) -> None:
        while (task := self._tasks.get()) is not None:
            if task.left.is_set():
                continue
            try:
                with contextlib.closing(task.job(models)) as steps:  # type: ignore[type-var]
                    for value in steps:
                        if task.left.is_set():
                            break
                        task.results.put((value, None))
                task.results.put((_END, None))
            except BaseException as error:
                task.results.put((None, error))
