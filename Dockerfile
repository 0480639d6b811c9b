# smolconv for a cluster with GPUs, from the wheel of `make dist`. hadolint finds nothing in this file; nobody has built
# the image yet, and smolconv has trained on CPUs only (README.md, Limits).
#
#   make dist
#   docker build --tag smolconv .
#   docker run --rm --gpus all --volume "$PWD:/data" smolconv doctor

# devel, not runtime: Triton compiles for the GPU that it finds, and DeepSpeed its extensions for offloading, at first use.
ARG BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-devel
FROM ${BASE}

COPY constraints.txt dist/*.whl /opt/smolconv/

# torch is that of the base image, in the system's Python, which pip otherwise refuses to add to. The other versions are
# those that the tests run with.
RUN set -- /opt/smolconv/*.whl \
    && python3 -m pip install --no-cache-dir --break-system-packages --constraint /opt/smolconv/constraints.txt "$1[all,gpu]" \
    && smolconv --version \
    && useradd --create-home --uid 10001 smolconv \
    && mkdir /data \
    && chown smolconv /data

USER 10001
# Checkpoints, token files and recipes are mounted here; nothing of them, and no token of the Hub, is in the image.
WORKDIR /data
ENTRYPOINT ["smolconv"]
CMD ["--help"]
