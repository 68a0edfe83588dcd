# Galerne's image: one Python environment from hash-pinned locks, for pods that run as a number on a read-only root.
#
#   --target gpu (the default)   vLLM's CUDA build, from locks/gpu.txt
#   --target cpu                 vLLM's CPU build, from locks/image-cpu.txt
#
# What was run of it, and what was not, stands in docs/image.md. BuildKit, podman and buildah build it.

# A mirror's name with a slash at its end; absent: the engine's default registry.
ARG REGISTRY_PREFIX=""
# Pinned by its whole version. Where images are pinned by digest, pass python@sha256:… here.
ARG PYTHON_IMAGE="python:3.11.14-slim-bookworm"

FROM ${REGISTRY_PREFIX}${PYTHON_IMAGE} AS build
# Where packages come from, read by uv and pip; their hashes are in the locks, whatever this says. Never credentials:
# those go through `--secret id=netrc,src=…`.
ARG UV_DEFAULT_INDEX
ARG UV_FIND_LINKS
ARG PIP_INDEX_URL
WORKDIR /src
COPY locks/ locks/
COPY image/ image/
COPY setup/ setup/
COPY pyproject.toml README.md LICENSE ./
COPY serving/ serving/
COPY deployments/ deployments/
COPY loadtest/ loadtest/

FROM build AS build-cpu
RUN --mount=type=secret,id=netrc,target=/root/.netrc,required=false \
    --mount=type=cache,target=/root/.cache \
    PYTHON=/usr/local/bin/python3.11 COMPILE_BYTECODE=1 UV_LINK_MODE=copy image/install.sh cpu /opt/galerne

FROM build AS build-gpu
RUN --mount=type=secret,id=netrc,target=/root/.netrc,required=false \
    --mount=type=cache,target=/root/.cache \
    PYTHON=/usr/local/bin/python3.11 COMPILE_BYTECODE=1 UV_LINK_MODE=copy image/install.sh gpu /opt/galerne

FROM ${REGISTRY_PREFIX}${PYTHON_IMAGE} AS runtime
# A compiler stays, because engines compile while they start: torch's inductor needs g++ on processors, Triton needs gcc
# on GPUs. With `enforce_eager: true` on processors it may go: --build-arg COMPILER="". libnuma1: vLLM's CPU build is
# linked with it. wget: KubeRay's probes call it.
ARG COMPILER="g++"
# The base is pinned, and Debian removes a version when a fix comes: pinning here would break builds, not protect them.
# COMPILER is no package or one.
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 wget ${COMPILER} \
    && rm -rf /var/lib/apt/lists/* \
    && python -m pip uninstall --yes --quiet --root-user-action=ignore pip setuptools wheel \
    && useradd --uid 10001 --no-log-init --no-create-home --home-dir /var/lib/galerne --shell /usr/sbin/nologin galerne \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/galerne
# Everything that is written lies below /tmp (Ray's session, sockets), /dev/shm (Ray's object store) and
# /var/lib/galerne (caches): mounts of the pod's own. USER: whoever asks for the user's name is not to read /etc/passwd,
# which does not know a number that a cluster has picked.
ENV PATH="/opt/galerne/bin:${PATH}" \
    HOME=/var/lib/galerne \
    USER=galerne \
    XDG_CACHE_HOME=/var/lib/galerne/cache \
    VLLM_CACHE_ROOT=/var/lib/galerne/vllm \
    TORCHINDUCTOR_CACHE_DIR=/var/lib/galerne/inductor \
    TRITON_CACHE_DIR=/var/lib/galerne/triton \
    NUMBA_CACHE_DIR=/var/lib/galerne/numba \
    RAY_TMPDIR=/tmp \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1
ARG VERSION="0.1.0"
ARG REVISION=""
ARG CREATED=""
ARG SOURCE=""
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="Galerne" \
      org.opencontainers.image.description="Self-hosted serving cluster for open-weight language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
WORKDIR /var/lib/galerne
STOPSIGNAL SIGTERM
USER 10001:10001
ENTRYPOINT ["galerne"]
CMD ["--help"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/galerne /opt/galerne

FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/galerne /opt/galerne
