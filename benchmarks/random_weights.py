"""Write random weights of a config's shape once, for servers that only read real ones: speed does not depend on them.

    python -m benchmarks.random_weights FOLDER OUT --dtype bfloat16

FOLDER holds a config.json and a tokenizer. Runs on the CPU, or sooner with `--device cuda`, and writes nothing where
OUT is there already.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer

from batching.model import load


def write(folder: Path, out: Path, dtype: str, device: str = "cpu") -> None:
    """Model and tokenizer, complete or not at all. Raises ModelError as `batching.model.load`."""
    if out.is_dir():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".writing-", dir=out.parent) as scratch:
        fresh = Path(scratch) / out.name
        load(str(folder), device=device, dtype=dtype, load_format="dummy").save_pretrained(fresh)
        AutoTokenizer.from_pretrained(str(folder)).save_pretrained(fresh)
        fresh.rename(out)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_weights", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu", help="where they are drawn: cpu, cuda or cuda:N (cpu)")
    told = parser.parse_args()
    write(told.folder, told.out, told.dtype, told.device)


if __name__ == "__main__":
    main()
