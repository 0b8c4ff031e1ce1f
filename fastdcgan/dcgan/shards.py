"""WebDataset shards: images in tar files, which the package webdataset reads."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from glob import glob, has_magic
from itertools import groupby
from operator import itemgetter
from os.path import splitext
from pathlib import Path
from typing import Any

import numpy as np

from fastdcgan.dcgan.files import SUFFIXES
from fastdcgan.dcgan.folders import is_hidden
from fastdcgan.dcgan.workers import AT_A_TIME, Decoded, attempt, in_workers


def find_shards(pattern: str) -> list[Path]:
    """The files that a pattern names, in its order: braces as of a shell, {000..099} or {a,b}, and * ? [] as well.

    Raises ValueError for a file that is not there, or where no file has such a name; ModuleNotFoundError without the
    package webdataset.
    """
    import webdataset  # noqa: F401  so that its name, and no other, is that of what is missing
    from braceexpand import braceexpand

    found: list[str] = []
    for name in braceexpand(pattern):
        if Path(name).is_file():
            found.append(name)
        elif has_magic(name):
            found += filter(os.path.isfile, sorted(glob(name)))
        else:
            raise ValueError(f"there is no shard {name}: expected a file for each name in {pattern}")
    if not found:
        raise ValueError(f"no file has a name like {pattern}: expected shards, as in 'shards-{{000..099}}.tar'")
    return [Path(name).absolute() for name in dict.fromkeys(found)]


def list_members(shard: Path) -> list[str]:
    """The names of a tar file's images, as they lie in it; of one that is damaged or cut short those before that place,
    and one more that says so. Hidden ones are none (`folders.is_hidden`), nor is what WebDataset takes for metadata.

    Raises ValueError for what is no tar file, or is damaged before its first image.
    """
    names: list[str] = []
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                if member.isreg() and _is_image(member.name):
                    names.append(member.name.removeprefix("./"))
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # an archive ends with zeros
                raise tarfile.ReadError("there is no header of a member where one is expected")
    except tarfile.ReadError as error:
        if not names:
            raise ValueError(f"{shard} is no tar file, or is damaged before its first image: {error}") from error
        names.append(f"{names[-1]} and what lies behind it")
    return names


def _is_image(name: str) -> bool:
    *folders, file = name.removeprefix("./").split("/")
    if splitext(file)[1].lower() not in SUFFIXES or re.match(r"__[^/]*__/", name):
        return False
    return not any(map(is_hidden, [*folders, file]))


def decode_shards(
    numbers: Mapping[Path, range], decode: Callable[[bytes], np.ndarray], workers: int
) -> Generator[Decoded]:
    """`decode` of all images of some shards, each with its number: `numbers` has those of a shard's `list_members`.

    A worker reads whole shards, from their beginnings to their ends, so images come in an order of their own. Each
    number comes: what can't be decoded, or isn't there any more, with a reason.
    """
    import webdataset
    from webdataset.tariterators import tar_file_expander, url_opener

    named = {str(path): images for path, images in numbers.items()}
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(list(named)),
        webdataset.split_by_worker,
        url_opener,
        # Where a shard is cut the next one begins: what is missing of it is named in the end.
        partial(tar_file_expander, handler=webdataset.ignore_and_continue, select_files=_is_image, eof_value=None),
        _Decoding(named, decode),
        webdataset.batched(AT_A_TIME, collation_fn=None),
    )
    missing = np.ones(sum(map(len, named.values())), bool)
    for number, result in in_workers(pipeline, min(workers, len(named))):
        missing[number] = False
        yield number, result
    for number in np.flatnonzero(missing).tolist():
        yield number, "the shard is damaged or cut short there"


@dataclass(frozen=True)
class _Decoding:
    """A stage of webdataset's pipeline, and an object that can be sent to a worker: members of shards to images."""

    numbers: Mapping[str, range]
    decode: Callable[[bytes], np.ndarray]

    def __call__(self, members: Iterable[dict[str, Any]]) -> Iterator[Decoded]:
        for shard, its_members in groupby(members, itemgetter("__url__")):
            # No further than what was listed: a shard may have grown since.
            for number, member in zip(self.numbers[shard], its_members, strict=False):
                yield number, attempt(self.decode, member["data"])
