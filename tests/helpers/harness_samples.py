"""Child process: samples of lm-evaluation-harness' RULER generators for given seeds and sizes, as JSON on stdout.

`python harness_samples.py SEED SIZE ESSAY` prints {task: [prompt, lead, references]}, SIZE being the haystack's. What the
harness would download is replaced: punkt's place by an empty folder, and its sentences by ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(seed: int, size: int, essay: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizers" / "punkt_tab").mkdir(parents=True)
        os.environ["NLTK_DATA"] = folder
        from lm_eval.tasks.ruler import cwe_utils, fwe_utils, prepare_niah, vt_utils
        from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    import numpy as np

    from longrope_export.evaluation.tasks.ruler.niah import SETTINGS, split_sentences

    prepare_niah.cached_sent_tokenize = lambda text: list(split_sentences(text))
    found: dict[str, Any] = {}
    for task, setting in SETTINGS.items():
        random.seed(seed)
        haystack: Any = {
            "noise": prepare_niah.get_haystack("repeat"),
            "needle": prepare_niah.get_haystack("needle"),
            "essay": essay.split(),
        }[setting.haystack]
        prompt, references, query = prepare_niah.generate_input_output(
            size, haystack, type_haystack={"noise": "repeat"}.get(setting.haystack, setting.haystack),
            num_needle_k=setting.keys, type_needle_k=setting.key, num_needle_v=setting.values,
            type_needle_v=setting.value, template=TEMPLATE, num_needle_q=setting.queries,
        )  # fmt: skip
        one = setting.queries * setting.values == 1
        kind = setting.value[:-1] if one else setting.value
        lead = f"The special magic {kind} for {query} mentioned in the provided text {'is' if one else 'are'}"
        found[task] = [prompt, lead, references]
    random.seed(seed)
    np.random.seed(seed)
    text, names = vt_utils.generate_input_output(size, 1, 4)
    found["vt"] = [*_parted(text, " Answer:"), names]
    # Its shuffles go on from one call to the next; ours begin anew, as RULER's do.
    cwe_utils.RNG = _Again()
    random.seed(seed)
    example, text, words = cwe_utils.generate_input_output(size, 4096)
    found["cwe"] = [*_parted(text, " Answer:"), words]
    found["cwe example"] = example
    random.seed(seed)
    text, words, _ = fwe_utils.generate_input_output(10**9, _no_tokens, num_words=size, vocab_size=40)
    found["fwe"] = [*_parted(text, " Answer:"), words]
    return found


class _Again:
    def shuffle(self, items: list[Any]) -> None:
        random.Random(42).shuffle(items)


def _no_tokens(text: str) -> Any:
    return type("Encoded", (), {"input_ids": []})()


def _parted(text: str, mark: str) -> list[str]:
    at = text.rindex(mark)
    return [text[:at], text[at:].strip()]


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        samples = main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    print(json.dumps(samples))
