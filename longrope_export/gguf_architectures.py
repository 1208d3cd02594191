"""What llama.cpp does with RoPE factor tensors, by GGUF architecture (revision 0c1e5709, 2026-10-01)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from longrope_export.errors import UnsupportedModelError

USED = "used"
IGNORED = "ignored"  # loaded, never handed to RoPE: silently plain
REFUSED = "refused"  # load error: "wrong number of tensors"


@dataclass(frozen=True)
class GgufArchitecture:
    """One architecture: its pair layout, and what happens to `rope_factors_*` (`factors`) and `rope_freqs`
    (`static`).

    `needs_type`: long and short factors need `rope.scaling.type` = longrope. `whole_head`:
    rope.dimension_count must equal the head's size. `dimension_count_scale`: the key holds this multiple of
    the rotated values.
    """

    name: str
    pair_layout: str
    factors: str = REFUSED
    static: str = REFUSED
    needs_type: bool = True
    whole_head: bool = False
    dimension_count_scale: int = 1

    @property
    def has_rope(self) -> bool:
        """Whether the architecture rotates at all."""
        return self.pair_layout != "NONE"

    @property
    def honours_factors(self) -> bool:
        """Whether llama.cpp applies long and short factors."""
        return self.factors == USED


# (name, layout, long/short, static)
_LOADING = (
    ("apertus", "NEOX", USED, USED),
    ("arcee", "NORM", REFUSED, USED),
    ("cogvlm", "NEOX", REFUSED, IGNORED),
    ("deci", "NORM", USED, USED),
    ("dflash", "MROPE", REFUSED, USED),
    ("eagle3", "NORM", REFUSED, USED),
    ("exaone", "NEOX", REFUSED, USED),
    ("exaone-moe", "NEOX", REFUSED, USED),
    ("exaone4", "NEOX", REFUSED, USED),
    ("falcon-h1", "NEOX", REFUSED, IGNORED),
    ("gemma4", "NEOX", REFUSED, USED),
    ("gemma4-assistant", "NEOX", REFUSED, USED),
    ("granite", "NORM", USED, USED),
    ("granite_swa", "NORM", USED, USED),
    ("granitehybrid", "NORM", REFUSED, USED),
    ("granitemoe", "NORM", USED, USED),
    ("llada", "NORM", REFUSED, IGNORED),
    ("llama", "NORM", USED, USED),
    ("llama-embed", "NORM", USED, USED),
    ("llama4", "NORM", REFUSED, USED),
    ("minicpm", "NORM", USED, USED),
    ("minicpm3", "NEOX", USED, REFUSED),
    ("mistral3", "NORM", USED, USED),
    ("nanbeige", "NORM", REFUSED, USED),
    ("pangu-embedded", "NEOX", IGNORED, IGNORED),
    ("phi3", "NEOX", USED, REFUSED),
    ("phimoe", "NEOX", USED, REFUSED),
    ("refact", "NONE", IGNORED, IGNORED),
    ("step35", "NEOX", USED, USED),
)
_UNCONDITIONAL = frozenset({"minicpm3", "phi3", "phimoe"})
_WHOLE_HEAD = frozenset({"llama", "llama-embed", "deci", "falcon"})
_DIMENSION_COUNT_SCALE = {"step35": 2}

# Architectures that load no rope tensor at all, by layout.
_PLAIN = {
    "NEOX": """
        afmoe bailingmoe2 bitnet codeshell dbrx dots1 dream eurobert falcon gemma
        gemma-embedding gemma2 gemma3 gemma3n gpt-oss gptneox grok grovemoe hrm_text
        hunyuan-dense hunyuan-moe hy_v3 jais2 jina-bert-v3 laguna lfm2 lfm2moe llada-moe maple
        mellum mimo2 minimax-01 minimax-m2 minimax-m3 modern-bert nemotron nomic-bert
        nomic-bert-moe olmo2 olmoe openelm orion phi2 plamo plamo2 plamo3 qwen qwen2 qwen2moe
        qwen3 qwen3moe qwen3next rnd1 seed_oss smallthinker spark2_5 stablelm starcoder2 talkie
        glm4moe hunyuan_vl
    """,
    "NORM": """
        arctic baichuan bailingmoe chameleon chatglm cohere2 cohere2moe command-r deepseek
        deepseek2 deepseek2-ocr deepseek32 deepseek4 dots3note ernie4_5 ernie4_5-moe glm-dsa
        graniteswitch hy_v4 internlm2 maincoder mistral4 muse-glimmer neo-bert olmo plm
        pockettts smollm3 xverse bailingmoe3 glm4
    """,
    "MROPE": "paddleocr qwen2vl",
    "IMROPE": "qwen35 qwen35moe qwen3tts qwen3vl qwen3vlmoe qwen4exp",
    # bert and starcoder have a layout in llama.cpp's table, but add learned positions and never rotate.
    "NONE": """
        arwkv7 bert bloom clip glm5-next gpt2 jais jamba jina-bert-v2 kimi-k3 kimi-linear mamba
        mamba2 mpt nemotron_h nemotron_h_moe rwkv6 rwkv6qwen2 rwkv7 starcoder t5 t5encoder
        wavtokenizer-dec
    """,
}


def _architecture(name: str, layout: str, factors: str = REFUSED, static: str = REFUSED) -> GgufArchitecture:
    return GgufArchitecture(
        name,
        layout,
        factors,
        static,
        needs_type=name not in _UNCONDITIONAL,
        whole_head=name in _WHOLE_HEAD,
        dimension_count_scale=_DIMENSION_COUNT_SCALE.get(name, 1),
    )


GGUF_ARCHITECTURES: Mapping[str, GgufArchitecture] = MappingProxyType(
    {row[0]: _architecture(*row) for row in _LOADING}
    | {name: _architecture(name, layout) for layout, names in _PLAIN.items() for name in names.split()}
)


def gguf_architecture(name: str) -> GgufArchitecture:
    """The row for a GGUF's `general.architecture`; raises `UnsupportedModelError` naming those that use
    factors.
    """
    row = GGUF_ARCHITECTURES.get(name)
    if row is None:
        honouring = ", ".join(sorted(entry.name for entry in GGUF_ARCHITECTURES.values() if entry.honours_factors))
        raise UnsupportedModelError(
            f"the GGUF architecture {name[:80]!r} is not known here; llama.cpp applies factors for: {honouring}"
        )
    return row
