"""The model of a run: loaded with its factors, made trainable, attending and scoring as training wants, and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from longrope_export.description import ModelDescription
from longrope_export.loader import load
from longrope_export.rotary import core_of
from longrope_export.scaling import RopeScaling
from longrope_export.training.adapter import save_adapter
from longrope_export.training.arguments import uses_bfloat16
from longrope_export.training.attention import Pattern, training_attention
from longrope_export.training.batches import Examples
from longrope_export.training.checkpoints import Checkpoints
from longrope_export.training.config import FinetuneConfig
from longrope_export.training.corpus import Corpus
from longrope_export.training.heldout import HeldOut, Measure
from longrope_export.training.inputs import Inputs
from longrope_export.training.loss import summed_loss
from longrope_export.training.output import write_model
from longrope_export.training.parameters import LoraOptions, make_trainable, merge, target_names, trained_weights
from longrope_export.training.processes import parts_of_a_row
from longrope_export.training.rotation import TrainingRotation
from longrope_export.training.trainer import LongTrainer

ADAPTER_FOLDER = "adapter"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ATTENTION = {"full": "longrope_full", "s2": "longrope_s2", "scca": "longrope_scca"}


class TrainedModel:
    """`model` in memory, with what a trainer needs beside it."""

    def __init__(self, model: Any, config: FinetuneConfig, inputs: Inputs, use_cache: bool) -> None:
        self.model, self._config, self._inputs, self._use_cache = model, config, inputs, use_cache
        self._own_attention = str(core_of(model).config._attn_implementation)
        self.rotation = TrainingRotation(model, inputs.scaling)

    @classmethod
    def load(cls, config: FinetuneConfig, inputs: Inputs) -> TrainedModel:
        """The weights of `config.model`, trainable as asked, with gradient checkpointing as asked."""
        # Trained weights are float32: bfloat16 would lose updates. Frozen ones are only computed with.
        frozen = config.train != "full" and uses_bfloat16(config.dtype)
        base = load(config.model, inputs.scaling, switch="long", dtype=torch.bfloat16 if frozen else torch.float32)
        use_cache = bool(core_of(base).config.use_cache)
        torch.manual_seed(config.seed)
        model = make_trainable(base, config.train, lora_options(config))
        for weight in trained_weights(model).values():
            weight.data = weight.data.float()
        if config.gradient_checkpointing:
            # Until transformers 5.20 it had the second name.
            name = "activation_checkpointing_enable"
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return cls(model, config, inputs, use_cache)

    @contextmanager
    def training(self) -> Iterator[None]:
        """While active, `model(labels=…, longrope_pattern=…)` gives summed losses under the asked attention."""
        with ExitStack() as active:
            active.enter_context(summed_loss(self.model))
            # Context parallelism replaces PyTorch's own kernel, which is then the only one that may be called.
            if parts_of_a_row() == 1:
                active.enter_context(training_attention(self.model, ATTENTION[self._config.attention]))
            yield

    def pattern(self, documents: Tensor) -> Pattern | None:
        """What attention has to know about a batch of rows whose documents are numbered [B, T]; None where it is plain."""
        if parts_of_a_row() > 1:
            return None
        return Pattern.of(
            list(documents.cpu().numpy()), group_share=self._config.group_share, shifts=self._config.shifts
        )

    def held_out(self, corpus: Corpus) -> HeldOut | None:
        """The held-out documents of `corpus`, measured with full attention; None without any."""
        if not corpus.held:
            return None
        window, target = self._inputs.window, self._inputs.target
        measures = [Measure(f"perplexity_{window}_short", window, False)]
        if corpus.held_length >= target:
            measures.append(Measure(f"perplexity_{target}_long", target, True))
        return HeldOut(corpus.held, measures, self._full_attention)

    def _full_attention(self, model: Any) -> AbstractContextManager[None]:
        return training_attention(self.model, self._own_attention)

    def trainer(
        self, corpus: Corpus, arguments: Any, checkpoints: Checkpoints, callbacks: list[TrainerCallback]
    ) -> LongTrainer:
        """The trainer of the rows of `corpus`, for use inside `training`; measuring is left out without documents."""
        held_out = self.held_out(corpus) if arguments.eval_strategy != "no" else None
        if held_out is None:
            arguments.eval_strategy, arguments.eval_on_start = "no", False
        return LongTrainer(
            self.model,
            arguments,
            Examples(corpus.plan, self._inputs.positions),
            rotation=self.rotation,
            pattern=self.pattern,
            checkpoints=checkpoints,
            held_out=held_out,
            callbacks=callbacks,
        )

    def final_state(self, trainer: Any) -> dict[str, Tensor] | None:
        """The trained weights where they are spread over processes, which all must ask; None where `model` has them."""
        if not trainer.is_fsdp_enabled:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(trainer.model, options=whole)
        return state

    def write(
        self,
        folder: Path,
        state: Mapping[str, Tensor] | None,
        tokenizer: Any,
        scaling: RopeScaling,
        summary: Mapping[str, Any],
    ) -> None:
        """Write the merged model, in the dtype that the base model is stored in, and what belongs to it.

        A LoRA's adapter stands in the folder `adapter` as well. `state` is `final_state`'s. The model is merged in place.
        """
        model = self.model
        if state is not None:
            model = TrainedModel.load(self._config, self._inputs).model
            model.load_state_dict(dict(state))
        if self._config.train != "full":
            (folder / ADAPTER_FOLDER).mkdir()
            save_adapter(model, folder / ADAPTER_FOLDER, scaling, self._config.model)
        merged = merge(model, use_cache=self._use_cache).to(stored_dtype(self._inputs.description))
        write_model(folder, merged, tokenizer, scaling, summary)


def lora_options(config: FinetuneConfig) -> LoraOptions:
    """The LoRA that `config` asks for."""
    return LoraOptions(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)


def check_targets(config: FinetuneConfig, inputs: Inputs) -> None:
    """Raise `LongRopeError` for LoRA targets that the model does not have, without reading its weights.

    A GGUF's are checked when it is loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.train == "full" or inputs.description.kind != "hf":
        return
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(config.model), local_files_only=True))
    target_names(empty, config.lora_targets)


def stored_dtype(description: ModelDescription) -> torch.dtype:
    """The dtype that most of the model's weights are stored in; bfloat16 for quantised ones."""
    most = max(description.tensor_bytes, key=lambda name: description.tensor_bytes[name], default="")
    return DTYPES.get(most, torch.bfloat16)
