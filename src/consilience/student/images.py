"""Image rows as model inputs: ``{"image": "cat.png", "prompt": "What is this?", "response": "A cat."}``.

The image's path starts from the folder of its JSONL file. A user's turn with a place for the image goes through the
processor's chat template; without a template the prompt itself must hold the processor's image token.

*Every* position of prompt and response is compared, those of image tokens included, as the released code of Expert
Merging does: what the language model makes of an image is most of what an image-text expert knows. Under
``positions: response`` only those count that predict the response.
"""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from consilience.checkpoints.files import exists, siblings
from consilience.errors import InputError, MachineError, nearest
from consilience.tasks.encoding import Encoded
from consilience.tasks.load import explained, quiet
from consilience.tasks.rows import Row

#: Formats that are decoded inside Pillow; others (EPS) would start programs of the system on a stranger's file.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
#: More pixels than this are refused before they are decoded: a few kilobytes can unpack to gigabytes.
MOST_PIXELS = 64_000_000


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the processor (tokenizer and image processor) of an image-text model's folder.

    Rows hold no videos, so a processor whose video part is missing, or needs a package that is, loads without it.

    Raises:
        InputError: Pillow is missing, there is no processor, or it does not load.
    """
    from importlib.util import find_spec

    if find_spec("PIL") is None:
        raise InputError("image rows need Pillow; install it with: pip install pillow")
    with quiet(), explained(str(folder), "its processor does not load; copy the base's processor files there"):
        processor = _load(folder, trust_remote_code=trust_remote_code)
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise InputError(
            f"{folder}: holds no processor of images and text, so rows with an image cannot be read; drop the key, or "
            "give the base its processor files (preprocessor_config.json)"
        )
    return processor


def _load(folder: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        return AutoProcessor.from_pretrained(folder, **options)
    except (ImportError, OSError, ValueError):
        kind = _without_video(folder, **options)
        if kind is None:
            raise
        return kind.from_pretrained(folder, **options)


def _without_video(folder: Path, **options: Any) -> Any:
    """Return the class of a folder's processor less its video part; None if it has no such part."""
    import transformers
    from transformers.models.auto import processing_auto

    known: Any = processing_auto
    config: Any = transformers.AutoConfig.from_pretrained(folder, **options)
    kind: Any = getattr(transformers, str(known.PROCESSOR_MAPPING_NAMES.get(config.model_type)), None)
    if kind is None or not hasattr(kind, "get_attributes") or "video_processor" not in kind.get_attributes():
        return None
    parts = [part for part in kind.get_attributes() if part != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: list(parts))})


@contextmanager
def _readable(where: str, path: Path) -> Generator[None]:
    """Turn whatever a decoder raises over a user's image into one line."""
    from PIL.Image import DecompressionBombError, DecompressionBombWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's on odd metadata; its alarm on size is an error
            warnings.simplefilter("error", DecompressionBombWarning)
            yield
    except (InputError, MachineError):
        raise
    except MemoryError as error:
        raise MachineError(f"{where}: not enough memory to decode {path}") from error
    except (DecompressionBombError, DecompressionBombWarning):
        raise InputError(_too_large(where, path)) from None
    except Exception as error:
        kinds = ", ".join(FORMATS)
        raise InputError(f"{where}: {path} cannot be read as an image; give a whole file of {kinds}") from error


def _too_large(where: str, path: Path) -> str:
    return f"{where}: {path} holds more than {MOST_PIXELS:,} pixels; scale it down"


def open_image(name: str, jsonl_path: Path | None, where: str) -> Any:
    """Open a row's image, upright and in RGB.

    Args:
        name: the row's path, absolute or from the folder of its file.
        jsonl_path: the row's file; None for rows made in memory, whose paths start from the current folder.
        where: how errors name the row.

    Raises:
        InputError: there is no such file, it is no image, or has too many pixels.
    """
    from PIL import Image, ImageOps

    path = Path(name) if jsonl_path is None else jsonl_path.parent / name
    if not exists(path):
        raise InputError(f"{where}: image {path}: no such file{nearest(path.name, siblings(path))}")
    if not path.is_file():  # a pipe would block whoever opens it
        raise InputError(f"{where}: image {path}: is a folder or a device; name a file")
    with _readable(where, path), Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise InputError(_too_large(where, path))
        return ImageOps.exif_transpose(image).convert("RGB")


