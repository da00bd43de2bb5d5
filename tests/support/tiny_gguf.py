"""A llama of random weights, about half a megabyte: a real model file for a real engine, which talks nonsense quickly."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

LAYER_COUNT = 2
WIDTH = 64
HEAD_COUNT = 4
FEED_FORWARD_WIDTH = 128
CONTEXT_LENGTH_TOKENS = 2048
_SPECIAL = ("<unk>", "<s>", "</s>")


def _tokens() -> tuple[list[bytes], list[float], list[int]]:
    """A vocabulary in which every byte is a token, and every printable character one more."""
    kinds = gguf.TokenType
    texts = [text.encode() for text in _SPECIAL]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    texts += [f"<0x{byte:02X}>".encode() for byte in range(256)]
    types += [kinds.BYTE] * 256
    letters = ["\u2581".encode(), *(bytes([byte]) for byte in range(33, 127))]
    texts += letters
    types += [kinds.NORMAL] * len(letters)
    scores = [-float(index) for index in range(len(texts))]
    return texts, scores, [int(kind) for kind in types]


def write_tiny_gguf(path: Path, *, seed: int = 1, tensors_per_file: int = 0) -> Path:
    """Writes the model; the same seed gives the same bytes. With a number of tensors for each file, several are written beside the path."""
    random = np.random.default_rng(seed)
    texts, scores, types = _tokens()
    writer = gguf.GGUFWriter(str(path), "llama", split_max_tensors=tensors_per_file)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT_LENGTH_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYER_COUNT)
    writer.add_feed_forward_length(FEED_FORWARD_WIDTH)
    writer.add_head_count(HEAD_COUNT)
    writer.add_head_count_kv(HEAD_COUNT)
    writer.add_rope_dimension_count(WIDTH // HEAD_COUNT)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(texts))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def matrix(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.normal(0.0, 0.08, shape).astype(np.float32))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, dtype=np.float32))

    matrix("token_embd.weight", len(texts), WIDTH)
    ones("output_norm.weight")
    matrix("output.weight", len(texts), WIDTH)
    for layer in range(LAYER_COUNT):
        ones(f"blk.{layer}.attn_norm.weight")
        ones(f"blk.{layer}.ffn_norm.weight")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
        matrix(f"blk.{layer}.ffn_gate.weight", FEED_FORWARD_WIDTH, WIDTH)
        matrix(f"blk.{layer}.ffn_up.weight", FEED_FORWARD_WIDTH, WIDTH)
        matrix(f"blk.{layer}.ffn_down.weight", WIDTH, FEED_FORWARD_WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
