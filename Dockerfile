# The service alone: no training code, no torch, no models (they are mounted at /models).
# RUNTIME=cpu or gpu chooses the locked requirements. Both stages start from one image: a virtual environment
# points at the interpreter it was made with.

FROM python:3.11-slim-bookworm AS build
ARG RUNTIME=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/latch
COPY requirements/${RUNTIME}.txt /src/requirements.txt
RUN /opt/latch/bin/pip install --require-hashes -r /src/requirements.txt
COPY pyproject.toml LICENSE /src/
COPY models /src/models
COPY service /src/service
RUN /opt/latch/bin/pip install --no-deps /src \
    && rm /opt/latch/bin/latch-train \
    && /opt/latch/bin/pip uninstall -y setuptools pip

FROM python:3.11-slim-bookworm
# A volume that is mounted at /data for the first time takes its owner from here.
RUN useradd --system --uid 10001 --no-create-home latch && install -d -o 10001 -g 10001 -m 700 /data
COPY --from=build /opt/latch /opt/latch
ENV PATH=/opt/latch/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LATCH_HOST=0.0.0.0 \
    LATCH_PORT=8000 \
    LATCH_MODELS=/models
WORKDIR /opt/latch
USER 10001
EXPOSE 8000
# http.client, because urllib would go through a proxy set for the container.
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['LATCH_PORT']), timeout=2); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
CMD ["latch", "serve"]
