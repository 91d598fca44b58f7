"""Downloads a model in a process of its own: what runs there can be ended at any moment."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec

from shared.errors import ModelError
from shared.hub import download
from shared.hub.cache import cache_folder, find_cached
from shared.hub.download import Downloaded
from shared.hub.name import parse_hub_name
from shared.logs import logger
from shared.process.exit_status import describe_exit
from shared.process.parent_death import die_with_parent

ROOT = Path(__file__).resolve().parents[2]

log = logger()


async def fetch_in_process(model: str) -> Path:
    """As `fetch`. If it is cancelled, the download ends, and the next one continues it.

    Raises:
        ModelError: what to do, in one line.
    """
    name = parse_hub_name(model)
    try:
        if found := find_cached(name):
            return found
        cache = cache_folder().absolute()  # the process has another working directory
    except ImportError:
        return download.fetch(model)  # raises
    log.info("model_download_started", model=model, cache=str(cache))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", download.__name__, model),
        cwd=ROOT,
        env={**os.environ, "HF_HUB_CACHE": str(cache)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,  # progress goes to stderr
        start_new_session=True,  # Ctrl-C is for this process, which ends the other
        preexec_fn=die_with_parent(signal.SIGTERM),
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    try:
        downloaded = msgspec.json.decode(output, type=Downloaded)
    except msgspec.DecodeError:
        how = describe_exit(process.returncode or 0)
        raise ModelError(f"the download of {model} ended with {how}; start it again") from None
    if downloaded.error:
        raise ModelError(downloaded.error)
    log.info("model_downloaded", model=model, path=downloaded.path)
    return Path(downloaded.path)
