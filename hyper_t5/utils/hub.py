"""Models of the Hugging Face Hub, ``hf://org/name[@revision]``, as local folders.

Safetensors, JSON and SentencePiece files alone are downloaded, never pickles. `huggingface_hub` has
the cache (HF_HOME), the token (HF_TOKEN), the offline mode (HF_HUB_OFFLINE) and the endpoint
(HF_ENDPOINT).
"""

from __future__ import annotations

import re

from hyper_t5.utils.errors import UserError

SCHEME = "hf://"
NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
FILES = ["*.safetensors", "*.json", "*.jsonl", "*.model"]


def local_folder(path: str) -> str:
    """Return the folder of a snapshot in the user's cache, downloaded where it is missing.

    Raises:
      UserError: a malformed name; no such repository or revision, or no access; the Hub cannot be
        reached; `huggingface_hub` is not installed.
    """
    match = NAME.fullmatch(path)
    if not match:
        raise UserError(f"{path}: write hf://ORGANIZATION/NAME or hf://ORGANIZATION/NAME@REVISION")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(
            f"{path}: needs huggingface_hub; install the extra: pip install 'hyper_t5[hub]'"
        ) from None
    try:
        return huggingface_hub.snapshot_download(match[1], revision=match[2], allow_patterns=FILES)
    except errors.GatedRepoError:
        reason = "access must be granted on its page; set HF_TOKEN to a token that has it"
    except errors.RepositoryNotFoundError:
        reason = "no such repository, or no access; check the name, or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"no such revision {match[2]}; check its name"
    except errors.LocalEntryNotFoundError:
        reason = "not in the cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is set)"
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = f"cannot be downloaded: {' '.join(str(error).split())[:200]}"
    raise UserError(f"{path}: {reason}") from None
