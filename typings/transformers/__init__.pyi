# What the package uses of transformers, as the type checker sees it: reading its own types takes longer than all else.
from typing import Any

def __getattr__(name: str) -> Any: ...
