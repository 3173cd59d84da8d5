"""How much memory a Parquet file asks for, by the headers of its pages: what the reader itself only says by taking it.

A page is unpacked as a whole, and a few kilobytes can hold a page of gigabytes. The headers are Thrift structures in the
compact protocol (https://parquet.apache.org/docs/file-format/, https://github.com/apache/thrift/blob/master/doc/specs/
thrift-compact-protocol.md); of these only the sizes are needed, so no library that reads all of Parquet is.
"""

import io
import os
from typing import Any

# Of a page's header. Most have a few bytes; some writers put the least and the greatest value into it.
_HEADER_BYTES = (4096, 32 * 1024**2)
_BINARY, _LIST, _SET, _MAP, _STRUCT = 8, 9, 10, 11, 12
_FIXED = {1: 0, 2: 0, 3: 1, 7: 8}  # bytes of values that are not varints: booleans, a byte, a double


def largest_page(file: io.BufferedReader) -> int:
    """Return the unpacked bytes of the largest page; leave the file at its start.

    Raises ValueError when the file's structure is not Parquet's.
    """
    try:
        footer = _footer(file)
        size, largest = file.seek(0, os.SEEK_END), 0
        for group in footer[4]:
            for chunk in group[1]:
                column = chunk[3]
                at = min(column[9], column.get(11, column[9]))  # data_page_offset, dictionary_page_offset
                end = at + column[7]  # total_compressed_size
                if at < 0 or end > size:
                    raise ValueError("a column lies outside of the file")
                while at < end:
                    unpacked, after = _page(file, at)
                    largest, at = max(largest, unpacked), after
        file.seek(0)
        return largest
    except (IndexError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("its structure is broken") from error


def _footer(file: io.BufferedReader) -> dict[int, Any]:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length > size - 8:
        raise ValueError("it has no footer: it may have been cut off")
    file.seek(size - 8 - length)
    return _Compact(file.read(length)).struct()


def _page(file: io.BufferedReader, at: int) -> tuple[int, int]:
    """Return the unpacked size of the page at an offset, and the offset of what follows it."""
    for limit in _HEADER_BYTES:
        file.seek(at)
        reader = _Compact(file.read(limit))
        try:
            header = reader.struct()
        except IndexError:
            continue
        if header[2] < 0 or header[3] < 0:
            raise ValueError("a page has a negative size")
        return header[2], at + reader.at + header[3]
    raise ValueError("a page's header does not end")


class _Compact:
    """Reads Thrift's compact protocol. Running over the end is an IndexError."""

    def __init__(self, raw: bytes):
        self._raw = raw
        self.at = 0

    def struct(self) -> dict[int, Any]:
        """Read a structure: its fields' values by their ids."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15)
        return fields

    def _byte(self) -> int:
        self.at += 1
        return self._raw[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._raw):
            raise IndexError

    def _value(self, kind: int, in_list: bool = False) -> Any:
        if kind in _FIXED:
            return self._skip(1 if in_list and kind <= 2 else _FIXED[kind])  # in a list a boolean is a byte
        if kind == _BINARY:
            return self._skip(self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            return [self._value(head & 15, in_list=True) for _ in range(count)]
        if kind == _MAP:
            if count := self._varint():
                kinds = self._byte()
                for _ in range(count):
                    self._value(kinds >> 4, in_list=True)
                    self._value(kinds & 15, in_list=True)
            return None
        return self.struct() if kind == _STRUCT else self._integer()
