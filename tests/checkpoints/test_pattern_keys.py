"""Keys of rank_pattern and alpha_pattern: what they apply to, and for how long they are matched."""

import pytest

from consilience.checkpoints.patterns import matching_keys
from consilience.errors import InputError


def test_the_bound_holds() -> None:
    harmless = r"layers\.(0|1)+\.q_proj"
    assert matching_keys([harmless], ["model.layers.0.q_proj", "q_proj"], "here") == {
        "model.layers.0.q_proj": [harmless],
        "q_proj": [],
    }
    with pytest.raises(InputError, match=r"here: .*take more than 0 s"):
        matching_keys([harmless], ["model.layers.0.q_proj"], "here", seconds=0)


def test_keys_match_as_peft_matches_them() -> None:
    """get_pattern_key: at the end of the name, from a dot on; else the name itself, whatever it means as a pattern."""
    from peft.utils.other import get_pattern_key

    keys = ["q", "a.b", r"^a\.b\.q", "x|y.q", r"\d+.q", "h[0]", "(a|b)+.q", ".*"]
    modules = ["a.b.q", "ab.q", "a.b.xq", "a.xby.q", "a.12.q", "h[0]", "a.y.q", "z.y.q"]
    for module in modules:
        for key in keys:
            expected = [key] if get_pattern_key([key], module) != module or key == module else []
            assert matching_keys([key], [module], "here")[module] == expected, (key, module)
