# CPU by default. For CUDA:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 \
#                --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 -t blyan-node:cuda .
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev libgmp-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# python3 is the image's own where it has one first on its path (python:3.12), else the distribution's (Ubuntu's 3.12).
RUN python3 -m venv /opt/blyan \
    && /opt/blyan/bin/pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" -c constraints.txt .

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 libgmp10 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 blyan \
    && install -d -m 700 -o blyan -g blyan /data
COPY --from=build /opt/blyan /opt/blyan
USER blyan
ENV PATH=/opt/blyan/bin:$PATH \
    BLYAN_DATA_DIR=/data \
    BLYAN_API_HOST=0.0.0.0 \
    BLYAN_LOG_FORMAT=json
VOLUME /data
# Peers; the API. Publish the API to 127.0.0.1 only, unless a proxy with TLS stands in front of it.
EXPOSE 4001 8645
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8645/health', timeout=4).read()"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["blyan-node"]
CMD ["start"]
