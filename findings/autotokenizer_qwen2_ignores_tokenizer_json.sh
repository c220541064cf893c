#!/bin/sh
# transformers 5.24.0: beside a Qwen2 config.json AutoTokenizer does not read the tokenizer that was saved.
#
# A folder holds a tokenizer.json of whole words, written by save_pretrained, whose tokenizer_config.json names no
# class of a model. Beside a Llama config AutoTokenizer opens it as it is. Beside a Qwen2 config it makes a byte-level BPE
# of its own kind instead, without the file's vocabulary: the same text has no token ids at all, and nothing is said.
# Merges, distillation and whatever else gives a Qwen2 model another vocabulary meet this when the result is loaded.
#
# Exit 0: as described. Exit 1: it has changed. Seen with transformers 5.24.0, tokenizers as it requires, torch 2.13.0.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

words = {word: number for number, word in enumerate(["<unk>", "hello", "world", "red", "blue"])}
text, seen = "hello red world", {}
for config in (LlamaConfig, Qwen2Config):
    folder = config.model_type
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>").save_pretrained(folder)
    config(
        vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    ).save_pretrained(folder)
    opened = AutoTokenizer.from_pretrained(folder)
    of_file = Tokenizer.from_file(f"{folder}/tokenizer.json").encode(text).ids
    seen[folder] = opened(text).input_ids
    print(f"{folder}: {type(opened).__name__} gives {seen[folder]}, tokenizer.json {of_file}")
print(f"transformers {transformers.__version__}")
sys.exit(0 if seen == {"llama": [1, 3, 2], "qwen2": []} else 1)
PYTHON
