"""kubeflow-fairing 1.0.2, its last release (2021), unmodified, with what it needs to build an image today.

    files = Files({"mnist.py": "/app/mnist.py"}, command=["python", "/app/mnist.py"])
    builder = Builder("localhost:5000/tutorial/mnist:1", "localhost:5000/tutorial/mnist:base", files)
    builder.build()
    builder.reference  # "localhost:5000/tutorial/mnist@sha256:..."

Fairing's AppendBuilder takes an image of a registry as its base, puts one layer of files on it and pushes the result,
without a Docker daemon. What is put right here:

- Its import asks for names that numpy and notebook dropped; import and build set up logging for the whole program, and
  stop gzip's clock.
- Its images are refused by containerd, podman and skopeo: the manifest has the base's size of the configuration and a
  wrong media type for the new layer, and the configuration has its history in the wrong order (kubeflow/fairing#568).
  The configuration also says amd64 whatever the base is made for.
- They run as root; these run as an ordinary user.
- Its layers hold two files of Fairing that nobody asked for, the user's name, a time, and the files' own permissions,
  which another user in the container may lack. These layers hold the files that are named, readable by all, and are the
  same to the last bit for the same content.
- It leaves connections open, and its temporary file when a step fails; it waits for ever for a registry that does not
  answer, and shows the login when it cannot use it.
- It does not see that a base image is not in the one format that it reads, and falls over what it finds there.
"""
import contextlib
import gzip
import json
import logging
import os
import socket
import sys
import tarfile
import tempfile
import time
import types
import warnings
from importlib.metadata import version
from pathlib import Path

import httplib2
import numpy
from containerregistry.client import docker_name
from containerregistry.client.v2_2 import docker_digest, docker_http, docker_image

from helpers import PageError

USER = "1000"  # as in Dockerfile and pytorchjob-mnist.yaml
TIMEOUT = 60  # seconds that a registry may be silent

FIXED = "1.0.2"  # brings its own containerregistry
if version("kubeflow-fairing") != FIXED:
    raise ImportError(f"fairing_today.py puts right kubeflow-fairing {FIXED}, but {version('kubeflow-fairing')} is "
                      "installed: see what that release still needs, then change FIXED")


@contextlib.contextmanager
def logging_kept():
    """Keep the program's logging as it is."""
    root = logging.getLogger()
    level, disabled, handlers = root.level, root.manager.disable, root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        logging.disable(disabled)
        root.handlers[:] = handlers


@contextlib.contextmanager
def _as_in_2021():
    """Lend Fairing's import the names that it asks for; keep its warnings and its logging from the program."""
    notebookapp = types.ModuleType("notebook.notebookapp")
    notebookapp.list_running_servers = list  # only asked for by its detection of notebooks
    sys.modules[notebookapp.__name__] = notebookapp
    numpy.float, numpy.int = float, int
    try:
        with logging_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        del numpy.float, numpy.int, sys.modules[notebookapp.__name__]
        gzip.time = time  # containerregistry puts a stopped clock there


with _as_in_2021():
    from kubeflow.fairing.builders.append.append import AppendBuilder
    from kubeflow.fairing.preprocessors.base import BasePreProcessor


