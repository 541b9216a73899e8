"""Resolves the name or path of a model to a local folder or file."""

from pathlib import Path

# What is read from a repository: configuration, tokenizer and safetensors weights.
_TEXT = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHTS = ("*.safetensors",)
# Copies of the weights in other layouts.
_IGNORED = ("*/*.safetensors", "consolidated*.safetensors")


def locate(model: str | Path, *, revision: str | None = None, token: str | None = None, weights: bool = True) -> Path:
    """The local folder or file that `model` names; a hub name "org/name" is downloaded into the standard cache.

    `weights=False` leaves the weights out. ValueError says what was tried and names the remedy if nothing is found.
    """
    text = str(model)
    if not text.strip():
        raise ValueError("model is empty; give a folder, a .gguf file or a hub name such as 'org/name'")
    try:
        path = Path(text).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a name longer than any file's; "~name" of no user
        raise ValueError(f"model {text!r:.300} cannot be looked up as a path: {error!s:.300}") from error
    if isinstance(model, Path) or _is_path(text):
        raise ValueError(f"model {text!r}: there is no such folder or file")
    return _download(text, revision=revision, token=token, weights=weights)


def _is_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text or text.endswith(".gguf")


def _download(name: str, *, revision: str | None, token: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            allow_patterns=[*_TEXT, *_WEIGHTS] if weights else [*_TEXT],
            ignore_patterns=[*_IGNORED],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model {name!r}: no local folder or file has this name, and it could not be had from the Hugging Face hub"
            f"{at} ({type(error).__name__}: {reason}). Give the path of a local folder or .gguf file, check the name "
            "and the network, and for a private or gated model give a token (HF_TOKEN)"
        ) from error
    return Path(folder)
