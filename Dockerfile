# docker build --tag moda .
# docker run --gpus all --ipc=host --ulimit memlock=-1 --volume "$PWD/runs:/moda/runs" moda moda train configs/moda_demo.yaml
#
# PyTorch's wheel brings CUDA, cuDNN and NCCL; the host brings its driver. Triton compiles with gcc when a kernel is first
# called; the rdma libraries let NCCL use InfiniBand and RoCE.
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev ibverbs-providers libibverbs1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /moda
ARG TORCH="torch>=2.10,<2.14"
RUN pip install --no-cache-dir "$TORCH"
# The layers above stay when the sources change.
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY moda moda
COPY evals evals
COPY scripts scripts
COPY configs configs
RUN pip install --no-cache-dir --editable '.[data,hf,report]'

CMD ["moda", "--help"]
