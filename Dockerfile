# docker build --target cpu --tag encoder-svc:cpu .
#
# Targets: cpu, cuda, rocm (a server for each kind of device) and test. docs/deploy.md says how each is built and run, and
# which of them has been.

# The Python that CI tests with. Any Debian with python3 and its venv module can take its place.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/encoder-svc/bin:$PATH

# What a server needs but for torch, of which each target has a build of its own.
# A pip.conf for a mirror comes as a secret (--secret id=pip_conf,src=…), so that no image holds it.
FROM base AS dependencies
WORKDIR /src
RUN python3 -m venv /opt/encoder-svc
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = project['optional-dependencies']; \
    needs = project['dependencies'] + extras['server'] + extras['tracing']; \
    print(*(need for need in needs if not need.startswith('torch')), sep='\n')" > requirements.txt && \
    pip install --constraint constraints.txt --requirement requirements.txt

# Where the index (by default PyPI) has several builds of one version, pip takes the one with a local part, such as +cpu.
FROM dependencies AS dependencies-cpu
ARG TORCH_INDEX_URL=""
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch

# Our own files alone, so that a release adds one small layer to those of its dependencies.
FROM dependencies AS package
COPY README.md LICENSE ./
COPY encoder_svc encoder_svc
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --no-deps --ignore-installed --root /package .

# How every target runs. HOME and every cache lie in one volume: the rest can be read-only.
FROM base AS service
LABEL org.opencontainers.image.title="encoder-svc" \
      org.opencontainers.image.description="Vision encoders of Qwen-VL-style models over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 encoder-svc && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/encoder-svc --shell /usr/sbin/nologin encoder-svc && \
    install --directory --owner=10001 --group=10001 /var/cache/encoder-svc
# pip compiled every module where it was installed; a server could not write what it compiles.
ENV ENCODER_HOST=0.0.0.0 \
    ENCODER_METRICS_PORT=9464 \
    ENCODER_KERNEL_CACHE_DIR=/var/cache/encoder-svc/kernels \
    HOME=/var/cache/encoder-svc \
    HF_HOME=/var/cache/encoder-svc/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/encoder-svc/torchinductor \
    XDG_CACHE_HOME=/var/cache/encoder-svc \
    PYTHONDONTWRITEBYTECODE=1
VOLUME ["/tmp", "/var/cache/encoder-svc"]
EXPOSE 50051 9464
USER 10001:10001
WORKDIR /var/cache/encoder-svc
STOPSIGNAL SIGTERM
# Loading a model, and downloading it first, takes minutes; until it serves, a failure does not count.
HEALTHCHECK --interval=10s --timeout=6s --start-period=15m --retries=3 CMD ["encoder-svc", "health"]
ENTRYPOINT ["encoder-svc", "serve"]

# Triton compiles a launcher for each kernel with a C compiler, and the CPU's own kernels are compiled where they run. Debian
# keeps one version of it, so that none can be pinned.
FROM service AS service-compiler
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001:10001

FROM service-compiler AS cpu
COPY --from=dependencies-cpu /opt/encoder-svc /opt/encoder-svc
COPY --from=package /package /

# docker run --rm encoder-svc:test -k health
FROM dependencies-cpu AS test
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*project['optional-dependencies']['dev'], sep='\n')" > requirements-dev.txt && \
    pip install --constraint constraints.txt --requirement requirements-dev.txt
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    scripts/install_test_tools.sh && \
    pip install --no-deps --editable . && \
    useradd --uid 10001 --create-home tester && chown 10001 /src
USER 10001
ENTRYPOINT ["python3", "-m", "pytest"]

FROM dependencies AS dependencies-cuda
ARG TORCH_INDEX_URL=""
ARG CUDA_PACKAGES="flash-attn-4==4.0.0b36 nvidia-cutlass-dsl==4.8.1 quack-kernels==0.6.5"
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
        torch ${CUDA_PACKAGES} && \
    python3 -c "import torch; assert torch.version.cuda, f'{torch.__version__} is no CUDA build: set TORCH_INDEX_URL'"

FROM dependencies AS dependencies-rocm
ARG TORCH_INDEX_URL=""
ARG ROCM_PACKAGES=""
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
        torch ${ROCM_PACKAGES} && \
    python3 -c "import torch; assert torch.version.hip, f'{torch.__version__} is no ROCm build: set TORCH_INDEX_URL'"

# The driver's libraries come from the host (NVIDIA's container toolkit), those of CUDA with torch.
FROM service-compiler AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=dependencies-cuda /opt/encoder-svc /opt/encoder-svc
COPY --from=package /package /

# /dev/kfd and /dev/dri come from the host, ROCm's libraries with torch.
FROM service-compiler AS rocm
COPY --from=dependencies-rocm /opt/encoder-svc /opt/encoder-svc
COPY --from=package /package /

# Built where no target is named.
FROM cpu