def encode_image(row: Row, jsonl_path: Path | None, processor: Any, where: str) -> tuple[Encoded, dict[str, Any]]:
    """Return a row's ids, compared positions and targets, and what else the processor makes of it.

    The prompt's ids are an exact prefix of the sequence's. ``Encoded.row`` is 0.

    Args:
        row: ``image`` and ``prompt``, perhaps ``response``.
        jsonl_path: the row's file, see ``open_image``.
        processor: see ``load_processor``.
        where: how errors name the row.

    Returns:
        The sequence, and tensors by the names of the model's arguments (``pixel_values``, ...).

    Raises:
        InputError: the row holds no prompt, its image cannot be read, or the processor refuses it.
    """
    if row.prompt is None or row.image is None:
        raise InputError(f"{where}: a row with an image needs prompt (+ response), not text or messages; rewrite it")
    image = open_image(row.image, jsonl_path, where)
    prompt, rest = _texts(processor, row.prompt, row.response, where)
    ids, extra = _process(processor, image, prompt, where)
    if not rest:
        return Encoded(0, None, (), ids, tuple(range(len(ids))), ()), extra
    whole, more = _process(processor, image, prompt + rest, where)
    if whole[: len(ids)] != ids:
        # A token would straddle the boundary: a model that generates never sees it, so tokenise piece by piece.
        whole = ids + tuple(processor.tokenizer(rest, add_special_tokens=False).input_ids)
        more = {key: _fitted(key, value, len(ids), len(whole)) for key, value in extra.items()}
    # The last token predicts nothing that is scored.
    more = {key: _fitted(key, value, len(whole), len(whole) - 1) for key, value in more.items()}
    positions = tuple(range(len(ids) - 1, len(whole) - 1))
    return Encoded(0, None, (), whole[:-1], positions, whole[len(ids) :]), more


def _fitted(key: str, value: Any, held: int, wanted: int) -> Any:
    """Return a tensor that holds something of every token, [1, held, ...], for ``wanted`` tokens; others as they are.

    Tokens that are added are text, which all of these tensors mark by 0.
    """
    if not key.endswith(("_ids", "_mask")) or tuple(value.shape[:2]) != (1, held):
        return value
    if wanted <= held:
        return value[:, :wanted]
    import torch

    return torch.cat([value, value.new_zeros((1, wanted - held, *value.shape[2:]))], 1)


def _process(processor: Any, image: Any, text: str, where: str) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Run the processor; return the ids and its other tensors."""
    templated = bool(getattr(processor, "chat_template", None))
    with quiet(), explained(where, "the processor refuses the row"):
        # A template writes its own special tokens.
        made = processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=not templated)
        ids = tuple(made.pop("input_ids")[0].tolist())
    return ids, {key: value for key, value in made.items() if key != "attention_mask"}


def _texts(processor: Any, prompt: str, response: str | None, where: str) -> tuple[str, str]:
    """Return the text that a model is given, image token included, and what it is to write after it."""
    token = getattr(processor, "image_token", None)
    held = bool(token) and token in prompt
    if not getattr(processor, "chat_template", None):
        if not held:
            raise InputError(
                f"{where}: the base's processor has no chat template, so the prompt must say where the image goes; put "
                f"{token or 'the image token'} into it"
            )
        return prompt, response or ""
    text = {"type": "text", "text": prompt}
    asked: list[dict[str, Any]] = [{"role": "user", "content": [text] if held else [{"type": "image"}, text]}]
    given = _render(processor, asked, where, generation=True)
    if not held and given == _render(processor, [{"role": "user", "content": [text]}], where, generation=True):
        raise InputError(
            f"{where}: the base's chat template leaves images out; put {token or 'the image token'} into the prompt, "
            "or give the base its processor's template"
        )
    if response is None:
        return given, ""
    answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": response}]}]
    return _cut(
        _render(processor, answered, where), given, _render(processor, asked, where), response, processor, where
    )


def _cut(full: str, given: str, bare: str, response: str, processor: Any, where: str) -> tuple[str, str]:
    """Cut a whole conversation into what is given and what is answered, up to the token that ends the turn."""
    tokenizer = processor.tokenizer
    special = (*tokenizer.all_special_tokens, *map(str, tokenizer.get_added_vocab()))
    if full.rstrip().endswith(special):
        full = full.rstrip()  # white space after the token that ends a turn is the template's, not the model's
    if not full.startswith(given):
        # Some templates open a generation with more than they write for a finished turn (an empty thought, say).
        at = full.find(response.strip(), len(bare)) if full.startswith(bare) else -1
        given = full[: max(at, 0)]
    if not given or len(given) >= len(full):
        raise InputError(f"{where}: the chat template rewrites the prompt once it is answered; drop the response")
    return given, full[len(given) :]


def _render(processor: Any, turns: list[dict[str, Any]], where: str, *, generation: bool = False) -> str:
    with explained(where, "the chat template refuses the row"):
        return str(processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
