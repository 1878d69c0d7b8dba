# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Messages that a teacher's server must survive: seeded, by the way they are wrong.

The well-formed request that they distort is ``{"observation/image": uint8 [2, 8, 8, 3],
"prompt": "push the cube"}``. ``malformed_frames`` yields frames to send within a
connection, ``broken_streams`` bytes that break the connection itself.
"""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgpack
import numpy as np

IMAGE, PROMPT = "observation/image", "prompt"


class Frame(NamedTuple):
    """One message: ``data`` is sent as a binary frame, or as text if it is a str.

    ``closes`` is the code with which the server ends the connection; None where it must
    answer with an error and stay.
    """

    kind: str
    data: bytes | str
    closes: int | None = None


def _array(rng: random.Random, **lies: Any) -> dict[bytes, Any]:
    """An image as openpi-client writes it, with some entries replaced."""
    true = {
        b"__ndarray__": True,
        b"data": rng.randbytes(2 * 8 * 8 * 3),
        b"dtype": "|u1",
        b"shape": [2, 8, 8, 3],
    }
    true.update({name.encode(): value for name, value in lies.items()})
    return {name: value for name, value in true.items() if value is not _LEFT_OUT}


_LEFT_OUT = object()


def _request(rng: random.Random, **changes: Any) -> dict[str, Any]:
    return {IMAGE: _array(rng), PROMPT: "push the cube", **changes}


def _real(rng: random.Random, dtype: str, shape: list[int]) -> dict[bytes, Any]:
    """An array that is what it says."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = bytes(size) if "b" in dtype else rng.randbytes(size)
    return _array(rng, data=data, dtype=dtype, shape=shape)


def garbage(rng: random.Random, limit: int) -> bytes:
    """Random bytes, of any length, the empty message included."""
    data = rng.randbytes(rng.choice([0, 1, 2, 7, 64, 1024]))
    # (a map of text keys would be looked at more closely: 0x80 is the empty one)
    return b"\xc1" + data if data[:1] and 0x80 <= data[0] <= 0x8F else data


def truncated(rng: random.Random, limit: int) -> bytes:
    """A well-formed request that stops too early."""
    whole = msgpack.packb(_request(rng))
    return whole[: rng.randrange(len(whole))]


def trailing(rng: random.Random, limit: int) -> bytes:
    """A well-formed request with something behind it."""
    return msgpack.packb(_request(rng)) + rng.randbytes(rng.randint(1, 16))


def no_map(rng: random.Random, limit: int) -> bytes:
    """Well-formed msgpack that is no map with text as its keys."""
    return msgpack.packb(
        rng.choice(
            [
                *(None, True, 7, -1.5, "text", b"bytes", [], [1, 2], {}, {b"a": 1}),
                *(_array(rng), {PROMPT.encode(): "push"}),
            ]
        )
    )


def missing_keys(rng: random.Random, limit: int) -> bytes:
    """Without the image or the instruction, or under other names."""
    request = _request(rng)
    name = rng.choice([IMAGE, PROMPT])
    value = request.pop(name)
    if rng.random() < 0.5:
        request[rng.choice([name.upper(), f"/{name}", f"{name} ", ""])] = value
    return msgpack.packb(request)


def wrong_shape(rng: random.Random, limit: int) -> bytes:
    """Arrays that are what they say, but no images."""
    shapes = [[], [0], [192], [2, 8, 8], [2, 8, 8, 4], [2, 3, 8, 8], [0, 8, 8, 3]]
    shapes += [[2, 0, 8, 3], [1, 2, 8, 8, 3], [1] * 8, [8, 8, 1]]
    return msgpack.packb(
        _request(rng, **{IMAGE: _real(rng, "|u1", rng.choice(shapes))})
    )


def wrong_dtype(rng: random.Random, limit: int) -> bytes:
    """Numbers of another type than images have."""
    dtype = rng.choice(["|i1", "<u2", "<i4", "<i8", "<f2", "<f4", "<f8", "|b1"])
    return msgpack.packb(_request(rng, **{IMAGE: _real(rng, dtype, [2, 8, 8, 3])}))


