"""What has been measured once, on disk: a JSON file of entries that several processes read and add to."""

import json
import os
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock


class MeasurementFile(NamedTuple):
    """A dict of JSON values. A file that cannot be read or written costs time, never a run."""

    path: Path

    def read(self) -> dict[str, Any]:
        """All entries; none if the file is missing or damaged."""
        try:
            entries = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}

    def add(self, key: str, value: Any, *, instead_of: Any = None) -> Any:
        """Put an entry in, unless another process was faster.

        Args:
            key: of the entry.
            value: what was measured.
            instead_of: what `read` gave for the key before the measurement.

        Returns:
            What the file then holds: `value`, or that of the process that was first.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=10):
                entries = self.read()
                if entries.get(key) not in (None, instead_of):
                    return entries[key]
                self._write(entries | {key: value})
        except (OSError, NotImplementedError) as error:  # the latter from a file system that knows no locks
            if self.path not in _warned:
                _warned.add(self.path)
                message = f"{self.path} cannot be written, so every process measures again: {error}"
                warnings.warn(message, stacklevel=2)
        return value

    def _write(self, entries: dict[str, Any]) -> None:
        """Replace the file in one step: who reads it meanwhile sees the old one or the new one."""
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(entries, file, indent=1)
            os.replace(temporary, self.path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


_warned: set[Path] = set()
