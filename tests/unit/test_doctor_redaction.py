"""What may be pasted in public: planted names, places and keys are gone, and what helps to find the fault is still there."""

from __future__ import annotations

import ipaddress
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.redaction import redacted

NAMES = {
    "den": "<host>",
    "den.example-home": "<host>",
    "/mnt/Jane Doe": "<home>",
    "/srv/big disk/potluck": "<cache>",
    "jdoe": "<user>",
    "k7": "<user>",
    "coordinator-box": "<coordinator>",
}
PLANTED = [
    "potluck1.aHR0cDovL3Bvb2w.abcdefghijklmnopqrstuvwxyz234567abcdefghijklmnopqrst.tok12345.secretsecretsecretsecretsecret12",
    "sk-potluck-abc123DEF456ghi789",
    "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "ghp_0123456789abcdefghij0123456789abcdef",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "Bearer abcdef123456",
    "password=hunter2hunter2",
    'api_key: "s3cr3ts3cr3t"',
    "GPU-58f16df2-6eee-bfac-bdc1-13e0091441b5",
    "58f16df2-6eee-bfac-bdc1-13e0091441b5",
    "a0:36:9f:1c:22:7e",
    "A0-36-9F-1C-22-7E",
    "192.168.1.77",
    "10.0.0.5:7443",
    "[2001:db8:85a3::8a2e:370:7334]:7443",
    "2001:db8::1.",
    "fe80::a236:9fff:fe1c:227e%eth0",
    "::ffff:192.0.2.7",
    "/mnt/jdoe/models/Private Project",
    "/mnt/Jane Doe/secret-model/file.gguf",
    "/srv/big disk/potluck/models/x.gguf",
    "~/private/notes.txt",
    "~jdoe/private/notes.txt",
    "C:\\Users\\jdoe\\models",
    "https://jdoe:hunter2@pool.example.org/join?token=abc",
    "http://coordinator-box:8400/#abcdefghijklmnopqrstuvwxyz234567abcdefghijklmnopqrst",
    "pool.example.org:7443",
    "den.local",
    "ftp://oddbox/file?q=1",
    "inner.pool-x.museum:7443",
    "build.someone.net",
    "coordinator-box:7443",
    "jane.doe@example.org",
    "abcdefghijk2lmnop3qrst4uvw",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\n-----END PRIVATE KEY-----",
]
SECRETS = (
    *("aHR0cDovL3Bvb2w", "secretsecret", "abc123DEF", "AbCdEfGh", "0123456789abcdefghij", "c2lnbmF0dXJl", "abcdef123456", "hunter2"),
    *("s3cr3ts3cr3t", "58f16df2", "13e0091441b5", "a0:36:9f", "A0-36-9F", "192.168.1.77", "10.0.0.5", "2001:db8", "fe80", "192.0.2.7"),
    *(
        "jdoe",
        "Jane",
        "Doe",
        "secret-model",
        "big disk",
        "notes.txt",
        "Users",
        "example.org",
        "den.local",
        "oddbox",
        "museum",
        "someone",
        "coordinator-box",
        "jane.doe",
    ),
    *("abcdefghijk2lmnop3", "9f86d081884c", "MIGHAgEAMBMGByqGSM49"),
)


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("around", ["{}", "the link to {} is down, see below", '"target": "{}",', "({})", "at {}, and {}"])
def test_nothing_planted_is_left(planted, around):
    shown = redacted(around.replace("{}", planted), NAMES)
    assert [secret for secret in SECRETS if secret in shown] == []


def test_what_helps_to_find_the_fault_stays():
    text = (
        "OK    driver        595.71.05 runs CUDA 13.2; needed: sglang 13.0 and vllm 13.0\n"
        "FAIL  bus 02:00.0   Xid 79, once since the machine was started  → sudo nvidia-smi -lgc 300,1500\n"
        '"bus_id": "0000:01:00.0", "numa_node": 0, "operating_system": "Linux 6.8 x86_64", "memory_bytes": 25769803776\n'
        "PCIe x4, the card has x16; /dev/shm has 64 MiB; at 12:34:56 and/or 3/4 of cards 0-1 (limit 350 W) at 66 °C in node.toml\n"
        "NVIDIA GeForce RTX 3090, 24.0 GiB, compute capability 8.6; pid 8123; an accident of the denominator"
    )
    assert redacted(text, NAMES) == text


def test_short_names_are_no_reason_to_cut_words_and_long_ones_go_whatever_their_case():
    assert redacted("k7 stands in k7zip", NAMES) == "k7 stands in k7zip"
    assert redacted("DEN and Den and garden", NAMES) == "<host> and <host> and garden"


@given(st.ip_addresses())
def test_no_address_is_left(address):
    shown = redacted(f"reached {address} in time", {})
    assert shown == "reached <ip> in time"


@given(st.uuids())
def test_no_identity_of_a_card_is_left(identity):
    assert redacted(f"card GPU-{identity}.", {}) == "card <uuid>."


@given(st.text(alphabet="abcdef0123456789:./-_ <>GPU~%[]\\\"'\n", max_size=60))
def test_what_was_taken_out_once_stays_out(text):
    once = redacted(text, NAMES)
    assert redacted(once, NAMES) == once
    for word in text.split():
        try:
            ipaddress.ip_address(word)
            uuid.UUID(word)
        except ValueError:
            continue
        assert word not in once
