"""Names of rows that makers keep free, and of tokens that are none of them."""

import pytest

from consilience.experts.vocabulary import is_unused


@pytest.mark.parametrize(
    "token",
    [
        "<|reserved_special_token_5|>",  # Llama 3
        "<unused7>",  # Gemma
        "[unused1]",  # BERT
        "[control_8]",  # Mistral
        ">>UNUSED_1<<",  # Falcon 3
        "<｜place▁holder▁no▁12｜>",  # DeepSeek
        "<|extra_0|>",  # Qwen
    ],
)
def test_room_for_tokens_to_come(token: str) -> None:
    assert is_unused(token)


@pytest.mark.parametrize("token", ["<extra_id_0>", "<|im_start|>", "[PAD]", ">>", "<0x0A>", "<|fim_pad|>", "control_8"])
def test_tokens_of_their_own(token: str) -> None:
    assert not is_unused(token)
