# The images of the pages, for docker and buildah. That of notebooks/mnist.ipynb, which it builds with Kubeflow Fairing:
#     docker build --build-arg DATA=data/MNIST/raw -t localhost:5000/tutorial/mnist:1 .
# That of notebooks/flyte.ipynb:
#     docker build --target flyte -t localhost:5000/tutorial/mnist:flyte .
# BASE: an image with PyTorch, and with CUDA for GPUs; DATA: the folder of the four gzipped MNIST files, below this one.
ARG BASE=docker.io/pytorch/pytorch:2.10.0-cuda12.8-cudnn9-runtime@sha256:b85566342b86d13a67712e9315d40cdc2dad7f8d86df1aff3831f80835edbcca

FROM ${BASE} AS flyte
USER root
# Into a folder of their own, so that what the base image has stays as it is. The secret, pip's configuration for a
# package index of one's own, is not kept in the image.
COPY --chmod=644 jobs/requirements-flyte.txt /opt/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m pip install --no-cache-dir --no-deps --require-hashes --target /opt/flyte \
        -r /opt/requirements-flyte.txt && \
    mkdir /app && chown 1000 /app
# Flyte unpacks a changed trainer into /app. HOME: where libraries keep what they find out about the machine.
WORKDIR /app
ENV PYTHONPATH=/app:/opt/flyte PATH=/opt/flyte/bin:${PATH} HOME=/tmp
COPY --chmod=644 mnist.py flyte_mnist.py /app/
USER 1000

FROM ${BASE} AS trainer
ARG DATA=data/MNIST/raw
# Root's folders, made first: --chmod would make them for nobody to enter.
USER root
WORKDIR /app/data
WORKDIR /app
COPY --chmod=644 mnist.py /app/
COPY --chmod=644 ${DATA}/*-ubyte.gz /app/data/
USER 1000
CMD ["python", "/app/mnist.py"]
