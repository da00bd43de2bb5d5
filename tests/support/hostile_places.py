"""Hostile by their names, their pins, their source, or by what lies where a file should."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from dataclasses import replace

from tests.support.hostile_draft import CONFIGS, Draft
from tests.support.tiny_model_folder import pin, write_files

PLAIN = "{PLAIN}"


def code(draft: Draft) -> str:
    name = draft.any_of(
        *("modeling_llama.py", "kernel.so", "pytorch_model.bin", "model.pt", "model.pkl", "model.ckpt", "model.pth", "run.sh", "a.exe"),
        *("lib.dll", "model.onnx", "model.h5", "config.json.py", "model.safetensors.py", "tokenizer.txt", "template.jinja", "README.md"),
        *("config.JSON", "model.Safetensors", "tokenizer.model.py", "__init__.py", "setup.cfg", "a.pyc", "config.yaml", "model.gguf.zip"),
    )
    draft.files[name] = b"import os; os.system('touch potluck-was-here')\n"
    return rf"the file '{re.escape(name)}' is none of .*, the formats that hold no code"


def link(draft: Draft) -> str:
    """A symbolic link where a pinned file should be; what it leads to has the right bytes, or is something else."""
    name = draft.any_of()
    draft.pin_before(name)
    elsewhere = draft.folder.with_name(draft.folder.name + "-elsewhere")
    write_files(elsewhere, {name: draft.files[name]})
    target = draft.any_of(str(elsewhere / name), f"../{elsewhere.name}/{name}", "/etc/hostname", "nowhere", "/dev/zero", ".", name)
    del draft.files[name]
    draft.folder.mkdir(parents=True)
    (draft.folder / name).symlink_to(target)
    return rf"{re.escape(name)} is a symbolic link, and only plain files are loaded: put the file itself in its place"


def linked_folder(draft: Draft) -> str:
    elsewhere = draft.folder.with_name(draft.folder.name + "-elsewhere")
    name = f"sub/{draft.any_of(*CONFIGS)}"
    content = draft.files[name.removeprefix("sub/")]
    write_files(elsewhere, {name.removeprefix("sub/"): content})
    draft.pins[name] = pin(name, content)
    draft.folder.mkdir(parents=True)
    (draft.folder / "sub").symlink_to(elsewhere)
    return "sub is a symbolic link, and only plain files are loaded: put the file itself in its place"


def no_file(draft: Draft) -> str:
    """A pipe, a socket, a folder, or nothing where a pinned file should be."""
    name = draft.any_of()
    draft.pin_before(name)
    del draft.files[name]
    draft.folder.mkdir(parents=True)
    path, what = draft.folder / name, draft.any_of("a pipe", "a socket", "a folder", "nothing", "a device")
    if what == "a device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
        except OSError:
            what = "a pipe"
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    elif what == "a socket":
        with socket.socket(socket.AF_UNIX) as listener, suppress(OSError):
            # A path of more than 107 characters is none for a socket.
            here = os.open(draft.folder, os.O_RDONLY)
            listener.bind(f"/proc/self/fd/{here}/{name}")
            os.close(here)
    if what == "nothing":
        return rf"{re.escape(name)}: No such file or directory"
    return rf"{re.escape(name)} is {what}, and only plain files are loaded: put the file itself in its place"


def path_trick(draft: Draft) -> str:
    name = draft.any_of(
        *("../config.json", "../../etc/evil.json", "/etc/evil.json", "a/../../evil.json", "a//evil.json", "./evil.json", "a/./evil.json"),
        *("evil.json\0.py", "a\\evil.json", "C:\\evil.json", ".evil.json", "-rf.json", " evil.json", "ev\nil.json", "~/evil.json"),
        *(
            "c\u043enfig.json",
            "cofig\u202enosj.json",
            "config\uff0ejson",
            "a\u2215b.json",
            "config.json\u200b",
            "\u0441onfig.json",
            "evil.json ",
        ),
        *("$(id).json", "a;id.json", "*.json", "sub/.git/config.json", "evil.json/", "//evil.json", "\u00e9vil.json", "con:fig.json"),
    )
    draft.pins[name] = pin(name, b"{}")
    # A blank at the end makes another format of it.
    return rf"the file {re.escape(repr(name))} is none of .*" if name.endswith(" ") else r"the file name '.*' is not a plain relative path"


def long_name(draft: Draft) -> str:
    name = "x" * draft.random.randrange(196, 5000) + ".json"
    draft.pins[name] = pin(name, b"{}")
    return rf"a file name of {len(name)} characters is longer than 200"


def twins(draft: Draft) -> str:
    name = draft.any_of(*CONFIGS)
    stem = name.removesuffix(".json")
    other = draft.any_of(name, f"{stem.upper()}.json", f"{stem.capitalize()}.json", f"{stem[:-1]}{stem[-1].upper()}.json")
    draft.more_pins.append(pin(other, draft.files[name]))
    return rf"the file names '{name}' and '{other}' are one file on some disks"


def file_as_folder(draft: Draft) -> str:
    name = draft.any_of(*CONFIGS)
    below = f"{name}/{draft.any_of('evil.json', 'a/evil.json')}"
    draft.pins[below] = pin(below, b"{}")
    return rf"the file '{below}' lies in '{name}', which is a file itself"


def flipped_byte(draft: Draft) -> str:
    name = draft.any_of()
    draft.pin_before(name)
    content = bytearray(draft.files[name])
    content[draft.random.randrange(len(content))] ^= 1 << draft.random.randrange(8)
    draft.files[name] = bytes(content)
    return rf"{re.escape(name)} does not match the catalogue"


def wrong_size(draft: Draft) -> str:
    name = draft.any_of()
    draft.pin_before(name)
    content = draft.files[name]
    draft.files[name] = draft.random.choice(
        [content[:-1], content + b"\n", content + content, content[1:], b"", content[: len(content) // 2]]
    )
    return rf"{re.escape(name)} does not match the catalogue"


def bad_pin(draft: Draft) -> str:
    name = draft.any_of()
    good = pin(name, draft.files[name])
    if draft.random.random() < 0.3:
        draft.pins[name] = replace(good, size_bytes=-draft.random.randrange(3))
        return rf"the file '{re.escape(name)}' has no size"
    wrong = draft.any_of(
        "", good.sha256.upper(), good.sha256[:-1], good.sha256 + "0", "g" * 64, f"../../{good.sha256[6:]}", good.sha256 + "\n"
    )
    draft.pins[name] = replace(good, sha256=wrong)
    return rf"the file '{re.escape(name)}' is not pinned by a sha256 of 64 hexadecimal digits"


def bad_source(draft: Draft) -> str:
    draft.source = draft.any_of(
        *(f"path:{draft.folder}/../{draft.folder.name}", f"path:relative/{draft.folder.name}", f"file://{draft.folder}", str(draft.folder)),
        *("https://example.org/model", "hf:org/../name@main", "hf:org/name", "hf:-o/name@main", "hf:org/name@main/../x", "hf:org/name@-x"),
        *(
            "wheel:--index-url==1",
            "wheel:a==1 --pre",
            "wheel:a @ file:///tmp/a.whl==1",
            "wheel:../a==1",
            f"path:{draft.folder}\nx",
            "attach:",
        ),
        *("attach:a\nb", f"attach:{'a' * 201}", "git+https://example.org/x", "hf:org/name@main\0"),
    )
    return r"the source .* is none of hf:ORG/NAME@REVISION, wheel:NAME==VERSION, path:/FOLDER, attach:NAME"


def files_of_an_attached_engine(draft: Draft) -> str:
    draft.source = "attach:llama3.2:3b"
    return r"the source 'attach:llama3.2:3b' has no files, and the catalogue names some"
