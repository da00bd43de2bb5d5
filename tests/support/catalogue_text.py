"""A catalogue file's words for one small model of a folder."""

from __future__ import annotations


def model_text(model_id: str = "tiny") -> str:
    """One good `[[model]]`; each value stands in a line of its own."""
    return f"""
[[model]]
model_id = "{model_id}"
source = "path:/srv/models"
file_name = "tiny.gguf"
sha256 = "{"a" * 64}"
size_bytes = 10
engine_kind = "llamacpp"
context_length_tokens = 512
slot_count = 2
prompt_price_micro_credits = 1
completion_price_micro_credits = 2
licence = "MIT"
endpoints = ["/v1/chat/completions"]
created_at_unix_seconds = 1
"""
