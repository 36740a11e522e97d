# The programs on PyTorch's own image, whose torch stays as it is; docs/install.md says how to run it.
# For drivers before CUDA 13: --build-arg BASE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}

# The image's Python is the system's, and pip would refuse to add to it.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1
WORKDIR /ddim-inpo
COPY pyproject.toml LICENSE ./
RUN python3 -c "import torch; print('torch==' + torch.__version__)" > kept.txt \
    && python3 -m pip install . --constraint kept.txt
COPY . .
CMD ["bash"]
