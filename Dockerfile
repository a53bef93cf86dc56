# Images of the worker and of its engine; docs/operations.md.
#
# The one place for Dagger's version: the engine, the `dagger` command and the
# SDK in constraints.txt go together, and tests/test_compose.py compares them.
ARG DAGGER_VERSION=0.21.11
# For registries of your own.
ARG ENGINE_IMAGE=registry.dagger.io/engine
ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim-trixie


FROM ${ENGINE_IMAGE}:v${DAGGER_VERSION} AS engine
COPY deploy/engine.json /etc/dagger/engine.json


FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
# Every file that constraints.txt names, checked by its hash. Of these, pip takes
# what the extras below need and looks nowhere else, the build backend included.
COPY constraints.txt .
RUN pip download --no-cache-dir --require-hashes --only-binary=:all: --dest=wheels \
    --requirement=constraints.txt
COPY LICENSE README.md pyproject.toml ./
COPY examples examples
COPY pipelines pipelines
COPY moonmind_ext moonmind_ext
RUN python -m venv --without-pip /app \
    && pip --python=/app/bin/python install --no-cache-dir --no-index --find-links=wheels \
        '.[cli,queue,worker]'


FROM ${PYTHON_IMAGE} AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates gh git openssh-client tini \
    && rm -rf /var/lib/apt/lists/*
# The group of the engine's socket, too: the engine gets it as `--group`.
RUN groupadd --gid=10001 moonmind \
    && useradd --uid=10001 --gid=10001 --create-home moonmind \
    && install --directory --owner=moonmind --group=moonmind /work/agent_jobs /data
COPY --from=engine /usr/local/bin/dagger /usr/local/bin/dagger
COPY --from=build /app /app
ENV PATH=/app/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MOONMIND_WORKDIR=/work/agent_jobs \
    MOONMIND_WORKER_METRICS_PORT=9464
USER 10001:10001
WORKDIR /home/moonmind
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=4 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['MOONMIND_WORKER_METRICS_PORT']), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "moonmind-ext"]
CMD ["worker"]


# For the profile `docker-proxy` alone: `dagger` starts the engine with this.
FROM base AS worker-docker-proxy
USER root
RUN apt-get update \
    && apt-get install --yes --no-install-recommends docker-cli \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001


FROM base AS worker
