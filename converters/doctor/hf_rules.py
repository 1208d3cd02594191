"""Every misconfiguration of a model folder's config.json that the doctor knows, in one table.

Symptoms were seen in transformers 5.23 or read in the named runtime's source; see docs/doctor.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from longrope_export.converters.doctor.findings import ERROR, INFORMATION, WARNING, Rule

_ALL = "every runtime"

_ROWS = (
    ("H01", ERROR, "a factor list of a wrong length", _ALL, "transformers warns, then fails or rotates wrongly"),
    ("H02", ERROR, "only one of long_factor and short_factor", _ALL, "KeyError"),
    ("H03", ERROR, "original_max_position_embeddings is missing", "transformers, llama.cpp's converter",
     "transformers never uses the long factors inside the window; the converter stops"),
    ("H04", INFORMATION, "original_max_position_embeddings is not at the top level", "ExLlamaV2", "it is not found"),
    ("H05", WARNING, "both type and rope_type", "ExLlamaV2", "it stops with an assertion"),
    ("H06", WARNING, "the old name su", "transformers 5", "the rope type is refused"),
    ("H07", WARNING, "rope_parameters without rope_scaling", "transformers 4, mlx-lm, older GGUF converters",
     "the factors are not found"),
    ("H08", WARNING, "max_position_embeddings is not extended", "vLLM, ExLlama, GGUF converters",
     "short factors only; the attention factor becomes 1"),
    ("H09", WARNING, "factor is not the windows' ratio", "mlx-lm, ExLlama, GGUF converters",
     "they use the ratio, transformers the factor: other attention factors"),
    ("H10", WARNING, "an attention_factor that is not the formula's", "vLLM, SGLang, mlx-lm, ExLlama, GGUF converters",
     "they ignore it"),
    ("H11", WARNING, "short_mscale or long_mscale that transformers does not apply", "transformers, GGUF converters",
     "they ignore it; vLLM and SGLang apply it"),
    ("H12", INFORMATION, "a folder for llama.cpp's convert_hf_to_gguf.py", "llama.cpp",
     "outside phi3 and minicpm it drops the factors silently: use `longrope export`"),
    ("H13", INFORMATION, "a folder for `ollama create`", "Ollama", "it panics on a longrope qwen2 or qwen3"),
    ("H14", INFORMATION, "a folder for `ollama create`", "Ollama", "it drops the factors of a llama or mistral silently"),
    ("H15", INFORMATION, "generation that crosses the original window", "transformers (not phi3)",
     "cached keys stay short; use `longrope_export.load`"),
    ("H16", INFORMATION, "a batch that crosses the original window", "SGLang", "cached keys stay short"),
    ("H17", INFORMATION, "one set for the whole server", "vLLM",
     "long factors for all prompts when max_model_len exceeds the original window, else short ones"),
    ("H18", INFORMATION, "short prompts", "mlx-lm", "the long factors apply at every length"),
    ("H19", INFORMATION, "a family whose GGUF architecture ignores factors", "llama.cpp",
     "no GGUF of its own architecture can carry them"),
    ("H20", INFORMATION, "q and k are normalised", "llama.cpp", "no llama, phi3 or granite GGUF can hold the model"),
    ("H21", INFORMATION, "factors below 1, or not rising", _ALL, "legal; a list of 1/λ instead of λ shortens the window"),
    ("H22", ERROR, "rope_parameters and rope_scaling differ", "transformers, vLLM, mlx-lm",
     "runtimes apply different factors"),
    ("H23", ERROR, "the record and rope_parameters disagree", "every reader of the record",
     "`longrope read` refuses the folder; one of the two is wrong"),
    ("H24", ERROR, "config.json cannot be read", _ALL, "the model does not load"),
)  # fmt: skip

HF_RULES: Mapping[str, Rule] = MappingProxyType({row[0]: Rule(*row) for row in _ROWS})
