"""A copy of a run's numbers in Weights & Biases, which can neither stop training nor connect anywhere unasked.

wandb is imported only when a run uses it. Offline runs land in the run folder (`wandb sync
runs/NAME/wandb/offline-run-*` uploads one later) and make no connection: error reporting, which wandb turns on by
default, is switched off before it starts.
"""

import contextlib
import netrc
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WANDB_MODES = ("auto", "offline", "off")


def resolve_wandb_mode(mode: str) -> str:
    """Turn the configured mode into "online", "offline" or "off", without using the network or importing wandb.

    "auto" honours WANDB_MODE (its `offline` and `disabled`), and otherwise is online only if the user is logged in.
    """
    if mode not in WANDB_MODES:
        raise ValueError(f"wandb_mode={mode!r} is not known: use one of {', '.join(WANDB_MODES)}")
    if mode != "auto":
        return mode
    from_env = os.environ.get("WANDB_MODE", "").lower()
    if from_env == "disabled":
        return "off"
    if from_env in ("offline", "dryrun"):
        return "offline"
    return "online" if _logged_in() else "offline"


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        # An unreadable or malformed netrc is the same as none: the run goes offline.
        with contextlib.suppress(OSError, netrc.NetrcParseError, RuntimeError):
            entry = netrc.netrc(Path(candidate).expanduser()).authenticators(host)
            if entry is not None and entry[2]:
                return True
    return False


class WandbMirror:
    """One Weights & Biases run, or nothing at all. The first failure gives one warning and ends the mirroring."""

    def __init__(self, run_dir: Path, mode: str, project: str, config: Mapping[str, Any], resume: bool) -> None:
        mode = resolve_wandb_mode(mode)
        self._run: Any = None
        if mode == "off":
            return
        try:
            self._run = _start_or_record(run_dir, mode, project, config, resume)
            # Our own step axis: wandb's must never decrease, and a resumed run repeats the steps after its checkpoint.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up(error)

    def log(self, scalars: Mapping[str, float], step: int | None) -> None:
        """Send a record's numbers."""
        if self._run is None or not scalars:
            return
        try:
            self._run.log({**scalars, "step": step})
        except Exception as error:
            self._give_up(error)

    def finish(self, failed: bool) -> None:
        """End the run, waiting for what is still to be written or uploaded."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish(exit_code=1 if failed else 0)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        _warn(f"Weights & Biases failed and is off for the rest of this run (metrics.jsonl is not affected): {error}")


def _start_or_record(run_dir: Path, mode: str, project: str, config: Mapping[str, Any], resume: bool) -> Any:
    """Start a run; one that cannot reach its server is recorded offline, as on a compute node without internet."""
    try:
        return _start(run_dir, mode, project, config, resume)
    except Exception as error:
        if mode != "online":
            raise
        run = _start(run_dir, "offline", project, config, resume)
        _warn(f"Weights & Biases could not be reached, this run is recorded offline in {run_dir / 'wandb'}: {error}")
        return run


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=5)


def _start(run_dir: Path, mode: str, project: str, config: Mapping[str, Any], resume: bool) -> Any:
    folder = run_dir / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet_environment(folder, offline=mode == "offline"):
        import wandb

        settings = {
            "console": "off",  # wandb would wrap stdout and stderr, which breaks the progress bar
            "init_timeout": 30,  # seconds; the default of 90 is long to look at a program that does nothing
            "silent": mode == "offline",
            "disable_git": True,  # environment.json has the commit
            "disable_code": True,
            "disable_job_creation": True,
            "x_save_requirements": False,
            "x_disable_meta": mode == "offline",
            "x_disable_stats": mode == "offline",
            "x_disable_machine_info": mode == "offline",
        }
        known = wandb.Settings.model_fields  # the x_ ones are not a stable interface: use what this version has
        return wandb.init(
            project=project,
            name=run_dir.resolve().name,
            id=_run_id(folder, resume),
            dir=str(run_dir),
            config=dict(config),
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(**{key: value for key, value in settings.items() if key in known}),  # type: ignore[arg-type]
        )


def _run_id(folder: Path, resume: bool) -> str:
    """The run's id, kept beside its files so that a resumed run continues the same chart."""
    path = folder / "run_id.txt"
    if not (resume and path.is_file()):
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


@contextlib.contextmanager
def _quiet_environment(folder: Path, offline: bool) -> Iterator[None]:
    """Set what wandb reads only from the environment while its helper process starts, and put it back after.

    Its error reports go to the vendor unless WANDB_ERROR_REPORTING is false. Its caches and logs go to the home
    folder unless told otherwise; offline they belong to the run.
    """
    wanted = {"WANDB_ERROR_REPORTING": "false"}
    if offline:
        wanted |= {
            name: str((folder / "cache").resolve())
            for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR")
        }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
