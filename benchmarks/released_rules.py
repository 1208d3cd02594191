"""What the released code of vLLM, SGLang and ExLlamaV2 makes of our config.json: factors, attention factor, and when.

python benchmarks/released_rules.py [--wheels FOLDER] [--only vllm,sglang,exllamav2]

These packages do not import without a GPU. Their wheels (of --wheels, else `pip download`, vLLM's is 340 MB) are opened
and only the functions and classes that read a config's RoPE parameters and compute angles are taken out of their sources and
run: unchanged, without the modules around them. A table says, for a llama and a phi3 folder of ours and each served
length, which set and which attention factor come out, and how far cos and sin are from the record's.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Optional

import numpy as np
import numpy.typing as npt
from parity_matrix import EXTENDED, WINDOW, random_model, record_for

from longrope_export.converters.card import markdown_table
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.converters.hf_profiles import DEFAULT
from longrope_export.rope.formulas import longrope_attention_factor
from longrope_export.scaling import RopeScaling

Array = npt.NDArray[np.float64]
FORMULA = longrope_attention_factor(EXTENDED / WINDOW, WINDOW)
COLUMNS = ("runtime", "model", "served", "set", "attention factor", "largest difference of cos and sin")


@dataclass(frozen=True)
class Applied:
    """What a runtime rotates with: cos and sin [positions, pairs] for positions 0 … served − 1."""

    cos: Array
    sin: Array

    def differs(self, factors: tuple[float, ...], attention: float, scaling: RopeScaling) -> float:
        """Largest difference from the angles of `factors`, in float64."""
        pairs = np.arange(len(factors)) * 2.0 / scaling.rotary_dim
        angles = np.arange(len(self.cos))[:, None] / (np.asarray(factors) * scaling.rope_theta**pairs)
        return float(
            max(abs(self.cos - attention * np.cos(angles)).max(), abs(self.sin - attention * np.sin(angles)).max())
        )

    @property
    def attention(self) -> float:
        """√(cos² + sin²), which is alike everywhere."""
        return float(np.sqrt(self.cos**2 + self.sin**2).mean())


def wheel_of(package: str, folder: Path) -> Path:
    """The package's wheel in `folder`, downloaded there when it is not."""
    found = sorted(folder.rglob(f"{package}-*.whl"))
    if not found:
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "-d", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=True)
        found = sorted(folder.rglob(f"{package}-*.whl"))
    return found[-1]


def taken(wheel: Path, file: str, names: tuple[str, ...], around: Mapping[str, Any]) -> dict[str, Any]:
    """The named functions and classes of one source file, run with `around` as the rest of their module."""
    source = zipfile.ZipFile(wheel).read(file).decode()
    nodes = [node for node in ast.parse(source).body if getattr(node, "name", None) in names]
    if {getattr(node, "name", "") for node in nodes} != set(names):
        raise SystemExit(f"{wheel.name}: {file} no longer has all of {', '.join(names)}")
    future = ast.parse("from __future__ import annotations").body
    module = ast.Module([*future, *nodes], type_ignores=[])
    space: dict[str, Any] = dict(around)
    exec(compile(module, file, "exec"), space)
    return space


def _common() -> dict[str, Any]:
    import torch
    from torch import nn

    log = logging.getLogger("released")
    quiet = SimpleNamespace(info=log.debug, warning=log.debug, warning_once=log.debug)
    return {"torch": torch, "nn": nn, "math": math, "logger": quiet, "Any": Any, "Optional": Optional}


