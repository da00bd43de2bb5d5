"""Looking whether anything listens before a dial."""

from __future__ import annotations

import asyncio
import socket

import pytest

from potluck_node.domain.session import should_knock
from potluck_node.knocking import knock
from potluck_protocol.errors import ErrorCode, PotluckError


async def test_where_something_listens_it_says_nothing_and_goes_away_again():
    said = asyncio.get_running_loop().create_future()

    async def listen(reader, writer):
        said.set_result(await reader.read())
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        await knock(f"{host}:{port}")
        assert await asyncio.wait_for(said, 5) == b""


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
async def test_a_closed_port_is_told_with_what_mends_it(host):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it
        target = f"{host}:{taken.getsockname()[1]}"
        with pytest.raises(PotluckError, match="potluck coordinator serve") as caught:
            await knock(target)
    assert caught.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    assert target in caught.value.message


def test_a_line_that_was_only_cut_is_dialled_without():
    assert [should_knock(count) for count in range(4)] == [False, False, True, True]
