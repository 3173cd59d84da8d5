"""The encoding of event streams, `application/vnd.amazon.eventstream`.

https://smithy.io/2.0/aws/amazon-eventstream.html
"""

import binascii
import json
import struct
from collections.abc import Mapping

from local_app.common import Json

CONTENT_TYPE = "application/vnd.amazon.eventstream"


def event(kind: str, payload: bytes, content_type: str) -> bytes:
    """Return an event of a stream as a message."""
    return _message({":message-type": "event", ":event-type": kind, ":content-type": content_type}, payload)


def exception(kind: str, content: Json) -> bytes:
    """Return an error in the middle of a stream as a message."""
    headers = {":message-type": "exception", ":exception-type": kind, ":content-type": "application/json"}
    return _message(headers, json.dumps(content).encode())


def _message(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Return one message: two lengths and their CRC, headers, payload, CRC of all."""
    encoded = b"".join(
        struct.pack("!B", len(name)) + name.encode() + b"\x07" + struct.pack("!H", len(value)) + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack("!II", 16 + len(encoded) + len(payload), len(encoded))
    message = prelude + struct.pack("!I", binascii.crc32(prelude)) + encoded + payload
    return message + struct.pack("!I", binascii.crc32(message))