def in_vllm(wheel: Path, folder: Path, served: int | None) -> tuple[Applied, int]:
    """The angles of vLLM with `--max-model-len served` (None: without), and the length that it then serves."""
    import torch
    from transformers import AutoConfig
    from transformers.configuration_utils import ALLOWED_LAYER_TYPES

    common = {**_common(), "ALLOWED_LAYER_TYPES": ALLOWED_LAYER_TYPES}
    utilities = taken(wheel, "vllm/config/utils.py", ("getattr_iter",), common)
    reading = ("is_rope_parameters_nested", "patch_legacy_rope_type", "patch_rope_parameters", "iter_rope_parameters")
    patching = taken(wheel, "vllm/transformers_utils/config.py", reading, common)
    platform = SimpleNamespace(check_max_model_len=lambda length: length)
    lengths = taken(wheel, "vllm/config/model.py", ("_get_and_verify_max_len",), {
        **common, **patching, "current_platform": platform, "envs": SimpleNamespace(VLLM_ALLOW_LONG_MAX_MODEL_LEN=False),
    })  # fmt: skip
    config = AutoConfig.from_pretrained(folder)
    with _module("vllm.config.utils", getattr_iter=utilities["getattr_iter"]):
        patching["patch_rope_parameters"](config)
    window = config.max_position_embeddings
    shape = SimpleNamespace(derived_max_model_len_and_key=(window, "max_position_embeddings"))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    length = lengths["_get_and_verify_max_len"](config, shape, tokenizer, served, False, None)
    current = SimpleNamespace(model_config=SimpleNamespace(max_model_len=length))
    layers = "vllm/model_executor/layers/rotary_embedding"
    name = "Phi3LongRoPEScaledRotaryEmbedding"
    rotary = taken(wheel, f"{layers}/phi3_long_rope_scaled_rope.py", (name,), {
        **common, "get_current_vllm_config": lambda: current, "rotate_neox": _rotate_half,
    })  # fmt: skip
    space = {**common, "_ROPE_DICT": {}, name: rotary[name]}
    build = taken(wheel, f"{layers}/__init__.py", ("get_rope",), space)["get_rope"]
    made = build(_head_size(config), window, True, config.rope_parameters, torch.float32)
    return _probed(made, length, made.head_size), length


def in_sglang(wheel: Path, folder: Path, served: int) -> Applied:
    """The angles of SGLang for one request of `served` tokens."""
    import torch
    from transformers import AutoConfig

    common = {**_common(), "Dict": dict, "Tuple": tuple, "List": list, "Union": Any}
    name = "Phi3LongRoPEScaledRotaryEmbedding"
    layers = "sglang/srt/layers/rotary_embedding"
    rotary = taken(wheel, f"{layers}/rope_variant.py", (name,), {**common, "rotate_neox": _rotate_half})
    space = {**common, "_ROPE_DICT": {}, "_get_live_rope_cache_entry": lambda key: None, name: rotary[name]}
    build = taken(wheel, f"{layers}/factory.py", ("get_rope", "_get_rope_param"), space)["get_rope"]
    config = AutoConfig.from_pretrained(folder)
    rope, size = config.rope_parameters, _head_size(config)
    made = build(
        size, size, config.max_position_embeddings, rope["rope_theta"], True, rope, torch.float32,
        rope.get("partial_rotary_factor", 1.0),
    )  # fmt: skip
    return _probed(made, served, size)


def in_exllamav2(wheel: Path, folder: Path, served: int) -> Applied:
    """The angles of ExLlamaV2 with a cache of `served` tokens; raises `AssertionError` where it refuses the config."""
    common = _common()
    source = zipfile.ZipFile(wheel).read("exllamav2/config.py").decode()
    raw = json.loads((folder / "config.json").read_text())
    found = SimpleNamespace(
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"], max_seq_len=served,
        original_max_seq_len=served, partial_rotary_factor=raw.get("partial_rotary_factor", 1.0), scale_alpha_value=1.0,
        alt_rope_method=None,
    )  # fmt: skip
    # the branch of ExLlamaV2Config.prepare that reads the dictionary
    branch = _branch_on(source, "rs")
    exec(
        compile(ast.Module([branch], []), "config.py", "exec"),
        {"rs": raw.get("rope_scaling"), "read_config": raw, "self": found},
    )
    if found.alt_rope_method != "su":
        raise AssertionError(f"rope method {found.alt_rope_method}")
    name = "get_rope_params_su"
    make = taken(wheel, "exllamav2/rope.py", (name,), common)[name]
    frequencies, attention = make("cpu", found, raw["rope_theta"])
    angles = np.arange(served)[:, None] * frequencies.double().numpy()
    return Applied(attention * np.cos(angles), attention * np.sin(angles))


