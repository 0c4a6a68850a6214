"""The command table, and the one place where an error becomes a message and an exit code."""

import errno
import logging
import os
import sys
from typing import Annotated, Literal

import typer

from ftk.cli import cache, demo, doctor, export, extract, gc, init, inspect, merge, prepare, run, sample, tiny, train, verify
from ftk.errors import FtkError

LOGGER = logging.getLogger("ftk")
LogLevel = Literal["debug", "info", "warning", "error"]

app = typer.Typer(
    name="ftk",
    help="Fine-tune image models: encode once, train anywhere, lose nothing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("prepare")(prepare.prepare)
app.command("cache")(cache.cache)
app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("extract")(extract.extract)
app.command("run")(run.run)
app.command("demo")(demo.demo)
app.command("init")(init.init)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("gc")(gc.gc)
app.command("doctor")(doctor.doctor)
app.command("tiny")(tiny.tiny)


@app.callback()
def common(
    log_level: Annotated[LogLevel, typer.Option("--log-level", help="How much to say; debug shows tracebacks.")] = "info",
) -> None:
    """Fine-tune image models: encode once, train anywhere, lose nothing."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    LOGGER.setLevel(log_level.upper())
    if log_level != "debug":
        _quiet_libraries()


def _quiet_libraries() -> None:
    """The libraries' own chatter says nothing that a user can act on; ftk reports progress itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Installed, torchao is imported by diffusers and PEFT, and tells of each kernel that it lacks.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")


def main() -> None:
    """Entry point: run the command; every expected failure ends in a message and its exit code."""
    try:
        app()
    except FtkError as error:
        _fail(str(error), error.exit_code, error)
    except KeyboardInterrupt:
        _fail("Stopped. What was finished is kept; the same command goes on from there.", 130)
    except MemoryError as error:
        _fail("Out of memory. Close other programs, or lower data.workers or the batch sizes.", 4, error)
    except OSError as error:
        _fail(_os_message(error), 4, error)
    except RuntimeError as error:
        from ftk.devices import is_out_of_memory  # torch raised it, so torch is loaded

        if not is_out_of_memory(error):
            raise
        _fail(
            f"The device is out of memory: {str(error).splitlines()[0]}\nClose what else uses it, or lower "
            f"data.resolutions or the batch sizes. `ftk doctor RUN.yaml` shows what training takes.",
            4,
            error,
        )


def _os_message(error: OSError) -> str:
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full{place}. What was finished is kept: free some space and run the same command again."
    return f"{error.strerror or error}{place}. What was finished is kept; mend this and run the same command again."


def _fail(message: str, code: int, error: BaseException | None = None) -> None:
    from ftk.configs.load import redact
    from ftk.progress import plain_text

    if error is not None and LOGGER.isEnabledFor(logging.DEBUG):
        import traceback

        sys.stderr.write(redact("".join(traceback.format_exception(error))))
    sys.stderr.write(f"ftk: {plain_text(redact(message))}\n")
    sys.stderr.flush()
    raise SystemExit(code)
