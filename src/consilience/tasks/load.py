"""Load a transformers model and its tokenizer from a local folder, strictly: nothing is initialised at random."""

import warnings
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from consilience.checkpoints.adapter_files import CONFIG, adapter_files, locate_adapter
from consilience.checkpoints.checkpoint import Checkpoint
from consilience.checkpoints.open import holds_model, open_checkpoint
from consilience.checkpoints.packed import packing, quantization_of
from consilience.errors import InputError, MachineError, option
from consilience.experts.vocabulary import chat_templates, has_tokenizer
from consilience.tasks.peft_files import loadable, resize_vocabulary


@contextmanager
def quiet() -> Generator[None]:
    """Silence transformers' own bars and reports, which errors here replace."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def explained(what: str, verb: str) -> Generator[None]:
    """Turn whatever a library raises over a user's files into one line; the cause stays attached for ``--debug``."""
    try:
        yield
    except (InputError, MachineError):
        raise
    except MemoryError as error:
        raise MachineError(f"{what}: not enough memory to load it") from error
    except Exception as error:
        text = str(error).strip()
        first = text.splitlines()[:1] or [""]
        if "trust_remote_code" in text:
            raise InputError(
                f"{what}: comes with .py files that must be run to load it; if you trust them, pass "
                f"{option('trust_remote_code')}"
            ) from error
        if "weights_only" in text or "Weights only load failed" in text:
            raise InputError(
                f"{what}: its weights are pickled with objects other than tensors, which could run code; save its "
                "state dict as safetensors"
            ) from error
        if "can't allocate memory" in first[0] or "out of memory" in first[0]:
            raise MachineError(f"{what}: not enough memory to load it") from error
        raise InputError(f"{what}: {verb} ({type(error).__name__}: {first[0][:300]})") from error


def require_transformers(purpose: str) -> None:
    """Check that torch and transformers are there.

    Raises:
        InputError: names the extra to install.
    """
    from importlib.util import find_spec

    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise InputError(f"{purpose} needs {package}; install it with: pip install 'consilience[hf]'")


def check_folder(folder: Path) -> None:
    """Check that a folder can be a transformers model before anything is loaded.

    Raises:
        InputError: it is no folder, an adapter without its base, or has no config.json.
    """
    if (folder / CONFIG).is_file() and holds_model(folder):
        raise InputError(
            f"{folder}: holds an adapter beside a model, and transformers would load that and the base it names; write "
            f"BASE+{folder}, or move {CONFIG} away"
        )
    if (not (folder / "config.json").is_file() or (folder / CONFIG).is_file()) and adapter_files(folder) is not None:
        raise InputError(f"{folder}: holds an adapter, not a model; write BASE+{folder}")
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such model folder; give a Hugging Face folder (config.json, weights, tokenizer)"
        )
    if (folder / "config.json").is_file():
        return
    raise InputError(f"{folder}: holds no config.json; give a Hugging Face model folder")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        InputError: there is none, or it does not load.
    """
    from transformers import AutoTokenizer

    with quiet(), explained(str(folder), "its tokenizer does not load; copy the base's tokenizer files there"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def load_own_tokenizer(folder: Path, adapter: Path | None, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model, or of the adapter on it where that has its own; so with the chat template.

    Raises:
        InputError: there is none, or it does not load.
    """
    if adapter is None:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    own = adapter if has_tokenizer(adapter) else folder
    if own is adapter and not (adapter / "tokenizer_config.json").is_file():
        from transformers import AutoConfig, AutoTokenizer

        with quiet(), explained(str(adapter), "its tokenizer does not load; remove it, and the base's is used"):
            # Without settings the class follows from the model's config, which an adapter has not.
            settings: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
            config = AutoConfig.from_pretrained(folder, **settings)
            tokenizer: Any = AutoTokenizer.from_pretrained(adapter, config=config, **settings)
    else:
        tokenizer = load_tokenizer(own, trust_remote_code=trust_remote_code)
    templates = chat_templates(adapter)
    if templates:
        tokenizer.chat_template = templates["default"] if list(templates) == ["default"] else templates
    return tokenizer


