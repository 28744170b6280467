"""What a decode node reads of the answers of the server that computes its prompts."""

import asyncio
from urllib.parse import urlsplit

import pytest

from rootcellar.server.forwarding import PrefillNode, _rooms

ERROR = b'{"error": {"message": "kv_cache released"}}'
CHUNKS = [b"15\r\n" + ERROR[:21] + b"\r\n", b"%x\r\n" % len(ERROR[21:]) + ERROR[21:] + b"\r\n0\r\n\r\n"]


def ask(*pieces):
    """The status and the body that it makes of an answer which comes in pieces."""

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.close()

    async def both():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            node = PrefillNode(urlsplit(f"http://127.0.0.1:{port}"), engine=None)
            return await node._post("/generate", b"{}", {"authorization": "Bearer secret"})

    return asyncio.run(asyncio.wait_for(both(), 10))


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 503 No\r\nContent-Length: %d\r\n\r\n" % len(ERROR), ERROR[:9], ERROR[9:]),
        (b"HTTP/1.1 503 No\r\ntransfer-encoding: chunked\r\n\r\n", *CHUNKS),
        (b"HTTP/1.1 503 No\r\n\r\n", ERROR[:9], ERROR[9:]),
        (b"HTTP/1.1 503 ", b"No\r\n\r\n" + ERROR),
    ],
)
def test_an_answer_is_read_to_its_end_however_it_comes(pieces):
    assert ask(*pieces) == (503, ERROR)


@pytest.mark.parametrize(("pieces", "said"), [((), "ended the connection"), ((b"SSH-2.0 hello\r\n\r\n",), "no HTTP")])
def test_what_is_no_answer_is_said(pieces, said):
    with pytest.raises(ConnectionError, match=said):
        ask(*pieces)


@pytest.mark.parametrize(
    ("ids", "params", "answers"),
    [
        ([1, 2], None, [1]),
        ([1, 2], {"n": 3}, [3]),
        ([[1], [2]], {"n": 2}, [2, 2]),
        ([[1], [2], [3]], [{"n": 2}, None, {}], [2, 1, 1]),
        ([[1], [2]], [{"n": 10**12}, {"n": "a"}], [1, 1]),  # the engine refuses what is wrong
        ([], None, [1]),
    ],
)
def test_each_answer_has_a_room_and_those_of_a_prompt_are_neighbours(ids, params, answers):
    rooms = _rooms({"input_ids": ids, "sampling_params": params})
    assert len(rooms) == len(set(rooms)) == sum(answers)
    for n in answers:
        own, rooms = rooms[:n], rooms[n:]
        assert own == list(range(own[0], own[0] + n))
