#!/usr/bin/env python3
"""imagedir.py OUT DIR...: writes an image of one layer for each DIR, uncompressed, in Docker's v2.2 format, as a folder
that skopeo reads ("dir:OUT")."""
import hashlib
import json
import os
import subprocess
import sys

out, *folders = sys.argv[1:]
docker = "application/vnd.docker."
created = "1970-01-01T00:00:00Z"


def save(blocks):
    """Write a blob under its digest; return its digest and size."""
    digest, size, part = hashlib.sha256(), 0, os.path.join(out, "part")
    with open(part, "wb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
    os.rename(part, os.path.join(out, digest.hexdigest()))
    return {"digest": f"sha256:{digest.hexdigest()}", "size": size}


def pack(folder):
    tar = subprocess.Popen(["tar", "-C", folder, "--owner=0", "--group=0", "--numeric-owner", "--sort=name", "-cf", "-", "."],
                           stdout=subprocess.PIPE)
    yield from iter(lambda: tar.stdout.read(1 << 20), b"")
    if tar.wait():
        raise SystemExit(f"tar of {folder} failed")


layers = [{"mediaType": docker + "image.rootfs.diff.tar", **save(pack(folder))} for folder in folders]
config = save([json.dumps({
    "architecture": "amd64", "os": "linux", "created": created,
    "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONUNBUFFERED=1"],
               "Cmd": ["python"], "User": "1000"},
    "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
    "history": [{"created": created, "created_by": os.path.basename(folder)} for folder in folders]}).encode()])
manifest = {"schemaVersion": 2, "mediaType": docker + "distribution.manifest.v2+json",
            "config": {"mediaType": docker + "container.image.v1+json", **config}, "layers": layers}
with open(os.path.join(out, "version"), "w") as file:
    file.write("Directory Transport Version: 1.1\n")
with open(os.path.join(out, "manifest.json"), "w") as file:
    json.dump(manifest, file)
