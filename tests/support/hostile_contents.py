"""Hostile by what is in their files, which the catalogue pins as they are."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from io import BytesIO
from typing import Any

from tests.support.hostile_draft import CONFIGS, GGUF, Draft
from tests.support.tiny_model_folder import INDEX, SHARDS


class Payload:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch potluck-was-here",)


def code_word(draft: Draft) -> str:
    word, value = draft.random.choice(
        [
            ("auto_map", {"AutoConfig": "configuration_evil.EvilConfig"}),
            ("auto_map", {"AutoModelForCausalLM": "evil/repo--modeling.Evil"}),
            ("auto_map", 1),
            ("auto_mapping", {"parent_library": "evil"}),
            ("trust_remote_code", True),
            ("trust_remote_code", 1),
            ("custom_pipelines", {"evil": {"impl": "evil.Pipeline"}}),
            ("custom_pipeline", "evil/repo"),
            ("custom_generate", "evil/repo"),
            ("_attn_implementation_internal", "evil/kernel"),
            ("_experts_implementation_internal", "evil/kernel"),
        ]
    )
    name = draft.any_of(*CONFIGS)

    def hide(config: Any) -> None:
        inner = {word: value}
        for step in range(draft.random.randrange(6)):
            inner = {f"part_{step}": inner} if draft.random.random() < 0.5 else {f"part_{step}": [0, inner]}
        config.update(inner)

    draft.edit_json(name, hide)
    return rf"{name} is not loaded: it says '{word}', by which engines load code"


def kernel(draft: Draft) -> str:
    word = draft.any_of("attn_implementation", "_attn_implementation", "experts_implementation")
    value = draft.random.choice(
        ["evil/kernel", "kernels-community/x@main:y", "/tmp/kernel", {"text_config": "evil/kernel"}, ["evil"], True]
    )
    draft.edit_json("config.json", lambda config: config.update({word: value}))
    return rf"config.json is not loaded: its '{word}' names a kernel that no engine has: .*"


def disguise(draft: Draft) -> str:
    """Executable bytes under a name that is allowed, pinned as they are."""
    boxed = BytesIO()
    with zipfile.ZipFile(boxed, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload()))
    content = draft.random.choice(
        [*(pickle.dumps(Payload(), protocol) for protocol in (0, 2, 4, 5)), boxed.getvalue(), b"\x7fELF" + bytes(60), b"#!/bin/sh\nid\n"]
    )
    name = draft.any_of(SHARDS[0], "config.json", "tokenizer.model", INDEX, GGUF)
    draft.files[name] = content
    what = {
        SHARDS[0]: "its header would be longer than the file: .*",
        "tokenizer.model": "it is no SentencePiece model",
        GGUF: "it does not begin as a GGUF does",
    }
    return rf"{re.escape(name)} is not loaded: {what.get(name, 'it is (no JSON: .*|not UTF-8)')}"


def swapped(draft: Draft) -> str:
    """A sound file under another sound file's name."""
    name, other = draft.random.choice([(SHARDS[0], "config.json"), ("config.json", SHARDS[0]), ("tokenizer.model", "vocab.json")])
    draft.files[name] = draft.files[other]
    return rf"{re.escape(name)} is not loaded: it.*"


def bad_json(draft: Draft) -> str:
    name = draft.any_of(*CONFIGS, "vocab.json", INDEX)
    content, reason = draft.random.choice(
        [
            (b"[" * 100_000, "its JSON is nested deeper than 32 levels"),
            (b"[" * 40 + b"1" + b"]" * 40, "its JSON is nested deeper than 32 levels"),
            (b'{"a":' * 40 + b"1" + b"}" * 40, "its JSON is nested deeper than 32 levels"),
            (b'{"auto_map":{},"auto_map":null}', "its JSON names 'auto_map' twice in one object"),
            ('{"auto_map":1}'.encode("utf-16"), "it is not UTF-8"),
            ('{"auto_map":1}'.encode("utf-32-be"), "it is no JSON: .*"),
            (b'\xef\xbb\xbf{"a":1}', "it is no JSON: .*"),
            (b"{'a':1}", "it is no JSON: .*"),
            (b"{} {}", "it is no JSON: .*"),
            (b"9" * 5000, "it is no JSON: .*"),
            (b'{"a":"\x00"}', "it is no JSON: .*"),
        ]
    )
    draft.files[name] = content
    return rf"{re.escape(name)} is not loaded: {reason}"


def too_large(draft: Draft) -> str:
    """A file that is read whole, and has more bytes than that is done with."""
    name = draft.any_of("config.json", "merges.txt", "tokenizer.model")
    draft.files[name] = bytes(64 * 1024 * 1024 + 1)
    return rf"{name} is not loaded: it has 67108865 bytes; 67108864 are the most for a file of its kind"


def bad_index(draft: Draft) -> str:
    named = draft.any_of(
        "pytorch_model.bin", "../evil.safetensors", "/etc/passwd", "model-00003-of-00002.safetensors", "sub/config.json", ""
    )
    if draft.random.random() < 0.3:
        draft.files[INDEX] = draft.random.choice([b"{}", b"[]", b'{"weight_map":["a"]}', b'{"weight_map":"a"}'])
        return rf"{re.escape(INDEX)} is not loaded: it is no index: it has no weight_map"
    draft.edit_json(INDEX, lambda index: index["weight_map"].update({"evil.weight": named or 1}))
    return rf"{re.escape(INDEX)} is not loaded: its weight_map names '{re.escape(named)}', which the catalogue does not pin"


def bad_tokenizer(draft: Draft) -> str:
    if draft.random.random() < 0.5:
        good = draft.files["tokenizer.model"]
        draft.files["tokenizer.model"] = draft.random.choice(
            [
                good[:-3],
                b"\x12\x00",
                good + b"\x32\x00",
                good + b"\x0d\x00\x00\x00\x00",
                good + b"\x0a\xff\xff\xff\xff\x0f",
                b"\x0a" + b"\xff" * 20,
            ]
        )
        return "tokenizer.model is not loaded: it is no SentencePiece model"
    name = draft.any_of("merges.txt", "chat_template.jinja")
    content, reason = draft.random.choice([(b"a\0b", "it is no text: it holds a NUL"), (b"\xff\xfe\x00", "it is not UTF-8")])
    draft.files[name] = content
    return rf"{re.escape(name)} is not loaded: {reason}"


def appended(draft: Draft) -> str:
    """A second file behind the tensors, as in a file that is two formats at once."""
    boxed = BytesIO()
    with zipfile.ZipFile(boxed, "w") as archive:
        archive.writestr("evil.py", b"import os")
    name = draft.any_of(SHARDS[0], SHARDS[1], GGUF, "tokenizer.model")
    draft.files[name] += draft.random.choice([boxed.getvalue(), b"import os\n" * 9, b"\0" * 100])
    what = {GGUF: r"its tensors end at \d+ bytes, and the file at \d+", "tokenizer.model": "it is no SentencePiece model"}
    return rf"{name} is not loaded: {what.get(name, r'its tensors have .* bytes, and the file has .* for them')}"