def loader_of(config: Any) -> Any:
    """Return the auto class of a config: the one of image-text models where these are what its weights are of."""
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    image_text: Any = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    causal: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = type(config)
    # Some configs have a class of either kind; the architecture says whose weights the folder holds.
    own = kind in image_text and getattr(image_text[kind], "__name__", None) in (config.architectures or ())
    if own or (kind in image_text and kind not in causal):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def load_model(
    folder: Path | str,
    *,
    adapter: Path | str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    dtype: str = "float32",
) -> Any:
    """Load a language model, or one of text and images, in float32, ready to evaluate.

    Weights stored in bfloat16 are widened, which is exact; under bfloat16 autocast they are narrowed back, also exact.
    A PEFT adapter is folded into the weights where its kind allows it, so it costs nothing at each forward pass.

    Args:
        folder: a Hugging Face folder of a causal, encoder-decoder or image-text model; its weights are read with
            ``weights_only`` and no code in it is run.
        adapter: a LoRA adapter, or any folder that PEFT opens, to put on top.
        device: a torch device.
        trust_remote_code: run the ``.py`` files of the folder (only for models you trust).
        dtype: of the weights; "auto": as they are stored.

    Raises:
        InputError: the folder is no such model, its weights are missing, misshapen or incomplete, the adapter does not
            fit, or there is no such device.
        MachineError: not enough memory.
    """
    folder = Path(folder)
    check_folder(folder)
    check_device(device)
    import torch
    from transformers import AutoConfig

    _check_quantised(folder)
    with quiet(), explained(str(folder), "does not load as a language model"):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        model, report = loader_of(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise InputError(f"{folder}: tensor {absent[0]}{more} missing or misshapen in the weights; restore the files")
    if adapter is not None:
        model = _with_adapter(model, Path(adapter))
    if not getattr(model, "is_quantized", False) or model.device != torch.device(device):
        model = model.to(device)
    # Autocast keeps the bfloat16 copy of a weight between batches only for parameters that require gradients.
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return model.eval()


def _check_quantised(folder: Path) -> None:
    """Refuse quantised weights that transformers would read wrongly without a word.

    Raises:
        InputError: names the weight, its format and what to do.
    """
    import torch
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        checkpoint = open_checkpoint(folder)
    except InputError:
        return  # what cannot be opened here is for the library to name
    try:
        with quiet():
            problem = _misread(checkpoint, AutoHfQuantizer.supports_quant_method, gpu=torch.cuda.is_available())
    finally:
        checkpoint.storage.close()
    if problem is not None:
        raise InputError(f"{folder}: {problem}")


def _misread(checkpoint: Checkpoint, supported: Callable[[dict[str, Any]], bool], *, gpu: bool) -> str | None:
    """Return what transformers would read wrongly of quantised weights, and what to do; None: nothing."""
    said = quantization_of(checkpoint.config) or {}
    for weight in packing(checkpoint).weights.values():
        stored = f"weight {weight.name!r} is stored as {weight.format}"
        if not said:
            return f"{stored}, and config.json has no quantization_config to say so; restore it, or {weight.advice}"
        if not supported(said):
            method = said.get("quant_method")
            return f"{stored}, by quant_method {method!r}, which transformers does not know; pass the unquantised model"
        block, info = said.get("weight_block_size"), checkpoint.tensors.get(weight.name)
        cut = info is not None and block and any(n % b for n, b in zip(info.shape[-2:], block, strict=False))
        if cut and info is not None and not gpu:
            return (
                f"{stored}, and its sizes {list(info.shape)} are no multiple of weight_block_size {block}, which "
                "transformers reads wrongly without a GPU; use one, or pass the unquantised model"
            )
    return None


def check_device(device: str) -> None:
    """Check that torch can compute on a device.

    Raises:
        InputError: there is no such device, or it holds no values.
    """
    import torch

    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        raise InputError(f"device = {device!r}: torch knows none of this name; use cpu, cuda or cuda:1") from None
    try:
        torch.zeros(1, device=device).tolist()
    # By the device: what its driver says, a build of torch without it, and meta, which holds no values.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"device = {device!r}: torch cannot use it: this machine, or this torch {torch.__version__}, has no {kind} "
            f"device of that number ({first}); use cpu"
        ) from None


def _with_adapter(model: Any, adapter: Path) -> Any:
    place = locate_adapter(adapter).folder
    if place is None:
        from consilience.tasks.fold import fold_adapter

        fold_adapter(model, adapter)
        return model
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(f"{adapter}: an adapter needs peft; install it with: pip install 'consilience[hf]'") from None
    with warnings.catch_warnings(record=True) as said, explained(str(adapter), "does not fit as an adapter"):
        warnings.simplefilter("always")
        resize_vocabulary(model, place)
        with loadable(place) as folder:
            adapted: Any = PeftModel.from_pretrained(model, str(folder))
    missing = next((str(w.message) for w in said if "missing adapter keys" in str(w.message)), None)
    if missing:
        raise InputError(f"{adapter}: does not fit the model ({missing[:300]}); check which base it was trained on")
    if any(config.is_prompt_learning for config in adapted.peft_config.values()):
        return adapted  # virtual tokens are not weights
    if getattr(model, "is_quantized", False):
        return adapted  # folded in, the update would be rounded to what the packed weight can hold
    _untie_adapted(adapted)
    flag = getattr(adapted.config, "tie_word_embeddings", None)
    with explained(str(adapter), "cannot be folded into the model's weights"):
        folded: Any = adapted.merge_and_unload(safe_merge=False)
    if flag is not None:  # PEFT switches it off, and some architectures scale their outputs by it
        folded.config.tie_word_embeddings = flag
    return folded


def _untie_adapted(adapted: Any) -> None:
    """Give every adapted layer weights of its own: folding an update into tied ones would move the other side too."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.nn import Parameter

    owners = Counter(id(p) for module in adapted.modules() for p in module.parameters(recurse=False))
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module.get_base_layer()
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if owners[id(parameter)] > 1:
                    setattr(layer, name, Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