def lying_dtype(rng: random.Random, limit: int) -> bytes:
    """Types that do not exist, or whose reading could execute or allocate something."""
    lies = [
        "|O",
        "O",
        "object",
        "|V8",
        "<c8",
        "<M8[ns]",
        "|S192",
        "<U48",
        ">u1",
        "u1,f4",
    ]
    lies += ["", "nonsense", "x" * 500, None, 7, True, ["|u1"], {}, b"|u1", "<f16"]
    return msgpack.packb(_request(rng, **{IMAGE: _array(rng, dtype=rng.choice(lies))}))


def lying_shape(rng: random.Random, limit: int) -> bytes:
    """Shapes that do not fit the data, negative, huge or no shapes at all."""
    lies: list[Any] = [[2, 8, 8, 4], [1, 8, 8, 3], [-2, 8, 8, -3], [2.0, 8, 8, 3]]
    lies += [[2**31, 2**31, 8, 3], [2**63, 0], [2**62, 0, 8, 3], [0, 2**32 - 1, 8, 3]]
    lies += [[True, 192], [None], "2883", None, 384, {}, [384] + [1] * 40, [[2, 8], 3]]
    lies += [[], _LEFT_OUT]
    return msgpack.packb(_request(rng, **{IMAGE: _array(rng, shape=rng.choice(lies))}))


def lying_data(rng: random.Random, limit: int) -> bytes:
    """Data of another length or type."""
    lies: list[Any] = [b"", bytes(383), bytes(385), "x" * 384, [0] * 384, None, 7]
    lies += [_LEFT_OUT, {b"__ndarray__": True}]
    return msgpack.packb(_request(rng, **{IMAGE: _array(rng, data=rng.choice(lies))}))


