"""Every misconfiguration of a GGUF file that the doctor knows, in one table.

Symptoms were seen in llama.cpp 0c1e5709 (2026-10-01) or read in the named runtime's source; see docs/doctor.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from longrope_export.converters.doctor.findings import ERROR, INFORMATION, WARNING, Rule

_LLAMA_CPP = "llama.cpp, Ollama, LM Studio, koboldcpp"
_NO_LOAD = "load error: wrong number of tensors"

_ROWS = (
    ("G01", ERROR, "rope tensors in an architecture that does not load them", _LLAMA_CPP, _NO_LOAD),
    ("G02", ERROR, "rope tensors in an architecture that loads and ignores them", _LLAMA_CPP,
     "loads, and runs plain RoPE"),
    ("G03", ERROR, "scaling type longrope without factor tensors", _LLAMA_CPP, "loads, and runs plain RoPE"),
    ("G04", ERROR, "factor tensors without scaling type longrope", _LLAMA_CPP, _NO_LOAD),
    ("G05", ERROR, "a scaling type that llama.cpp does not know", _LLAMA_CPP, "the process aborts"),
    ("G06", ERROR, "rope_freqs beside factor tensors, or with scaling type longrope", _LLAMA_CPP, _NO_LOAD),
    ("G07", ERROR, "a factor tensor that is not F32", _LLAMA_CPP, "the process aborts"),
    ("G08", ERROR, "factor tensors of a wrong shape", _LLAMA_CPP, "load error: wrong shape"),
    ("G09", ERROR, "a factor that is 0, negative, infinite or not a number", _LLAMA_CPP,
     "NaN or meaningless probabilities"),
    ("G10", INFORMATION, "factors below 1, or not rising", _LLAMA_CPP,
     "legal; a list of 1/λ instead of λ shortens the window"),
    ("G11", ERROR, "rope.scaling.factor or rope.scale_linear beside factors", _LLAMA_CPP,
     "positions are interpolated a second time"),
    ("G12", ERROR, "original_context_length is missing", _LLAMA_CPP,
     "the long factors are never used inside the window"),
    ("G13", ERROR, "original_context_length exceeds context_length", _LLAMA_CPP,
     "servers never reach the long factors"),
    ("G14", WARNING, "original_context_length is no multiple of 256", _LLAMA_CPP,
     "a context of that length is padded, and uses the long factors"),
    ("G15", WARNING, "context_length is not extended", "llama-server, Ollama, LM Studio, koboldcpp",
     "servers cap the context there; koboldcpp changes the RoPE base beyond it"),
    ("G16", WARNING, "attn_factor is missing", _LLAMA_CPP, "attention factor 1: llama.cpp evaluates no formula"),
    ("G17", WARNING, "attn_factor is not the formula's or the record's", _LLAMA_CPP,
     "attention logits are scaled by the square of the difference"),
    ("G18", INFORMATION, "attn_factor is not 1", "Ollama; llama.cpp with --context-shift or --cache-reuse",
     "every context shift multiplies the cached keys by it again"),
    ("G19", WARNING, "only one of the two factor tensors", _LLAMA_CPP + "; mistral.rs refuses the file",
     "plain RoPE in the other regime"),
    ("G20", ERROR, "rope.dimension_count is not the head's size", _LLAMA_CPP, "load error: invalid n_rot"),
    ("G21", ERROR, "rows of q and k in the other pair order", _LLAMA_CPP, "output is nonsense"),
    ("G22", WARNING, "rope.freq_base is missing, or not the record's", _LLAMA_CPP, "wrong frequencies"),
    ("G23", WARNING, "YaRN keys in an architecture that does not read them", _LLAMA_CPP, "ignored silently"),
    ("G24", ERROR, "granite keys that switch RoPE off, or are missing", _LLAMA_CPP, "no RoPE, or a load error"),
    ("G25", INFORMATION, "factors that old builds do not load",
     "llama.cpp before 2026-03-29 (pull request 21150), Ollama before 2026-05-29, ik_llama.cpp", _NO_LOAD),
    ("G26", WARNING, "minicpm with scales of its own", "llama.cpp of 2025",
     "old builds use 12, 1.4/√layers and 256/width whatever the keys say"),
    ("G27", ERROR, "an incomplete step35", _LLAMA_CPP, "the process aborts, or a load error"),
    ("G28", ERROR, "a phi3 whose shapes llama.cpp cannot load", _LLAMA_CPP, "load error: wrong shape or missing tensor"),
    ("G29", ERROR, "tensor offsets, alignment or names that the format forbids", "every reader", "load error"),
    ("G30", ERROR, "split keys that do not fit the shards", _LLAMA_CPP, "load error: corrupted model, or missing key"),
    ("G31", ERROR, "a damaged or hostile header", "every reader", "load error; older readers hang or crash"),
    ("G32", WARNING, "an empty array in the metadata", "gguf-py's tools", "gguf-new-metadata fails"),
    ("G33", INFORMATION, "short prompts in a large context", _LLAMA_CPP,
     "-c above the original window uses the long factors for short prompts too"),
    ("G34", INFORMATION, "no -c given", "llama.cpp with --fit (its default)",
     "the context may shrink to fit the memory, and flip from long to short factors"),
    ("G35", INFORMATION, "several slots", "llama-server -np N --no-kv-unified, Ollama",
     "the context of one slot decides between long and short factors"),
    ("G36", INFORMATION, "RoPE options on the command line", "llama.cpp",
     "--rope-scaling does not switch factors off, and --yarn-orig-ctx does not move the switch"),
    ("G37", INFORMATION, "other readers of GGUF", "mistral.rs (not phi3), vLLM, transformers, candle, ONNX Runtime GenAI",
     "factors are refused or dropped: give them the model folder"),
    ("G38", INFORMATION, "an adapter, or a model under another architecture's name", "llama.cpp --lora",
     "an adapter made for the other architecture's name does not load"),
    ("G39", ERROR, "the embedded record and the keys that llama.cpp reads disagree", "every reader of the record",
     "`longrope read` refuses the file; one of the two is wrong"),
)  # fmt: skip

GGUF_RULES: Mapping[str, Rule] = MappingProxyType({row[0]: Rule(*row) for row in _ROWS})
