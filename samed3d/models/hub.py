"""Models on Hugging Face: the file behind an address ``hf://OWNER/NAME``."""

from __future__ import annotations

from pathlib import Path

from samed3d.errors import InputError

HUB = "hf://"
PRETRAINED = "model.safetensors"
"""The weights file of a Hugging Face folder."""


def fetch(address: str) -> Path:
    """The weights file of ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``, from Hugging Face or its cache.

    Raises:
        InputError: if the address is wrong, the file cannot be had or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise InputError(f"{address} needs huggingface_hub; run: pip install 'samed3d[export]'") from error
    repository, _, revision = address.removeprefix(HUB).partition("@")
    if repository.count("/") != 1:
        raise InputError(f"a model on Hugging Face must be {HUB}OWNER/NAME, with @REVISION if wanted, got {address!r}")
    try:
        return Path(hf_hub_download(repository, PRETRAINED, revision=revision or None))
    except Exception as error:  # the hub's own types, the network's and the file system's
        raise InputError(f"{address} cannot be fetched ({str(error).strip().splitlines()[0]})") from error
