# samed3d serve in a container, without root rights.
#   docker build -t samed3d .                             CPU
#   docker build -t samed3d:cuda --build-arg DEVICE=cuda .   NVIDIA GPU (docker run --gpus all)
#   docker run -p 127.0.0.1:1527:1527 -e SAMED3D_TOKEN=... -v samed3d-sessions:/sessions -v $PWD/data:/data:ro samed3d
# The address inside the container is 0.0.0.0, so the server demands a token of at least 16 characters.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
# The build of the wheel fetches the web viewer with npm.
RUN apt-get update && apt-get install -y --no-install-recommends npm && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
ARG DEVICE=cpu
# PyPI's torch for Linux is the CUDA build and brings the CUDA libraries; the CPU build has an index of its own.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    if [ "$DEVICE" = cpu ]; then pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu; fi \
    && pip install --no-cache-dir "$(ls /wheels/samed3d-*.whl)[dicom]" \
    && useradd --create-home --uid 1000 samed3d \
    && install -d -o samed3d -g samed3d /sessions /data
USER 1000
WORKDIR /data
ENV PYTHONUNBUFFERED=1
VOLUME /sessions
EXPOSE 1527
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1527/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["samed3d"]
CMD ["serve", "--host", "0.0.0.0", "--root", "/data", "--sessions", "/sessions"]
