# The image that notebooks/mnist.ipynb builds with Kubeflow Fairing, for docker and buildah:
#     docker build --build-arg DATA=data/MNIST/raw -t localhost:5000/tutorial/mnist:1 .
# BASE: an image with PyTorch; DATA: the folder of the four gzipped MNIST files, below this one.
ARG BASE=docker.io/pytorch/pytorch:2.10.0-cuda12.8-cudnn9-runtime@sha256:b85566342b86d13a67712e9315d40cdc2dad7f8d86df1aff3831f80835edbcca
FROM ${BASE}
ARG DATA=data/MNIST/raw
# Root's folders, made first: --chmod would make them for nobody to enter.
USER root
WORKDIR /app/data
WORKDIR /app
COPY --chmod=644 mnist.py /app/
COPY --chmod=644 ${DATA}/*-ubyte.gz /app/data/
USER 1000
CMD ["python", "/app/mnist.py"]
