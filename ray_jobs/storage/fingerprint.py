"""What a data set's files hold, in a few bytes, and without reading them again each time."""

import contextlib
import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from ray_jobs.storage.records import read_json

FORMAT = 1  # of the frame cache's files
NOTES = "files.json"


def file_hashes(root: Path, patterns: tuple[str | None, ...], folder: Path) -> list[tuple[str, str]]:
    """Names and content hashes of a data set's files.

    As git does, a file is read again only if its size or its time of change has changed since it was last; what
    was read is noted in `<folder>/files.json`.
    """
    notes = folder / NOTES
    try:
        known = {path: note for path, note in read_json(notes).items() if isinstance(note, list)}
    except (OSError, ValueError):
        known = {}
    files = [path for pattern in patterns if pattern for path in sorted(root.glob(pattern))]
    stats = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    unread = [path for path, stat in stats.items() if known.get(path, [])[:-1] != stat]
    if unread:
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(hash_file, unread)
            known |= {path: [*stats[path], found] for path, found in zip(unread, hashes, strict=True)}
        with contextlib.suppress(OSError):
            replace(notes, json.dumps(known))
    return [(str(path.relative_to(root)), known[str(path)][2]) for path in files]


def fingerprint_of(*facts: Any) -> str:
    """16 hex digits of anything that JSON can say."""
    return xxhash.xxh3_64_hexdigest(json.dumps(facts).encode())


def hash_file(path: str | Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def replace(path: Path, text: str) -> None:
    """Write a file in one step: who reads it finds the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(
        f".{path.name}.{uuid.uuid4().hex}"
    )  # tempfile's would be readable to nobody else
    scratch.write_text(text)
    scratch.replace(path)
