"""A run continues on another number of processes, or with other weights of its sources.

Each process takes every P-th position of one sequence of samples (`vr_jax.data.mixture`), and its state says how far it
is. The states of all processes together therefore say which samples of the sequence nobody has given to a batch yet:
those that wait in the packers, those that an earlier change left over, and those of the slower processes before the
position that the fastest one has reached. These are dealt to the new processes first. Then the new processes take turns
from that position on, so that every sample comes once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vr_jax.data.mixture import Mixture, OwnPlaces, Place
from vr_jax.errors import UserError

STATE_VERSION = 3


def check_state(state: dict[str, Any], identity: dict[str, Any], *, allow_other_weights: bool) -> bool:
    """Makes sure that a saved state belongs to the same sequence of samples and the same batches.

    Args:
        state: The saved state of a process.
        identity: What the sequence and the batches are now, JSON-safe.
        allow_other_weights: Whether the weights or shares of the sources may be others than before.

    Returns:
        Whether the weights or shares differ.

    Raises:
        UserError: They are others; the message names what differs.
    """
    if state.get("version") != STATE_VERSION:
        raise UserError(
            f"The saved state of the data iterator has version {state.get('version')}, but this program reads version "
            f"{STATE_VERSION}; start the run anew."
        )
    saved = state["identity"]
    differing = [name for name in sorted({*saved, *identity}) if saved.get(name) != identity.get(name)]
    if differing == ["counts"] and None not in (saved["counts"], identity["counts"]):
        if allow_other_weights:
            return True
        raise UserError(
            f"The weights or shares of the sources are others than those of the saved state: an epoch had "
            f"{saved['counts']} samples of them, now {identity['counts']}; config.data.allow_other_weights=True "
            "continues each source from where it is."
        )
    if differing:
        named = "; ".join(f"{name}: saved {saved.get(name)!r}, now {identity.get(name)!r}" for name in differing)
        raise UserError(
            f"The saved state of the data iterator belongs to other settings ({named}); restore these settings, or "
            "start the run anew."
        )
    return False


def places_of(state: dict[str, Any], mixture: Mixture, end: int | None) -> OwnPlaces:
    """Returns the places that the process of a saved state reads.

    Args:
        state: The saved state.
        mixture: The sequence as the settings have it, from its beginning.
        end: The number of samples of the sequence, or None.
    """
    counts = state["identity"]["counts"]
    return OwnPlaces(
        mixture=Mixture(
            counts=mixture.counts if counts is None else tuple(counts),
            first=tuple(state["first"]),
            seed=mixture.seed,
            shuffle=mixture.shuffle,
        ),
        left=_places(state["left"]),
        base=state["base"],
        process_index=state["process"][0],
        process_count=state["process"][1],
        end=end,
    )


def dealt(
    states: Sequence[dict[str, Any]],
    mixture: Mixture,
    identity: dict[str, Any],
    *,
    process_index: int,
    process_count: int,
    reweighted: bool,
) -> dict[str, Any]:
    """Returns the state with which a process continues after a change of the number of processes or of the weights.

    Args:
        states: The states of all processes when the run was saved, in their order.
        mixture: The sequence as the settings have it now, from its beginning.
        identity: What the sequence and the batches are now, which `check_state` has compared with the states.
        process_index: The index of the process that continues.
        process_count: The number of processes that continue.
        reweighted: Whether the weights or shares of the sources are others than before. Each source then goes on from
            the first sample of its own that has not been dealt, and an epoch of the new weights begins.

    Returns:
        A state of the process that continues.

    Raises:
        UserError: The states do not belong together, or the weights of a finite sequence changed.
    """
    end = identity["end"]
    owns = [places_of(state, mixture, end) for state in states]
    if any(
        own.process_index != index or own.process_count != len(states) or own.base != owns[0].base
        for index, own in enumerate(owns)
    ):
        raise UserError("The saved states of the data iterators do not belong together; start the run anew.")
    old, base = owns[0].mixture, owns[0].base
    turns = [max(0, state["next"] - len(own.left)) for state, own in zip(states, owns, strict=True)]
    reached = max([base, *(own.position(turn - 1) + 1 for own, turn in zip(owns, turns, strict=True) if turn)])
    if reweighted:
        if end is not None:
            raise UserError("The weights of the sources of a finite sequence cannot change; start it anew.")
        reached = old.window_end(reached)
    unread = [
        position
        for own, turn in zip(owns, turns, strict=True)
        for position in range(own.position(turn), reached, own.process_count)
    ]
    pending = [_places(state["pending"]) for state in states]
    left = [own.left[state["next"] :] for state, own in zip(states, owns, strict=True)]
    places = [*_alternating(pending), *_alternating(left), *(old.place(position) for position in sorted(unread))]
    first = process_index == 0
    counts: Counter[str] = Counter()
    for state in states:
        counts.update(state["skips"]["counts"])
    used = sum(state["skips"]["used"] - len(state["pending"]) for state in states)
    return {
        "version": STATE_VERSION,
        "process": [process_index, process_count],
        "first": list(old.behind(reached) if reweighted else old.first),
        "base": 0 if reweighted else reached,
        "left": places[process_index::process_count],
        "next": 0,
        "pending": [],
        # The first process continues the counts of all. A sample that waited counts as used when it is dealt again.
        "skips": {"used": used if first else 0, "counts": dict(counts) if first else {}, "epoch": [0, 0]},
        "identity": identity,
    }


def _places(values: Sequence[Sequence[int]]) -> tuple[Place, ...]:
    return tuple((int(stream), int(index)) for stream, index in values)


def _alternating(parts: Sequence[Sequence[Place]]) -> list[Place]:
    """The elements of several sequences in turns, so that those that waited longest stay in front."""
    longest = max(map(len, parts), default=0)
    return [part[k] for k in range(longest) for part in parts if k < len(part)]
