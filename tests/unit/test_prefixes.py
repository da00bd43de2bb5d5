"""Which beginnings of prompts are believed to be where: as far as they are alike, as long as they can be there, and no longer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.prefixes import (
    BLOCK_BYTES,
    BLOCKS_MAX,
    TRUSTED_SECONDS,
    CacheState,
    Holder,
    block_names,
    cached_tokens,
    deepest,
    is_held,
)
from potluck_coordinator.gateway import prefix_map
from potluck_coordinator.gateway.prefix_map import HOLDERS_MAX, PrefixMap
from potluck_coordinator.gateway.prompt_text import prompt_text
from potluck_protocol.values import Endpoint, ReplicaId

CHAT, TEXT = Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS
A, B, C = (ReplicaId(name) for name in "abc")


def shared(first, second):
    """How many of the first blocks two prompts have in common, by name."""
    return sum(1 for one, other in zip(block_names(first), block_names(second), strict=False) if one == other)


@given(st.binary(max_size=2000), st.binary(max_size=600), st.binary(max_size=600))
def test_prompts_share_names_exactly_as_far_as_they_are_alike(same, one, other):
    first, second = same + one, same + other
    alike = 0
    while alike < min(len(first), len(second)) and first[alike] == second[alike]:
        alike += 1
    assert shared(first, second) == alike // BLOCK_BYTES


def test_a_block_is_named_by_all_before_it():
    assert not set(block_names(b"x" + b"a" * 1000)) & set(block_names(b"y" + b"a" * 1000))


def test_no_more_blocks_than_contexts_hold_are_looked_at():
    assert len(block_names(b"a" * (BLOCK_BYTES * (BLOCKS_MAX + 50)))) == BLOCKS_MAX
    assert block_names(b"a" * (BLOCK_BYTES - 1)) == ()


@given(st.integers(0, 500), st.integers(0, 500))
def test_the_deepest_is_found_by_few_looks(length, depth):
    depth, looks = min(length, depth), []

    def is_known(name):
        looks.append(name)
        return name < depth

    assert deepest(range(length), is_known) == depth
    assert len(looks) <= 9


@pytest.mark.parametrize(
    ("now", "cache", "held"),
    [
        (100.0, CacheState(1, 1000.0, 500.0), True),
        (100.0 + TRUSTED_SECONDS, CacheState(1, 1000.0, 500.0), True),
        (101.0 + TRUSTED_SECONDS, CacheState(1, 1000.0, 500.0), False),
        (100.0, CacheState(1, 1500.0, 500.0), True),
        (100.0, CacheState(1, 1501.0, 500.0), False),
        (100.0, CacheState(1, 9e9, 0.0), True),
        (100.0, CacheState(2, 1000.0, 500.0), False),
    ],
)
def test_a_block_is_believed_for_a_time_until_as_much_was_read_and_no_longer_than_its_engine_lives(now, cache, held):
    assert is_held(Holder(100.0, 1000.0, 1), cache, now) is held


def test_one_token_is_always_read():
    assert cached_tokens(8, 8 * BLOCK_BYTES, 512.0) == 511.0
    assert cached_tokens(4, 8 * BLOCK_BYTES, 512.0) == 256.0
    assert cached_tokens(4, 0, 0.0) == 0.0


class TestPrefixMap:
    def test_holders_come_with_their_depths_the_deepest_first(self):
        known = PrefixMap(lambda _: CacheState())
        names = block_names(bytes(range(256)) * 10)
        known.read(A, names[:3], 1.0)
        known.read(B, names[:7], 1.0)
        known.read(C, names, 1.0)
        assert list(known.holders(names, 2.0, 4).items()) == [(C, 10), (B, 7), (A, 3)]
        assert list(known.holders(names, 2.0, 2)) == [C, B]
        assert known.holders(names[:5], 2.0, 4) == {C: 5, B: 5, A: 3}
        assert known.holders(block_names(b"other" * 500), 2.0, 4) == {}
        assert known.depth(B, names, 2.0)[0] == 7

    def test_an_engine_that_began_anew_holds_nothing(self):
        caches = {A: CacheState()}
        known = PrefixMap(caches.__getitem__)
        names = block_names(b"a" * 2000)
        known.read(A, names, 1.0)
        caches[A] = CacheState(beginning=1)
        assert known.holders(names, 2.0, 4) == {}
        known.read(A, names, 3.0)
        assert known.holders(names, 4.0, 4) == {A: 7}

    def test_what_never_came_to_be_read_is_not_there(self):
        known = PrefixMap(lambda _: CacheState())
        names = block_names(b"a" * 2000)
        known.read(A, names, 1.0)
        known.unread(A, names)
        assert (known.holders(names, 1.0, 4), len(known)) == ({}, 0)

    def test_a_block_has_few_holders_and_the_oldest_makes_room(self):
        known = PrefixMap(lambda _: CacheState())
        names = block_names(b"a" * 600)
        for number in range(HOLDERS_MAX + 2):
            known.read(ReplicaId(str(number)), names, float(number))
        assert set(known.holders(names, 9.0, 99)) == {ReplicaId(str(number)) for number in range(2, HOLDERS_MAX + 2)}

    def test_memory_is_bounded_and_what_many_share_stays_longest(self, monkeypatch):
        monkeypatch.setattr(prefix_map, "BLOCKS_KEPT_MAX", 100)
        known = PrefixMap(lambda _: CacheState())
        system = bytes(range(256)) * 4
        for number in range(40):
            known.read(A, block_names(system + b"%5d" % number * 400), 1.0)
            assert len(known) <= 100
        latest, oldest = system + b"%5d" % 39 * 400, system + b"%5d" % 0 * 400
        assert known.depth(A, block_names(latest), 1.0)[0] == len(block_names(latest))
        assert known.depth(A, block_names(oldest), 1.0)[0] == 4

    @given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(0, 3), st.integers(1, 8)), max_size=20))
    def test_it_finds_what_a_plain_list_would(self, reads):
        known, plain = PrefixMap(lambda _: CacheState()), {}
        prompts = [block_names(bytes([number]) * 256 + bytes(range(256)) * 8) for number in range(4)]
        for replica_id, prompt, depth in reads:
            known.read(replica_id, prompts[prompt][:depth], 1.0)
            plain[replica_id, prompt] = max(depth, plain.get((replica_id, prompt), 0))
        for number, names in enumerate(prompts):
            expected = {replica_id: depth for (replica_id, prompt), depth in plain.items() if prompt == number}
            assert known.holders(names, 1.0, 4) == expected


def chat(*messages, **fields):
    return json.dumps({"model": "m", **fields, "messages": [{"role": role, "content": content} for role, content in messages]}).encode()


class TestPromptText:
    def test_a_conversation_that_goes_on_begins_as_it_did(self):
        before = prompt_text(CHAT, chat(("system", "Be kind."), ("user", "Hello"), temperature=1))
        after = prompt_text(CHAT, chat(("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("user", "More"), max_tokens=5))
        assert after.startswith(before)

    def test_writing_it_otherwise_in_json_changes_nothing(self):
        body = {"messages": [{"content": "Grüße \u00e9", "role": "user"}], "model": "m"}
        texts = {
            prompt_text(CHAT, json.dumps(body, ensure_ascii=plain, indent=indent).encode())
            for plain in (True, False)
            for indent in (None, 2)
        }
        assert len(texts) == 1

    @given(st.text())
    def test_a_text_stands_there_as_it_is_however_it_was_escaped(self, text):
        body = {"model": "m", "messages": [{"role": "user", "content": text}]}
        plain, escaped = (prompt_text(CHAT, json.dumps(body, ensure_ascii=ascii_only).encode()) for ascii_only in (False, True))
        assert plain == escaped == b"m\x1euser\x1f" + text.encode()

    def test_what_the_engine_reads_makes_a_difference(self):
        plain = chat(("user", "x"))
        tools = chat(("user", "x"), tools=[{"type": "function", "function": {"name": "f"}}])
        other = plain.replace(b'"m"', b'"n"')
        role, parts = chat(("system", "x")), chat(("user", [{"type": "text", "text": "x"}]))
        calls = plain.replace(b'"content"', b'"tool_calls": [{"id": "1"}], "content"')
        texts = [prompt_text(CHAT, body) for body in (plain, tools, other, role, parts, calls)]
        assert len(set(texts)) == 6

    def test_completions_have_a_prompt_and_embeddings_none(self):
        assert prompt_text(TEXT, b'{"model": "m", "prompt": "a\\nb"}') == b"ma\nb"
        assert prompt_text(TEXT, b'{"model": "m", "prompt": [1, 2]}') == b"m[1, 2]"
        assert prompt_text(Endpoint.EMBEDDINGS, b'{"model": "m", "input": "a"}') == b""

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"messages": 3}', b"\xff", b'{"messages":' + b"[" * 9999])
    def test_a_body_that_is_none_is_no_reason_to_fail(self, body):
        assert prompt_text(CHAT, body) == b""
