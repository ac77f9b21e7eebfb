"""Where a run's figures go besides the CSV file: Weights & Biases, without a login if there is none.

Used from YAML (`class_path: lightning_llm.callbacks.WandbLogger`) or as `Trainer(logger=...)`.
"""

import importlib.util
import netrc
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger as _LightningWandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_llm.errors import ConfigurationError

_DEFAULT_HOST = "api.wandb.ai"


class WandbLogger(_LightningWandbLogger):
    """Lightning's W&B logger, made to work without an account: `offline="auto"` is online only for who is logged in.

    Logged in means: `WANDB_API_KEY` or `WANDB_IDENTITY_TOKEN_FILE` is set, or a netrc file knows W&B's host, as
    `wandb login` writes it (`WANDB_BASE_URL` names another host). `WANDB_MODE`, where set, decides instead. An offline
    run is a folder `save_dir/wandb/offline-run-*` that `wandb sync` sends later.

    Args:
        offline: `"auto"`, or True or False to say it outright.
        save_dir: Folder that holds the `wandb` folder.
        **kwargs: As for `lightning.pytorch.loggers.WandbLogger`: `project`, `name`, `log_model`, `tags`, ...

    Raises:
        ConfigurationError: wandb is not installed, or `log_model` is asked for while the run is offline.
    """

    def __init__(self, offline: bool | Literal["auto"] = "auto", save_dir: str | Path = ".", **kwargs: Any) -> None:
        if not _wandb_installed():
            raise ConfigurationError(
                "WandbLogger needs wandb, which is not installed: "
                'pip install "lightning-llm[tracking]", or log with lightning.pytorch.loggers.CSVLogger'
            )
        reason = _why_offline() if offline == "auto" else None
        is_offline = reason is not None if offline == "auto" else offline
        if is_offline and kwargs.get("log_model"):
            raise ConfigurationError(
                f"WandbLogger(log_model={kwargs['log_model']!r}) uploads checkpoints, but this run is offline: "
                "log in with `wandb login`, or leave log_model out"
            )
        if reason is not None:
            rank_zero_info(
                f"W&B: {reason}, so the run stays offline; to send it: wandb sync {Path(save_dir)}/wandb/offline-run-*"
            )
        Path(save_dir).mkdir(parents=True, exist_ok=True)  # wandb would fall back to a temporary folder
        super().__init__(offline=is_offline, save_dir=save_dir, **kwargs)

    @property
    @override
    def log_dir(self) -> str | None:
        """The folder of this run, once it has begun; None on ranks that do not log."""
        folder = getattr(self.experiment, "dir", None)
        return str(Path(folder).parent) if isinstance(folder, str) else None


def _wandb_installed() -> bool:
    try:
        return importlib.util.find_spec("wandb") is not None
    except ValueError:  # sys.modules holds None for it: an import has been forbidden
        return False


def _why_offline() -> str | None:
    """Why an "auto" run has to stay offline, or None when it can be online."""
    if mode := os.environ.get("WANDB_MODE"):
        return f"WANDB_MODE={mode}" if mode in ("offline", "dryrun") else None
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _netrc_knows_wandb():
        return None
    return "not logged in"


def _netrc_knows_wandb() -> bool:
    """Whether a netrc file (`$NETRC`, `~/.netrc` or `~/_netrc`) has a login for W&B's host."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname or _DEFAULT_HOST
    named = os.environ.get("NETRC")
    files = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        if not file.is_file():
            continue
        try:
            logins = netrc.netrc(file).hosts
        except (netrc.NetrcParseError, OSError) as error:
            rank_zero_info(f"W&B: {file} cannot be read ({error}), so it counts as no login")
            continue
        if host in logins:
            return True
    return False