def deep_nesting(rng: random.Random, limit: int) -> bytes:
    """Lists, maps or arrays within one another, deeper than any parser likes."""
    depth = rng.choice([100, 1_000, 20_000])
    depth = min(depth, limit // 8)
    inner = rng.choice([b"\x91", b"\x81\xa1a", b"\x81\xc4\x0b__ndarray__"])
    return b"\x81\xa6prompt" + inner * (depth // len(inner)) + b"\xc0"


def huge_claims(rng: random.Random, limit: int) -> bytes:
    """Headers that announce gigabytes."""
    head = rng.choice([b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"])
    size = struct.pack(">I", rng.choice([2**31, 2**32 - 1, 10**9]))
    return rng.choice([b"", b"\x81\xa6prompt"]) + head + size + rng.randbytes(16)


def many_entries(rng: random.Random, limit: int) -> bytes:
    """Lists and maps of very many entries, all of which are there."""
    count = min(20_000, limit // 8)
    thing = rng.choice(
        [[None] * count, [[]] * count, {str(i): None for i in range(count)}]
    )
    return msgpack.packb(_request(rng, **{PROMPT: thing}))


def memory_bombs(rng: random.Random, limit: int) -> bytes:
    """Lists of lists of one byte each, which take sixty times as much when read."""
    inner = b"\xdc\x40\x00" + rng.choice([b"\x90", b"\x80", b"\xc0"]) * 0x4000
    count = limit // len(inner) - 1
    return b"\x81\xa6prompt\xdc" + struct.pack(">H", count) + inner * count


def extensions(rng: random.Random, limit: int) -> bytes:
    """msgpack's extension types, which some readers turn into objects."""
    thing = rng.choice(
        [
            msgpack.ExtType(rng.randrange(128), rng.randbytes(8)),
            msgpack.Timestamp(rng.randrange(2**32)),
        ]
    )
    return msgpack.packb(_request(rng, **{rng.choice([IMAGE, PROMPT]): thing}))


def wrong_prompt(rng: random.Random, limit: int) -> bytes:
    """Instructions that are no texts, too many, too few or too long."""
    lies: list[Any] = [None, 7, b"push", [], ["push"], ["a", "b", "c"], ["push", 7], {}]
    lies += ["x" * 5_000, [["push", "push"]], _array(rng)]
    return msgpack.packb(_request(rng, **{PROMPT: rng.choice(lies)}))


def wrong_header(rng: random.Random, limit: int) -> bytes:
    """Wrong entries about the request itself."""
    lie = rng.choice(
        [
            {"batch": 3},
            {"batch": -1},
            {"batch": 2**63},
            {"batch": "2"},
            {"batch": True},
            {"image_layout": "WHC"},
            {"image_layout": 7},
            {"image_layout": ["HWC"]},
            {"request_id": "one"},
            {"request_id": 1.5},
        ]
    )
    return msgpack.packb(_request(rng, **lie))


def pickled(rng: random.Random, limit: int) -> bytes:
    """Pickles, which must not be read: this one would raise an error of its own."""
    bomb = b"cbuiltins\neval\n(S'1/0'\ntR."
    return rng.choice(
        [
            bomb,
            b"\x80\x04" + rng.randbytes(30),
            msgpack.packb(_request(rng, **{IMAGE: bomb})),
            msgpack.packb(_request(rng, **{IMAGE: _array(rng, dtype="|O", data=bomb)})),
        ]
    )


def text(rng: random.Random, limit: int) -> str:
    """Text frames."""
    return rng.choice(["", "hello", '{"prompt": "push"}', "\0", "\u2603" * 99])


def oversized(rng: random.Random, limit: int) -> bytes:
    """More than the server takes."""
    return b"\xc6" + bytes(limit + rng.choice([1, 1_000]))


# Each is answered with an error, but for the last one, which ends the connection.
KINDS: dict[str, Callable[[random.Random, int], bytes | str]] = {
    maker.__name__: maker
    for maker in (
        *(garbage, truncated, trailing, no_map, missing_keys, wrong_shape, wrong_dtype),
        *(lying_dtype, lying_shape, lying_data, deep_nesting, huge_claims),
        *(many_entries, memory_bombs, extensions, wrong_prompt, wrong_header, pickled),
        *(text, oversized),
    )
}


def malformed_frames(
    seed: int, count: int, *, limit: int = 2**20, oversized_share: float = 0.01
) -> Iterator[Frame]:
    """``count`` frames, the classes in turn (oversized ones less often)."""
    rng = random.Random(seed)
    turns = itertools.cycle(kind for kind in KINDS if kind != "oversized")
    for _ in range(count):
        kind = "oversized" if rng.random() < oversized_share else next(turns)
        closes = 1009 if kind == "oversized" else None
        yield Frame(kind, KINDS[kind](rng, limit), closes)


def broken_streams(seed: int, count: int) -> Iterator[tuple[str, bool, bytes]]:
    """Names, whether to send after the handshake (or instead of it), and bytes."""
    rng = random.Random(seed)
    makers: list[tuple[str, bool, Callable[[], bytes]]] = [
        ("no http", False, lambda: rng.randbytes(rng.randint(1, 2_000))),
        ("half a request", False, lambda: b"GET / HTTP/1.1\r\nHost: a\r\n"),
        ("another method", False, lambda: b"POST /health HTTP/1.1\r\n\r\n"),
        ("endless line", False, lambda: b"GET /" + b"a" * 20_000),
        ("endless headers", False, lambda: b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500),
        ("tls", False, lambda: b"\x16\x03\x01\x02\x00\x01" + rng.randbytes(200)),
        ("random frames", True, lambda: rng.randbytes(rng.randint(1, 200))),
        ("unmasked", True, lambda: b"\x82\x05hello"),
        ("reserved bits", True, lambda: b"\xf2\x80" + rng.randbytes(4)),
        ("bad opcode", True, lambda: b"\x83\x80" + rng.randbytes(4)),
        ("huge length", True, lambda: b"\x82\xff" + b"\x7f" + rng.randbytes(11)),
        ("half a frame", True, lambda: b"\x82\xfe\x10\x00" + rng.randbytes(40)),
        ("stray continuation", True, lambda: b"\x80\x81" + rng.randbytes(5)),
        ("bad utf-8", True, lambda: b"\x81\x82\0\0\0\0\xff\xfe"),
        ("long ping", True, lambda: b"\x89\xfe\x01\x00" + rng.randbytes(260)),
        ("bad close", True, lambda: b"\x88\x81\0\0\0\0\x01"),
    ]
    for _, (name, inside, maker) in zip(
        range(count), itertools.cycle(makers), strict=False
    ):
        yield name, inside, maker()
