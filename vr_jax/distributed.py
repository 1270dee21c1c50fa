"""Values shared between the processes of a multi-host evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vr_jax.evaluation.types import EvaluationError


def all_gather[Value](value: Value) -> list[Value]:
    """The JSON-safe `value` of every process, by process index. All processes call it together."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int64(len(data)))).reshape(-1)
    padded = np.pad(data, (0, int(lengths.max()) - len(data)))
    gathered: Any = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(gathered, lengths, strict=True)]


def together[Value](call: Callable[[], Value]) -> Value:
    """What `call` returns on each process; if it fails on one, it fails on all, so that none waits for another.

    Raises EvaluationError where it was one, or an OSError, on any process; another ValueError as it is (a text for the
    user too); RuntimeError where another process failed unexpectedly."""
    value: Any = None
    failure: Exception | None = None
    try:
        value = call()
    except OSError as error:
        failure = EvaluationError(str(error))
        failure.__cause__ = error
    except Exception as error:
        failure = error
    known = isinstance(failure, EvaluationError)
    outcomes = all_gather(None if failure is None else [known, f"{failure}" or type(failure).__name__])
    if failure is not None:
        raise failure
    for process, outcome in enumerate(outcomes):
        if outcome is not None:
            expected, text = outcome
            raise EvaluationError(text) if expected else RuntimeError(f"process {process} failed: {text}")
    return value
