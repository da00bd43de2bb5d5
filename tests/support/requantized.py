"""The built-in model with weights of four bits in another form, which llama.cpp reads prompts with twice as fast on a processor.

Measured on one core with AVX-512: the built-in file's Q4_1 217 tokens/s, Q4_0 404, Q8_0 361, BF16 239. Nothing is fetched that the node's
own model store would not fetch.
"""

from __future__ import annotations

from pathlib import Path

import gguf

from tests.support.safetensors_model import made_of_built_in

_NAME = "smollm2-135m-instruct.Q4_0.gguf"
_Q4_1, _Q4_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q4_0


def built_in_q4_0() -> Path:
    """The file."""
    return made_of_built_in("smollm2-135m-instruct-q4_0", Path(__file__), write_q4_0) / _NAME


def write_q4_0(source: Path, target: Path) -> None:
    """Copies a llama's file into a folder, each tensor of kind Q4_1 as Q4_0."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target / _NAME, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            # Of an array, its elements' type comes last.
            kind, *elements = field.types
            writer.add_key_value(field.name, field.contents(), kind, sub_type=elements[-1] if elements else None)
    for tensor in reader.tensors:
        if tensor.tensor_type is _Q4_1:
            weights = gguf.quants.dequantize(tensor.data, _Q4_1)
            writer.add_tensor(tensor.name, gguf.quants.quantize(weights, _Q4_0), raw_dtype=_Q4_0)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
