#!/usr/bin/env python3
"""Writes an image of one layer for each folder, uncompressed, in Docker's v2.2 format, as a folder for skopeo."""

import argparse
import hashlib
import json
import os
import subprocess

DOCKER = "application/vnd.docker."
CREATED = "1970-01-01T00:00:00Z"
PYTHON = {"Env": ["PYTHONUNBUFFERED=1"], "Cmd": ["python"], "User": "1000"}
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def save(blocks, out):
    """Write a blob under its digest; return its digest and its size in bytes."""
    digest, size, unnamed = hashlib.sha256(), 0, os.path.join(out, "part")
    with open(unnamed, "wb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
    os.rename(unnamed, os.path.join(out, digest.hexdigest()))
    return {"digest": f"sha256:{digest.hexdigest()}", "size": size}


def pack(folder):
    """Yield the blocks of a tar archive of a folder, the same for the same files."""
    command = ["tar", "-C", folder, "--owner=0", "--group=0", "--numeric-owner", "--sort=name", "-cf", "-", "."]
    tar = subprocess.Popen(command, stdout=subprocess.PIPE)
    yield from iter(lambda: tar.stdout.read(1 << 20), b"")
    if tar.wait():
        raise SystemExit(f"tar of {folder} failed")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=json.loads, default=PYTHON, help="what containers run, as JSON")
    parser.add_argument("out", help="an empty folder")
    parser.add_argument("folders", nargs="+")
    args = parser.parse_args()

    layers = [
        {"mediaType": DOCKER + "image.rootfs.diff.tar", **save(pack(folder), args.out)} for folder in args.folders
    ]
    image = {
        "architecture": "amd64",
        "os": "linux",
        "created": CREATED,
        "config": {**args.config, "Env": [PATH, *args.config.get("Env", [])]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
        "history": [{"created": CREATED, "created_by": os.path.basename(folder)} for folder in args.folders],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": DOCKER + "distribution.manifest.v2+json",
        "config": {
            "mediaType": DOCKER + "container.image.v1+json",
            **save([json.dumps(image).encode()], args.out),
        },
        "layers": layers,
    }
    for name, text in ("version", "Directory Transport Version: 1.1\n"), ("manifest.json", json.dumps(manifest)):
        with open(os.path.join(args.out, name), "w") as file:
            file.write(text)


if __name__ == "__main__":
    main()
