"""The lines to copy: whatever the file is called, a shell and Python read back the same name."""

from __future__ import annotations

import ast
import importlib
import shlex
import sys
from collections.abc import Callable

import pytest

from longrope_export import RopeScaling
from longrope_export.converters import recipes
from longrope_export.converters.card import CardContents, model_card
from longrope_export.runtimes.llamacpp_library import library_path

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


def test_ollama_is_told_of_the_shift_where_there_is_an_attention_factor(record: Record) -> None:
    assert '"shift": false' in recipes.ollama_recipe("a.gguf", record())
    one = record(long_attention_factor=1.0, short_attention_factor=1.0)
    assert recipes.ollama_recipe("a.gguf", one).startswith("cat > Modelfile")


def test_the_options_of_llama_server_exist(record: Record) -> None:
    library = library_path().read_bytes()
    for line in recipes.llama_cpp_recipe("a.gguf", record()).splitlines():
        options = [word for word in shlex.split(line, comments=True) if word.startswith("-")]
        assert options
        assert all(option.encode() + b"\0" in library for option in options)
    assert b"--no-such-option\0" not in library


@pytest.mark.parametrize("name", NAMES)
def test_mlx_takes_its_line(name: str, record: Record) -> None:
    line = recipes.mlx_recipe(name, record())
    words = shlex.split(line, comments=True)
    assert words[-2:] == ["<", "long.txt"]
    importlib.import_module("mlx_lm.generate")
    parsed = sys.modules["mlx_lm.generate"].setup_arg_parser().parse_args(words[1:-2])
    assert (words[0], parsed.model, parsed.prompt) == ("mlx_lm.generate", name, "-")
    assert "2048 tokens" in line


def test_the_card_of_a_folder_has_every_runtime(record: Record) -> None:
    card = model_card(CardContents(name="m", scaling=record(), command="x", gguf="m.gguf", folder=True))
    running = card.partition("## Running it")[2].partition("## Making it again")[0]
    lines = [
        recipes.vllm_recipe(".", record()), recipes.mlx_recipe(".", record()),
        recipes.llama_cpp_recipe("m.gguf", record()), recipes.ollama_recipe("m.gguf", record()),
        recipes.transformers_recipe(".", record()),
    ]  # fmt: skip
    assert all(line in running for line in lines)
