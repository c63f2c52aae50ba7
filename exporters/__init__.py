"""What leaves an artifact. One line here makes an exporter known to plans, to `check` and to the laws in the tests."""

from compress.contract import Options
from exporters.auto import Auto
from exporters.compressed_tensors import CompressedTensors
from exporters.gguf import Gguf
from exporters.huggingface import HuggingFace
from exporters.onnx import Onnx
from exporters.openvino import OpenVino

EXPORTERS: dict[str, type[Options]] = {
    "huggingface": HuggingFace,
    "onnx": Onnx,
    "openvino": OpenVino,
    "compressed_tensors": CompressedTensors,
    "gguf": Gguf,
    "auto": Auto,
}
