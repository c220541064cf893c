"""The table of tied weights is what transformers' classes say."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tools.tied_weights import TABLE, declared, render

QUICK = (
    "BartForConditionalGeneration", "BartModel", "BertForMaskedLM", "BertForPreTraining", "BioGptForCausalLM",
    "BloomForCausalLM", "CohereForCausalLM", "DistilBertForMaskedLM", "ElectraForMaskedLM",
    "FSMTForConditionalGeneration", "FalconForCausalLM", "FlaubertWithLMHeadModel", "GPT2LMHeadModel",
    "GPTJForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "GemmaForCausalLM", "LlamaForCausalLM",
    "LongT5ForConditionalGeneration", "M2M100ForConditionalGeneration", "MT5ForConditionalGeneration",
    "MambaForCausalLM", "MarianMTModel", "MistralForCausalLM", "OPTForCausalLM", "OpenAIGPTLMHeadModel",
    "PegasusForConditionalGeneration", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "RobertaForMaskedLM", "SwitchTransformersForConditionalGeneration", "T5EncoderModel",
    "T5ForConditionalGeneration", "WhisperForConditionalGeneration", "XLNetLMHeadModel",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_common_architectures() -> None:
    transformers: Any = importlib.import_module("transformers")
    content = json.loads(Path(TABLE).read_text(encoding="utf-8"))
    rows = {
        name: (entry["ties"], kind)
        for entry in content["sets"]
        for kind in ("always", "by_default", "if_said")
        for name in entry[kind]
    }
    for name in QUICK:
        ties, default, always = declared(getattr(transformers, name))
        assert rows[name] == (ties, "always" if always else "by_default" if default else "if_said"), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_architecture() -> None:
    version = json.loads(Path(TABLE).read_text(encoding="utf-8"))["transformers"]
    if importlib.import_module("transformers").__version__ != version:
        pytest.skip("python -m tools.tied_weights brings the table to this version")
    assert Path(TABLE).read_text(encoding="utf-8") == render(), "python -m tools.tied_weights rewrites it"