def _branch_on(source: str, name: str) -> ast.stmt:
    """The first `if name:` statement of a source file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == name:
            return node
    raise SystemExit(f"no `if {name}:` any more")


@contextmanager
def _module(name: str, **contents: Any) -> Iterator[None]:
    """A module that a function imports when it is called."""
    parts = name.split(".")
    made = {".".join(parts[: end + 1]): ModuleType(".".join(parts[: end + 1])) for end in range(len(parts))}
    made[name].__dict__.update(contents)
    sys.modules.update(made)
    try:
        yield
    finally:
        for key in made:
            del sys.modules[key]


def _rotate_half(values: Any) -> Any:
    import torch

    first, second = values.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _probed(rotary: Any, length: int, size: int) -> Applied:
    """cos and sin from what the runtime's own forward does to (1, 0) in every pair."""
    import torch

    pairs = rotary.rotary_dim // 2
    query = torch.zeros(length, size)
    query[:, :pairs] = 1.0
    rotated, _ = rotary.forward(torch.arange(length), query, query.clone())
    values = rotated.reshape(length, size).double().numpy()
    return Applied(values[:, :pairs], values[:, pairs : 2 * pairs])


def which_set(applied: Applied, scaling: RopeScaling) -> tuple[str, float]:
    """The record's set that the angles are nearest to, at the runtime's own attention factor, and the difference."""
    sets = {"short": scaling.short_factor, "long": scaling.long_factor}
    differences = {name: applied.differs(factors, applied.attention, scaling) for name, factors in sets.items()}
    name = min(differences, key=differences.__getitem__)
    return name, differences[name]


RUNTIMES: dict[str, Callable[[Path, Path, int], Applied]] = {
    "vllm": lambda wheel, folder, served: in_vllm(wheel, folder, served)[0],
    "sglang": in_sglang,
    "exllamav2": in_exllamav2,
}


def folders(work: Path, profile: str = DEFAULT) -> Iterator[tuple[str, Path, RopeScaling]]:
    """Extended folders of a llama and a phi3 with the attention factor 1.1, and of a llama with the formula's."""
    for family in ("llama", "phi3"):
        source = random_model(family, work / family)
        scaling = record_for(source)
        records = {family: scaling}
        if family == "llama":
            records["llama, formula"] = replace(scaling, long_attention_factor=FORMULA, short_attention_factor=FORMULA)
        for name, record in records.items():
            target = work / f"{name} {profile}"
            write_hf_folder(source, target, record, profile=profile, allow_lossy=True)
            yield name, target, record


def rows(wheels: Path, work: Path, only: tuple[str, ...]) -> Iterator[list[str]]:
    """The table's rows: each runtime, each folder, served below and above the window."""
    for runtime in only:
        wheel = wheel_of(runtime, wheels)
        version = wheel.name.split("-")[1]
        profile = "exllamav2" if runtime == "exllamav2" else DEFAULT
        for name, folder, scaling in folders(work / runtime, profile):
            for served in (WINDOW, EXTENDED):
                applied = RUNTIMES[runtime](wheel, folder, served)
                found, difference = which_set(applied, scaling)
                yield [
                    f"{runtime} {version}",
                    name,
                    str(served),
                    found,
                    f"{applied.attention:.4f}",
                    f"{difference:.0e}",
                ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels; default: a temporary one")
    parser.add_argument("--only", default=",".join(RUNTIMES))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as work:
        wheels = arguments.wheels or Path(work)
        print(markdown_table([COLUMNS, *rows(wheels, Path(work), tuple(arguments.only.split(",")))]))


if __name__ == "__main__":
    main()
