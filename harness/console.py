"""What people read while the program runs: messages, progress, tables and numbers."""

import contextlib
import logging
import sys
import time

LINE_SECONDS = 60  # [s] between progress lines in a batch log

log = logging.getLogger(__name__)


class PlainFormatter(logging.Formatter):
    """Prints a message as one line: file names can contain newlines and terminal escapes.

    Such characters, text direction marks and undecodable bytes are written as Python escapes.
    """

    def formatMessage(self, record):
        """Format a record with its message escaped."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def printable(text):
    r"""The text with unprintable characters escaped: a newline becomes \n, two characters."""
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return "".join(escaped)


def log_to_screen(verbose, is_chief=True):
    """Print the project's messages to standard error; from other ranks only warnings and errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    handler.setLevel(logging.INFO if is_chief else logging.WARNING)
    root.setLevel(logging.INFO)
    logging.getLogger("tensorflow").setLevel(logging.INFO if verbose else logging.ERROR)
    logging.getLogger("absl").setLevel(logging.INFO if verbose else logging.ERROR)


class _LogFile(logging.FileHandler):
    """A log for people: lines that a full or read-only disk rejects are still on the screen."""

    def emit(self, record):
        with contextlib.suppress(OSError):  # when opening
            super().emit(record)

    def handleError(self, record):  # when writing
        pass

    def close(self):
        logging.getLogger().removeHandler(self)
        with contextlib.suppress(OSError):  # of what could not be written
            super().close()


def log_to_file(path):
    """Write the project's messages to a file too; returns the handler, which must be closed."""
    handler = _LogFile(path, delay=True, encoding="utf-8")
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


def progress(items, what, total):
    """Iterate with progress: a bar on a terminal, one line per minute in a batch log."""
    if sys.stderr.isatty() and logging.getLogger().handlers[0].level <= logging.INFO:
        from tqdm import tqdm  # needed for the bar only

        yield from tqdm(items, what, total, leave=False, dynamic_ncols=True)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= LINE_SECONDS:  # the first item may take longer than that
            left = (now - started) / done * (total - done)
            log.info("%s: %d of %d, %.0f s left", what, done, total, left)
            last = now
        yield item


def table(columns):
    """Text of a table: one line per key of the columns' dictionaries, below the titles.

    Unprintable characters are escaped: names of folders can contain terminal escapes.

    Args:
        columns: {title: {line: text}}.
    """
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [["", *columns]] + [[k, *(c.get(k, "") for c in columns.values())] for k in keys]
    rows = [[printable(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def counted(n, noun):
    """'1 scene', '2 scenes', '3 patches'."""
    return f"{n} {noun}" + ("" if n == 1 else "es" if noun.endswith("tch") else "s")


def format_bytes(n_bytes):
    """'163.0 GB'."""
    power = min(len(str(int(n_bytes))) - 1, 14) // 3
    return f"{n_bytes / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def format_duration(seconds):
    """'3 h 20 min', '4 min 10 s' or '12.0 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
