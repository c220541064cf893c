"""rank_pattern and alpha_pattern mean what PEFT means, on the names they were written for."""

from pathlib import Path

import torch

from tests.real_files.support import adapter, logits, merged, real_file, tiny


@real_file(4, family="Qwen2", option="alpha_pattern, one module", expected="PEFT, unmerged", before="right")
def test_a_plain_alpha_pattern(tmp_path: Path) -> None:
    base = tiny("Qwen2", tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["q_proj"], alpha_pattern={"layers.0.self_attn.q_proj": 32})
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)
