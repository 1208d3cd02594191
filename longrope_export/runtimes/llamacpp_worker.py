"""Child process around llama.cpp: reads one job folder, loads one GGUF, answers its requests, exits.

The job "serve" answers further jobs, one JSON line each from stdin to stdout, until stdin ends.

A failed assertion inside llama.cpp aborts the whole interpreter, so nothing else may live in this process. The job
folder holds `request.json`; the answers are written there as `answer.json` and `probabilities.npy`. The log goes to
stderr, which the parent keeps.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

# llama.cpp prints the allocated context and cache types at this level; the parent asserts them.
LOG_INFO = 4
# The server clamps the number of wanted probabilities to the vocabulary.
ALL_TOKENS = 2**31 - 1
# Far above any logit: the sampled token is then always the forced one, whatever the probabilities are.
FORCING_BIAS = 1e6


class Client:
    """Requests to the server inside this process, over its local port and with a key of its own."""

    def __init__(self, address: str, key: str) -> None:
        self.address = urlsplit(address)
        self.headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Answer of the server; raises `RuntimeError` with its message when it refuses."""
        connection = http.client.HTTPConnection(self.address.hostname or "127.0.0.1", self.address.port)
        try:
            connection.request("POST", path, json.dumps(body), self.headers)
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "error" in answer:
            raise RuntimeError(answer["error"].get("message", "unknown error"))
        return dict(answer)


def start_server(request: dict[str, Any], key: str) -> Any:
    """Load the GGUF with everything fixed that could change its numbers: one slot, F32 cache, no shift, no fit."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["gguf"]
    params.n_ctx = request["context"]
    params.n_parallel = 1
    params.kv_unified = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = params.ctx_shift = params.warmup = params.ui = False
    params.n_gpu_layers, params.no_op_offload = 0, True
    params.swa_full = True
    params.cache_ram_mib = params.n_ctx_checkpoints = params.n_cache_reuse = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
    params.verbosity = LOG_INFO
    return xllamacpp.Server(params)


def token_log_probabilities(entries: list[dict[str, Any]]) -> npt.NDArray[np.float32]:
    """Log-probabilities [vocabulary] by token id, normalised again in float64 (llama.cpp sums in float32)."""
    values = np.full(len(entries), np.nan)
    for entry in entries:
        values[entry["id"]] = np.nan if entry["logprob"] is None else entry["logprob"]
    peak = values.max()
    return np.asarray(values - peak - np.log(np.exp(values - peak).sum()), dtype=np.float32)


def forced_token(client: Client) -> int:
    """A plain token: the server omits probabilities where the sampled token ends the text or splits a character."""
    tokens = client.post("/tokenize", {"content": "a", "add_special": False})["tokens"]
    if not tokens:
        raise RuntimeError("the tokenizer has no token for the letter a")
    return int(tokens[-1])


def probabilities(client: Client, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the log-probabilities after every prompt to `probabilities.npy` [prompts, vocabulary]."""
    token = forced_token(client)
    rows = []
    for prompt in request["prompts"]:
        body = {
            "prompt": prompt, "n_predict": 1, "n_probs": ALL_TOKENS, "cache_prompt": request["reuse_prefix"],
            "samplers": ["top_k"], "top_k": 1, "logit_bias": [[token, FORCING_BIAS]],
        }  # fmt: skip
        answer = client.post("/completion", body)
        if answer["tokens_evaluated"] != len(prompt):
            raise RuntimeError(f"only {answer['tokens_evaluated']} of {len(prompt)} prompt tokens were evaluated")
        if not answer.get("completion_probabilities"):
            raise RuntimeError("the server returned no probabilities")
        rows.append(token_log_probabilities(answer["completion_probabilities"][0]["top_logprobs"]))
    np.save(folder / "probabilities.npy", np.stack(rows), allow_pickle=False)
    return {}


def tokens(client: Client, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Token ids of every text."""
    options = {"add_special": request["add_special"], "parse_special": request["parse_special"]}
    answers = [client.post("/tokenize", {"content": text, **options}) for text in request["texts"]]
    return {"tokens": [answer["tokens"] for answer in answers]}


def generated(client: Client, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Greedy continuation of one prompt as token ids."""
    body = {
        "prompt": request["prompt"], "n_predict": request["count"], "samplers": ["top_k"], "top_k": 1,
        "cache_prompt": False, "return_tokens": True, "ignore_eos": request["ignore_eos"],
    }  # fmt: skip
    return {"tokens": client.post("/completion", body)["tokens"]}


def loaded(client: Client, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Nothing more than loading."""
    return {}


def serve(client: Client, channel: TextIO, folder: Path) -> None:
    """Answer the jobs on stdin, one line each; the first line says that the model is loaded."""
    say(channel, {"loaded": True})
    for line in sys.stdin:
        request = json.loads(line)
        say(channel, answer_to(client, request, folder))


def say(channel: TextIO, answer: dict[str, Any]) -> None:
    """One line, at once."""
    channel.write(json.dumps(answer) + "\n")
    channel.flush()


def answer_to(client: Client, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The job's answer, or what llama.cpp has against it."""
    try:
        return JOBS[request["job"]](client, request, folder)
    except (RuntimeError, OSError, http.client.HTTPException) as error:
        return {"error": str(error) or type(error).__name__}


JOBS = {"probabilities": probabilities, "tokenize": tokens, "generate": generated, "load": loaded}


def main(folder: Path) -> None:
    """Run the job of `folder`; an error that llama.cpp reports is part of the answer."""
    request = json.loads((folder / "request.json").read_text())
    serving = request["job"] == "serve"
    # llama.cpp prints to stdout as well: what it prints goes to the log, the answers have the pipe for themselves.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    key = secrets.token_hex(16)
    try:
        server = start_server(request, key)
    except (RuntimeError, ValueError) as error:
        refusal = {"error": str(error), "refused": True}
        say(channel, refusal) if serving else write_answer(folder, refusal)
        return
    client = Client(server.listening_address, key)
    if serving:
        serve(client, channel, folder)
    else:
        write_answer(folder, answer_to(client, request, folder))
    # The server's destructor can wait for ever for a main loop that has not begun: leave without it.
    os._exit(0)


def write_answer(folder: Path, answer: dict[str, Any]) -> None:
    """The file whose presence tells the parent that the child did not die on the way."""
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