class Files(BasePreProcessor):
    """The files of an image's new layer: a dict of paths here to paths in the image, and the command to run there."""

    def __init__(self, files, command):
        missing = [str(source) for source in files if not Path(source).is_file()]
        if missing:
            raise PageError(f"no such file for the image: {', '.join(missing)}")
        super().__init__(output_map={str(source): target for source, target in files.items()}, command=command)

    def context_tar_gz(self, output_file=None):
        """Write the layer; return its path and a checksum, by which Fairing would name the image."""
        if not output_file:
            handle, output_file = tempfile.mkstemp(prefix="layer-", suffix=".tar.gz")
            os.close(handle)
        try:
            self._write(output_file)
        except BaseException as error:
            Path(output_file).unlink()
            if isinstance(error, OSError):
                raise PageError(f"the layer of the image cannot be written: {error}") from None
            raise
        return output_file, docker_digest.SHA256(Path(output_file).read_bytes()).removeprefix("sha256:")

    def _write(self, output_file):
        # Level 1: MNIST's files are packed already or pack well at once.
        with open(output_file, "wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as packed:
            with tarfile.open(fileobj=packed, mode="w") as tar:
                for source, target in sorted(self.output_map.items(), key=lambda item: item[1]):
                    member = tarfile.TarInfo(target.lstrip("/"))
                    member.size, member.mode = Path(source).stat().st_size, 0o644
                    with open(source, "rb") as file:
                        tar.addfile(member, file)


class WellFormed(docker_image.DockerImage):
    """An image of Fairing as registries and container engines expect it, that runs as an ordinary user."""

    def __init__(self, built):
        self._built = built
        base = json.loads(built._base.config_file())
        config, manifest = json.loads(built.config_file()), json.loads(built.manifest())
        if built.media_type() != docker_http.MANIFEST_SCHEMA2_MIME:  # a registry may not care what it is asked for
            raise KeyError(docker_http.MANIFEST_SCHEMA2_MIME)
        config |= {name: base[name] for name in ("architecture", "variant") if name in base}
        config["config"]["User"] = USER
        config["history"] = config["history"][1:] + config["history"][:1]
        self._config = json.dumps(config, sort_keys=True)
        raw = self._config.encode()
        manifest["config"] |= {"digest": docker_digest.SHA256(raw), "size": len(raw)}
        manifest["layers"][-1]["mediaType"] = docker_http.LAYER_MIME
        self._manifest = json.dumps(manifest, sort_keys=True)

    def manifest(self):
        return self._manifest

    def config_file(self):
        return self._config

    def blob(self, digest):
        return self._built.blob(digest)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


class Builder(AppendBuilder):
    """Fairing's AppendBuilder for an image of the given name and tag on a base image, both in a registry.

    Each method raises PageError if the registry does not do what it asks for. Afterwards, `reference` names the image
    by its digest, which no later push can change.
    """

    def __init__(self, image, base_image, preprocessor):
        try:
            self.name = docker_name.Tag(image, strict=False)
            docker_name.Tag(base_image, strict=False)
        except docker_name.BadNameException as error:
            raise PageError(f"{error}: name images like localhost:5000/tutorial/mnist:1") from None
        super().__init__(self.name.registry, self.name.repository, base_image, preprocessor=preprocessor)

    def full_image_name(self, tag):
        """Return the name that was asked for; Fairing would take a checksum for its tag."""
        return str(self.name)

    def build(self):
        """Build the image and push it."""
        silence = socket.getdefaulttimeout()
        self.context_file, self.connections = None, []
        try:
            socket.setdefaulttimeout(TIMEOUT)
            with logging_kept():
                logging.disable(logging.ERROR)  # Fairing reports each step as a warning, and errors are raised anyway
                super().build()
        finally:
            for connection in self.connections:
                connection.close()
            socket.setdefaulttimeout(silence)
            if self.context_file:
                Path(self.context_file).unlink(missing_ok=True)

    def _build(self, transport, src):
        self.connections = transport._transports[:]
        if self.name.registry.startswith("localhost:"):  # for which no proxy is right
            for connection in self.connections:
                connection.proxy_info = None
        with problems(f"the base image {src} cannot be read", "see above how to put one there"):
            self.image = WellFormed(super()._build(transport, src))
        return self.image

    def _push(self, transport, src, img, dst):
        with problems(f"{dst} was not pushed", "what the registry has of it, nothing refers to; run the cell again"):
            super()._push(transport, src, img, dst)

    @property
    def reference(self):
        return f"{self.name.as_repository()}@{self.image.digest()}"


FORMAT = "it is not in Docker's format v2.2, the only one that Fairing reads"


@contextlib.contextmanager
def problems(what, way_out):
    """Turn what a registry and the login for it can raise into a PageError."""
    try:
        yield
    except docker_http.V2DiagnosticException as error:
        known = {401: "a login is missing or wrong", 403: "this login may not do that", 404: "it is not there"}
        reason = known.get(error.status) or " ".join(str(error).split())
        if error.status == 404 and "OCI" in str(error):
            reason = FORMAT
    except docker_http.TokenRefreshException as error:
        reason = f"a login is missing or wrong ({str(error).splitlines()[0]})"  # then the whole answer
    except (docker_http.BadStateException, docker_image.DigestMismatchedError, httplib2.HttpLib2Error,
            OSError) as error:
        reason = f"the registry does not answer as it should ({error or type(error).__name__})"
    except KeyError as error:
        reason = f"{FORMAT} (no {error})"
    except ValueError:
        reason = "the registry's answer or Docker's config.json is damaged"
    except Exception as error:
        if type(error) is not Exception:  # as Fairing raises for logins, with all that it knows of them
            raise
        reason = "Fairing cannot use the login in Docker's config.json: it needs one with user name and password"
    else:
        return
    raise PageError(f"{what}: {reason}; {way_out}") from None
