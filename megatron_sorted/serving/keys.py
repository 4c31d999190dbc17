"""API keys: read from a file or the environment, kept as hashes, compared in constant time."""

import hashlib
import hmac
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.shown import shown
from megatron_sorted.serving.answers import RefusedError

KEY_VARIABLE = "MEGATRON_SORTED_API_KEY"
LEAST_KEY_CHARACTERS, MOST_KEY_CHARACTERS = 16, 256
MAX_KEY_BYTES = 1 << 20
"""The largest size of a file of keys: more than a few thousand of them need."""
OWNER = re.compile("[A-Za-z][A-Za-z0-9_.-]{0,63}")
RULE = "Write one key on each line, or its owner's name, a space and the key."


class ApiKeys:
    """The keys that clients may use; without any, every client is served.

    Args:
        lines: One key each, with its owner's name before it or without; # begins a comment.
        source: The lines' file or variable, for messages, which never hold a key.

    Attributes:
        owners: The owner of each key by the key's hash: a name, else the key's number.

    Raises:
        SettingsError: There is no key, or a line is none; names the line.
    """

    def __init__(self, lines: Iterable[str] = (), source: object = None):
        self.owners: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            if fields := line.partition("#")[0].split():
                self._add(fields, f"{shown(source)}, line {number}")
        if source is not None and not self.owners:
            raise SettingsError(f"{shown(source)}: it holds no key. {RULE}")

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self.owners)

    def _add(self, fields: list[str], where: str) -> None:
        """Add the key of a line."""
        *names, key = fields
        if len(names) > 1:
            raise SettingsError(f"{where}: it has {len(fields)} words. {RULE}")
        if names and not OWNER.fullmatch(names[0]):
            # a key in the wrong place must not be printed
            raise SettingsError(
                f"{where}: the word before the key is no name: a letter, then at most 63 letters, "
                "digits, dots, dashes and underscores. Change it, or leave it out."
            )
        if not LEAST_KEY_CHARACTERS <= len(key) <= MOST_KEY_CHARACTERS:
            raise SettingsError(
                f"{where}: a key of {len(key)} characters is not of {LEAST_KEY_CHARACTERS} to "
                f"{MOST_KEY_CHARACTERS}. Make one with: openssl rand -hex 24"
            )
        if not re.fullmatch("[!-~]+", key):
            raise SettingsError(
                f"{where}: the key has characters outside ASCII, which headers cannot carry. "
                "Make one with: openssl rand -hex 24"
            )
        if (digest := _hash(key)) in self.owners:
            raise SettingsError(f"{where}: the key is that of an earlier line. Remove one of them.")
        self.owners[digest] = names[0] if names else str(len(self.owners) + 1)

    def owner(self, header: str | None) -> str:
        """Return the owner of the key in the header Authorization; "" where no key is needed.

        Raises:
            RefusedError: The header holds none of the keys.
        """
        if not self.owners:
            return ""
        kind, _, key = (header or "").strip().partition(" ")
        remedy = "Send the header 'Authorization: Bearer KEY' with a key of this server."
        if not header:
            raise RefusedError(f"a key is needed. {remedy}", status=401)
        if kind.lower() != "bearer":
            raise RefusedError(
                f"the header Authorization is not 'Bearer KEY'. {remedy}", status=401
            )
        given, found = _hash(key.strip()), None
        for digest, owner in self.owners.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(digest, given):
                found = owner
        if found is None:
            raise RefusedError(f"the key is not one of this server's. {remedy}", status=401)
        return found


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def open_keys(path: Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Return the keys of a file, else those of the environment, separated by commas; else none.

    Raises:
        SettingsError: Both are given, the file cannot be read, or a key cannot be used.
    """
    value = environment.get(KEY_VARIABLE)
    if path is None:
        return ApiKeys() if value is None else ApiKeys(value.split(","), f"${KEY_VARIABLE}")
    if value is not None:
        raise SettingsError(
            f"--api-key-file: {shown(path)} is given beside the variable {KEY_VARIABLE}. "
            "Leave out one of them."
        )
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            data = stream.read(MAX_KEY_BYTES + 1)
        text = data.decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise SettingsError(
            f"--api-key-file: {shown(path)} cannot be read ({reason}). Name a file of keys."
        ) from error
    if len(data) > MAX_KEY_BYTES:
        raise SettingsError(
            f"--api-key-file: {shown(path)} has more than {MAX_KEY_BYTES} bytes. "
            "Name a file of keys."
        )
    if mode & 0o044:
        print(
            f"warning: --api-key-file: other users can read {shown(path)} "
            f"(mode {mode & 0o777:03o}). Change that with: chmod 600 {shown(path)}",
            file=sys.stderr,
        )
    return ApiKeys(text.splitlines(), path)
