"""The reference: Hugging Face transformers on the CPU, in float32, on the same weights as ours.

Loads what our programs load: a Hugging Face directory, a GGUF file, or a directory with `model.gguf` in it, as
`coordinator fetch` makes one. transformers dequantizes such a file by itself and shares no code with us.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(model, adapter=None, trainable=False):
    """The base model, with a PEFT adapter on it if one is named. Evaluation mode: no dropout."""
    base = AutoModelForCausalLM.from_pretrained(**_location(model), dtype=torch.float32)
    if adapter is None:
        return base.eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter, is_trainable=trainable).eval()


def save(model, directory):
    """Writes a loaded model as a Hugging Face directory in float32."""
    if hasattr(model, "hf_quantizer"):
        # What came from a GGUF file is dequantized, but is remembered as quantized, and refused.
        model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(directory)


def tokenizer(model):
    return AutoTokenizer.from_pretrained(**_location(model))


def _location(model):
    path = Path(model)
    if (path / "model.gguf").is_file():
        path = path / "model.gguf"
    if path.is_dir():
        return {"pretrained_model_name_or_path": path}
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
