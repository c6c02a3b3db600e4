# isomorph on CPUs, from Debian's packages and the Python package index. Linted with hadolint; not built yet: no builder was at hand.
#   docker build --tag isomorph .
#   docker run --rm --volume "$PWD/runs:/home/user/runs" isomorph train quickstart
FROM debian:bookworm-slim AS build
# hadolint ignore=DL3008 # the release of Debian is the pin
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3 -m venv /opt/isomorph \
    && /opt/isomorph/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && /opt/isomorph/bin/pip install --no-cache-dir .

# No compiler here: the C++ module is in the environment, with the bodies for every x86-64 processor.
FROM debian:bookworm-slim
# hadolint ignore=DL3008 # the release of Debian is the pin
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libgomp1 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home user
COPY --from=build /opt/isomorph /opt/isomorph
USER 1000
WORKDIR /home/user
ENV PATH=/opt/isomorph/bin:$PATH
ENTRYPOINT ["isomorph"]
CMD ["--help"]
