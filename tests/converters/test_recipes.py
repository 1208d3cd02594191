"""The lines to copy: whatever the file is called, a shell and Python read back the same name."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Callable

import pytest

from longrope_export import RopeScaling
from longrope_export.converters import recipes

Record = Callable[..., RopeScaling]
NAMES = ["longer.gguf", "my models/it's longer (2).gguf", 'a "b" $HOME.gguf', "/data/x\\y.gguf"]


@pytest.mark.parametrize("name", NAMES)
def test_names_survive_quoting(name: str, record: Record) -> None:
    for line in recipes.llama_cpp_recipe(name, record()).splitlines():
        assert shlex.split(line, comments=True)[:3] == ["llama-server", "-m", name]
    assert shlex.split(recipes.vllm_recipe(name, record()))[2] == name
    for code in (recipes.gguf_loader_recipe(name), recipes.transformers_recipe(name, record())):
        texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert set(texts) == {name}


@pytest.mark.parametrize(
    ("name", "model"), [("out/Longer.gguf", "longer"), ("My model (2).gguf", "my-model-2"), ("é.gguf", "model")]
)
def test_ollama_gets_a_name_that_it_allows(name: str, model: str, record: Record) -> None:
    text = recipes.ollama_recipe(name, record())
    assert f"FROM ./{name}\n" in text
    assert "PARAMETER num_ctx 2048\n" in text
    assert text.endswith(f"ollama create {model} -f Modelfile && ollama run {model}")


def test_a_switching_record_names_both_contexts(record: Record) -> None:
    long, short = recipes.llama_cpp_recipe("a.gguf", record()).splitlines()
    assert "-c 2048 --no-context-shift" in long
    assert "-c 512 " in short
    static = record(short_factor=record().long_factor)
    assert len(recipes.llama_cpp_recipe("a.gguf", static).splitlines()) == 1
