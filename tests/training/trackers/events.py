"""Reads the event files of TensorBoard: records of a length, its checksum, the event and its checksum."""

import struct

from tensorboardX.proto.event_pb2 import Event


def read_events(path):
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[12 + length + 4 :]
    return events


def values_of(folder):
    """All values of the files of a folder as (step, tag, value), in the order in which they were written."""
    events = [event for file in sorted(folder.iterdir()) for event in read_events(file)]
    return [(event.step, value.tag, value) for event in events for value in event.summary.value]
