"""What kubeflow-fairing 1.0.2, its last release (2021), needs to build an image today; Fairing itself is not changed.

    files = Files({"mnist.py": "/app/mnist.py"}, command=["python", "/app/mnist.py"])
    builder = Builder("localhost:5000/tutorial/mnist:1", "localhost:5000/tutorial/mnist:base", files)
    builder.build()  # then builder.reference is localhost:5000/tutorial/mnist@sha256:...

Fairing's AppendBuilder takes an image of a registry as its base, adds one layer of files and pushes the result, without
a Docker daemon. Its successor today is a command of go-containerregistry: `crane append -b BASE -f layer.tar -t IMAGE`.
"""

import contextlib
import gzip
import io
import json
import logging
import ssl
import sys
import tarfile
import tempfile
import time
import types
import warnings
from pathlib import Path

import httplib2
import numpy
from containerregistry.client import docker_creds, docker_name
from containerregistry.client.v2_2 import docker_digest, docker_http
from containerregistry.transport import transport_pool

from support.page import PageError

USER = "1000"  # as in Dockerfile and pytorchjob-mnist.yaml
TIMEOUT = 60  # seconds that a registry may be silent
LOGIN = "the login is missing, wrong or may not do that"
WRONG_FORMAT = "it is not in Docker's format v2.2, the only one that Fairing reads"


# Fairing's import needs names that numpy and notebook have dropped, and sets up the logging, which is then restored.
notebookapp = types.ModuleType("notebook.notebookapp")
notebookapp.list_running_servers = list  # only used to detect notebooks
sys.modules[notebookapp.__name__] = notebookapp
numpy.float, numpy.int = float, int
level, handlers = logging.root.level, logging.root.handlers[:]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from kubeflow.fairing.builders.append.append import AppendBuilder
    from kubeflow.fairing.preprocessors.base import BasePreProcessor
logging.root.setLevel(level)
logging.root.handlers[:] = handlers
del numpy.float, numpy.int, sys.modules[notebookapp.__name__]

gzip.time = time  # containerregistry stops this clock
# What Docker Desktop answers where there is no login; containerregistry compares it with bytes.
docker_creds._MAGIC_NOT_FOUND_MESSAGE = b"credentials not found in native keychain"


class Files(BasePreProcessor):
    """The files of an image's new layer: a dict of paths here to paths in the image, and the command to run there."""

    def __init__(self, files, command):
        super().__init__(output_map=files, command=command)

    def context_tar_gz(self, output_file=None):
        """Write the layer, readable by all and with equal bytes for equal content; return its path and its checksum."""
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            for source, target in sorted(self.output_map.items(), key=lambda item: item[1]):
                member = tarfile.TarInfo(target.lstrip("/"))  # root's, with mode 644 and no time
                member.size = Path(source).stat().st_size
                with open(source, "rb") as file:
                    tar.addfile(member, file)
        packed = gzip.compress(layer.getvalue(), compresslevel=1, mtime=0)  # 1: MNIST's files are packed already
        Path(output_file or self.layer).write_bytes(packed)
        return str(output_file or self.layer), docker_digest.SHA256(packed)


def make_valid(image):
    """Correct what registries and container engines refuse in Fairing's images (kubeflow/fairing#568), and the user.

    The manifest had the size of the base image's configuration and a wrong media type for the layer; the configuration
    had its history in the wrong order, the architecture amd64 whatever the base image has, and root as its user.
    """
    base = json.loads(image._base.config_file())
    config, manifest = json.loads(image.config_file()), json.loads(image.manifest())
    config |= {name: base[name] for name in ("architecture", "variant") if name in base}
    config["config"]["User"] = USER
    config["history"] = config["history"][1:] + config["history"][:1]
    image._config_file = json.dumps(config, sort_keys=True)
    raw = image._config_file.encode()
    manifest["config"] |= {"digest": docker_digest.SHA256(raw), "size": len(raw)}
    manifest["layers"][-1]["mediaType"] = docker_http.LAYER_MIME
    image._manifest = json.dumps(manifest, sort_keys=True)


class Builder(AppendBuilder):
    """Fairing's AppendBuilder for an image of the given name and tag on a base image, both in a registry."""

    def __init__(self, image, base_image, preprocessor):
        self.name = docker_name.Tag(image, strict=False)
        super().__init__(self.name.registry, self.name.repository, base_image, preprocessor=preprocessor)

    def build(self):
        """Build the image and push it; raise PageError if a registry or the login for it is not as it should be."""
        base = docker_name.Tag(self.base_image, strict=False)
        local = self.name.registry.startswith("localhost:")  # no proxy can reach it
        proxy = None if local else httplib2.proxy_info_from_environment
        transport = transport_pool.Http(lambda: httplib2.Http(timeout=TIMEOUT, proxy_info=proxy))
        logging.disable(logging.ERROR)  # Fairing reports each step as a warning
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.preprocessor.layer = Path(folder, "layer.tar.gz")
                with registry_errors(f"the base image {base} cannot be read", "see above how to put one there"):
                    self.image = self._build(transport, base)
                    if self.image.media_type() != docker_http.MANIFEST_SCHEMA2_MIME:  # some registries send any format
                        raise KeyError("mediaType")
                    make_valid(self.image)
                with registry_errors(f"{self.name} was not pushed", "its tag is as it was; run the cell again"):
                    self._push(transport, base, self.image, self.name)
        finally:
            logging.disable(logging.NOTSET)
            for connection in transport._transports:
                connection.close()

    @property
    def reference(self):
        """The image that was built, by its digest, which no later push can change."""
        return f"{self.name.as_repository()}@{self.image.digest()}"


@contextlib.contextmanager
def registry_errors(problem, remedy):
    """Raise what users are likely to meet as a PageError of one line; the others pass."""
    try:
        yield
        return
    except docker_http.V2DiagnosticException as error:
        reasons = {401: LOGIN, 403: LOGIN, 404: WRONG_FORMAT if "OCI manifest" in str(error) else "it is not there"}
        if error.status not in reasons:
            raise
        reason = reasons[error.status]
    except docker_http.TokenRefreshException:
        reason = LOGIN
    except (httplib2.HttpLib2Error, ConnectionError, TimeoutError, ssl.SSLError) as error:
        reason = f"the registry does not answer as it should ({error})"
    except KeyError:  # a list of images, for example
        reason = WRONG_FORMAT
    except Exception as error:
        if type(error) is not Exception:
            raise
        # Fairing raises it for a login, and shows all that it knows of it.
        reason = "Fairing cannot use the login in Docker's config.json: it needs one with user name and password"
    raise PageError(f"{problem}: {reason}; {remedy}") from None
